//! This terminal, while it is a guest's.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use alveole_agent_client::Controls;
use alveole_agent_protocol::WindowSize;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use signal_hook::iterator::Signals;

/// What lets go of a guest that goes on: Ctrl-P Ctrl-Q, as of containers.
const DETACH: [u8; 2] = [0x10, 0x11];

/// The size of this terminal, if there is one.
pub(crate) fn size() -> Option<WindowSize> {
    let size = tcgetwinsize(io::stdout())
        .or_else(|_| tcgetwinsize(io::stdin()))
        .ok()?;
    Some(WindowSize {
        rows: size.ws_row,
        columns: size.ws_col,
    })
}

/// Whether standard input is a terminal.
pub(crate) fn is_terminal() -> bool {
    isatty(io::stdin())
}

/// A terminal that passes every key on. It is as it was when this is dropped.
pub(crate) struct Raw(Option<Termios>);

impl Raw {
    pub(crate) fn enter() -> Self {
        let Ok(before) = tcgetattr(io::stdin()) else {
            return Self(None);
        };
        let mut raw = before.clone();
        raw.make_raw();
        if tcsetattr(io::stdin(), OptionalActions::Flush, &raw).is_err() {
            return Self(None);
        }
        Self(Some(before))
    }
}

impl Raw {
    /// How the terminal was.
    pub(crate) fn before(&self) -> Option<Termios> {
        self.0.clone()
    }

    /// Makes it so again.
    pub(crate) fn restore(before: Option<&Termios>) {
        if let Some(before) = before {
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
        }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        Self::restore(self.0.as_ref());
    }
}

/// Passes this process's signals on: to a process with a terminal its size alone, as its keys make the others.
pub(crate) fn pass_signals(controls: Controls, has_terminal: bool) -> io::Result<()> {
    let signals = if has_terminal {
        &[SIGWINCH, SIGTERM, SIGHUP][..]
    } else {
        &[SIGINT, SIGQUIT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2][..]
    };
    let mut signals = Signals::new(signals)?;
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for signal in signals.forever() {
                if signal == SIGWINCH {
                    if let Some(size) = size() {
                        controls.resize(size);
                    }
                } else if let Ok(signal) = u8::try_from(signal) {
                    controls.signal(signal);
                }
            }
        })?;
    Ok(())
}

/// Standard input, until the keys that let go.
pub(crate) struct Keys {
    /// Of the keys that let go, how many were seen.
    seen: usize,
    held: Vec<u8>,
    detached: Arc<AtomicBool>,
    on_detach: Box<dyn Fn() + Send>,
}

impl Keys {
    pub(crate) fn new(detached: &Arc<AtomicBool>, on_detach: impl Fn() + Send + 'static) -> Self {
        Self {
            seen: 0,
            held: Vec::new(),
            detached: Arc::clone(detached),
            on_detach: Box::new(on_detach),
        }
    }

    /// What of these keys goes to the guest. None: let go.
    fn pass(&mut self, keys: &[u8]) -> Option<Vec<u8>> {
        let mut passed = Vec::with_capacity(keys.len() + self.seen);
        for key in keys {
            if *key == DETACH[self.seen] {
                self.seen += 1;
                if self.seen == DETACH.len() {
                    return None;
                }
                continue;
            }
            passed.extend_from_slice(&DETACH[..self.seen]);
            self.seen = usize::from(*key == DETACH[0]);
            if self.seen == 0 {
                passed.push(*key);
            }
        }
        Some(passed)
    }
}

impl Read for Keys {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            if !self.held.is_empty() {
                let count = self.held.len().min(into.len());
                into[..count].copy_from_slice(&self.held[..count]);
                self.held.drain(..count);
                return Ok(count);
            }
            let mut keys = [0; 1024];
            let count = io::stdin().read(&mut keys)?;
            if count == 0 {
                return Ok(0);
            }
            match self.pass(&keys[..count]) {
                Some(passed) => self.held = passed,
                None => {
                    self.detached.store(true, Ordering::Relaxed);
                    (self.on_detach)();
                    return Ok(0);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> Keys {
        Keys::new(&Arc::default(), || {})
    }

    #[test]
    fn both_keys_let_go_and_one_goes_on() {
        let mut k = keys();
        assert_eq!(k.pass(b"ab\x10"), Some(b"ab".to_vec()));
        assert_eq!(k.pass(b"c"), Some(b"\x10c".to_vec()));
        assert_eq!(k.pass(b"\x10\x10"), Some(b"\x10".to_vec()));
        assert_eq!(k.pass(b"\x11"), None);
        assert_eq!(keys().pass(b"x\x10\x11y"), None);
        assert_eq!(keys().pass(b"\x11\x11"), Some(b"\x11\x11".to_vec()));
    }
}
