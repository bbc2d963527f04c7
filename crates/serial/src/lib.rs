//! 16550 serial port and the consoles behind it.
//!
//! Two threads meet here. A vCPU thread writes bytes into the UART, under the bus's device lock; the
//! event loop's thread carries them to the console and brings input back. Between them is a bounded
//! queue, so that a console that takes nothing costs a vCPU [`STALL_BUDGET_MS`] once and then bytes,
//! never its time. Whatever is dropped leaves a mark in the output and is counted.
//!
//! Registers: National Semiconductor PC16550D data sheet, section 8, as `vm-superio` does them.
//!
//! Deliberately does not know: port numbers, interrupt numbers, what the owner does on an event, who
//! else runs on the loop.

mod backend;
mod console;
mod counters;
mod log_limit;
mod out_queue;
mod panic_line;
mod port;
mod state;
mod sys;
mod uart;
mod worker;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

pub use backend::raw_mode::restore_terminal;
pub use console::{Console, ConsoleHandle};
pub use counters::SerialCounters;
pub use uart::{UART_PORTS, Uart};
pub use worker::ConsoleWorker;

/// Output that waits between the UART and the console. Abused by a guest that floods its console:
/// this, and no more, is what it can make us hold. Large enough that a terminal on a slow network
/// survives a hiccup.
pub const OUTPUT_BUFFER_BYTES: usize = 256 * 1024;
/// How long one write of a vCPU waits for room when the output queue is full. Abused by a guest whose
/// console nobody reads: after one such wait without a byte moving, writes drop at once until
/// something moves again. It also bounds how long pausing that vCPU takes.
pub const STALL_BUDGET_MS: u64 = 250;
/// How long after a byte of a stream the loop looks once more before it goes to rest. A stream of output thus costs the vCPU no
/// wake-up, and a person at the console does not notice.
pub(crate) const LINGER: Duration = Duration::from_millis(1);
/// Bytes that the loop finds so soon after others are a stream. More than [`LINGER`], so that what it finds when it looks once more
/// goes on with one.
pub(crate) const STREAM: Duration = Duration::from_millis(4);
/// Input that waits for the guest. Abused by a guest that never reads its UART while somebody pastes a
/// file: beyond this a pipe or socket is left alone, and what is typed at a terminal is dropped.
pub const INPUT_BUFFER_BYTES: usize = 64 * 1024;
/// What the socket console keeps for the next client. Abused by a guest that floods an unread console.
pub const SCROLLBACK_BYTES: usize = 64 * 1024;
/// Longest path of a unix socket: `sun_path` with its final zero is 108 bytes (unix(7)).
pub const SOCKET_PATH_MAX_BYTES: usize = 107;

/// Where the console is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConsoleTarget {
    /// Standard input and output. A terminal is put into raw mode and given back at the end.
    Terminal,
    /// Output into a file (made with mode 0600), no input. On a full disk output is dropped and
    /// counted; it goes on when there is room.
    File {
        /// The file.
        path: PathBuf,
        /// What happens to what is in it.
        start: FileStart,
        /// Size at which it stops growing. Without one, a guest that floods its console fills the
        /// disk.
        limit_bytes: Option<u64>,
    },
    /// A unix socket at this path, one client at a time.
    Socket(PathBuf),
    /// Output is dropped; there is no input.
    None,
}

/// What happens to a console file that exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileStart {
    /// Output goes after what is there.
    Append,
    /// The file is emptied first.
    Truncate,
}

/// What the person at the console wants from the owner of the machine, or what became of the console.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConsoleEvent {
    /// `Ctrl-A x`: end the machine.
    Quit,
    /// `Ctrl-A p`: press the power button.
    PowerButton,
    /// The terminal, or whoever read our standard output, is gone. The guest goes on; its output is
    /// dropped. Told once.
    TerminalLost,
}

/// Called on the event loop's thread when something happens at the console. It must not wait.
pub type OnConsoleEvent = Box<dyn Fn(ConsoleEvent) + Send + Sync>;

/// Why a console could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// The terminal could not be prepared.
    #[error(
        "cannot {act} on standard {stream}: {source}; use another console (file, socket, none)"
    )]
    Terminal {
        /// What was tried.
        act: &'static str,
        /// `input` or `output`.
        stream: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// This process has a console on its terminal already.
    #[error("cannot put the terminal into raw mode twice: another console of this process has it")]
    TerminalTaken,
    /// The console file could not be opened.
    #[error("cannot open the console file {path}: {source}{cure}", path = .path.display(), cure = cure(source))]
    File {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The path does not fit a socket address.
    #[error(
        "the console socket path {path} has {len} bytes, a unix socket takes {SOCKET_PATH_MAX_BYTES}; \
         choose a shorter directory", path = .path.display()
    )]
    SocketPathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length.
        len: usize,
    },
    /// A running process listens there.
    #[error(
        "the console socket {path} belongs to a running process; stop it or choose another path",
        path = .path.display()
    )]
    SocketInUse {
        /// The path.
        path: PathBuf,
    },
    /// There is something else at the path, and it is not ours to remove.
    #[error(
        "{path} exists and is not a socket; remove it or choose another path for the console",
        path = .path.display()
    )]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The socket could not be made.
    #[error("cannot {act} the console socket {path}: {source}{cure}", path = .path.display(), cure = cure(source))]
    Socket {
        /// What was tried.
        act: &'static str,
        /// The path.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The host has no descriptor left for the console's eventfd and timer.
    #[error(
        "cannot create a descriptor for the console: {0}; raise the limit of open files (ulimit -n)"
    )]
    Descriptor(#[source] io::Error),
}

/// What to do about a path that cannot be opened.
fn cure(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => "; does its directory exist?",
        io::ErrorKind::PermissionDenied => "; may this user write there?",
        io::ErrorKind::IsADirectory => "; name a file in it",
        _ => "",
    }
}
