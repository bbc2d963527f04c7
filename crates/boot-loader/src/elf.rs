//! ELF kernels: System V ABI, "ELF-64 Object File Format", and the notes in which a kernel says how it
//! can be entered (Xen include/public/elfnote.h; Linux include/linux/elfnote-lto.h, build-salt.h).

use std::mem::{offset_of, size_of};

use alveole_guest_memory::HOLE_START;
use linux_loader::elf::{
    EM_386, EM_AARCH64, EM_ARM, EM_RISCV, EM_X86_64, ET_CORE, ET_DYN, ET_EXEC, ET_REL, Elf64_Ehdr,
    Elf64_Phdr, PT_LOAD, PT_NOTE,
};

use crate::bytes::{field, u16_at, u32_at, u64_at};
use crate::kernel::{Kernel, KernelFile, Part, Start};
use crate::{EntryPreference, KernelFault, KernelKind, layout};

/// How every ELF file starts.
pub(crate) const MAGIC: &[u8] = b"\x7fELF";

const EI_CLASS: usize = 4;
const EI_DATA: usize = 5;
const CLASS_64: u8 = 2;
const DATA_LITTLE_ENDIAN: u8 = 1;

/// Flag of a program header: the segment is written.
const PF_W: u32 = 2;
/// Program headers we look at; kernels have about five, and a file can claim 65535.
const MAX_PROGRAM_HEADERS: u16 = 64;
/// Bytes of notes we look at in one segment; kernels have a few hundred, and a file can claim all of
/// its own length.
const MAX_NOTE_BYTES: u64 = 64 << 10;

/// The note that holds the PVH entry: owner and type.
const PVH_NOTE: (&[u8], u32) = (b"Xen\0", 18);
/// The owner of notes that Linux itself puts in.
const LINUX_NOTE_OWNER: &[u8] = b"Linux\0";

/// Linux takes an initrd anywhere below 2 GiB (`initrd_addr_max` of its own header: 0x7fffffff).
const INITRD_LAST: u64 = 0x7fff_ffff;
/// Linux `COMMAND_LINE_SIZE` is 2048 on x86, with the terminating zero.
pub(crate) const CMDLINE_MAX: u64 = 2047;

#[derive(Debug, Clone, Copy)]
struct Segment {
    index: usize,
    offset: u64,
    file_size: u64,
    addr: u64,
    virtual_addr: u64,
    memory_size: u64,
    writable: bool,
}

pub(crate) fn parse(
    file: &KernelFile<'_>,
    preference: EntryPreference,
) -> Result<Kernel, KernelFault> {
    check_identity(&file.head)?;
    let headers = program_headers(file)?;
    let segments = segments(file, &headers)?;
    let notes = notes(file, &headers)?;
    let entry = u64_at(&file.head, offset_of!(Elf64_Ehdr, e_entry));
    let start = match (preference, notes.pvh_entry) {
        (EntryPreference::Pvh, None) => return Err(KernelFault::NoPvh),
        (EntryPreference::Pvh, Some(entry)) => pvh_start(entry, &segments)?,
        // `e_entry` of a kernel that is not Linux may be anything, such as 32-bit code for multiboot.
        (EntryPreference::Auto, Some(entry)) if !notes.linux => pvh_start(entry, &segments)?,
        _ => Start::Long64(physical(entry, &segments)?),
    };
    let first = segments.iter().map(|s| s.addr).min().unwrap_or(0);
    let end = segments.iter().map(Segment::end).max().unwrap_or(0);
    let part = |s: &Segment| Part {
        offset: s.offset,
        file_size: s.file_size,
        addr: s.addr,
        writable: s.writable,
    };
    Ok(Kernel {
        kind: KernelKind::Elf,
        parts: segments
            .iter()
            .filter(|s| s.file_size > 0)
            .map(part)
            .collect(),
        range: first..end,
        start,
        initrd_last: INITRD_LAST,
        cmdline_max: CMDLINE_MAX,
        setup_header: None,
    })
}

fn check_identity(head: &[u8]) -> Result<(), KernelFault> {
    let have = head.len() as u64;
    if head.len() < size_of::<Elf64_Ehdr>() {
        let needs_bytes = size_of::<Elf64_Ehdr>() as u128;
        return Err(KernelFault::Truncated {
            what: "its ELF header".into(),
            have_bytes: have,
            needs_bytes,
        });
    }
    let other = |what: String| Err(KernelFault::OtherElf(what));
    if field::<1>(head, EI_CLASS) != [CLASS_64] {
        return other("a 32-bit ELF file".into());
    }
    if field::<1>(head, EI_DATA) != [DATA_LITTLE_ENDIAN] {
        return other("a big-endian ELF file".into());
    }
    match u16_at(head, offset_of!(Elf64_Ehdr, e_machine)) {
        EM_X86_64 => {}
        EM_AARCH64 => return other("an ELF file for arm64".into()),
        EM_ARM => return other("an ELF file for 32-bit arm".into()),
        EM_RISCV => return other("an ELF file for RISC-V".into()),
        EM_386 => return other("an ELF file for 32-bit x86".into()),
        machine => return other(format!("an ELF file for machine {machine}")),
    }
    match u16_at(head, offset_of!(Elf64_Ehdr, e_type)) {
        // What is linked position-independently still says its physical addresses.
        ET_EXEC | ET_DYN => Ok(()),
        ET_REL => other("an ELF object file (ET_REL), such as a kernel module".into()),
        ET_CORE => other("an ELF core dump (ET_CORE)".into()),
        kind => other(format!("an ELF file of type {kind}")),
    }
}

/// The program headers, 56 bytes each.
fn program_headers(file: &KernelFile<'_>) -> Result<Vec<u8>, KernelFault> {
    let damaged = |what| Err(KernelFault::ElfHeaders(what));
    let size = u16_at(&file.head, offset_of!(Elf64_Ehdr, e_phentsize));
    let count = u16_at(&file.head, offset_of!(Elf64_Ehdr, e_phnum));
    if usize::from(size) != size_of::<Elf64_Phdr>() {
        return damaged(format!("each is {size} bytes long instead of 56"));
    }
    if count == 0 || count > MAX_PROGRAM_HEADERS {
        return damaged(format!(
            "there are {count}; a kernel has 1 to {MAX_PROGRAM_HEADERS}"
        ));
    }
    let offset = u64_at(&file.head, offset_of!(Elf64_Ehdr, e_phoff));
    file.read(
        "its ELF program headers",
        offset,
        u64::from(size) * u64::from(count),
    )
}

/// What is to be loaded, in order of address and without overlap.
fn segments(file: &KernelFile<'_>, headers: &[u8]) -> Result<Vec<Segment>, KernelFault> {
    let mut segments = Vec::new();
    for (index, header) in headers.chunks_exact(size_of::<Elf64_Phdr>()).enumerate() {
        let number = |at| u64_at(header, at);
        let segment = Segment {
            index,
            offset: number(offset_of!(Elf64_Phdr, p_offset)),
            file_size: number(offset_of!(Elf64_Phdr, p_filesz)),
            addr: number(offset_of!(Elf64_Phdr, p_paddr)),
            virtual_addr: number(offset_of!(Elf64_Phdr, p_vaddr)),
            memory_size: number(offset_of!(Elf64_Phdr, p_memsz)),
            writable: u32_at(header, offset_of!(Elf64_Phdr, p_flags)) & PF_W != 0,
        };
        if u32_at(header, offset_of!(Elf64_Phdr, p_type)) == PT_LOAD && segment.memory_size > 0 {
            segment.check(file)?;
            segments.push(segment);
        }
    }
    if segments.is_empty() {
        return Err(KernelFault::ElfHeaders(
            "none of them is a segment to load".into(),
        ));
    }
    segments.sort_by_key(|s| s.addr);
    for (a, b) in segments.iter().zip(segments.iter().skip(1)) {
        if a.end() > b.addr {
            return Err(KernelFault::SegmentOverlap {
                first: a.index,
                second: b.index,
                at: b.addr,
            });
        }
    }
    Ok(segments)
}

impl Segment {
    fn check(&self, file: &KernelFile<'_>) -> Result<(), KernelFault> {
        let Self {
            index,
            file_size,
            memory_size,
            ..
        } = *self;
        if file_size > memory_size {
            return Err(KernelFault::ElfHeaders(format!(
                "segment {index} has {file_size:#x} bytes in the file but {memory_size:#x} in memory"
            )));
        }
        file.check(format!("its ELF segment {index}"), self.offset, file_size)?;
        let end = u128::from(self.addr) + u128::from(memory_size);
        if self.addr < layout::HIGH_RAM_START || end > HOLE_START.into() {
            return Err(KernelFault::SegmentPlace {
                index,
                start: self.addr,
                end,
                low: layout::HIGH_RAM_START,
                high: HOLE_START,
            });
        }
        Ok(())
    }

    /// `check` has seen that this does not wrap.
    fn end(&self) -> u64 {
        self.addr.saturating_add(self.memory_size)
    }

    /// How far `at` lies in what the file fills of a segment that starts at `start`.
    fn offset_of(&self, at: u64, start: u64) -> Option<u64> {
        at.checked_sub(start)
            .filter(|offset| *offset < self.file_size)
    }
}

/// The physical address of `e_entry`, which is that address itself in Linux and a virtual one in
/// kernels linked without care for loaders.
fn physical(entry: u64, segments: &[Segment]) -> Result<u64, KernelFault> {
    if segments
        .iter()
        .any(|s| s.offset_of(entry, s.addr).is_some())
    {
        return Ok(entry);
    }
    segments
        .iter()
        .find_map(|s| s.addr.checked_add(s.offset_of(entry, s.virtual_addr)?))
        .ok_or(KernelFault::EntryOutside { kind: "ELF", entry })
}

fn pvh_start(entry: u64, segments: &[Segment]) -> Result<Start, KernelFault> {
    let inside = segments
        .iter()
        .any(|s| s.offset_of(entry, s.addr).is_some());
    match u32::try_from(entry) {
        Ok(eip) if inside => Ok(Start::Pvh(eip)),
        _ => Err(KernelFault::EntryOutside { kind: "PVH", entry }),
    }
}

#[derive(Debug, Default)]
struct Notes {
    pvh_entry: Option<u64>,
    linux: bool,
}

fn notes(file: &KernelFile<'_>, headers: &[u8]) -> Result<Notes, KernelFault> {
    let mut found = Notes::default();
    for header in headers.chunks_exact(size_of::<Elf64_Phdr>()) {
        if u32_at(header, offset_of!(Elf64_Phdr, p_type)) != PT_NOTE {
            continue;
        }
        let offset = u64_at(header, offset_of!(Elf64_Phdr, p_offset));
        let size = u64_at(header, offset_of!(Elf64_Phdr, p_filesz)).min(MAX_NOTE_BYTES);
        // 8 is used for property notes only, which hold nothing for us.
        if u64_at(header, offset_of!(Elf64_Phdr, p_align)) != 8 {
            found.read(&file.read("its ELF notes", offset, size)?);
        }
    }
    Ok(found)
}

impl Notes {
    /// Walks notes: lengths of owner and content, type, then both, each padded to 4 bytes.
    fn read(&mut self, mut rest: &[u8]) {
        const HEADER: usize = 12;
        let padded = |len: u32| usize::try_from(len).ok()?.checked_next_multiple_of(4);
        while rest.len() >= HEADER {
            let (owner_len, content_len) = (u32_at(rest, 0), u32_at(rest, 4));
            let kind = u32_at(rest, 8);
            let Some((owner_room, content_room)) = padded(owner_len).zip(padded(content_len))
            else {
                return;
            };
            let Some(content_at) = HEADER.checked_add(owner_room) else {
                return;
            };
            let Some(next_at) = content_at.checked_add(content_room) else {
                return;
            };
            let Some(owner) = rest.get(HEADER..content_at) else {
                return;
            };
            // The last note may lack its padding.
            let content = rest.get(content_at..).unwrap_or_default();
            if owner.starts_with(LINUX_NOTE_OWNER) {
                self.linux = true;
            } else if owner == PVH_NOTE.0 && kind == PVH_NOTE.1 {
                self.pvh_entry = match content_len {
                    4 if content.len() >= 4 => Some(u32_at(content, 0).into()),
                    8 if content.len() >= 8 => Some(u64_at(content, 0)),
                    _ => self.pvh_entry,
                };
            }
            rest = rest.get(next_at..).unwrap_or_default();
        }
    }
}
