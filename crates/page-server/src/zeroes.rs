//! Frames of nothing but zeroes, in the one form that this crate writes and knows again without decoding.
//!
//! Four bytes for each 128 KiB: a frame header, then blocks that repeat one byte (RFC 8878, 3.1.1.1 and 3.1.1.2.2).

const MAGIC: u32 = 0xfd2f_b528;
/// The content's size has four bytes; a window is said; no checksum, as there is one content only.
const DESCRIPTOR: u8 = 0b1000_0000;
/// A window of 128 KiB: 2^(10 + 7) bytes.
const WINDOW: u8 = 7 << 3;
/// The largest block (RFC 8878, 3.1.1.2.4).
const BLOCK_BYTES: u32 = 128 << 10;
const HEADER_BYTES: usize = 10;
const BYTES_A_BLOCK: usize = 4;
const REPEATED: u32 = 1 << 1;

/// Length of the frame that has this many zeroes.
pub(crate) fn frame_bytes(size: u32) -> usize {
    HEADER_BYTES + size.div_ceil(BLOCK_BYTES) as usize * BYTES_A_BLOCK
}

/// The frame that has this many zeroes, of which there is at least one.
pub(crate) fn frame(size: u32) -> Vec<u8> {
    let mut frame = Vec::with_capacity(frame_bytes(size));
    frame.extend(MAGIC.to_le_bytes());
    frame.extend([DESCRIPTOR, WINDOW]);
    frame.extend(size.to_le_bytes());
    let mut left = size;
    while left > 0 {
        let block = left.min(BLOCK_BYTES);
        left -= block;
        let header = block << 3 | REPEATED | u32::from(left == 0);
        frame.extend(&header.to_le_bytes()[..3]);
        frame.push(0);
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zstd_unpacks_them_to_zeroes() {
        for size in [1, 4096, 128 << 10, (128 << 10) + 1, 3 << 20] {
            let frame = frame(size);
            assert_eq!(frame.len(), frame_bytes(size));
            let back = zstd::bulk::decompress(&frame, size as usize).unwrap();
            assert!(back.len() == size as usize && back.iter().all(|b| *b == 0));
        }
    }
}
