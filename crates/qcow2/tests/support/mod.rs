//! What the tests share: files in memory, a guest that writes as a block device would, random numbers.

#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each test program uses a part of it"
)]

use std::fs::File;
use std::io;
use std::process::Command;
use std::sync::{Arc, Mutex};

use alveole_qcow2::{Access, BackingRead, Image, ImageError, ImageFile, WriteExtent};

pub(crate) type Memory = Arc<Mutex<Vec<u8>>>;

pub(crate) fn memory() -> Memory {
    Arc::new(Mutex::new(Vec::new()))
}

pub(crate) fn open(file: &Memory) -> Image {
    Image::open(Box::new(Arc::clone(file)), Access::ReadWrite).unwrap()
}

/// A backing image in memory.
pub(crate) struct Base(pub(crate) Vec<u8>);

impl BackingRead for Base {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let from = self.0.get(offset as usize..).unwrap_or_default();
        let n = from.len().min(into.len());
        into[..n].copy_from_slice(&from[..n]);
        into[n..].fill(0);
        Ok(())
    }

    fn size_bytes(&self) -> u64 {
        self.0.len() as u64
    }
}

/// Writes as a block device does: in place where that is possible.
pub(crate) fn guest_write(
    image: &Image,
    file: &dyn ImageFile,
    offset: u64,
    data: &[u8],
    backing: &dyn BackingRead,
) -> Result<(), ImageError> {
    let mut at = 0;
    while at < data.len() {
        let here = offset + at as u64;
        let rest = (data.len() - at) as u64;
        at += match image.lookup_write(here, rest)? {
            WriteExtent::InPlace { file_offset, len } => {
                file.write_at(&data[at..at + len as usize], file_offset)
                    .unwrap();
                len as usize
            }
            WriteExtent::Allocating { len } => {
                image.write_allocating(here, &data[at..at + len as usize], backing)?;
                len as usize
            }
        };
    }
    Ok(())
}

pub(crate) fn read_all(image: &Image, backing: &dyn BackingRead) -> Vec<u8> {
    let mut all = vec![0xee; image.size_bytes() as usize];
    image.read(0, &mut all, backing).unwrap();
    all
}

/// Enough randomness for a test that must give the same each time.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// Text-like and random places, and holes.
pub(crate) fn content(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = vec![0; len];
    for (n, chunk) in bytes.chunks_mut(10_000).enumerate() {
        match n % 3 {
            0 => chunk.fill_with(|| random.next() as u8),
            1 => chunk.fill_with(|| b"qcow2 "[random.below(6) as usize]),
            _ => {}
        }
    }
    bytes
}

/// The first difference, for messages: whole disks are no use there.
pub(crate) fn differ(a: &[u8], b: &[u8]) -> Option<usize> {
    if a.len() != b.len() {
        return Some(a.len().min(b.len()));
    }
    if a == b {
        return None;
    }
    a.iter().zip(b).position(|(a, b)| a != b)
}

/// Whether there is no `qemu-img`: says so, and where skips are counted, too.
pub(crate) fn skip(test: &str) -> bool {
    if Command::new("qemu-img").arg("--version").output().is_ok() {
        return false;
    }
    let line = format!("SKIPPED {test}: no qemu-img on this machine (package qemu-utils)\n");
    eprint!("{line}");
    if let Some(path) = std::env::var_os("ALVEOLE_SKIP_LOG") {
        use std::io::Write;
        let mut log = File::options()
            .append(true)
            .create(true)
            .open(path)
            .unwrap();
        log.write_all(line.as_bytes()).unwrap();
    }
    true
}
