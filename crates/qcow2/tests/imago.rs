//! Against `imago`, an engine that others wrote from the same format description: it must read the same from our
//! images and write to them without harm, and we from and to its. `oracle.rs` asks `qemu-img` the same, where that is
//! installed; this one always runs.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use alveole_qcow2::{
    Access, Backing, BackingRead, CreateOptions, Image, NoBacking, Repair, check, create,
};
use imago::file::File as ImagoFile;
use imago::format::PreallocateMode;
use imago::qcow2::Qcow2;
use imago::{
    FormatAccess, FormatCreateBuilder, FormatDriverBuilder, PermissiveImplicitOpenGate, Storage,
    StorageCreateOptions,
};
use support::{Base, Random, content, differ, guest_write, read_all, skip};

/// Requests between two looks: each looks at all of the disk.
const ROUNDS: usize = 40;

type Imago = FormatAccess<ImagoFile>;

/// Opens an image, and what it is laid over, by imago.
fn try_imago(path: &Path, write: bool) -> std::io::Result<Imago> {
    let image = Qcow2::<ImagoFile>::builder_path(path)
        .write(write)
        .open(PermissiveImplicitOpenGate::default())?;
    Ok(FormatAccess::new(image))
}

fn imago(path: &Path, write: bool) -> Imago {
    try_imago(path, write).unwrap()
}

fn imago_reads(image: &Imago) -> Vec<u8> {
    let mut all = vec![0xee; image.size() as usize];
    image.read(&mut all, 0).unwrap();
    all
}

fn writable(path: &Path) -> Image {
    let file = File::options().read(true).write(true).open(path).unwrap();
    Image::open(Box::new(file), Access::ReadWrite).unwrap()
}

fn we_read(path: &Path, base: &dyn BackingRead) -> Vec<u8> {
    let file = Box::new(File::open(path).unwrap());
    read_all(&Image::open(file, Access::ReadOnly).unwrap(), base)
}

/// Both read `model`, and the tables agree with one another.
fn both_read(path: &Path, base: &dyn BackingRead, model: &[u8], what: &str) {
    assert_eq!(differ(&we_read(path, base), model), None, "{what}: we");
    let theirs = imago_reads(&imago(path, false));
    assert_eq!(differ(&theirs, model), None, "{what}: imago");
    let report = check(&File::open(path).unwrap(), Repair::No).unwrap();
    let found = (report.corruptions, report.leaks);
    assert_eq!(found, (0, 0), "{what}: {report:#?}");
}

/// What a guest may ask for, by our engine.
fn scribble(image: &Image, path: &Path, model: &mut [u8], base: &dyn BackingRead, seed: u64) {
    let mut random = Random(seed);
    let file = File::options().read(true).write(true).open(path).unwrap();
    let zeroing = image.info().version >= 3;
    for _ in 0..ROUNDS {
        let (at, len) = range(&mut random, model.len());
        let here = at as usize..(at + len) as usize;
        match random.below(6) {
            0 => {
                image
                    .write_zeroes(at, len, random.below(2) == 0, base)
                    .unwrap();
                model[here].fill(0);
            }
            1 if zeroing => {
                image.discard(at, len).unwrap();
                // What a discard leaves of the guest's bytes is not promised.
                let mut now = vec![0; len as usize];
                image.read(at, &mut now, base).unwrap();
                model[here].copy_from_slice(&now);
            }
            _ => {
                let data = vec![random.next() as u8; len as usize];
                guest_write(image, &file, at, &data, base).unwrap();
                model[here].copy_from_slice(&data);
            }
        }
    }
}

/// The same by imago, which makes zeroes in version 3 only.
fn imago_scribble(image: &mut Imago, model: &mut [u8], zeroing: bool, seed: u64) {
    let mut random = Random(seed);
    for _ in 0..ROUNDS {
        let (at, len) = range(&mut random, model.len());
        let here = at as usize..(at + len) as usize;
        match random.below(6) {
            0 if zeroing => {
                image.write_zeroes(at, len).unwrap();
                model[here].fill(0);
            }
            1 if zeroing => {
                image.discard_to_zero(at, len).unwrap();
                model[here].fill(0);
            }
            _ => {
                let data = vec![random.next() as u8; len as usize];
                image.write(&data, at).unwrap();
                model[here].copy_from_slice(&data);
            }
        }
    }
    image.flush().unwrap();
}

fn range(random: &mut Random, size: usize) -> (u64, u64) {
    let at = random.below(size as u64);
    let len = (1 + random.below(150_000)).min(size as u64 - at);
    (at, len)
}

fn folder() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    (dir, path)
}

#[test]
fn what_we_write_imago_reads_and_writes() {
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
        let path = at.join("a");
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
        create(&File::create(&path).unwrap(), &options).unwrap();
        let mut model = base.0.clone();
        model.resize(size as usize, 0);
        both_read(&path, &base, &model, &format!("{what}, empty"));

        let image = writable(&path);
        scribble(&image, &path, &mut model, &base, 3);
        image.close().unwrap();
        both_read(&path, &base, &model, &format!("{what}, written"));

        let image = writable(&path);
        for size in [6_000_128, 2_500_096, 5_000_192] {
            image.resize(size, &base).unwrap();
            model.resize(size as usize, 0);
            scribble(&image, &path, &mut model, &base, size);
        }
        image.close().unwrap();
        both_read(&path, &base, &model, &format!("{what}, resized"));

        // And by turns.
        let mut theirs = imago(&path, true);
        imago_scribble(&mut theirs, &mut model, version == 3, 5);
        drop(theirs);
        both_read(&path, &base, &model, &format!("{what}, written by imago"));
        let image = writable(&path);
        scribble(&image, &path, &mut model, &base, 9);
        image.close().unwrap();
        both_read(&path, &base, &model, &format!("{what}, written by both"));
    }
}

#[test]
fn what_imago_writes_we_read_and_write() {
    for (cluster, refcount_bits, with_base) in [
        (65536, 16, false),
        (65536, 16, true),
        (512, 1, true),
        (4096, 64, false),
        (2 << 20, 32, true),
    ] {
        let (_dir, at) = folder();
        let what =
            format!("clusters of {cluster}, counts of {refcount_bits} bits, base {with_base}");
        let base = Base(if with_base {
            content(3_000_320, 11)
        } else {
            Vec::new()
        });
        fs::write(at.join("base"), &base.0).unwrap();
        let path = at.join("a");
        let file = StorageCreateOptions::new().filename(&path);
        let file = ImagoFile::create_open(file).unwrap();
        let size = 4_000_256;
        let mut builder = Qcow2::<ImagoFile>::create_builder(file)
            .size(size)
            .cluster_size(cluster)
            .refcount_width(refcount_bits);
        if with_base {
            builder = builder.backing("base".into(), "raw".into());
        }
        builder.create().unwrap();
        let mut model = base.0.clone();
        model.resize(size as usize, 0);
        both_read(&path, &base, &model, &format!("{what}, empty"));

        let mut theirs = imago(&path, true);
        imago_scribble(&mut theirs, &mut model, true, 21);
        drop(theirs);
        both_read(&path, &base, &model, &format!("{what}, written"));

        // To the end of a cluster and not below that of the base: when such a disk grows again imago shows what the cut
        // cluster held, and what the base has there; we and QEMU show zeroes.
        let mut theirs = imago(&path, true);
        for size in [6_000_128, 4 << 20, 5_000_192] {
            theirs.resize(size, PreallocateMode::None).unwrap();
            model.resize(size as usize, 0);
            imago_scribble(&mut theirs, &mut model, true, size);
        }
        drop(theirs);
        both_read(&path, &base, &model, &format!("{what}, resized"));

        let image = writable(&path);
        scribble(&image, &path, &mut model, &base, 23);
        image.close().unwrap();
        both_read(&path, &base, &model, &format!("{what}, written by both"));
    }
}

#[test]
fn compressed_clusters_read_the_same() {
    if skip("compressed_clusters_read_the_same") {
        return;
    }
    for options in [
        "compression_type=zlib",
        "compression_type=zlib,cluster_size=512",
        "compression_type=zlib,cluster_size=2M",
        "compression_type=zstd",
    ] {
        let (_dir, at) = folder();
        let mut model = content(5_000_192, 31);
        fs::write(at.join("raw"), &model).unwrap();
        let made = Command::new("qemu-img")
            .args([
                "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, "raw", "a",
            ])
            .current_dir(&at)
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        let path = at.join("a");
        if options.contains("zstd") {
            // imago 0.2 knows zlib only, and says so; when it learns zstd it judges that, too.
            assert!(try_imago(&path, false).is_err());
            continue;
        }
        both_read(&path, &NoBacking, &model, options);
        let image = writable(&path);
        scribble(&image, &path, &mut model, &NoBacking, 33);
        image.close().unwrap();
        both_read(&path, &NoBacking, &model, options);
        let mut theirs = imago(&path, true);
        imago_scribble(&mut theirs, &mut model, true, 35);
        drop(theirs);
        both_read(&path, &NoBacking, &model, options);
    }
}
