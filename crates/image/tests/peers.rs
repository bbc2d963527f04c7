//! What others make of the same images: `umoci` unpacks them, `skopeo` carries them, `tar` packs a root.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

use alveole_image::{Format, Import, Limits, Platform, Quiet, Reference, Store};
use proptest::prelude::*;
use support::{
    E, assert_same, device, dir, disk_tree, file, have, host_tree, layer, layout, link, run, skip,
    symlink,
};
use tar::EntryType;

fn how(name: Option<&str>) -> Import {
    Import {
        name: name.map(|name| name.parse::<Reference>().unwrap()),
        platform: "linux/amd64".parse::<Platform>().unwrap(),
        limits: Limits::default(),
    }
}

/// Everything that layers can say, in three layers.
fn everything() -> Vec<Vec<u8>> {
    let mode = |mode, e: E| E { mode, ..e };
    let of = |kind, e: E| E { kind, ..e };
    let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec();
    let attributes = vec![
        ("user.text".to_owned(), b"with\nline feeds\n".to_vec()),
        ("security.capability".to_owned(), capability),
        ("trusted.t".to_owned(), vec![0, 1, 255]),
    ];
    let lower = vec![
        dir("./"),
        dir("usr"),
        dir("usr/bin"),
        symlink("bin", "usr/bin"),
        mode(0o4755, file("usr/bin/su", vec![1; 70_000])),
        mode(0o1777, dir("tmp")),
        mode(0o2775, dir("var")),
        file("var/big", vec![3; 1 << 20]),
        dir("var/old"),
        file("var/old/gone", "x"),
        file("usr/bin/one", "one"),
        link("usr/bin/two", "usr/bin/one"),
        dir("dev"),
        device("dev/null", 1, 3),
        of(EntryType::Block, device("dev/disk", 259, 300)),
        of(EntryType::Fifo, file("dev/pipe", "")),
        file("usr/bin/replaced", "old"),
        dir("becomes-file"),
        file("becomes-file/x", ""),
        file("becomes-dir", ""),
        E {
            xattrs: attributes,
            ..file("with-attributes", "a")
        },
        dir("opaque"),
        file("opaque/below", ""),
        dir("opaque/deep"),
        file("opaque/deep/below", ""),
        symlink("dangling", "/nowhere/at/all"),
        file(
            &format!("{}/long", "a-long-directory-name/".repeat(9)),
            "long",
        ),
        file(
            "usr/bin/sparse",
            [vec![0; 300_000], b"end".to_vec()].concat(),
        ),
    ];
    let parents: Vec<E> = (1..=9)
        .map(|n| dir(&"a-long-directory-name/".repeat(n)))
        .collect();
    let lower = [lower[..1].to_vec(), parents, lower[1..].to_vec()].concat();
    let middle = vec![
        file("bin/through-link", "in usr/bin"),
        dir("var"),
        file("var/.wh.old", ""),
        file("usr/bin/replaced", "new and longer"),
        link("three", "usr/bin/one"),
        file("becomes-file", "now"),
        dir("becomes-dir"),
        file("becomes-dir/in", "in"),
        dir("opaque"),
        file("opaque/.wh..wh..opq", ""),
        file("opaque/new", "new"),
        file(".wh.dangling", ""),
    ];
    let upper = vec![
        file("usr/bin/.wh.one", ""),
        mode(0o600, file("../../escape", "inside")),
        link("four", "/../three"),
        dir("var/old"),
        symlink("with-attributes", "x"),
    ];
    vec![layer(&lower), layer(&middle), layer(&upper)]
}

/// What `umoci unpack` makes of a layout.
fn umoci(layout: &Path, at: &Path) -> support::Tree {
    run(Command::new("umoci")
        .arg("unpack")
        .arg("--image")
        .arg(format!("{}:latest", layout.display()))
        .arg(at));
    host_tree(&at.join("rootfs"))
}

#[test]
fn umoci_unpacks_the_same_tree() {
    let test = "umoci_unpacks_the_same_tree";
    if !have(test, &["umoci"]) {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        return skip(test, "umoci needs root for owners and devices");
    }
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().join("layout");
    layout(&at, &everything());
    let theirs = umoci(&at, &folder.path().join("bundle"));
    let store = Store::open(&folder.path().join("store")).unwrap();
    let images = store
        .import(&at, &how(Some("everything:1")), &Quiet)
        .unwrap();
    assert_same(&disk_tree(&images[0].root_disk), &theirs);
    assert!(theirs.len() > 35);
    if have(test, &["fsck.erofs"]) {
        run(Command::new("fsck.erofs")
            .arg("--extract")
            .arg(&images[0].root_disk));
    }
    // The whole configuration comes along.
    let config = &store.resolve("everything:1").unwrap().config;
    assert_eq!(
        (
            config.entrypoint.join(" "),
            config.cmd.join(" "),
            config.env.len()
        ),
        ("/bin/e".into(), "x y".into(), 2)
    );
    assert_eq!(
        (
            config.user.as_str(),
            config.working_dir.as_str(),
            config.stop_signal.as_str()
        ),
        ("7:8", "/w", "SIGQUIT")
    );
    assert_eq!(
        (
            config.volumes[0].as_str(),
            config.exposed_ports[0].as_str(),
            config.labels["l"].as_str()
        ),
        ("/data", "80/tcp", "m")
    );
}

#[test]
fn skopeo_carries_images_both_ways() {
    let test = "skopeo_carries_images_both_ways";
    if !have(test, &["skopeo"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    layout(&path("layout"), &everything());
    let copy = |from: String, to: String| {
        run(Command::new("skopeo")
            .args(["--insecure-policy", "copy", "--quiet"])
            .args([from, to]));
    };
    let oci = format!("oci:{}:latest", path("layout").display());
    copy(
        oci.clone(),
        format!(
            "docker-archive:{}:docker.io/me/thing:v1",
            path("docker.tar").display()
        ),
    );
    copy(
        oci.clone(),
        format!(
            "oci-archive:{}:example.org/thing:v2",
            path("oci.tar").display()
        ),
    );
    run(Command::new("gzip").arg("--keep").arg(path("docker.tar")));
    let store = Store::open(&path("store")).unwrap();
    let direct = store
        .import(&path("layout"), &how(Some("direct")), &Quiet)
        .unwrap()
        .remove(0);
    // All have the same layers, so one root disk serves them all.
    for (archive, name, wanted) in [
        ("docker.tar", None, "me/thing:v1"),
        ("docker.tar.gz", Some("zipped"), "zipped"),
        ("oci.tar", None, "example.org/thing:v2"),
    ] {
        let images = store.import(&path(archive), &how(name), &Quiet).unwrap();
        assert_eq!(images.len(), 1, "{archive}");
        assert_eq!(
            store.resolve(wanted).unwrap().root_disk,
            direct.root_disk,
            "{archive}"
        );
        assert_eq!(images[0].config, direct.config, "{archive}");
    }
    let stream = fs::File::open(path("docker.tar")).unwrap();
    store
        .import_stream(stream, &how(Some("streamed")), &Quiet)
        .unwrap();
    assert_eq!(
        store.resolve("streamed").unwrap().root_disk,
        direct.root_disk
    );
    assert_eq!(store.usage().unwrap().disks.count, 1);
    // And back.
    for (format, kind) in [
        (Format::Oci, "oci-archive"),
        (Format::Docker, "docker-archive"),
    ] {
        let archive = path(kind);
        store
            .export(
                "me/thing:v1",
                format,
                &mut fs::File::create(&archive).unwrap(),
            )
            .unwrap();
        let again = path(&format!("{kind}-again"));
        copy(
            format!("{kind}:{}", archive.display()),
            format!("dir:{}", again.display()),
        );
        let manifest: serde_json::Value =
            serde_json::from_slice(&fs::read(again.join("manifest.json")).unwrap()).unwrap();
        assert_eq!(manifest["layers"].as_array().unwrap().len(), 3, "{kind}");
        let other = Store::open(&path(&format!("{kind}-store"))).unwrap();
        let image = other
            .import(&archive, &how(None), &Quiet)
            .unwrap()
            .remove(0);
        assert_eq!(image.names, ["docker.io/me/thing:v1"]);
        assert_eq!(
            fs::read(&image.root_disk).unwrap(),
            fs::read(&direct.root_disk).unwrap(),
            "{kind}: other bytes"
        );
    }
}

#[test]
fn a_root_goes_in_and_out_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let store = Store::open(&path("store")).unwrap();
    layout(&path("layout"), &everything());
    let first = store
        .import(&path("layout"), &how(Some("first")), &Quiet)
        .unwrap()
        .remove(0);
    let mut tar = Vec::new();
    store.export("first", Format::RootFs, &mut tar).unwrap();
    fs::write(path("root.tar"), &tar).unwrap();
    let second = store
        .import(&path("root.tar"), &how(Some("second")), &Quiet)
        .unwrap()
        .remove(0);
    assert_same(&disk_tree(&second.root_disk), &disk_tree(&first.root_disk));
    let streamed = store
        .import_stream(&tar[..], &how(Some("third")), &Quiet)
        .unwrap()
        .remove(0);
    assert_eq!(streamed.id, second.id);
    // What has no name is asked for one.
    let why = store
        .import(&path("root.tar"), &how(None), &Quiet)
        .unwrap_err()
        .to_string();
    assert!(
        why.contains("root.tar does not say what the image is called"),
        "{why}"
    );
    if !rustix::process::geteuid().is_root() {
        return skip(
            "a_root_goes_in_and_out_unchanged (a folder)",
            "only root can make others' files and devices",
        );
    }
    fs::create_dir(path("root")).unwrap();
    run(Command::new("tar")
        .args(["--xattrs", "--xattrs-include=*", "-xpf"])
        .arg(path("root.tar"))
        .arg("-C")
        .arg(path("root")));
    let of_folder = store
        .import(&path("root"), &how(Some("fourth")), &Quiet)
        .unwrap()
        .remove(0);
    assert_same(&disk_tree(&of_folder.root_disk), &host_tree(&path("root")));
}

#[test]
fn a_real_debian_is_what_umoci_says() {
    let test = "a_real_debian_is_what_umoci_says";
    if !have(test, &["mmdebstrap", "umoci"]) {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        return skip(test, "mmdebstrap and umoci need root");
    }
    let folder = tempfile::tempdir().unwrap();
    let tar = folder.path().join("debian.tar");
    let made = Command::new("mmdebstrap")
        .args([
            "--quiet",
            "--variant=essential",
            "--include=python3-minimal",
            "bookworm",
        ])
        .arg(&tar)
        .output()
        .unwrap();
    if !made.status.success() {
        let why = String::from_utf8_lossy(&made.stderr);
        return skip(
            test,
            &format!(
                "mmdebstrap gets no packages: {}",
                why.lines().last().unwrap_or_default()
            ),
        );
    }
    let bytes = fs::read(&tar).unwrap();
    let on_top = layer(&[
        dir("usr"),
        dir("usr/share"),
        dir("usr/share/doc"),
        file("usr/share/doc/.wh..wh..opq", ""),
        dir("etc"),
        file("etc/hostname", "guest\n"),
        file("etc/.wh.motd", ""),
    ]);
    let at = folder.path().join("layout");
    layout(&at, &[bytes, on_top]);
    let theirs = umoci(&at, &folder.path().join("bundle"));
    let store = Store::open(&folder.path().join("store")).unwrap();
    let image = store
        .import(&at, &how(Some("debian")), &Quiet)
        .unwrap()
        .remove(0);
    let ours = disk_tree(&image.root_disk);
    assert!(
        ours.len() > 3000 && ours.contains_key(&b"/usr/bin/python3"[..]),
        "{}",
        ours.len()
    );
    assert_same(&ours, &theirs);
}

/// What random layers are made of. Parents may be symbolic links, and links lead into lower layers.
fn random_entry() -> impl Strategy<Value = E> {
    let path = || proptest::collection::vec("[abc]", 1..4).prop_map(|p| p.join("/"));
    (path(), path(), 0..12u8, 0..9000usize).prop_map(|(path, other, kind, size)| match kind {
        0..3 => dir(&path),
        3..6 => file(&path, vec![size as u8; size]),
        6 | 7 => symlink(
            &path,
            &format!("{}{other}", if size % 2 == 0 { "/" } else { "../" }),
        ),
        8 | 9 => link(&path, &other),
        _ => {
            let (parent, name) = path
                .rsplit_once('/')
                .map_or((String::new(), path.as_str()), |(p, n)| {
                    (format!("{p}/"), n)
                });
            file(&format!("{parent}.wh.{name}"), "")
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// Where `umoci` can unpack a random stack, ours is the same tree.
    #[test]
    fn random_stacks_are_what_umoci_says(stack in proptest::collection::vec(proptest::collection::vec(random_entry(), 1..8), 1..4)) {
        let test = "random_stacks_are_what_umoci_says";
        if !rustix::process::geteuid().is_root() || Command::new("umoci").arg("--version").output().is_err() {
            skip(test, "there is no umoci, or no root for it");
            return Ok(());
        }
        let layers: Vec<Vec<u8>> = stack
            .iter()
            .map(|entries| {
                // As tools write them: whiteouts first.
                let (mut all, rest): (Vec<E>, Vec<E>) = entries.iter().cloned().partition(|e| e.path.contains(".wh."));
                all.extend(rest);
                layer(&all)
            })
            .collect();
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().join("layout");
        layout(&at, &layers);
        let bundle = folder.path().join("bundle");
        let theirs = Command::new("umoci").arg("unpack").arg("--image").arg(format!("{}:latest", at.display())).arg(&bundle).output().unwrap();
        let store = Store::open(&folder.path().join("store")).unwrap();
        let ours = store.import(&at, &how(Some("x")), &Quiet);
        if !theirs.status.success() {
            return Ok(());
        }
        let ours = ours.map_err(|e| TestCaseError::fail(format!("umoci unpacks it, but: {e}")))?;
        // Directories that nobody described have the time at which they were made there.
        let plain = |tree: support::Tree| -> Vec<(String, String)> {
            tree.into_iter()
                .skip(1)
                .map(|(path, line)| {
                    let line = if line.starts_with("Directory") { "Directory".to_owned() } else { line };
                    (String::from_utf8(path).unwrap(), line)
                })
                .collect()
        };
        let (ours, theirs) = (plain(disk_tree(&ours[0].root_disk)), plain(host_tree(&bundle.join("rootfs"))));
        prop_assert_eq!(ours, theirs, "ours first");
    }
}
