//! `alveole cp`: files and folders into guests and out of them, as tar archives on their way.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::thread;

use alveole_agent_client::{AgentError, Guest, Streams};
use alveole_agent_protocol::{CopyIn, CopyOut, Refusal, Request};
use alveole_instance::{InstanceError, Vms};
use anyhow::{Context, bail};

use super::commands::AGENT_PATIENCE;

/// One end of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Here(PathBuf),
    In { vm: String, path: String },
}

impl FromStr for End {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            // A path of this host may have a colon, behind a slash.
            Some((vm, path)) if !vm.is_empty() && !vm.contains('/') && vm != "." => {
                if path.is_empty() {
                    return Err(format!(
                        "{text:?} names no path in the VM: write {vm}:/PATH"
                    ));
                }
                Ok(Self::In {
                    vm: vm.to_owned(),
                    // As of containers, it begins at the root.
                    path: format!("/{}", path.trim_start_matches('/')),
                })
            }
            _ if text.is_empty() => Err("it names no path".into()),
            _ => Ok(Self::Here(text.into())),
        }
    }
}

pub(crate) fn copy(vms: &Vms, from: &End, to: &End, follow: bool) -> anyhow::Result<ExitCode> {
    match (from, to) {
        (End::Here(from), End::In { vm, path }) => copy_in(&guest(vms, vm)?, from, path, follow)?,
        (End::In { vm, path }, End::Here(to)) => copy_out(&guest(vms, vm)?, path, to, follow)?,
        (End::Here(_), End::Here(_)) => bail!("neither end is in a VM: write one as VM:/PATH"),
        _ => bail!("both ends are in VMs: copy to this host first"),
    }
    Ok(ExitCode::SUCCESS)
}

fn guest(vms: &Vms, name: &str) -> anyhow::Result<Guest> {
    let vm = vms.find(name)?;
    if !vm.is_kept()? {
        return Err(InstanceError::DoesNotRun(vm.name).into());
    }
    Ok(Guest::new(&vm.socket("vsock"), AGENT_PATIENCE))
}

/// The folder and the last name of where something is to be in the guest.
fn split(path: &str) -> (&str, &str) {
    let path = path.trim_end_matches('/');
    match path.rsplit_once('/') {
        Some(("", name)) => ("/", name),
        Some((folder, name)) => (folder, name),
        None => ("/", path),
    }
}

fn copy_in(guest: &Guest, from: &Path, to: &str, follow: bool) -> anyhow::Result<()> {
    let found = match follow {
        true => fs::metadata(from),
        false => fs::symlink_metadata(from),
    };
    let found = found.with_context(|| format!("cannot copy '{}'", from.display()))?;
    let source = match follow {
        true => from.canonicalize().unwrap_or_else(|_| from.into()),
        false => from.into(),
    };
    // `folder/.` is what is in the folder.
    let content = from.as_os_str().as_encoded_bytes().ends_with(b"/.");
    let own = match from.file_name().filter(|_| !content) {
        Some(name) => PathBuf::from(name),
        None => PathBuf::from("."),
    };
    match send(guest, &source, &own, found.is_dir(), to) {
        // It is no folder there: then it is the name, in a folder that is.
        Err(e) if is_not_found(&e) && !to.ends_with('/') && own != Path::new(".") => {
            let (folder, name) = split(to);
            send(guest, &source, Path::new(name), found.is_dir(), folder)
        }
        sent => sent,
    }
}

fn is_not_found(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(AgentError::Refused(r)) if r.code == Refusal::NOT_FOUND)
}

fn send(
    guest: &Guest,
    source: &Path,
    name: &Path,
    is_dir: bool,
    folder: &str,
) -> anyhow::Result<()> {
    let (theirs, ours) = io::pipe().context("cannot make a pipe")?;
    let (source, name) = (source.to_owned(), name.to_owned());
    let shown = source.display().to_string();
    let packing = thread::Builder::new()
        .name("pack".into())
        .spawn(move || {
            let mut builder = tar::Builder::new(ours);
            builder.follow_symlinks(false);
            builder.sparse(true);
            match is_dir {
                true => builder.append_dir_all(&name, &source)?,
                false => builder.append_path_with_name(&source, &name)?,
            }
            builder.finish()
        })
        .context("cannot start a thread")?;
    let request = Request::CopyIn(CopyIn {
        folder: folder.into(),
        keep_owners: false,
    });
    let streams = Streams {
        input: Some(Box::new(theirs) as Box<dyn Read + Send>),
        ..Streams::default()
    };
    let sent = guest.copy(&request, streams);
    let packed = packing.join();
    sent?;
    match packed {
        Ok(packed) => packed.with_context(|| format!("cannot read '{shown}'")),
        Err(_) => bail!("cannot read '{shown}'"),
    }
}

/// Bits of a mode that a guest may not give to a file of this host: set-user and set-group.
const NOT_FROM_GUESTS: u32 = 0o6000;

fn copy_out(guest: &Guest, from: &str, to: &Path, follow: bool) -> anyhow::Result<()> {
    let (_, name) = split(from);
    let name = if name.is_empty() { "root" } else { name };
    let (folder, last) = match to.is_dir() {
        true => (to.to_owned(), PathBuf::from(name)),
        false => {
            let last = to
                .file_name()
                .with_context(|| format!("'{}' names no file", to.display()))?;
            let folder = to.parent().filter(|p| !p.as_os_str().is_empty());
            (folder.unwrap_or(Path::new(".")).to_owned(), last.into())
        }
    };
    let act = || format!("cannot copy to '{}'", to.display());
    // Beside, and renamed when it is whole: what a guest sends is not trusted with what is there.
    let beside = tempfile::Builder::new()
        .prefix(".alveole-cp-")
        .tempdir_in(&folder)
        .with_context(act)?;
    let (theirs, ours) = io::pipe().context("cannot make a pipe")?;
    let place = beside.path().to_owned();
    let unpacking = thread::Builder::new()
        .name("unpack".into())
        .spawn(move || -> io::Result<()> {
            let mut archive = tar::Archive::new(theirs);
            archive.set_preserve_permissions(true);
            archive.set_mask(NOT_FROM_GUESTS);
            archive.set_preserve_mtime(true);
            archive.set_preserve_ownerships(false);
            archive.unpack(&place)?;
            io::copy(&mut archive.into_inner(), &mut io::sink()).map(drop)
        })
        .context("cannot start a thread")?;
    let request = Request::CopyOut(CopyOut {
        path: from.into(),
        follow,
    });
    let streams = Streams {
        output: Some(Box::new(ours) as Box<dyn Write + Send>),
        ..Streams::default()
    };
    let got = guest.copy(&request, streams);
    let unpacked = unpacking.join();
    match (got, unpacked) {
        // Whoever cannot write here ends the stream: that is why.
        (_, Ok(Err(e))) => return Err(e).with_context(act),
        (Err(e), _) => return Err(e.into()),
        (Ok(()), Err(_)) => bail!("{}", act()),
        (Ok(()), Ok(Ok(()))) => {}
    }
    let whole = match fs::read_dir(beside.path())
        .with_context(act)?
        .flatten()
        .next()
    {
        // All of `/` is the folder itself.
        Some(_) if from == "/" => beside.path().to_owned(),
        Some(entry) => entry.path(),
        None => bail!("the guest sent nothing of '{from}'"),
    };
    let end = folder.join(last);
    fs::rename(&whole, &end).with_context(|| {
        format!("cannot put it at '{}'; is a folder with something in it there already? Remove it first", end.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_told_apart() {
        let within = |vm: &str, path: &str| End::In {
            vm: vm.into(),
            path: path.into(),
        };
        assert_eq!("web:/etc/passwd".parse(), Ok(within("web", "/etc/passwd")));
        assert_eq!("web:etc".parse(), Ok(within("web", "/etc")));
        assert_eq!("./a:b".parse(), Ok(End::Here("./a:b".into())));
        assert_eq!("/a:b".parse(), Ok(End::Here("/a:b".into())));
        assert!("web:".parse::<End>().is_err() && "".parse::<End>().is_err());
        assert_eq!(split("/a"), ("/", "a"));
        assert_eq!(split("/a/b/"), ("/a", "b"));
    }
}
