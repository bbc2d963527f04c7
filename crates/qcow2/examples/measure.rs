//! Figures to look at, by hand: `cargo run --release -p alveole-qcow2 --example measure [folder]`.

#![expect(
    clippy::unwrap_used,
    reason = "a measurement that cannot go on says where"
)]

use std::fs::File;
use std::hint::black_box;
use std::time::Instant;

use alveole_qcow2::{
    Access, Backing, BackingRead, CreateOptions, Image, NoBacking, Repair, check, create,
};

fn main() {
    let folder = std::env::args().nth(1).unwrap_or_else(|| ".".to_owned());
    let path = format!("{folder}/alveole-measure.qcow2");
    let backing = || Backing {
        path: "base.raw".into(),
        format: Some("raw".into()),
    };

    for size_bytes in [8_u64 << 30, 2 << 40] {
        let mut times: Vec<_> = (0..200)
            .map(|_| {
                drop(std::fs::remove_file(&path));
                let start = Instant::now();
                let file = File::create(&path).unwrap();
                create(&file, &CreateOptions::overlay(size_bytes, backing())).unwrap();
                start.elapsed()
            })
            .collect();
        times.sort();
        println!(
            "overlay of {} GiB: {:?} (median of 200)",
            size_bytes >> 30,
            times[100]
        );
        let mut times: Vec<_> = (0..200).map(|_| open_once(&path)).collect();
        times.sort();
        println!("  opened for writing: {:?}", times[100]);
    }

    drop(std::fs::remove_file(&path));
    create(&File::create(&path).unwrap(), &CreateOptions::new(8 << 30)).unwrap();
    let image = open(&path);
    let start = Instant::now();
    for n in 0..1024 {
        image
            .write_allocating(n << 20, &[1; 1 << 20], &NoBacking)
            .unwrap();
    }
    println!("1 GiB allocated, 1 MiB at a time: {:?}", start.elapsed());
    let start = Instant::now();
    for n in 0..1000 {
        image
            .write_allocating((2 << 30) + (n << 16), &[1; 4096], &NoBacking)
            .unwrap();
    }
    println!(
        "4 KiB into a new cluster: {:?} each",
        start.elapsed() / 1000
    );
    copy_on_write(&format!("{path}.over"));
    for threads in [1, 2] {
        let start = Instant::now();
        let rounds = 5_000_000_u64;
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let image = &image;
                scope.spawn(move || {
                    let mut random = 88_172_645_463_325_252_u64 + thread;
                    for _ in 0..rounds {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        let at = (random % (1 << 30)) & !4095;
                        black_box(image.lookup(at, 4096).unwrap());
                    }
                });
            }
        });
        let each = start.elapsed().as_nanos() / u128::from(rounds);
        println!("lookup of 4 KiB, {threads} threads: {each} ns");
    }
    let start = Instant::now();
    for n in 0..5_000_000_u64 {
        let at = (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (1 << 30)) & !4095;
        black_box(image.lookup_write(at, 4096).unwrap());
    }
    println!(
        "lookup_write of 4 KiB: {} ns",
        start.elapsed().as_nanos() / 5_000_000
    );
    image.flush().unwrap();
    // As a kill would leave it.
    std::mem::forget(image);
    let start = Instant::now();
    let image = open(&path);
    println!(
        "1 GiB of data, opened dirty and recounted: {:?}",
        start.elapsed()
    );
    let start = Instant::now();
    image.close().unwrap();
    println!("closed: {:?}", start.elapsed());
    let start = Instant::now();
    let report = check(&File::open(&path).unwrap(), Repair::No).unwrap();
    println!("checked: {:?}, {report:?}", start.elapsed());
    std::fs::remove_file(&path).unwrap();
}

struct Ones;

impl BackingRead for Ones {
    fn read_at(&self, _offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        into.fill(1);
        Ok(())
    }

    fn size_bytes(&self) -> u64 {
        8 << 30
    }
}

/// The dear case: what is under the cluster must be copied durably before it is shown.
fn copy_on_write(path: &str) {
    let backing = Backing {
        path: "base.raw".into(),
        format: Some("raw".into()),
    };
    let options = CreateOptions::overlay(8 << 30, backing);
    create(&File::create(path).unwrap(), &options).unwrap();
    let image = open(path);
    for len in [4096, 1 << 20] {
        let start = Instant::now();
        for n in 0..200 {
            let at = (n << 20) + (len << 12);
            image
                .write_allocating(at, &vec![2; len as usize], &Ones)
                .unwrap();
        }
        println!(
            "{len} bytes over a backing image: {:?} each",
            start.elapsed() / 200
        );
    }
    drop(image);
    std::fs::remove_file(path).unwrap();
}

fn open(path: &str) -> Image {
    let file = File::options().read(true).write(true).open(path).unwrap();
    Image::open(Box::new(file), Access::ReadWrite).unwrap()
}

fn open_once(path: &str) -> std::time::Duration {
    let start = Instant::now();
    let image = open(path);
    let took = start.elapsed();
    image.close().unwrap();
    took
}
