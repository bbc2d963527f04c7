//! How a VM ended, told apart and in one line.

use std::fmt;

use alveole_hypervisor::{CpuPosition, StuckReason};

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The guest switched itself off.
    PowerOff {
        /// The processor that asked.
        cpu: u32,
        /// Where it stood.
        position: CpuPosition,
    },
    /// The guest asked for a reset.
    Reboot {
        /// The processor that asked.
        cpu: u32,
        /// Where it stood.
        position: CpuPosition,
    },
    /// The guest's kernel panicked and then reset, stopped or died.
    Panic {
        /// The processor that ended it.
        cpu: u32,
        /// Where it stood.
        position: CpuPosition,
        /// What the kernel said on the console, if it was seen.
        message: Option<String>,
    },
    /// A processor faulted while handling a double fault.
    TripleFault {
        /// The processor.
        cpu: u32,
        /// Where it stood.
        position: CpuPosition,
    },
    /// The hypervisor gave up on a processor.
    Stuck {
        /// The processor.
        cpu: u32,
        /// Why.
        reason: StuckReason,
        /// Where it stood.
        position: CpuPosition,
    },
    /// The host could not go on.
    HostError(String),
    /// The person at the console ended it.
    Quit,
    /// A signal ended it.
    Signal(i32),
    /// The terminal the console was on is gone.
    TerminalLost,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff { cpu, position } => {
                write!(f, "the guest powered off (vCPU {cpu} {position})")
            }
            Self::Reboot { cpu, position } => {
                write!(f, "the guest asked for a reset (vCPU {cpu} {position})")
            }
            Self::Panic {
                cpu,
                position,
                message,
            } => {
                let message = message
                    .as_deref()
                    .unwrap_or("it did not say why on the console");
                write!(
                    f,
                    "the guest's kernel panicked: {message} (vCPU {cpu} {position})"
                )
            }
            Self::TripleFault { cpu, position } => {
                write!(f, "vCPU {cpu} shut down by a triple fault {position}")
            }
            Self::Stuck {
                cpu,
                reason,
                position,
            } => write!(
                f,
                "vCPU {cpu} cannot go on {position}: {reason}; registers:\n{}",
                position.registers()
            ),
            Self::HostError(what) => {
                write!(f, "the host could not run the guest any further: {what}")
            }
            Self::Quit => write!(f, "ended from the console"),
            Self::Signal(number) => write!(f, "ended by signal {number}"),
            Self::TerminalLost => write!(f, "the terminal of the console is gone; ended the guest"),
        }
    }
}
