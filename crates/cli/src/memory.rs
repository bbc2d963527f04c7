//! `alveole memory`: memory files of snapshots, packed and unpacked, and served to monitors.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use alveole_page_server::{Memory, PackedMemory, SavedMemory, Serving, Sizes, pack, serve};
use anyhow::{Context, bail};
use clap::Subcommand;
use rustix::process::{Signal, set_parent_process_death_signal};

use crate::size::human;
use crate::{hint, print};

/// Of what many monitors read, so much that was unpacked is kept for the next; of what one reads, nothing: it asks once.
const KEPT_BYTES: usize = 16 << 20;

#[derive(clap::Args)]
pub(crate) struct MemoryArgs {
    #[command(subcommand)]
    command: MemoryCommand,
}

#[derive(Subcommand)]
enum MemoryCommand {
    /// Pack a memory file: chunks of zstd with an index (zstd's seekable format), which `serve` reads, and zstd -d unpacks
    Pack {
        /// The memory file of a snapshot, as monitors write it
        memory: PathBuf,
        /// The file that comes into being
        #[arg(long, value_name = "FILE")]
        into: PathBuf,
    },
    /// Unpack a memory file; pages of zeroes become holes
    Unpack {
        /// The packed file
        packed: PathBuf,
        /// The file that comes into being
        #[arg(long, value_name = "FILE")]
        into: PathBuf,
    },
    /// Serve a memory file, packed or not, to monitors that load the snapshot with "backend_type": "Uffd" and this socket as "backend_path"
    Serve {
        /// The memory file
        memory: PathBuf,
        /// Where monitors connect; whoever may write to it can read the memory
        #[arg(long, value_name = "PATH")]
        socket: Option<PathBuf>,
        /// Look whether it is the memory of this state, before anybody is served
        #[arg(long, value_name = "FILE")]
        state: Option<PathBuf>,
        /// Serve the first monitor alone, and end with it
        #[arg(long)]
        once: bool,
        /// What is put in for a page fault, in KiB: a power of two from 4 to 1024
        #[arg(long, value_name = "KIB", default_value_t = 64)]
        at_once: u64,
    },
}

pub(crate) fn memory(args: &MemoryArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        MemoryCommand::Pack { memory, into } => {
            let sizes = made(into, |new| pack_file(memory, new))?;
            print(&format!("{}: {}\n", into.display(), told(&sizes)))?;
        }
        MemoryCommand::Unpack { packed, into } => made(into, |new| unpack_file(packed, new))?,
        MemoryCommand::Serve {
            memory,
            socket,
            state,
            once,
            at_once,
        } => {
            let act = || format!("cannot serve '{}'", memory.display());
            let file = File::open(memory).with_context(act)?;
            let kept = if *once { 0 } else { KEPT_BYTES };
            let mut open = Memory::open(file, kept).with_context(act)?;
            if let Some(state) = state {
                SavedMemory::of_state(state)
                    .and_then(|saved| saved.check(&mut open))
                    .with_context(act)?;
            }
            let listener = match socket {
                Some(path) => listen(path)?,
                None => inherited()?,
            };
            let serving = Serving {
                once: *once,
                at_once_bytes: at_once.saturating_mul(1024),
            };
            serve(listener, &mut open, serving, hint).with_context(act)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What packing was worth.
pub(crate) fn told(sizes: &Sizes) -> String {
    format!(
        "{} packed, of {} on disk for {} of memory",
        human(sizes.packed_bytes),
        human(sizes.taken_bytes),
        human(sizes.memory_bytes)
    )
}

/// Makes a file that was not there before, and is whole or not there.
fn made<T>(path: &Path, make: impl FnOnce(&Path) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let new = tempfile::tempdir_in(folder)
        .with_context(|| format!("cannot make a folder in '{}'", folder.display()))?;
    let file = new.path().join("memory");
    let result = make(&file)?;
    // A link, not a renaming: what is there is not written over.
    fs::hard_link(&file, path).with_context(|| format!("cannot make '{}'", path.display()))?;
    Ok(result)
}

/// A new file that its owner alone can read: memory is a guest's secret.
fn secret(path: &Path) -> anyhow::Result<File> {
    File::options()
        .write(true)
        .read(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot make '{}'", path.display()))
}

/// Packs a memory file into a new file, which is on the disk and was unpacked again when this returns.
pub(crate) fn pack_file(memory: &Path, into: &Path) -> anyhow::Result<Sizes> {
    let act = || format!("cannot pack '{}'", memory.display());
    let from = File::open(memory).with_context(act)?;
    let new = secret(into)?;
    let sizes = pack(&from, &new).with_context(act)?;
    new.sync_all().with_context(act)?;
    PackedMemory::open(new)
        .and_then(|packed| packed.verify())
        .with_context(act)?;
    Ok(sizes)
}

/// Unpacks a packed memory file into a new file, which is on the disk when this returns.
pub(crate) fn unpack_file(packed: &Path, into: &Path) -> anyhow::Result<()> {
    let act = || format!("cannot unpack '{}'", packed.display());
    let from = PackedMemory::open(File::open(packed).with_context(act)?).with_context(act)?;
    let new = secret(into)?;
    from.unpack(&new).with_context(act)?;
    new.sync_all().with_context(act)
}

/// Listens at `path`, for this user alone. A socket that nobody listens at any more is taken away before.
fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    let act = || format!("cannot listen at '{}'", path.display());
    let left = |e: io::Error| e.kind() == io::ErrorKind::ConnectionRefused;
    if UnixStream::connect(path).is_err_and(left)
        && fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket())
    {
        fs::remove_file(path).with_context(act)?;
    }
    let listener = UnixListener::bind(path).with_context(act)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).with_context(act)?;
    Ok(listener)
}

/// The socket that a VM's keeper listens at: standard input. This ends with the keeper.
fn inherited() -> anyhow::Result<UnixListener> {
    let input = rustix::stdio::stdin();
    let is_socket = rustix::fs::fstat(input)
        .is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_socket());
    if !is_socket {
        bail!("say where monitors connect: --socket PATH");
    }
    set_parent_process_death_signal(Some(Signal::KILL)).context("cannot end with the keeper")?;
    let listener: OwnedFd =
        rustix::io::fcntl_dupfd_cloexec(input, 3).context("cannot take the socket")?;
    if let Ok(null) = File::open("/dev/null") {
        // So that who connects is refused when this has ended.
        let _ = rustix::stdio::dup2_stdin(&null);
    }
    Ok(listener.into())
}
