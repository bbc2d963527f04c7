//! What a monitor says of its memory: one JSON array of ranges.

use serde::Deserialize;

use crate::PAGE_BYTES;

/// Longest message. Abused by a client that never comes to an end.
pub(crate) const MAX_MESSAGE_BYTES: usize = 64 << 10;
/// Most ranges. Abused as above; a PC's memory has two, and one more for each piece that was plugged in.
pub(crate) const MAX_RANGES: usize = 64;

/// A range as it is said. Firecracker has called the page's size `page_size_kib`, in bytes, and now says it twice.
#[derive(Deserialize)]
struct Said {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    page_size_kib: Option<u64>,
}

/// Where part of the memory file is mapped in the monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MappedRange {
    pub(crate) host_addr: u64,
    pub(crate) size: u64,
    /// In the memory file.
    pub(crate) offset: u64,
}

/// Reads a message about a memory file of `pages_bytes`; nothing: it is not whole yet.
pub(crate) fn read(bytes: &[u8], pages_bytes: u64) -> Result<Option<Vec<MappedRange>>, String> {
    let said: Vec<Said> = match serde_json::from_slice(bytes) {
        Ok(said) => said,
        Err(e) if e.is_eof() => return Ok(None),
        Err(e) => return Err(format!("what it says of its memory is not understood: {e}")),
    };
    if said.is_empty() || said.len() > MAX_RANGES {
        return Err(format!(
            "it has {} ranges of memory, and 1 to {MAX_RANGES} can be served",
            said.len()
        ));
    }
    let mut ranges = Vec::with_capacity(said.len());
    for range in said {
        ranges.push(checked(&range, pages_bytes)?);
    }
    ranges.sort_by_key(|range| range.host_addr);
    for two in ranges.windows(2) {
        if two[0].host_addr + two[0].size > two[1].host_addr {
            return Err(format!(
                "its ranges at {:#x} and {:#x} overlap",
                two[0].host_addr, two[1].host_addr
            ));
        }
    }
    // What is kept for each page is bounded by the file.
    let sum = ranges
        .iter()
        .fold(0, |sum: u64, r| sum.saturating_add(r.size));
    if sum > pages_bytes {
        return Err(format!(
            "its ranges have {sum} bytes, and the memory file has {pages_bytes}"
        ));
    }
    Ok(Some(ranges))
}

fn checked(said: &Said, pages_bytes: u64) -> Result<MappedRange, String> {
    let Said {
        base_host_virt_addr: host_addr,
        size,
        offset,
        page_size,
        page_size_kib,
    } = *said;
    for page in [page_size, page_size_kib].into_iter().flatten() {
        if page != PAGE_BYTES {
            return Err(format!(
                "its range at {host_addr:#x} has pages of {page} bytes, and pages of {PAGE_BYTES} are served: restore it without huge pages"
            ));
        }
    }
    for (what, value) in [("address", host_addr), ("size", size), ("offset", offset)] {
        if !value.is_multiple_of(PAGE_BYTES) {
            return Err(format!(
                "its range at {host_addr:#x} has the {what} {value:#x}, which is not one of whole pages"
            ));
        }
    }
    let wraps = host_addr.checked_add(size).is_none();
    if size == 0 || wraps {
        return Err(format!(
            "its range at {host_addr:#x} has {size} bytes, which no range can have there"
        ));
    }
    if offset.checked_add(size).is_none_or(|end| end > pages_bytes) {
        return Err(format!(
            "its range at {host_addr:#x} wants {size} bytes from {offset:#x} of the memory file on, and that has {pages_bytes}: it is another guest's"
        ));
    }
    Ok(MappedRange {
        host_addr,
        size,
        offset,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: u64 = 16 << 20;

    fn said(ranges: &[[u64; 4]]) -> String {
        let all: Vec<_> = ranges
            .iter()
            .map(|[addr, size, offset, page]| {
                format!(
                    r#"{{"base_host_virt_addr":{addr},"size":{size},"offset":{offset},"page_size":{page},"page_size_kib":{page}}}"#
                )
            })
            .collect();
        format!("[{}]", all.join(","))
    }

    #[test]
    fn what_firecracker_says_is_understood_in_pieces_too() {
        let text = said(&[
            [0x7f00_0020_0000, 1 << 20, 1 << 20, 4096],
            [0x7f00_0000_0000, 1 << 20, 0, 4096],
        ]);
        for end in 0..text.len() {
            assert_eq!(read(&text.as_bytes()[..end], FILE).unwrap(), None);
        }
        let ranges = read(text.as_bytes(), FILE).unwrap().unwrap();
        let host: Vec<_> = ranges.iter().map(|r| (r.host_addr, r.offset)).collect();
        assert_eq!(host, [(0x7f00_0000_0000, 0), (0x7f00_0020_0000, 1 << 20)]);
        // Older ones say the size of pages once.
        let old = r#"[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size_kib":4096}]"#;
        assert_eq!(read(old.as_bytes(), FILE).unwrap().unwrap().len(), 1);
    }

    #[test]
    fn lies_are_refused_with_words() {
        let top = u64::MAX - 4095;
        for (ranges, part) in [
            (vec![], "1 to 64"),
            (vec![[4096, 4096, 0, 4096]; 65], "1 to 64"),
            (vec![[4096, 4096, 0, 2 << 20]], "huge pages"),
            (vec![[4097, 4096, 0, 4096]], "whole pages"),
            (vec![[4096, 4097, 0, 4096]], "whole pages"),
            (vec![[4096, 4096, 1, 4096]], "whole pages"),
            (vec![[4096, 0, 0, 4096]], "no range can have"),
            (vec![[top, 8192, 0, 4096]], "no range can have"),
            (vec![[4096, FILE + 4096, 0, 4096]], "another guest's"),
            (vec![[4096, 4096, FILE, 4096]], "another guest's"),
            (vec![[4096, 8192, top, 4096]], "another guest's"),
            (
                vec![[4096, 8192, 0, 4096], [8192, 4096, 8192, 4096]],
                "overlap",
            ),
            (
                vec![[4096, FILE, 0, 4096], [2 * FILE, FILE, 0, 4096]],
                "and the memory file has",
            ),
        ] {
            let why = read(said(&ranges).as_bytes(), FILE).unwrap_err();
            assert!(why.contains(part), "{why}");
        }
        for text in ["{}", "x", "[{\"size\":-1}]", "[] []"] {
            let why = read(text.as_bytes(), FILE).unwrap_err();
            assert!(why.contains("understood"), "{text}: {why}");
        }
    }
}
