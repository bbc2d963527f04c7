//! The guest's user space: compiles its init and packs it into an initramfs.
//!
//! Does not know who boots it.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};

use crate::cpio::Archive;

/// What init writes first, on the console.
pub(crate) const MARKER: u8 = 0x02;

/// The init of guests that are booted.
pub(crate) const BOOT_INIT: &str = include_str!("../../../resources/guest/bench-init.rs");
/// The init of guests of which snapshots are taken.
pub(crate) const SNAPSHOT_INIT: &str = include_str!("../../../resources/guest/bench-snapshot.rs");

/// Compiles the init of `text` to `to`, unless it is there and of the same source.
///
/// # Errors
/// `rustc` is missing or fails, a file cannot be written.
pub(crate) fn compile_init(text: &str, to: &Path) -> anyhow::Result<()> {
    let source = to.with_extension("rs");
    if to.is_file() && fs::read_to_string(&source).is_ok_and(|old| old == text) {
        return Ok(());
    }
    let dir = to.parent().context("no directory")?;
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    // The source is written last: it says that the program is whole.
    let scratch =
        tempfile::tempdir_in(dir).with_context(|| format!("cannot write to {}", dir.display()))?;
    let (input, output) = (scratch.path().join("init.rs"), scratch.path().join("init"));
    fs::write(&input, text)?;
    let said = Command::new("rustc")
        .args(["--edition", "2024", "--crate-name", "bench_init"])
        .args([
            "--target",
            "x86_64-unknown-linux-gnu",
            "-C",
            "target-feature=+crt-static",
        ])
        .args([
            "-C",
            "panic=abort",
            "-C",
            "opt-level=s",
            "-C",
            "strip=symbols",
        ])
        .args(["-C", "relocation-model=static", "-C", "link-arg=-static"])
        .args(["-C", "link-arg=-nostartfiles", "-C", "link-arg=-nostdlib"])
        .args(["-C", "link-arg=-Wl,--build-id=none,-n"])
        .arg(&input)
        .arg("-o")
        .arg(&output)
        .output()
        .context("cannot run rustc, which compiles the guest's init")?;
    if !said.status.success() {
        bail!(
            "rustc did not compile the guest's init; it said: {}",
            String::from_utf8_lossy(&said.stderr)
        );
    }
    fs::rename(&output, to).and_then(|()| fs::rename(&input, &source))?;
    Ok(())
}

/// An initramfs with that init and the two devices that it opens.
///
/// # Errors
/// `init` cannot be read, `to` cannot be written.
pub(crate) fn write_initramfs(init: &Path, to: &Path) -> anyhow::Result<()> {
    let init = fs::read(init).with_context(|| format!("cannot read {}", init.display()))?;
    let archive = Archive::default()
        .directory("dev", 0o755)
        .character_device("dev/console", 0o600, (5, 1))
        .character_device("dev/mem", 0o600, (1, 1))
        .file("init", 0o755, &init)
        .finish();
    fs::write(to, archive).with_context(|| format!("cannot write {}", to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_agree_on_the_marker() {
        assert!(BOOT_INIT.contains(&format!("const MARKER: u8 = {MARKER:#04x};")));
    }

    #[test]
    fn inits_are_small_static_and_pack() {
        let dir = tempfile::tempdir().unwrap();
        let (init, image) = (dir.path().join("init"), dir.path().join("image"));
        compile_init(SNAPSHOT_INIT, &init).unwrap();
        assert!(fs::metadata(&init).unwrap().len() < 16 << 10);
        compile_init(BOOT_INIT, &init).unwrap();
        let built = fs::metadata(&init).unwrap().modified().unwrap();
        compile_init(BOOT_INIT, &init).unwrap();
        assert_eq!(fs::metadata(&init).unwrap().modified().unwrap(), built);
        write_initramfs(&init, &image).unwrap();
        let bytes = fs::read(&image).unwrap();
        assert!(bytes.len() < 16 << 10, "{}", bytes.len());
        // A program header of type PT_INTERP would name a dynamic linker.
        assert!(!bytes.windows(6).any(|w| w == b"ld-lin"));
    }
}
