//! `alveole disk` as people start it, with `qemu-img` as a witness.

#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use alveole_block_store::{Format, OpenOptions};
use serde_json::Value;
use tempfile::TempDir;

/// A folder, and `alveole disk` started in it.
struct Folder(TempDir);

/// What one start gave.
struct Said {
    status: Option<i32>,
    out: String,
    err: String,
}

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `alveole disk` with the words of `line`.
    fn disk(&self, line: &str) -> Said {
        said(
            Command::new(env!("CARGO_BIN_EXE_alveole"))
                .arg("disk")
                .args(line.split(' '))
                .current_dir(self.0.path()),
        )
    }

    /// The same, which must do it without a word beside the result.
    fn done(&self, line: &str) -> String {
        let said = self.disk(line);
        assert_eq!((said.status, said.err.as_str()), (Some(0), ""), "{line}");
        said.out
    }

    /// The same, which must refuse in one line with all of `words`.
    fn refused(&self, line: &str, words: &[&str]) -> String {
        let said = self.disk(line);
        assert_eq!(said.status, Some(1), "{line}: {}{}", said.out, said.err);
        // What a part below warns about comes before it.
        let warns = |text: &&str| text.starts_with("alveole: warning: ");
        let lines: Vec<_> = said.err.lines().skip_while(warns).collect();
        assert!(
            lines.len() == 1 && lines[0].starts_with("alveole: cannot "),
            "{line}: {}",
            said.err
        );
        for word in words {
            assert!(said.err.contains(word), "{line}: no {word}: {}", said.err);
        }
        assert_eq!(said.out, "", "{line}");
        said.err
    }

    fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.done(&format!("info --format json {line}"))).unwrap()
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// A raw image that differs from place to place.
    fn raw(&self, name: &str, size_bytes: usize) -> Vec<u8> {
        let bytes: Vec<u8> = (0..size_bytes)
            .map(|n| (n.wrapping_mul(0x9e37_79b9) >> 13) as u8 | 1)
            .collect();
        fs::write(self.path(name), &bytes).unwrap();
        bytes
    }

    fn qemu_img(&self, line: &str) -> Said {
        said(
            Command::new("qemu-img")
                .args(line.split(' '))
                .current_dir(self.0.path()),
        )
    }

    /// QEMU reads the same from both.
    fn same(&self, a: &str, a_format: &str, b: &str, b_format: &str) {
        let said = self.qemu_img(&format!("compare -f {a_format} -F {b_format} {a} {b}"));
        assert_eq!(said.status, Some(0), "{}{}", said.out, said.err);
    }

    /// QEMU finds nothing wrong, and says what the image is.
    fn sound(&self, name: &str) -> Value {
        let said = self.qemu_img(&format!("check -f qcow2 {name}"));
        assert_eq!(said.status, Some(0), "{name}: {}{}", said.out, said.err);
        let said = self.qemu_img(&format!("info -f qcow2 --output json {name}"));
        serde_json::from_str(&said.out).unwrap()
    }

    /// Writes into an image as a guest would, but by QEMU.
    fn write(&self, name: &str, pattern: u8, offset: &str, len: &str) {
        let what = format!("write -P {pattern} {offset} {len}");
        let said = said(
            Command::new("qemu-io")
                .args(["-f", "qcow2", "-c", &what, name])
                .current_dir(self.0.path()),
        );
        assert_eq!(said.status, Some(0), "{}{}", said.out, said.err);
    }
}

fn said(command: &mut Command) -> Said {
    let Output {
        status,
        stdout,
        stderr,
    } = command.stdin(Stdio::null()).output().unwrap();
    Said {
        status: status.code(),
        out: String::from_utf8(stdout).unwrap(),
        err: String::from_utf8(stderr).unwrap(),
    }
}

/// Says that `test` is skipped, where people and tools look.
fn skip(test: &str, reason: &str) {
    let line = format!("SKIPPED {test}: {reason}\n");
    eprint!("{line}");
    if let Some(path) = std::env::var_os("ALVEOLE_SKIP_LOG") {
        let mut log = File::options()
            .append(true)
            .create(true)
            .open(path)
            .unwrap();
        log.write_all(line.as_bytes()).unwrap();
    }
}

fn no_qemu_img(test: &str) -> bool {
    let there = |name| {
        let output = Command::new(name).arg("--version").output();
        output.is_ok_and(|output| output.status.success())
    };
    let missing = !there("qemu-img") || !there("qemu-io");
    if missing {
        skip(
            test,
            "qemu-img or qemu-io is not installed (apt-get install qemu-utils)",
        );
    }
    missing
}

// Making ---------------------------------------------------------------------------------------

#[test]
fn a_disk_is_made_in_the_format_of_its_name() {
    let folder = Folder::new();
    assert_eq!(
        folder.done("create a.img 3M"),
        "made a.img: a disk of 3 MiB, raw\n"
    );
    assert_eq!(fs::read(folder.path("a.img")).unwrap(), vec![0; 3 << 20]);
    assert_eq!(
        folder.done("create b.qcow2 10G"),
        "made b.qcow2: a disk of 10 GiB, qcow2\n"
    );
    let info = folder.json("b.qcow2");
    assert_eq!(
        (&info["format"], &info["size_bytes"]),
        (&"qcow2".into(), &(10u64 << 30).into())
    );
    assert!(info["used_bytes"].as_u64().unwrap() < 1 << 20, "{info}");
    // An option wins over the name, and the guest has to be told.
    let said = folder.disk("create c.img 1G --format qcow2");
    assert_eq!(said.status, Some(0));
    assert!(
        said.err.contains("--disk c.img,format=qcow2"),
        "{}",
        said.err
    );
    let said = folder.disk("create d.qcow2 8 --format raw");
    assert!(said.err.contains("d.qcow2,format=raw"), "{}", said.err);
    assert_eq!(fs::metadata(folder.path("d.qcow2")).unwrap().len(), 8 << 20);
    assert_eq!(folder.names(), ["a.img", "b.qcow2", "c.img", "d.qcow2"]);
}

#[test]
fn what_is_there_is_never_overwritten() {
    let folder = Folder::new();
    let bytes = folder.raw("a.img", 1 << 20);
    fs::copy(folder.path("a.img"), folder.path("a.qcow2")).unwrap();
    symlink("nowhere", folder.path("link.img")).unwrap();
    let before = folder.names();
    for line in [
        "create a.img 1G",
        "create a.qcow2 1G",
        "create link.img 1G",
        "overlay a.img a.qcow2",
        "convert a.img a.qcow2",
        "convert a.img a.img",
    ] {
        folder.refused(line, &["is there already", "choose another name"]);
    }
    assert_eq!(folder.names(), before);
    assert_eq!(fs::read(folder.path("a.img")).unwrap(), bytes);
    assert_eq!(fs::read(folder.path("a.qcow2")).unwrap(), bytes);
}

#[test]
fn places_and_sizes_that_cannot_be_say_why() {
    let folder = Folder::new();
    folder.refused("create no/such/a.img 1G", &["make the folder first"]);
    folder.refused("create a.qcow2 4000T", &["a.qcow2", "at most"]);
    folder.refused("create .. 1G", &[".."]);
    for (line, word) in [
        ("create a.img 1.5G", "1536M"),
        ("create a.img 1GB", "1GiB"),
        ("create a.img 0", "needs room"),
        ("create a.img ten", "start with a number"),
        ("create a.img", "<SIZE>"),
        ("create a.img 1G --format vmdk", "qcow2"),
        ("shred a.img", "shred"),
    ] {
        let said = folder.disk(line);
        assert_eq!(said.status, Some(2), "{line}: {}", said.err);
        assert!(said.err.contains(word), "{line}: {}", said.err);
    }
    assert!(folder.names().is_empty());
}

// Overlays -------------------------------------------------------------------------------------

#[test]
fn an_overlay_is_small_and_leaves_its_base_alone() {
    let folder = Folder::new();
    let bytes = folder.raw("base.img", 3 << 20);
    let text = folder.done("overlay base.img guest.qcow2");
    assert!(
        text.contains("over base.img (raw)") && text.contains("must stay"),
        "{text}"
    );
    let info = folder.json("guest.qcow2");
    assert_eq!(info["size_bytes"], 3 << 20);
    assert_eq!(info["base"]["name"], "base.img");
    assert_eq!(info["base"]["format"], "raw");
    let base = fs::canonicalize(folder.path("base.img")).unwrap();
    assert_eq!(info["base"]["path"].as_str(), base.to_str());
    assert!(info["used_bytes"].as_u64().unwrap() < 1 << 20, "{info}");
    assert_eq!(fs::read(folder.path("base.img")).unwrap(), bytes);
    // One over the other, and from elsewhere.
    folder.done("overlay guest.qcow2 second.qcow2");
    fs::create_dir(folder.path("images")).unwrap();
    fs::rename(folder.path("base.img"), folder.path("images/base.img")).unwrap();
    folder.done("overlay images/base.img third.qcow2");
    assert_eq!(
        folder.json("third.qcow2")["base"]["name"],
        "images/base.img"
    );
    let text = folder.done("info guest.qcow2");
    assert!(text.contains("not there: bring it back"), "{text}");
}

#[test]
fn a_base_that_no_guest_would_get_is_refused() {
    let folder = Folder::new();
    folder.raw("base.img", 1 << 20);
    folder.refused("overlay no.img a.qcow2", &["no.img", "check the name"]);
    folder.refused("overlay a.qcow2 base.img", &["the base comes first"]);
    folder.refused("overlay . a.qcow2", &["is a directory"]);
    fs::write(folder.path("empty.img"), "").unwrap();
    folder.refused("overlay empty.img a.qcow2", &["empty.img", "512"]);
    folder.refused(
        "overlay base.img a.qcow2 --base-format qcow2",
        &["not a qcow2 image", "say the format"],
    );
    // Guests take no base from elsewhere, because images name any file.
    fs::create_dir(folder.path("guests")).unwrap();
    folder.refused(
        "overlay base.img guests/a.qcow2",
        &["folder of the overlay", "--base-anywhere"],
    );
    folder.done("overlay base.img guests/a.qcow2 --base-anywhere");
    let text = folder.done("info guests/a.qcow2");
    assert!(text.contains("only with backing=anywhere"), "{text}");
    for line in [
        "commit guests/a.qcow2",
        "resize guests/a.qcow2 +1G",
        "convert guests/a.qcow2 b.img",
    ] {
        folder.refused(line, &["base.img", "outside of", "--base-anywhere"]);
        folder.done(&format!("{line} --base-anywhere"));
    }
}

#[test]
fn the_content_of_a_raw_disk_does_not_make_it_qcow2() {
    let folder = Folder::new();
    folder.done("create real.qcow2 1G");
    fs::rename(folder.path("real.qcow2"), folder.path("a.img")).unwrap();
    let before = fs::read(folder.path("a.img")).unwrap();
    for (line, option) in [
        ("overlay a.img b.qcow2", "--base-format qcow2"),
        ("resize a.img +1G", "--format qcow2"),
        ("check a.img --repair", "--format qcow2"),
        ("commit a.img", "--format qcow2"),
        ("convert a.img b.qcow2", "--from qcow2"),
    ] {
        folder.refused(line, &["cannot tell what a.img is", option]);
    }
    assert_eq!(fs::read(folder.path("a.img")).unwrap(), before);
    let said = folder.disk("info a.img");
    assert_eq!(said.status, Some(0));
    assert!(said.out.contains("raw"), "{}", said.out);
    assert!(
        said.err.contains("hint: ") && said.err.contains("--image-format qcow2"),
        "{}",
        said.err
    );
    let said = folder.disk("info a.img --format json");
    let json: Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!(json["looks_like_qcow2"], true);
    // Said, it is done, the one or the other.
    assert_eq!(
        folder.json("a.img --image-format qcow2")["size_bytes"],
        1 << 30
    );
    folder.done("check a.img --format qcow2");
    folder.done("overlay a.img over-raw.qcow2 --base-format raw");
    assert_eq!(
        folder.json("over-raw.qcow2")["size_bytes"],
        before.len() as u64
    );
}

// In use ---------------------------------------------------------------------------------------

#[test]
fn what_a_guest_uses_is_only_looked_at() {
    let folder = Folder::new();
    folder.raw("base.img", 1 << 20);
    folder.done("overlay base.img a.qcow2");
    // This process stands for its monitor.
    let options = OpenOptions {
        format: Format::Qcow2,
        ..OpenOptions::default()
    };
    let guest = alveole_block_store::open(&folder.path("a.qcow2"), &options).unwrap();
    let holder = format!("process {} (", std::process::id());
    for line in [
        "overlay a.qcow2 b.qcow2",
        "commit a.qcow2",
        "resize a.qcow2 +1G",
        "check a.qcow2",
        "check a.qcow2 --repair",
        "convert a.qcow2 b.qcow2",
        // Its base is read, and may not be written.
        "resize base.img +1G",
    ] {
        folder.refused(line, &[&holder, "stop that first"]);
    }
    let text = folder.done("info a.qcow2");
    assert!(text.contains("in use") && text.contains(&holder), "{text}");
    let info = folder.json("a.qcow2");
    assert!(info["in_use"].as_str().unwrap().contains(&holder));
    assert!(folder.json("base.img")["in_use"].is_null());
    // The base is shared.
    folder.done("overlay base.img b.qcow2");
    drop(guest);
    folder.done("resize a.qcow2 +1G");
    assert!(folder.json("a.qcow2")["in_use"].is_null());
}

/// Something mounted, taken away at the end.
struct Mount(PathBuf);

impl Mount {
    /// Mounts 1 MiB of room, where this user may.
    fn new(at: &Path, test: &str) -> Option<Self> {
        fs::create_dir(at).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1m", "none"])
            .arg(at)
            .output();
        if !mounted.is_ok_and(|output| output.status.success()) {
            skip(test, "this user may not mount");
            return None;
        }
        Some(Self(at.to_owned()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_file_system_leaves_nothing_behind() {
    let test = "a_full_file_system_leaves_nothing_behind";
    let folder = Folder::new();
    folder.raw("large.img", 4 << 20);
    let small = folder.path("small");
    let Some(_mount) = Mount::new(&small, test) else {
        return;
    };
    let left = || fs::read_dir(&small).unwrap().count();
    for line in [
        "convert large.img small/a.img",
        "convert large.img small/a.qcow2",
    ] {
        folder.refused(line, &["No space left", "make room", "again"]);
        assert_eq!(left(), 0, "{line}");
    }
    fs::write(small.join("filler"), vec![1; 2 << 20]).unwrap_err();
    folder.refused("create small/a.qcow2 1T", &["No space left", "make room"]);
    assert_eq!(left(), 1);
}

#[test]
fn rights_that_are_missing_are_named() {
    let folder = Folder::new();
    let place = folder.path("ro");
    let Some(_mount) = Mount::new(&place, "rights_that_are_missing_are_named") else {
        return;
    };
    folder.raw("ro/a.img", 64 << 10);
    folder.done("overlay ro/a.img b.qcow2");
    folder.done("overlay ro/a.img ro/c.qcow2");
    let remounted = Command::new("mount")
        .args(["-o", "remount,ro"])
        .arg(&place)
        .status();
    assert!(remounted.unwrap().success());
    for line in ["resize ro/a.img +1G", "commit b.qcow2"] {
        folder.refused(line, &["ro/a.img", "give the right to write"]);
    }
    folder.refused("create ro/d.img 1G", &["ro/d.img", "that you may write to"]);
    // What only reads goes on.
    folder.done("check ro/c.qcow2");
    folder.done("convert ro/c.qcow2 d.img");
}

// Changing -------------------------------------------------------------------------------------

#[test]
fn a_disk_grows_at_once_and_shrinks_on_demand() {
    let folder = Folder::new();
    let bytes = folder.raw("a.img", 2 << 20);
    folder.done("create a.qcow2 2M");
    for name in ["a.img", "a.qcow2"] {
        let size = || folder.json(name)["size_bytes"].as_u64().unwrap();
        assert_eq!(
            folder.done(&format!("resize {name} +1M")),
            format!("{name}: 3 MiB, was 2 MiB\n")
        );
        assert_eq!(size(), 3 << 20);
        folder.done(&format!("resize {name} 4"));
        assert_eq!(size(), 4 << 20);
        folder.refused(
            &format!("resize {name} 1M"),
            &["from 4 MiB to 1 MiB", "would be lost", "--shrink"],
        );
        assert_eq!(size(), 4 << 20);
        folder.done(&format!("resize {name} 1M --shrink"));
        assert_eq!(size(), 1 << 20);
    }
    assert!(fs::read(folder.path("a.img")).unwrap() == bytes[..1 << 20]);
    folder.refused("resize no.img +1G", &["no.img", "check the name"]);
    folder.refused(
        "resize a.img +1G --format qcow2",
        &["not a qcow2 image", "say the format"],
    );
}

#[test]
fn what_cannot_be_committed_or_checked_says_why() {
    let folder = Folder::new();
    folder.raw("base.img", 1 << 20);
    folder.done("create alone.qcow2 1M");
    folder.refused("commit base.img", &["it is raw", "--format qcow2"]);
    folder.refused("commit alone.qcow2", &["laid over nothing"]);
    folder.refused("check base.img", &["raw image has no tables"]);
    folder.refused("check no.qcow2", &["no.qcow2", "check the name"]);
    folder.done("overlay base.img a.qcow2");
    fs::remove_file(folder.path("base.img")).unwrap();
    for line in ["commit a.qcow2", "convert a.qcow2 b.img"] {
        folder.refused(line, &["base.img", "bring it back"]);
    }
    assert_eq!(folder.done("check a.qcow2"), "a.qcow2: sound\n");
}

#[test]
fn a_damaged_image_has_a_status_of_its_own() {
    let folder = Folder::new();
    folder.done("create a.qcow2 1G");
    folder.done("create b.qcow2 1G");
    let be64 = |file: &File, offset: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, offset).unwrap();
        u64::from_be_bytes(bytes)
    };
    let open = |name: &str| {
        let mut options = File::options();
        options.read(true).write(true);
        options.open(folder.path(name)).unwrap()
    };
    // A cluster that is counted and that nobody uses: behind those of the image.
    let file = open("a.qcow2");
    let table = be64(&file, 48);
    let block = be64(&file, table);
    let clusters = file.metadata().unwrap().len().div_ceil(1 << 16);
    file.set_len((clusters + 1) << 16).unwrap();
    file.write_all_at(&[0, 1], block + 2 * clusters).unwrap();
    let said = folder.disk("check a.qcow2");
    assert_eq!(said.status, Some(3), "{}{}", said.out, said.err);
    assert!(
        said.out.contains("0 faults, 1 lost clusters") && said.out.contains("--repair"),
        "{}",
        said.out
    );
    let text = folder.done("check a.qcow2 --repair");
    assert!(
        text.contains("repaired") && text.ends_with("a.qcow2: sound\n"),
        "{text}"
    );
    folder.done("check a.qcow2");
    // An entry that points behind the end of the file.
    let file = open("b.qcow2");
    let l1 = be64(&file, 40);
    file.write_all_at(&(1u64 << 63 | 1 << 40).to_be_bytes(), l1)
        .unwrap();
    for line in ["check b.qcow2", "check b.qcow2 --repair"] {
        let said = folder.disk(line);
        assert_eq!(said.status, Some(4), "{line}: {}{}", said.out, said.err);
        assert!(said.out.contains("1 faults"), "{line}: {}", said.out);
    }
    // No image at all.
    fs::write(folder.path("c.qcow2"), [7; 4096]).unwrap();
    folder.refused("check c.qcow2", &["not a qcow2 image"]);
}

// With a witness -------------------------------------------------------------------------------

#[test]
fn qemu_img_reads_what_is_made() {
    if no_qemu_img("qemu_img_reads_what_is_made") {
        return;
    }
    let folder = Folder::new();
    folder.raw("base.img", (3 << 20) + 512);
    folder.done("create a.qcow2 5G");
    folder.done("overlay base.img b.qcow2");
    folder.done("overlay b.qcow2 c.qcow2");
    for (name, size) in [
        ("a.qcow2", 5 << 30),
        ("b.qcow2", (3u64 << 20) + 512),
        ("c.qcow2", (3 << 20) + 512),
    ] {
        let theirs = folder.sound(name);
        assert_eq!(theirs["virtual-size"], size, "{name}");
        let ours = folder.json(name);
        assert_eq!(ours["size_bytes"], theirs["virtual-size"]);
        assert_eq!(ours["used_bytes"], theirs["actual-size"]);
        assert_eq!(ours["qcow2"]["cluster_size_bytes"], theirs["cluster-size"]);
        assert_eq!(ours["base"]["name"], theirs["backing-filename"]);
        assert_eq!(ours["base"]["format"], theirs["backing-filename-format"]);
    }
    folder.same("base.img", "raw", "c.qcow2", "qcow2");
    for line in ["resize a.qcow2 +1G", "resize a.qcow2 2G --shrink"] {
        folder.done(line);
        folder.sound("a.qcow2");
    }
    folder.done("resize c.qcow2 +1M");
    assert_eq!(folder.sound("c.qcow2")["virtual-size"], (4 << 20) + 512);
}

#[test]
fn what_is_committed_is_in_the_base() {
    if no_qemu_img("what_is_committed_is_in_the_base") {
        return;
    }
    for base in ["base.img", "base.qcow2"] {
        let folder = Folder::new();
        folder.raw("start.img", 4 << 20);
        folder.done(&format!("convert start.img {base}"));
        folder.done(&format!("overlay {base} guest.qcow2"));
        folder.done("resize guest.qcow2 +2M");
        folder.write("guest.qcow2", 0xa5, "100k", "200k");
        folder.write("guest.qcow2", 0x5a, "5M", "4k");
        fs::copy(folder.path("guest.qcow2"), folder.path("copy.qcow2")).unwrap();
        let text = folder.done("commit guest.qcow2");
        assert!(
            text.contains(base) && text.contains("may be removed"),
            "{text}"
        );
        let format = if base.ends_with("qcow2") {
            "qcow2"
        } else {
            "raw"
        };
        folder.same("guest.qcow2", "qcow2", base, format);
        fs::remove_file(folder.path("guest.qcow2")).unwrap();
        let bytes = match format {
            "raw" => fs::read(folder.path(base)).unwrap(),
            _ => {
                folder.sound(base);
                folder.done(&format!("convert {base} flat.img"));
                fs::read(folder.path("flat.img")).unwrap()
            }
        };
        assert_eq!(bytes.len(), 6 << 20);
        assert!(bytes[100 << 10..300 << 10].iter().all(|b| *b == 0xa5));
        assert!(bytes[5 << 20..(5 << 20) + 4096].iter().all(|b| *b == 0x5a));
    }
}

#[test]
fn a_copy_holds_the_same() {
    if no_qemu_img("a_copy_holds_the_same") {
        return;
    }
    let folder = Folder::new();
    folder.raw("base.img", 3 << 20);
    folder.done("overlay base.img a.qcow2");
    folder.write("a.qcow2", 0x77, "64k", "1M");
    folder.done("convert a.qcow2 flat.img");
    folder.done("convert a.qcow2 flat.qcow2");
    folder.done("convert flat.img again.qcow2");
    folder.same("a.qcow2", "qcow2", "flat.img", "raw");
    folder.same("a.qcow2", "qcow2", "flat.qcow2", "qcow2");
    folder.same("a.qcow2", "qcow2", "again.qcow2", "qcow2");
    assert!(folder.json("flat.qcow2")["base"].is_null());
    folder.sound("flat.qcow2");
    // An image as others make them.
    let said = folder.qemu_img("convert -c -f raw -O qcow2 -o compat=0.10 base.img theirs.qcow2");
    assert_eq!(said.status, Some(0), "{}", said.err);
    folder.done("convert theirs.qcow2 ours.img");
    folder.same("base.img", "raw", "ours.img", "raw");
    assert_eq!(folder.json("theirs.qcow2")["qcow2"]["version"], 2);
}

#[test]
fn qemu_img_and_check_agree() {
    if no_qemu_img("qemu_img_and_check_agree") {
        return;
    }
    let folder = Folder::new();
    let said = folder.qemu_img("create -f qcow2 -o lazy_refcounts=on a.qcow2 64M");
    assert_eq!(said.status, Some(0), "{}", said.err);
    // Killed in the middle: the image stays dirty.
    let killed = Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write -P 9 0 1M", "-c", "flush"])
        .args(["-c", "sigraise 9", "a.qcow2"])
        .current_dir(folder.0.path())
        .output()
        .unwrap();
    assert!(!killed.status.success());
    let info = folder.json("a.qcow2");
    assert_eq!(info["qcow2"]["dirty"], true, "{info}");
    let text = folder.done("info a.qcow2");
    assert!(text.contains("not closed cleanly"), "{text}");
    let said = folder.disk("check a.qcow2");
    assert_eq!(said.status, Some(4), "{}{}", said.out, said.err);
    assert!(said.out.contains("was not closed cleanly"), "{}", said.out);
    assert!(folder.done("check a.qcow2 --repair").contains("repaired"));
    folder.sound("a.qcow2");
    assert_eq!(folder.json("a.qcow2")["qcow2"]["dirty"], false);
}

// Help -----------------------------------------------------------------------------------------

#[test]
fn help_says_sizes_formats_and_exit_status() {
    let folder = Folder::new();
    let text = folder.done("--help");
    for word in [
        "create",
        "overlay",
        "info",
        "commit",
        "resize",
        "check",
        "convert",
        "512M",
        ".qcow2",
        "Exit status",
    ] {
        assert!(text.contains(word), "{word}");
    }
    for (command, word) in [
        ("create", "<PATH> <SIZE>"),
        ("overlay", "<BASE> <PATH>"),
        ("info", "json"),
        ("commit", "may be removed"),
        ("resize", "--shrink"),
        ("check", "Exit status"),
        ("convert", "<SRC> <DST>"),
    ] {
        let text = folder.done(&format!("{command} --help"));
        assert!(text.contains(word), "{command}: {word}");
    }
}
