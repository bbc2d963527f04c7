//! The PVH start info, its module and its memory map: Xen include/public/arch-x86/hvm/start_info.h.

use std::mem::{offset_of, size_of};
use std::ops::Range;

use linux_loader::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};

use crate::bytes::put;
use crate::{Told, layout};

/// The first version with a memory map.
const VERSION: u32 = 1;

/// Puts a value of the right width into a field of a structure at `$at`.
macro_rules! set {
    ($page:expr, $at:expr, $kind:ident.$field:ident, $value:expr) => {
        put(
            $page,
            $at + offset_of!($kind, $field),
            &$value.to_le_bytes(),
        )
    };
}

/// The bytes from [`layout::START_INFO_ADDR`] on.
pub(crate) fn build(told: &Told<'_>) -> Vec<u8> {
    const START: u64 = layout::START_INFO_ADDR as u64;
    const MODULE: usize = (layout::MODULE_ADDR - START) as usize;
    const MAP: usize = (layout::PVH_MEMORY_MAP_ADDR - START) as usize;
    let entries = &told.memory.entries;
    let mut bytes = vec![0; MAP + entries.len() * size_of::<hvm_memmap_table_entry>()];
    let page = &mut bytes[..];

    set!(page, 0, hvm_start_info.magic, XEN_HVM_START_MAGIC_VALUE);
    set!(page, 0, hvm_start_info.version, VERSION);
    set!(page, 0, hvm_start_info.cmdline_paddr, layout::CMDLINE_ADDR);
    set!(
        page,
        0,
        hvm_start_info.rsdp_paddr,
        told.rsdp_addr.unwrap_or(0)
    );
    set!(
        page,
        0,
        hvm_start_info.memmap_paddr,
        layout::PVH_MEMORY_MAP_ADDR
    );
    // The memory map has at most 128 entries.
    let count = u32::try_from(entries.len()).unwrap_or(0);
    set!(page, 0, hvm_start_info.memmap_entries, count);
    if let Some(Range { start, end }) = told.initrd {
        set!(page, 0, hvm_start_info.nr_modules, 1u32);
        set!(page, 0, hvm_start_info.modlist_paddr, layout::MODULE_ADDR);
        set!(page, MODULE, hvm_modlist_entry.paddr, start);
        set!(
            page,
            MODULE,
            hvm_modlist_entry.size,
            end.saturating_sub(*start)
        );
    }
    for (index, entry) in entries.iter().enumerate() {
        let at = MAP + index * size_of::<hvm_memmap_table_entry>();
        set!(page, at, hvm_memmap_table_entry.addr, entry.addr);
        set!(page, at, hvm_memmap_table_entry.size, entry.size);
        set!(page, at, hvm_memmap_table_entry.type_, entry.kind);
    }
    bytes
}

// Nothing runs into what lies behind it.
const _: () = {
    use linux_loader::bootparam::E820_MAX_ENTRIES_ZEROPAGE as MOST;
    let info_end = layout::START_INFO_ADDR as u64 + size_of::<hvm_start_info>() as u64;
    let module_end = layout::MODULE_ADDR + size_of::<hvm_modlist_entry>() as u64;
    let map_size = (MOST * size_of::<hvm_memmap_table_entry>()) as u64;
    assert!(info_end <= layout::MODULE_ADDR && module_end <= layout::PVH_MEMORY_MAP_ADDR);
    assert!(layout::PVH_MEMORY_MAP_ADDR + map_size <= layout::BOOT_PARAMS_ADDR);
};
