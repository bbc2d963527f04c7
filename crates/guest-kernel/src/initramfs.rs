//! The initramfs of guests: the agent and the modules that the machine needs, nothing else. The same inputs give the same bytes.

use std::io::{self, Write};

use cpio::newc::{Builder, trailer};

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;

/// The console, which the kernel gives its first process: Linux opens it before devtmpfs is there.
const CONSOLE: (u32, u32, u32) = (0o020_600, 5, 1);

/// Writes an initramfs (newc cpio, not compressed: it is mapped, and memory is copied sooner than it is decompressed).
///
/// # Errors
///
/// `out` cannot be written.
pub fn write_initramfs(
    mut out: impl Write,
    agent: &[u8],
    modules: &[(String, Vec<u8>)],
) -> io::Result<()> {
    let mut number = 0;
    let mut entry = |name: &str, mode: u32, bytes: &[u8], device: Option<(u32, u32)>| {
        number += 1;
        let mut builder = Builder::new(name).ino(number).mode(mode).nlink(1);
        if let Some((major, minor)) = device {
            builder = builder.rdev_major(major).rdev_minor(minor);
        }
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        let mut writer = builder.write(&mut out, length);
        writer.write_all(bytes)?;
        writer.finish().map(drop)
    };
    for folder in ["dev", "proc", "sys", "root", "modules"] {
        entry(folder, FOLDER, &[], None)?;
    }
    let (mode, major, minor) = CONSOLE;
    entry("dev/console", mode, &[], Some((major, minor)))?;
    entry("init", PROGRAM, agent, None)?;
    let mut order = String::new();
    for (name, bytes) in modules {
        entry(&format!("modules/{name}"), FILE, bytes, None)?;
        order.push_str(name);
        order.push('\n');
    }
    entry("modules/order", FILE, order.as_bytes(), None)?;
    trailer(&mut out)?;
    out.flush()
}
