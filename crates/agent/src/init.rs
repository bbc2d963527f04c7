//! The guest's first process, from the kernel's first jump to the first session.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use alveole_agent_protocol::{READY_PORT, Setup, ShutdownHow};
use alveole_network::guest_config::{self, DeviceConfig};
use vsock::{VMADDR_CID_HOST, VsockStream};

use crate::session::{Shared, set_clock};
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
    if !setup.hostname.is_empty() {
        rustix::system::sethostname(setup.hostname.as_bytes())
            .map_err(|e| format!("cannot set the host name '{}': {e}", setup.hostname))?;
    }
    for (name, value) in &setup.sysctl {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        fs::write(&path, value).map_err(|e| format!("cannot set '{name}' to '{value}': {e}"))?;
    }
    let files = [
        ("/etc/hostname", format!("{}\n", setup.hostname)),
        ("/etc/hosts", hosts(setup, &devices)),
        ("/etc/resolv.conf", resolvers(&devices)),
    ];
    for (path, text) in files {
        // What is said to be there is not changed.
        let mut targets = setup.volumes.iter().map(|v| &v.mount.target);
        if targets.any(|target| std::path::Path::new(path).starts_with(target)) {
            continue;
        }
        write_whole(path, &text).map_err(|e| format!("cannot write '{path}': {e}"))?;
    }
    mount::seal(setup)
}

/// Writes a file that may be a link to nowhere in the image, as `/etc/resolv.conf` often is.
fn write_whole(path: &str, text: &str) -> std::io::Result<()> {
    if fs::symlink_metadata(path).is_ok_and(|m| m.is_symlink()) {
        fs::remove_file(path)?;
    }
    if let Some(folder) = std::path::Path::new(path).parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, text)
}

fn hosts(setup: &Setup, devices: &[DeviceConfig]) -> String {
    let mut text =
        String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    let own = devices.iter().flat_map(|d| &d.addresses).next();
    let _ = match own {
        Some(address) => writeln!(text, "{}\t{}", address.addr(), setup.hostname),
        None => writeln!(text, "127.0.1.1\t{}", setup.hostname),
    };
    for (address, name) in &setup.hosts {
        let _ = writeln!(text, "{address}\t{name}");
    }
    text
}

fn resolvers(devices: &[DeviceConfig]) -> String {
    let mut text = String::new();
    for resolver in devices.iter().flat_map(|d| &d.dns) {
        let _ = writeln!(text, "nameserver {resolver}");
    }
    let domains: Vec<_> = devices.iter().filter_map(|d| d.search.as_deref()).collect();
    if !domains.is_empty() {
        let _ = writeln!(text, "search {}", domains.join(" "));
    }
    text
}
