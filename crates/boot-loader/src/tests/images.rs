//! Makes kernel files.

/// Bytes that differ from place to place.
pub(super) fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 % 251) as u8 | 1).collect()
}

/// One ELF program header.
#[derive(Clone, Copy)]
pub(super) struct Ph {
    pub(super) kind: u32,
    pub(super) offset: u64,
    pub(super) vaddr: u64,
    pub(super) paddr: u64,
    pub(super) filesz: u64,
    pub(super) memsz: u64,
}

/// A segment to load, linked where Linux is.
pub(super) fn load_at(offset: u64, paddr: u64, filesz: u64, memsz: u64) -> Ph {
    Ph {
        kind: 1,
        offset,
        vaddr: paddr.wrapping_add(0xffff_ffff_8000_0000),
        paddr,
        filesz,
        memsz,
    }
}

/// One ELF note.
pub(super) fn note(owner: &[u8], kind: u32, content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for number in [owner.len() as u32, content.len() as u32, kind] {
        bytes.extend(number.to_le_bytes());
    }
    for part in [owner, content] {
        bytes.extend(part);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// An ELF file: headers, notes at 0x800, a pattern from 0x1000 to `len`.
pub(super) fn elf(entry: u64, headers: &[Ph], notes: &[u8], len: usize) -> Vec<u8> {
    let mut bytes = vec![0; 0x1000];
    bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(16, &2u16.to_le_bytes());
    put(18, &62u16.to_le_bytes());
    put(20, &1u32.to_le_bytes());
    put(24, &entry.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &64u16.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    let size = notes.len() as u64;
    let notes_at = Ph {
        kind: 4,
        offset: 0x800,
        vaddr: 0,
        paddr: 0,
        filesz: size,
        memsz: size,
    };
    let all: Vec<_> = headers
        .iter()
        .chain((size > 0).then_some(&notes_at))
        .collect();
    put(56, &(all.len() as u16).to_le_bytes());
    for (i, h) in all.iter().enumerate() {
        let at = 64 + i * 56;
        put(at, &h.kind.to_le_bytes());
        for (i, n) in [h.offset, h.vaddr, h.paddr, h.filesz, h.memsz, 4]
            .iter()
            .enumerate()
        {
            put(at + 8 + i * 8, &n.to_le_bytes());
        }
    }
    put(0x800, notes);
    bytes.extend(pattern(len.saturating_sub(0x1000)));
    bytes
}

pub(super) const ENTRY: u64 = 0x100_0123;

/// A kernel as Linux is linked: text and data with zeroes behind, at 16 MiB.
pub(super) fn vmlinux(notes: &[u8]) -> Vec<u8> {
    let headers = [
        load_at(0x1000, 0x100_0000, 0x2345, 0x2345),
        load_at(0x4000, 0x100_3000, 0x1001, 0x8000),
    ];
    elf(ENTRY, &headers, notes, 0x5001)
}

pub(super) fn pvh_note(entry: u64) -> Vec<u8> {
    note(b"Xen\0", 18, &entry.to_le_bytes())
}

pub(super) fn linux_note() -> Vec<u8> {
    note(b"Linux\0", 0x100, b"salt\0")
}

/// Offsets of boot.rst in a bzImage.
pub(super) const SYSSIZE: usize = 0x1f4;
pub(super) const PREF_ADDRESS: usize = 0x258;
pub(super) const INIT_SIZE: usize = 0x260;

/// A bzImage with `setup_sects` sectors of setup and 0x3000 bytes of kernel.
pub(super) fn bzimage(setup_sects: u8) -> Vec<u8> {
    let setup = (usize::from(setup_sects) + 1) * 512;
    let mut bytes = vec![0; setup.max(0x1000)];
    bytes[..2].copy_from_slice(b"MZ");
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0x1f1, &[setup_sects]);
    put(SYSSIZE, &0x300u32.to_le_bytes());
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x200, &[0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1, 21]);
    put(0x236, &0x7fu16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x250, &0xdead_beefu64.to_le_bytes());
    put(PREF_ADDRESS, &0x100_0000u64.to_le_bytes());
    put(INIT_SIZE, &0x80_0000u32.to_le_bytes());
    bytes.truncate(setup);
    bytes.extend(pattern(0x3000));
    bytes
}
