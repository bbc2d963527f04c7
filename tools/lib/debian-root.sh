# shellcheck shell=bash
# Makes root file systems of Debian's own packages, in the cache: a small Debian with systemd, as people
# put it on a disk, of the release and from the archive that this machine's apt knows.
#
# To be sourced. It knows neither kernel nor monitor: there is no kernel in it.
#
#   debian_root_dir   prints the directory of the cached root, making it if need be (root only, a minute):
#                     root.ext4, root.squashfs, root.erofs, and what a guest of it is to say of itself:
#                     os-release (/etc/os-release) and packages (how many are installed)
#
#   podman_root_file  prints the file of a cached root with podman and Python (EROFS), making it if need be (root only, two minutes)
#
# In the first, /usr/local/sbin/debian-report and its unit (resources/guest) tell the host what runs.

# shellcheck source=tools/lib/packages.sh
source "$(dirname "${BASH_SOURCE[0]}")/packages.sh"
# shellcheck source=tools/lib/cache.sh
source "$(dirname "${BASH_SOURCE[0]}")/cache.sh"

debian_root_dir() {
    local lib cache mirror suite key dir fd
    lib=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
    packages_refresh_lists || return 1
    read -r mirror suite < <(debian_archive) || return 1
    # What goes in, and how.
    key=$(cat "$lib/debian-root.sh" "$lib"/../../resources/guest/debian-report{,.service} | sha256sum) || return 1
    cache=$(cache_dir)/debian-root dir=$cache/$suite-${key:0:16}
    mkdir -p "$cache" || return 1
    exec {fd}>"$cache/lock"
    flock "$fd"
    if ! cache_is_whole "$dir"; then
        debian_root_fill "$mirror" "$suite" "$dir" "$lib/../../resources/guest" >&2 || dir=''
    fi
    exec {fd}>&-
    [[ -n $dir ]] && printf '%s\n' "$dir"
}

# Prints mirror and release of the archive that this machine gets its own base from, or complains.
debian_archive() {
    LC_ALL=C apt-cache policy base-files |
        awk '$2 ~ /^[a-z]+:\/\// && $3 ~ /^[a-z]+\/main$/ { sub(/\/main$/, "", $3); print $2, $3; found = 1; exit }
            END { exit !found }' ||
        packages_complain "apt names no archive that has base-files: a Debian root needs a Debian to come from" \
            "(run 'apt-get update')"
}

# debian_bootstrap MIRROR SUITE DIR PACKAGES: a small Debian with these packages (with commas between them).
debian_bootstrap() {
    local proxy
    local -a options=()
    # Proxies of this machine; nobody in a guest of this size reads documents.
    while read -r proxy; do
        options+=("--aptopt=$proxy")
    done < <(apt-config dump | grep -E '^Acquire::https?::Proxy')
    mmdebstrap --variant=minbase --include="$4" "${options[@]}" \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/man/*' "$2" "$3" "$1" </dev/null
}

# debian_root_fill MIRROR SUITE DIR RESOURCES
debian_root_fill() {
    local mirror=$1 suite=$2 dir=$3 resources=$4 new root said
    if ((EUID != 0)); then
        packages_complain "only root can make a Debian root file system"
        return 1
    fi
    need_package mmdebstrap mmdebstrap mke2fs e2fsprogs mksquashfs squashfs-tools mkfs.erofs erofs-utils || return 1
    # Under the lock, temporaries of others can only be remains of callers that were killed, and roots of
    # former recipes are of no more use.
    rm -rf "${dir%/*}"/.new.* "${dir%-*}"-*
    new=$(mktemp -d "${dir%/*}/.new.XXXXXX") || return 1
    root=$new/root
    echo "alveole tools: making a root of Debian $suite" >&2
    if ! said=$(
        exec 2>&1
        debian_bootstrap "$mirror" "$suite" "$root" systemd-sysv,udev &&
            debian_root_report "$root" "$resources" &&
            cp "$root/usr/lib/os-release" "$new/os-release" &&
            chroot "$root" dpkg-query -f '.\n' -W | wc -l >"$new/packages" &&
            mke2fs -q -F -t ext4 -d "$root" "$new/root.ext4" 320M &&
            # Quick to make and to read, not small.
            mksquashfs "$root" "$new/root.squashfs" -quiet -no-progress -noappend -comp lz4 &&
            mkfs.erofs -zlz4 "$new/root.erofs" "$root"
    ); then
        rm -rf "$new"
        packages_complain "could not make a root of Debian $suite from $mirror; the last that was said:"
        tail -n 15 <<<"$said" >&2
        return 1
    fi
    rm -rf "$root"
    chmod 755 "$new"
    cache_seal "$new" && mv "$new" "$dir"
}

# debian_root_report ROOT RESOURCES: puts there what tells the host what runs.
debian_root_report() {
    local unit=/etc/systemd/system/debian-report.service
    install -m 755 "$2/debian-report" "$1/usr/local/sbin/debian-report" &&
        install -m 644 "$2/debian-report.service" "$1$unit" &&
        mkdir -p "$1/etc/systemd/system/multi-user.target.wants" &&
        ln -s "$unit" "$1/etc/systemd/system/multi-user.target.wants/"
}

podman_root_file() {
    local lib cache mirror suite key file fd
    lib=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
    packages_refresh_lists || return 1
    read -r mirror suite < <(debian_archive) || return 1
    key=$(sha256sum <"$lib/debian-root.sh") || return 1
    cache=$(cache_dir)/podman-root file=$cache/$suite-${key:0:16}.erofs
    mkdir -p "$cache" || return 1
    exec {fd}>"$cache/lock"
    flock "$fd"
    if [[ ! -e $file ]]; then
        podman_root_fill "$mirror" "$suite" "$file" >&2 || file=''
    fi
    exec {fd}>&-
    [[ -n $file ]] && printf '%s\n' "$file"
}

# podman_root_fill MIRROR SUITE FILE
podman_root_fill() {
    local mirror=$1 suite=$2 file=$3 new said
    if ((EUID != 0)); then
        packages_complain "only root can make a Debian root file system"
        return 1
    fi
    need_package mmdebstrap mmdebstrap mkfs.erofs erofs-utils || return 1
    # Under the lock, they are remains of callers that were killed, or of former recipes.
    rm -rf "${file%/*}"/.new.* "${file%/*}"/*.erofs
    new=$(mktemp -d "${file%/*}/.new.XXXXXX") || return 1
    echo "alveole tools: making a root of Debian $suite with podman" >&2
    if ! said=$(
        exec 2>&1
        debian_bootstrap "$mirror" "$suite" "$new/root" podman,crun,containernetworking-plugins,iptables,python3 &&
            mkfs.erofs -Enoinline_data "$new/root.erofs" "$new/root"
    ); then
        rm -rf "$new"
        packages_complain "could not make a root with podman from $mirror; the last that was said:"
        tail -n 15 <<<"$said" >&2
        return 1
    fi
    chmod 644 "$new/root.erofs" && mv "$new/root.erofs" "$file"
    rm -rf "$new"
    [[ -e $file ]]
}
