//! Bad input gets a clear error and nothing is lost: the real program on wrong descriptions, wrong
//! kernels, wrong hosts and vanished terminals. Each message names the value, the reason and the cure;
//! no process, file or raw terminal is left behind.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod tiny_guest;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use alveole_block_store::{Format, OpenOptions, open, tools};
use nix::fcntl::OFlag;
use nix::sys::signal::Signal::{self, SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use nix::sys::termios::{Termios, tcgetattr};
use tiny_guest::code::{kernel_of_size, tiny_kernel};
use tiny_guest::{
    Bench, Ended, filters, hang, no_kvm, power_off, print, skipped, start_on, start_on_with,
    terminal,
};

/// The host or a file cannot give what is needed.
const HOST: i32 = 1;
/// The description is wrong.
const CONFIG: i32 = 152;
/// The command line is wrong.
const USAGE: i32 = 153;

/// A guest that says "up" and then sleeps.
fn up() -> Vec<u8> {
    [print("up\n"), hang()].concat()
}

fn boot(more: &str) -> String {
    format!(r#"{{"boot-source": {{"kernel_image_path": "kernel"{more}}}}}"#)
}

fn machine(machine: &str) -> String {
    format!(
        r#"{{"boot-source": {{"kernel_image_path": "kernel"}}, "machine-config": {{{machine}}}}}"#
    )
}

// ---- kernels ----

#[test]
fn a_kernel_that_is_none() {
    if no_kvm("a_kernel_that_is_none") {
        return;
    }
    let bench = Bench::new(&power_off());
    bench.describe("/nonexistent/vmlinux", 1, 64);
    bench.run().assert(
        CONFIG,
        &[
            "kernel \"/nonexistent/vmlinux\"",
            "No such file",
            "is the path right?",
        ],
    );
    bench.describe("/etc", 1, 64);
    bench.run().assert(
        CONFIG,
        &["kernel \"/etc\"", "directory", "name a file in it"],
    );
    bench.describe("/dev/zero", 1, 64);
    bench.run().assert(
        CONFIG,
        &["kernel \"/dev/zero\"", "not a regular file", "name a file"],
    );
    nix::unistd::mkfifo(&bench.file("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    bench.describe("pipe", 1, 64);
    bench
        .run()
        .assert(CONFIG, &["kernel \"pipe\"", "not a regular file"]);

    let mut elf32 = tiny_kernel(&power_off());
    elf32[4] = 1;
    let mut arm_elf = tiny_kernel(&power_off());
    arm_elf[18] = 183;
    let mut arm_image = vec![0; 4096];
    arm_image[0x38..0x3c].copy_from_slice(b"ARM\x64");
    let table: [(&str, &[u8], &[&str]); 6] = [
        (
            "empty",
            b"",
            &["is empty", "give an ELF vmlinux or a bzImage"],
        ),
        (
            "text",
            b"#!/bin/sh\necho no kernel\n",
            &["23 21 2f 62 (a script)", "give an ELF"],
        ),
        (
            "gzip",
            b"\x1f\x8b\x08\0\0\0\0\0\0\0",
            &["1f 8b 08 00 (a gzip file)", "uncompressed"],
        ),
        ("elf32", &elf32, &["a 32-bit ELF file", "for x86-64"]),
        (
            "arm-elf",
            &arm_elf,
            &["an ELF file for arm64", "for x86-64"],
        ),
        (
            "Image",
            &arm_image,
            &["an arm64 kernel Image", "for x86-64"],
        ),
    ];
    for (name, bytes, words) in table {
        bench.write(name, bytes);
        bench.describe(name, 1, 64);
        let ended = bench.run();
        ended.assert(CONFIG, words);
        ended.assert(CONFIG, &[&format!("kernel {name:?}")]);
    }
}

#[test]
fn a_kernel_cut_anywhere_is_called_incomplete() {
    if no_kvm("a_kernel_cut_anywhere_is_called_incomplete") {
        return;
    }
    let bench = Bench::new(&power_off());
    let whole = fs::read(bench.file("kernel")).unwrap();
    let cuts = (1..4)
        .chain((4..0x78).step_by(9))
        .chain([0x78, 0xfff, 0x1000, whole.len() - 1]);
    for cut in cuts {
        bench.write("kernel", &whole[..cut]);
        let ended = bench.run();
        let reason = if cut < 4 {
            "not a kernel"
        } else {
            "is the file complete?"
        };
        ended.assert(CONFIG, &["kernel \"kernel\"", reason]);
    }
}

#[test]
fn a_kernel_or_initrd_larger_than_memory() {
    if no_kvm("a_kernel_or_initrd_larger_than_memory") {
        return;
    }
    let bench = Bench::new(&power_off());
    bench.write("kernel", &kernel_of_size(&power_off(), 127 << 20));
    bench.run().assert(
        CONFIG,
        &[
            "needs guest memory up to 128 MiB",
            "the guest has 64 MiB",
            "at least 128 MiB",
        ],
    );
    bench.write("kernel", &kernel_of_size(&power_off(), 4 << 30));
    bench
        .run()
        .assert(CONFIG, &["segment 0", "outside", "link the kernel"]);

    bench.write("kernel", &tiny_kernel(&power_off()));
    bench.sparse("initrd", 80 << 20);
    bench.write(
        "vm.json",
        machine(r#""vcpu_count": 1, "mem_size_mib": 64"#)
            .replace("\"kernel\"", r#""kernel", "initrd_path": "initrd""#)
            .as_bytes(),
    );
    bench.run().assert(
        CONFIG,
        &[
            "initrd \"initrd\" of 80 MiB",
            "64 MiB of guest memory",
            "give the guest at least 8",
        ],
    );
    bench.sparse("initrd", 1 << 40);
    bench
        .run()
        .assert(CONFIG, &["initrd \"initrd\"", "make it smaller"]);
    bench.sparse("initrd", 0);
    bench.run().assert(
        CONFIG,
        &["initrd \"initrd\"", "is empty", "give an archive"],
    );
    fs::remove_file(bench.file("initrd")).unwrap();
    bench.run().assert(
        CONFIG,
        &["initrd \"initrd\"", "No such file", "is the path right?"],
    );
    fs::create_dir(bench.file("initrd")).unwrap();
    bench.run().assert(
        CONFIG,
        &["initrd \"initrd\"", "directory", "name a file in it"],
    );
}

#[test]
fn a_command_line_that_would_not_arrive() {
    if no_kvm("a_command_line_that_would_not_arrive") {
        return;
    }
    let bench = Bench::new(&power_off());
    let long = "x".repeat(4000);
    for (args, words) in [
        (
            long.as_str(),
            ["it has 4008 characters", "takes at most 2047"],
        ),
        (
            "quiet\\u0000panic=1",
            ["byte 0x00 at position 5", "not printable ASCII"],
        ),
        ("a\\nb", ["byte 0x0a at position 1", "not printable ASCII"]),
        (
            "root=/dev/gr\u{fc}n",
            ["byte 0xc3 at position 12", "not printable ASCII"],
        ),
    ] {
        let text = boot(&format!(r#", "boot_args": "{args}""#));
        bench.run_text(text.as_bytes()).assert(CONFIG, &words);
    }
}

// ---- the machine ----

#[test]
fn memory_and_processors_out_of_range() {
    let bench = Bench::new(&power_off());
    for (cpus, mib, words) in [
        (1, "0", &["mem_size_mib is 0", "at least 64 MiB"][..]),
        (1, "63", &["mem_size_mib is 63", "at least 64 MiB"]),
        (
            1,
            "18446744073709551615",
            &["mem_size_mib is 18446744073709551615", "16 TiB"],
        ),
        (
            1,
            "18446744073709551616",
            &[
                "vm.json:1:",
                "machine-config.mem_size_mib",
                "a whole number",
            ],
        ),
        (
            1,
            "64.5",
            &["machine-config.mem_size_mib", "the number 64.5"],
        ),
        (1, "-64", &["machine-config.mem_size_mib", "the number -64"]),
        (0, "64", &["vcpu_count is 0", "at least 1"]),
        (65, "64", &["vcpu_count is 65", "at most 64"]),
        (255, "64", &["vcpu_count is 255", "at most 64"]),
        (
            256,
            "64",
            &["vm.json:1:", "machine-config.vcpu_count", "the number 256"],
        ),
    ] {
        let text = machine(&format!(r#""vcpu_count": {cpus}, "mem_size_mib": {mib}"#));
        bench.run_text(text.as_bytes()).assert(CONFIG, words);
    }
    let text = machine(r#""vcpu_count": 1, "mem_size_mib": 65, "huge_pages": "2M""#);
    let words = ["mem_size_mib is 65", "a multiple of 2 MiB"];
    bench.run_text(text.as_bytes()).assert(CONFIG, &words);
    let text = machine(r#""vcpu_count": 0, "mem_size_mib": 1"#).replace("\"kernel\"", "\"\"");
    let all = [
        "vcpu_count is 0",
        "mem_size_mib is 1",
        "kernel_image_path is empty",
    ];
    bench.run_text(text.as_bytes()).assert(CONFIG, &all);
}

/// All that is wrong is told at once: what cannot be read, else what cannot be, else what the host does not have.
#[test]
fn everything_wrong_at_once() {
    let bench = Bench::new(&power_off());
    let long = "x".repeat(300);
    let unreadable = r#"{
        "boot-source": {"kernel_image_path": 3, "boot_arg": "x"},
        "machine-config": {"vcpu_count": "two", "mem_size_mib": 1.5},
        "drives": [{"drive_id": "a", "path_on_host": "p", "is_root_device": "yes"}, 7],
        "network-interfaces": [{"iface_id": "a"}],
        "vsock": {"guest_cid": -1, "uds_path": "v"},
        "logger": {"level": "Loud"}, "metrics": {}, "balloon": {}, "nonsense": 1
    }"#;
    let all = [
        "vm.json:2:46",
        "boot_arg",
        "vcpu_count",
        "mem_size_mib",
        "drives[0].is_root_device",
        "drives[1]",
        "host_dev_name",
        "guest_cid",
        "logger.level",
        "metrics_path",
        "balloon",
        "nonsense",
    ];
    bench.run_text(unreadable.as_bytes()).assert(CONFIG, &all);

    let impossible = serde_json::json!({
        "boot-source": {"kernel_image_path": ""},
        "machine-config": {"vcpu_count": 0, "mem_size_mib": 1},
        "drives": [
            {"drive_id": long, "path_on_host": "p", "is_root_device": true},
            {"drive_id": "../../up", "path_on_host": "", "is_root_device": true},
            {"drive_id": "a", "path_on_host": "p", "is_root_device": false},
            {"drive_id": "a", "path_on_host": "p", "is_root_device": false},
        ],
        "network-interfaces": [
            {"iface_id": long, "host_dev_name": "t"},
            {"iface_id": "b", "host_dev_name": "t"},
            {"iface_id": "b", "host_dev_name": "t", "guest_mac": "01:00:00:00:00:00"},
        ],
        "vsock": {"guest_cid": 2, "uds_path": ""},
        "mmds-config": {"network_interfaces": ["nobody"]},
    });
    let all = [
        "kernel_image_path is empty",
        "vcpu_count is 0",
        "mem_size_mib is 1",
        "drive_id \"xxx",
        "drive_id \"../../up\": a name has at most 64",
        "drive \"../../up\" has an empty path_on_host",
        "both the root device",
        "drive_id \"a\" is given to two drives",
        "iface_id \"xxx",
        "iface_id \"b\" is given to two network interfaces",
        "one of a group",
        "guest_cid 2",
        "empty uds_path",
        "\"nobody\"",
    ];
    let ended = bench.run_text(impossible.to_string().as_bytes());
    ended.assert(CONFIG, &all);
    assert!(!ended.said.contains(&long[..65]), "{}", ended.said);

    let missing = serde_json::json!({
        "boot-source": {"kernel_image_path": "no-kernel", "initrd_path": "no-initrd"},
        "drives": [
            {"drive_id": "a", "path_on_host": "no-disk", "is_root_device": false},
            {"drive_id": "b", "path_on_host": "/", "is_root_device": false},
        ],
        "network-interfaces": [{"iface_id": "c", "host_dev_name": "no-such-tap"}],
    });
    let all = [
        "kernel \"no-kernel\"",
        "initrd \"no-initrd\"",
        "drive \"a\"",
        "drive \"b\"",
        "network interface \"c\"",
    ];
    bench
        .run_text(missing.to_string().as_bytes())
        .assert(CONFIG, &all);
}

#[test]
fn more_memory_than_the_host_has() {
    if no_kvm("more_memory_than_the_host_has") {
        return;
    }
    let bench = Bench::new(&power_off());
    bench.describe("kernel", 1, 16 << 20);
    bench.run().assert(
        CONFIG,
        &["16777216 MiB is more than this host has", "ask for less"],
    );
}

// ---- the description ----

#[test]
fn descriptions_that_are_none() {
    let bench = Bench::new(&power_off());
    let deep = vec![b'['; 200_000];
    let table: [(&[u8], &[&str]); 8] = [
        (b"", &["vm.json: ", "is empty", "it needs at least"]),
        (b" \n\t", &["vm.json: ", "is empty"]),
        (b"{\"boot-source\": \xff}", &["vm.json:1:17", "not UTF-8"]),
        (
            b"{\n\"boot-source\": {},\n}",
            &["vm.json:3:1", "trailing comma"],
        ),
        (b"{} x", &["vm.json:1:4", "trailing"]),
        (b"[]", &["vm.json:1:1", "expected an object"]),
        (b"kernel=vmlinux", &["vm.json:1:1", "not JSON"]),
        (&deep, &["vm.json:", "not JSON"]),
    ];
    for (text, words) in table {
        bench.run_text(text).assert(CONFIG, words);
    }
    bench.sparse("vm.json", 2 << 20);
    bench
        .run()
        .assert(CONFIG, &["the limit is 1048576", "is this the right file?"]);
}

#[test]
fn wrong_fields_are_named_with_line_and_neighbour() {
    let bench = Bench::new(&power_off());
    let table: [(String, &[&str]); 9] = [
        (
            boot(", \n\"boot_arg\": \"\""),
            &[
                "vm.json:2:1",
                "boot-source",
                "boot_arg",
                "did you mean \"boot_args\"?",
            ],
        ),
        (
            "{\n\"bootsource\": {}}".into(),
            &["vm.json:2:1", "did you mean \"boot-source\"?"],
        ),
        (
            boot("").replace("\"kernel\"", "7"),
            &[
                "boot-source.kernel_image_path",
                "expected a string",
                "the number 7",
            ],
        ),
        (
            r#"{"boot-source": []}"#.into(),
            &["\"boot-source\"", "expected an object", "an array"],
        ),
        (
            "{}".into(),
            &["\"boot-source\"", "required and missing; add it"],
        ),
        (
            boot(", \n\"kernel_image_path\": \"b\""),
            &["vm.json:2:1", "given twice, first in line 1; remove one"],
        ),
        (
            machine("\"vcpu_count\": 1"),
            &["machine-config.mem_size_mib", "required and missing"],
        ),
        (
            machine("\"vcpu_count\": \"1\", \"mem_size_mib\": 64"),
            &["machine-config.vcpu_count", "the string \"1\""],
        ),
        (
            machine("\"vcpu_count\": 1, \"mem_size_mib\": 64, \"smt\": true"),
            &["machine-config.smt", "set it to false"],
        ),
    ];
    for (text, words) in table {
        bench.run_text(text.as_bytes()).assert(CONFIG, words);
    }
    let many = "{\"boot-source\": {\"kernel\": 1},\n\"machine-config\": {\"vcpu_count\": -1},\n\"extra\": 0}";
    let all = [
        "vm.json:1:",
        "vm.json:2:",
        "vm.json:3:",
        "kernel_image_path",
        "vcpu_count",
        "extra",
    ];
    bench.run_text(many.as_bytes()).assert(CONFIG, &all);
    let flood: Vec<String> = (0..5000).map(|n| format!("\"k{n}\": 0")).collect();
    let ended = bench.run_text(format!("{{{}}}", flood.join(",\n")).as_bytes());
    ended.assert(CONFIG, &["more"]);
    assert!(
        ended.said.lines().count() < 50,
        "a flood of mistakes is cut"
    );
}

#[test]
fn links_that_are_none_are_refused_by_name_and_cause() {
    let bench = Bench::new(&power_off());
    for (interface, words) in [
        (
            r#"{"iface_id": "eth0", "host_dev_name": "no-such-tap"}"#,
            &[
                "\"eth0\"",
                "there is no interface no-such-tap",
                "ip tuntap add",
            ][..],
        ),
        (
            r#"{"iface_id": "eth0", "host_dev_name": "/nonexistent/passt.sock", "link": "stream"}"#,
            &["\"eth0\"", "/nonexistent/passt.sock"],
        ),
        (
            r#"{"iface_id": "eth0", "host_dev_name": "77", "link": "fd"}"#,
            &["\"eth0\"", "\"77\"", "started with"],
        ),
        (
            r#"{"iface_id": "eth0", "host_dev_name": "a-name-that-is-long"}"#,
            &["\"a-name-that-is-long\"", "15 bytes"],
        ),
        (
            r#"{"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "01:00:5e:00:00:01"}"#,
            &["01:00:5e:00:00:01", "one of a group"],
        ),
        (
            r#"{"iface_id": "eth0", "host_dev_name": "tap0", "mtu": 9}"#,
            &["mtu 9", "68 to 65535"],
        ),
        (
            r#"{"iface_id": "eth0", "host_dev_name": "tap0", "vhost": true, "tx_rate_limiter": {"ops": {"size": 1, "refill_time": 1}}}"#,
            &["vhost and tx_rate_limiter", "bounds nothing", "leave"],
        ),
        (
            r#"{"iface_id": "eth0", "host_dev_name": "tap0", "egress": {"default": "shut"}}"#,
            &["egress.default", "\"open\", \"closed\""],
        ),
        (
            r#"{"iface_id": "eth0", "host_dev_name": "tap0", "egress": {"rules": ["allow,to=web", "deny,to=10.0.0.1/8"]}}"#,
            &["allow,to=web", "write the addresses", "10.0.0.0/8"],
        ),
        (
            r#"{"iface_id": "eth0", "host_dev_name": "tap0", "vhost": true, "egress": {}}"#,
            &["vhost and egress", "leave egress or vhost out"],
        ),
        (
            r#"{"iface_id": "eth0", "host_dev_name": "tap0", "vhost": true, "anti_spoofing": true}"#,
            &["vhost and anti_spoofing", "no addresses"],
        ),
        (
            r#"{"iface_id": "eth0", "host_dev_name": "/run/x", "link": "stream", "vhost": true}"#,
            &["link \"stream\"", "taps and macvtaps"],
        ),
        (
            r#"{"iface_id": "eth0", "host_dev_name": "tap0", "vhost_fds": "20"}"#,
            &["vhost_fds \"20\"", "set vhost to true"],
        ),
    ] {
        let text = format!(
            "{{\n\"network-interfaces\": [{interface}],{}",
            boot("").strip_prefix('{').unwrap()
        );
        bench.run_text(text.as_bytes()).assert(CONFIG, words);
    }
}

#[test]
fn devices_that_are_not_built_are_refused_by_name() {
    let bench = Bench::new(&power_off());
    for (key, value) in [
        ("balloon", r#"{"amount_mib": 1}"#),
        ("pmem", r#"[{"id": "p"}]"#),
        ("memory-hotplug", r#"{"total_size_mib": 64}"#),
    ] {
        let text = format!(
            "{{\n{key:?}: {value},{}",
            boot("").strip_prefix('{').unwrap()
        );
        let field = format!("vm.json:2:1: {key:?}");
        bench
            .run_text(text.as_bytes())
            .assert(CONFIG, &[&field, "not built yet; remove the key"]);
    }
}

/// What the description says of the socket device is checked with the rest, what the host says of its path before
/// the guest starts; a socket that was made goes when something else is wrong.
#[test]
fn a_vsock_path_that_cannot_be_had_is_refused_at_start() {
    let bench = Bench::new(&power_off());
    let run = |path: &Path, cid: &str| {
        let vsock = format!("\"vsock\": {{\"guest_cid\": {cid}, \"uds_path\": {path:?}}},");
        bench.run_text(format!("{{\n{vsock}{}", boot("").strip_prefix('{').unwrap()).as_bytes())
    };
    let file = bench.file("file");
    fs::write(&file, "precious").unwrap();
    let used = bench.file("used.sock");
    let _used = UnixListener::bind(&used).unwrap();
    let missing = bench.file("missing").join("v.sock");
    for (path, cid, words) in [
        (
            &bench.file("v.sock"),
            "2",
            ["guest_cid 2", "from 3 to 4294967294"],
        ),
        (
            &bench.file(&"x".repeat(100)),
            "3",
            ["it may have 96", "shorter directory"],
        ),
        (&file, "3", ["exists and is not a socket", "remove it"]),
        (
            &used,
            "3",
            ["belongs to a running process", "choose another path"],
        ),
        (&missing, "3", ["No such file", "make its directory first"]),
    ] {
        run(path, cid).assert(CONFIG, &words);
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    assert!(!bench.file("v.sock").exists());
}

#[test]
fn a_description_that_cannot_be_read() {
    let bench = Bench::new(&power_off());
    nix::unistd::mkfifo(&bench.file("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (path, words) in [
        (
            "missing.json",
            &["\"missing.json\"", "No such file", "is the path right?"][..],
        ),
        (".", &["\".\"", "Is a directory", "name a file in it"]),
        (
            "/dev/zero",
            &["/dev/zero", "the limit is", "is this the right file?"],
        ),
        ("/dev/null", &["/dev/null", "is empty"]),
        (
            "pipe",
            &[
                "\"pipe\"",
                "nobody writes to this pipe",
                "start its writer first",
            ],
        ),
    ] {
        bench
            .run_with(&["--config-file", path, "--no-api"])
            .assert(CONFIG, words);
    }
}

#[test]
fn a_description_through_a_slow_pipe_is_read() {
    if no_kvm("a_description_through_a_slow_pipe_is_read") {
        return;
    }
    let bench = Bench::new(&power_off());
    let text = fs::read(bench.file("vm.json")).unwrap();
    let mut command = bench.command(&[
        "--config-file",
        "/dev/stdin",
        "--no-api",
        "--console",
        "none",
    ]);
    let mut running = bench.start_command({
        command.stdin(Stdio::piped());
        command
    });
    let mut pipe = running.child.stdin.take().unwrap();
    for part in text.chunks(40) {
        std::thread::sleep(Duration::from_millis(10));
        pipe.write_all(part).unwrap();
    }
    drop(pipe);
    running.end().assert(0, &["powered off"]);
}

// ---- the command line, and where it leads ----

#[test]
fn wrong_words_on_the_command_line() {
    let bench = Bench::new(&power_off());
    let help = "see alveole-vmm --help";
    for (arguments, words) in [
        (&["--no-api"][..], &["add --config-file FILE", help][..]),
        (
            &["--mmds-size-limit", "much"],
            &["--mmds-size-limit", "expected a whole number", help],
        ),
        (
            &["--seccomp-filter", "f", "--no-seccomp"],
            &[
                "--no-seccomp and --seccomp-filter exclude each other",
                "leave one out",
                help,
            ],
        ),
        (&["--id", "a", "--id", "b"], &["--id is given twice", help]),
        (&["--config-file"], &["--config-file", help]),
        (&["--nope"], &["unknown option --nope", help]),
        (&["-z"], &["unknown option -z", help]),
        (&["stray"], &["unexpected word \"stray\"", help]),
        (
            &["--console", "tty"],
            &[
                "\"tty\"",
                "expected stdio, file:PATH, unix:PATH or none",
                help,
            ],
        ),
        (
            &["--console", "file:"],
            &["\"file:\"", "expected stdio", help],
        ),
        (&["--level", "loud"], &["\"loud\"", "expected Off", help]),
        (
            &["--id", "a/b"],
            &["\"a/b\"", "letters, digits and hyphens", help],
        ),
    ] {
        bench.run_with(arguments).assert(USAGE, words);
    }
}

/// All are told before anything is opened for the guest, those of one file together.
#[test]
fn filters_that_cannot_be_used() {
    let bench = Bench::new(&power_off());
    let run = |path: &str, words: &[&str]| {
        let ended = bench.start(&["--seccomp-filter", path]).end();
        ended.assert(HOST, &[&["--seccomp-filter: ", path][..], words].concat());
        assert_eq!(ended.said.lines().count(), 1, "{ended:?}");
    };
    run("none", &["No such file", "is the path right?"]);
    run(".", &["Is a directory", "name a file in it"]);
    run("/dev/null", &["the file is empty", "seccompiler-bin"]);
    run(
        "/dev/zero",
        &["more than 100000 bytes", "is this the right file?"],
    );
    run("vm.json", &["nothing that seccompiler-bin has written"]);
    let program = filters::refuse(libc::SYS_openat, libc::SECCOMP_RET_TRAP);
    let good = filters::file(&filters::same_for_all(&program));
    bench.write("cut", &good[..good.len() - 3]);
    run("cut", &["ends within a filter", "is the file complete?"]);
    bench.write("long", &[&good[..], b"x"].concat());
    run(
        "long",
        &["1 bytes follow the last filter", "compile the file anew"],
    );
    let endless = vec![filters::allow()[0]; 4096];
    let (allow, none) = (filters::allow(), vec![]);
    bench.write(
        "wrong",
        &filters::file(&[("vmm", endless), ("main", allow), ("vcpu", none)]),
    );
    run(
        "wrong",
        &[
            "thread \"vmm\" has 4096 instructions, the limit is 4092; take rules out",
            "there is no thread \"main\"",
            "thread \"vcpu\" has no instruction",
            "there is no filter for thread \"api\"; write one",
        ],
    );
    bench.write(
        "invalid",
        &filters::file(&filters::only_for("vmm", &vec![0xff])),
    );
    run(
        "invalid",
        &[
            "the kernel does not take the filter of thread \"vmm\"",
            "Invalid argument",
            "compile it anew",
        ],
    );
}

#[test]
fn consoles_that_cannot_be_had() {
    if no_kvm("consoles_that_cannot_be_had") {
        return;
    }
    let bench = Bench::new(&power_off());
    let _taken = UnixListener::bind(bench.file("taken")).unwrap();
    let long = format!("unix:{}", "x".repeat(120));
    for (console, words) in [
        (
            "file:no/such/log",
            &["no/such/log", "No such file", "does its directory exist?"][..],
        ),
        (
            "file:.",
            &["console file .", "directory", "name a file in it"],
        ),
        (
            "unix:no/such/sock",
            &["no/such/sock", "No such file", "does its directory exist?"],
        ),
        (
            "unix:vm.json",
            &[
                "vm.json exists and is not a socket",
                "remove it or choose another path",
            ],
        ),
        (
            "unix:taken",
            &["taken belongs to a running process", "choose another path"],
        ),
        (
            &long,
            &["has 120 bytes", "takes 107", "choose a shorter directory"],
        ),
    ] {
        bench
            .start(&["--console", console])
            .end()
            .assert(HOST, words);
    }
}

/// What the guest says waits for who reads it, as far as a pipe has room; a reader that goes takes nothing away, and one that never
/// comes holds nobody up.
#[test]
fn a_console_in_a_pipe_that_nobody_reads_yet() {
    if no_kvm("a_console_in_a_pipe_that_nobody_reads_yet") {
        return;
    }
    let pipe = |bench: &Bench| {
        let mode = nix::sys::stat::Mode::S_IRWXU;
        nix::unistd::mkfifo(&bench.file("pipe"), mode).unwrap();
    };
    let bench = Bench::new(&up());
    pipe(&bench);
    let mut running = bench.start(&["--console", "file:pipe"]);
    let open_files = format!("/proc/{}/fd", running.id());
    let is_open = || {
        let mut all = fs::read_dir(&open_files).unwrap().flatten();
        all.any(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.ends_with("pipe")))
    };
    assert!(running.wait_until(is_open), "{}", running.said());
    let mut said = [0; 3];
    let mut reader = File::open(bench.file("pipe")).unwrap();
    reader.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"up\n");
    drop(reader);
    running.signal(SIGTERM);
    running.end().assert(143, &["ended by signal 15"]);

    // By the description, and more than a pipe takes: 64 KiB wait, the rest is dropped.
    // mov ecx, 100000; mov dx, 0x3f8; mov al, 'a'; out dx, al; loop to out
    let flood = b"\xb9\xa0\x86\x01\x00\x66\xba\xf8\x03\xb0\x61\xee\xe2\xfd";
    let bench = Bench::new(&[&flood[..], &power_off()].concat());
    pipe(&bench);
    let described = br#"{"boot-source": {"kernel_image_path": "kernel"},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 64}, "serial": {"serial_out_path": "pipe"}}"#;
    bench.write("vm.json", described);
    let arguments = ["--config-file", "vm.json", "--no-api"];
    bench.run_with(&arguments).assert(0, &["powered off"]);
}

#[test]
fn every_file_that_cannot_be_had_is_told_at_once() {
    let bench = Bench::new(&power_off());
    // The console is the description's.
    let described = |text: &str| {
        bench.write("vm.json", text.as_bytes());
        bench.run_with(&["--config-file", "vm.json", "--no-api"])
    };
    let missing = r#"{
        "boot-source": {"kernel_image_path": "no-kernel", "initrd_path": "no-initrd"},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 64},
        "drives": [{"drive_id": "a", "path_on_host": "no-disk", "is_root_device": true}],
        "logger": {"log_path": "none/log"}, "metrics": {"metrics_path": "none/metrics"},
        "serial": {"serial_out_path": "none/serial"}
    }"#;
    let files = [
        "no-kernel",
        "no-initrd",
        "no-disk",
        "none/log",
        "none/metrics",
        "none/serial",
    ];
    described(missing).assert(CONFIG, &files);
    // With rules that are broken; and alone.
    let broken = missing.replace("\"mem_size_mib\": 64", "\"mem_size_mib\": 1");
    let words = [
        "mem_size_mib is 1",
        "none/log",
        "none/metrics",
        "none/serial",
    ];
    described(&broken).assert(CONFIG, &words);
    let options = [
        "--log-path",
        "none/log",
        "--metrics-path",
        "none/metrics",
        "--console",
        "file:none/serial",
    ];
    let bench = Bench::new(&power_off());
    bench.start(&options).end().assert(HOST, &files[3..]);
    let api = [
        "--api-sock",
        "api",
        "--log-path",
        "none/log",
        "--metrics-path",
        "none/metrics",
    ];
    bench.run_with(&api).assert(HOST, &files[3..5]);
}

#[test]
fn a_console_socket_is_gone_at_the_end() {
    if no_kvm("a_console_socket_is_gone_at_the_end") {
        return;
    }
    let bench = Bench::new(&up());
    let mut running = bench.start(&["--console", "unix:sock"]);
    let path = bench.file("sock");
    assert!(running.wait_until(|| path.exists()), "{}", running.said());
    running.signal(SIGINT);
    running.end().assert(130, &["ended by signal 2"]);
    // A kernel that is refused after the console was opened leaves none either.
    bench.write("kernel", b"");
    bench
        .start(&["--console", "unix:sock"])
        .end()
        .assert(CONFIG, &["is empty"]);
}

#[test]
fn logs_and_counters_that_cannot_be_written() {
    if no_kvm("logs_and_counters_that_cannot_be_written") {
        return;
    }
    let bench = Bench::new(&power_off());
    nix::unistd::mkfifo(&bench.file("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (option, lost) in [
        ("--log-path", "log lines could not be written"),
        ("--metrics-path", "cannot write counters"),
    ] {
        for (path, words) in [
            (
                "no/such/file",
                ["No such file", "does its directory exist?"],
            ),
            (".", ["directory", "name a file in it"]),
        ] {
            bench
                .start(&["--console", "none", option, path])
                .end()
                .assert(HOST, &words);
        }
        // A pipe that nobody reads; then one that takes no more.
        let words = ["--console", "none", "--level", "Info", option, "pipe"];
        bench.start(&words).end().assert(0, &["powered off"]);
        let mut pipe = File::options()
            .read(true)
            .write(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(bench.file("pipe"))
            .unwrap();
        while pipe.write(b"x").is_ok() {}
        bench.start(&words).end().assert(0, &["powered off", lost]);
    }
    let full = [
        "--console",
        "none",
        "--log-path",
        "/dev/full",
        "--level",
        "Info",
    ];
    bench.start(&full).end().assert(
        0,
        &[
            "powered off",
            "log lines could not be written",
            "disk full?",
        ],
    );
    let full = ["--console", "none", "--metrics-path", "/dev/full"];
    bench
        .start(&full)
        .end()
        .assert(0, &["powered off", "cannot write counters: No space left"]);
    bench
        .start(&["--console", "file:/dev/full"])
        .end()
        .assert(0, &["powered off"]);
}

#[test]
fn standard_streams_that_are_closed_or_full() {
    if no_kvm("standard_streams_that_are_closed_or_full") {
        return;
    }
    let code = [print("hello\n"), power_off()].concat();
    for redirections in [
        "<&-",
        ">&-",
        "2>&-",
        "<&- >&- 2>&-",
        ">/dev/full 2>/dev/full",
    ] {
        let script = format!("exec \"$0\" \"$@\" {redirections}");
        let bench = Bench::new(&code).through(&["sh", "-c", &script]);
        let ended = bench.start(&[]).end();
        assert_eq!(ended.status.code(), Some(0), "{redirections}: {ended:?}");
        assert!(ended.left.is_empty(), "{ended:?}");
        bench.write("kernel", b"");
        let ended = bench.start(&[]).end();
        assert_eq!(
            ended.status.code(),
            Some(CONFIG),
            "{redirections}: {ended:?}"
        );
    }
}

// ---- the host ----

/// Whether this test may mount; says so loudly if it may not.
fn cannot_mount(test: &str) -> bool {
    let may = Command::new("unshare")
        .args(["-m", "true"])
        .status()
        .is_ok_and(|s| s.success());
    if !may {
        skipped(test, "a private mount namespace needs root");
    }
    !may
}

/// A bench whose program sees another `/dev/kvm`, made by `script`.
fn with_other_kvm(script: &str) -> Bench {
    let script = format!("set -e; {script}; exec \"$0\" \"$@\"");
    Bench::new(&power_off()).through(&["unshare", "-m", "sh", "-c", &script])
}

#[test]
fn no_kvm_or_not_for_us() {
    if cannot_mount("no_kvm_or_not_for_us") || no_kvm("no_kvm_or_not_for_us") {
        return;
    }
    let bench = with_other_kvm("mount -t tmpfs none /dev");
    bench
        .run()
        .assert(HOST, &["/dev/kvm does not exist", "modprobe", "tools/lab"]);
    let bench = with_other_kvm("mount --bind /dev/null /dev/kvm");
    bench.run().assert(
        HOST,
        &[
            "/dev/kvm",
            "no KVM this program knows",
            "another program's device",
        ],
    );
    let bench =
        with_other_kvm("touch file; mount --bind file /dev/kvm; rm file 2>/dev/null || true");
    let ended = bench.run();
    assert_eq!(ended.status.code(), Some(HOST), "{ended:?}");
    assert!(ended.said.contains("/dev/kvm"), "{ended:?}");

    let bench = as_nobody("chmod 600 kvm/kvm");
    bench
        .run()
        .assert(HOST, &["no permission to open /dev/kvm", "usermod -aG kvm"]);
}

/// A bench that runs the program without rights, on a `/dev/kvm` of its own, after `script`.
fn as_nobody(script: &str) -> Bench {
    let script = format!(
        "set -e; mount -t tmpfs none kvm; mknod -m 666 kvm/kvm c 10 232; {script}; \
         mount --bind kvm/kvm /dev/kvm; \
         exec setpriv --reuid 64321 --regid 64321 --clear-groups ./vmm \"$@\""
    );
    let bench = Bench::new(&power_off()).through(&["unshare", "-m", "sh", "-c", &script]);
    fs::create_dir(bench.file("kvm")).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_alveole-vmm"), bench.file("vmm")).unwrap();
    let all = fs::Permissions::from_mode(0o755);
    fs::set_permissions(bench.path(), all).unwrap();
    bench
}

#[test]
fn without_root_a_guest_runs_and_the_limit_on_processes_is_named() {
    let test = "without_root_a_guest_runs_and_the_limit_on_processes_is_named";
    if cannot_mount(test) || no_kvm(test) {
        return;
    }
    as_nobody("true").run().assert(0, &["powered off"]);
    for limit in 1..3 {
        let bench = as_nobody(&format!("prlimit --nproc={limit} --pid $$"));
        bench
            .run()
            .assert(HOST, &["cannot start the", "thread", "ulimit -u"]);
    }
}

#[test]
fn few_open_files_are_told() {
    if no_kvm("few_open_files_are_told") {
        return;
    }
    let mut enough = None;
    for limit in 3..40 {
        let bench = Bench::new(&power_off()).through(&["prlimit", &format!("--nofile={limit}")]);
        let ended = bench.run();
        assert!(ended.left.is_empty(), "{limit}: {ended:?}");
        match ended.status.code() {
            Some(0) => {
                enough = enough.or(Some(limit));
            }
            Some(HOST | CONFIG) => {
                assert!(enough.is_none(), "fails with more: {limit}: {ended:?}");
                assert!(
                    ended.said.contains("Too many open files"),
                    "{limit}: {ended:?}"
                );
                assert!(ended.said.contains("ulimit -n"), "{limit}: {ended:?}");
            }
            other => panic!("{limit}: {other:?} {ended:?}"),
        }
    }
    assert!(enough.is_some_and(|n| n > 5), "{enough:?}");
}

#[test]
fn little_address_space_is_told() {
    if no_kvm("little_address_space_is_told") {
        return;
    }
    let mut codes = Vec::new();
    // Those near the limit one by one: whoever meets it late can only abort.
    for mib in [24, 40, 64].into_iter().chain(70..100).chain([512]) {
        let limit = format!("--as={}", mib << 20);
        let bench = Bench::new(&power_off()).through(&["prlimit", &limit]);
        let ended = bench.run();
        ended.assert_orderly(&mib);
        let code = ended.status.code().unwrap();
        assert!(
            code == 0 || ended.said.contains("ulimit"),
            "{mib} MiB: {ended:?}"
        );
        codes.push(code);
    }
    assert_eq!(
        (codes.first(), codes.last()),
        (Some(&HOST), Some(&0)),
        "{codes:?}"
    );
}

// ---- terminals and signals ----

fn settings(terminal: &OwnedFd) -> Termios {
    tcgetattr(terminal).unwrap()
}

#[test]
fn a_vanished_terminal_ends_the_guest() {
    if no_kvm("a_vanished_terminal_ends_the_guest") {
        return;
    }
    // As a terminal on its descriptors only, then as the one that controls it.
    for wrapper in [&[][..], &["setsid", "--ctty"]] {
        let bench = Bench::new(&up());
        let bench = if wrapper.is_empty() {
            bench
        } else {
            bench.through(wrapper)
        };
        let (mut master, slave) = terminal();
        let running = start_on(&bench, &slave, &mut master);
        drop(slave);
        drop(master);
        let start = Instant::now();
        running.end().assert(156, &[]);
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "took {:?}",
            start.elapsed()
        );
    }
}

#[test]
fn every_signal_ends_it_and_gives_the_terminal_back() {
    if no_kvm("every_signal_ends_it_and_gives_the_terminal_back") {
        return;
    }
    type Case<'a> = (&'a [&'a str], &'a [Signal], i32);
    let ask = &["--on-sigterm", "power-button"][..];
    let signals: [Case<'_>; 7] = [
        (&[], &[SIGINT], 130),
        (&[], &[SIGHUP], 156),
        (&[], &[SIGQUIT], 131),
        (&[], &[SIGTERM], 143),
        (&["--on-sigterm", "end"], &[SIGTERM], 143),
        (ask, &[SIGTERM, SIGTERM], 143),
        (ask, &[SIGTERM, SIGINT], 130),
    ];
    for (options, sent, code) in signals {
        let bench = Bench::new(&up());
        let (mut master, slave) = terminal();
        let before = settings(&slave);
        let mut running = start_on_with(&bench, &slave, &mut master, options);
        assert_ne!(
            settings(&slave),
            before,
            "the terminal is raw while the guest runs"
        );
        for (at, signal) in sent.iter().enumerate() {
            if at > 0 {
                // The first SIGTERM only presses the power button; this guest does not look.
                assert!(
                    !running.ends_within(Duration::from_millis(200)),
                    "{}",
                    running.said()
                );
            }
            running.signal(*signal);
        }
        let ended = running.end();
        ended.assert(code, &["ended by signal"]);
        // Supervisors look at whether it died of the signal.
        let last = *sent.last().unwrap();
        let died = matches!(last, SIGTERM | SIGINT).then_some(last as i32);
        assert_eq!(ended.status.signal(), died, "after {sent:?}");
        assert_eq!(settings(&slave), before, "after {sent:?}");
    }
}

#[test]
fn the_terminal_is_given_back_after_errors_and_every_end() {
    if no_kvm("the_terminal_is_given_back_after_errors_and_every_end") {
        return;
    }
    let codes: [(&[u8], i32); 4] = [
        (&power_off(), 0),
        (&[0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe], 0), // mov al, 0xfe; out 0x64, al
        (&[0x0f, 0x0b], 5),                         // ud2
        (b"", CONFIG),
    ];
    for (code, want) in codes {
        let bench = Bench::new(code);
        if code.is_empty() {
            bench.write("kernel", b"");
        }
        let (_master, slave) = terminal();
        let before = settings(&slave);
        let mut command = bench.command(&["--config-file", "vm.json", "--no-api"]);
        let end = || Stdio::from(slave.try_clone().unwrap());
        command
            .stdin(end())
            .stdout(end())
            .env("RUST_BACKTRACE", "1");
        bench.start_command(command).end().assert(want, &[]);
        assert_eq!(settings(&slave), before, "after {want}");
    }
}

// ---- at random ----

/// SplitMix64: the same inputs in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as usize % sides
    }

    /// Changes, removes, doubles or cuts some bytes.
    fn spoil(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        for _ in 0..=self.roll(3) {
            let at = self.roll(bytes.len().max(1)).min(bytes.len());
            match self.roll(6) {
                0 => bytes.truncate(at),
                1 => bytes.insert(at, self.roll(256) as u8),
                2 => bytes.insert(at, b"\"{}[],:-0"[self.roll(9)]),
                3 => drop(bytes.drain(at..(at + self.roll(8)).min(bytes.len()))),
                4 => bytes.extend_from_within(at..),
                _ => {
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte = [0, 1, 0x7f, 0xff, self.roll(256) as u8][self.roll(5)];
                    }
                }
            }
        }
        bytes
    }
}

/// Time for one kind of random input.
const RANDOM_TIME: Duration = Duration::from_secs(20);

#[test]
fn random_descriptions_never_crash_it() {
    let bench = Bench::new(&power_off());
    let whole = br#"{"boot-source": {"kernel_image_path": "kernel", "boot_args": "quiet"},
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 65, "smt": false}, "drives": [],
        "logger": {"log_path": "/dev/null", "level": "Info", "module": null},
        "metrics": {"metrics_path": "/dev/null"}, "serial": {"serial_out_path": "/dev/null"}}"#;
    let until = Instant::now() + RANDOM_TIME;
    let mut dice = Dice(1);
    for _ in 0..300 {
        let text = dice.spoil(whole);
        let ended = bench.run_text(&text);
        ended.assert_orderly(&String::from_utf8_lossy(&text));
        // A spoilt path may name a new file: not litter, but what was asked for.
        for file in &ended.left {
            fs::remove_file(bench.file(file)).unwrap();
        }
        if Instant::now() > until {
            break;
        }
    }
}

#[test]
fn random_kernels_never_crash_it() {
    if no_kvm("random_kernels_never_crash_it") {
        return;
    }
    let bench = Bench::new(&power_off());
    let whole = fs::read(bench.file("kernel")).unwrap();
    let (head, body) = whole.split_at(0x78);
    let until = Instant::now() + RANDOM_TIME;
    let mut dice = Dice(2);
    for _ in 0..300 {
        let mut file = dice.spoil(head);
        match dice.roll(8) {
            0 => {}
            1 => file.extend(dice.spoil(body)),
            _ => file.extend_from_slice(body),
        }
        bench.write("kernel", &file);
        let ended = run_for_a_while(&bench);
        ended.assert_orderly(&&file[..file.len().min(0x78)]);
        assert!(ended.left.is_empty(), "{ended:?}");
        if Instant::now() > until {
            break;
        }
    }
}

/// Guest code that is random may run for ever: then it is ended.
fn run_for_a_while(bench: &Bench) -> Ended {
    let mut running = bench.start(&["--console", "none"]);
    if !running.ends_within(Duration::from_millis(300)) {
        running.signal(SIGTERM);
    }
    running.end()
}

#[test]
fn disks_that_cannot_be_used_are_refused_by_name_and_cause() {
    let bench = Bench::new(&power_off());
    let file = |name: &str, bytes: &[u8]| std::fs::write(bench.file(name), bytes).unwrap();
    file("empty.img", b"");
    file("good.img", &[0; 4096]);
    file("garbage.qcow2", &[0x55; 4096]);
    file("short.qcow2", b"QFI\xfb\0\0\0\x03");
    std::fs::create_dir(bench.file("folder")).unwrap();
    nix::unistd::mkfifo(&bench.file("disk-pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (path, words) in [
        (
            "missing.img",
            &["drive \"d\"", "missing.img", "No such file"][..],
        ),
        ("folder", &["folder", "directory"]),
        ("disk-pipe", &["disk-pipe", "name a file or a block device"]),
        ("/dev/null", &["/dev/null", "name a file or a block device"]),
        ("empty.img", &["empty.img", "empty"]),
        ("garbage.qcow2", &["garbage.qcow2"]),
        ("short.qcow2", &["short.qcow2"]),
    ] {
        let drive =
            serde_json::json!({"drive_id": "d", "path_on_host": path, "is_root_device": false});
        let text = format!(
            "{{\"drives\": [{drive}],{}",
            boot("").strip_prefix('{').unwrap()
        );
        bench.run_text(text.as_bytes()).assert(CONFIG, words);
    }
    let drive = |id: &str| serde_json::json!({"drive_id": id, "path_on_host": "good.img", "is_root_device": true});
    let text = format!(
        "{{\"drives\": [{},{}],{}",
        drive("d"),
        drive("d"),
        boot("").strip_prefix('{').unwrap()
    );
    let both = ["\"d\" is given to two drives", "are both the root device"];
    bench.run_text(text.as_bytes()).assert(CONFIG, &both);
}

/// The description of a guest with one disk.
fn with_drive(more: &serde_json::Value) -> Vec<u8> {
    let mut drive = serde_json::json!({"drive_id": "d", "is_root_device": false});
    for (key, value) in more.as_object().unwrap() {
        drive[key] = value.clone();
    }
    format!(
        "{{\"drives\": [{drive}],{}",
        boot("").strip_prefix('{').unwrap()
    )
    .into_bytes()
}

#[test]
fn an_image_over_files_elsewhere_needs_a_word() {
    let test = "an_image_over_files_elsewhere_needs_a_word";
    let bench = Bench::new(&power_off());
    let elsewhere = tempfile::tempdir().unwrap();
    let base = elsewhere.path().join("base.raw");
    tools::create_raw(&base, 1 << 20).unwrap();
    tools::create_overlay(&bench.file("far.qcow2"), &base, Format::Raw).unwrap();
    for more in [
        serde_json::json!({"path_on_host": "far.qcow2"}),
        serde_json::json!({"path_on_host": "far.qcow2", "backing": "beside"}),
    ] {
        let base = base.to_str().unwrap();
        let words = ["far.qcow2", base, "outside of", "backing=anywhere"];
        bench.run_text(&with_drive(&more)).assert(CONFIG, &words);
    }
    // Said where it has no meaning, or wrongly.
    File::create(bench.file("flat.img"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let flat = serde_json::json!({"path_on_host": "flat.img", "backing": "anywhere"});
    let words = ["\"d\" has \"backing\"", "laid over nothing", "remove it"];
    bench.run_text(&with_drive(&flat)).assert(CONFIG, &words);
    let odd = serde_json::json!({"path_on_host": "far.qcow2", "backing": "/srv"});
    let words = ["drives[0].backing", "\"beside\", \"anywhere\"", "\"/srv\""];
    bench.run_text(&with_drive(&odd)).assert(CONFIG, &words);
    if no_kvm(test) {
        return;
    }
    let trusted = serde_json::json!({"path_on_host": "far.qcow2", "backing": "anywhere"});
    bench
        .run_text(&with_drive(&trusted))
        .assert(0, &["powered off"]);
}

#[test]
fn images_that_cannot_be_laid_over_their_base_say_why() {
    let bench = Bench::new(&power_off());
    let at = |name: &str| bench.file(name);
    tools::create_raw(&at("base.raw"), 1 << 20).unwrap();
    tools::create_overlay(&at("gone.qcow2"), &at("base.raw"), Format::Raw).unwrap();
    std::fs::remove_file(at("base.raw")).unwrap();
    // One that is laid over another, which then becomes the first.
    tools::create_qcow2(&at("b.qcow2"), 1 << 20, 16).unwrap();
    tools::create_overlay(&at("a.qcow2"), &at("b.qcow2"), Format::Qcow2).unwrap();
    std::fs::rename(at("a.qcow2"), at("b.qcow2")).unwrap();
    for (name, words) in [
        ("gone.qcow2", ["base.raw", "there is no", "bring it back"]),
        ("b.qcow2", ["b.qcow2", "a circle", "in this chain already"]),
    ] {
        let drive = serde_json::json!({"path_on_host": name});
        bench.run_text(&with_drive(&drive)).assert(CONFIG, &words);
    }
}

#[test]
fn an_image_in_use_is_refused_with_its_users_pid() {
    let bench = Bench::new(&power_off());
    tools::create_raw(&bench.file("disk.img"), 1 << 20).unwrap();
    let held = open(&bench.file("disk.img"), &OpenOptions::default()).unwrap();
    let pid = format!("process {} (", std::process::id());
    for read_only in [false, true] {
        let drive = serde_json::json!({"path_on_host": "disk.img", "is_read_only": read_only});
        let words = ["cannot lock", "disk.img", &pid, "open to write"];
        bench.run_text(&with_drive(&drive)).assert(CONFIG, &words);
    }
    drop(held);
    if no_kvm("an_image_in_use_is_refused_with_its_users_pid") {
        return;
    }
    let drive = serde_json::json!({"path_on_host": "disk.img"});
    bench
        .run_text(&with_drive(&drive))
        .assert(0, &["powered off"]);
}
