//! A guest whose first process is the agent: what its host describes, it is, and what its host asks, it does.
//!
//! What needs no guest is in `crates/agent/tests`.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use alveole_agent_client::{AgentError, Guest, Session, Streams};
use alveole_agent_protocol::{
    Answer, CopyIn, CopyOut, Exit, Mount, Process, READY_PORT, Renewal, RenewedInterface, Request,
    Setup, Shutdown, ShutdownHow, Source, WindowSize,
};
use alveole_guest_kernel::{KernelStore, Source as KernelSource};
use serde_json::json;
use tempfile::TempDir;

use crate::harness::images::{bytes, ext4, output, path, root_files, tool};
use crate::harness::{End, Running, Vm, patience};
use crate::network;

const SECONDS: u64 = 60;

/// The initramfs with the built agent, and the modules that lie beside this kernel (a kernel that has none has all built in).
fn initramfs(kernel: &Path) -> PathBuf {
    static MADE: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let make = || {
        let dir = TempDir::new().unwrap();
        let trees = fs::read_dir(kernel.with_file_name("lib/modules"));
        let modules = trees
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.path())
            .next();
        let source = KernelSource::Files {
            kernel: kernel.into(),
            modules,
        };
        let store = KernelStore::new(&dir.path().join("kernels"));
        let kernel = store.add(&source, Some("test")).unwrap();
        let vmm = PathBuf::from(env!("CARGO_BIN_EXE_alveole-vmm"));
        // Of another package: built with the whole workspace.
        let initramfs = kernel
            .initramfs(&vmm.with_file_name("alveole-agent"))
            .unwrap();
        (dir, initramfs)
    };
    MADE.get_or_init(make).1.clone()
}

/// A guest that has connected, and is not set up yet.
struct Machine {
    dir: TempDir,
    vm: Running,
    session: Session,
}

impl Machine {
    #[track_caller]
    fn start(change: impl FnOnce(Vm, &Path) -> Vm) -> Option<Self> {
        let vm = Vm::any()?;
        let dir = TempDir::new().unwrap();
        let kernel = vm.kernel_path().to_owned();
        let socket = dir.path().join("v.sock");
        let listener = UnixListener::bind(dir.path().join(format!("v.sock_{READY_PORT}"))).unwrap();
        let vm = change(vm.initrd(&initramfs(&kernel)).vsock(&socket), dir.path()).boot();
        let connected = thread::spawn(move || {
            let (connection, _) = listener.accept().unwrap();
            Session::begin(connection, patience(SECONDS)).unwrap()
        });
        let until = Instant::now() + patience(SECONDS);
        while !connected.is_finished() {
            if Instant::now() > until {
                // It shows what the console says.
                vm.wait().assert_code(255);
                unreachable!();
            }
            thread::sleep(std::time::Duration::from_millis(2));
        }
        Some(Self {
            session: connected.join().unwrap(),
            dir,
            vm,
        })
    }

    fn set_up(self, setup: Setup) -> Result<Ready, AgentError> {
        match self.session.ask(&Request::Setup(Box::new(setup)))? {
            Answer::Done => {}
            other => panic!("{other:?}"),
        }
        Ok(Ready {
            guest: Guest::new(&self.dir.path().join("v.sock"), patience(SECONDS)),
            _dir: self.dir,
            vm: self.vm,
        })
    }
}

/// A guest that is what its host described.
struct Ready {
    _dir: TempDir,
    vm: Running,
    guest: Guest,
}

impl Ready {
    /// Runs a script to its end; gives its exit and output.
    #[track_caller]
    fn sh(&self, script: &str) -> (Exit, String) {
        self.run(&sh(script))
    }

    /// The output of a script that succeeds.
    #[track_caller]
    fn said(&self, script: &str) -> String {
        let (exit, output) = self.sh(script);
        assert_eq!(exit, Exit::Code(0), "{script}: {output}");
        output.trim_end().to_owned()
    }

    #[track_caller]
    fn run(&self, process: &Process) -> (Exit, String) {
        let kept = Kept::default();
        let streams = Streams {
            input: None,
            output: Some(Box::new(kept.clone())),
            errors: Some(Box::new(kept.clone())),
        };
        let exit = self.guest.run(process, streams, |_, _| {}).unwrap();
        let bytes = kept.0.lock().unwrap();
        (exit, String::from_utf8_lossy(&bytes).into_owned())
    }

    #[track_caller]
    fn end(self) -> End {
        let how = Shutdown {
            how: ShutdownHow::PowerOff,
            signal: 15,
            grace_ms: 5000,
        };
        self.guest.shut_down(how).unwrap();
        let end = self.vm.wait();
        end.assert_code(0);
        end
    }
}

fn sh(script: &str) -> Process {
    Process {
        args: ["/bin/sh", "-c", script].map(str::to_owned).into(),
        env: vec![("PATH".into(), "/bin:/sbin".into())],
        ..Process::default()
    }
}

#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A root with busybox, as a disk that is only read.
fn root_disk(dir: &Path) -> Option<PathBuf> {
    let root = root_files(dir, "");
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0::/:/bin/sh\nweb:x:33:44::/home/web:/bin/sh\n",
    )
    .unwrap();
    // As images of distributions have it.
    std::os::unix::fs::symlink("/run/nowhere/resolv.conf", root.join("etc/resolv.conf")).unwrap();
    fs::write(root.join("set-by-image"), "image\n").unwrap();
    let mode = fs::Permissions::from_mode(0o1777);
    fs::set_permissions(root.join("tmp"), mode).unwrap();
    let image = dir.join("root.erofs");
    tool(
        "mkfs.erofs",
        &["-Enoinline_data", path(&image), path(&root)],
    )
    .then_some(image)
}

fn with_root(vm: Vm, image: &Path) -> Vm {
    vm.disk(image, json!({"serial": "root", "is_read_only": true}))
}

fn mount(disk: &str, kind: &str, target: &str, read_only: bool) -> Mount {
    Mount {
        source: Source::Disk(disk.into()),
        kind: kind.into(),
        target: target.into(),
        read_only,
        options: String::new(),
    }
}

fn setup() -> Setup {
    Setup {
        root: Some(mount("root", "erofs", "/", true)),
        hostname: "web1".into(),
        hosts: vec![("10.9.8.7".parse().unwrap(), "db".into())],
        ..Setup::default()
    }
}

#[test]
fn the_guest_is_what_its_host_describes() {
    let images = TempDir::new().unwrap();
    let Some(root) = root_disk(images.path()) else {
        return;
    };
    let before = bytes(&root);
    let Some(machine) = Machine::start(|vm, _| with_root(vm, &root)) else {
        return;
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let asked = Setup {
        unix_ns: Some(u64::try_from(now.as_nanos()).unwrap() + 1_000_000_000_000),
        sysctl: [("net.ipv4.ip_forward".to_owned(), "1".to_owned())].into(),
        ..setup()
    };
    let ready = machine.set_up(asked).unwrap();
    assert_eq!(ready.said("hostname; cat /etc/hostname"), "web1\nweb1");
    assert_eq!(ready.said("cat /proc/sys/net/ipv4/ip_forward"), "1");
    assert!(ready.said("cat /etc/hosts").contains("10.9.8.7\tdb"));
    assert_eq!(
        ready.said("cat /etc/resolv.conf; ls -l /etc/resolv.conf | cut -c1"),
        "-"
    );
    assert_eq!(
        ready.said("cat /set-by-image; echo changed >/set-by-image; cat /set-by-image"),
        "image\nchanged"
    );
    assert_eq!(ready.said("cat /proc/1/comm"), "init");
    let ahead: u64 = ready.said("date +%s").parse().unwrap();
    let ahead = ahead - now.as_secs();
    assert!(
        (1000..1000 + patience(SECONDS).as_secs()).contains(&ahead),
        "{ahead}"
    );
    // What programs, and containers, expect.
    for (place, kind) in [
        ("/", "overlay"),
        ("/proc", "proc"),
        ("/sys", "sysfs"),
        ("/dev", "devtmpfs"),
        ("/dev/pts", "devpts"),
        ("/dev/shm", "tmpfs"),
        ("/run", "tmpfs"),
        ("/sys/fs/cgroup", "cgroup2"),
    ] {
        let found = ready.said(&format!(
            "awk '$2==\"{place}\"{{k=$3}} END{{print k}}' /proc/mounts"
        ));
        assert_eq!(found, kind, "{place}");
    }
    assert_eq!(
        ready.said("echo x | cat /dev/stdin; stat -c %a /tmp /dev/shm"),
        "x\n1777\n1777"
    );
    assert_eq!(
        ready.said("ls / | tr '\\n' ' '"),
        "bin dev etc mnt proc run sbin set-by-image sys tmp"
    );
    // Somebody else.
    let process = Process {
        user: "web".into(),
        ..sh("id -u; id -g; echo $HOME; echo no >/etc/x")
    };
    let (exit, output) = ready.run(&process);
    assert!(
        output.starts_with("33\n44\n/home/web\n") && exit != Exit::Code(0),
        "{output}"
    );
    // A terminal.
    let process = Process {
        terminal: Some(WindowSize {
            rows: 20,
            columns: 70,
        }),
        ..sh("tty; stty size")
    };
    assert_eq!(
        ready.run(&process),
        (Exit::Code(0), "/dev/pts/0\r\n20 70\r\n".into())
    );
    // Orphans end without remains.
    ready.said("for i in 1 2 3 4 5; do (sleep 0.1 &) ; done; sleep 0.5");
    assert_eq!(
        ready.said("grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l"),
        "0"
    );
    let metrics = ready.guest.metrics().unwrap();
    assert!(metrics.memory.total_bytes > 100 << 20 && metrics.uptime_s > 0.0 && metrics.cpus == 1);
    assert!(
        metrics.disks.iter().any(|d| d.read_bytes > 0),
        "{metrics:?}"
    );
    assert!(
        metrics.file_systems.iter().any(|f| f.kind == "overlay"),
        "{metrics:?}"
    );
    ready.end();
    assert!(bytes(&root) == before, "an image is not written");
}

#[test]
fn files_go_in_and_out() {
    let images = TempDir::new().unwrap();
    let Some(root) = root_disk(images.path()) else {
        return;
    };
    let Some(machine) = Machine::start(|vm, _| with_root(vm, &root)) else {
        return;
    };
    let ready = machine.set_up(setup()).unwrap();
    let archive = images.path().join("archive.tar");
    let tree = images.path().join("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    fs::write(tree.join("sub/file"), "there and back").unwrap();
    assert!(tool(
        "tar",
        &["-C", path(images.path()), "-cf", path(&archive), "tree"]
    ));
    let streams = |input: Option<&Path>, output: Option<&Path>| Streams {
        input: input.map(|p| Box::new(fs::File::open(p).unwrap()) as Box<dyn Read + Send>),
        output: output.map(|p| Box::new(fs::File::create(p).unwrap()) as Box<dyn Write + Send>),
        errors: None,
    };
    let copy_in = Request::CopyIn(CopyIn {
        folder: "/mnt".into(),
        keep_owners: false,
    });
    ready
        .guest
        .copy(&copy_in, streams(Some(&archive), None))
        .unwrap();
    assert_eq!(ready.said("cat /mnt/tree/sub/file"), "there and back");
    let back = images.path().join("back.tar");
    let copy_out = Request::CopyOut(CopyOut {
        path: "/mnt/tree".into(),
        follow: false,
    });
    ready
        .guest
        .copy(&copy_out, streams(None, Some(&back)))
        .unwrap();
    let out = images.path().join("out");
    fs::create_dir(&out).unwrap();
    assert!(tool("tar", &["-C", path(&out), "-xf", path(&back)]));
    assert_eq!(
        fs::read_to_string(out.join("tree/sub/file")).unwrap(),
        "there and back"
    );
    // 20 MB through a process, both ways at once.
    let big = images.path().join("big");
    let content: Vec<u8> = (0..20_000_000_u32)
        .map(|n| (n.wrapping_mul(0x9e37_79b1) >> 24) as u8)
        .collect();
    fs::write(&big, &content).unwrap();
    let echoed = images.path().join("echoed");
    let process = Process {
        input: true,
        ..sh("cat")
    };
    let exit = ready
        .guest
        .run(&process, streams(Some(&big), Some(&echoed)), |_, _| {})
        .unwrap();
    assert_eq!(exit, Exit::Code(0));
    assert!(bytes(&echoed) == content);
    ready.end();
}

#[test]
fn changes_stay_on_their_disk() {
    let images = TempDir::new().unwrap();
    let Some(root) = root_disk(images.path()) else {
        return;
    };
    let changes = images.path().join("changes.img");
    let empty = images.path().join("empty");
    fs::create_dir(&empty).unwrap();
    if !ext4(&changes, &empty, 32) {
        return;
    }
    for round in 0..2 {
        let Some(machine) = Machine::start(|vm, _| {
            with_root(vm, &root).disk(&changes, json!({"serial": "changes"}))
        }) else {
            return;
        };
        let asked = Setup {
            changes: Some(mount("changes", "ext4", "/", false)),
            ..setup()
        };
        let ready = machine.set_up(asked).unwrap();
        let script = "cat /kept 2>/dev/null || echo new; echo kept >/kept; rm -f /set-by-image; ls /set-by-image 2>/dev/null | wc -l";
        let expected = if round == 0 { "new\n0" } else { "kept\n0" };
        assert_eq!(ready.said(script), expected);
        ready.end();
    }
    assert!(
        tool("e2fsck", &["-fn", path(&changes)]),
        "it was left in order"
    );
    let facts = output("dumpe2fs", &["-h", path(&changes)]);
    assert!(!facts.contains("needs_recovery"), "{facts}");
}

#[test]
fn a_root_that_is_not_to_be_changed_is_not() {
    let images = TempDir::new().unwrap();
    let Some(root) = root_disk(images.path()) else {
        return;
    };
    // The places to mount at must be in it.
    let Some(machine) = Machine::start(|vm, _| with_root(vm, &root)) else {
        return;
    };
    let asked = Setup {
        read_only: true,
        mounts: vec![Mount {
            source: Source::Nothing,
            kind: "tmpfs".into(),
            target: "/mnt".into(),
            read_only: false,
            options: "size=1m,mode=0700".into(),
        }],
        ..setup()
    };
    let ready = machine.set_up(asked).unwrap();
    let (exit, said) = ready.sh("echo x >/x");
    assert!(
        exit != Exit::Code(0) && said.contains("Read-only"),
        "{said}"
    );
    assert_eq!(
        ready.said("hostname; echo y >/mnt/y; cat /mnt/y; stat -c %a /mnt"),
        "web1\ny\n700"
    );
    ready.end();
}

/// Its root is one that is only read, which does not keep the agent from saying there who the guest is.
#[test]
fn a_guest_becomes_somebody_else() {
    let images = TempDir::new().unwrap();
    let Some(root) = root_disk(images.path()) else {
        return;
    };
    if network::tap(1500).is_none() {
        return;
    }
    let device = json!({"guest_mac": network::MAC});
    let Some(machine) = Machine::start(|vm, _| with_root(vm, &root).tap("tap0", device)) else {
        return;
    };
    let asked = Setup {
        read_only: true,
        // Far from the host's, as of a guest that was stopped long ago.
        unix_ns: Some(1_000_000_000_000_000_000),
        network: vec![format!(
            "alveole.net={},ip=10.77.0.2/24,dns=10.77.0.1",
            network::MAC
        )],
        ..setup()
    };
    let ready = machine.set_up(asked).unwrap();
    assert!(ready.said("cat /etc/hosts").contains("10.77.0.2\tweb1"));
    let now = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_nanos()
    };
    let renewal = Renewal {
        entropy: vec![0x5a; 64],
        unix_ns: Some(u64::try_from(now()).unwrap()),
        hostname: Some("web2".into()),
        machine_id: Some("00112233445566778899aabbccddeeff".into()),
        interfaces: vec![RenewedInterface {
            is: network::MAC.into(),
            becomes: "alveole.net=02:77:00:00:00:09,ip=10.77.0.9/24,ip=fd77::9/64,gw=10.77.0.1,dns=10.77.0.7".into(),
        }],
        hooks_ms: Some(1000),
    };
    let boot_id = || ready.said("cat /proc/sys/kernel/random/boot_id");
    let booted = boot_id();
    let renewed = ready.guest.renew(&renewal).unwrap();
    assert_ne!(booted, boot_id());
    assert_eq!(renewed.failures(), Vec::<String>::new());
    let parts: Vec<_> = renewed.parts.iter().map(|p| p.part.as_str()).collect();
    assert_eq!(
        parts,
        [
            "entropy",
            "clock",
            "hostname",
            "machine-id",
            "boot-id",
            "network",
            "hooks"
        ]
    );
    assert!(
        renewed.parts.iter().all(|p| p.remark.is_none()),
        "{renewed:?}"
    );

    // The clock, within what asking it takes.
    let off_s = renewed.clock_off_ns.unwrap() / 1_000_000_000;
    let was_off_s = 1_000_000_000 - i64::try_from(now() / 1_000_000_000).unwrap();
    assert!((off_s - was_off_s).abs() <= 60, "{off_s} of {was_off_s}");
    let before_s = now() / 1_000_000_000;
    let theirs: u128 = ready.said("date +%s").parse().unwrap();
    let after_s = now() / 1_000_000_000;
    assert!(
        (before_s - 1..=after_s + 1).contains(&theirs),
        "{before_s} {theirs} {after_s}"
    );

    assert_eq!(
        ready.said("hostname; cat /etc/hostname /etc/machine-id /etc/resolv.conf"),
        "web2\nweb2\n00112233445566778899aabbccddeeff\nnameserver 10.77.0.7"
    );
    assert_eq!(
        ready.said("cat /etc/hosts"),
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n10.77.0.9\tweb2\n10.9.8.7\tdb"
    );
    let (exit, said) = ready.sh("echo x >/x");
    assert!(
        exit != Exit::Code(0) && said.contains("Read-only"),
        "{said}"
    );
    assert_eq!(
        ready.said("cat /sys/class/net/eth0/address; ip -4 -o addr show dev eth0 | sed 's/.*inet \\([^ ]*\\).*/\\1/'"),
        "02:77:00:00:00:09\n10.77.0.9/24"
    );
    // Its neighbour reaches it there.
    for address in ["10.77.0.9", "fd77::9"] {
        output("ping", &["-c1", "-W10", address]);
        let known = output("ip", &["neigh", "show", "dev", "tap0"]);
        assert!(known.contains("02:77:00:00:00:09"), "{known}");
    }
    ready.end();
}

#[test]
fn what_cannot_be_had_is_said() {
    let Some(machine) = Machine::start(|vm, _| vm) else {
        return;
    };
    let error = machine.set_up(setup()).err().unwrap().to_string();
    assert!(
        error.contains("'root'") && error.contains("serial number"),
        "{error}"
    );
}

/// Processes that do not end when asked are killed, and the guest ends in order.
#[test]
fn a_guest_ends_although_its_processes_do_not_want_to() {
    let images = TempDir::new().unwrap();
    let Some(root) = root_disk(images.path()) else {
        return;
    };
    let Some(machine) = Machine::start(|vm, _| with_root(vm, &root)) else {
        return;
    };
    let ready = machine.set_up(setup()).unwrap();
    assert_eq!(
        ready.said("(trap '' TERM HUP; while :; do sleep 1; done) >/dev/null 2>&1 & echo begun"),
        "begun"
    );
    let how = Shutdown {
        how: ShutdownHow::PowerOff,
        signal: 15,
        grace_ms: 300,
    };
    ready.guest.shut_down(how).unwrap();
    ready.vm.wait().assert_code(0);
}
