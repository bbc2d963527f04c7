//! The terminal while the view has it. It is given back on every way out: the end, an error, a panic, a signal.

use std::io::{self, stdout};
use std::panic;
use std::sync::mpsc::Sender;
use std::thread;

use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::cursor::Show;
use ratatui::crossterm::event::{self, Event, KeyEvent, KeyEventKind};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{EnterAlternateScreen, enable_raw_mode};
use ratatui::{DefaultTerminal, Terminal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use super::view::View;

/// What comes from outside.
pub(super) enum Input {
    Key(KeyEvent),
    Resized,
    /// To end, by this signal.
    Signal(i32),
    Suspend,
    /// The terminal cannot be read any more.
    Gone(String),
}

pub(super) struct Screen {
    terminal: DefaultTerminal,
}

/// As the terminal was. What cannot be done any more is gone with the terminal.
fn give_back() {
    let _ = ratatui::try_restore();
    let _ = execute!(stdout(), Show);
}

impl Screen {
    /// Takes the terminal; whatever comes goes to `inputs`.
    pub(super) fn enter(inputs: Sender<Input>) -> io::Result<Self> {
        // First: from here on none of them ends this process with the terminal in its hands.
        let mut signals = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP])?;
        let previous = panic::take_hook();
        panic::set_hook(Box::new(move |why| {
            give_back();
            previous(why);
        }));
        let own = inputs.clone();
        thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for signal in signals.forever() {
                    let input = match signal {
                        SIGTSTP => Input::Suspend,
                        signal => Input::Signal(signal),
                    };
                    if own.send(input).is_err() {
                        return;
                    }
                }
            })?;
        // From here on it is given back however this ends.
        let screen = Self {
            terminal: ratatui::try_init().inspect_err(|_| give_back())?,
        };
        thread::Builder::new()
            .name("keys".into())
            .spawn(move || read_keys(&inputs))?;
        Ok(screen)
    }

    pub(super) fn draw(&mut self, view: &mut View) -> anyhow::Result<()> {
        self.terminal.draw(|frame| view.draw(frame))?;
        Ok(())
    }

    /// Is stopped as other programs are, and comes back with SIGCONT.
    pub(super) fn suspend(&mut self) -> anyhow::Result<()> {
        give_back();
        emulate_default_handler(SIGTSTP)?;
        enable_raw_mode()?;
        execute!(stdout(), EnterAlternateScreen)?;
        // A new one, for which nothing is on the screen: clearing the old one asks the terminal where its cursor is, and who reads keys
        // would take the answer.
        self.terminal = Terminal::new(CrosstermBackend::new(stdout()))?;
        Ok(())
    }

    /// Ends as who does not know the signal does.
    pub(super) fn die_of(self, signal: i32) -> ! {
        drop(self);
        let _ = emulate_default_handler(signal);
        std::process::exit(128 + signal)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        give_back();
    }
}

fn read_keys(inputs: &Sender<Input>) {
    loop {
        let input = match event::read() {
            Ok(Event::Key(key)) if key.kind != KeyEventKind::Release => Input::Key(key),
            Ok(Event::Resize(..)) => Input::Resized,
            Ok(_) => continue,
            Err(e) => Input::Gone(e.to_string()),
        };
        let over = matches!(input, Input::Gone(_));
        if inputs.send(input).is_err() || over {
            return;
        }
    }
}
