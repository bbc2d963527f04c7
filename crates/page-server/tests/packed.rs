//! The packed form: what goes in comes out, zeroes cost next to nothing, and no file that lies is believed.

#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;

use alveole_page_server::{Memory, PackedError, PackedMemory, is_packed, pack};
use proptest::prelude::*;

const PAGE: usize = 4096;
const CHUNK: usize = 16 * PAGE;
const MARK: &[u8] = b"what lies behind the pages";

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn read(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn packed(memory: &[u8]) -> Vec<u8> {
    let into = tempfile::tempfile().unwrap();
    let sizes = pack(&file(memory), &into).unwrap();
    let bytes = read(&into);
    assert_eq!(sizes.packed_bytes, bytes.len() as u64);
    assert_eq!(sizes.memory_bytes, memory.len() as u64);
    bytes
}

fn unpacked(packed: &[u8]) -> Result<Vec<u8>, PackedError> {
    let memory = PackedMemory::open(file(packed))?;
    memory.verify()?;
    let into = tempfile::tempfile().unwrap();
    memory.unpack(&into)?;
    Ok(read(&into))
}

/// Pages of one kind each, and a tail.
fn memory(kinds: &[u8], tail: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (number, kind) in kinds.iter().enumerate() {
        let page = (0..PAGE).map(|at| match kind % 4 {
            0 | 1 => 0,
            2 => (number + at / 64) as u8,
            // As good as random.
            _ => ((number * PAGE + at).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8,
        });
        bytes.extend(page);
    }
    bytes.extend(tail);
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_is_packed_is_unpacked(
        kinds in prop::collection::vec(any::<u8>(), 0..80),
        tail in prop::collection::vec(any::<u8>(), 0..PAGE),
    ) {
        let memory = memory(&kinds, &tail);
        prop_assert!(unpacked(&packed(&memory)).unwrap() == memory);
    }
}

#[test]
fn zstd_itself_unpacks_it() {
    let memory = memory(&[2, 3, 0, 0, 2].repeat(40), MARK);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("memory.zst");
    std::fs::write(&path, packed(&memory)).unwrap();
    let Ok(done) = Command::new("zstd").args(["-d", "-q"]).arg(&path).output() else {
        let line = "SKIPPED zstd_itself_unpacks_it: there is no zstd\n";
        std::io::stderr().write_all(line.as_bytes()).unwrap();
        if let Some(log) = std::env::var_os("ALVEOLE_SKIP_LOG") {
            let log = File::options().append(true).create(true).open(log);
            log.unwrap().write_all(line.as_bytes()).unwrap();
        }
        return;
    };
    assert!(done.status.success(), "{done:?}");
    assert!(std::fs::read(folder.path().join("memory")).unwrap() == memory);
}

#[test]
fn holes_are_not_read_and_zeroes_cost_next_to_nothing() {
    // More than a test could read.
    let size = 512_u64 << 30;
    let from = tempfile::tempfile().unwrap();
    from.set_len(size + MARK.len() as u64).unwrap();
    from.write_all_at(&[7; PAGE], size / 2).unwrap();
    from.write_all_at(MARK, size).unwrap();
    let into = tempfile::tempfile().unwrap();
    let sizes = pack(&from, &into).unwrap();
    // Four bytes for each 128 KiB.
    assert!(sizes.packed_bytes < (size >> 17) * 4 + 100_000, "{sizes:?}");
    let mut memory = Memory::open(into, 0).unwrap();
    assert_eq!(memory.pages_bytes(), size);
    assert_eq!(memory.tail().unwrap(), MARK);
    // Zeroes that are no hole are none in what is unpacked.
    let zeroes = vec![0; 4 << 20];
    let packed = packed(&zeroes);
    assert!(packed.len() < 200, "{}", packed.len());
    let into = tempfile::tempfile().unwrap();
    PackedMemory::open(file(&packed))
        .unwrap()
        .unpack(&into)
        .unwrap();
    assert_eq!(into.metadata().unwrap().blocks(), 0);
    assert!(read(&into) == zeroes);
}

#[test]
fn a_plain_file_is_not_packed_and_a_packed_one_is_not_packed_again() {
    let plain = file(&memory(&[2; 40], MARK));
    assert!(!is_packed(&plain).unwrap() && !is_packed(&file(b"")).unwrap());
    assert!(matches!(
        PackedMemory::open(plain),
        Err(PackedError::NotPacked)
    ));
    let packed = file(&packed(&memory(&[2; 40], MARK)));
    assert!(is_packed(&packed).unwrap());
    let again = pack(&packed, &tempfile::tempfile().unwrap());
    assert!(matches!(again, Err(PackedError::Packed)));
}

#[test]
fn nothing_that_was_cut_is_whole() {
    let whole = packed(&memory(&[2, 0, 3, 0].repeat(20), MARK));
    for len in (0..whole.len()).filter(|len| len % 97 == 0 || len + 120 > whole.len()) {
        assert!(unpacked(&whole[..len]).is_err(), "{len} of {}", whole.len());
        assert!(
            unpacked(&whole[whole.len() - len..]).is_err(),
            "without the beginning"
        );
    }
}

#[test]
fn a_bit_that_changed_is_found_or_changes_nothing() {
    let memory = memory(&[2, 0, 3, 0].repeat(20), MARK);
    let mut bytes = packed(&memory);
    let (mut found, mut tried, len) = (0, 0, bytes.len());
    for bit in (0..len * 8).filter(|bit| bit % 61 == 0 || bit / 8 + 120 > len) {
        bytes[bit / 8] ^= 1 << (bit % 8);
        tried += 1;
        match unpacked(&bytes) {
            Err(_) => found += 1,
            // As in the descriptor of the table, where two bits mean nothing.
            Ok(same) => assert!(same == memory, "bit {bit}"),
        }
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
    assert!(found * 10 > tried * 9, "{found} of {tried}");
}

/// A file of these bytes with a seek table that says this.
fn with_table(frames: &[u8], entries: &[(u32, u32)], count: u32, descriptor: u8) -> Vec<u8> {
    let mut bytes = frames.to_vec();
    let body = entries.len() as u32 * 8 + 9;
    bytes.extend(0x184d_2a5e_u32.to_le_bytes());
    bytes.extend(body.to_le_bytes());
    for (compressed, size) in entries {
        bytes.extend(compressed.to_le_bytes());
        bytes.extend(size.to_le_bytes());
    }
    bytes.extend(count.to_le_bytes());
    bytes.push(descriptor);
    bytes.extend(0x8f92_eab1_u32.to_le_bytes());
    bytes
}

#[test]
fn a_table_that_lies_is_told_with_words() {
    let frame = zstd::bulk::compress(&[7; CHUNK], 3).unwrap();
    let (len, size) = (frame.len() as u32, CHUNK as u32);
    let zeroes = zstd::bulk::compress(&vec![0; 2 << 20], 3).unwrap();
    let bomb = zstd::bulk::compress(&vec![7; 256 << 20], 3).unwrap();
    let two = frame.repeat(2);
    let good = with_table(&frame, &[(len, size)], 1, 0);
    assert!(unpacked(&good).unwrap() == [7; CHUNK]);
    // Frames that others may have put in between are passed over.
    let mut skipped = frame.clone();
    skipped.extend([0x50, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 9]);
    let good = with_table(&skipped, &[(len, size), (9, 0)], 2, 0);
    assert!(unpacked(&good).unwrap() == [7; CHUNK]);
    for (bytes, part) in [
        (with_table(&frame, &[(len, size)], 2, 0), "does not begin"),
        (
            with_table(&frame, &[(len, size)], u32::MAX, 0),
            "are the most",
        ),
        (
            with_table(&frame, &[(len, size)], 1 << 20, 0),
            "longer than the file",
        ),
        (with_table(&frame, &[(len, size)], 1, 4), "form that is not"),
        (with_table(&frame, &[(len, size)], 1, 0x80), "not begin"),
        (
            with_table(&frame, &[(len + 1, size)], 1, 0),
            "not so many in the file",
        ),
        (with_table(&frame, &[(len - 1, size)], 1, 0), "they have"),
        (with_table(&frame, &[(len, 0)], 1, 0), "has some"),
        (
            with_table(&frame, &[(len, size + 4096)], 1, 0),
            "it has 65536",
        ),
        (
            with_table(&frame, &[(len, size - 4096)], 1, 0),
            "is damaged",
        ),
        (
            with_table(&two, &[(len, 100), (len, size)], 2, 0),
            "not of whole pages",
        ),
        (
            with_table(&bomb, &[(bomb.len() as u32, 256 << 20)], 1, 0),
            "has to be of zeroes",
        ),
        (
            with_table(&bomb, &[(bomb.len() as u32, 4096)], 1, 0),
            "is damaged",
        ),
        (
            with_table(&zeroes, &[(zeroes.len() as u32, 2 << 20)], 1, 0),
            "has to be of zeroes",
        ),
        (
            with_table(&zeroes, &[(zeroes.len() as u32, u32::MAX)], 1, 0),
            "at most 1 GiB",
        ),
    ] {
        let why = unpacked(&bytes).unwrap_err().to_string();
        assert!(why.contains(part), "{part}: {why}");
    }
}
