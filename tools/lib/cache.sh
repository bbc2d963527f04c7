# shellcheck shell=bash
# Where tools keep what takes long to get, and whether it is still whole.
#
# To be sourced. It does not know what is kept, nor how it is made.
#
#   cache_dir            prints the cache directory; ALVEOLE_CACHE sets it
#   cache_seal DIR       notes what DIR holds
#   cache_is_whole DIR   succeeds if every file that was noted is there and of the right size: cheap enough
#                        for each call, and catches what really happens to caches (a full disk, a clean-up)

cache_dir() {
    printf '%s\n' "${ALVEOLE_CACHE:-${XDG_CACHE_HOME:-${HOME:?HOME is not set: set it or ALVEOLE_CACHE}/.cache}/alveole}"
}

cache_seal() {
    cache_sizes "$1" >"$1/sizes.new" && mv "$1/sizes.new" "$1/sizes"
}

cache_is_whole() {
    [[ -f $1/sizes ]] && cache_sizes "$1" | cmp -s - "$1/sizes"
}

cache_sizes() {
    (cd "$1" && find . -type f ! -name 'sizes*' ! -name sums -printf '%P %s\n' | LC_ALL=C sort)
}
