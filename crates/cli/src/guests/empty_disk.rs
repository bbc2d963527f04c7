//! The disk that takes a root's changes: an empty file system in a sparse file, copied from one that is made once for each size.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, bail};
use rustix::fs::{SeekFrom, seek};

/// Makes `disk` an empty file system of so many bytes. `store` is where those are that were made before.
pub(crate) fn make(store: &Path, bytes: u64, disk: &Path) -> anyhow::Result<()> {
    let act = || format!("cannot make the VM's disk '{}'", disk.display());
    fs::create_dir_all(store).with_context(act)?;
    let empty = store.join(format!("ext4-{bytes}"));
    if !empty.exists() {
        format(store, bytes, &empty)?;
    }
    copy_data(&empty, disk).with_context(act)
}

fn format(store: &Path, bytes: u64, empty: &Path) -> anyhow::Result<()> {
    // Beside, and renamed: two at once make the same.
    let new = tempfile::Builder::new()
        .prefix(".new-")
        .tempfile_in(store)?;
    // Tables are zero as the file is: nothing of them is written, neither now nor by the guest later. Before 1.47 mke2fs does not
    // know that, and writes them.
    let made = mke2fs(new.path(), bytes, "assume_storage_prezeroed=1")
        .and_then(|first| match first.status.success() {
            true => Ok(first),
            false => mke2fs(new.path(), bytes, "lazy_itable_init=0,lazy_journal_init=1"),
        })
        .context("cannot run mke2fs, which makes the VMs' disks: install e2fsprogs")?;
    if !made.status.success() {
        bail!(
            "mke2fs cannot make a file system of {bytes} bytes: {}; is --disk too small, or the disk full?",
            String::from_utf8_lossy(&made.stderr).trim()
        );
    }
    new.persist(empty)
        .map(drop)
        .with_context(|| format!("cannot keep '{}'", empty.display()))
}

/// Room that a disk may grow to, as a multiple: what is kept for it is written into each.
const GROWTH: u64 = 8;
/// The size of blocks that mke2fs takes for all but small disks; for these it is a bound that does not matter.
const BLOCK_BYTES: u64 = 4096;

fn mke2fs(path: &Path, bytes: u64, how: &str) -> io::Result<Output> {
    let file = File::options().write(true).open(path)?;
    // Empty, and only then of its size: what a first try wrote is gone.
    file.set_len(0)?;
    file.set_len(bytes)?;
    let resize = (bytes / BLOCK_BYTES)
        .saturating_mul(GROWTH)
        .min(u64::from(u32::MAX));
    Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-m", "0"])
        .args(["-U", NO_UUID, "-E"])
        .arg(format!(
            "{how},nodiscard,root_owner=0:0,hash_seed={NO_UUID},resize={resize}"
        ))
        .arg(path)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .output()
}

/// All disks of a size begin as the same bytes. Nobody looks for a VM's disk by this.
const NO_UUID: &str = "00000000-0000-0000-0000-000000000000";

/// Copies a sparse file as one.
fn copy_data(from: &Path, to: &Path) -> io::Result<()> {
    let from = File::open(from)?;
    let to = File::create_new(to)?;
    let size = from.metadata()?.len();
    to.set_len(size)?;
    let mut at = 0;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let begin = match seek(&from, SeekFrom::Data(at)) {
            Ok(begin) => begin,
            // Nothing but a hole comes.
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        at = seek(&from, SeekFrom::Hole(begin))?;
        let mut place = begin;
        while place < at {
            let most = usize::try_from(at - place)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            let count = from.read_at(&mut buffer[..most], place)?;
            if count == 0 {
                return Ok(());
            }
            to.write_all_at(&buffer[..count], place)?;
            place += count as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_large_disk_is_small_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("1"), dir.path().join("2"));
        make(&dir.path().join("store"), 10 << 30, &first).unwrap();
        make(&dir.path().join("store"), 10 << 30, &second).unwrap();
        for disk in [&first, &second] {
            let metadata = fs::metadata(disk).unwrap();
            assert_eq!(metadata.len(), 10 << 30);
            assert!(
                metadata.blocks() * 512 < 16 << 20,
                "{} KiB",
                metadata.blocks() / 2
            );
            let checked = Command::new("/sbin/e2fsck")
                .arg("-fn")
                .arg(disk)
                .output()
                .unwrap();
            assert!(checked.status.success(), "{checked:?}");
        }
        let error = make(&dir.path().join("store"), 1000, &dir.path().join("3")).unwrap_err();
        assert!(format!("{error:#}").contains("too small"), "{error:#}");
    }
}
