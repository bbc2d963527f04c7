//! What is read, and every message.

use std::path::PathBuf;

use proptest::prelude::*;

use crate::*;

fn read(text: &str) -> Result<VmConfig, ConfigError> {
    VmConfig::from_json(text, "vm.json")
}

/// The message about a description that must be wrong.
fn told(text: &str) -> String {
    read(text).unwrap_err().to_string()
}

/// A description whose lines from the third on are `lines`.
fn with(lines: &str) -> String {
    format!("{{\n  \"boot-source\": {{ \"kernel_image_path\": \"vmlinux\" }},\n{lines}\n}}")
}

/// A description whose `machine-config` has `fields` in the fourth line, from column 5.
fn machine(fields: &str) -> String {
    with(&format!(
        "  \"machine-config\": {{ \"vcpu_count\": 2, \"mem_size_mib\": 256,\n    {fields}\n  }}"
    ))
}

#[test]
fn firecrackers_own_file_is_read() {
    let config = read(
        r#"{
          "boot-source": {
            "kernel_image_path": "vmlinux.bin",
            "boot_args": "console=ttyS0 reboot=k panic=1",
            "initrd_path": null
          },
          "drives": [
            {
              "drive_id": "rootfs",
              "partuuid": null,
              "is_root_device": true,
              "cache_type": "Unsafe",
              "is_read_only": false,
              "path_on_host": "ubuntu-24.04.ext4",
              "io_engine": "Sync",
              "rate_limiter": {
                "bandwidth": { "size": 1000, "one_time_burst": 0, "refill_time": 100 },
                "ops": null
              },
              "socket": null
            }
          ],
          "machine-config": {
            "vcpu_count": 2,
            "mem_size_mib": 1024,
            "smt": false,
            "track_dirty_pages": false,
            "huge_pages": "None",
            "cpu_template": null
          },
          "cpu-config": null,
          "balloon": null,
          "network-interfaces": [
            { "iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:ac:10:00:02", "mtu": 9000,
              "tx_rate_limiter": { "ops": { "size": 10, "refill_time": 1 } } }
          ],
          "vsock": { "guest_cid": 3, "uds_path": "./v.sock", "vsock_id": "1" },
          "logger": { "log_path": "/tmp/log", "level": "WARN", "show_level": true, "module": null },
          "metrics": { "metrics_path": "m.fifo", "emit_id": false },
          "mmds-config": { "network_interfaces": ["eth0"], "version": "V2", "ipv4_address": "169.254.7.7" },
          "entropy": { "rate_limiter": null },
          "pmem": [],
          "memory-hotplug": null,
          "serial": { "serial_out_path": "out", "rate_limiter": null }
        }"#,
    )
    .unwrap();
    assert_eq!(
        config,
        VmConfig {
            boot_source: BootSource {
                kernel_image_path: "vmlinux.bin".into(),
                initrd_path: None,
                boot_args: Some("console=ttyS0 reboot=k panic=1".into()),
            },
            machine_config: MachineConfig {
                vcpu_count: 2,
                mem_size_mib: 1024,
                ..MachineConfig::default()
            },
            logger: Some(Logger {
                log_path: Some("/tmp/log".into()),
                level: Some(LogLevel::Warning),
                show_level: Some(true),
                ..Logger::default()
            }),
            metrics: Some(Metrics {
                metrics_path: "m.fifo".into(),
            }),
            serial: Some(Serial {
                serial_out_path: Some("out".into()),
            }),
            drives: vec![Drive {
                drive_id: "rootfs".into(),
                path_on_host: "ubuntu-24.04.ext4".into(),
                is_root_device: true,
                io_engine: Some(IoEngine::Sync),
                rate_limiter: Some(RateLimiter {
                    bandwidth: Some(TokenBucket {
                        size: 1000,
                        one_time_burst: Some(0),
                        refill_time: 100,
                    }),
                    ops: None,
                }),
                ..Drive::default()
            }],
            network_interfaces: vec![NetworkInterface {
                iface_id: "eth0".into(),
                host_dev_name: "tap0".into(),
                guest_mac: Some("06:00:ac:10:00:02".into()),
                mtu: Some(9000),
                tx_rate_limiter: Some(RateLimiter {
                    bandwidth: None,
                    ops: Some(TokenBucket {
                        size: 10,
                        one_time_burst: None,
                        refill_time: 1,
                    }),
                }),
                ..NetworkInterface::default()
            }],
            vsock: Some(Vsock {
                guest_cid: 3,
                uds_path: "./v.sock".into(),
                vsock_id: Some("1".into()),
            }),
            entropy: Some(Entropy::default()),
            mmds_config: Some(MmdsConfig {
                version: MmdsVersion::V2,
                network_interfaces: vec!["eth0".into()],
                ipv4_address: Some(std::net::Ipv4Addr::new(169, 254, 7, 7)),
                imds_compat: false,
            }),
            cpu_config: None,
        }
    );
}

#[test]
fn a_cpu_config_is_there_or_in_a_file() {
    let cpu =
        |value: &str| read(&with(&format!("  \"cpu-config\": {value}"))).map(|c| c.cpu_config);
    assert_eq!(cpu("null"), Ok(None));
    let empty = CpuConfigSource::Here(CpuConfig::default());
    assert_eq!(cpu("{}"), Ok(Some(empty)));
    let file = CpuConfigSource::File("t2.json".into());
    assert_eq!(cpu("\"t2.json\""), Ok(Some(file)));
    for (value, part) in [
        (
            "[]",
            "vm.json:3:17: \"cpu-config\": expected an object, found an array",
        ),
        (
            "7",
            "\"cpu-config\": expected an object, found the number 7",
        ),
        (
            "{ \"msrs\": [] }",
            "vm.json:3:19: \"cpu-config\": unknown field \"msrs\"; known are: kvm_capabilities, cpuid_modifiers, \
             msr_modifiers",
        ),
        (
            "{ \"msr_modifiers\": [{ \"addr\": \"x\" }] }",
            "\"cpu-config.msr_modifiers[0].bitmap\": this field is required",
        ),
    ] {
        let why = cpu(value).unwrap_err().to_string();
        assert!(why.contains(part), "{part}\nin\n{why}");
    }
}

#[test]
fn mistakes_in_a_vsock_device_are_told() {
    let message = told(&with("  \"vsock\": {\"guest_cid\": -3, \"path\": \"x\"}"));
    for part in [
        "\"vsock.guest_cid\": expected a whole number",
        "\"vsock.uds_path\": this field is required and missing; add it",
        "\"vsock\": unknown field \"path\"; known are: guest_cid, uds_path, vsock_id",
    ] {
        assert!(message.contains(part), "{part}\nin\n{message}");
    }
    assert_eq!(read(&with("  \"vsock\": null")).unwrap().vsock, None);
}

#[test]
fn mistakes_in_a_drive_are_told_with_its_place_in_the_list() {
    let message = told(&with(
        "  \"drives\": [\n    {\"drive_id\": \"a\", \"path_on_host\": \"x\", \"is_root_device\": true},\n    \
         {\"drive_id\": \"b\", \"cache_type\": \"Fast\", \"socket\": \"s\", \"is_root_device\": 1},\n    7]",
    ));
    let lines: Vec<_> = message.lines().collect();
    for part in [
        "vm.json:5:5: \"drives[1].path_on_host\": this field is required and missing; add it",
        "vm.json:5:37: \"drives[1].cache_type\": expected one of \"Unsafe\", \"Writeback\", \"Direct\", found the \
         string \"Fast\"",
        "\"drives[1].socket\": disks served over vhost-user are not built yet; remove the key to start without it",
        "\"drives[1].is_root_device\": expected true or false, found the number 1",
        "vm.json:6:5: \"drives[2]\": expected an object, found the number 7",
    ] {
        assert!(
            lines.iter().any(|l| l.contains(part)),
            "{part}\nin\n{message}"
        );
    }
    assert_eq!(lines.len(), 5);
    assert_eq!(
        told(&with("  \"drives\": {}")),
        "vm.json:3:13: \"drives\": expected an array, found an object"
    );
}

#[test]
fn what_is_absent_is_as_firecracker_has_it() {
    let text = r#"{ "boot-source": { "kernel_image_path": "k" }, "machine-config": null }"#;
    let config = read(text).unwrap();
    let MachineConfig {
        vcpu_count,
        mem_size_mib,
        smt,
        track_dirty_pages,
        cpu_template,
        huge_pages,
    } = config.machine_config;
    assert_eq!((vcpu_count, mem_size_mib), (1, 128));
    assert_eq!((smt, track_dirty_pages), (false, false));
    assert_eq!(cpu_template, None);
    assert_eq!(huge_pages, HugePages::None);
    assert_eq!(
        (config.logger, config.metrics, config.serial),
        (None, None, None)
    );
}

#[test]
fn a_device_that_is_not_built_is_named() {
    for (key, what) in [
        ("balloon", "the balloon device is"),
        ("pmem", "persistent memory devices are"),
        ("memory-hotplug", "memory hotplug is"),
    ] {
        for value in ["{}", "[{}]", "\"x\"", "false"] {
            assert_eq!(
                told(&with(&format!("  \"{key}\": {value}"))),
                format!(
                    "vm.json:3:3: \"{key}\": {what} not built yet; remove the key to start without it"
                )
            );
        }
        for value in ["null", "[]", "[\n]"] {
            assert!(read(&with(&format!("  \"{key}\": {value}"))).is_ok());
        }
    }
}

#[test]
fn each_wrong_value_has_its_message() {
    for (text, message) in [
        (
            machine("\"smt\": true"),
            "4:12: \"machine-config.smt\": true cannot be had: the guest sees one thread per core; \
             threads that share a core are not built yet; set it to false",
        ),
        (
            machine("\"cpu_template\": \"V1N1\""),
            "4:21: \"machine-config.cpu_template\": \"V1N1\" cannot be had: it is for aarch64, and this is \
             x86-64; leave it out",
        ),
        (
            machine("\"cpu_template\": \"T9\""),
            "4:21: \"machine-config.cpu_template\": the string \"T9\" is no CPU template; known \
             are None, C3, T2, T2S, T2CL, T2A",
        ),
        (
            machine("\"huge_pages\": \"4M\""),
            "4:19: \"machine-config.huge_pages\": the string \"4M\" is no kind of huge pages; known are None, \
             Transparent, 2M",
        ),
        (
            machine("\"huge_pages\": null"),
            "4:19: \"machine-config.huge_pages\": expected a string, found null",
        ),
        (
            machine("\"smt\": \"yes\""),
            "4:12: \"machine-config.smt\": expected true or false, found the string \"yes\"",
        ),
        (
            with("  \"machine-config\": { \"vcpu_count\": -1, \"mem_size_mib\": 1 }"),
            "3:37: \"machine-config.vcpu_count\": expected a whole number from 0 to 255, found the \
             number -1",
        ),
        (
            with("  \"machine-config\": { \"vcpu_count\": 1, \"mem_size_mib\": 1.5 }"),
            "3:56: \"machine-config.mem_size_mib\": expected a whole number from 0 up, found the \
             number 1.5",
        ),
        (
            with("  \"machine-config\": { \"vcpu_count\": 1 }"),
            "3:21: \"machine-config.mem_size_mib\": this field is required and missing; add it",
        ),
        (
            with("  \"machine-config\": [1]"),
            "3:21: \"machine-config\": expected an object, found an array",
        ),
        (
            with("  \"logger\": { \"level\": \"loud\" }"),
            "3:24: \"logger.level\": expected one of Off, Error, Warning, Info, Debug, Trace, found \
             the string \"loud\"",
        ),
        (
            with("  \"logger\": { \"log_path\": { \"a\": 1 } }"),
            "3:27: \"logger.log_path\": expected a string with a path on the host, found an object",
        ),
        (
            with("  \"metrics\": {}"),
            "3:14: \"metrics.metrics_path\": this field is required and missing; add it",
        ),
        (
            with("  \"metrics\": { \"metrics_path\": \"m\", \"emit_id\": true }"),
            "3:48: \"metrics.emit_id\": true cannot be had: metrics that carry the id of the VM are \
             not built yet; set it to false",
        ),
        (
            with("  \"metrics\": { \"metrics_path\": \"m\", \"properties\": { \"a\": \"b\" } }"),
            "3:37: \"metrics.properties\": metrics with properties of your own are not built yet; \
             remove the key to start without it",
        ),
        (
            with("  \"serial\": { \"rate_limiter\": { \"size\": 1, \"refill_time\": 1 } }"),
            "3:15: \"serial.rate_limiter\": rate limiters are not built yet; remove the key to start \
             without it",
        ),
        (
            "{}".to_owned(),
            "1:1: \"boot-source\": this field is required and missing; add it",
        ),
        (
            "{ \"boot-source\": null }".to_owned(),
            "1:1: \"boot-source\": this field is required and missing; add it",
        ),
        (
            "{ \"boot-source\": 7 }".to_owned(),
            "1:18: \"boot-source\": expected an object, found the number 7",
        ),
        ("[]".to_owned(), "1:1: expected an object, found an array"),
    ] {
        assert_eq!(told(&text), format!("vm.json:{message}"));
    }
}

#[test]
fn an_unknown_field_is_told_with_the_nearest_known_one() {
    assert_eq!(
        told(&machine("\"vcpu_cout\": 2")),
        "vm.json:4:5: \"machine-config\": unknown field \"vcpu_cout\"; did you mean \"vcpu_count\"? \
         known are: vcpu_count, mem_size_mib, smt, track_dirty_pages, cpu_template, huge_pages"
    );
    assert_eq!(
        told(&machine("\"ht_enabled\": false")),
        "vm.json:4:5: \"machine-config\": unknown field \"ht_enabled\"; known are: vcpu_count, \
         mem_size_mib, smt, track_dirty_pages, cpu_template, huge_pages"
    );
    for (wrong, near) in [
        ("boot_source", "boot-source"),
        ("Drives", "drives"),
        ("network-interface", "network-interfaces"),
        ("machine-confg", "machine-config"),
    ] {
        let message = told(&with(&format!("  \"{wrong}\": []")));
        let start =
            format!("vm.json:3:3: unknown field \"{wrong}\"; did you mean \"{near}\"? known");
        assert!(message.starts_with(&start), "{message}");
    }
}

/// The crate fctools writes its own names for what a machine does not have.
#[test]
fn an_unknown_field_that_says_nothing_is_passed_over() {
    let text = |value: &str| {
        format!(
            r#"{{"boot-source": {{"kernel_image_path": "k"}}, "vsock_device": {value}, "mmds-config": null}}"#
        )
    };
    let config = read(&text("null")).unwrap();
    assert_eq!((config.vsock, config.mmds_config), (None, None));
    assert!(told(&text("{}")).contains("unknown field \"vsock_device\""));
}

#[test]
fn a_field_given_twice_is_refused() {
    assert_eq!(
        told(&with(
            "  \"drives\": [],\n  \"serial\": null,\n  \"drives\": []"
        )),
        "vm.json:5:3: \"drives\": given twice, first in line 3; remove one"
    );
    assert_eq!(
        told(&machine("\"smt\": false, \"sm\\u0074\": false")),
        "vm.json:4:19: \"machine-config.smt\": given twice, first in line 4; remove one"
    );
}

#[test]
fn everything_that_is_wrong_is_listed_in_the_order_of_the_text() {
    let text = r#"{
  "pmem": [{}],
  "boot-source": { "boot_args": 3 },
  "machine-config": {
    "vcpu_count": "two",
    "mem_size_mb": 128,
    "smt": true
  },
  "vsokc": {}
}"#;
    let Err(ConfigError::Wrong(problems)) = read(text) else {
        panic!("it is wrong");
    };
    let places: Vec<_> = problems
        .listed()
        .iter()
        .map(|p| (p.line, p.column, p.field.as_str()))
        .collect();
    assert_eq!(
        places,
        [
            (2, 3, "pmem"),
            (3, 18, "boot-source.kernel_image_path"),
            (3, 33, "boot-source.boot_args"),
            (4, 21, "machine-config.mem_size_mib"),
            (5, 19, "machine-config.vcpu_count"),
            (6, 5, "machine-config"),
            (7, 12, "machine-config.smt"),
            (9, 3, ""),
        ]
    );
    assert_eq!(problems.to_string().lines().count(), 8);
}

#[test]
fn what_is_no_json_is_told_with_its_place() {
    for (text, message) in [
        (
            "",
            "vm.json: the machine description is empty; it needs at least {\"boot-source\": \
              {\"kernel_image_path\": \"...\"}}",
        ),
        (
            " \n\t",
            "vm.json: the machine description is empty; it needs at least {\"boot-source\": \
                  {\"kernel_image_path\": \"...\"}}",
        ),
        ("{} x", "vm.json:1:4: this is not JSON: trailing characters"),
        (
            "{\n  \"a\": 1,\n}",
            "vm.json:3:1: this is not JSON: trailing comma",
        ),
        (
            "{\n  \"a\": [1, ]\n}",
            "vm.json:2:12: this is not JSON: trailing comma",
        ),
        (
            "{ 'a': 1 }",
            "vm.json:1:3: this is not JSON: key must be a string",
        ),
        (
            "{ \"a\": 1",
            "vm.json:1:8: this is not JSON: EOF while parsing an object",
        ),
    ] {
        assert_eq!(told(text), message);
    }
    assert_eq!(
        VmConfig::from_json_bytes(b"{\n \"\xff\": 1}", "vm.json")
            .unwrap_err()
            .to_string(),
        "vm.json:2:3: this is not UTF-8 text from here on"
    );
    let long = " ".repeat(MAX_SIZE_BYTES + 1);
    assert_eq!(
        told(&long),
        "vm.json: cannot read a machine description of 1048577 bytes; the limit is 1048576: is this \
         the right file?"
    );
}

#[test]
fn hostile_files_are_refused_soon_and_in_few_words() {
    let nested = "[".repeat(MAX_SIZE_BYTES / 2) + &"]".repeat(MAX_SIZE_BYTES / 2);
    assert_eq!(
        told(&nested),
        "vm.json:1:1: expected an object, found an array"
    );
    let nested = &nested[MAX_SIZE_BYTES / 4..MAX_SIZE_BYTES / 4 * 3];
    let message = told(&with(&format!("  \"pmem\": {nested}")));
    let deep = told(&with(&format!("  \"drives\": {nested}")));
    assert!(deep.contains("\"drives[0]\": expected an object"), "{deep}");
    assert!(
        message.starts_with("vm.json:3:3: \"pmem\": persistent"),
        "{message}"
    );

    let fields: Vec<String> = (0..80_000).map(|at| format!("\"k{at}\":1")).collect();
    let message = told(&format!("{{{}}}", fields.join(",")));
    assert_eq!(message.lines().count(), MAX_PROBLEMS + 1);
    assert!(message.ends_with("\nvm.json: and 79969 more"), "{message}");

    let same = vec!["\"k\":1"; 150_000].join(",");
    assert!(told(&format!("{{{same}}}")).len() < 10_000);

    let long = "x".repeat(MAX_SIZE_BYTES / 2);
    assert!(told(&with(&format!("  \"{long}\": \"{long}\""))).len() < 1000);
    assert!(told(&with(&format!("  \"serial\": \"{long}\""))).len() < 1000);
    assert!(
        told(&with("  \"\\ud800\": 1, \"\\u001b[31m\": 1")).contains("is no text: \"\\ud800\"")
    );
    assert!(!told(&with("  \"\\u001b[31m\": 1")).contains('\u{1b}'));
}

#[test]
fn levels_are_read_without_regard_to_case() {
    for (name, level) in [
        ("off", LogLevel::Off),
        ("Error", LogLevel::Error),
        ("WARNING", LogLevel::Warning),
        ("Warn", LogLevel::Warning),
        ("iNfO", LogLevel::Info),
        ("DEBUG", LogLevel::Debug),
        ("Trace", LogLevel::Trace),
    ] {
        let config = read(&with(&format!("  \"logger\": {{ \"level\": \"{name}\" }}"))).unwrap();
        assert_eq!(config.logger.and_then(|l| l.level), Some(level));
    }
}

fn path() -> impl Strategy<Value = PathBuf> {
    any::<String>().prop_map(PathBuf::from)
}

fn level() -> impl Strategy<Value = LogLevel> {
    use LogLevel::{Debug, Error, Info, Off, Trace, Warning};
    prop::sample::select(vec![Off, Error, Warning, Info, Debug, Trace])
}

prop_compose! {
    fn logger()(
        log_path in prop::option::of(path()),
        level in prop::option::of(level()),
        show_level in any::<Option<bool>>(),
        show_log_origin in any::<Option<bool>>(),
        module in any::<Option<String>>(),
    ) -> Logger {
        Logger { log_path, level, show_level, show_log_origin, module }
    }
}

fn bucket() -> impl Strategy<Value = TokenBucket> {
    (any::<u64>(), any::<Option<u64>>(), any::<u64>()).prop_map(
        |(size, one_time_burst, refill_time)| TokenBucket {
            size,
            one_time_burst,
            refill_time,
        },
    )
}

prop_compose! {
    fn limiter()(
        bandwidth in prop::option::of(bucket()),
        ops in prop::option::of(bucket()),
    ) -> RateLimiter {
        RateLimiter { bandwidth, ops }
    }
}

prop_compose! {
    fn drive()(
        drive_id in any::<String>(),
        path_on_host in path(),
        is_root_device in any::<bool>(),
        partuuid in any::<Option<String>>(),
        is_read_only in any::<bool>(),
        cache_type in prop::sample::select(vec![CacheType::Unsafe, CacheType::Writeback, CacheType::Direct]),
        io_engine in prop::sample::select(vec![None, Some(IoEngine::Sync), Some(IoEngine::Async)]),
        rate_limiter in prop::option::of(limiter()),
        format in prop::sample::select(vec![None, Some(DiskFormat::Raw), Some(DiskFormat::Qcow2)]),
        backing in prop::sample::select(vec![
            None, Some(BackingPlace::Beside), Some(BackingPlace::Anywhere),
        ]),
        num_queues in any::<Option<u64>>(),
        serial in any::<Option<String>>(),
    ) -> Drive {
        Drive {
            drive_id, path_on_host, is_root_device, partuuid, is_read_only, cache_type, io_engine,
            rate_limiter, format, backing, num_queues, serial,
        }
    }
}

prop_compose! {
    fn egress()(
        default in prop::sample::select(vec![EgressDefault::Open, EgressDefault::Closed]),
        [rules, host, guests, resolvers] in prop::array::uniform4(prop::collection::vec(any::<String>(), 0..3)),
    ) -> Egress {
        Egress { rules, default, host, guests, resolvers }
    }
}

prop_compose! {
    fn interface()(
        iface_id in any::<String>(),
        host_dev_name in any::<String>(),
        link in prop::sample::select(vec![
            LinkKind::Tap, LinkKind::Macvtap, LinkKind::Fd, LinkKind::Stream,
        ]),
        guest_mac in any::<Option<String>>(),
        mtu in any::<Option<u64>>(),
        rx_rate_limiter in prop::option::of(limiter()),
        tx_rate_limiter in prop::option::of(limiter()),
        num_queue_pairs in any::<Option<u64>>(),
        anti_spoofing in any::<bool>(),
        vhost in any::<bool>(),
        vhost_fds in any::<Option<String>>(),
        egress in prop::option::of(egress()),
    ) -> NetworkInterface {
        NetworkInterface {
            iface_id, host_dev_name, link, guest_mac, mtu, rx_rate_limiter, tx_rate_limiter,
            num_queue_pairs, anti_spoofing, vhost, vhost_fds, egress,
        }
    }
}

fn cpu_config() -> impl Strategy<Value = CpuConfigSource> {
    prop_oneof![
        crate::cpu::tests::any_cpu_config().prop_map(CpuConfigSource::Here),
        path().prop_map(CpuConfigSource::File),
    ]
}

fn template() -> impl Strategy<Value = CpuTemplate> {
    use CpuTemplate::{C3, T2, T2A, T2CL, T2S};
    prop::sample::select(vec![CpuTemplate::None, C3, T2, T2S, T2CL, T2A])
}

prop_compose! {
    fn config()(
        kernel_image_path in path(),
        initrd_path in prop::option::of(path()),
        boot_args in any::<Option<String>>(),
        vcpu_count in any::<u8>(),
        mem_size_mib in any::<u64>(),
        cpu_template in prop::option::of(template()),
        logger in prop::option::of(logger()),
        metrics in prop::option::of(path()),
        serial in prop::option::of(prop::option::of(path())),
        drives in prop::collection::vec(drive(), 0..3),
        network_interfaces in prop::collection::vec(interface(), 0..3),
        vsock in prop::option::of((any::<u64>(), path(), prop::option::of(".*"))),
        entropy in prop::option::of(prop::option::of(limiter())),
        cpu_config in prop::option::of(cpu_config()),
        mmds in prop::option::of((any::<bool>(), prop::collection::vec(".*", 0..3), prop::option::of(any::<[u8; 4]>()), any::<bool>())),
    ) -> VmConfig {
        VmConfig {
            boot_source: BootSource { kernel_image_path, initrd_path, boot_args },
            machine_config: MachineConfig { vcpu_count, mem_size_mib, cpu_template, ..MachineConfig::default() },
            logger,
            metrics: metrics.map(|metrics_path| Metrics { metrics_path }),
            serial: serial.map(|serial_out_path| Serial { serial_out_path }),
            drives,
            network_interfaces,
            vsock: vsock.map(|(guest_cid, uds_path, vsock_id)| Vsock { guest_cid, uds_path, vsock_id }),
            entropy: entropy.map(|rate_limiter| Entropy { rate_limiter }),
            mmds_config: mmds.map(|(is_new, network_interfaces, address, imds_compat)| MmdsConfig {
                version: if is_new { MmdsVersion::V2 } else { MmdsVersion::V1 },
                network_interfaces,
                ipv4_address: address.map(Into::into),
                imds_compat,
            }),
            cpu_config,
        }
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(config in config()) {
        let text = serde_json::to_string_pretty(&config).unwrap();
        prop_assert_eq!(read(&text), Ok(config));
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = VmConfig::from_json_bytes(&bytes, "vm.json");
    }

    #[test]
    fn no_damage_to_a_description_makes_it_panic(
        config in config(),
        at in any::<prop::sample::Index>(),
        with in any::<char>(),
    ) {
        let mut text: Vec<char> = serde_json::to_string(&config).unwrap().chars().collect();
        let at = at.index(text.len());
        text[at] = with;
        let text: String = text.into_iter().collect();
        if let Err(e) = read(&text) {
            prop_assert!(!e.to_string().is_empty());
        }
    }
}
