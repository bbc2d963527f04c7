//! The kernel file: what it is, and in one form for both formats what goes where.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use alveole_guest_memory::HOLE_START;

use crate::{EntryPreference, KernelFault, KernelKind, bzimage, elf};

/// What is read of every kernel first: the ELF header and usually the program headers, or the whole
/// setup header of a bzImage.
const HEAD_BYTES: u64 = 4096;

/// A kernel, checked against the guest's memory and ready to be placed.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) kind: KernelKind,
    /// Pieces of the file, within `range`.
    pub(crate) parts: Vec<Part>,
    /// All it takes in memory, until it knows the memory map.
    pub(crate) range: Range<u64>,
    pub(crate) start: Start,
    /// The highest address an initrd may take.
    pub(crate) initrd_last: u64,
    /// Most characters of command line.
    pub(crate) cmdline_max: u64,
    /// The setup header of a bzImage, from 0x1f1 on.
    pub(crate) setup_header: Option<Vec<u8>>,
}

/// Bytes of the file and where they go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) offset: u64,
    pub(crate) file_size: u64,
    pub(crate) addr: u64,
    /// The kernel will write it.
    pub(crate) writable: bool,
}

/// The first instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    Long64(u64),
    Pvh(u32),
}

impl Kernel {
    /// Reads the headers of `file` and checks that the kernel fits below `low_end`.
    pub(crate) fn open(
        file: &File,
        entry: EntryPreference,
        low_end: u64,
    ) -> Result<Self, KernelFault> {
        let file = KernelFile::open(file)?;
        let kernel = if file.head.starts_with(elf::MAGIC) {
            elf::parse(&file, entry)?
        } else if bzimage::has_setup_header(&file.head) {
            bzimage::parse(&file, entry)?
        } else {
            return Err(unknown(&file.head));
        };
        if kernel.range.end > low_end.min(HOLE_START) {
            return Err(KernelFault::Memory {
                needs_bytes: kernel.range.end,
                have_bytes: low_end,
            });
        }
        Ok(kernel)
    }
}

/// A kernel file that can be read in pieces.
pub(crate) struct KernelFile<'a> {
    file: &'a File,
    pub(crate) len: u64,
    /// The first bytes: 4096, or all of them.
    pub(crate) head: Vec<u8>,
}

impl<'a> KernelFile<'a> {
    fn open(file: &'a File) -> Result<Self, KernelFault> {
        let unreadable = |source| KernelFault::Unreadable {
            what: "its length",
            source,
        };
        let metadata = file.metadata().map_err(unreadable)?;
        if metadata.is_dir() {
            return Err(KernelFault::NotAFile("a directory"));
        }
        if !metadata.is_file() {
            return Err(KernelFault::NotAFile("a device, pipe or socket"));
        }
        let len = metadata.len();
        if len == 0 {
            return Err(KernelFault::Empty);
        }
        let mut this = Self {
            file,
            len,
            head: Vec::new(),
        };
        this.head = this.read("its first bytes", 0, len.min(HEAD_BYTES))?;
        Ok(this)
    }

    /// The `len` bytes at `offset`. Callers bound `len`.
    pub(crate) fn read(
        &self,
        what: &'static str,
        offset: u64,
        len: u64,
    ) -> Result<Vec<u8>, KernelFault> {
        self.check(what, offset, len)?;
        let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
        let head = usize::try_from(offset)
            .ok()
            .and_then(|at| self.head.get(at..)?.get(..bytes.len()));
        match head {
            Some(head) => bytes.copy_from_slice(head),
            None => self
                .file
                .read_exact_at(&mut bytes, offset)
                .map_err(|source| KernelFault::Unreadable { what, source })?,
        }
        Ok(bytes)
    }

    /// That the file has `len` bytes at `offset`.
    pub(crate) fn check(
        &self,
        what: impl Into<String>,
        offset: u64,
        len: u64,
    ) -> Result<(), KernelFault> {
        let needs_bytes = u128::from(offset) + u128::from(len);
        if needs_bytes > self.len.into() {
            let have_bytes = self.len;
            return Err(KernelFault::Truncated {
                what: what.into(),
                have_bytes,
                needs_bytes,
            });
        }
        Ok(())
    }
}

const UNPACK: &str = "uncompressed";
const FOR_X86: &str = "for x86-64";
const INSTEAD: &str = "the kernel itself";

/// What people hand over instead of a kernel: where its mark is, the mark, its name, advice.
const LOOKALIKES: [(usize, &[u8], &str, &str); 19] = [
    (0, b"\x1f\x8b", "a gzip file", UNPACK),
    (0, b"\xfd7zXZ\0", "an xz file", UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file", UNPACK),
    (0, b"BZh", "a bzip2 file", UNPACK),
    (0, b"\x04\x22\x4d\x18", "an lz4 file", UNPACK),
    (0, b"\x02\x21\x4c\x18", "an lz4 file", UNPACK),
    (0, b"\x5d\0\0", "an lzma file", UNPACK),
    (0x38, b"ARM\x64", "an arm64 kernel Image", FOR_X86),
    (0x38, b"RSC\x05", "a RISC-V kernel Image", FOR_X86),
    (0, b"\x27\x05\x19\x56", "a U-Boot uImage", INSTEAD),
    (
        0,
        b"MZ",
        "a Windows or EFI program without a Linux setup header",
        INSTEAD,
    ),
    (0, b"QFI\xfb", "a qcow2 disk image", INSTEAD),
    (0, b"hsqs", "a squashfs image", INSTEAD),
    (0, b"070701", "a cpio archive, as initrds are", INSTEAD),
    (0, b"070702", "a cpio archive, as initrds are", INSTEAD),
    (0, b"!<arch>\n", "a Debian package or ar archive", INSTEAD),
    (0, b"PK\x03\x04", "a zip file", INSTEAD),
    (0, b"\xed\xab\xee\xdb", "an rpm package", INSTEAD),
    (0, b"#!", "a script", INSTEAD),
];

fn unknown(head: &[u8]) -> KernelFault {
    let first_bytes: Vec<String> = head.iter().take(4).map(|b| format!("{b:02x}")).collect();
    let found = LOOKALIKES
        .iter()
        .find(|(at, mark, ..)| head.get(*at..).is_some_and(|rest| rest.starts_with(mark)));
    let (what, advice) = match found {
        Some(&(_, _, what, advice)) => (what, advice),
        None if looks_like_text(head) => ("a text file", INSTEAD),
        None => ("no format known here", INSTEAD),
    };
    KernelFault::Unknown {
        first_bytes: first_bytes.join(" "),
        what,
        advice,
    }
}

fn looks_like_text(head: &[u8]) -> bool {
    head.iter()
        .take(64)
        .all(|b| matches!(b, b' '..=b'~' | b'\n' | b'\r' | b'\t' | 0x80..))
}
