//! Messages: JSON objects, so that each side passes over the fields that it does not know.
//!
//! A text of the other side is for people only after [`Refusal::shown`] or the like: it may hold what moves a terminal's cursor.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{MAX_MESSAGE_BYTES, PROTOCOL};

/// The first message of both sides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The newest version of the protocol that the sender speaks. The session has the lower one of both.
    pub protocol: u32,
    /// The oldest one that it speaks.
    pub oldest: u32,
    /// Its own version, for people.
    pub version: String,
}

impl Hello {
    /// What this version of the program says.
    #[must_use]
    pub fn ours() -> Self {
        Self {
            protocol: PROTOCOL,
            oldest: 1,
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }

    /// The version that a session with this other side has.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn agree(&self) -> Result<u32, MessageError> {
        let version = self.protocol.min(PROTOCOL);
        if version < self.oldest || version < Self::ours().oldest {
            return Err(MessageError::Version {
                theirs: self.protocol,
                their_oldest: self.oldest,
            });
        }
        Ok(version)
    }
}

/// What the host asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Make the guest what it is to be; once, on the connection to [`READY_PORT`](crate::READY_PORT). Answer: [`Answer::Done`].
    Setup(Box<Setup>),
    /// Run a process. Answers: [`Answer::Started`], then [`Answer::Exited`]. Meanwhile the host may send [`Control`]s.
    /// If the connection ends before, the process is told by SIGHUP, as at the end of a terminal; or waits for [`Request::Rejoin`]
    /// ([`Process::outlives_session`]).
    Run(Box<Process>),
    /// Go on with the streams of a process whose session broke off, as sessions of a copied guest do. Its output waited from what
    /// the connection before had taken. Answers and [`Control`]s as of [`Request::Run`].
    Rejoin {
        /// The process, by the number that [`Answer::Started`] gave.
        pid: u32,
    },
    /// Unpack the tar archive that comes as input. Answers: [`Answer::Started`], then [`Answer::Done`].
    CopyIn(CopyIn),
    /// Pack a tar archive, which comes as output. Answers: [`Answer::Started`], then [`Answer::Done`].
    CopyOut(CopyOut),
    /// Pack what was changed of the root as a layer of an OCI image, a tar archive, which comes as output. Answers:
    /// [`Answer::Started`], then [`Answer::Done`].
    Changes(Changes),
    /// How the guest does. Answer: [`Answer::Metrics`].
    Metrics,
    /// Set the clock. Answer: [`Answer::Done`].
    SetClock {
        /// Nanoseconds since 1970.
        unix_ns: u64,
    },
    /// Step the clock by so much, or, by nothing, read it. A step, unlike a time, is not late when it comes. Answer: [`Answer::Clock`].
    StepClock {
        /// Nanoseconds, forwards or backwards.
        by_ns: i64,
    },
    /// Become somebody else, as a copy of a guest, or one that goes on from an earlier moment, must. Answer: [`Answer::Renewed`],
    /// also where some of it failed.
    Renew(Box<Renewal>),
    /// Send a signal to a process that a session runs, by the number that [`Answer::Started`] gave. Answer: [`Answer::Done`].
    Signal {
        /// The process.
        pid: u32,
        /// The signal's number.
        signal: u8,
    },
    /// End the guest. Answer: [`Answer::Done`], then the end of everything.
    Shutdown(Shutdown),
}

/// What the host sends while a process runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Control {
    /// The terminal has another size.
    Resize(WindowSize),
    /// Send the process a signal.
    Signal(u8),
}

/// What the agent answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It could not be done.
    Refused(Refusal),
    /// Streams may come and go now.
    Started {
        /// The process's number in the guest, 0 if there is none.
        pid: u32,
    },
    /// The process has ended, and all it had written was sent.
    Exited(Exit),
    /// It is done.
    Done,
    /// How the guest does.
    Metrics(Box<Metrics>),
    /// What became of a renewal.
    Renewed(Box<Renewed>),
    /// The clock, after a step.
    Clock {
        /// Nanoseconds since 1970.
        unix_ns: u64,
    },
}

/// How a process has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// By itself, with this status.
    Code(u8),
    /// By this signal.
    Signal(u8),
}

impl Exit {
    /// The exit status as shells say it: 128 more than the signal's number.
    #[must_use]
    pub fn status(self) -> u8 {
        match self {
            Exit::Code(code) => code,
            Exit::Signal(signal) => signal.saturating_add(128),
        }
    }
}

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Which kind of refusal: see the constants of this type. There may be others.
    pub code: String,
    /// What failed, the value, why, what to do.
    pub text: String,
}

impl Refusal {
    /// The agent does not know the request: it is older than the host.
    pub const UNKNOWN_REQUEST: &'static str = "unknown_request";
    /// There is no such program, file or process.
    pub const NOT_FOUND: &'static str = "not_found";
    /// The program cannot be executed.
    pub const NOT_EXECUTABLE: &'static str = "not_executable";
    /// Whatever else.
    pub const FAILED: &'static str = "failed";

    /// The longest text that is shown.
    const MAX_SHOWN_CHARS: usize = 2000;

    /// The text for people: a guest's text may hold anything.
    #[must_use]
    pub fn shown(&self) -> String {
        shown(&self.text)
    }
}

/// A text of the other side, for people.
fn shown(text: &str) -> String {
    let chars = text.chars().take(Refusal::MAX_SHOWN_CHARS);
    chars
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

/// What the guest is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Setup {
    /// Its root, which is never written.
    pub root: Option<Mount>,
    /// What takes the root's changes. Without it they are in memory, and gone with the guest.
    pub changes: Option<Mount>,
    /// The root is not to be changed at all.
    pub read_only: bool,
    /// What is mounted in the root, in this order.
    pub mounts: Vec<Mount>,
    /// What lies in the root and is no part of it, in this order, after [`mounts`](Self::mounts).
    pub volumes: Vec<Volume>,
    /// The disk with its kernel's modules, mounted at `/lib/modules/RELEASE`.
    pub modules: Option<Mount>,
    /// The size of `/dev/shm` in bytes, else half of the memory.
    pub shm_bytes: Option<u64>,
    /// Its name.
    pub hostname: String,
    /// Its network devices, each as the word that a kernel's command line has for it (`alveole-network`'s `guest_config`).
    pub network: Vec<String>,
    /// Lines of `/etc/hosts`, after those of its own name.
    pub hosts: Vec<(IpAddr, String)>,
    /// Nanoseconds since 1970, if its clock is to be set.
    pub unix_ns: Option<u64>,
    /// Settings of the kernel: names as `net.ipv4.ip_forward`.
    pub sysctl: BTreeMap<String, String>,
}

/// Something to be mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// What is mounted.
    pub source: Source,
    /// The file system, as `mount -t` has it.
    pub kind: String,
    /// Where, in the guest's root; of the root itself `/`.
    pub target: String,
    /// Nothing is to be written.
    #[serde(default)]
    pub read_only: bool,
    /// Options, as `mount -o` has them.
    #[serde(default)]
    pub options: String,
}

/// Where a mount's content is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The disk with this serial number (the drive's name in the machine's description).
    Disk(String),
    /// A word of the file system's own, such as a virtiofs tag.
    Tag(String),
    /// Nothing, as for tmpfs.
    Nothing,
}

/// Files that lie in the root and are no part of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Where they are: `target` is where they are to be in the guest, which is made if it is not there; `read_only` is for the guest.
    /// [`Source::Nothing`] without a kind: in the folder `changes` alone.
    pub mount: Mount,
    /// A folder or file in it, which is shown instead of all of it. A folder that is not there is made.
    #[serde(default)]
    pub within: String,
    /// A folder beside the root's changes, by this name, takes what is written.
    #[serde(default)]
    pub changes: Option<String>,
    /// While it is empty, it gets what the root has at this place.
    #[serde(default)]
    pub fill: bool,
}

/// A process to be run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Process {
    /// The program and its arguments. A program without a slash is looked for in the `PATH` of `env`.
    pub args: Vec<String>,
    /// Its environment, whole.
    pub env: Vec<(String, String)>,
    /// Where it starts; empty for `/`.
    pub cwd: String,
    /// Make that folder if it is not there.
    pub make_cwd: bool,
    /// Who it is, as images have it: `USER[:GROUP]`, names or numbers; empty for root.
    pub user: String,
    /// It gets a terminal of this size. Its errors are then part of its output.
    pub terminal: Option<WindowSize>,
    /// It has an input; else its input is empty.
    pub input: bool,
    /// It goes on when its session breaks off, and waits for another one where it writes more than a pipe holds.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub outlives_session: bool,
}

/// The size of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters of a line.
    pub columns: u16,
}

/// Where an archive is unpacked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyIn {
    /// A folder that is there.
    pub folder: String,
    /// Owners are as the archive says; else who copies is root, and so are the files.
    pub keep_owners: bool,
}

/// What is packed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyOut {
    /// A file or a folder. Its entry in the archive has its last name.
    pub path: String,
    /// What a link leads to instead of the link, for `path` itself.
    pub follow: bool,
}

/// How changes are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changes {
    /// The disk that has them is held still meanwhile: whoever wants to write to it waits.
    pub freeze: bool,
}

/// The most random bytes of a [`Renewal`]: twice what the kernel's pool holds.
pub const MAX_ENTROPY_BYTES: usize = 512;
/// The longest that the hooks of a [`Renewal`] may take, together.
pub const MAX_HOOKS_MS: u32 = 600_000;

/// What a guest is to be from now on. What is not said stays as it is; the parts are done in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Renewal {
    /// Random bytes, at most [`MAX_ENTROPY_BYTES`], from which, with what it has, the kernel seeds its random numbers anew.
    pub entropy: Vec<u8>,
    /// Nanoseconds since 1970: the clock is set to it, by a step.
    pub unix_ns: Option<u64>,
    /// Its name: at most 64 letters, digits, `-` and `.`; also in `/etc/hostname` and `/etc/hosts`.
    pub hostname: Option<String>,
    /// 32 hexadecimal digits, not all of them zero, for `/etc/machine-id` (machine-id(5)) and its copy for D-Bus.
    pub machine_id: Option<String>,
    /// Its network devices.
    pub interfaces: Vec<RenewedInterface>,
    /// Run the executables of the guest's `/etc/alveole/renew.d`, in the order of their names: so long they have together, in milliseconds,
    /// at most [`MAX_HOOKS_MS`].
    pub hooks_ms: Option<u32>,
}

/// A network device, and what it is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenewedInterface {
    /// The hardware address that it has, or its name.
    pub is: String,
    /// Its hardware address, addresses, default routes, resolvers and MTU from now on, in one word as in [`Setup::network`].
    pub becomes: String,
}

/// What became of a [`Renewal`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Renewed {
    /// Each part that was asked for, in the order in which they were done.
    pub parts: Vec<RenewedPart>,
    /// How far the clock was off: its time less the host's, in nanoseconds.
    pub clock_off_ns: Option<i64>,
    /// The hooks that were run, in order.
    pub hooks: Vec<HookRun>,
}

/// One part of a [`Renewal`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RenewedPart {
    /// `entropy`, `clock`, `hostname`, `machine-id`, `network` or `hooks`.
    pub part: String,
    /// Why it was not done, or not all of it.
    pub failed: Option<String>,
    /// What else is to be said of it, such as what was left alone.
    pub remark: Option<String>,
}

/// How a hook ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookRun {
    /// Its file name.
    pub name: String,
    /// Its exit; none: its time was over, and it was killed with all that it had started in its session.
    pub exit: Option<Exit>,
    /// The first of what it wrote, output and errors.
    #[serde(default)]
    pub output: String,
}

impl Renewed {
    /// What went wrong, a line for each part and hook, for people: a guest's text may hold anything.
    #[must_use]
    pub fn failures(&self) -> Vec<String> {
        let parts = self.parts.iter().filter_map(|part| {
            let why = part.failed.as_deref()?;
            Some(shown(&format!("{}: {why}", part.part)))
        });
        let hooks = self.hooks.iter().filter_map(|hook| {
            let how = match hook.exit {
                Some(Exit::Code(0)) => return None,
                Some(exit) => format!("ended with status {}", exit.status()),
                None => "was not done in time".into(),
            };
            let said = hook.output.trim();
            Some(shown(&format!("hook '{}' {how}: {said}", hook.name)))
        });
        parts.chain(hooks).take(Self::MAX_SHOWN_FAILURES).collect()
    }

    /// A guest may have a thousand hooks, and say of each that it failed.
    const MAX_SHOWN_FAILURES: usize = 32;
}

/// How to end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shutdown {
    /// Off, or on again.
    pub how: ShutdownHow,
    /// The signal that asks processes to end.
    pub signal: u8,
    /// How long they have for it, in milliseconds, before they are killed.
    pub grace_ms: u32,
}

/// Off, or on again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShutdownHow {
    /// Power off.
    PowerOff,
    /// Restart.
    Restart,
}

/// How the guest does, as its kernel says. All counters are since its start.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Metrics {
    /// Seconds since its start.
    pub uptime_s: f64,
    /// Load averages of 1, 5 and 15 minutes.
    pub load: [f64; 3],
    /// Seconds that its processors were busy with: user, nice, system, idle, iowait, irq, softirq, steal.
    pub cpu_s: [f64; 8],
    /// Its processors.
    pub cpus: u32,
    /// Its memory.
    pub memory: MemoryMetrics,
    /// How much waits for `cpu`, `memory`, `io`.
    pub pressure: BTreeMap<String, Pressure>,
    /// Its disks.
    pub disks: Vec<DeviceMetrics>,
    /// Its network devices.
    pub networks: Vec<NetworkMetrics>,
    /// Its file systems on disks.
    pub file_systems: Vec<FileSystemMetrics>,
    /// Its processes.
    pub processes: ProcessMetrics,
}

/// Memory, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryMetrics {
    /// All of it.
    pub total_bytes: u64,
    /// Not used for anything.
    pub free_bytes: u64,
    /// What could be had without swapping.
    pub available_bytes: u64,
    /// Content of files that could be dropped.
    pub cached_bytes: u64,
}

/// Shares of time in which some, or all, waited: averages over 10 s in percent, and the sum in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pressure {
    /// Some waited, in percent of the last 10 s.
    pub some_avg10: f64,
    /// Some waited, in all.
    pub some_us: u64,
    /// All waited, in percent of the last 10 s.
    pub full_avg10: f64,
    /// All waited, in all.
    pub full_us: u64,
}

/// A disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceMetrics {
    /// Its name, as `vda`.
    pub name: String,
    /// Reads done.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes done.
    pub writes: u64,
    /// Bytes written.
    pub written_bytes: u64,
}

/// A network device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworkMetrics {
    /// Its name, as `eth0`.
    pub name: String,
    /// Bytes received.
    pub received_bytes: u64,
    /// Frames received.
    pub received_frames: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Frames sent.
    pub sent_frames: u64,
}

/// A file system.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FileSystemMetrics {
    /// Where it is mounted.
    pub target: String,
    /// Its kind, as `ext4`.
    pub kind: String,
    /// Its size.
    pub total_bytes: u64,
    /// What is free for everybody.
    pub available_bytes: u64,
}

/// Processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessMetrics {
    /// Processes and threads that there are.
    pub all: u32,
    /// Those that run or could.
    pub running: u32,
    /// Those that wait for a disk.
    pub blocked: u32,
    /// Processes started since the start.
    pub started: u64,
}

/// What is wrong with a message.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// It is not JSON, or not what is expected here.
    #[error("a message that is no {expected}: {source}")]
    Form {
        /// What was expected.
        expected: &'static str,
        /// Where it goes wrong.
        source: serde_json::Error,
    },
    /// It is too long to be sent.
    #[error(
        "a message of {0} bytes; at most {MAX_MESSAGE_BYTES} can be sent: are arguments and environment that long?"
    )]
    Length(usize),
    /// No version of the protocol is common to both.
    #[error(
        "the other side speaks protocol {their_oldest} to {theirs}, this one 1 to {PROTOCOL}: bring the older one of host and guest up to date"
    )]
    Version {
        /// The newest one it speaks.
        theirs: u32,
        /// The oldest one.
        their_oldest: u32,
    },
}

/// A message as the bytes of its frame.
///
/// # Errors
///
/// It is longer than [`MAX_MESSAGE_BYTES`].
pub fn to_json(message: &impl Serialize) -> Result<Vec<u8>, MessageError> {
    let json = serde_json::to_vec(message).map_err(|source| MessageError::Form {
        expected: "message",
        source,
    })?;
    if json.len() > MAX_MESSAGE_BYTES {
        return Err(MessageError::Length(json.len()));
    }
    Ok(json)
}

/// The message that a frame's bytes are; `expected` is for the error.
///
/// # Errors
///
/// They are another one, or none.
pub fn from_json<M: DeserializeOwned>(
    json: &[u8],
    expected: &'static str,
) -> Result<M, MessageError> {
    serde_json::from_slice(json).map_err(|source| MessageError::Form { expected, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_side_passes_over_what_a_newer_one_adds() {
        let newer = br#"{"run":{"args":["true"],"nice":5,"input":true}}"#;
        let Request::Run(process) = from_json(newer, "request").unwrap() else {
            panic!("another request");
        };
        assert_eq!(process.args, ["true"]);
        assert!(process.input);
        let unknown = from_json::<Request>(br#"{"teleport":{}}"#, "request").unwrap_err();
        assert!(unknown.to_string().contains("teleport"), "{unknown}");
    }

    #[test]
    fn versions_meet_or_say_why_not() {
        let hello = |protocol, oldest| Hello {
            protocol,
            oldest,
            version: String::new(),
        };
        assert_eq!(Hello::ours().agree().unwrap(), PROTOCOL);
        assert_eq!(hello(PROTOCOL + 5, 1).agree().unwrap(), PROTOCOL);
        let text = hello(PROTOCOL + 5, PROTOCOL + 1).agree().unwrap_err();
        assert!(text.to_string().contains("up to date"), "{text}");
        hello(0, 0).agree().unwrap_err();
    }

    #[test]
    fn a_guests_text_does_not_move_the_cursor() {
        let refusal = Refusal {
            code: Refusal::FAILED.into(),
            text: "\x1b[2Jgone\r\n".into(),
        };
        assert_eq!(refusal.shown(), "\u{fffd}[2Jgone\u{fffd}\u{fffd}");
    }

    #[test]
    fn a_renewal_goes_there_and_back_and_says_what_failed() {
        let renewal = Renewal {
            entropy: vec![7; MAX_ENTROPY_BYTES],
            unix_ns: Some(u64::MAX),
            hostname: Some("web2".into()),
            machine_id: Some("0123456789abcdef0123456789abcdef".into()),
            interfaces: vec![RenewedInterface {
                is: "eth0".into(),
                becomes: "alveole.net=02:00:00:00:00:02".into(),
            }],
            hooks_ms: Some(1000),
        };
        let request = Request::Renew(Box::new(renewal));
        let json = to_json(&request).unwrap();
        assert_eq!(from_json::<Request>(&json, "request").unwrap(), request);
        // Of an older host, and of a newer one.
        for json in [r#"{"renew":{}}"#, r#"{"renew":{"colour":"blue"}}"#] {
            let request = from_json::<Request>(json.as_bytes(), "request").unwrap();
            assert_eq!(request, Request::Renew(Box::default()));
        }

        let part = |part: &str, failed: Option<&str>| RenewedPart {
            part: part.into(),
            failed: failed.map(Into::into),
            remark: None,
        };
        let hook = |name: &str, exit| HookRun {
            name: name.into(),
            exit,
            output: "no\u{1b}[2J\n".into(),
        };
        let renewed = Renewed {
            parts: vec![part("entropy", None), part("clock", Some("not\nallowed"))],
            clock_off_ns: Some(-5),
            hooks: vec![
                hook("10-good", Some(Exit::Code(0))),
                hook("20-bad", Some(Exit::Signal(9))),
                hook("30-slow", None),
            ],
        };
        let json = to_json(&Answer::Renewed(Box::new(renewed.clone()))).unwrap();
        let Answer::Renewed(back) = from_json(&json, "answer").unwrap() else {
            panic!("another answer");
        };
        assert_eq!(*back, renewed);
        assert_eq!(
            back.failures(),
            [
                "clock: not\u{fffd}allowed",
                "hook '20-bad' ended with status 137: no\u{fffd}[2J",
                "hook '30-slow' was not done in time: no\u{fffd}[2J",
            ]
        );
        let many = Renewed {
            hooks: vec![hook("x", None); 100_000],
            ..Renewed::default()
        };
        assert_eq!(many.failures().len(), Renewed::MAX_SHOWN_FAILURES);
    }

    #[test]
    fn what_is_too_long_is_not_sent() {
        let process = Process {
            args: vec!["x".repeat(MAX_MESSAGE_BYTES)],
            ..Process::default()
        };
        let text = to_json(&Request::Run(Box::new(process))).unwrap_err();
        assert!(text.to_string().contains("environment"), "{text}");
    }
}
