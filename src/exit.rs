//! Exit codes, and the one place that prints why the program ends.

use std::process::ExitCode;

use alveole_machine::End;

use crate::signals;

const SIGHUP: i32 = 1;

/// Why the program ends without, or before, a guest.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command line is wrong.
    Usage(String),
    /// The description of the machine is wrong.
    Config(String),
    /// The host cannot give what is needed.
    Host(String),
}

impl Failure {
    /// What happened, whoever is to blame.
    pub(crate) fn into_text(self) -> String {
        match self {
            Self::Usage(text) | Self::Config(text) | Self::Host(text) => text,
        }
    }
}

/// The exit code of an ended machine. 0 is what the guest wished, as of Firecracker, which has 0 for all that a guest does; what it did
/// not wish has codes of our own, and is a failure for supervisors. Codes from 148 on are Firecracker's.
fn code_of(end: &End) -> u8 {
    match end {
        End::PowerOff { .. } | End::Reboot { .. } | End::Quit => 0,
        End::HostError(_) => 1,
        End::Panic { .. } => 4,
        End::TripleFault { .. } => 5,
        End::Stuck { .. } => 6,
        // Firecracker's for SIGHUP, which comes with it where the terminal is the controlling one.
        End::TerminalLost | End::Signal(SIGHUP) => 156,
        End::Signal(number) => u8::try_from(128 + number).unwrap_or(128),
    }
}

/// The last words also go to the log, unless that is standard error too: they are said once.
pub(crate) const LOG_TARGET: &str = "alveole_vmm::exit";

/// Says how the machine ended.
pub(crate) fn ended(end: &End) -> ExitCode {
    let code = code_of(end);
    log::info!(target: LOG_TARGET, "{end}");
    log::logger().flush();
    say(&end.to_string());
    if let End::Signal(number) = end {
        signals::die_of(*number);
    }
    ExitCode::from(code)
}

/// Says why there is no machine.
pub(crate) fn failed(failure: &Failure) -> ExitCode {
    let (text, code) = match failure {
        Failure::Usage(text) => (format!("{text}; see alveole-vmm --help"), 153),
        Failure::Config(text) => (text.clone(), 152),
        Failure::Host(text) => (text.clone(), 1),
    };
    log::error!(target: LOG_TARGET, "{text}");
    log::logger().flush();
    say(&text);
    ExitCode::from(code)
}

/// Prints one message for people on standard error; a standard error that is gone is no reason to fail.
pub(crate) fn say(text: &str) {
    use std::io::Write;
    let _ = std::io::stderr().write_all(format!("alveole-vmm: {text}\n").as_bytes());
}
