//! Any bytes as a file of saved states, as they are and with checksums that fit. Run in `crates/saved-state`:
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run file -- -max_len=4096 -timeout=20`
#![no_main]

use alveole_saved_state::{HEADER_BYTES, Header, StateFile};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    read(bytes);
    let mut signed = bytes.to_vec();
    if sign(&mut signed).is_some() {
        read(&signed);
    }
});

/// What is read is written as it was.
fn read(bytes: &[u8]) {
    let _ = Header::read(bytes);
    if let Ok(file) = StateFile::read(bytes) {
        assert!(file.sections().count() <= bytes.len() / HEADER_BYTES);
        let again = StateFile::read(&file.to_bytes()).unwrap();
        assert!(file.sections().eq(again.sections()));
    }
}

/// Makes checksums, magic and length right, as far as sections follow each other.
fn sign(bytes: &mut [u8]) -> Option<()> {
    let len = bytes.len() as u64;
    bytes.get_mut(..8)?.copy_from_slice(b"\x89ALVSNP\n");
    bytes.get_mut(16..24)?.copy_from_slice(&len.to_le_bytes());
    let (first, mut rest) = bytes.split_at_mut_checked(HEADER_BYTES)?;
    sum(first);
    while let Some((header, after)) = rest.split_at_mut_checked(HEADER_BYTES) {
        let length = u64::from_le_bytes(header[40..48].try_into().ok()?);
        let length = usize::try_from(length).ok()?;
        if let Some(payload) = after.get(..length) {
            header[48..52].copy_from_slice(&crc32fast::hash(payload).to_le_bytes());
        }
        sum(header);
        rest = after.get_mut(length.checked_next_multiple_of(8)?..)?;
    }
    Some(())
}

fn sum(header: &mut [u8]) {
    let sum = crc32fast::hash(&header[..60]);
    header[60..64].copy_from_slice(&sum.to_le_bytes());
}
