//! The guest's first process, from the kernel's first jump to the first session.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use alveole_agent_protocol::{READY_PORT, Setup, ShutdownHow};
use alveole_network::guest_config::{self, DeviceConfig};
use vsock::{VMADDR_CID_HOST, VsockStream};

use crate::clock::set_clock;
use crate::names::Names;
use crate::session::Shared;
use crate::{mount, serve, shutdown};

/// The modules that the guest needs, one file name a line, each after those it needs itself.
const MODULES: &str = "/modules/order";
/// A host that is there answers at once.
const HOST_PATIENCE: Duration = Duration::from_secs(10);

/// Runs as the first process. What goes wrong here is said on the console; the machine is powered off then, as a guest without an
/// agent is good for nothing.
pub(crate) fn run() -> ExitCode {
    let text = match begin() {
        Ok(never) => match never {},
        Err(text) => text,
    };
    eprintln!("alveole-agent: {text}");
    shutdown::end(ShutdownHow::PowerOff)
}

fn begin() -> Result<std::convert::Infallible, String> {
    mount::first()?;
    load_modules()?;
    let shared = serve::shared()?;
    let host = connect()?;
    note();
    serve::begin(host, &shared, true);
    serve::vsock(&shared)
}

fn load_modules() -> Result<(), String> {
    // An initramfs of a kernel that has all built in brings none.
    let Ok(order) = fs::read_to_string(MODULES) else {
        return Ok(());
    };
    for name in order.lines().filter(|l| !l.is_empty()) {
        let path = format!("/modules/{name}");
        let act = |e: &dyn std::fmt::Display| format!("cannot load the module '{path}': {e}");
        let mut image = Vec::new();
        File::open(&path)
            .and_then(|mut file| file.read_to_end(&mut image))
            .map_err(|e| act(&e))?;
        match rustix::system::init_module(&image, c"") {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(act(&std::io::Error::from(e))),
        }
    }
    Ok(())
}

/// Tells the host that the guest is there.
fn connect() -> Result<OwnedFd, String> {
    let until = Instant::now() + HOST_PATIENCE;
    loop {
        match VsockStream::connect_with_cid_port(VMADDR_CID_HOST, READY_PORT) {
            Ok(connection) => return Ok(connection.into()),
            // The device may be found a little later than its driver.
            Err(e) if Instant::now() > until => {
                return Err(format!(
                    "cannot connect to port {READY_PORT} of the host by vsock: {e}; does the machine have a vsock device, \
                     and does somebody listen there?"
                ));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// A line in the kernel's log, whose time says when it was: `dmesg` tells how long kernel and agent took.
fn note() {
    let _ = fs::write("/dev/kmsg", "alveole-agent: the host is there\n");
}

/// Makes the guest what the host describes.
///
/// # Errors
///
/// What could not be done; the rest was not tried.
pub(crate) fn set_up(setup: &Setup, shared: &Shared) -> Result<(), String> {
    if let Some(unix_ns) = setup.unix_ns {
        set_clock(unix_ns)?;
    }
    let hidden = mount::root(setup)?;
    // It is set up once.
    let _ = shared.hidden.set(hidden);
    let devices = setup
        .network
        .iter()
        .map(|word| word.parse())
        .collect::<Result<Vec<DeviceConfig>, _>>()
        .map_err(|e| e.to_string())?;
    guest_config::apply(&devices).map_err(|e| e.to_string())?;
    for (name, value) in &setup.sysctl {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        fs::write(&path, value).map_err(|e| format!("cannot set '{name}' to '{value}': {e}"))?;
    }
    let names = Names::of(setup, devices);
    names.write()?;
    if mount::is_sealed(setup) {
        mount::seal_root()?;
    }
    *shared.names.lock().unwrap_or_else(PoisonError::into_inner) = names;
    Ok(())
}
