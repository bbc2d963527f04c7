//! Kernels made here, byte by byte; offsets of the boot parameters are written as boot.rst and
//! zero-page.rst give them, so that the structures used by the loader are checked against them.

mod bzimage;
mod elf;
mod fit;
mod images;
mod random;

use std::fs::File;
use std::io::Write;
use std::path::Path;

use alveole_guest_memory::{GuestRam, MemoryPlan};

use super::*;

const RSDP: u64 = 0xe_0000;

fn ram(mib: u64) -> GuestRam {
    GuestRam::map(&MemoryPlan::around_hole(mib << 20).unwrap()).unwrap()
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// A start: what is not said is a small guest, no initrd, no command line.
struct Try<'a> {
    ram: GuestRam,
    initrd: Option<&'a [u8]>,
    cmdline: &'a str,
    entry: EntryPreference,
    placement: Placement,
}

impl Default for Try<'_> {
    fn default() -> Self {
        Self {
            ram: ram(32),
            initrd: None,
            cmdline: "",
            entry: EntryPreference::Auto,
            placement: Placement::Map,
        }
    }
}

impl Try<'_> {
    fn load(&self, kernel: &[u8]) -> Result<Loaded, LoadError> {
        let kernel = file(kernel);
        let initrd = self.initrd.map(file);
        let source = BootSource {
            kernel: &kernel,
            kernel_path: Path::new("/x/vmlinuz"),
            initrd: initrd.as_ref().map(|file| (file, Path::new("/x/initrd"))),
            cmdline: self.cmdline,
            entry: self.entry,
        };
        load(&self.ram, &source, Some(RSDP), self.placement)
    }

    fn refusal(&self, kernel: &[u8]) -> String {
        self.load(kernel).unwrap_err().to_string()
    }

    fn bytes(&self, addr: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.ram.read(addr, &mut bytes).unwrap();
        bytes
    }

    fn number(&self, addr: u64, len: u64) -> u64 {
        self.bytes(addr, len)
            .iter()
            .rev()
            .fold(0, |n, b| (n << 8) | u64::from(*b))
    }

    /// What the page tables at `top` make of `addr`, walked as the processor walks them.
    fn translate(&self, top: u64, addr: u64) -> Option<u64> {
        let frame = |entry: u64| entry & 0x000f_ffff_ffff_f000;
        let mut table = top;
        for shift in [39, 30, 21] {
            let entry = self.number(table + ((addr >> shift) & 511) * 8, 8);
            if entry & 3 != 3 {
                return None;
            }
            if entry & 0x80 != 0 {
                assert_eq!(shift, 21, "1 GiB pages are not for every processor");
                return Some(frame(entry) + (addr & ((1 << shift) - 1)));
            }
            table = frame(entry);
        }
        None
    }

    /// The memory map in the boot parameters.
    fn e820(&self) -> Vec<(u64, u64, u64)> {
        (0..self.number(0x7000 + 0x1e8, 1))
            .map(|i| 0x7000 + 0x2d0 + i * 20)
            .map(|at| {
                (
                    self.number(at, 8),
                    self.number(at + 8, 8),
                    self.number(at + 16, 4),
                )
            })
            .collect()
    }

    /// What holds of every successful load, whatever the kernel.
    fn check(&self, loaded: &Loaded) {
        let Range { start, end } = loaded.kernel;
        assert!(start >= 0x10_0000 && start < end && self.ram.contains(start, end - start));
        if let Some(initrd) = &loaded.initrd {
            assert!(initrd.start >= end && initrd.start.is_multiple_of(4096));
            assert!(self.ram.contains(initrd.start, initrd.end - initrd.start));
        }
        match loaded.entry {
            EntryState::Long64 {
                rip,
                page_tables_addr,
                gdt_addr,
                gdt_size_bytes,
                ..
            } => {
                assert!(loaded.kernel.contains(&rip));
                for addr in [start, end - 1, 0x7000, 0x2_0000, gdt_addr] {
                    assert_eq!(
                        self.translate(page_tables_addr, addr),
                        Some(addr),
                        "{addr:#x}"
                    );
                }
                assert_eq!(self.number(gdt_addr + 0x10, 8), 0x00af_9b00_0000_ffff);
                assert_eq!(self.number(gdt_addr + 0x18, 8), 0x00cf_9300_0000_ffff);
                assert_eq!(gdt_size_bytes, 32);
            }
            EntryState::Protected32 { eip, gdt_addr, .. } => {
                assert!(loaded.kernel.contains(&eip.into()));
                assert_eq!(self.number(gdt_addr + 0x10, 8), 0x00cf_9b00_0000_ffff);
            }
        }
        assert_eq!(
            self.bytes(0x2_0000, self.cmdline.len() as u64),
            self.cmdline.as_bytes()
        );
        assert_eq!(self.number(0x2_0000 + self.cmdline.len() as u64, 1), 0);
    }
}
