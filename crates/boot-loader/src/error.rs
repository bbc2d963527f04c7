//! Why loading failed. Parsers give a [`KernelFault`] and know no path; [`LoadError`] adds it.

use std::io;
use std::path::PathBuf;

use alveole_guest_memory::AccessError;

use crate::bytes::Size;
use crate::layout;

/// Why a guest cannot be started from these files.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The kernel file.
    #[error("cannot load kernel {path:?}: {fault}")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        fault: KernelFault,
    },
    /// The initrd is no file, or cannot be read.
    #[error("cannot load initrd {path:?}: {source}; give a regular file, such as a cpio archive")]
    InitrdFile {
        /// The file.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
    /// The initrd has no content.
    #[error("cannot load initrd {path:?}: it is empty; give an archive, or no initrd at all")]
    InitrdEmpty {
        /// The file.
        path: PathBuf,
    },
    /// Guest memory is too small.
    #[error(
        "initrd {path:?} of {} does not fit in {} of guest memory beside the kernel of {}; give the guest at least {}",
        Size(*size_bytes), Size(*memory_bytes), Size(*kernel_bytes), Size(*needs_bytes)
    )]
    InitrdMemory {
        /// The file.
        path: PathBuf,
        /// Its length.
        size_bytes: u64,
        /// Guest memory below the 32-bit hole.
        memory_bytes: u64,
        /// What the kernel takes.
        kernel_bytes: u64,
        /// What would do.
        needs_bytes: u64,
    },
    /// The kernel does not take an initrd so high, and there is no room further down.
    #[error(
        "initrd {path:?} of {} does not fit between the end of the kernel at {kernel_end:#x} and {limit:#x}, above which neither the kernel nor the machine takes one; make it smaller",
        Size(*size_bytes)
    )]
    InitrdLimit {
        /// The file.
        path: PathBuf,
        /// Its length.
        size_bytes: u64,
        /// Where the kernel ends.
        kernel_end: u64,
        /// Where an initrd must end.
        limit: u64,
    },
    /// The command line holds a character that would not survive the way to the kernel.
    #[error(
        "cannot pass on the kernel command line: byte {byte:#04x} at position {position} is not printable ASCII"
    )]
    CmdlineByte {
        /// Position of the byte, from 0.
        position: usize,
        /// The byte.
        byte: u8,
    },
    /// The kernel would cut the command line.
    #[error(
        "cannot pass on the kernel command line: it has {length} characters, this kernel takes at most {limit}"
    )]
    CmdlineLength {
        /// Its length.
        length: usize,
        /// What the kernel takes.
        limit: u64,
    },
    /// Guest memory is not where a kernel starts.
    #[error(
        "cannot load a kernel: guest memory has no usable range from address 0 to beyond {:#x}; give the guest at least 2 MiB",
        layout::HIGH_RAM_START
    )]
    NoLowMemory,
    /// The memory map does not fit in the boot parameters.
    #[error("cannot describe {ranges} ranges of guest memory to the kernel: at most {limit} fit")]
    MemoryRanges {
        /// What there is.
        ranges: usize,
        /// What fits.
        limit: usize,
    },
    /// Guest memory could not be filled.
    #[error("cannot place {what} in guest memory: {source}")]
    Place {
        /// What was to be placed.
        what: &'static str,
        /// Why it was not.
        source: AccessError,
    },
}

/// What is wrong with a kernel file.
#[derive(Debug, thiserror::Error)]
pub enum KernelFault {
    /// The host does not let us read it.
    #[error("reading {what} failed: {source}")]
    Unreadable {
        /// What was to be read.
        what: &'static str,
        /// What the host says.
        source: io::Error,
    },
    /// Not something that can be mapped.
    #[error("it is {0}, not a file; give an ELF vmlinux or a bzImage")]
    NotAFile(&'static str),
    /// No content.
    #[error("it is empty; give an ELF vmlinux or a bzImage")]
    Empty,
    /// Another format.
    #[error(
        "it is not a kernel this loader knows: it starts with {first_bytes} ({what}); give an ELF vmlinux or a bzImage, {advice}"
    )]
    Unknown {
        /// Its first bytes, in hexadecimal.
        first_bytes: String,
        /// What it looks like.
        what: &'static str,
        /// What would do.
        advice: &'static str,
    },
    /// The file ends too early.
    #[error(
        "it ends after {have_bytes} bytes, but {what} would reach to {needs_bytes}; is the file complete?"
    )]
    Truncated {
        /// What does not fit.
        what: String,
        /// Length of the file.
        have_bytes: u64,
        /// Where the part would end.
        needs_bytes: u128,
    },
    /// An ELF of another machine or kind.
    #[error("it is {0}, not a 64-bit x86 kernel; give an ELF vmlinux or a bzImage for x86-64")]
    OtherElf(String),
    /// ELF program headers that make no sense.
    #[error("its ELF program headers are damaged: {0}")]
    ElfHeaders(String),
    /// A segment lies where the loader, the firmware or no RAM is.
    #[error(
        "its ELF segment {index} would lie at {start:#x}-{end:#x}, outside {low:#x}-{high:#x} where a kernel can be; link the kernel for an address in that range"
    )]
    SegmentPlace {
        /// Number of the program header.
        index: usize,
        /// First address.
        start: u64,
        /// First address behind it.
        end: u128,
        /// Where kernels may start.
        low: u64,
        /// Where RAM can end at most.
        high: u64,
    },
    /// Two segments in one place.
    #[error("its ELF segments {first} and {second} overlap at {at:#x}")]
    SegmentOverlap {
        /// Number of the lower one's program header.
        first: usize,
        /// Number of the other's.
        second: usize,
        /// Where the second starts.
        at: u64,
    },
    /// The entry point is not in what is loaded.
    #[error("its {kind} entry point {entry:#x} lies in none of its loaded segments")]
    EntryOutside {
        /// Which entry.
        kind: &'static str,
        /// Where it points.
        entry: u64,
    },
    /// PVH was asked for.
    #[error(
        "it has no PVH entry (an ELF note \"Xen\" of type 18); build it with CONFIG_PVH, or use the 64-bit entry"
    )]
    NoPvh,
    /// A bzImage that cannot be entered in 64-bit mode.
    #[error(
        "this bzImage has no 64-bit entry (boot protocol {}.{:02}, xloadflags {xloadflags:#x}); give a 64-bit kernel of Linux 3.8 or later",
        version >> 8, version & 0xff
    )]
    NoEntry64 {
        /// Version of the boot protocol.
        version: u16,
        /// The flags that would say so.
        xloadflags: u16,
    },
    /// A field of the setup header that makes no sense.
    #[error("the setup header of this bzImage is damaged: {field} is {value:#x}, {why}")]
    SetupHeader {
        /// Name of the field in boot.rst.
        field: &'static str,
        /// What it holds.
        value: u64,
        /// Why that cannot be.
        why: &'static str,
    },
    /// Guest memory is too small.
    #[error(
        "it needs guest memory up to {} to start, the guest has {}; give the guest at least {}",
        Size(*needs_bytes), Size(*have_bytes), Size(*needs_bytes)
    )]
    Memory {
        /// Where the kernel ends, unpacked.
        needs_bytes: u64,
        /// Where low RAM ends.
        have_bytes: u64,
    },
}
