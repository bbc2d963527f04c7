# shellcheck shell=bash
# schemathesis, which tests an API against its description: in the cache, in an environment of its own.
#
# To be sourced, after cache.sh. It knows Python's pip only, and not what is tested.
#
#   schemathesis_program   prints the path of the program, installed if need be; fails if that cannot be done

readonly schemathesis_version=4.32.5

schemathesis_program() {
    local dir
    dir=$(cache_dir)/schemathesis-$schemathesis_version
    if [[ ! -f $dir/complete ]]; then
        echo "alveole tools: installing schemathesis $schemathesis_version (by pip)" >&2
        rm -rf "$dir"
        mkdir -p "${dir%/*}"
        python3 -m venv "$dir" >&2 &&
            "$dir/bin/pip" install --quiet --disable-pip-version-check "schemathesis==$schemathesis_version" >&2 &&
            touch "$dir/complete" || return 1
    fi
    printf '%s\n' "$dir/bin/schemathesis"
}
