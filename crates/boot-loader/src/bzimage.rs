//! bzImage: Linux Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header" and "64-bit Boot
//! Protocol". The 16-bit setup code in front of the kernel is skipped; only its header is used.

use std::mem::offset_of;

use alveole_guest_memory::HOLE_START;
use linux_loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, boot_params};

use crate::bytes::{field, u16_at, u32_at, u64_at};
use crate::kernel::{Kernel, KernelFile, Part, Start};
use crate::{EntryPreference, KernelFault, KernelKind, layout};

/// Offsets in the file are those in the boot parameters: the header is copied as it is.
macro_rules! at {
    ($field:ident) => {
        offset_of!(boot_params, hdr.$field)
    };
}

const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: [u8; 4] = *b"HdrS";
/// The first version with `xloadflags`, and so with a 64-bit entry.
const FIRST_64BIT_VERSION: u16 = 0x20c;
/// What `setup_sects` of zero means.
const DEFAULT_SETUP_SECTORS: u8 = 4;
const SECTOR_BYTES: u64 = 512;
/// `syssize` counts these.
const PARAGRAPH_BYTES: u64 = 16;
/// Where the 64-bit entry lies behind the start of the kernel.
const ENTRY_64_OFFSET: u64 = 0x200;
/// The header ends at 0x202 plus the byte at 0x201, which is the reach of its jump.
const HEADER_END_BASE: usize = 0x202;
const HEADER_LENGTH_AT: usize = 0x201;
/// An alignment beyond this would leave no room below 3 GiB.
const MAX_ALIGNMENT: u32 = 1 << 30;

pub(crate) fn has_setup_header(head: &[u8]) -> bool {
    u16_at(head, at!(boot_flag)) == BOOT_FLAG && field(head, at!(header)) == MAGIC
}

pub(crate) fn parse(
    file: &KernelFile<'_>,
    preference: EntryPreference,
) -> Result<Kernel, KernelFault> {
    if preference == EntryPreference::Pvh {
        return Err(KernelFault::NoPvh);
    }
    let head = &file.head;
    let version = u16_at(head, at!(version));
    let xloadflags = if version < FIRST_64BIT_VERSION {
        0
    } else {
        u16_at(head, at!(xloadflags))
    };
    if xloadflags & XLF_KERNEL_64 == 0 {
        return Err(KernelFault::NoEntry64 {
            version,
            xloadflags,
        });
    }
    let header = setup_header(file)?;

    let sectors = match field(head, at!(setup_sects)) {
        [0] => DEFAULT_SETUP_SECTORS,
        [sectors] => sectors,
    };
    let offset = (u64::from(sectors) + 1) * SECTOR_BYTES;
    let paragraphs = u32_at(head, at!(syssize));
    let file_size = u64::from(paragraphs) * PARAGRAPH_BYTES;
    file.check("its kernel code", offset, file_size)?;
    if file_size <= ENTRY_64_OFFSET {
        return Err(bad(
            "syssize",
            paragraphs,
            "which leaves no room for an entry point",
        ));
    }

    let place = Place::read(head)?;
    let init_size = u64::from(u32_at(head, at!(init_size)));
    let end = place
        .runs_at
        .checked_add(init_size)
        .map(|end| end.max(place.load_addr.saturating_add(file_size)))
        .filter(|end| *end <= HOLE_START);
    let Some(end) = end else {
        return Err(bad(
            "init_size",
            init_size,
            "which does not fit below 3 GiB",
        ));
    };
    Ok(Kernel {
        kind: KernelKind::BzImage,
        parts: vec![Part {
            offset,
            file_size,
            addr: place.load_addr,
            writable: false,
        }],
        range: place.load_addr.min(place.runs_at)..end,
        start: Start::Long64(place.load_addr.saturating_add(ENTRY_64_OFFSET)),
        initrd_last: u32_at(head, at!(initrd_addr_max)).into(),
        cmdline_max: u32_at(head, at!(cmdline_size)).into(),
        setup_header: Some(header),
    })
}

/// The header that is copied into the boot parameters, from `setup_sects` on.
fn setup_header(file: &KernelFile<'_>) -> Result<Vec<u8>, KernelFault> {
    let [length] = field(&file.head, HEADER_LENGTH_AT);
    let room_end = offset_of!(boot_params, edd_mbr_sig_buffer);
    let end = (HEADER_END_BASE + usize::from(length)).min(room_end);
    if end < at!(handover_offset) {
        return Err(bad(
            "jump",
            length,
            "which makes the header shorter than its version says",
        ));
    }
    let start = at!(setup_sects);
    file.read("its setup header", start as u64, (end - start) as u64)
}

/// Where a kernel is put and where it unpacks itself to.
struct Place {
    load_addr: u64,
    runs_at: u64,
}

impl Place {
    /// A relocatable kernel is put where it prefers to run, which saves it a move: it runs at its load
    /// address, aligned, and never below `pref_address`. Another goes to 1 MiB and moves itself.
    fn read(head: &[u8]) -> Result<Self, KernelFault> {
        let preferred = u64_at(head, at!(pref_address));
        let [loadflags] = field(head, at!(loadflags));
        if loadflags & LOADED_HIGH == 0 {
            return Err(bad(
                "loadflags",
                loadflags,
                "which is a zImage, to be loaded below 1 MiB",
            ));
        }
        if !(layout::HIGH_RAM_START..HOLE_START).contains(&preferred) {
            return Err(bad(
                "pref_address",
                preferred,
                "which is not between 1 MiB and 3 GiB",
            ));
        }
        if field(head, at!(relocatable_kernel)) == [0] {
            return Ok(Self {
                load_addr: layout::HIGH_RAM_START,
                runs_at: preferred,
            });
        }
        let alignment = u32_at(head, at!(kernel_alignment));
        if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
            return Err(bad(
                "kernel_alignment",
                alignment,
                "which is no power of two up to 1 GiB",
            ));
        }
        let load_addr = preferred.next_multiple_of(alignment.into());
        Ok(Self {
            load_addr,
            runs_at: load_addr,
        })
    }
}

fn bad(field: &'static str, value: impl Into<u64>, why: &'static str) -> KernelFault {
    KernelFault::SetupHeader {
        field,
        value: value.into(),
        why,
    }
}
