//! Kernels in packages of Debian and its kin: an `ar` archive with a tar archive in it (deb(5)).

use std::fs::File;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use crate::{KernelError, compressed};

/// A kernel's package has some hundred MiB unpacked. One that has much more is no kernel's, or a trap.
const MAX_UNPACKED_BYTES: u64 = 4 << 30;

/// Where a package's kernel and modules were put.
#[derive(Debug)]
pub(crate) struct Unpacked {
    pub(crate) kernel: PathBuf,
    pub(crate) modules: PathBuf,
}

/// Unpacks a package's kernel and modules below a folder.
pub(crate) fn unpack(package: &Path, into: &Path) -> Result<Unpacked, KernelError> {
    let wrong = |why: String| KernelError::Package {
        path: package.into(),
        why,
    };
    let damaged = |e: io::Error| wrong(format!("is damaged, or none of Debian's: {e}"));
    let file = File::open(package).map_err(KernelError::file("open the package", package))?;
    let mut members = ar::Archive::new(file);
    while let Some(member) = members.next_entry() {
        let member = member.map_err(damaged)?;
        let name = String::from_utf8_lossy(member.header().identifier()).into_owned();
        let name = name.trim_end_matches('/');
        if name.starts_with("data.tar") {
            let data = compressed::open(name, member).map_err(damaged)?;
            unpack_data(data, into).map_err(damaged)?;
            let unpacked = found(into).ok_or_else(|| {
                wrong(
                    "has no kernel (boot/vmlinuz-*) with modules: is it a meta package? The one that it depends on has them"
                        .into(),
                )
            })?;
            // Debian's are completed where they are installed.
            if !unpacked.modules.join("modules.dep").exists() {
                depmod(&unpacked.modules, into).map_err(wrong)?;
            }
            return Ok(unpacked);
        }
    }
    Err(wrong(
        "has no data.tar: is it one of Debian's (.deb)?".into(),
    ))
}

/// Unpacks files below `boot/` and `lib/modules/` (also as `usr/lib/modules/`), without links and owners: nothing of it is needed.
fn unpack_data(data: impl Read, into: &Path) -> io::Result<()> {
    let mut archive = tar::Archive::new(data);
    let mut left = MAX_UNPACKED_BYTES;
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let mut plain = PathBuf::new();
        for part in path.components() {
            match part {
                Component::Normal(name) => plain.push(name),
                Component::CurDir | Component::RootDir => {}
                _ => {
                    return Err(io::Error::other(format!(
                        "a name that leads elsewhere: '{}'",
                        path.display()
                    )));
                }
            }
        }
        let plain = plain.strip_prefix("usr").unwrap_or(&plain);
        if !entry.header().entry_type().is_file()
            || !(plain.starts_with("boot") || plain.starts_with("lib/modules"))
        {
            continue;
        }
        left = left
            .checked_sub(entry.size())
            .ok_or_else(|| io::Error::other(format!("more than {MAX_UNPACKED_BYTES} bytes")))?;
        let to = into.join(plain);
        if let Some(folder) = to.parent() {
            std::fs::create_dir_all(folder)?;
        }
        // Each is new: a package that has a name twice is damaged.
        io::copy(&mut entry, &mut File::create_new(&to)?)?;
    }
    Ok(())
}

/// Has depmod(8) find out which modules need which. It only reads and writes below the folder.
fn depmod(modules: &Path, below: &Path) -> Result<(), String> {
    let release = modules.file_name().unwrap_or_default();
    let done = Command::new("depmod")
        .arg("-b")
        .arg(below)
        .arg(release)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .output()
        .map_err(|e| format!("does not say which modules need which, and depmod, which finds out, cannot be run: {e}; install kmod"))?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr);
    let said = said.lines().next().unwrap_or_default();
    Err(format!("has modules that depmod cannot read: {said}"))
}

fn found(below: &Path) -> Option<Unpacked> {
    let first = |folder: &str, prefix: &str| {
        let mut all: Vec<_> = std::fs::read_dir(below.join(folder))
            .ok()?
            .flatten()
            .filter(|e| e.file_name().to_string_lossy().starts_with(prefix))
            .map(|e| e.path())
            .collect();
        all.sort();
        all.into_iter().next()
    };
    Some(Unpacked {
        kernel: first("boot", "vmlinuz")?,
        modules: first("lib/modules", "")?,
    })
}
