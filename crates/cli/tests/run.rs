//! `alveole run` as people start it, with a script in place of the VMM and the lab.

#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use alveole_vm_config::VmConfig;
use tempfile::TempDir;

/// One start of the program, and what its stand-in reported.
struct Run {
    output: Output,
    pid: u32,
    report: TempDir,
}

impl Run {
    fn new(words: &[&str]) -> Self {
        Self::with(words, |_| {})
    }

    fn with(words: &[&str], more: impl FnOnce(&mut Command)) -> Self {
        let report = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_alveole"));
        command
            .args(words)
            .env("ALVEOLE_VMM", stand_in())
            .env("ALVEOLE_LAB_TOOL", stand_in())
            .env_remove("ALVEOLE_LAB")
            .env("FAKE_REPORT", report.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        more(&mut command);
        let child = command.spawn().unwrap();
        let pid = child.id();
        Self {
            output: child.wait_with_output().unwrap(),
            pid,
            report,
        }
    }

    fn reported(&self, what: &str) -> Option<String> {
        fs::read_to_string(self.report.path().join(what)).ok()
    }

    fn args(&self) -> Vec<String> {
        let text = self
            .reported("args")
            .unwrap_or_else(|| panic!("not started: {}", self.stderr()));
        text.lines().map(str::to_owned).collect()
    }

    fn config(&self) -> VmConfig {
        VmConfig::from_json(&self.reported("config").unwrap(), "config").unwrap()
    }

    fn status(&self) -> Option<i32> {
        self.output.status.code()
    }

    fn stderr(&self) -> String {
        String::from_utf8(self.output.stderr.clone()).unwrap()
    }
}

fn stand_in() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake-program")
}

#[test]
fn the_vmm_takes_the_place_of_this_process() {
    let words = ["run", "--no-probe", "--net", "none", "--kernel", "vmlinux"];
    let run = Run::with(&words, |command| {
        command.env("FAKE_STATUS", "42");
    });
    assert_eq!(run.status(), Some(42));
    assert_eq!(run.reported("pid").unwrap().trim(), run.pid.to_string());
    assert_eq!(run.stderr(), "");

    let run = Run::with(&words, |command| {
        command.env("FAKE_SIGNAL", "TERM");
    });
    assert_eq!(run.output.status.signal(), Some(15));
}

#[test]
fn the_defaults_are_described() {
    let run = Run::new(&["run", "--no-probe", "--net", "none", "--kernel", "vmlinux"]);
    let args = run.args();
    assert!(args[1].starts_with("/proc/self/fd/"), "{args:?}");
    assert_eq!(args[0], "--config-file");
    assert_eq!(
        args[2..],
        [
            "--no-api",
            "--enable-pci",
            "--on-sigterm",
            "power-button",
            "--console",
            "stdio"
        ]
    );
    let json: serde_json::Value = serde_json::from_str(&run.reported("config").unwrap()).unwrap();
    let boot = &json["boot-source"];
    assert_eq!(boot["kernel_image_path"], "vmlinux");
    assert_eq!(boot["boot_args"], "console=ttyS0 reboot=k panic=-1");
    assert!(boot.get("initrd_path").is_none());
    assert_eq!(json["machine-config"]["vcpu_count"], 1);
    assert_eq!(json["machine-config"]["mem_size_mib"], 256);
}

#[test]
fn everything_asked_for_reaches_the_vmm() {
    let run = Run::new(&[
        "run",
        "--no-probe",
        "--kernel=k",
        "--initrd=sub/i",
        "--cpus=8",
        "--memory=5G",
        "--net=none",
        "--cmdline=console=ttyS0 \"x\"",
        "--append=quiet",
        "--vsock=3:/run/a:b.sock",
        "--console=unix:/run/a socket",
        "--boot-timer",
    ]);
    assert_eq!(
        run.args()[2..],
        [
            "--no-api",
            "--enable-pci",
            "--on-sigterm",
            "power-button",
            "--console",
            "unix:/run/a socket",
            "--boot-timer"
        ]
    );
    let config = run.config();
    assert_eq!(config.boot_source.initrd_path, Some("sub/i".into()));
    let vsock = config.vsock.as_ref().unwrap();
    assert_eq!(vsock.guest_cid, 3);
    assert_eq!(vsock.uds_path, Path::new("/run/a:b.sock"));
    assert_eq!(
        config.boot_source.boot_args.unwrap(),
        "console=ttyS0 \"x\" quiet"
    );
    assert_eq!(config.machine_config.vcpu_count, 8);
    assert_eq!(config.machine_config.mem_size_mib, 5120);
}

#[test]
fn the_directory_stays_so_that_relative_paths_work() {
    let dir = tempfile::tempdir().unwrap();
    let run = Run::with(&["run", "--no-probe", "--kernel", "../k"], |command| {
        command.current_dir(dir.path());
    });
    let cwd = run.reported("cwd").unwrap();
    assert_eq!(
        fs::canonicalize(cwd.trim()).unwrap(),
        fs::canonicalize(dir.path()).unwrap()
    );
    assert_eq!(
        run.config().boot_source.kernel_image_path,
        Path::new("../k")
    );
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        0,
        "something was left behind"
    );
}

#[test]
fn the_probe_decides_unless_it_is_spared() {
    let doctor = Run::new(&["doctor", "--probe-kvm"]);
    let verdict = String::from_utf8(doctor.output.stdout.clone()).unwrap();
    assert_eq!(verdict.lines().count(), 1, "{verdict}");
    let run = Run::new(&["run", "--kernel", "k"]);
    if doctor.status() == Some(0) {
        assert_eq!(run.status(), Some(0), "{}", run.stderr());
        assert!(run.reported("config").is_some());
    } else {
        assert_eq!((doctor.status(), run.status()), (Some(1), Some(1)));
        assert!(run.reported("args").is_none(), "the VMM was started");
        let stderr = run.stderr();
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert!(
            stderr.starts_with("alveole: cannot run a guest here: "),
            "{stderr}"
        );
        assert!(
            stderr.contains("--lab") && stderr.contains("--no-probe"),
            "{stderr}"
        );
    }
}

#[test]
fn the_lab_gets_the_same_command_line() {
    let words = [
        "run",
        "--lab",
        "--kernel",
        "a b",
        "--memory",
        "512",
        "--console",
        "file:log",
    ];
    let run = Run::with(&words, |command| {
        command.env("FAKE_STATUS", "124");
    });
    assert_eq!(run.status(), Some(124));
    assert_eq!(run.reported("pid").unwrap().trim(), run.pid.to_string());
    let args = run.args();
    let split = args.iter().position(|word| word == "--").unwrap();
    assert_eq!(args[..2], ["run", "--cpus"]);
    assert_eq!(args[3..split], ["--memory", "1536", "--bring-back", "log"]);
    assert!(Path::new(&args[split + 1]).is_absolute());
    assert!(args[split + 1].ends_with("/alveole"));
    assert_eq!(
        args[split + 2..],
        [
            "run",
            "--no-probe",
            "--lab",
            "--kernel",
            "a b",
            "--memory",
            "512",
            "--console",
            "file:log"
        ]
    );
}

/// A home with a kernel, and the words for an image in the lab.
fn lab_with_image(words: &[&str]) -> (TempDir, Run) {
    let home = tempfile::tempdir().unwrap();
    let kernel = home.path().join("vmlinux");
    fs::write(&kernel, b"\x7fELF").unwrap();
    let image = home.path().join("root.erofs");
    fs::write(&image, "").unwrap();
    let here = |command: &mut Command| {
        command
            .env("ALVEOLE_HOME", home.path())
            .env_remove("ALVEOLE_DATA")
            .env("ALVEOLE_AGENT", stand_in())
            .env("SECRET", "a b")
            .env("FAKE_STATUS", "7");
    };
    let added = Run::with(&["kernel", "add", kernel.to_str().unwrap()], here);
    assert_eq!(added.status(), Some(0), "{}", added.stderr());
    let words = [
        &["run", "--lab"],
        words,
        &[image.to_str().unwrap(), "x", "--lab"],
    ]
    .concat();
    let run = Run::with(&words, here);
    (home, run)
}

/// The words behind the image are its program's, `--lab` among them.
#[test]
fn an_image_runs_in_the_lab_as_it_would_here() {
    let (home, run) = lab_with_image(&["--rm", "-e", "SECRET", "-e", "NONE", "--memory", "1G"]);
    assert_eq!(run.status(), Some(7), "{}", run.stderr());
    let args = run.args();
    let split = args.iter().position(|word| word == "--").unwrap();
    assert_eq!(args[3..split], ["--memory", "2048"]);
    assert_eq!(args[split + 1..split + 3], ["env", "SECRET=a b"]);
    assert!(args[split + 3].ends_with("/alveole"));
    assert_eq!(
        args[split + 4..][..4],
        ["run", "--no-probe", "--lab", "--rm"]
    );
    assert_eq!(args[args.len() - 2..], ["x", "--lab"]);
    // Where who is root in the lab finds the kernel.
    let data = home.path().join("data");
    assert_eq!(run.reported("data").unwrap().trim(), data.to_str().unwrap());
}

#[test]
fn what_the_lab_would_forget_is_refused_before() {
    for (words, said) in [
        (&[][..], "say so, with --rm"),
        (&["-d"], "leave -d out"),
        (&["--rm", "-v", "data:/data"], "-v data"),
        (&["--rm", "-p", "8080:80"], "-p 127.0.0.1:8080:80"),
        (&["--rm", "--initrd", "x"], "--initrd"),
    ] {
        let (_home, run) = lab_with_image(words);
        assert_eq!(run.status(), Some(125), "{words:?}");
        assert!(run.stderr().contains(said), "{words:?}: {}", run.stderr());
        assert_eq!(run.reported("args"), None, "{words:?}");
    }
}

#[test]
fn in_the_lab_the_lab_is_not_entered_again() {
    let run = Run::with(
        &["run", "--lab", "--no-probe", "--kernel", "k"],
        |command| {
            command.env("ALVEOLE_LAB", "1");
        },
    );
    assert_eq!(run.args()[0], "--config-file");
}

#[test]
fn a_program_that_is_not_there_is_named() {
    let run = Run::with(&["run", "--no-probe", "--kernel", "k"], |command| {
        command.env("ALVEOLE_VMM", "/nowhere/vmm");
    });
    assert_eq!(run.status(), Some(1));
    let stderr = run.stderr();
    assert!(
        stderr.starts_with("alveole: cannot use ALVEOLE_VMM=/nowhere/vmm: "),
        "{stderr}"
    );

    let run = Run::with(&["run", "--lab", "--kernel", "k"], |command| {
        command.env("ALVEOLE_LAB_TOOL", "/etc/passwd");
    });
    assert_eq!(run.status(), Some(1));
    assert!(
        run.stderr()
            .contains("ALVEOLE_LAB_TOOL=/etc/passwd: it is not executable")
    );
}

#[test]
fn without_a_vmm_anywhere_it_says_where_it_looked() {
    // A copy, beside which there is no VMM.
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("alveole");
    fs::hard_link(env!("CARGO_BIN_EXE_alveole"), &copy)
        .or_else(|_| fs::copy(env!("CARGO_BIN_EXE_alveole"), &copy).map(drop))
        .unwrap();
    let output = Command::new(&copy)
        .args(["run", "--no-probe", "--kernel", "k"])
        .env_remove("ALVEOLE_VMM")
        .env("PATH", dir.path())
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr.starts_with("alveole: cannot find alveole-vmm: "),
        "{stderr}"
    );
    assert!(
        stderr.contains("ALVEOLE_VMM") && stderr.contains("cargo build"),
        "{stderr}"
    );

    // In PATH it is found.
    fs::copy(stand_in(), dir.path().join("alveole-vmm")).unwrap();
    let status = Command::new(&copy)
        .args(["run", "--no-probe", "--kernel", "k"])
        .env_remove("ALVEOLE_VMM")
        .env("FAKE_REPORT", dir.path())
        .env("FAKE_STATUS", "7")
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(7));
}

#[test]
fn a_wrong_command_line_is_status_2_and_says_what_to_write() {
    for (words, expected) in [
        (&["run"][..], "--kernel"),
        (&["run", "--kernel", "k", "--memory", "1.5G"], "1536M"),
        (&["run", "--kernel", "k", "--memory", "0"], "needs memory"),
        (&["run", "--kernel", "k", "--cpus", "0"], "--cpus"),
        (&["run", "--kernel", "k", "--cpus", "256"], "--cpus"),
        (&["run", "--kernel", "k", "--console", "tty"], "unix:PATH"),
        (&["run", "--kernel", ""], "--kernel"),
        (
            &["doctor", "--probe-kvm", "--format", "json"],
            "--probe-kvm",
        ),
        (&["rum"], "run"),
    ] {
        let run = Run::new(words);
        assert_eq!(run.status(), Some(2), "{words:?}: {}", run.stderr());
        assert!(
            run.stderr().contains(expected),
            "{words:?}: {}",
            run.stderr()
        );
        assert!(run.reported("args").is_none());
    }
}

#[test]
fn a_path_that_json_cannot_hold_is_an_error() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let run = Run::with(&["run", "--no-probe", "--kernel"], |command| {
        command.arg(OsStr::from_bytes(b"k\xff"));
    });
    assert_eq!(run.status(), Some(1));
    assert!(run.stderr().contains("UTF-8"), "{}", run.stderr());
}
