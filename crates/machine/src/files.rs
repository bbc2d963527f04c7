//! The thread that opens files for a running machine: what a client of the API puts into a drive, and the files of snapshots.
//!
//! No other thread can open any, and control must not wait for a file that lies on the other side of a network. So
//! control hands a job over and goes on; what was opened comes back as an event, and control only swaps it in. The
//! thread makes nothing of any byte of the guest, and exists only where there is somebody to ask.

use std::io;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use alveole_block_store::OpenError;
use alveole_guest_memory::{GuestRam, PageSet};
use alveole_thread_sandbox::Role;
use alveole_virtio_blk::{BlkHandle, Medium};
use alveole_vm_config::{DriveUpdate, SnapshotCreate};
use alveole_vm_control::Reply;

use crate::snapshot::{self, Ahead, SnapshotJob, Taken};
use crate::validate::ValidDrive;
use crate::{Event, Mailbox};

/// What the devices add to the system calls of the thread: nothing, its role has it all.
const NAME: &str = "files";

/// How long a medium that was just taken out of a drive may be in use still, and how often to look.
const HAND_OVER: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// Something to open.
pub(crate) struct Job {
    /// The disk that it is for.
    pub(crate) disk: BlkHandle,
    /// How the drive is to be: its path may be another one.
    pub(crate) drive: ValidDrive,
    /// What the client has asked for.
    pub(crate) update: DriveUpdate,
    pub(crate) reply: Reply,
}

/// What came of a job.
pub struct Opened {
    pub(crate) disk: BlkHandle,
    pub(crate) update: DriveUpdate,
    pub(crate) reply: Reply,
    /// None: the disk has it already.
    pub(crate) medium: Result<Option<Medium>, String>,
}

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Opened").field(&self.update).finish()
    }
}

/// What the thread is asked for.
enum Work {
    Open(Box<Job>),
    Snapshot(Box<SnapshotJob>),
    /// Makes the files of a live snapshot.
    Prepare(Box<(SnapshotCreate, GuestRam)>),
    /// Writes pages of the live snapshot that was prepared.
    Ahead(PageSet),
}

/// Control's end of the thread. It ends with it; nobody waits for that, as a file may never open.
pub struct Files(Sender<Work>);

/// Why there is no such thread.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot start the thread that opens files: {0}; is the limit on processes (ulimit -u) reached?"
)]
pub struct FilesError(#[source] io::Error);

impl Files {
    /// Starts the thread, which confines itself as its first act and reports to `mailbox`.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn start(mailbox: &Mailbox) -> Result<Self, FilesError> {
        let (jobs, inbox) = mpsc::channel();
        let mailbox = mailbox.clone();
        std::thread::Builder::new()
            .name(NAME.into())
            .stack_size(alveole_thread_sandbox::STACK_BYTES)
            .spawn(move || live(&inbox, &mailbox))
            .map_err(FilesError)?;
        Ok(Self(jobs))
    }

    /// Hands a job over. One that cannot be done is dropped, and so answered.
    pub(crate) fn open(&self, job: Job) {
        let _ = self.0.send(Work::Open(Box::new(job)));
    }

    /// Hands a snapshot over, which is told of by [`Event::Captured`], if the guest is to go on before it is written, and
    /// [`Event::Taken`].
    pub(crate) fn snapshot(&self, job: SnapshotJob) {
        let _ = self.0.send(Work::Snapshot(Box::new(job)));
    }

    /// Has the files of a live snapshot made: [`Event::Ahead`] tells of it, [`Event::Taken`] that it cannot be done.
    pub(crate) fn prepare(&self, create: SnapshotCreate, ram: GuestRam) {
        let _ = self.0.send(Work::Prepare(Box::new((create, ram))));
    }

    /// Has pages of it written: the same events tell.
    pub(crate) fn ahead(&self, pages: PageSet) {
        let _ = self.0.send(Work::Ahead(pages));
    }
}

fn live(jobs: &Receiver<Work>, mailbox: &Mailbox) {
    if let Err(e) = alveole_thread_sandbox::enter(Role::Files, NAME) {
        mailbox.send(Event::LoopEnded(e.to_string()));
        return;
    }
    let mut ahead = None;
    for work in jobs {
        let job = match work {
            Work::Open(job) => *job,
            Work::Snapshot(job) => {
                let taken = snapshot::take(*job, ahead.take(), || mailbox.send(Event::Captured));
                mailbox.send(Event::Taken(Box::new(taken)));
                continue;
            }
            Work::Prepare(what) => {
                let (create, ram) = *what;
                let begun = Ahead::begin(&create, &ram).map(|begun| ahead = Some(begun));
                mailbox.send(told(begun));
                continue;
            }
            Work::Ahead(pages) => {
                let written = match &mut ahead {
                    Some(ahead) => ahead.write(&pages),
                    None => Err("no live snapshot was begun".into()),
                };
                if written.is_err() {
                    ahead = None;
                }
                mailbox.send(told(written));
                continue;
            }
        };
        let medium = open(&job);
        let Job {
            disk,
            update,
            reply,
            ..
        } = job;
        mailbox.send(Event::Opened(Box::new(Opened {
            disk,
            update,
            reply,
            medium,
        })));
    }
}

/// What becomes of a live snapshot.
fn told(outcome: Result<(), String>) -> Event {
    match outcome {
        Ok(()) => Event::Ahead,
        Err(why) => Event::Taken(Box::new(Taken::failed(why))),
    }
}

fn open(job: &Job) -> Result<Option<Medium>, String> {
    let Job { disk, drive, .. } = job;
    let path = &drive.path;
    // The lock of what the disk has would be in the way of opening it once more.
    if alveole_block_store::identity_at(path).is_ok_and(|id| id == disk.medium_identity()) {
        return Ok(None);
    }
    let start = Instant::now();
    let store = loop {
        match alveole_block_store::open(path, &drive.open) {
            Ok(store) => break store,
            // It was in this very drive until a moment ago: what is in flight on it is finished first.
            Err(OpenError::Locked { by_us: true, .. }) if start.elapsed() < HAND_OVER => {
                std::thread::sleep(LOOK_AGAIN);
            }
            Err(e) => return Err(format!("drive {:?}: {e}", drive.id)),
        }
    };
    let medium = disk.prepare_medium(store).map_err(|e| e.to_string())?;
    Ok(Some(medium))
}
