//! The console on standard input and output.
//!
//! Keys after `Ctrl-A` are for us when standard input is a terminal; from a pipe every byte is the
//! guest's. The end of a pipe only ends input; the end of a terminal is reported.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use alveole_event_loop::{Interest, Ready};

use super::raw_mode::RawMode;
use super::stdio::Stdio;
use super::{Got, ROLES, Role, Watches, Wrote, is_full};
use crate::sys;
use crate::{ConsoleEvent, SerialError};

const CTRL_A: u8 = 1;

const HELP: &str = "\r\n\
[alveole] Ctrl-A x  end the machine at once\r\n\
[alveole] Ctrl-A p  press the power button\r\n\
[alveole] Ctrl-A a  send Ctrl-A to the guest (also Ctrl-A Ctrl-A)\r\n\
[alveole] Ctrl-A c  this text\r\n";

pub(crate) struct Terminal {
    input: Stdio,
    output: Stdio,
    input_open: bool,
    /// Input may have something: told by the loop, or always so.
    readable: bool,
    always_ready: bool,
    lost: bool,
    keys: Option<Keys>,
    /// What is left of a help text on its way to the screen.
    own_text: &'static [u8],
    events: Vec<ConsoleEvent>,
    raw: Option<RawMode>,
}

impl Terminal {
    pub(crate) fn open() -> Result<Self, SerialError> {
        Self::on(io::stdin().as_fd(), io::stdout().as_fd())
    }

    fn on(
        stdin: std::os::fd::BorrowedFd<'_>,
        stdout: std::os::fd::BorrowedFd<'_>,
    ) -> Result<Self, SerialError> {
        let failed = |stream| {
            move |source| SerialError::Terminal {
                act: "open the console",
                stream,
                source,
            }
        };
        let input = Stdio::open(stdin, false).map_err(failed("input"))?;
        let output = Stdio::open(stdout, true).map_err(failed("output"))?;
        let mut input_open = true;
        let mut raw = None;
        if input.is_terminal() {
            if sys::in_foreground(stdin) {
                raw = Some(RawMode::enter(stdin)?);
            } else {
                // Reading would stop the whole process (SIGTTIN).
                log::info!("started in the background of its terminal: the console takes no input");
                input_open = false;
            }
        }
        Ok(Self {
            keys: input.is_terminal().then(Keys::default),
            input,
            output,
            input_open,
            readable: false,
            always_ready: false,
            lost: false,
            own_text: &[],
            events: Vec::new(),
            raw,
        })
    }

    pub(crate) fn write_own(&mut self) -> bool {
        while !self.own_text.is_empty() && !self.lost {
            match self.output.write(self.own_text) {
                Ok(len) => self.own_text = self.own_text.get(len..).unwrap_or_default(),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return false,
                // What the guest writes next finds out why.
                Err(_) => self.own_text = &[],
            }
        }
        true
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Wrote {
        if self.lost {
            return Wrote::Lost;
        }
        match self.output.write(bytes) {
            Ok(len) => Wrote::Taken(len),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Wrote::Blocked,
            // Standard output in a file on a full disk.
            Err(e) if is_full(&e) => Wrote::Dropped(bytes.len()),
            Err(_) => {
                self.lose_output();
                Wrote::Lost
            }
        }
    }

    pub(crate) fn read(&mut self, into: &mut [u8]) -> Got {
        if !self.input_open || !self.readable || into.is_empty() {
            return Got::Nothing;
        }
        let len = match self.input.read(into) {
            Ok(0) => {
                self.end_input();
                return Got::Nothing;
            }
            Ok(len) => len,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.readable = self.always_ready;
                return Got::Nothing;
            }
            Err(_) => {
                self.end_input();
                return Got::Nothing;
            }
        };
        Got::Bytes(self.keep_the_guests_keys(into, len))
    }

    /// Takes our keys out of the first `len` bytes; how many are left for the guest.
    fn keep_the_guests_keys(&mut self, bytes: &mut [u8], len: usize) -> usize {
        let mut kept = 0;
        for at in 0..len {
            let Some(&key) = bytes.get(at) else { break };
            let key = self
                .keys
                .as_mut()
                .map_or(Key::Guest(key), |keys| keys.press(key));
            match key {
                // `kept` never passes `at`: a press gives at most the byte it took.
                Key::Guest(byte) => {
                    if let Some(slot) = bytes.get_mut(kept) {
                        *slot = byte;
                    }
                    kept += 1;
                }
                Key::Owner(event) => self.tell(event),
                Key::Help => self.own_text = HELP.as_bytes(),
                Key::Nothing => {}
            }
        }
        kept
    }

    /// Whether input must be read although the guest has no room for it: our own keys are in it.
    pub(crate) fn has_keys_for_us(&self) -> bool {
        self.keys.is_some()
    }

    pub(crate) fn watches(&self, want_input: bool, blocked: bool) -> Watches {
        let mut watches = [None; ROLES];
        let want_input = want_input || self.has_keys_for_us();
        if self.input_open && want_input && !self.always_ready {
            watches[Role::Input as usize] = Some((self.input.as_raw_fd(), Interest::READABLE));
        }
        if blocked && !self.lost {
            watches[Role::Output as usize] = Some((self.output.as_raw_fd(), Interest::WRITABLE));
        }
        watches
    }

    pub(crate) fn on_ready(&mut self, role: Role, _ready: Ready) {
        // A hang-up is found by the read or write that follows.
        self.readable |= role == Role::Input;
    }

    pub(crate) fn on_always_ready(&mut self) {
        self.always_ready = true;
        self.readable = true;
    }

    pub(crate) fn take_event(&mut self) -> Option<ConsoleEvent> {
        if self.events.is_empty() {
            None
        } else {
            Some(self.events.remove(0))
        }
    }

    pub(crate) fn close(&mut self) {
        self.raw = None;
    }

    fn end_input(&mut self) {
        if !self.input_open {
            return;
        }
        self.input_open = false;
        if self.input.is_terminal() {
            // In raw mode there is no end-of-file key: the terminal has hung up.
            if self.output.is_terminal() {
                self.lose_output();
            } else {
                self.tell(ConsoleEvent::TerminalLost);
            }
        }
    }

    fn lose_output(&mut self) {
        if !self.lost {
            self.lost = true;
            self.own_text = &[];
            self.input_open &= !self.input.is_terminal();
            self.tell(ConsoleEvent::TerminalLost);
        }
    }

    /// Keeps one event of each kind: a person who leans on a key does not fill a list.
    fn tell(&mut self, event: ConsoleEvent) {
        if !self.events.contains(&event) {
            self.events.push(event);
        }
    }
}

/// What one key means.
#[derive(Debug, PartialEq, Eq)]
enum Key {
    Guest(u8),
    Owner(ConsoleEvent),
    Help,
    Nothing,
}

/// Sees the keys that are ours: those after `Ctrl-A`.
#[derive(Debug, Default)]
struct Keys {
    after_ctrl_a: bool,
}

impl Keys {
    fn press(&mut self, key: u8) -> Key {
        if !self.after_ctrl_a {
            self.after_ctrl_a = key == CTRL_A;
            return if self.after_ctrl_a {
                Key::Nothing
            } else {
                Key::Guest(key)
            };
        }
        self.after_ctrl_a = false;
        match key {
            CTRL_A | b'a' => Key::Guest(CTRL_A),
            b'x' => Key::Owner(ConsoleEvent::Quit),
            b'p' => Key::Owner(ConsoleEvent::PowerButton),
            b'c' | b'h' | b'?' => Key::Help,
            _ => Key::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_after_ctrl_a_are_ours() {
        let mut keys = Keys::default();
        let mut guest = Vec::new();
        let mut ours = Vec::new();
        for &key in b"ls\x01x\x01p\x01c\x01a\x01\x01\x01zx\x03" {
            match keys.press(key) {
                Key::Guest(byte) => guest.push(byte),
                Key::Nothing => {}
                other => ours.push(other),
            }
        }
        assert_eq!(guest, b"ls\x01\x01x\x03");
        let power = Key::Owner(ConsoleEvent::PowerButton);
        assert_eq!(ours, [Key::Owner(ConsoleEvent::Quit), power, Key::Help]);
    }

    #[test]
    fn a_pipe_that_ends_only_ends_input() {
        let (reads, feeds) = io::pipe().unwrap();
        let (_shows, writes) = io::pipe().unwrap();
        let mut t = Terminal::on(reads.as_fd(), writes.as_fd()).unwrap();
        io::Write::write_all(&mut &feeds, b"a\x01x").unwrap();
        t.readable = true;
        let mut buf = [0; 8];
        assert_eq!(t.read(&mut buf), Got::Bytes(3), "every byte is the guest's");
        drop(feeds);
        assert_eq!(t.read(&mut buf), Got::Nothing);
        assert_eq!(t.watches(true, false), [None; ROLES]);
        assert_eq!(t.take_event(), None);
        assert_eq!(t.write(b"still there"), Wrote::Taken(11));
    }

    #[test]
    fn nobody_reads_our_output_any_more() {
        let (_reads, writes) = io::pipe().unwrap();
        let (stdin, _feeds) = io::pipe().unwrap();
        let mut t = Terminal::on(stdin.as_fd(), writes.as_fd()).unwrap();
        drop(_reads);
        assert_eq!(t.write(b"x"), Wrote::Lost);
        assert_eq!(t.write(b"x"), Wrote::Lost);
        assert_eq!(t.take_event(), Some(ConsoleEvent::TerminalLost));
        assert_eq!(t.take_event(), None);
        assert!(
            t.watches(true, true)[Role::Input as usize].is_some(),
            "input goes on"
        );
    }
}
