# shellcheck shell=bash
# Fetches Debian's stock cloud kernel, unmodified, into the cache; and unpacks kernels.
#
# To be sourced. It installs no kernel, and knows neither who boots this one nor how.
#
#   kernel_dir                   prints the directory of the cached kernel, fetching it if need be:
#                                vmlinuz, vmlinux (the ELF inside it), config, lib/modules/RELEASE
#   kernel_refresh               the same, but looks for a newer one and checks all contents
#   kernel_vmlinux, kernel_modules
#                                print the path of one of these
#   kernel_extract VMLINUZ OUT   writes the uncompressed ELF of any bzImage to OUT
#
# ALVEOLE_CACHE sets the cache directory, ALVEOLE_KERNEL_PACKAGE the (meta) package to take.

# shellcheck source=tools/lib/packages.sh
source "$(dirname "${BASH_SOURCE[0]}")/packages.sh"
# shellcheck source=tools/lib/cache.sh
source "$(dirname "${BASH_SOURCE[0]}")/cache.sh"

kernel_vmlinux() {
    local dir
    dir=$(kernel_dir) && printf '%s/vmlinux\n' "$dir"
}

kernel_modules() {
    local dir modules
    dir=$(kernel_dir) || return 1
    for modules in "$dir"/lib/modules/*/; do
        printf '%s\n' "${modules%/}"
        return 0
    done
}

kernel_dir() {
    kernel_current "$(cache_dir)/kernel" || kernel_get ''
}

kernel_refresh() {
    kernel_get refresh
}

kernel_get() {
    local cache dir fd refresh=$1
    cache=$(cache_dir)/kernel
    mkdir -p "$cache" || return 1
    exec {fd}>"$cache/lock"
    flock "$fd"
    # Somebody else may have filled the cache while this process waited for the lock.
    if [[ -n $refresh ]] || ! dir=$(kernel_current "$cache"); then
        dir=$(kernel_fill "$cache" "$refresh") || dir=''
    fi
    exec {fd}>&-
    [[ -n $dir ]] && printf '%s\n' "$dir"
}

# Prints the directory of the cached kernel if it is there and whole.
kernel_current() {
    local dir
    # By sizes only; kernel_refresh compares contents as well.
    dir=$(readlink -e "$1/current") && cache_is_whole "$dir" && printf '%s\n' "$dir"
}

kernel_fill() {
    local cache=$1 refresh=$2 meta=${ALVEOLE_KERNEL_PACKAGE:-linux-image-cloud-amd64}
    local package version dir new
    need_package dpkg-deb dpkg depmod kmod lz4 lz4 xz xz-utils zstd zstd || return 1
    packages_refresh_lists || return 1

    package=$(kernel_package "$meta")
    if [[ -z $package ]]; then
        kernel_complain "apt knows no kernel package '$meta': this needs Debian's package lists" \
            "(run 'apt-get update'), or another package named in ALVEOLE_KERNEL_PACKAGE"
        return 1
    fi
    version=$(apt-cache show --no-all-versions "$package" | sed -n 's/^Version: //p;T;q')
    dir=$cache/${package}_${version//[^A-Za-z0-9.+~-]/_}

    if cache_is_whole "$dir" && { [[ -z $refresh ]] || (cd "$dir" && sha256sum --quiet -c sums >&2); }; then
        ln -sfn "${dir##*/}" "$cache/current"
        printf '%s\n' "$dir"
        return 0
    fi

    # Under the lock, temporaries of others can only be remains of callers that were killed.
    rm -rf "$cache"/.new.*
    new=$(mktemp -d "$cache/.new.XXXXXX") || return 1
    echo "alveole tools: fetching $package $version" >&2
    if ! kernel_unpack "$package" "$new"; then
        rm -rf "$new"
        return 1
    fi
    chmod 755 "$new"
    # What was there before was not whole, or it would have been taken.
    if [[ -e $dir ]]; then
        mv "$dir" "$new.old"
    fi
    mv "$new" "$dir" && ln -sfn "${dir##*/}" "$cache/current" || return 1
    rm -rf "$new.old"
    printf '%s\n' "$dir"
}

# Prints the package which holds the kernel itself: what the meta package depends on.
kernel_package() {
    local depends
    depends=$(apt-cache depends --important "$1" 2>/dev/null) || return 0
    awk '$1 == "Depends:" && $2 ~ /^linux-image-/ { print $2; found = 1; exit }
         END { if (!found) print name }' name="$1" <<<"$depends"
}

# kernel_unpack PACKAGE DIR: downloads the package and arranges what is needed of it in DIR.
kernel_unpack() {
    local package=$1 dir=$2 said file modules release
    mkdir "$dir/deb" || return 1
    if ! said=$(cd "$dir/deb" && apt-get -qq download "$package" 2>&1); then
        # Lists that are too old name files that are gone.
        if ((EUID == 0)); then
            packages_apt update || return 1
        fi
        if ! said=$(cd "$dir/deb" && apt-get -qq download "$package" 2>&1); then
            kernel_complain "could not download $package; apt-get said: $said"
            return 1
        fi
    fi
    dpkg-deb -x "$dir"/deb/*.deb "$dir/root" || return 1

    mkdir -p "$dir/lib/modules" || return 1
    for file in "$dir"/root/boot/vmlinuz-*; do
        release=${file##*/vmlinuz-}
        mv "$file" "$dir/vmlinuz" && mv "$dir/root/boot/config-$release" "$dir/config" || return 1
    done
    # Later releases keep the modules under /usr, and compressed, which not every modprobe reads.
    for modules in "$dir/root/lib/modules/$release" "$dir/root/usr/lib/modules/$release"; do
        if [[ -d $modules ]]; then
            mv "$modules" "$dir/lib/modules/$release" || return 1
        fi
    done
    rm -rf "$dir/root" "$dir/deb"
    find "$dir/lib/modules" -name '*.ko.xz' -exec xz -d {} +
    find "$dir/lib/modules" -name '*.ko.zst' -exec zstd -q -d --rm {} +
    PATH=$PATH:/usr/sbin:/sbin depmod -b "$dir" "$release" || return 1
    kernel_extract "$dir/vmlinuz" "$dir/vmlinux" || return 1
    chmod -R a+rX,go-w "$dir"
    (cd "$dir" && find . -type f ! -name 'sizes*' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum) >"$dir/../.sums" &&
        mv "$dir/../.sums" "$dir/sums" && cache_seal "$dir"
}

# kernel_extract VMLINUZ OUT
# The boot protocol (2.08 and later) says where the compressed ELF lies in a bzImage; the four
# bytes after it are its uncompressed size, except with gzip, which has that in its own trailer.
kernel_extract() {
    local image=$1 out=$2 setup offset length magic size
    local -a unpack
    if [[ $(kernel_bytes "$image" 0x202 4 c) != HdrS ]]; then
        kernel_complain "$image is not a bzImage (no 'HdrS' at 0x202): give a vmlinuz file"
        return 1
    fi
    setup=$(kernel_bytes "$image" 0x1f1 1 u1)
    offset=$(($(kernel_bytes "$image" 0x248 4 u4) + (setup + 1) * 512))
    length=$(kernel_bytes "$image" 0x24c 4 u4)
    magic=$(kernel_bytes "$image" "$offset" 4 x1)
    size=$(kernel_bytes "$image" $((offset + length - 4)) 4 u4)
    case $magic in
    1f8b*) unpack=(gzip -dc) ;;
    fd377a58) unpack=(xz -dc) ;;
    02214c18) unpack=(lz4 -dc) ;;
    28b52ffd) unpack=(zstd -dc) ;;
    425a68*) unpack=(bzip2 -dc) ;;
    5d0000*) unpack=(xz --format=lzma -dc) ;;
    894c5a4f) unpack=(lzop -dc) ;;
    *)
        kernel_complain "$image: the payload begins with $magic, which is no compression known here"
        return 1
        ;;
    esac
    if [[ $magic != 1f8b* ]]; then
        length=$((length - 4))
    fi
    need_package gzip gzip xz xz-utils lz4 lz4 zstd zstd bzip2 bzip2 || return 1
    if [[ ${unpack[0]} == lzop ]]; then
        need_package lzop lzop || return 1
    fi
    if ! dd if="$image" bs=64K iflag=skip_bytes,count_bytes skip="$offset" count="$length" status=none |
        "${unpack[@]}" >"$out.new" ||
        [[ $(kernel_bytes "$out.new" 1 3 c) != ELF || $(stat -c %s "$out.new") != "$size" ]]; then
        rm -f "$out.new"
        kernel_complain "$image: '${unpack[*]}' did not give an ELF file of $size bytes: the file is damaged"
        return 1
    fi
    mv "$out.new" "$out"
}

# kernel_bytes FILE OFFSET COUNT TYPE: prints bytes as od's TYPE has them, without blanks.
kernel_bytes() {
    od -An -v -j "$(($2))" -N "$3" -t "$4" "$1" 2>/dev/null | tr -d ' \n'
}

kernel_complain() {
    echo "alveole tools: $*" >&2
}
