//! The process that copies are made of.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{PeerCredentials, ReceiveTimeout, SendTimeout};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, getsockopt, listen,
    setsockopt, socket,
};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{ForkResult, Pid, fork, getpid, getuid};

use crate::wire::{self, MAX_DESCRIPTORS, MAX_REQUEST_BYTES, Request};

/// How long who has connected may take to say what it wants, or to take an answer. Abused by one that says nothing: others wait meanwhile.
const PATIENCE_MS: i64 = 1000;
/// After a connection that could not be taken.
const PAUSE: Duration = Duration::from_millis(10);
/// Connections that wait to be taken.
const BACKLOG: i32 = 1024;
/// Linux include/uapi/asm-generic/fcntl.h.
const F_SETSIG: libc::c_int = 10;
/// The descriptors that every process has.
const STANDARD: RawFd = 3;

/// Why there is no template.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// No descriptors.
    #[error(
        "cannot keep the {MAX_DESCRIPTORS} first descriptors free for copies: {0}; raise the limit on open files (ulimit -n)"
    )]
    Reserve(#[source] io::Error),
    /// No socket.
    #[error("cannot listen at {path:?}: {source}{}", cure(source))]
    Listen {
        /// Where.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// Copies have one thread.
    #[error(
        "this process has {0} threads, and a copy would have one of them: this is a bug, please report it"
    )]
    Threads(usize),
    /// The host.
    #[error("cannot wait for requests: {0}")]
    Wait(#[source] io::Error),
    /// Of a copy: it cannot be what was asked for.
    #[error("cannot become the copy that was asked for: {0}")]
    Become(#[source] io::Error),
}

fn cure(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::AlreadyExists | io::ErrorKind::AddrInUse => {
            "; remove what is there, if nobody uses it"
        }
        io::ErrorKind::InvalidFilename | io::ErrorKind::InvalidInput => {
            "; the path has at most 103 bytes"
        }
        io::ErrorKind::NotFound => "; make its folder first",
        _ => "",
    }
}

/// Numbers of descriptors that are kept for copies.
#[derive(Debug)]
pub struct Numbers {
    /// Each of them, but those that were open already.
    kept: Vec<OwnedFd>,
}

impl Numbers {
    /// Keeps all numbers below [`MAX_DESCRIPTORS`]. Before anything else is opened.
    ///
    /// # Errors
    /// The limit on open files is too low.
    pub fn reserve() -> Result<Self, TemplateError> {
        let mut kept = Vec::new();
        loop {
            let null: OwnedFd = File::open("/dev/null")
                .map_err(TemplateError::Reserve)?
                .into();
            let number = null.as_raw_fd();
            if number >= MAX_DESCRIPTORS {
                return Ok(Self { kept });
            }
            kept.push(null);
        }
    }

    /// Puts what a copy is given in place, and closes the rest of the numbers.
    fn hand_over(self, descriptors: &[(RawFd, OwnedFd)]) -> Result<(), Errno> {
        for (number, fd) in descriptors {
            // SAFETY: what has this number is one of `kept`, which nothing but that refers to and which is forgotten below, or was there
            // before this process began, and is one that a program takes as it finds it. The new one is forgotten as well: it is the copy's.
            if unsafe { libc::dup2(fd.as_raw_fd(), *number) } == -1 {
                return Err(Errno::last());
            }
        }
        for kept in self.kept {
            let number = kept.as_raw_fd();
            if number < STANDARD || descriptors.iter().any(|(given, _)| *given == number) {
                std::mem::forget(kept);
            }
        }
        Ok(())
    }
}

/// A process that copies are made of.
#[derive(Debug)]
pub struct Template {
    listener: OwnedFd,
    path: PathBuf,
    numbers: Numbers,
    copies: Vec<Copy>,
}

/// A copy, and who asked for it.
#[derive(Debug)]
struct Copy {
    pid: Pid,
    pidfd: OwnedFd,
    connection: OwnedFd,
}

impl Template {
    /// Listens at `path`, which is there from now on; who asks waits until [`Self::serve`].
    ///
    /// # Errors
    /// There is something already, or it cannot be made.
    pub fn listen(path: &Path, numbers: Numbers) -> Result<Self, TemplateError> {
        let listener = listening(path).map_err(|source| TemplateError::Listen {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            numbers,
            copies: Vec::new(),
        })
    }

    /// Makes copies for who asks. Returns in each of them, with its words; and without any in the template, when its standard input, a pipe, has
    /// been closed and the last copy has ended.
    ///
    /// # Errors
    /// This process has more than one thread; or the host gives nothing to wait with. In a copy: its descriptors cannot be had.
    pub fn serve(mut self) -> Result<Option<Vec<OsString>>, TemplateError> {
        let threads = fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
        if threads != 1 {
            return Err(TemplateError::Threads(threads));
        }
        let mut open = true;
        let stdin = io::stdin();
        let is_pipe = fs::metadata("/proc/self/fd/0").is_ok_and(|m| m.file_type().is_fifo());
        // What it says is nothing to us: only its end is, and of anything else not even that.
        let end = is_pipe.then_some(&stdin);
        loop {
            if !open && self.copies.is_empty() {
                return Ok(None);
            }
            let mut all = vec![PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
            all.extend(end.map(|end| PollFd::new(end.as_fd(), PollFlags::empty())));
            let others = all.len();
            let pidfds = self.copies.iter().map(|copy| copy.pidfd.as_fd());
            all.extend(pidfds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
            // Nobody is heard once no more are to be made.
            let from = usize::from(!open) * others;
            match poll(&mut all[from..], PollTimeout::NONE) {
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(e) => return Err(TemplateError::Wait(e.into())),
            }
            let ready: Vec<bool> = all
                .iter()
                .map(|fd| fd.revents().is_some_and(|seen| !seen.is_empty()))
                .collect();
            drop(all);
            let (heard, ended) = ready.split_at(others);
            self.say_ends(ended);
            if !open {
                continue;
            }
            if heard[0]
                && let Some((connection, request)) = self.hear()
            {
                match self.copy(connection, request)? {
                    Made::Here(words) => return Ok(Some(words)),
                    Made::There => {}
                }
            }
            if heard.get(1) == Some(&true) {
                open = false;
                let _ = fs::remove_file(&self.path);
            }
        }
    }

    /// Tells who asked how their copies ended, where this says that they have.
    fn say_ends(&mut self, ended: &[bool]) {
        let mut ended = ended.iter().chain(std::iter::repeat(&false));
        self.copies.retain(|copy| {
            if !ended.next().is_some_and(|ended| *ended) {
                return true;
            }
            let pidfd = Id::PIDFd(copy.pidfd.as_fd());
            let word = match waitid(pidfd, WaitPidFlag::WEXITED) {
                Ok(WaitStatus::Exited(_, code)) => format!("code {code}"),
                Ok(WaitStatus::Signaled(_, signal, _)) => format!("signal {}", signal as i32),
                _ => format!("process {} is not known", copy.pid),
            };
            // Who does not want to know has gone.
            let _ = wire::send(&copy.connection, word.as_bytes(), &[]);
            false
        });
    }

    /// Who comes next, and what it wants. None: nothing that can be, which it has been told.
    fn hear(&self) -> Option<(OwnedFd, Request)> {
        let Ok(raw) = accept4(self.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) else {
            // The host has no descriptor left, and would say so again at once.
            std::thread::sleep(PAUSE);
            return None;
        };
        // SAFETY: the kernel has just made it for us.
        let connection = unsafe { OwnedFd::from_raw_fd(raw) };
        let asked = credited(&connection).and_then(|()| heard(&connection));
        match asked {
            Ok(request) => Some((connection, request)),
            Err(why) => {
                let _ = wire::send(&connection, format!("refused {why}").as_bytes(), &[]);
                None
            }
        }
    }

    fn copy(&mut self, connection: OwnedFd, request: Request) -> Result<Made, TemplateError> {
        // SAFETY: this process has one thread, as `serve` has seen, so that the copy may do whatever it could.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => {
                let Request { words, descriptors } = request;
                self.copies.clear();
                let become_it = |e: Errno| TemplateError::Become(e.into());
                end_with(connection).map_err(become_it)?;
                let numbers = Numbers {
                    kept: std::mem::take(&mut self.numbers.kept),
                };
                numbers.hand_over(&descriptors).map_err(become_it)?;
                Ok(Made::Here(words))
            }
            Ok(ForkResult::Parent { child }) => {
                match pidfd_of(child) {
                    Ok(pidfd) => {
                        let pid = format!("pid {child}");
                        // Who has gone meanwhile has no copy: it ends by itself.
                        let _ = wire::send(&connection, pid.as_bytes(), &[pidfd.as_fd()]);
                        self.copies.push(Copy {
                            pid: child,
                            pidfd,
                            connection,
                        });
                    }
                    Err(e) => {
                        let why = format!("refused the copy {child} cannot be followed: {e}");
                        let _ = wire::send(&connection, why.as_bytes(), &[]);
                        // Without the connection it ends.
                        drop(connection);
                        let _ = waitid(Id::Pid(child), WaitPidFlag::WEXITED);
                    }
                }
                Ok(Made::There)
            }
            Err(e) => {
                let why = format!("refused the host gives no process: {e}");
                let _ = wire::send(&connection, why.as_bytes(), &[]);
                Ok(Made::There)
            }
        }
    }
}

/// Where [`Template::copy`] has returned.
enum Made {
    /// In the copy.
    Here(Vec<OsString>),
    /// In the template.
    There,
}

/// Where there is a socket, somebody listens: it gets its name last.
fn listening(path: &Path) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let ours = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    let mut making = path.as_os_str().to_owned();
    making.push(".new");
    bind(ours.as_raw_fd(), &UnixAddr::new(Path::new(&making))?)?;
    let named = Backlog::new(BACKLOG)
        .and_then(|backlog| listen(&ours, backlog))
        .map_err(io::Error::from)
        .and_then(|()| fs::hard_link(&making, path));
    fs::remove_file(&making)?;
    named.map(|()| ours)
}

/// Whether who connected may have copies: they have all rights of this process.
fn credited(connection: &OwnedFd) -> Result<(), String> {
    let told = |e: Errno| format!("it cannot be seen who asks: {e}");
    let uid = getsockopt(connection, PeerCredentials).map_err(told)?.uid();
    if uid != 0 && uid != getuid().as_raw() {
        return Err(format!(
            "it is of user {}, and not for user {uid}",
            getuid()
        ));
    }
    let patience = TimeVal::milliseconds(PATIENCE_MS);
    setsockopt(connection, ReceiveTimeout, &patience)
        .and_then(|()| setsockopt(connection, SendTimeout, &patience))
        .map_err(told)
}

fn heard(connection: &OwnedFd) -> Result<Request, String> {
    let came = wire::receive(connection, MAX_REQUEST_BYTES);
    match came {
        Ok(Some(packet)) if packet.bytes.len() > MAX_REQUEST_BYTES => {
            Err(format!("a request has at most {MAX_REQUEST_BYTES} bytes"))
        }
        Ok(Some(packet)) => wire::unpack(&packet.bytes, packet.descriptors),
        Ok(None) => Err("nothing was asked".into()),
        Err(Errno::EAGAIN) => Err(format!("nothing was asked within {PATIENCE_MS} ms")),
        Err(e) => Err(format!("what was asked cannot be read: {e}")),
    }
}

/// Has the kernel kill this process when the peer of the connection is gone (fcntl(2), `F_SETSIG`): whatever it waits for.
fn end_with(connection: OwnedFd) -> Result<(), Errno> {
    let raw = connection.as_raw_fd();
    for (what, value) in [
        (libc::F_SETOWN, getpid().as_raw()),
        (F_SETSIG, libc::SIGKILL),
    ] {
        // SAFETY: a descriptor of ours, and numbers.
        if unsafe { libc::fcntl(raw, what, value) } == -1 {
            return Err(Errno::last());
        }
    }
    fcntl(&connection, FcntlArg::F_SETFL(OFlag::O_ASYNC))?;
    // It may have gone before.
    let mut peer = [PollFd::new(connection.as_fd(), PollFlags::empty())];
    if poll(&mut peer, PollTimeout::ZERO)? > 0 {
        return Err(Errno::EPIPE);
    }
    // As long as this process.
    std::mem::forget(connection);
    Ok(())
}

fn pidfd_of(child: Pid) -> Result<OwnedFd, Errno> {
    // SAFETY: numbers. The child is not waited for, so that its number is no other's.
    let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, child.as_raw(), 0) };
    match i32::try_from(raw) {
        // SAFETY: the kernel has just made it for us.
        Ok(raw) if raw >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(raw) }),
        _ => Err(Errno::last()),
    }
}
