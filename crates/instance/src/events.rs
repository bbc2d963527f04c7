//! What happened to VMs, a line of JSON each, in two files of bounded size beside their folders:
//!
//! ```text
//! .events, .events.1   the newest, and what was put aside when it had grown
//! .events.lock         held by who writes, and by who opens both
//! ```
//!
//! There is no daemon: whoever does something to a VM writes it down, its keeper or a command. What cannot be written is lost with a
//! warning: neither a full disk nor a lock that somebody keeps is a reason not to do what was asked.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{FlockOperation, inotify};
use serde::{Deserialize, Serialize};

use crate::{Ended, InstanceError, Vm};

/// A file that has grown so far is put aside, and the one before it is gone: twice this is all that events take, however often
/// a guest ends and is started again.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// A line that is longer is none of ours, and is passed over.
const MAX_LINE_BYTES: u64 = 64 << 10;
/// Who writes is done in far less; who was stopped with the lock in its hands does not stop others.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
/// Where the kernel cannot tell of changes (its limit on watches is reached), they are looked for.
const LOOK: Duration = Duration::from_millis(200);

/// Something that happened to a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When (RFC 3339).
    pub time: String,
    /// What.
    #[serde(flatten)]
    pub what: Happened,
    /// The VM's id.
    pub id: String,
    /// Its name at that time.
    pub name: String,
    /// The image as it was asked for.
    pub image: String,
    /// Its labels at that time.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// What can happen to a VM. In JSON `event` is its word, and what belongs to it stands beside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Happened {
    /// It was made.
    Created,
    /// Its main process runs.
    Started {
        /// How often it was started again by itself.
        restarts: u32,
    },
    /// A further process was run in it.
    Exec {
        /// The program. Arguments are not written down: people give secrets by them.
        program: String,
    },
    /// Somebody asked for its end.
    Stopping {
        /// The signal that its process is sent; none: the machine is ended as it is.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        signal: Option<u8>,
    },
    /// Its process was sent a signal.
    Signalled {
        /// Which one.
        signal: u8,
    },
    /// The guest's kernel ended a process for want of memory, as its console says: the guest's own word.
    Oom {
        /// Its number in the guest and its name.
        process: String,
    },
    /// The guest's kernel panicked.
    Panicked,
    /// Its main process, or its machine, ended.
    Ended {
        /// The exit status as shells say it.
        status: u8,
        /// What else there is to say.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        why: Option<String>,
    },
    /// It is to be started again by itself.
    Restarting {
        /// For which time.
        restarts: u32,
        /// How long that waits.
        pause_ms: u64,
    },
    /// Its keeper was killed, or the host went down; written down by who finds that.
    Lost,
    /// It was given another name.
    Renamed {
        /// The name that it had.
        from: String,
    },
    /// What it is, or may use, was changed.
    Updated {
        /// What, in the words of the command line.
        changed: Vec<String>,
    },
    /// A moment of it was kept, or copied at once.
    Snapshot {
        /// How long it stood still, in microseconds.
        stood_still_us: u64,
    },
    /// It goes on from a moment of another VM, and has become one of its own.
    Restored {
        /// The other VM's name.
        from: String,
    },
    /// It was removed.
    Removed,
}

impl Happened {
    /// The event's word.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Started { .. } => "started",
            Self::Exec { .. } => "exec",
            Self::Stopping { .. } => "stopping",
            Self::Signalled { .. } => "signalled",
            Self::Oom { .. } => "oom",
            Self::Panicked => "panicked",
            Self::Ended { .. } => "ended",
            Self::Restarting { .. } => "restarting",
            Self::Lost => "lost",
            Self::Renamed { .. } => "renamed",
            Self::Updated { .. } => "updated",
            Self::Snapshot { .. } => "snapshot",
            Self::Restored { .. } => "restored",
            Self::Removed => "removed",
        }
    }

    /// All words of events.
    pub const WORDS: [&'static str; 15] = [
        "created",
        "started",
        "exec",
        "stopping",
        "signalled",
        "oom",
        "panicked",
        "ended",
        "restarting",
        "lost",
        "renamed",
        "updated",
        "snapshot",
        "restored",
        "removed",
    ];
}

impl From<&Ended> for Happened {
    fn from(ended: &Ended) -> Self {
        Self::Ended {
            status: ended.status,
            why: ended.why.clone(),
        }
    }
}

impl Vm {
    /// Writes down what happened to it. What cannot be written is lost, with a warning.
    pub fn note(&self, what: Happened) {
        let event = Event {
            time: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
            what,
            id: self.record.id.clone(),
            name: self.name.clone(),
            image: self.record.image.clone(),
            labels: self.record.labels.clone(),
        };
        let folder = self.folder().parent().unwrap_or(Path::new("."));
        if let Err(e) = Files::of(folder).append(&event, MAX_FILE_BYTES) {
            log::warn!(
                "cannot write down that '{}' was {}: {e}",
                event.name,
                event.what.word()
            );
        }
    }
}

struct Files {
    newest: PathBuf,
    older: PathBuf,
    lock: PathBuf,
}

impl Files {
    fn of(folder: &Path) -> Self {
        // No VM's name begins so.
        Self {
            newest: folder.join(".events"),
            older: folder.join(".events.1"),
            lock: folder.join(".events.lock"),
        }
    }

    fn locked(&self, how: FlockOperation) -> io::Result<File> {
        let mut options = File::options();
        let file = options
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&self.lock)?;
        let until = Instant::now() + LOCK_PATIENCE;
        loop {
            match rustix::fs::flock(&file, how) {
                Ok(()) => return Ok(file),
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => {
                    thread::sleep(Duration::from_millis(1));
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(io::Error::other(format!(
                        "somebody has held the lock '{}' for {} s",
                        self.lock.display(),
                        LOCK_PATIENCE.as_secs()
                    )));
                }
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn append(&self, event: &Event, most: u64) -> io::Result<()> {
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        if line.len() as u64 > MAX_LINE_BYTES {
            return Err(io::Error::other("its labels are too long"));
        }
        let _lock = self.locked(FlockOperation::NonBlockingLockExclusive)?;
        let open = || {
            let mut options = File::options();
            options
                .create(true)
                .read(true)
                .append(true)
                .mode(0o600)
                .open(&self.newest)
        };
        let mut file = open()?;
        let mut size = file.metadata()?.len();
        if size >= most {
            fs::rename(&self.newest, &self.older)?;
            file = open()?;
            size = 0;
        }
        if size > 0 {
            let mut last = [0];
            file.seek(SeekFrom::Start(size - 1))?;
            file.read_exact(&mut last)?;
            // Who wrote it was killed in the middle: what is torn is a line of its own.
            if last != *b"\n" {
                line.insert(0, b'\n');
            }
        }
        // Whole or not at all, as far as that goes.
        file.write_all(&line)
            .inspect_err(|_| drop(file.set_len(size)))
    }
}

/// Reads what happened, the oldest first, and then what happens.
#[derive(Debug)]
pub struct EventReader {
    folder: PathBuf,
    /// Files that were put aside, then the newest.
    files: VecDeque<BufReader<File>>,
    /// A line that is not whole yet.
    begun: Vec<u8>,
    /// Tells of changes. None: nobody waits, or the kernel cannot.
    watch: Option<OwnedFd>,
}

impl EventReader {
    pub(crate) fn new(folder: &Path) -> Result<Self, InstanceError> {
        let mut reader = Self {
            folder: folder.into(),
            files: VecDeque::new(),
            begun: Vec::new(),
            watch: None,
        };
        reader.open(None)?;
        Ok(reader)
    }

    fn error(&self) -> impl FnOnce(io::Error) -> InstanceError + use<> {
        InstanceError::file("read", self.folder.join(".events"))
    }

    /// Opens what was not read yet: all that is newer than this file.
    fn open(&mut self, read: Option<u64>) -> Result<(), InstanceError> {
        if !self.folder.exists() {
            return Ok(());
        }
        let files = Files::of(&self.folder);
        // Between the two looks nothing is put aside. Who may not write here is told what there is all the same.
        let _lock = files.locked(FlockOperation::NonBlockingLockShared).ok();
        for path in [&files.older, &files.newest] {
            match File::open(path) {
                Ok(file) => {
                    let inode = file.metadata().map_err(self.error())?.ino();
                    if read != Some(inode) {
                        self.files.push_back(BufReader::new(file));
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(InstanceError::file("read", path)(e)),
            }
        }
        Ok(())
    }

    /// The next event that is there. None: there is none now. Lines that cannot be understood are passed over.
    ///
    /// # Errors
    ///
    /// The files cannot be read.
    pub fn next_event(&mut self) -> Result<Option<Event>, InstanceError> {
        loop {
            if self.files.is_empty() {
                self.open(None)?;
            }
            let error = InstanceError::file("read", self.folder.join(".events"));
            let Some(file) = self.files.front_mut() else {
                return Ok(None);
            };
            let inode = file.get_ref().metadata().map(|m| m.ino());
            let most = MAX_LINE_BYTES.saturating_sub(self.begun.len() as u64);
            let mut limited = file.take(most.max(1));
            let read = limited.read_until(b'\n', &mut self.begun);
            let (count, inode) = read.and_then(|count| Ok((count, inode?))).map_err(error)?;
            if self.begun.ends_with(b"\n") || self.begun.len() as u64 >= MAX_LINE_BYTES {
                let event = serde_json::from_slice(&self.begun).ok();
                self.begun.clear();
                if event.is_some() {
                    return Ok(event);
                }
                continue;
            }
            if count > 0 {
                continue;
            }
            if self.files.len() > 1 {
                self.files.pop_front();
                self.begun.clear();
                continue;
            }
            let newest = fs::metadata(self.folder.join(".events"));
            if newest.is_ok_and(|newest| newest.ino() != inode) {
                // It was put aside since, and may have got a last line before that: it is read to its end once more.
                self.open(Some(inode))?;
                continue;
            }
            return Ok(None);
        }
    }

    /// Waits until something may have been added, or for so long.
    ///
    /// # Errors
    ///
    /// Waiting fails.
    pub fn wait(&mut self, patience: Duration) -> Result<(), InstanceError> {
        if self.watch.is_none() {
            self.watch = watch(&self.folder);
            if self.watch.is_some() {
                // What was added before is found by the caller's next look.
                return Ok(());
            }
        }
        let Some(watch) = &self.watch else {
            thread::sleep(patience.min(LOOK));
            return Ok(());
        };
        let waited = || -> rustix::io::Result<()> {
            let timeout = rustix::event::Timespec {
                tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: patience.subsec_nanos().into(),
            };
            let ready = rustix::event::PollFd::new(watch, rustix::event::PollFlags::IN);
            match rustix::event::poll(&mut [ready], Some(&timeout)) {
                Err(rustix::io::Errno::INTR) => return Ok(()),
                polled => polled?,
            };
            // What changed is seen by looking.
            let mut buffer = [0; 4096];
            match rustix::io::read(watch, &mut buffer) {
                Err(rustix::io::Errno::AGAIN) => Ok(()),
                read => read.map(drop),
            }
        };
        waited().map_err(|e| self.error()(e.into()))
    }
}

fn watch(folder: &Path) -> Option<OwnedFd> {
    let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
    let watch = inotify::init(flags).ok()?;
    let changes = inotify::WatchFlags::MODIFY
        | inotify::WatchFlags::CREATE
        | inotify::WatchFlags::MOVED_TO
        | inotify::WatchFlags::ONLYDIR;
    inotify::add_watch(&watch, folder, changes).ok()?;
    Some(watch)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(number: u8) -> Event {
        Event {
            time: "2026-01-02T03:04:05.000Z".into(),
            what: Happened::Ended {
                status: number,
                why: None,
            },
            id: "0123456789ab".into(),
            name: "web".into(),
            image: "debian".into(),
            labels: BTreeMap::new(),
        }
    }

    fn statuses(reader: &mut EventReader) -> Vec<u8> {
        let next = || reader.next_event().unwrap();
        std::iter::from_fn(next)
            .map(|event| match event.what {
                Happened::Ended { status, .. } => status,
                other => panic!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn every_event_has_its_word_and_comes_back_as_it_was_written() {
        let all = [
            Happened::Created,
            Happened::Started { restarts: 2 },
            Happened::Exec {
                program: "sh".into(),
            },
            Happened::Stopping { signal: None },
            Happened::Signalled { signal: 1 },
            Happened::Oom {
                process: "12 (a)".into(),
            },
            Happened::Panicked,
            Happened::Ended {
                status: 3,
                why: Some("so".into()),
            },
            Happened::Restarting {
                restarts: 1,
                pause_ms: 100,
            },
            Happened::Lost,
            Happened::Renamed { from: "b".into() },
            Happened::Updated {
                changed: vec!["cpus=2".into()],
            },
            Happened::Snapshot {
                stood_still_us: 700,
            },
            Happened::Restored { from: "a".into() },
            Happened::Removed,
        ];
        assert_eq!(
            all.each_ref().map(Happened::word),
            Happened::WORDS,
            "WORDS has all of them, in this order"
        );
        for what in all {
            let event = Event { what, ..event(0) };
            let json = serde_json::to_value(&event).unwrap();
            assert_eq!(json["event"], event.what.word());
            assert_eq!(serde_json::from_value::<Event>(json).unwrap(), event);
        }
    }

    #[test]
    fn a_reader_has_each_event_once_whatever_is_put_aside_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::of(dir.path());
        let line = serde_json::to_vec(&event(100)).unwrap().len() as u64 + 1;
        // Two lines a file.
        let append = |number| files.append(&event(number), 2 * line - 10).unwrap();
        let mut reader = EventReader::new(dir.path()).unwrap();
        assert!(statuses(&mut reader).is_empty());
        append(101);
        assert_eq!(statuses(&mut reader), [101]);
        append(102);
        append(103);
        assert_eq!(statuses(&mut reader), [102, 103]);
        // Two files on: what is between is still there.
        append(104);
        append(105);
        assert_eq!(statuses(&mut reader), [104, 105]);
        append(106);
        append(107);
        append(108);
        assert_eq!(statuses(&mut reader), [106, 107, 108]);
        // Whoever comes late has what is kept.
        assert_eq!(
            statuses(&mut EventReader::new(dir.path()).unwrap()),
            [105, 106, 107, 108]
        );
        let sizes = [&files.newest, &files.older].map(|f| fs::metadata(f).unwrap().len());
        assert!(sizes.iter().all(|size| *size <= 2 * line), "{sizes:?}");
    }

    #[test]
    fn a_torn_line_and_one_of_another_version_cost_only_themselves() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::of(dir.path());
        let append = |number| files.append(&event(number), MAX_FILE_BYTES).unwrap();
        append(1);
        let mut whole = fs::read(&files.newest).unwrap();
        whole.extend(br#"{"event":"from_later","time":"x","id":"","name":"","image":""}"#);
        whole.extend(b"\n\xff\xfe\n{\"event\":\"ended\",\"sta");
        fs::write(&files.newest, &whole).unwrap();
        let mut reader = EventReader::new(dir.path()).unwrap();
        assert_eq!(statuses(&mut reader), [1]);
        append(2);
        assert_eq!(statuses(&mut reader), [2]);
        // A line without an end.
        let mut endless = fs::read(&files.newest).unwrap();
        endless.extend(vec![b'x'; 3 * usize::try_from(MAX_LINE_BYTES).unwrap()]);
        fs::write(&files.newest, &endless).unwrap();
        append(3);
        assert_eq!(
            statuses(&mut EventReader::new(dir.path()).unwrap()),
            [1, 2, 3]
        );
    }

    #[test]
    fn a_full_disk_and_a_lock_that_is_kept_lose_events_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::of(dir.path());
        files.append(&event(1), MAX_FILE_BYTES).unwrap();
        let held = files
            .locked(FlockOperation::NonBlockingLockExclusive)
            .unwrap();
        let refused = files.append(&event(2), MAX_FILE_BYTES).unwrap_err();
        assert!(refused.to_string().contains(".events.lock"), "{refused}");
        drop(held);
        files.append(&event(3), MAX_FILE_BYTES).unwrap();
        let mut reader = EventReader::new(dir.path()).unwrap();
        assert_eq!(statuses(&mut reader), [1, 3]);
        if Path::new("/dev/full").exists() {
            let full = Files {
                newest: "/dev/full".into(),
                ..files
            };
            assert!(full.append(&event(4), MAX_FILE_BYTES).is_err());
        }
    }

    #[test]
    fn those_who_write_at_once_do_not_mix() {
        let dir = tempfile::tempdir().unwrap();
        thread::scope(|scope| {
            for number in 0..8 {
                let files = Files::of(dir.path());
                scope.spawn(move || {
                    for _ in 0..50 {
                        files.append(&event(number), 4096).unwrap();
                    }
                });
            }
            let mut reader = EventReader::new(dir.path()).unwrap();
            let mut seen = [0; 8];
            let until = Instant::now() + Duration::from_secs(20);
            // Files are put aside faster than they are read at times: what is read is whole, in order and at most once.
            while seen.iter().sum::<u32>() < 100 && Instant::now() < until {
                for status in statuses(&mut reader) {
                    seen[usize::from(status)] += 1;
                }
                reader.wait(Duration::from_millis(20)).unwrap();
            }
            assert!(seen.iter().sum::<u32>() >= 20, "{seen:?}");
            assert!(seen.iter().all(|count| *count <= 50), "{seen:?}");
        });
    }

    #[test]
    fn who_waits_is_told_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut reader = EventReader::new(dir.path()).unwrap();
        reader.wait(Duration::from_secs(10)).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(50));
                Files::of(dir.path())
                    .append(&event(9), MAX_FILE_BYTES)
                    .unwrap();
            });
            let begun = Instant::now();
            let mut found = Vec::new();
            while found.is_empty() && begun.elapsed() < Duration::from_secs(20) {
                reader.wait(Duration::from_secs(20)).unwrap();
                found = statuses(&mut reader);
            }
            assert_eq!(found, [9]);
            assert!(begun.elapsed() < Duration::from_secs(10));
        });
    }
}
