# shellcheck shell=bash
# Installs the distribution packages that the tools need, by name, when they are missing.
#
# To be sourced. It knows apt-get only, and neither which tool needs what nor where apt gets its
# packages from: callers name a command or file and the package which brings it.

# need_package COMMAND_OR_FILE PACKAGE [COMMAND_OR_FILE PACKAGE]...
# Makes sure that each command (a word without a slash) or file (with one) is there; installs all
# the packages that are missing in one go. Quiet when there is nothing to do.
need_package() {
    local -a things=() packages=()
    local thing package known
    while (($# >= 2)); do
        thing=$1 package=$2
        shift 2
        if packages_have "$thing"; then
            continue
        fi
        things+=("$thing")
        for known in "${packages[@]}"; do
            [[ $known != "$package" ]] || continue 2
        done
        packages+=("$package")
    done
    if ((${#packages[@]} == 0)); then
        return 0
    fi
    if ! packages_have apt-get; then
        packages_complain "${things[*]} missing, and there is no apt-get here to install ${packages[*]}:" \
            "install what provides them"
        return 1
    fi
    if ((EUID != 0)); then
        packages_complain "${things[*]} missing, and only root can install packages: run" \
            "'sudo apt-get install --no-install-recommends ${packages[*]}'"
        return 1
    fi

    echo "alveole tools: installing ${packages[*]} (for ${things[*]})" >&2
    packages_install "${packages[@]}" || return 1
    for thing in "${things[@]}"; do
        if ! packages_have "$thing"; then
            packages_complain "$thing is still missing after installing ${packages[*]}: install what provides it"
            return 1
        fi
    done
}

# packages_refresh_lists: fetches the package lists if there are none.
packages_refresh_lists() {
    if compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null; then
        return 0
    fi
    if ((EUID != 0)); then
        packages_complain "there are no package lists, and only root can fetch them: run 'sudo apt-get update'"
        return 1
    fi
    packages_apt update
}

packages_have() {
    case $1 in
    */*) [[ -e $1 ]] ;;
    # Not everyone has the administrator's directories in PATH.
    *) command -v "$1" >/dev/null || [[ -x /usr/sbin/$1 || -x /sbin/$1 ]] ;;
    esac
}

packages_install() {
    packages_refresh_lists || return 1
    if packages_apt install --yes --no-install-recommends "$@" 2>/dev/null; then
        return 0
    fi
    # The usual reason for a failure is a list that names versions which are no longer kept.
    packages_apt update || return 1
    packages_apt install --yes --no-install-recommends "$@"
}

# Runs apt-get; what it says is shown only when it fails.
packages_apt() {
    local said
    # Another apt may be at work: wait for it rather than fail.
    if said=$(DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 "$@" 2>&1 </dev/null); then
        return 0
    fi
    packages_complain "'apt-get $*' failed; it said:"
    printf '%s\n' "$said" >&2
    return 1
}

packages_complain() {
    echo "alveole tools: $*" >&2
}
