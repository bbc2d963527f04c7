//! A session on a terminal as a person has it: the terminal is tmux's, and what is typed and seen goes through it.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::images::Home;
use crate::harness::images::{output, path, tool};

/// The shell in the VM asks with this, the one around it with the other.
const INNER: &str = "inner>";
const OUTER: &str = "outer>";

/// A tmux server with one window, in which a shell runs. It ends when this is dropped.
struct Terminal<'a> {
    home: &'a Home,
    socket: PathBuf,
}

impl<'a> Terminal<'a> {
    /// Nothing, with the skip told, where there is no tmux.
    #[track_caller]
    fn open(home: &'a Home) -> Option<Self> {
        if !tool("tmux", &["-V"]) {
            return None;
        }
        let dir = home.dir.path();
        let config = dir.join("tmux.conf");
        fs::write(&config, "set -g status off\nset -g default-shell /bin/sh\n").unwrap();
        let it = Self {
            home,
            socket: dir.join("tmux"),
        };
        let shell = format!("PS1='{OUTER} ' exec /bin/sh -i");
        // What the server is started with is what the shell has.
        let started = Command::new("tmux")
            .args(["-S", path(&it.socket), "-f", path(&config)])
            .args(["new-session", "-d", "-x", "100", "-y", "30", &shell])
            .env("ALVEOLE_HOME", dir.join("home"))
            .env_remove("TMUX")
            .env_remove("ENV")
            .current_dir(dir)
            .output()
            .unwrap();
        assert!(started.status.success(), "{started:?}");
        it.asks(OUTER);
        Some(it)
    }

    fn tmux(&self, words: &[&str]) -> String {
        output("tmux", &[&["-S", path(&self.socket)], words].concat())
    }

    fn types(&self, line: &str) {
        self.tmux(&["send-keys", "-l", line]);
        self.keys(&["Enter"]);
    }

    fn keys(&self, keys: &[&str]) {
        self.tmux(&[&["send-keys"], keys].concat());
    }

    /// The lines that are on it and above.
    fn lines(&self) -> Vec<String> {
        let text = self.tmux(&["capture-pane", "-p", "-J", "-S", "-"]);
        text.lines().map(|l| l.trim_end().to_owned()).collect()
    }

    #[track_caller]
    fn wait_for(&self, what: &str, so: impl Fn(&[String]) -> bool) {
        self.home.wait_until(
            40,
            &format!("{what} on the terminal: {:#?}", self.lines()),
            || so(&self.lines()),
        );
    }

    /// Waits until a line is this one: what is typed is never what is waited for.
    #[track_caller]
    fn shows(&self, line: &str) {
        self.wait_for(line, |lines| lines.iter().any(|l| l == line));
    }

    /// Waits until the last line is a prompt. A terminal sends the signal of Ctrl-C first and shows `^C` then (Linux drivers/tty/n_tty.c,
    /// n_tty_receive_signal_char): a quick shell has begun its prompt's line by then.
    #[track_caller]
    fn asks(&self, prompt: &str) {
        self.wait_for(prompt, |lines| {
            lines
                .iter()
                .rfind(|l| !l.is_empty())
                .is_some_and(|l| l.strip_prefix("^C").unwrap_or(l) == prompt)
        });
    }

    fn clear(&self) {
        // The keys draw the prompt again, on an empty screen.
        self.tmux(&["send-keys", "-R"]);
        self.tmux(&["clear-history"]);
    }

    /// Types a command of `alveole`; the shell writes down the terminal's modes before and after, and its status.
    fn alveole(&self, words: &[&str]) {
        let command = self.home.command(words);
        let quoted: Vec<_> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(|word| format!("'{}'", word.to_str().unwrap()))
            .collect();
        let script = format!(
            "stty -g >before\n{}\nstatus=$?\nstty -g >after\necho ended:$status\n",
            quoted.join(" ")
        );
        fs::write(self.home.dir.path().join("script"), script).unwrap();
        self.types(". ./script");
    }

    /// Waits until that command has ended with this status, and finds the terminal as it was.
    #[track_caller]
    fn ended(&self, status: i32) {
        self.shows(&format!("ended:{status}"));
        self.asks(OUTER);
        let modes = |name: &str| fs::read_to_string(self.home.dir.path().join(name)).unwrap();
        let (before, after) = (modes("before"), modes("after"));
        assert!(before.contains(':') && before == after, "{before} {after}");
    }

    /// The modes that the terminal has at this moment.
    fn modes(&self) -> String {
        let device = self.tmux(&["display-message", "-p", "#{pane_tty}"]);
        output("stty", &["-F", device.trim(), "-a"])
    }
}

impl Drop for Terminal<'_> {
    fn drop(&mut self) {
        let _ = Command::new("tmux")
            .args(["-S", path(&self.socket), "kill-server"])
            .output();
    }
}

#[test]
fn a_shell_is_used_on_a_terminal_let_go_of_and_taken_up_again() {
    let Some(home) = Home::new() else { return };
    let Some(terminal) = Terminal::open(&home) else {
        return;
    };
    let prompt = format!("PS1={INNER} ");
    let words = |before: &[&'static str]| {
        let words = [before, &["-it", "-e", &prompt]].concat();
        let words = home.run(&words, &["sh"]);
        words.into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let run = |before: &[&'static str]| {
        let words = words(before);
        terminal.alveole(&words.iter().map(String::as_str).collect::<Vec<_>>());
        terminal.asks(INNER);
    };
    run(&["--name", "box"]);
    assert!(terminal.modes().contains("-icanon"), "{}", terminal.modes());
    terminal.types("echo a$((40 + 2))b; kept=here; tty");
    terminal.shows("a42b");
    // A terminal of the VM's own, of this one's size, now and later.
    terminal.wait_for("terminal", |lines| {
        lines.iter().any(|l| l.starts_with("/dev/pts/"))
    });
    terminal.types("stty size");
    terminal.shows("30 100");
    terminal.tmux(&["resize-window", "-x", "120", "-y", "41"]);
    home.wait_until(20, "other size", || {
        terminal.types("stty size");
        std::thread::sleep(std::time::Duration::from_millis(200));
        terminal.lines().iter().any(|l| l == "41 120")
    });
    // Ctrl-C is the foreground process's, and the shell goes on.
    for (number, program) in ["sleep 1000", "cat"].into_iter().enumerate() {
        terminal.types(&format!("echo begun:$(({number} + 1)); {program}"));
        terminal.shows(&format!("begun:{}", number + 1));
        // A shell takes a moment to give the terminal to what it starts.
        std::thread::sleep(std::time::Duration::from_millis(500));
        terminal.keys(&["C-c"]);
        terminal.asks(INNER);
        terminal.types(&format!("echo interrupted:{number}:$?"));
        terminal.shows(&format!("interrupted:{number}:130"));
    }
    // Let go of, it goes on.
    terminal.keys(&["C-p", "C-q"]);
    terminal.ended(0);
    assert!(
        terminal
            .lines()
            .iter()
            .any(|l| l.contains("let go of 'box'")),
        "{:#?}",
        terminal.lines()
    );
    assert_eq!(home.state("box"), "running");
    let listed = home.does(&["ps"]);
    assert!(listed.contains("box "), "{listed}");
    // Taken up again it shows what was there, and is the same shell.
    terminal.clear();
    terminal.alveole(&["attach", "box"]);
    terminal.shows("a42b");
    terminal.asks(INNER);
    terminal.types("echo still:$kept");
    terminal.shows("still:here");
    terminal.types("exit 7");
    terminal.ended(7);
    assert_eq!(home.does(&["wait", "box"]), "7");
    // The same of who started it.
    terminal.clear();
    run(&["--rm", "--name", "other"]);
    terminal.types("exit 9");
    terminal.ended(9);
    assert!(!home.does(&["ps", "-a"]).contains("other"));
    // Of a terminal that is closed nothing is left.
    terminal.clear();
    run(&["--rm", "--name", "closed"]);
    assert_eq!(home.state("closed"), "running");
    terminal.tmux(&["kill-server"]);
    home.wait_until(40, "end of what the terminal was closed over", || {
        !home.does(&["ps", "-a"]).contains("closed")
    });
    let left = super::interrupted::folders(&home);
    assert_eq!(left.len(), 1, "'box' alone: {left:?}");
}
