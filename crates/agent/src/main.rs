//! `alveole-agent`: the first process of a guest. It makes the guest what its host describes, and then serves sessions of
//! `alveole-agent-protocol`: processes, copies, clock, signals, how the guest does, its end.
//!
//! Deliberately does not know: images and registries, what people type, which monitor runs the guest.

mod boot_id;
mod changes;
mod clock;
mod copy;
#[expect(unsafe_code, reason = "ioctls that no library has")]
mod entropy;
#[expect(unsafe_code, reason = "an ioctl that no library has")]
mod freeze;
mod init;
mod metrics;
mod modprobe;
mod mount;
mod names;
mod parked;
#[expect(unsafe_code, reason = "what runs between fork and exec")]
mod process;
mod reaper;
mod renew;
mod serve;
mod session;
mod shutdown;
mod user;

use std::path::Path;
use std::process::ExitCode;

const USAGE: &str = "usage: alveole-agent serve SOCKET

As the first process of a guest it needs no arguments. `serve` serves sessions at a unix socket of this host instead,
with the rights of whoever starts it: for tests, and for hosts of other kinds.";

fn main() -> ExitCode {
    if rustix::process::getpid().is_init() {
        return init::run();
    }
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    if let Some(status) = modprobe::asked(&args) {
        return status;
    }
    match args.as_slice() {
        [word, socket] if word == "serve" => match serve::unix(Path::new(socket)) {
            Ok(never) => match never {},
            Err(text) => {
                eprintln!("alveole-agent: {text}");
                ExitCode::FAILURE
            }
        },
        [word] if word == "--version" => {
            println!("alveole-agent {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}
