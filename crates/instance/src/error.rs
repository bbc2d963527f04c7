use std::io;
use std::path::PathBuf;

use alveole_agent_client::AgentError;

/// Why something about a VM was not done.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    /// A file cannot be used.
    #[error("cannot {act} '{}': {source}", path.display())]
    File {
        /// What was tried.
        act: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A name that cannot be one.
    #[error(
        "'{0}' cannot be a VM's name: use 1 to 63 lower-case letters, digits and hyphens, and begin and end with a letter or digit"
    )]
    Name(String),
    /// The name is another VM's.
    #[error("there is a VM '{0}' already: give another --name, or remove it (alveole rm {0})")]
    Exists(String),
    /// No such VM.
    #[error("there is no VM '{0}'; `alveole ps -a` shows them all")]
    Unknown(String),
    /// An id that begins several.
    #[error("'{0}' begins the ids of several VMs: write more of it, or the name")]
    Ambiguous(String),
    /// It runs, and that stands in the way.
    #[error("the VM '{0}' runs: stop it first (alveole stop {0})")]
    Runs(String),
    /// It does not run, and would have to.
    #[error("the VM '{0}' does not run; `alveole start {0}` starts it")]
    DoesNotRun(String),
    /// No such volume.
    #[error("there is no volume '{0}'; `alveole volume ls` shows them all")]
    UnknownVolume(String),
    /// The name is another volume's.
    #[error("there is a volume '{0}' already")]
    VolumeExists(String),
    /// A name that cannot be a volume's.
    #[error(
        "'{0}' cannot be a volume's name: use 1 to 64 letters, digits, '_', '.' and '-', and begin with a letter or digit; a folder of this host \
         is written with a slash, as ./{0}"
    )]
    VolumeName(String),
    /// Who writes a volume has it alone.
    #[error(
        "the volume '{0}' is in use by a VM that runs: who writes it has it alone; several can have it if all have it as {0}:PATH:ro"
    )]
    VolumeInUse(String),
    /// Its file system has to be put in order by who may write.
    #[error(
        "the volume '{0}' was not left in order, as its VM was killed: use it once without :ro, which puts it in order"
    )]
    VolumeDirty(String),
    /// No such snapshot.
    #[error("there is no snapshot '{0}'; `alveole snapshot ls` shows them all")]
    UnknownSnapshot(String),
    /// The name is another snapshot's.
    #[error(
        "there is a snapshot '{0}' already: say another name, or remove it (alveole snapshot rm {0})"
    )]
    SnapshotExists(String),
    /// A name that cannot be a snapshot's.
    #[error(
        "'{0}' cannot be a snapshot's name: use 1 to 63 lower-case letters, digits and hyphens, and begin and end with a letter or digit"
    )]
    SnapshotName(String),
    /// It is being loaded, or removed.
    #[error("the snapshot '{0}' is being loaded or removed just now: try again in a moment")]
    SnapshotInUse(String),
    /// A description that this version cannot read.
    #[error("cannot understand '{}': {why}; was it written by a newer alveole?", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// Where it goes wrong.
        why: String,
    },
    /// The monitor's API does not do it.
    #[error("{request} of the monitor of '{name}': {why}")]
    Monitor {
        /// The VM.
        name: String,
        /// What it was asked.
        request: String,
        /// Why not.
        why: String,
    },
    /// The guest did not come up.
    #[error("the VM '{name}' did not start: {why}")]
    NoStart {
        /// The VM.
        name: String,
        /// Why not.
        why: String,
    },
    /// A copy that has other devices than what it is a copy of.
    #[error(
        "the copy is to have {now} network interfaces, and what it is a copy of has {was}: give it as many, in the same order"
    )]
    OtherDevices {
        /// Those of the guest as it was set up.
        was: usize,
        /// Those of the copy.
        now: usize,
    },
    /// A copy that runs, and has the identity of what it is a copy of.
    #[error(
        "the VM '{name}' has not become a VM of its own: {why}; it may have names and addresses of the one that it is a copy of: end it (alveole kill {name})"
    )]
    NotRenewed {
        /// The VM.
        name: String,
        /// Why not.
        why: String,
    },
    /// The keeper, or the agent, says no.
    #[error(transparent)]
    Agent(#[from] AgentError),
}

impl InstanceError {
    pub(crate) fn file<P: Into<PathBuf>>(
        act: &'static str,
        path: P,
    ) -> impl FnOnce(io::Error) -> Self + use<P> {
        let path = path.into();
        move |source| Self::File { act, path, source }
    }
}
