//! Against `qemu-img`: it must find our images sound and read the same from them, and we from its.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use alveole_qcow2::{
    Access, Backing, Compression, CreateOptions, Image, NoBacking, Repair, check, create,
};
use support::{Base, Random, content, differ, guest_write, read_all, skip};

/// Runs `qemu-img` in `folder`; gives its exit status and what it said.
fn ask(folder: &Path, words: &str) -> (i32, String) {
    let output = Command::new("qemu-img")
        .args(words.split_whitespace())
        .current_dir(folder)
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    (output.status.code().unwrap_or(-1), text)
}

fn qemu_img(folder: &Path, words: &str) -> String {
    let (status, text) = ask(folder, words);
    assert_eq!(status, 0, "qemu-img {words}: {text}");
    text
}

fn rw(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn make(path: &Path, options: &CreateOptions) {
    create(&File::create(path).unwrap(), options).unwrap();
}

fn writable(path: &Path) -> Image {
    Image::open(Box::new(rw(path)), Access::ReadWrite).unwrap()
}

fn readable(path: &Path) -> Image {
    Image::open(Box::new(File::open(path).unwrap()), Access::ReadOnly).unwrap()
}

fn folder() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    (dir, path)
}

fn scribble(image: &Image, path: &Path, model: &mut [u8], base: &Base, seed: u64, zeroes: bool) {
    let mut random = Random(seed);
    let file = rw(path);
    let size = model.len() as u64;
    for _ in 0..60 {
        let at = random.below(size);
        let len = (1 + random.below(150_000)).min(size - at);
        let range = at as usize..(at + len) as usize;
        match random.below(4) {
            0 if zeroes => {
                image.write_zeroes(at, len, true, base).unwrap();
                model[range].fill(0);
            }
            _ => {
                let data = vec![random.next() as u8; len as usize];
                guest_write(image, &file, at, &data, base).unwrap();
                model[range].copy_from_slice(&data);
            }
        }
    }
}

#[test]
fn what_we_write_qemu_finds_sound() {
    if skip("what_we_write_qemu_finds_sound") {
        return;
    }
    for (version, bits, order, with_base) in [
        (3, 16, 4, false),
        (3, 16, 4, true),
        (3, 9, 0, true),
        (3, 12, 6, false),
        (3, 21, 5, true),
        (2, 16, 4, true),
        (2, 9, 4, false),
    ] {
        let (_dir, at) = folder();
        let what = format!("version {version}, {bits} bits, order {order}, base {with_base}");
        let base = Base(if with_base {
            content(3_000_000, 7)
        } else {
            Vec::new()
        });
        fs::write(at.join("base"), &base.0).unwrap();
        let size = 4_000_256;
        let mut options = CreateOptions::new(size);
        (
            options.version,
            options.cluster_bits,
            options.refcount_order,
        ) = (version, bits, order);
        options.backing = with_base.then(|| Backing {
            path: "base".into(),
            format: Some("raw".into()),
        });
        make(&at.join("a"), &options);
        qemu_img(&at, "check a");
        let image = writable(&at.join("a"));
        let mut model = base.0.clone();
        model.resize(size as usize, 0);
        scribble(&image, &at.join("a"), &mut model, &base, 3, true);
        // What a kill leaves is repaired without loss.
        fs::copy(at.join("a"), at.join("killed")).unwrap();
        fs::write(at.join("model"), &model).unwrap();
        let (_, text) = ask(&at, "check -r all killed");
        qemu_img(&at, "check killed");
        assert_eq!(
            ask(&at, "compare -f qcow2 -F raw killed model").0,
            0,
            "{what}: {text}"
        );
        image.close().unwrap();
        qemu_img(&at, "check a");
        qemu_img(&at, "compare -f qcow2 -F raw a model");
        // Larger, smaller, and other content.
        let image = writable(&at.join("a"));
        for size in [6_000_128, 2_500_096, 5_000_192] {
            image.resize(size, &base).unwrap();
            model.resize(size as usize, 0);
            scribble(&image, &at.join("a"), &mut model, &base, size, false);
        }
        image.close().unwrap();
        qemu_img(&at, "check a");
        fs::write(at.join("model"), &model).unwrap();
        assert_eq!(ask(&at, "compare -f qcow2 -F raw a model").0, 0, "{what}");
    }
}

#[test]
fn what_qemu_writes_we_read() {
    if skip("what_qemu_writes_we_read") {
        return;
    }
    for options in [
        "-o compat=1.1",
        "-c -o compat=1.1",
        "-c -o compat=0.10",
        "-c -o compression_type=zstd",
        "-c -o compression_type=zstd,cluster_size=4096",
        "-c -o cluster_size=512,refcount_bits=1",
        "-c -o cluster_size=2M",
        "-c -o cluster_size=2M,compression_type=zstd",
        "-o lazy_refcounts=on,refcount_bits=64",
    ] {
        let (_dir, at) = folder();
        let mut model = content(5_000_192, 11);
        fs::write(at.join("raw"), &model).unwrap();
        qemu_img(&at, &format!("convert -f raw -O qcow2 {options} raw a"));
        let image = readable(&at.join("a"));
        assert_eq!(
            differ(&read_all(&image, &NoBacking), &model),
            None,
            "{options}"
        );
        let zstd = options.contains("zstd");
        assert_eq!(image.info().compression == Compression::Zstd, zstd);
        drop(image);
        // We write to it, and it reads the same.
        let image = writable(&at.join("a"));
        let none = Base(Vec::new());
        scribble(&image, &at.join("a"), &mut model, &none, 5, true);
        image.flush().unwrap();
        scribble(&image, &at.join("a"), &mut model, &none, 6, false);
        assert_eq!(
            differ(&read_all(&image, &NoBacking), &model),
            None,
            "{options}"
        );
        image.close().unwrap();
        qemu_img(&at, "check a");
        fs::write(at.join("model"), &model).unwrap();
        qemu_img(&at, "compare -f qcow2 -F raw a model");
    }
}

#[test]
fn snapshots_keep_what_they_have() {
    if skip("snapshots_keep_what_they_have") {
        return;
    }
    for compat in ["0.10", "1.1"] {
        let (_dir, at) = folder();
        let first = content(3_000_320, 21);
        fs::write(at.join("raw"), &first).unwrap();
        qemu_img(&at, &format!("convert -O qcow2 -o compat={compat} raw a"));
        qemu_img(&at, "snapshot -c one a");
        let mut model = first.clone();
        let none = Base(Vec::new());
        let image = writable(&at.join("a"));
        assert_eq!(image.info().snapshots, 1);
        scribble(&image, &at.join("a"), &mut model, &none, 1, true);
        image.discard(0, 1 << 20).unwrap();
        if compat == "1.1" {
            model[..1 << 20].fill(0);
        }
        // Killed and opened again: both states are counted.
        fs::copy(at.join("a"), at.join("killed")).unwrap();
        image.close().unwrap();
        for name in ["a", "killed"] {
            writable(&at.join(name)).close().unwrap();
            let (status, text) = ask(&at, &format!("check {name}"));
            let leaks_only = compat == "0.10" && name == "killed" && status == 3;
            assert!(status == 0 || leaks_only, "{name}: {text}");
            fs::write(at.join("model"), &model).unwrap();
            qemu_img(&at, &format!("compare -f qcow2 -F raw {name} model"));
            qemu_img(&at, &format!("snapshot -a one {name}"));
            qemu_img(&at, &format!("compare -f qcow2 -F raw {name} raw"));
            let image = readable(&at.join(name));
            assert_eq!(differ(&read_all(&image, &NoBacking), &first), None);
        }
        // With the snapshot gone, clusters may be written in place again.
        qemu_img(&at, "snapshot -d one a");
        let image = writable(&at.join("a"));
        let mut model = first;
        scribble(&image, &at.join("a"), &mut model, &none, 2, true);
        image.close().unwrap();
        qemu_img(&at, "check a");
        fs::write(at.join("model"), &model).unwrap();
        qemu_img(&at, "compare -f qcow2 -F raw a model");
    }
}

/// What `qemu-img check` says: faults and leaks.
fn verdict(text: &str) -> (u64, u64) {
    let number = |what: &str| {
        let line = text.lines().find(|line| line.contains(what));
        let word = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
        word.unwrap_or(0)
    };
    (
        number("errors were found"),
        number("leaked clusters were found"),
    )
}

#[test]
fn checks_agree() {
    if skip("checks_agree") {
        return;
    }
    let mut both_found = 0;
    for seed in 1..60_u64 {
        let (_dir, at) = folder();
        let mut options = CreateOptions::new(400 << 10);
        options.cluster_bits = 12;
        make(&at.join("a"), &options);
        let image = writable(&at.join("a"));
        let mut model = vec![0; 400 << 10];
        scribble(
            &image,
            &at.join("a"),
            &mut model,
            &Base(Vec::new()),
            seed,
            true,
        );
        image.close().unwrap();
        // Damage a count, an L2 entry's flag or offset: header, refcount table, block, L1 and L2 table lie in
        // the first clusters.
        let mut bytes = fs::read(at.join("a")).unwrap();
        let mut random = Random(seed * 77);
        let l2 = (0..bytes.len() / 4096)
            .map(|n| n * 4096)
            .find(|at| *at > 3 * 4096 && bytes[*at] & 0x7f == 0 && bytes[at + 1..at + 5] == [0; 4])
            .unwrap();
        for _ in 0..=random.below(3) {
            match random.below(3) {
                0 => bytes[2 * 4096 + 1 + 2 * random.below(60) as usize] = random.below(3) as u8,
                1 => bytes[l2 + 8 * random.below(90) as usize] ^= 0x80,
                _ => bytes[l2 + 6 + 8 * random.below(90) as usize] ^= 0x10,
            }
        }
        fs::write(at.join("a"), &bytes).unwrap();
        let (_, text) = ask(&at, "check -f qcow2 a");
        let report = check(&rw(&at.join("a")), Repair::No).unwrap();
        let (errors, leaks) = verdict(&text);
        let sound = (report.corruptions == 0, report.leaks);
        assert_eq!(
            sound,
            (errors == 0, leaks),
            "seed {seed}\n{text}\n{report:#?}"
        );
        both_found += u64::from(errors + leaks > 0);
        let repaired = check(&rw(&at.join("a")), Repair::All).unwrap();
        if repaired.corruptions == 0 {
            qemu_img(&at, "check a");
        }
    }
    assert!(both_found > 20, "{both_found}");
}
