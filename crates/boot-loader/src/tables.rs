//! What the processor itself needs before the first instruction: segment descriptors and page tables
//! (Intel SDM vol. 3A, 3.4.5 and 4.5).

use alveole_guest_memory::{AccessError, GuestRam, PAGE_SIZE};

use crate::layout;

/// Flat 64-bit code: present, executable, readable, accessed, long.
pub(crate) const CODE_64: u64 = 0x00af_9b00_0000_ffff;
/// Flat 32-bit code of 4 GiB.
pub(crate) const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
/// Flat data of 4 GiB: present, writable, accessed.
const DATA: u64 = 0x00cf_9300_0000_ffff;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const LARGE_PAGE: u64 = 1 << 7;

const LARGE_PAGE_SIZE: u64 = 2 << 20;
const ENTRIES: u64 = 512;
const DIRECTORY_SPAN: u64 = ENTRIES * LARGE_PAGE_SIZE;

/// Writes the descriptors and gives their length in bytes: code at 0x10, data at 0x18, as the boot
/// protocol wants them.
pub(crate) fn write_gdt(ram: &GuestRam, code: u64) -> Result<u16, AccessError> {
    let descriptors = [0, 0, code, DATA];
    let bytes: Vec<u8> = descriptors.into_iter().flat_map(u64::to_le_bytes).collect();
    ram.write(layout::GDT_ADDR, &bytes)?;
    Ok(32)
}

/// Maps the first GiBs one to one with 2 MiB pages, up to the one that holds `end`. The boot protocol
/// asks for kernel, boot parameters and command line; Linux maps the rest itself. Each GiB costs a page.
pub(crate) fn write_page_tables(ram: &GuestRam, end: u64) -> Result<(), AccessError> {
    let directories = end
        .div_ceil(DIRECTORY_SPAN)
        .clamp(1, layout::MAX_PAGE_DIRECTORIES);
    let table = PRESENT | WRITABLE;
    ram.write(
        layout::PML4_ADDR,
        &(layout::PDPT_ADDR | table).to_le_bytes(),
    )?;
    let pointers = (0..directories)
        .map(|i| (layout::PAGE_DIRECTORY_ADDR + i * PAGE_SIZE) | table)
        .flat_map(u64::to_le_bytes);
    ram.write(layout::PDPT_ADDR, &pointers.collect::<Vec<u8>>())?;
    let pages = (0..directories * ENTRIES)
        .map(|i| (i * LARGE_PAGE_SIZE) | table | LARGE_PAGE)
        .flat_map(u64::to_le_bytes);
    ram.write(layout::PAGE_DIRECTORY_ADDR, &pages.collect::<Vec<u8>>())
}
