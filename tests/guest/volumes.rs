//! What lies in guests' roots beside their images, as people say it: `-v`, `--tmpfs`, `alveole volume`.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::images::Home;
use crate::harness::images::{path, tool};
use crate::harness::skip;

/// A folder of this host with something of everything.
fn tree(home: &Home) -> String {
    let tree = home.dir.path().join("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    fs::write(tree.join("sub/file"), "content\n").unwrap();
    fs::write(tree.join("secret"), "of 1234\n").unwrap();
    fs::set_permissions(tree.join("secret"), PermissionsExt::from_mode(0o640)).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", tree.join("link")).unwrap();
    let _ = std::os::unix::fs::chown(tree.join("secret"), Some(1234), Some(5678));
    path(&tree).to_owned()
}

#[test]
fn folders_and_files_of_this_host_are_copied_at_each_start() {
    let Some(home) = Home::new() else { return };
    let tree = tree(&home);
    let file = format!("{tree}/sub/file");
    let (read, write) = (format!("{tree}:/read:ro,z"), format!("{tree}:/made/here"));
    let one = format!("{file}:/etc/one.conf:ro");
    let script = "cat /read/sub/file /etc/one.conf; stat -c '%u %g %a' /read/secret; readlink /read/link; \
                  echo x >/read/new || echo x >/etc/one.conf || echo kept >/made/here/new; rm /made/here/secret; sync; sleep 1000";
    let words = ["-d", "--name", "box", "-v", &read, "-v", &write, "-v", &one];
    let started = home.output(&home.run(&words, &["sh", "-c", script]));
    let said = String::from_utf8(started.stderr).unwrap();
    assert!(started.status.success(), "{said}");
    assert!(
        said.contains("copy")
            && said.contains(&tree)
            && said.contains("alveole cp")
            && said.contains("'z'"),
        "{said}"
    );
    home.wait_until(20, "file", || {
        home.output(&["exec", "box", "cat", "/made/here/new"])
            .stdout
            == b"kept\n"
    });
    let logs = home.does(&["logs", "box"]);
    assert_eq!(logs, "content\ncontent\n1234 5678 640\n/etc/passwd");
    let errors = String::from_utf8(home.output(&["logs", "box"]).stderr).unwrap();
    assert_eq!(errors.matches("Read-only").count(), 2, "{errors}");
    // Nothing comes back by itself, and what the VM wrote is what it has after a start, over what is new here.
    assert!(!home.dir.path().join("tree/new").exists());
    home.does(&["kill", "box"]);
    fs::write(&file, "newer\n").unwrap();
    fs::write(format!("{tree}/second"), "second\n").unwrap();
    home.does(&["start", "box"]);
    let show = "cat /read/sub/file /etc/one.conf /made/here/sub/file /made/here/new /made/here/second; ls /made/here";
    assert_eq!(
        home.does(&["exec", "box", "sh", "-c", show]),
        "newer\nnewer\nnewer\nkept\nsecond\nlink\nnew\nsecond\nsub"
    );
    home.does(&["rm", "-f", "box"]);
    // In a root that is only read, a place that is not there is made, and what may be written is.
    let script = "echo x >/made/here/x && cat /made/here/x; echo x >/x";
    let output = home.output(&home.run(
        &["--rm", "--read-only", "-v", &write],
        &["sh", "-c", script],
    ));
    assert_eq!(output.stdout, b"x\n", "{output:?}");
    assert!(!output.status.success());
}

/// What of a folder is no file is told, whoever asks for the VM, and whether somebody is attached to it.
#[test]
fn what_is_left_out_of_a_copy_is_said() {
    let Some(home) = Home::new() else { return };
    let tree = tree(&home);
    let _socket = std::os::unix::net::UnixListener::bind(format!("{tree}/socket")).unwrap();
    let volume = format!("{tree}:/tree:ro");
    let said = |words: &[&str]| {
        let output = home.output(words);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let note = format!("alveole: left out of the copies: of '{tree}' 1 socket or device\n");
    let attached = said(&home.run(&["--rm", "-v", &volume], &["ls", "/tree"]));
    assert_eq!(attached.matches(&note).count(), 1, "{attached}");
    let words = ["-d", "--name", "box", "-v", &volume];
    let detached = said(&home.run(&words, &["sleep", "1000"]));
    assert_eq!(detached.matches(&note).count(), 1, "{detached}");
    home.does(&["kill", "box"]);
    let again = said(&["start", "box"]);
    assert_eq!(again.matches(&note).count(), 1, "{again}");
    let all_is_copied = said(&home.run(&["--rm", "-v", &format!("{tree}/sub:/sub:ro")], &["true"]));
    assert!(!all_is_copied.contains("left out"), "{all_is_copied}");
}

#[test]
fn volumes_outlive_their_vms() {
    let Some(home) = Home::new() else { return };
    // What the image has at its place is in it at first.
    let at = home.files.join("srv/data");
    fs::create_dir_all(&at).unwrap();
    fs::write(at.join("first"), "of the image\n").unwrap();
    fs::set_permissions(&at, PermissionsExt::from_mode(0o751)).unwrap();
    let root = home.dir.path().join("more.erofs");
    assert!(tool(
        "mkfs.erofs",
        &["-Enoinline_data", path(&root), path(&home.files)]
    ));
    let run = |before: &[&str], script: &str| {
        let words = [
            &["run", "--net", "none", "--rm"],
            before,
            &[path(&root), "sh", "-c", script],
        ]
        .concat();
        let output = home.output(&words);
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (
            output.status.code(),
            text(output.stdout),
            text(output.stderr),
        )
    };
    let script = "cat /srv/data/*; stat -c %a /srv/data; echo more >/srv/data/more";
    let first = run(&["-v", "data:/srv/data"], script);
    assert_eq!(
        first,
        (Some(0), "of the image\n751\n".into(), String::new())
    );
    let again = run(
        &["-v", "data:/elsewhere:ro"],
        "cat /elsewhere/more; echo x >/elsewhere/x",
    );
    assert!(
        again.1 == "more\n" && again.2.contains("Read-only"),
        "{again:?}"
    );
    // Of its own, and memory.
    let script = "cat /srv/data/first; df -k /tmp | tail -1; df -k /dev/shm | tail -1; echo x >/srv/data/y; ls /srv/data";
    let own = run(
        &[
            "-v",
            "/srv/data",
            "--tmpfs",
            "/tmp:size=4m",
            "--shm-size",
            "8M",
            "--read-only",
        ],
        script,
    );
    let lines: Vec<_> = own.1.split_whitespace().collect();
    assert_eq!((lines[0], lines[2]), ("of", "image"), "{own:?}");
    assert!(
        lines.contains(&"4096") && lines.contains(&"8192") && lines.ends_with(&["first", "y"]),
        "{own:?}"
    );
    // Who writes has it alone; who reads shares it.
    home.does(&home.run(
        &["-d", "--name", "a", "-v", "data:/data:ro"],
        &["sleep", "1000"],
    ));
    home.does(&home.run(
        &["-d", "--name", "b", "-v", "data:/data:ro"],
        &["sleep", "1000"],
    ));
    let refused = run(&["-v", "data:/data"], "true");
    assert!(
        refused.0 == Some(125) && refused.2.contains("'data'"),
        "{refused:?}"
    );
    assert!(!home.output(&["volume", "rm", "data"]).status.success());
    home.does(&["rm", "-f", "a", "b"]);
    home.does(&[
        "volume", "create", "--size", "64M", "--label", "a=b", "small",
    ]);
    let facts: serde_json::Value =
        serde_json::from_str(&home.does(&["volume", "inspect", "small"])).unwrap();
    assert_eq!(
        (&facts[0]["size_bytes"], &facts[0]["labels"]["a"]),
        (&(64 << 20).into(), &"b".into())
    );
    assert!(home.does(&["system", "df"]).contains("volumes"));
    // A VM that is killed leaves a journal to be replayed: by who may write.
    home.does(&home.run(
        &["-d", "--name", "a", "-v", "small:/data"],
        &["sleep", "1000"],
    ));
    home.does(&["exec", "a", "sh", "-c", "echo x >/data/x; sync"]);
    home.does(&["kill", "--machine", "a"]);
    let dirty = run(&["-v", "small:/data:ro"], "true");
    assert!(
        dirty.0 == Some(125) && dirty.2.contains("once without :ro"),
        "{dirty:?}"
    );
    assert_eq!(run(&["-v", "small:/data"], "cat /data/x").1, "x\n");
    assert_eq!(run(&["-v", "small:/data:ro"], "cat /data/x").1, "x\n");
    // One that a VM has is kept.
    assert_eq!(
        home.does(&["volume", "prune"]).lines().next(),
        Some("removed volume data")
    );
    home.does(&["rm", "a"]);
    home.does(&["volume", "rm", "small"]);
    assert_eq!(home.does(&["volume", "ls", "-q"]), "");
}

#[test]
fn what_cannot_be_a_volume_is_said_before_anything_is_made() {
    let Some(home) = Home::new() else { return };
    let dir = path(home.dir.path());
    for (volume, said) in [
        (format!("{dir}/nothing:/a"), "nothing"),
        ("/dev/null:/a".into(), "device"),
        (format!("{dir}:a"), "begins with /"),
        (format!("{dir}:/"), "own"),
        (format!("{dir}:/a:rx"), "rx"),
    ] {
        let output = home.output(&home.run(&["--rm", "-v", &volume], &["true"]));
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && errors.contains(said),
            "{volume}: {errors}"
        );
    }
    // A file where the image has a folder.
    let file = format!("{}:/bin", path(&home.root));
    let output = home.output(&home.run(&["--rm", "-v", &file], &["true"]));
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.code() == Some(125) && errors.contains("'/bin'"),
        "{errors}"
    );
    assert_eq!(home.does(&["ps", "-aq"]), "");
}

/// Programs as container engines need file systems, devices and tables that are modules: the kernel gets them, whatever the image has.
#[test]
fn the_kernels_modules_are_there_when_they_are_needed() {
    let Some(home) = Home::new() else { return };
    let modules = home.dir.path().join("home/data/kernels/test/modules.erofs");
    if !modules.exists() {
        skip("the kernel here has no modules");
        return;
    }
    let script = "set -e; grep -q nf_nat /lib/modules/$(uname -r)/modules.dep; \
                  if grep -qw squashfs /proc/filesystems; then exit 9; fi; \
                  mount -t squashfs none /mnt 2>/dev/null || grep -w squashfs /proc/filesystems; \
                  ip link add br0 type bridge; ip link add v0 type veth peer name v1; ip link set v0 master br0; cat /sys/class/net/v0/master/ifindex >/dev/null; \
                  cd /data; mkdir upper work all; mount -t overlay -o lowerdir=/bin,upperdir=/data/upper,workdir=/data/work overlay /data/all; \
                  echo x >/data/all/x; cat /data/upper/x; \
                  test -c /dev/net/tun; : <>/dev/fuse; echo devices; \
                  mkdir /sys/fs/cgroup/one && echo +memory >/sys/fs/cgroup/cgroup.subtree_control && cat /sys/fs/cgroup/one/memory.max";
    let output = home.output(&home.run(&["--rm", "-v", "/data"], &["sh", "-c", script]));
    let said = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said, "\tsquashfs\nx\ndevices\nmax\n", "{errors}");
}

/// What an image calls its volumes is there and can be written, whatever the root is.
#[test]
fn an_images_own_volumes_can_be_written() {
    let Some(home) = Home::new() else { return };
    fs::create_dir_all(home.files.join("srv/data")).unwrap();
    fs::write(home.files.join("srv/data/first"), "first\n").unwrap();
    home.import_as_docker(
        "own:1",
        &serde_json::json!({"Cmd": ["/bin/sh"], "Volumes": {"/srv/data": {}, "/new/place": {}}}),
    );
    let script = "echo x >/srv/data/x && echo y >/new/place/y && cat /srv/data/* /new/place/*; echo z >/z || echo refused";
    let words = [
        "run",
        "--rm",
        "--net",
        "none",
        "--read-only",
        "own:1",
        "sh",
        "-c",
        script,
    ];
    assert_eq!(home.does(&words), "first\nx\ny\nrefused");
}
