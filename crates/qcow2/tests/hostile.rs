//! Images that lie. Each lie is refused by name, at the door or at the access; none makes anything panic.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::sync::{Arc, Mutex};

use alveole_qcow2::{
    Access, Backing, Compression, CreateOptions, Extent, Image, ImageError, ImageFile, NoBacking,
    OpenError, Repair, check, create, fuzz_open_and_read,
};
use proptest::prelude::*;
use support::{Memory, Random, memory, open};

const CLUSTER: usize = 4096;

/// A small image: header, refcount table, block, L1 table, then data and their L2 table.
fn sound(version: u32) -> Vec<u8> {
    let file = memory();
    let mut options = CreateOptions::new(1 << 20);
    (options.version, options.cluster_bits) = (version, 12);
    create(&file, &options).unwrap();
    let image = open(&file);
    image
        .write_allocating(0, &[7; 5 * CLUSTER], &NoBacking)
        .unwrap();
    image.close().unwrap();
    Arc::into_inner(file).unwrap().into_inner().unwrap()
}

/// Where the first L2 table lies.
fn l2_table(bytes: &[u8]) -> usize {
    let entry: [u8; 8] = bytes[3 * CLUSTER..3 * CLUSTER + 8].try_into().unwrap();
    (u64::from_be_bytes(entry) & 0x00ff_ffff_ffff_fe00) as usize
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn with(version: u32, at: usize, value: &[u8]) -> Vec<u8> {
    let mut bytes = sound(version);
    put(&mut bytes, at, value);
    bytes
}

fn try_open(bytes: Vec<u8>, access: Access) -> Result<Image, OpenError> {
    Image::open(Box::new(Mutex::new(bytes)), access)
}

fn refusal(bytes: Vec<u8>) -> String {
    match try_open(bytes, Access::ReadOnly) {
        Ok(_) => "opened".to_owned(),
        Err(e) => e.to_string(),
    }
}

#[test]
fn lies_in_the_header_are_named() {
    let u32s = u32::to_be_bytes;
    let u64s = u64::to_be_bytes;
    let lies: [(&str, usize, &[u8]); 22] = [
        ("not a qcow2 image", 0, b"QFI!"),
        ("version is 4", 4, &u32s(4)),
        ("cluster_bits is 8", 20, &u32s(8)),
        ("cluster_bits is 22", 20, &u32s(22)),
        ("cluster_bits is 4294967295", 20, &u32s(u32::MAX)),
        ("encryption (crypt_method 2)", 32, &u32s(2)),
        (
            "l1_size is 4294967295: at most 4194304",
            36,
            &u32s(u32::MAX),
        ),
        (
            "l1_size is 0: a disk of 1048576 bytes needs 1",
            36,
            &u32s(0),
        ),
        ("size is 18446744073709551615", 24, &u64s(u64::MAX)),
        ("needs 65536", 24, &u64s(128 << 30)),
        ("l1_table_offset is 12289", 40, &u64s(12289)),
        ("l1_table_offset is 1099511627776", 40, &u64s(1 << 40)),
        ("l1_table_offset is 0: the header", 40, &u64s(0)),
        ("L1 table and the refcount table overlap", 40, &u64s(4096)),
        (
            "refcount_table_offset is 18446744073709547520",
            48,
            &u64s(u64::MAX - 4095),
        ),
        ("refcount_table_clusters is 0", 56, &u32s(0)),
        ("refcount_table_clusters is 2049", 56, &u32s(2049)),
        ("nb_snapshots is 65537", 60, &u32s(65537)),
        ("snapshots_offset is 0: the header", 60, &u32s(1)),
        ("refcount_order is 7", 96, &u32s(7)),
        ("header_length is 105", 100, &u32s(105)),
        (
            "compression_type is 1: its feature bit is not set",
            104,
            &[1],
        ),
    ];
    for (words, at, value) in lies {
        let said = refusal(with(3, at, value));
        assert!(said.contains(words), "{words}: {said}");
    }
    for (words, bit) in [
        ("an external data file", 2),
        ("extended L2 entries", 4),
        ("incompatible feature bit 63", 63),
    ] {
        let said = refusal(with(3, 72, &u64s(1 << bit)));
        assert!(said.contains(words), "{words}: {said}");
    }
    for len in [0, 3, 4, 71, 72, 103] {
        let mut bytes = sound(3);
        bytes.truncate(len);
        let said = refusal(bytes);
        assert!(said.contains("ends after") || len < 4, "{said}");
    }
}

#[test]
fn unknown_features_are_called_as_the_image_calls_them() {
    let mut bytes = with(3, 72, &(1_u64 << 9).to_be_bytes());
    put(&mut bytes, 112, &0x6803_f857_u32.to_be_bytes());
    put(&mut bytes, 116, &48_u32.to_be_bytes());
    put(&mut bytes, 120, b"\x00\x09time \x1btravel");
    let said = refusal(bytes);
    assert!(said.contains("\"time \\x1btravel\""), "{said}");
}

#[test]
fn names_are_bounded() {
    let mut bytes = with(3, 8, &200_u64.to_be_bytes());
    put(&mut bytes, 16, &1024_u32.to_be_bytes());
    assert!(refusal(bytes.clone()).contains("backing_file_size is 1024"));
    put(&mut bytes, 16, &1023_u32.to_be_bytes());
    put(&mut bytes, 8, &(4096_u64 - 1000).to_be_bytes());
    assert!(refusal(bytes.clone()).contains("backing_file_offset is 3096"));
    put(&mut bytes, 8, &200_u64.to_be_bytes());
    put(&mut bytes, 16, &2_u32.to_be_bytes());
    put(&mut bytes, 200, b"\xff\xff");
    assert!(refusal(bytes).contains("not UTF-8"));
    let mut bytes = sound(3);
    put(&mut bytes, 112, &0xe279_2aca_u32.to_be_bytes());
    put(&mut bytes, 116, &u32::MAX.to_be_bytes());
    assert!(refusal(bytes).contains("length of a header extension is 4294967295"));
}

#[test]
fn marks_are_honoured() {
    let corrupt = with(3, 72, &2_u64.to_be_bytes());
    assert!(
        try_open(corrupt.clone(), Access::ReadOnly)
            .unwrap()
            .info()
            .corrupt
    );
    let refused = try_open(corrupt, Access::ReadWrite);
    assert!(matches!(refused, Err(OpenError::MarkedCorrupt)));
    // Autoclear bits go when the image is opened for writing.
    let file: Memory = Arc::new(Mutex::new(with(3, 88, &[0xff; 8])));
    drop(Image::open(Box::new(Arc::clone(&file)), Access::ReadOnly).unwrap());
    assert_eq!(file.lock().unwrap()[88..96], [0xff; 8]);
    drop(open(&file));
    assert_eq!(file.lock().unwrap()[88..96], [0; 8]);
}

#[test]
fn lies_in_tables_are_told_where_they_are_met() {
    let table = l2_table(&sound(3));
    for (words, entry) in [
        ("reserved bits", 0x8000_0000_0000_5002_u64),
        ("reserved bits", 0x8100_0000_0000_5000),
        ("cluster boundary", 0x8000_0000_0000_5200),
        ("beyond the end", 0x8000_0000_4000_0000),
        ("cluster 0", 0x8000_0000_0000_0000),
        ("compressed data lie beyond", 0x4000_0000_4000_0000),
        ("compressed data lie in the header", 0x4000_0000_0000_0010),
        ("compressed and claims", 0xc000_0000_0000_5000),
    ] {
        let image = try_open(with(3, table, &entry.to_be_bytes()), Access::ReadOnly).unwrap();
        let said = image.lookup(0, 10).unwrap_err().to_string();
        assert!(said.contains(words), "{words}: {said}");
        assert!(
            matches!(image.lookup(4096, 10), Ok(Extent::Data { .. })),
            "{words}"
        );
    }
    let image = try_open(with(2, table, &1_u64.to_be_bytes()), Access::ReadOnly).unwrap();
    assert!(image.lookup(0, 1).is_err());
    for entry in [0x8000_0000_0000_5001_u64, 0x8000_0000_4000_0000, 0x200] {
        let bytes = with(3, 3 * CLUSTER, &entry.to_be_bytes());
        let image = try_open(bytes, Access::ReadWrite).unwrap();
        assert!(matches!(image.lookup(0, 1), Err(ImageError::Table { .. })));
        let written = image.write_allocating(0, &[1], &NoBacking);
        assert!(matches!(written, Err(ImageError::Table { .. })));
    }
}

#[test]
fn data_never_go_over_tables() {
    let table = l2_table(&sound(3));
    for (cluster, what) in [(1, "refcount table"), (3, "L1 table")] {
        let entry = (1_u64 << 63) | (cluster * CLUSTER as u64);
        let file: Memory = Arc::new(Mutex::new(with(3, table, &entry.to_be_bytes())));
        let image = open(&file);
        let before = file.lock().unwrap().clone();
        image.lookup_write(0, 1).unwrap();
        let written = image.write_allocating(0, &[1], &NoBacking);
        let said = written.unwrap_err().to_string();
        assert!(said.contains(what), "{said}");
        assert!(image.discard(0, CLUSTER as u64).is_err());
        assert!(*file.lock().unwrap() == before);
    }
    // Counts that call everything free do not give tables away.
    let mut bytes = sound(3);
    bytes[2 * CLUSTER..3 * CLUSTER].fill(0);
    let image = try_open(bytes, Access::ReadWrite).unwrap();
    let written = image.write_allocating(1 << 19, &[1], &NoBacking);
    assert!(matches!(
        written,
        Err(ImageError::Overlap { what: "header", .. })
    ));
    // A shared cluster that nobody counts.
    let mut bytes = sound(3);
    bytes[table] = 0;
    bytes[2 * CLUSTER..3 * CLUSTER].fill(0);
    let image = try_open(bytes, Access::ReadWrite).unwrap();
    assert!(image.write_allocating(0, &[1], &NoBacking).is_err());
}

#[test]
fn damaged_tables_are_not_rebuilt_over() {
    let table = l2_table(&sound(3));
    let mut bytes = with(3, 72, &1_u64.to_be_bytes());
    put(&mut bytes, table, &0x8000_0000_4000_0000_u64.to_be_bytes());
    assert!(try_open(bytes.clone(), Access::ReadOnly).is_ok());
    let refused = try_open(bytes, Access::ReadWrite)
        .err()
        .unwrap()
        .to_string();
    assert!(refused.contains("not closed cleanly"), "{refused}");
}

/// As [`sound`], with counts of `1 << order` bits.
fn sound_with_counts(order: u32) -> Vec<u8> {
    let file = memory();
    let mut options = CreateOptions::new(1 << 20);
    (options.cluster_bits, options.refcount_order) = (12, order);
    create(&file, &options).unwrap();
    let image = open(&file);
    image
        .write_allocating(0, &[7; 5 * CLUSTER], &NoBacking)
        .unwrap();
    image.close().unwrap();
    Arc::into_inner(file).unwrap().into_inner().unwrap()
}

#[test]
fn counts_that_would_overflow_are_refused() {
    // Counts of one bit, and two entries that share a cluster.
    let mut bytes = sound_with_counts(0);
    let table = l2_table(&bytes);
    let first: [u8; 8] = bytes[table..table + 8].try_into().unwrap();
    put(&mut bytes, table + 8, &first);
    let report = check(&Mutex::new(bytes.clone()), Repair::No).unwrap();
    assert!(report.corruptions > 0, "{report:?}");
    let file = Mutex::new(bytes.clone());
    let e = check(&file, Repair::All).unwrap_err().to_string();
    assert!(
        e.contains("the reference count of a cluster would pass 1"),
        "{e}"
    );
    assert!(
        *file.lock().unwrap() == bytes,
        "it was changed all the same"
    );
    // Not closed, it would have to be counted again.
    put(&mut bytes, 72, &1_u64.to_be_bytes());
    let refused = try_open(bytes.clone(), Access::ReadWrite).unwrap_err();
    let told = std::error::Error::source(&refused).map_or(String::new(), ToString::to_string);
    let told = format!("{refused} {told}");
    assert!(told.contains("would pass 1"), "{told}");
    let image = try_open(bytes, Access::ReadOnly).unwrap();
    let mut two = [0; 2];
    image
        .read(CLUSTER as u64 - 1, &mut two, &NoBacking)
        .unwrap();
    assert_eq!(two, [7, 7]);
}

#[test]
fn counts_at_their_most_are_lived_with() {
    for order in 0..=6 {
        let mut bytes = sound_with_counts(order);
        let table = l2_table(&bytes);
        bytes[2 * CLUSTER..3 * CLUSTER].fill(0xff);
        // One cluster is said to be shared: it has to move, and its count goes down.
        bytes[table] = 0;
        let image = try_open(bytes, Access::ReadWrite).unwrap();
        for n in 0..64 {
            // All clusters that are counted are in use, so says the image; what comes of it is an error or a cluster further on.
            let at = n * 2 * CLUSTER as u64;
            if image.write_allocating(at, &[9; 100], &NoBacking).is_ok() {
                let mut byte = [0];
                image.read(at + 99, &mut byte, &NoBacking).unwrap();
                assert_eq!(byte, [9], "counts of {} bits", 1 << order);
            }
            let _ = image.discard(at, CLUSTER as u64);
        }
        image.flush().unwrap();
    }
}

#[test]
fn a_refcount_table_that_lies_stops_allocations_and_no_reads() {
    for (words, entry) in [
        ("beyond the end", 0x4000_0000_u64),
        ("cluster boundary", 0x200),
        ("reserved bits", 0x2001),
    ] {
        let bytes = with(3, CLUSTER, &entry.to_be_bytes());
        let image = try_open(bytes, Access::ReadWrite).unwrap();
        let e = image.write_allocating(1 << 19, &[1], &NoBacking);
        let e = e.unwrap_err().to_string();
        assert!(
            e.contains("refcount table") && e.contains(words),
            "{words}: {e}"
        );
        let mut byte = [0];
        image.read(0, &mut byte, &NoBacking).unwrap();
        assert_eq!(byte, [7]);
    }
}

#[test]
fn nonsense_does_not_decompress() {
    for (kind, data) in [
        (Compression::Zlib, vec![0xff; 300]),
        (Compression::Zlib, vec![0; 300]),
        (Compression::Zstd, vec![0xff; 300]),
        // A frame that wants a window of gigabytes.
        (
            Compression::Zstd,
            vec![0x28, 0xb5, 0x2f, 0xfd, 0, 0xf8, 1, 0, 0],
        ),
        // A block that repeats one byte far beyond a cluster is cut there.
        (
            Compression::Zstd,
            vec![0x28, 0xb5, 0x2f, 0xfd, 0, 0x50, 0x03, 0, 0x10, 7],
        ),
    ] {
        let mut bytes = sound(3);
        let table = l2_table(&bytes);
        let at = bytes.len();
        if kind == Compression::Zstd {
            put(&mut bytes, 72, &8_u64.to_be_bytes());
            bytes[104] = 1;
        }
        bytes.extend(&data);
        bytes.resize(at + CLUSTER, 0);
        let entry = (1_u64 << 62) | at as u64;
        put(&mut bytes, table, &entry.to_be_bytes());
        let image = try_open(bytes, Access::ReadWrite).unwrap();
        assert_eq!(image.lookup(0, 10).unwrap(), Extent::Compressed { len: 10 });
        let read = image.read_compressed(0, &mut [0; 10]);
        match data.len() {
            10 => read.unwrap(),
            _ => assert!(
                matches!(read, Err(ImageError::Compressed { .. })),
                "{read:?}"
            ),
        }
    }
}

#[test]
fn ranges_are_checked() {
    let image = try_open(sound(3), Access::ReadWrite).unwrap();
    assert!(image.lookup(1 << 20, 1).is_err());
    assert!(image.lookup(u64::MAX, u64::MAX).is_err());
    assert!(image.lookup_write((1 << 20) - 1, 2).is_err());
    assert!(image.discard(u64::MAX, 2).is_err());
    assert!(image.write_zeroes(1, 1 << 20, true, &NoBacking).is_err());
    assert!(image.write_allocating(1 << 20, &[1], &NoBacking).is_err());
    assert!(image.resize(513, &NoBacking).is_err());
    assert!(image.resize(1 << 62, &NoBacking).is_err());
}

#[test]
fn a_large_disk_does_not_need_its_tables_in_memory() {
    let file = memory();
    let backing = Backing {
        path: "base".into(),
        format: None,
    };
    create(&file, &CreateOptions::overlay(2 << 40, backing)).unwrap();
    assert!(file.len().unwrap() < 1 << 20);
    let image = open(&file);
    assert_eq!(
        image.lookup(0, 2 << 40).unwrap(),
        Extent::Backing { len: 2 << 40 }
    );
    for n in 0..200 {
        let at = n * (10 << 30) + 12345;
        image.write_allocating(at, &[n as u8], &NoBacking).unwrap();
    }
    for n in 0..200 {
        let mut byte = [0];
        image
            .read(n * (10 << 30) + 12345, &mut byte, &NoBacking)
            .unwrap();
        assert_eq!(byte, [n as u8]);
    }
    image.close().unwrap();
    assert_eq!(check(&file, Repair::No).unwrap().corruptions, 0);
}

/// An image with something of everything in it.
fn rich(seed: u64) -> Vec<u8> {
    let file = memory();
    let mut options = CreateOptions::new(300 << 10);
    options.cluster_bits = 9;
    options.version = 2 + (seed % 2) as u32;
    create(&file, &options).unwrap();
    let image = open(&file);
    let mut random = Random(seed | 1);
    for _ in 0..8 {
        let at = random.below(299 << 10);
        image.write_allocating(at, &[1; 1000], &NoBacking).unwrap();
        image.write_zeroes(at, 700, false, &NoBacking).unwrap();
    }
    // As a kill would leave it, or closed.
    let left = file.lock().unwrap().clone();
    drop(image);
    match seed % 3 {
        0 => left,
        _ => Arc::into_inner(file).unwrap().into_inner().unwrap(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn damage_never_panics(
        seed in any::<u64>(),
        damage in proptest::collection::vec((any::<u32>(), any::<u8>(), any::<bool>()), 1..12),
    ) {
        let mut bytes = rich(seed);
        for (at, value, in_header) in damage {
            let within = if in_header { 112 } else { bytes.len() };
            bytes[at as usize % within] = value;
        }
        fuzz_open_and_read(&bytes);
    }
}
