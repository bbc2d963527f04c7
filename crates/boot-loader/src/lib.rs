//! Puts a Linux kernel, its initrd and its command line into guest memory and says in which state the
//! boot processor is to start.
//!
//! ELF kernels are entered in 64-bit mode (Linux Documentation/arch/x86/boot.rst, "64-bit Boot
//! Protocol") or through their PVH note (Xen docs/misc/pvh.pandoc); bzImages in 64-bit mode. Only headers
//! are read: kernel and initrd are mapped from their files, so that a start costs a few page faults
//! whatever their size.
//!
//! Kernel and initrd files are hostile: every length and offset in them is checked before it is used.
//! All checks come first; guest memory is written when nothing can be refused any more.
//!
//! Deliberately does not know: the hypervisor, what ACPI tables say, which devices exist, where the
//! command line comes from.

mod bytes;
mod bzimage;
mod cmdline;
mod elf;
mod error;
mod initrd;
mod kernel;
pub mod layout;
mod memory_map;
mod start_info;
mod tables;
mod zero_page;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use alveole_guest_memory::{AccessError, GuestRam};

pub use error::{KernelFault, LoadError};
use initrd::Initrd;
use kernel::{Kernel, Start};
use memory_map::MemoryMap;

/// What is to be started.
#[derive(Debug, Clone, Copy)]
pub struct BootSource<'a> {
    /// The kernel: an ELF vmlinux or a bzImage.
    pub kernel: &'a File,
    /// Its name, for messages.
    pub kernel_path: &'a Path,
    /// The initial RAM disk and its name.
    pub initrd: Option<(&'a File, &'a Path)>,
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// Which way into the kernel.
    pub entry: EntryPreference,
}

/// Which way into the kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum EntryPreference {
    /// The 64-bit entry of Linux kernels, which reaches 64-bit mode without a detour; PVH for other
    /// kernels that have the note.
    #[default]
    Auto,
    /// The 64-bit entry, whatever the kernel says of itself.
    Linux64,
    /// The PVH entry.
    Pvh,
}

/// How files get into guest memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Placement {
    /// Mapped copy-on-write from the page cache: nothing is read now, and guests share what they do not
    /// write. What the kernel marks as writable is copied.
    #[default]
    Map,
    /// Copied: the guest does not depend on the file afterwards.
    Copy,
}

/// What lies where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// How the boot processor starts.
    pub entry: EntryState,
    /// What the kernel file was.
    pub kind: KernelKind,
    /// Guest addresses that the kernel takes, with what it needs to unpack and start.
    pub kernel: Range<u64>,
    /// Guest addresses of the initrd, to the byte.
    pub initrd: Option<Range<u64>>,
}

/// Format of a kernel file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelKind {
    /// An ELF vmlinux.
    Elf,
    /// A bzImage.
    BzImage,
}

/// The state in which the boot processor is to start: segments flat, interrupts off. The descriptor
/// table holds code at selector 0x10 and data at 0x18.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryState {
    /// 64-bit mode with paging on (boot.rst, "64-bit Boot Protocol").
    Long64 {
        /// First instruction.
        rip: u64,
        /// Top of a small stack.
        rsp: u64,
        /// The boot parameters: goes to `rsi`.
        boot_params_addr: u64,
        /// Top of the page tables: goes to `cr3`.
        page_tables_addr: u64,
        /// The global descriptor table.
        gdt_addr: u64,
        /// Its length in bytes.
        gdt_size_bytes: u16,
    },
    /// 32-bit protected mode, paging off, `cr4` zero (PVH).
    Protected32 {
        /// First instruction.
        eip: u32,
        /// The start info: goes to `ebx`.
        start_info_addr: u32,
        /// The global descriptor table.
        gdt_addr: u64,
        /// Its length in bytes.
        gdt_size_bytes: u16,
    },
}

/// Loads `source` into `ram`, which must be fresh: all zero but for what the caller put into the
/// firmware area (see [`layout`]). `rsdp_addr` is where the ACPI root pointer lies, in that area.
///
/// # Errors
/// The kernel, the initrd or the command line is not usable, or does not fit in guest memory.
pub fn load(
    ram: &GuestRam,
    source: &BootSource<'_>,
    rsdp_addr: Option<u64>,
    placement: Placement,
) -> Result<Loaded, LoadError> {
    let memory = MemoryMap::of(ram)?;
    let kernel = Kernel::open(source.kernel, source.entry, memory.low_end).map_err(|fault| {
        LoadError::Kernel {
            path: source.kernel_path.into(),
            fault,
        }
    })?;
    cmdline::check(source.cmdline, kernel.cmdline_max)?;
    let initrd = source
        .initrd
        .map(|(file, path)| Initrd::fit(file, path, &kernel, &memory))
        .transpose()?;

    for part in &kernel.parts {
        // What the kernel writes would be copied all the same, page by page, at a fault each.
        let placement = if part.writable {
            Placement::Copy
        } else {
            placement
        };
        put(
            ram,
            placement,
            source.kernel,
            part.offset,
            part.addr,
            part.file_size,
        )
        .map_err(failed("the kernel"))?;
    }
    if let Some(initrd) = &initrd {
        let Range { start, end } = initrd.range;
        put(
            ram,
            placement,
            initrd.file,
            0,
            start,
            end.saturating_sub(start),
        )
        .map_err(failed("the initrd"))?;
    }
    let initrd = initrd.map(|initrd| initrd.range);
    let told = Told {
        memory: &memory,
        initrd: initrd.as_ref(),
        rsdp_addr,
    };
    let entry = write_tables(ram, &kernel, source.cmdline, &told).map_err(failed("boot tables"))?;
    Ok(Loaded {
        entry,
        kind: kernel.kind,
        kernel: kernel.range,
        initrd,
    })
}

fn put(
    ram: &GuestRam,
    placement: Placement,
    file: &File,
    offset: u64,
    addr: u64,
    len: u64,
) -> Result<(), AccessError> {
    match placement {
        Placement::Copy => ram.copy_file(file, offset, addr, len),
        Placement::Map => ram.place_file(file, offset, addr, len),
    }
}

/// What every kernel is told, in the form its entry wants.
struct Told<'a> {
    memory: &'a MemoryMap,
    initrd: Option<&'a Range<u64>>,
    rsdp_addr: Option<u64>,
}

fn write_tables(
    ram: &GuestRam,
    kernel: &Kernel,
    cmdline: &str,
    told: &Told<'_>,
) -> Result<EntryState, AccessError> {
    // RAM is fresh, so that the terminating zero is there already.
    ram.write(layout::CMDLINE_ADDR, cmdline.as_bytes())?;
    let gdt_addr = layout::GDT_ADDR;
    match kernel.start {
        Start::Long64(rip) => {
            let gdt_size_bytes = tables::write_gdt(ram, tables::CODE_64)?;
            tables::write_page_tables(ram, kernel.range.end)?;
            let page = zero_page::build(kernel, told);
            ram.write(layout::BOOT_PARAMS_ADDR, &page)?;
            Ok(EntryState::Long64 {
                rip,
                rsp: layout::STACK_TOP_ADDR,
                boot_params_addr: layout::BOOT_PARAMS_ADDR,
                page_tables_addr: layout::PML4_ADDR,
                gdt_addr,
                gdt_size_bytes,
            })
        }
        Start::Pvh(eip) => {
            let gdt_size_bytes = tables::write_gdt(ram, tables::CODE_32)?;
            ram.write(layout::START_INFO_ADDR.into(), &start_info::build(told))?;
            let start_info_addr = layout::START_INFO_ADDR;
            Ok(EntryState::Protected32 {
                eip,
                start_info_addr,
                gdt_addr,
                gdt_size_bytes,
            })
        }
    }
}

fn failed(what: &'static str) -> impl Fn(AccessError) -> LoadError {
    move |source| LoadError::Place { what, source }
}
