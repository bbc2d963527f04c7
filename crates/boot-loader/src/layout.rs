//! Where the loader puts things in guest memory.
//!
//! | guest address | what | in the memory map |
//! |---|---|---|
//! | 0x0_0000 | nothing: the BIOS data area, which kernels look at, reads zero | usable |
//! | 0x0_6000 | global descriptor table | usable |
//! | 0x0_6100 | PVH start info, its module and memory map (PVH only) | usable |
//! | 0x0_7000 | boot parameters, the "zero page" (64-bit entry only) | usable |
//! | 0x0_8000 | stack of the entry code, grows down from 0x9000 (not touched by us) | usable |
//! | 0x0_9000 | PML4, one entry (64-bit entry only) | usable |
//! | 0x0_a000 | page directory pointers, one for each GiB | usable |
//! | 0x0_b000 | page directories of 2 MiB pages, up to four | usable |
//! | 0x2_0000 | command line, up to 64 KiB | usable |
//! | 0x9_fc00 | end of what PCs have below 640 KiB | reserved |
//! | 0xe_0000 | firmware area: the caller's ACPI tables | reserved |
//! | 0x10_0000 | from here on: the kernel where it wants to be, then the initrd as high as possible | usable |
//! | end of low RAM | the hole for 32-bit devices | not mentioned |
//! | 4 GiB | the rest of RAM | usable |
//!
//! The kernel owns everything that the map calls usable as soon as it has read its parameters.

use alveole_guest_memory::HOLE_START;

/// Global descriptor table: null, null, code, data.
pub const GDT_ADDR: u64 = 0x6000;
/// PVH start info.
pub const START_INFO_ADDR: u32 = 0x6100;
/// The one PVH module.
pub const MODULE_ADDR: u64 = 0x6140;
/// PVH memory map.
pub const PVH_MEMORY_MAP_ADDR: u64 = 0x6180;
/// Boot parameters, the "zero page".
pub const BOOT_PARAMS_ADDR: u64 = 0x7000;
/// Top of a page of stack.
pub const STACK_TOP_ADDR: u64 = 0x9000;
/// Top of the page tables.
pub const PML4_ADDR: u64 = 0x9000;
/// Page directory pointers.
pub const PDPT_ADDR: u64 = 0xa000;
/// First page directory.
pub const PAGE_DIRECTORY_ADDR: u64 = 0xb000;
/// Page directories there is room for, each for 1 GiB.
pub const MAX_PAGE_DIRECTORIES: u64 = 4;
/// The command line.
pub const CMDLINE_ADDR: u64 = 0x2_0000;
/// Room for the command line, with its terminating zero.
pub const CMDLINE_ROOM_BYTES: u64 = 64 << 10;
/// The memory map calls what lies from here to [`HIGH_RAM_START`] reserved.
pub const RESERVED_START: u64 = 0x9_fc00;
/// Where the caller may put ACPI tables: from here to [`HIGH_RAM_START`].
pub const FIRMWARE_AREA_START: u64 = 0xe_0000;
/// Kernels and initrds lie at or above this address.
pub const HIGH_RAM_START: u64 = 0x10_0000;

// What lies low ends before the reserved area, and page tables reach the whole of low RAM.
const _: () = {
    assert!(PAGE_DIRECTORY_ADDR + MAX_PAGE_DIRECTORIES * 0x1000 <= CMDLINE_ADDR);
    assert!(CMDLINE_ADDR + CMDLINE_ROOM_BYTES <= RESERVED_START);
    assert!(HOLE_START <= MAX_PAGE_DIRECTORIES << 30);
};
