//! Copies of files: a tar archive in either direction, by the `tar` crate, so that images need no tar of their own.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use alveole_agent_protocol::{Answer, CopyIn, CopyOut, Refusal};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::session::{Job, Outcome};

pub(crate) fn refused(code: &str, text: String) -> Refusal {
    Refusal {
        code: code.into(),
        text,
    }
}

/// Unpacks what comes as input.
pub(crate) fn unpack(request: CopyIn) -> Result<Job, Refusal> {
    let folder = PathBuf::from(&request.folder);
    if !folder.is_dir() {
        return Err(refused(
            Refusal::NOT_FOUND,
            format!(
                "there is no directory '{}' in the guest to copy into",
                request.folder
            ),
        ));
    }
    start(|ours| {
        let (theirs, input) = ours?;
        let work = move || {
            let mut archive = tar::Archive::new(File::from(theirs));
            archive.set_preserve_permissions(true);
            archive.set_preserve_ownerships(request.keep_owners);
            archive.set_preserve_mtime(true);
            archive.set_unpack_xattrs(true);
            archive.set_overwrite(true);
            archive.unpack(&folder).map_err(|e| {
                format!(
                    "cannot copy into '{}' in the guest: {}",
                    request.folder,
                    chain(&e)
                )
            })?;
            // To its end: whoever packed it is not left with what it cannot write.
            io::copy(&mut archive.into_inner(), &mut io::sink())
                .map(drop)
                .map_err(|e| format!("cannot read the archive to its end: {e}"))
        };
        Ok((Some(input), None, work))
    })
}

/// Packs what is to be copied, as output.
pub(crate) fn pack(request: CopyOut) -> Result<Job, Refusal> {
    let path = Path::new(&request.path);
    let found = if request.follow {
        path.metadata()
    } else {
        path.symlink_metadata()
    };
    let found = found.map_err(|e| {
        refused(
            Refusal::NOT_FOUND,
            format!("cannot copy '{}' out of the guest: {e}", request.path),
        )
    })?;
    let source = if request.follow {
        path.canonicalize().unwrap_or_else(|_| path.to_owned())
    } else {
        path.to_owned()
    };
    // `/` and `x/..` have no last name.
    let name = path
        .file_name()
        .map_or_else(|| PathBuf::from("."), PathBuf::from);
    start(|ours| {
        let (output, theirs) = ours?;
        let work = move || {
            let mut builder = tar::Builder::new(File::from(theirs));
            builder.follow_symlinks(false);
            builder.sparse(true);
            let packed = if found.is_dir() {
                builder.append_dir_all(&name, &source)
            } else {
                builder.append_path_with_name(&source, &name)
            };
            packed.and_then(|()| builder.finish()).map_err(|e| {
                format!(
                    "cannot copy '{}' out of the guest: {}",
                    request.path,
                    chain(&e)
                )
            })
        };
        Ok((None, Some(output), work))
    })
}

/// Copies what is in a folder into another, with owners, modes and times.
pub(crate) fn all(from: &Path, to: &Path) -> Result<(), String> {
    let act = |e: &dyn std::error::Error| {
        format!("cannot copy what is in '{}': {}", from.display(), chain(e))
    };
    let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| act(&io::Error::from(e)))?;
    let source = from.to_owned();
    let packing = thread::spawn(move || {
        let mut builder = tar::Builder::new(File::from(ours));
        builder.follow_symlinks(false);
        builder.sparse(true);
        builder.append_dir_all(".", &source)?;
        builder.finish()
    });
    let mut archive = tar::Archive::new(File::from(theirs));
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(true);
    archive.set_preserve_mtime(true);
    let unpacked = archive.unpack(to);
    drop(archive);
    let packed = packing
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the copy broke off")));
    unpacked.and(packed).map_err(|e| act(&e))
}

/// The errors of `tar` say which file it was, and hide why.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}

/// The session's end of the pipe, as input or as output, and what is to be done.
type Prepared<W> = (Option<OwnedFd>, Option<OwnedFd>, W);

pub(crate) fn start<W>(
    prepare: impl FnOnce(io::Result<(OwnedFd, OwnedFd)>) -> io::Result<Prepared<W>>,
) -> Result<Job, Refusal>
where
    W: FnOnce() -> Result<(), String> + Send + 'static,
{
    let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(io::Error::from);
    let begin = || {
        let (input, output, work) = prepare(pipe())?;
        let (ended, told_by_closing) = pipe()?;
        let outcome = Outcome::default();
        let theirs = Arc::clone(&outcome);
        thread::Builder::new().name("copy".into()).spawn(move || {
            let answer = match work() {
                Ok(()) => Answer::Done,
                Err(text) => Answer::Refused(refused(Refusal::FAILED, text)),
            };
            let _ = theirs.set(answer);
            drop(told_by_closing);
        })?;
        Ok(Job {
            input,
            output,
            errors: None,
            ended,
            outcome,
        })
    };
    begin().map_err(|e: io::Error| refused(Refusal::FAILED, format!("cannot begin to copy: {e}")))
}
