//! The other end of a guest's console: pipes, a pseudo-terminal, a file or a socket.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::termios::{self, InputFlags, LocalFlags, Termios};

/// Where the console is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Console {
    /// Standard input and output, as pipes.
    #[default]
    Pipe,
    /// Standard input and output, as a terminal.
    Terminal,
    /// A file in the test's directory.
    File,
    /// A socket in the test's directory; see [`super::Running::attach`].
    Socket,
}

/// What came out of the guest so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Output(Arc<(Mutex<Vec<u8>>, Condvar)>);

impl Output {
    fn push(&self, bytes: &[u8]) {
        let mut all = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.extend_from_slice(bytes);
        self.0.1.notify_all();
    }

    /// All of it.
    pub(crate) fn text(&self) -> String {
        let all = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&all).replace('\r', "")
    }

    /// Waits, not longer than `most`, for more than `len` bytes.
    pub(crate) fn wait_for_more(&self, most: Duration) {
        let all = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self.0.1.wait_timeout(all, most);
    }
}

/// Carries what can be read to [`Output`], until the end or until told to stop.
#[derive(Debug)]
pub(crate) struct Reader {
    thread: Option<JoinHandle<()>>,
    order: Arc<AtomicU8>,
}

/// What a reader is to do: go on to the end,
const READ: u8 = 0;
/// read no more, but keep what it reads from open,
const PAUSE: u8 = 1;
/// or close it.
const CLOSE: u8 = 2;

impl Reader {
    pub(crate) fn start(mut from: impl Read + Send + 'static, into: Output) -> Self {
        let order = Arc::new(AtomicU8::new(READ));
        let told = Arc::clone(&order);
        let thread = std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while told.load(Ordering::Relaxed) == READ {
                // A terminal whose other side is gone answers with an error: that is its end.
                match from.read(&mut bytes) {
                    Ok(0) | Err(_) => return,
                    Ok(len) => into.push(&bytes[..len]),
                }
            }
            while told.load(Ordering::Relaxed) == PAUSE {
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        Self {
            thread: Some(thread),
            order,
        }
    }

    /// Reads a file that grows.
    pub(crate) fn follow(path: PathBuf, into: Output) -> Self {
        let order = Arc::new(AtomicU8::new(READ));
        let told = Arc::clone(&order);
        let thread = std::thread::spawn(move || {
            let mut file = None;
            let mut bytes = [0; 4096];
            loop {
                // Asked before the file is read: what was written before the stop is read as well.
                let last = told.load(Ordering::Relaxed) == CLOSE;
                if file.is_none() {
                    file = File::open(&path).ok();
                }
                while let Some(len) = file.as_mut().and_then(|f| f.read(&mut bytes).ok()) {
                    if len == 0 {
                        break;
                    }
                    into.push(&bytes[..len]);
                }
                if last {
                    return;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        Self {
            thread: Some(thread),
            order,
        }
    }

    /// Reads no more, but keeps what it reads from open.
    pub(crate) fn pause(&self) {
        self.order.store(PAUSE, Ordering::Relaxed);
    }

    /// Reads no more than what comes next, or, of a file, what is there.
    pub(crate) fn close(&self) {
        self.order.store(CLOSE, Ordering::Relaxed);
    }

    /// Waits for the end of what is read.
    pub(crate) fn finish(&mut self) {
        let _ = self
            .order
            .compare_exchange(PAUSE, CLOSE, Ordering::Relaxed, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// How a terminal is set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings(Termios);

impl Settings {
    /// Keys come one by one, unseen and uninterpreted.
    pub(crate) fn is_raw(&self) -> bool {
        let off = LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG;
        !self.0.local_flags.intersects(off) && !self.0.input_flags.contains(InputFlags::ICRNL)
    }
}

/// A pseudo-terminal: we hold both sides, so that its settings can be asked for at any time.
#[derive(Debug)]
pub(crate) struct Terminal {
    ours: OwnedFd,
    theirs: OwnedFd,
}

impl Terminal {
    pub(crate) fn open() -> Self {
        // Closed on exec from the start: a monitor that had our side too would never lose its terminal.
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let ours = posix_openpt(flags).unwrap();
        grantpt(&ours).unwrap();
        unlockpt(&ours).unwrap();
        let path = ptsname_r(&ours).unwrap();
        let mut options = File::options();
        let options = options.read(true).write(true).custom_flags(libc::O_NOCTTY);
        let theirs = options.open(path).unwrap().into();
        Self {
            ours: ours.into(),
            theirs,
        }
    }

    pub(crate) fn stdio(&self) -> Stdio {
        self.theirs.try_clone().unwrap().into()
    }

    pub(crate) fn file(&self) -> File {
        self.ours.try_clone().unwrap().into()
    }

    pub(crate) fn settings(&self) -> Settings {
        Settings(termios::tcgetattr(self.theirs.as_fd()).unwrap())
    }
}

/// Connects to a console socket as soon as it is there.
pub(crate) fn connect(path: &Path, most: Duration) -> UnixStream {
    let until = Instant::now() + most;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream,
            Err(e) if Instant::now() > until => {
                panic!("no console socket at {}: {e}", path.display())
            }
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Writes all of `text`.
pub(crate) fn write(mut into: impl Write, text: &str) {
    into.write_all(text.as_bytes()).unwrap();
    into.flush().unwrap();
}
