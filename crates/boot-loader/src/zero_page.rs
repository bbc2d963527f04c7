//! The boot parameters of the 64-bit entry, one page: Linux Documentation/arch/x86/zero-page.rst, and
//! for the fields of `hdr` boot.rst.

use std::mem::{offset_of, size_of};
use std::ops::Range;

use linux_loader::bootparam::{LOADED_HIGH, boot_e820_entry, boot_params};

use crate::bytes::put;
use crate::kernel::Kernel;
use crate::{Told, elf, layout};

const PAGE: usize = size_of::<boot_params>();

/// "Undefined" in the list of boot loaders. Zero would make kernels ignore the initrd.
const LOADER_TYPE: u8 = 0xff;
/// What an ELF kernel's own header would say, could it be had: the version that has the 64-bit entry,
/// and the alignment the 64-bit entry needs.
const ELF_PROTOCOL_VERSION: u16 = 0x20c;
const ELF_ALIGNMENT: u32 = 2 << 20;

/// Puts a value of the right width into a field of `boot_params`.
macro_rules! set {
    ($page:expr, $($field:ident).+, $value:expr) => {
        put($page, offset_of!(boot_params, $($field).+), &$value.to_le_bytes())
    };
}

pub(crate) fn build(kernel: &Kernel, told: &Told<'_>) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    let page = &mut bytes[..];
    match &kernel.setup_header {
        Some(header) => {
            put(page, offset_of!(boot_params, hdr.setup_sects), header);
            // What a loader has to write, and what it must not take over from a file.
            let load_addr = kernel.parts.first().map_or(0, |part| part.addr);
            set!(page, hdr.code32_start, low_half(load_addr));
            set!(page, hdr.setup_data, 0u64);
        }
        None => elf_header(page, kernel),
    }
    set!(page, hdr.type_of_loader, LOADER_TYPE);
    set!(page, hdr.cmd_line_ptr, low_half(layout::CMDLINE_ADDR));
    let Range { start, end } = told.initrd.cloned().unwrap_or_default();
    let size = end.saturating_sub(start);
    set!(page, hdr.ramdisk_image, low_half(start));
    set!(page, hdr.ramdisk_size, low_half(size));
    set!(page, ext_ramdisk_image, high_half(start));
    set!(page, ext_ramdisk_size, high_half(size));
    set!(page, acpi_rsdp_addr, told.rsdp_addr.unwrap_or(0));

    let entries = &told.memory.entries;
    set!(
        page,
        e820_entries,
        u8::try_from(entries.len()).unwrap_or(u8::MAX)
    );
    for (index, entry) in entries.iter().enumerate() {
        let at = offset_of!(boot_params, e820_table) + index * size_of::<boot_e820_entry>();
        put(
            page,
            at + offset_of!(boot_e820_entry, addr),
            &entry.addr.to_le_bytes(),
        );
        put(
            page,
            at + offset_of!(boot_e820_entry, size),
            &entry.size.to_le_bytes(),
        );
        put(
            page,
            at + offset_of!(boot_e820_entry, r#type),
            &entry.kind.to_le_bytes(),
        );
    }
    bytes
}

/// The setup header for a kernel that came without: an ELF file does not carry it.
fn elf_header(page: &mut [u8], kernel: &Kernel) {
    set!(page, hdr.boot_flag, 0xaa55u16);
    put(page, offset_of!(boot_params, hdr.header), b"HdrS");
    set!(page, hdr.version, ELF_PROTOCOL_VERSION);
    set!(page, hdr.loadflags, LOADED_HIGH);
    set!(page, hdr.kernel_alignment, ELF_ALIGNMENT);
    set!(page, hdr.initrd_addr_max, low_half(kernel.initrd_last));
    set!(page, hdr.cmdline_size, low_half(elf::CMDLINE_MAX));
}

fn low_half(value: u64) -> u32 {
    u32::try_from(value & u64::from(u32::MAX)).unwrap_or(0)
}

fn high_half(value: u64) -> u32 {
    low_half(value >> 32)
}
