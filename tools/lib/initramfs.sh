# shellcheck shell=bash
# Makes initramfs images out of a staging directory, reproducibly.
#
# To be sourced. It does not know what an image is for: callers fill the directory.
#
#   initramfs_busybox STAGING               puts busybox and links for all its commands there
#   initramfs_modules STAGING MODULES NAME...
#                                           copies kernel modules and what they depend on, softly
#                                           too, out of the tree MODULES (.../lib/modules/RELEASE),
#                                           for modprobe; a name may be an alias
#   initramfs_pack STAGING OUT              writes OUT (newc cpio, not compressed); the same
#                                           contents give the same bytes

# shellcheck source=tools/lib/packages.sh
source "$(dirname "${BASH_SOURCE[0]}")/packages.sh"

initramfs_busybox() {
    local staging=$1 busybox applet
    # A busybox that is not static has the same path: ask for the package itself.
    need_package /var/lib/dpkg/info/busybox-static.list busybox-static || return 1
    busybox=$(command -v busybox) || busybox=/bin/busybox
    mkdir -p "$staging/bin" || return 1
    cp -L "$busybox" "$staging/bin/busybox" || return 1
    chmod 755 "$staging/bin/busybox"
    while read -r applet; do
        if [[ $applet != */busybox ]]; then
            mkdir -p "$staging/${applet%/*}" && ln -sf /bin/busybox "$staging/$applet" || return 1
        fi
    done < <("$busybox" --list-full)
}

# Prints the line of modules.dep about the module, or the first module that has the name as an alias.
module_line() {
    local modules=$1 name=$2 alias
    if grep -E "(^|/)${name//[_-]/[_-]}\.ko:" "$modules/modules.dep"; then
        return 0
    fi
    while read -r alias; do
        if grep -E "(^|/)${alias//[_-]/[_-]}\.ko:" "$modules/modules.dep"; then
            return 0
        fi
    done < <(sed -n "s/^alias ${name//[_-]/[_-]} //p" "$modules/modules.alias")
    return 1
}

initramfs_modules() {
    local staging=$1 modules=$2 name line file soft found=''
    shift 2
    local tree=$staging/lib/modules/${modules##*/}
    mkdir -p "$tree" || return 1
    for name; do
        # A line of modules.dep: the file, a colon, all files which must be loaded before it.
        line=$(module_line "$modules" "$name") || line=''
        if [[ -z $line ]]; then
            if grep -qE "/${name//[_-]/[_-]}\.ko$" "$modules/modules.builtin"; then
                continue
            fi
            echo "alveole tools: there is no module '$name' in $modules: check its name" >&2
            return 1
        fi
        found+=$line$'\n'
        # What a module asks the kernel for while it starts is in no dependency of its file.
        while read -r soft; do
            if file=$(module_line "$modules" "$soft"); then
                line+=" ${file/:/}"
                found+=$file$'\n'
            fi
        done < <(sed -n "s/^softdep ${name//[_-]/[_-]} pre: //p" "$modules/modules.softdep" | tr ' ' '\n')
        for file in ${line/:/}; do
            mkdir -p "$tree/${file%/*}" && cp "$modules/$file" "$tree/$file" || return 1
            # modprobe looks up the dependencies' own lines too.
            found+=$(grep -F "$file:" "$modules/modules.dep")$'\n'
        done
    done
    cp "$modules"/modules.{alias,softdep} "$tree/" || return 1
    { cat "$tree/modules.dep" 2>/dev/null || true; printf '%s' "$found"; } | LC_ALL=C sort -u >"$tree/modules.dep.new"
    mv "$tree/modules.dep.new" "$tree/modules.dep"
}

initramfs_pack() {
    local staging=$1 out said
    out=$(realpath -m "$2") || return 1
    need_package cpio cpio || return 1
    # Times are the one thing in a staging directory that is never the same twice.
    find "$staging" -depth -exec touch -h -d @0 {} +
    if ! said=$( (cd "$staging" && find . -mindepth 1 -print0 | LC_ALL=C sort -z |
        cpio --quiet --null -o -H newc --reproducible -R 0:0 >"$out.new") 2>&1); then
        rm -f "$out.new"
        echo "alveole tools: could not write the initramfs $out: $said" >&2
        return 1
    fi
    mv "$out.new" "$out"
}
