//! `alveole image login` and `logout`.

use std::io::{self, IsTerminal, Read, Write};

use alveole_image::DEFAULT_REGISTRY;
use anyhow::{Context, bail};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::{hint, print};

/// Most bytes of a name or a password; tokens have some thousand.
const MAX_SECRET: u64 = 64 << 10;

#[derive(clap::Args)]
#[command(after_help = "\
The registry is asked first; what it does not take is not kept. It is kept where docker, podman and skopeo look as well: by the credential helper that docker's configuration \
names, else in the file that knows the registry already, else in $REGISTRY_AUTH_FILE or docker's config.json, readable for its owner alone and not encrypted.")]
pub(crate) struct LoginArgs {
    /// Who you are to the registry [asked for]
    #[arg(short, long, value_name = "NAME")]
    username: Option<String>,

    /// Take the password from the standard input
    #[arg(long, requires = "username")]
    password_stdin: bool,

    /// The registry [docker.io]
    registry: Option<String>,
}

pub(crate) fn log_in(args: &LoginArgs) -> anyhow::Result<()> {
    let registry = args.registry.as_deref().unwrap_or(DEFAULT_REGISTRY);
    if !args.password_stdin && !io::stdin().is_terminal() {
        bail!(
            "the standard input is no terminal, where the password could be asked for: give --username NAME --password-stdin"
        );
    }
    let user = match &args.username {
        Some(user) => user.clone(),
        None => asked("Name: ", true)?,
    };
    let password = match args.password_stdin {
        true => {
            let mut text = String::new();
            io::stdin()
                .lock()
                .take(MAX_SECRET)
                .read_to_string(&mut text)
                .context("cannot read the password from the standard input")?;
            // One line end belongs to the file, not to the password.
            let line = text.strip_suffix('\n').unwrap_or(&text);
            line.strip_suffix('\r').unwrap_or(line).to_owned()
        }
        false => asked("Password: ", false)?,
    };
    let (place, asked) = alveole_image::log_in(registry, &user, &password)?;
    if !asked {
        hint(&format!(
            "warning: {registry} lets everybody in, so that the password could not be checked"
        ));
    }
    print(&format!(
        "logged in to {registry} as {user}; kept by {place}\n"
    ))
}

pub(crate) fn log_out(registry: Option<&str>) -> anyhow::Result<()> {
    let registry = registry.unwrap_or(DEFAULT_REGISTRY);
    match alveole_image::log_out(registry)? {
        true => print(&format!("logged out of {registry}\n")),
        false => print(&format!("nobody was logged in to {registry}\n")),
    }
}

/// A terminal without echo. It is as it was when this is dropped.
struct Silent(Termios);

impl Silent {
    fn enter() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut silent = before.clone();
        // Keys that interrupt come as bytes, so that the terminal is never left like this.
        silent
            .local_modes
            .remove(LocalModes::ECHO | LocalModes::ISIG | LocalModes::ICANON);
        tcsetattr(io::stdin(), OptionalActions::Flush, &silent)?;
        Ok(Self(before))
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// Interrupt, end of transmission, backspace as terminals send them.
const INTERRUPT: u8 = 3;
const END: u8 = 4;
const ERASE: [u8; 2] = [8, 127];

/// A line that is typed.
fn asked(what: &str, shown: bool) -> anyhow::Result<String> {
    let mut out = io::stderr();
    // Whoever cannot see the question can still answer.
    let _ = write!(out, "{what}").and_then(|()| out.flush());
    if shown {
        let mut line = String::new();
        io::stdin()
            .read_line(&mut line)
            .context("cannot read from the terminal")?;
        return Ok(line.trim_end().to_owned());
    }
    let silent = Silent::enter().context("cannot have the terminal show nothing")?;
    let mut line = Vec::new();
    let end = loop {
        let mut key = [0];
        let count = io::stdin()
            .read(&mut key)
            .context("cannot read from the terminal")?;
        match key[0] {
            _ if count == 0 => break END,
            key @ (INTERRUPT | END | b'\n' | b'\r') => break key,
            key if ERASE.contains(&key) => {
                // A character may be of several bytes.
                while line.pop().is_some_and(|byte: u8| byte & 0xc0 == 0x80) {}
            }
            key => line.push(key),
        }
    };
    drop(silent);
    let _ = writeln!(out);
    if end == INTERRUPT {
        bail!("not logged in");
    }
    String::from_utf8(line).context("the password is no UTF-8")
}
