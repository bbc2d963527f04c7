//! Where a VM that goes on from a snapshot has its memory from: the snapshot's file, or, if that is packed, a process that unpacks it.
//!
//! Each VM has such a process of its own, as it has a monitor: it comes and goes with the VM's keeper, knows one monitor, and if it fails it takes one VM
//! along. One for all copies would unpack a chunk once for all, and would need somebody who knows when the last of them has ended.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use alveole_instance::{PACKED, Snapshot, Vm};
use alveole_page_server::{Memory, SavedMemory, may_be_served};
use anyhow::Context;
use serde_json::{Value, json};

/// The process that serves a VM's memory, which ends with this.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.socket);
    }
}

/// What a load says of memory, and what has to be kept as long as the machine is there.
pub(super) fn memory(vm: &Vm, snapshot: &Snapshot) -> anyhow::Result<(Value, Box<dyn Send>)> {
    if !snapshot.is_packed() {
        let file = json!({"backend_type": "File", "backend_path": snapshot.at("memory")});
        return Ok((file, Box::new(())));
    }
    // What a keeper has opened by its folder is not called by its name.
    let name = snapshot.folder().file_name().unwrap_or_default();
    let name = name.to_string_lossy();
    let cure = || {
        format!(
            "the memory of the snapshot '{name}' is packed, and so has to be served by another process, which this user may not have (userfaultfd): unpack it \
             (alveole snapshot unpack {name}), or have root allow it (sysctl vm.unprivileged_userfaultfd=1, or access to /dev/userfaultfd)"
        )
    };
    may_be_served().with_context(cure)?;
    let packed = snapshot.at(PACKED);
    // The monitor takes what it is given.
    let act = || format!("cannot use '{}'", packed.display());
    let mut open = Memory::open(File::open(&packed).with_context(act)?, 0).with_context(act)?;
    SavedMemory::of_state(&snapshot.at("state"))
        .and_then(|saved| saved.check(&mut open))
        .with_context(act)?;
    let socket = vm.socket("memory");
    let _ = fs::remove_file(&socket);
    // Made here, so that the monitor can connect before the process has begun.
    let listener = UnixListener::bind(&socket)
        .with_context(|| format!("cannot make '{}'", socket.display()))?;
    let exe = std::env::current_exe().context("cannot find out which program this is")?;
    let said = vm.at("page-server");
    let said = File::create(&said).with_context(|| format!("cannot make '{}'", said.display()))?;
    let child = Command::new(exe)
        .args(["memory", "serve", "--once"])
        .arg(&packed)
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::null())
        .stderr(said)
        .spawn()
        .context("cannot start the process that serves memory")?;
    let backend = json!({"backend_type": "Uffd", "backend_path": socket});
    Ok((backend, Box::new(Server { child, socket })))
}
