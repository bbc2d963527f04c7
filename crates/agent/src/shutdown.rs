//! The end of a guest: processes are asked, then killed, file systems are left in order, the power goes off.

use std::thread;
use std::time::{Duration, Instant};

use alveole_agent_protocol::{Shutdown, ShutdownHow};
use rustix::process::{Pid, Signal, kill_process};
use rustix::system::{RebootCommand, reboot};

use crate::mount;

/// How often the processes that are left are counted.
const LOOK: Duration = Duration::from_millis(2);
/// After they were killed.
const KILLED_PATIENCE: Duration = Duration::from_secs(2);

/// Ends the guest. `hidden`: file systems that no path leads to.
pub(crate) fn shut_down(request: &Shutdown, hidden: &mount::Hidden) -> ! {
    let asked = Signal::from_named_raw(i32::from(request.signal)).unwrap_or(Signal::TERM);
    let grace = Duration::from_millis(request.grace_ms.into());
    for (signal, patience) in [(asked, grace), (Signal::KILL, KILLED_PATIENCE)] {
        let until = Instant::now() + patience;
        let mut left = processes();
        for pid in &left {
            let _ = kill_process(*pid, signal);
        }
        while !left.is_empty() && Instant::now() < until {
            thread::sleep(LOOK);
            left = processes();
        }
        if left.is_empty() {
            break;
        }
    }
    mount::leave(hidden);
    end(request.how)
}

/// Ends the machine as it is.
pub(crate) fn end(how: ShutdownHow) -> ! {
    let command = match how {
        ShutdownHow::PowerOff => RebootCommand::PowerOff,
        ShutdownHow::Restart => RebootCommand::Restart,
    };
    if let Err(e) = reboot(command) {
        eprintln!("alveole-agent: the kernel does not end the machine: {e}");
    }
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

/// All processes but this one and the kernel's own, which have no program.
fn processes() -> Vec<Pid> {
    let own = rustix::process::getpid();
    let numbers = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers
        .filter_map(Pid::from_raw)
        .filter(|pid| *pid != own)
        .filter(|pid| {
            std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero()))
                .is_ok_and(|words| !words.is_empty())
        })
        .collect()
}
