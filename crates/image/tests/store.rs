//! Names, removal, and what clumsy input gives.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

#[expect(dead_code, reason = "each test program uses some of it")]
mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;

use alveole_image::{ImageError, Import, Limits, Platform, Quiet, Store, Usages};
use support::{dir, file, layer, layout};

fn how(name: &str) -> Import {
    Import {
        name: Some(name.parse().unwrap()),
        platform: "linux/amd64".parse::<Platform>().unwrap(),
        limits: Limits::default(),
    }
}

#[test]
fn names_share_content_and_removal_frees_what_nobody_needs() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("store")).unwrap();
    assert_eq!(
        fs::metadata(folder.path().join("store"))
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o700
    );
    let base = layer(&[dir("etc"), file("etc/a", "a")]);
    layout(&folder.path().join("one"), std::slice::from_ref(&base));
    layout(
        &folder.path().join("two"),
        &[base, layer(&[file("b", "b")])],
    );
    let one = store
        .import(&folder.path().join("one"), &how("one"), &Quiet)
        .unwrap()
        .remove(0);
    store
        .import(&folder.path().join("one"), &how("uno:1"), &Quiet)
        .unwrap();
    let two = store
        .import(&folder.path().join("two"), &how("two"), &Quiet)
        .unwrap()
        .remove(0);
    assert_ne!(one.root_disk, two.root_disk);
    assert_eq!(store.images().unwrap().len(), 2);
    assert_eq!(
        store.resolve("one").unwrap().names,
        ["docker.io/library/one:latest", "docker.io/library/uno:1"]
    );
    assert_eq!(store.resolve(&one.id.hex()[..12]).unwrap().id, one.id);
    assert_eq!(store.resolve(&one.id.to_string()).unwrap().id, one.id);
    assert_eq!(
        store.resolve(&format!("one@{}", one.manifest)).unwrap().id,
        one.id
    );
    let usage = store.usage().unwrap();
    // Two manifests, two configurations, two layers.
    assert_eq!(
        (usage.blobs.count, usage.disks.count, usage.unfinished.count),
        (6, 2, 0)
    );
    assert_eq!(usage.blobs.unused_bytes + usage.disks.unused_bytes, 0);
    // A name goes, the image stays.
    assert_eq!(
        store.remove("one", &[]).unwrap(),
        ["docker.io/library/one:latest"]
    );
    assert!(one.root_disk.exists() && matches!(store.resolve("one"), Err(ImageError::NotFound(_))));
    // A root disk that somebody uses stays.
    store
        .remove("uno:1", std::slice::from_ref(&one.root_disk))
        .unwrap();
    assert!(one.root_disk.exists());
    assert!(store.usage().unwrap().disks.unused_bytes > 0);
    let (names, freed) = store.prune(&[], false).unwrap();
    assert!(names.is_empty() && freed > 0 && !one.root_disk.exists() && two.root_disk.exists());
    assert_eq!(
        store.remove(&two.id.hex()[..8], &[]).unwrap(),
        ["docker.io/library/two:latest"]
    );
    assert_eq!(store.usage().unwrap(), Usages::default());
}

/// A root that is not packed is kept and made a disk in one pass: of neither anything is lost by that.
#[test]
fn a_plain_root_is_kept_as_it_came() {
    let folder = tempfile::tempdir().unwrap();
    let open = |name| Store::open(&folder.path().join(name)).unwrap();
    // Longer than the pieces that are read, and with something behind the archive.
    let large: Vec<u8> = (0..3 << 20).map(|at: u32| (at / 4096) as u8).collect();
    let mut tar = layer(&[dir("etc"), file("etc/large", large), file("etc/a", "a")]);
    tar.extend([b'x'; 100_000]);
    let path = folder.path().join("root.tar");
    fs::write(&path, &tar).unwrap();
    let plain = open("store").import(&path, &how("one"), &Quiet).unwrap();
    let plain = &plain[0];
    assert_eq!(plain.layers, plain.diff_ids);
    let blob = folder.path().join("store/blobs/sha256");
    let kept = fs::read(blob.join(plain.layers[0].hex())).unwrap();
    assert!(kept == tar, "{} bytes of {}", kept.len(), tar.len());
    assert_eq!(
        fs::read_dir(folder.path().join("store/tmp"))
            .unwrap()
            .count(),
        0
    );

    // With a digest that is checked, layer and disk one after the other.
    layout(&folder.path().join("layout"), &[tar]);
    let from = folder.path().join("layout");
    let layered = open("other").import(&from, &how("one"), &Quiet).unwrap();
    assert_eq!(layered[0].diff_ids, plain.diff_ids);
    let disks = [plain, &layered[0]].map(|image| fs::read(&image.root_disk).unwrap());
    assert!(disks[0] == disks[1], "the disks differ");
}

#[test]
fn exchanged_content_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = layer(&[file("a", "a")]);
    layout(&folder.path().join("one"), std::slice::from_ref(&bytes));
    let blob = folder
        .path()
        .join("one/blobs/sha256")
        .join(alveole_image::Digest::of(&bytes).hex());
    fs::write(&blob, layer(&[file("a", "b")])).unwrap();
    let store = Store::open(&folder.path().join("store")).unwrap();
    let error = store
        .import(&folder.path().join("one"), &how("one"), &Quiet)
        .unwrap_err()
        .to_string();
    assert!(error.contains("damaged or was exchanged"), "{error}");
    // Nothing half-made is left but documents, which prune removes.
    assert!(store.images().unwrap().is_empty());
    assert_eq!(store.usage().unwrap().unfinished.count, 0);
    store.prune(&[], false).unwrap();
    assert_eq!(store.usage().unwrap(), Usages::default());
}

#[test]
fn other_files_are_refused_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("store")).unwrap();
    let import = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        store
            .import(&path, &how("x"), &Quiet)
            .unwrap_err()
            .to_string()
    };
    assert!(import("text", &b"hello ".repeat(200)).contains("is no image"));
    assert!(import("short", b"hello").contains("is no image"));
    assert!(import("empty", b"").contains("it is empty"));
    let cut = layer(&[
        file("oci-layout", "{}"),
        file("index.json", r#"{"schemaVersion":2,"manifests":[]}"#),
    ]);
    assert!(import("no-image", &cut).contains("its index is empty"));
    let missing = layer(&[file(
        "manifest.json",
        r#"[{"Config":"c.json","Layers":["l.tar"]}]"#,
    )]);
    assert!(import("incomplete", &missing).contains("c.json is not in it"));
    let error = store
        .import(&folder.path().join("nothing"), &how("x"), &Quiet)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("cannot open") && error.contains("No such file"),
        "{error}"
    );
    assert_eq!(store.usage().unwrap(), Usages::default());
}

#[test]
fn another_machines_image_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    layout(&folder.path().join("one"), &[layer(&[file("a", "a")])]);
    let store = Store::open(&folder.path().join("store")).unwrap();
    let arm = Import {
        platform: "linux/arm64".parse().unwrap(),
        ..how("x")
    };
    let error = store
        .import(&folder.path().join("one"), &arm, &Quiet)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("nothing for linux/arm64: it is there for linux/amd64"),
        "{error}"
    );
}

#[test]
fn what_killed_processes_left_goes_away() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("store")).unwrap();
    fs::write(store.path().join("tmp/left"), vec![1; 100_000]).unwrap();
    fs::write(store.path().join("partial/left"), vec![1; 100_000]).unwrap();
    assert_eq!(store.usage().unwrap().unfinished.count, 2);
    layout(&folder.path().join("one"), &[layer(&[file("a", "a")])]);
    store
        .import(&folder.path().join("one"), &how("one"), &Quiet)
        .unwrap();
    // A download may be resumed.
    assert_eq!(store.usage().unwrap().unfinished.count, 1);
    store.prune(&[], false).unwrap();
    assert_eq!(store.usage().unwrap().unfinished.count, 0);
}

#[test]
fn many_at_once_share_one_store() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("store")).unwrap();
    layout(
        &folder.path().join("one"),
        &[layer(&[file("a", vec![5; 3 << 20])])],
    );
    std::thread::scope(|scope| {
        for number in 0..8 {
            let (store, from) = (store.clone(), folder.path().join("one"));
            scope.spawn(move || {
                store
                    .import(&from, &how(&format!("name:{number}")), &Quiet)
                    .unwrap();
                store.prune(&[], false).unwrap();
                store.resolve(&format!("name:{number}")).unwrap();
            });
        }
    });
    let images = store.images().unwrap();
    assert_eq!((images.len(), images[0].names.len()), (1, 8));
    assert!(images[0].root_disk.exists());
}
