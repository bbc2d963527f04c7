//! What a process's memory is made of: reads `/proc/PID/smaps`, tells guest RAM from the rest.
//!
//! Guest RAM is found by its size alone: addresses that follow each other without a gap and add up
//! to what the guest was given. So it may be one mapping or many, some of them of files (a kernel
//! mapped copy-on-write). Does not know whose process it is.

use std::ops::{AddAssign, Range};

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mapping {
    range: Range<u64>,
    use_: Use,
}

/// Memory in KiB, as the kernel counts it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Use {
    pub(crate) rss: u64,
    pub(crate) pss: u64,
    pub(crate) private_dirty: u64,
    /// Mapped by nobody else; of a single process pages of the file, too.
    pub(crate) private: u64,
    /// Pages of no file: what was changed, and the program's own.
    pub(crate) anonymous: u64,
}

impl AddAssign for Use {
    fn add_assign(&mut self, other: Self) {
        self.rss += other.rss;
        self.pss += other.pss;
        self.private_dirty += other.private_dirty;
        self.private += other.private;
        self.anonymous += other.anonymous;
    }
}

/// Guest RAM and everything else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Split {
    pub(crate) guest: Use,
    pub(crate) rest: Use,
}

/// Reads the text of a `smaps` file.
///
/// # Errors
/// A line that is not as the kernel writes it.
pub(crate) fn parse(text: &str) -> Result<Vec<Mapping>, String> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let bad = || format!("smaps line {line:?} is not understood");
        let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
        let Some(key) = first.strip_suffix(':') else {
            let (from, to) = first.split_once('-').ok_or_else(bad)?;
            let address = |text| u64::from_str_radix(text, 16).map_err(|_| bad());
            let range = address(from)?..address(to)?;
            mappings.push(Mapping {
                range,
                use_: Use::default(),
            });
            continue;
        };
        let Some(mapping) = mappings.last_mut() else {
            return Err(bad());
        };
        let wanted = ["Rss", "Pss", "Private_Clean", "Private_Dirty", "Anonymous"];
        if !wanted.contains(&key) {
            continue;
        }
        let kib = rest.trim().strip_suffix(" kB").ok_or_else(bad)?;
        let kib: u64 = kib.trim().parse().map_err(|_| bad())?;
        let use_ = &mut mapping.use_;
        match key {
            "Rss" => use_.rss = kib,
            "Pss" => use_.pss = kib,
            "Anonymous" => use_.anonymous = kib,
            _ => use_.private += kib,
        }
        if key == "Private_Dirty" {
            use_.private_dirty = kib;
        }
    }
    Ok(mappings)
}

/// Tells the `guest_bytes` of guest RAM from the rest.
///
/// # Errors
/// There is no such guest RAM.
pub(crate) fn split(mappings: &[Mapping], guest_bytes: u64) -> Result<Split, String> {
    let guest = find_guest(mappings, guest_bytes).ok_or_else(|| {
        format!(
            "no mappings in the VMM add up to guest RAM of {} MiB",
            guest_bytes >> 20
        )
    })?;
    let mut split = Split {
        guest: Use::default(),
        rest: Use::default(),
    };
    for (index, mapping) in mappings.iter().enumerate() {
        let part = if guest.contains(&index) {
            &mut split.guest
        } else {
            &mut split.rest
        };
        *part += mapping.use_;
    }
    Ok(split)
}

/// Which mappings, by index, are guest RAM.
fn find_guest(mappings: &[Mapping], bytes: u64) -> Option<Range<usize>> {
    for first in 0..mappings.len() {
        let start = mappings[first].range.start;
        let mut end = start;
        for (index, mapping) in mappings.iter().enumerate().skip(first) {
            if mapping.range.start != end {
                break;
            }
            end = mapping.range.end;
            if end - start == bytes {
                return Some(first..index + 1);
            }
            if end - start > bytes {
                break;
            }
        }
    }
    // The kernel joins neighbours of the same kind: guest RAM and a little more in one mapping.
    let larger = |m: &&Mapping| m.range.end - m.range.start > bytes;
    let smallest = mappings
        .iter()
        .filter(larger)
        .min_by_key(|m| m.range.end - m.range.start)?;
    let slack = (smallest.range.end - smallest.range.start) - bytes;
    let index = mappings.iter().position(|m| m == smallest)?;
    (slack <= bytes / 16).then_some(index..index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_file_as_the_kernel_writes_it() {
        let text = "\
00200000-0027f000 r-xp 00001000 fe:00 1234                               /usr/bin/vmm (deleted)
Size:                508 kB
KernelPageSize:        4 kB
Rss:                 300 kB
Pss:                 150 kB
Pss_Dirty:             0 kB
Private_Clean:        20 kB
Private_Dirty:         0 kB
Anonymous:             0 kB
THPeligible:           0
ProtectionKey:         0
VmFlags: rd ex mr mw me
7f0000000000-7f0010000000 rw-p 00000000 00:00 0 
Rss:               27648 kB
Pss:               27648 kB
Private_Clean:         4 kB
Private_Dirty:     27648 kB
Anonymous:         27640 kB
VmFlags: rd wr mr mw me ac sd hg
";
        let mappings = parse(text).unwrap();
        assert_eq!(mappings.len(), 2);
        let split = split(&mappings, 256 * MIB).unwrap();
        assert_eq!(
            split.rest,
            Use {
                rss: 300,
                pss: 150,
                private_dirty: 0,
                private: 20,
                anonymous: 0,
            }
        );
        assert_eq!(
            split.guest,
            Use {
                rss: 27648,
                pss: 27648,
                private_dirty: 27648,
                private: 27652,
                anonymous: 27640,
            }
        );
    }

    #[test]
    fn broken_files_are_refused() {
        for text in [
            "nonsense\n",
            "Rss: 1 kB\n",
            "0-1000 r\nRss: x kB\n",
            "0-1000 r\nRss: 1\n",
        ] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }

    /// Each of one KiB.
    fn mappings(ranges: &[(u64, u64)]) -> Vec<Mapping> {
        let use_ = Use {
            rss: 1,
            pss: 1,
            private_dirty: 1,
            private: 1,
            anonymous: 1,
        };
        ranges
            .iter()
            .map(|&(from, to)| Mapping {
                range: from * MIB..to * MIB,
                use_,
            })
            .collect()
    }

    #[test]
    fn guest_ram_of_many_mappings() {
        // A text, a neighbour without a gap, RAM with a kernel file inside, another neighbour.
        let all = mappings(&[
            (1, 2),
            (100, 101),
            (101, 117),
            (117, 135),
            (135, 357),
            (357, 358),
        ]);
        assert_eq!(find_guest(&all, 256 * MIB), Some(2..5));
        assert_eq!(split(&all, 256 * MIB).unwrap().rest.rss, 3);
    }

    #[test]
    fn guest_ram_joined_with_a_neighbour() {
        assert_eq!(
            find_guest(&mappings(&[(1, 2), (10, 267)]), 256 * MIB),
            Some(1..2)
        );
        assert_eq!(
            find_guest(&mappings(&[(1, 2), (10, 2000)]), 256 * MIB),
            None
        );
        assert!(
            split(&mappings(&[(1, 2)]), 256 * MIB)
                .unwrap_err()
                .contains("256 MiB")
        );
    }
}
