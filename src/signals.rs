//! Signals to this process, as events for control.
//!
//! They are blocked in every thread and read from a signalfd by the devices loop, so that no code ever
//! runs at an arbitrary point because of them.

use std::fs::File;
use std::io::Read;

use alveole_event_loop::{Event, EventLoopError, Interest, Ops, Token, Worker};
use alveole_machine::{Event as MachineEvent, Mailbox};
use nix::sys::signal::{SigSet, Signal, raise};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// What ends a program. Those that the parent has ignored (nohup) stay ignored.
const SIGNALS: [Signal; 4] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGQUIT,
];

/// More than `/proc/self/status` has of a process in few groups.
const STATUS_BYTES: usize = 4096;

/// Reads signals and sends them on.
pub(crate) struct SignalWorker {
    fd: SignalFd,
    mailbox: Mailbox,
}

impl SignalWorker {
    /// Blocks the signals in this thread and all that it starts from now on.
    ///
    /// # Errors
    /// The host is out of file descriptors.
    pub(crate) fn new(mailbox: Mailbox) -> Result<Self, String> {
        let mut set = SigSet::empty();
        let ignored = ignored_signals();
        for signal in SIGNALS {
            if ignored >> (signal as u32 - 1) & 1 == 0 {
                set.add(signal);
            }
        }
        let failed = |e| format!("cannot take signals: {e}");
        set.thread_block().map_err(failed)?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let fd = SignalFd::with_flags(&set, flags).map_err(failed)?;
        Ok(Self { fd, mailbox })
    }
}

/// Ends this process by the signal that was to end it, so that whoever waits for it sees that: supervisors take an end by
/// SIGTERM for a good one, and an exit status of 143 not. Comes back for other signals (SIGQUIT would write the guest's memory
/// into a file), and where the signal does nothing by itself, as for the first process of a namespace.
pub(crate) fn die_of(number: i32) {
    let mut set = SigSet::empty();
    match Signal::try_from(number) {
        Ok(signal @ (Signal::SIGTERM | Signal::SIGINT)) => set.add(signal),
        _ => return,
    }
    for signal in &set {
        // What fails here is said by the exit status that follows.
        let _ = raise(signal);
    }
    let _ = set.thread_unblock();
}

/// The set of ignored signals as the kernel shows it: bit N-1 for signal N.
fn ignored_signals() -> u64 {
    // Room for all of it: of a file without a length std reads 32 bytes first, then twice as many, and so on.
    let mut status = String::with_capacity(STATUS_BYTES);
    // Where there is no /proc, none is known to be ignored.
    let _ = File::open("/proc/self/status").and_then(|mut file| file.read_to_string(&mut status));
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

impl Worker for SignalWorker {
    fn name(&self) -> &'static str {
        "signals"
    }

    fn start(&mut self, ops: &mut Ops<'_>) -> Result<(), EventLoopError> {
        ops.watch(&self.fd, Token(0), Interest::READABLE)
    }

    fn on_event(&mut self, _: Event, _: &mut Ops<'_>) {
        while let Ok(Some(info)) = self.fd.read_signal() {
            let number = i32::try_from(info.ssi_signo).unwrap_or(0);
            self.mailbox.send(MachineEvent::Signal(number));
        }
    }
}
