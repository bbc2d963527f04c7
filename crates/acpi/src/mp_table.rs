//! The description that came before ACPI: Intel MultiProcessor Specification 1.4, chapter 4.
//!
//! Kernels with ACPI use nothing of it, but look for it first, and the looking is what it is here for: a Linux
//! kernel that finds no floating pointer maps and unmaps the firmware area once for each 16 of its 64 Ki
//! bytes. Where page tables are dear (a hypervisor without nested paging) that is most of a boot. A kernel
//! started with `acpi=off` finds its processors here.

use crate::Board;

/// First place where a kernel looks that the specification names: the last KiB of base memory.
pub const MP_TABLE_ADDR: u64 = 0x9_fc00;

const POINTER_BYTES: u32 = 16;
const HEADER_BYTES: usize = 44;
const LOCAL_APIC_ADDR: u32 = 0xfee0_0000;
/// Version 1.4 of the specification.
const REVISION: u8 = 4;
/// Integrated local APIC, and the I/O APIC of the in-kernel controllers.
const LOCAL_APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;
const ISA_BUS: u8 = 0;
const ISA_INTERRUPTS: u8 = 16;
const ALL_LOCAL_APICS: u8 = 0xff;
/// Most APIC ids of one byte: 0xff means all, and the I/O APIC takes one.
const MAX_IDS: usize = 254;

/// The floating pointer and the configuration table behind it, to be placed at [`MP_TABLE_ADDR`].
/// None for a board that this old form cannot describe: more processors than it has APIC ids for.
#[must_use]
pub fn mp_table(board: &Board) -> Option<Vec<u8>> {
    let ids: Vec<u8> = board
        .cpu_apic_ids
        .iter()
        .map(|&id| u8::try_from(id).ok())
        .collect::<Option<_>>()?;
    let io_apic_id = ids.iter().max()?.checked_add(1)?;
    if ids.len() > MAX_IDS || io_apic_id == ALL_LOCAL_APICS {
        return None;
    }
    let mut entries: Vec<Vec<u8>> = Vec::new();
    for (i, &id) in ids.iter().enumerate() {
        // Flags: enabled; the first is the boot processor. Signature and features are the CPU's to say.
        let flags = if i == 0 { 3 } else { 1 };
        let mut entry = vec![0, id, LOCAL_APIC_VERSION, flags];
        entry.resize(20, 0);
        entries.push(entry);
    }
    entries.push([&[1, ISA_BUS], b"ISA   ".as_slice()].concat());
    let addr = board.io_apic_addr.to_le_bytes();
    entries.push([&[2, io_apic_id, IO_APIC_VERSION, 1], addr.as_slice()].concat());
    for irq in 0..ISA_INTERRUPTS {
        entries.push(vec![3, 0, 0, 0, ISA_BUS, irq, io_apic_id, irq]);
    }
    // Local pins of every processor: 0 takes the external controller, 1 the NMI.
    entries.push(vec![4, 3, 0, 0, ISA_BUS, 0, ALL_LOCAL_APICS, 0]);
    entries.push(vec![4, 1, 0, 0, ISA_BUS, 0, ALL_LOCAL_APICS, 1]);

    let body = entries.concat();
    let length = u16::try_from(HEADER_BYTES + body.len()).ok()?;
    let count = u16::try_from(entries.len()).ok()?;
    let mut table = Vec::with_capacity(usize::from(length));
    table.extend(b"PCMP");
    table.extend(length.to_le_bytes());
    table.extend([REVISION, 0]);
    table.extend(b"ALVEOLE ");
    table.extend(b"microVM     ");
    table.extend([0; 6]); // no table of the manufacturer's own
    table.extend(count.to_le_bytes());
    table.extend(LOCAL_APIC_ADDR.to_le_bytes());
    table.extend([0; 4]); // no extended entries
    table.extend(body);
    balance(&mut table, 7);

    let at = u32::try_from(MP_TABLE_ADDR).ok()? + POINTER_BYTES;
    let mut all = b"_MP_".to_vec();
    all.extend(at.to_le_bytes());
    all.extend([1, REVISION, 0, 0, 0, 0, 0, 0]);
    balance(&mut all, 10);
    all.extend(table);
    Some(all)
}

/// Sets the byte at `at` so that all bytes add up to zero.
fn balance(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(byte) = bytes.get_mut(at) {
        *byte = byte.wrapping_sub(sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::board;

    #[test]
    fn both_parts_balance_and_every_entry_is_counted() {
        for cpus in [1, 2, 64, 254] {
            let all = mp_table(&board(cpus)).unwrap();
            let (pointer, table) = all.split_at(16);
            let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |s, b| s.wrapping_add(*b));
            assert_eq!((sum(pointer), sum(table)), (0, 0), "{cpus}");
            assert_eq!(&pointer[..4], b"_MP_");
            assert_eq!(pointer[4..8], 0x9_fc10_u32.to_le_bytes());
            assert_eq!(
                usize::from(u16::from_le_bytes([table[4], table[5]])),
                table.len()
            );
            let (mut at, mut seen, mut processors) = (HEADER_BYTES, 0, 0);
            while at < table.len() {
                processors += u32::from(table[at] == 0);
                at += if table[at] == 0 { 20 } else { 8 };
                seen += 1;
            }
            assert_eq!((at, processors), (table.len(), cpus));
            assert_eq!(u16::from_le_bytes([table[34], table[35]]), seen);
        }
    }

    #[test]
    fn what_has_no_byte_for_its_ids_has_no_table() {
        assert_eq!(mp_table(&board(255)), None);
        assert_eq!(mp_table(&board(0)), None);
    }

    #[test]
    fn the_table_ends_before_the_acpi_tables() {
        let end = MP_TABLE_ADDR + mp_table(&board(254)).unwrap().len() as u64;
        assert!(end < 0xe_0000);
    }
}
