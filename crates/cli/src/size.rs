//! Sizes of memory and of disks as people write them.

use std::fmt;
use std::str::FromStr;

const EXPECTED: &str = "write 512M, 2G, or a plain number of MiB";

fn too_large() -> String {
    "it is larger than any machine".into()
}

/// The bytes that `512M`, `2G`, `512MiB`, or a plain number of MiB stand for.
fn bytes(text: &str) -> Result<u128, String> {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at(end);
    if digits.is_empty() {
        return Err(format!("it does not start with a number; {EXPECTED}"));
    }
    let number: u64 = digits.parse().map_err(|_| too_large())?;
    let bits = match unit.to_ascii_lowercase().as_str() {
        "k" | "kib" => 10,
        "" | "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        "kb" | "mb" | "gb" | "tb" => {
            return Err(format!(
                "sizes are not counted in powers of 1000; write {digits}{}iB",
                unit[..1].to_ascii_uppercase()
            ));
        }
        fraction if fraction.starts_with(['.', ',']) => {
            return Err("it is a fraction; write a whole number (1536M for 1.5G)".into());
        }
        _ => return Err(format!("{unit:?} is no unit of size; {EXPECTED}")),
    };
    Ok(u128::from(number) << bits)
}

/// A whole number of MiB, at least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MemorySize {
    mib: u64,
}

impl MemorySize {
    pub(crate) fn mib(self) -> u64 {
        self.mib
    }
}

impl fmt::Display for MemorySize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}M", self.mib)
    }
}

impl FromStr for MemorySize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const MIB: u128 = 1 << 20;
        let bytes = bytes(text)?;
        if !bytes.is_multiple_of(MIB) {
            return Err(format!(
                "it is no whole number of MiB; write {}M",
                bytes.div_ceil(MIB)
            ));
        }
        match u64::try_from(bytes / MIB).map_err(|_| too_large())? {
            0 => Err(format!("a guest needs memory; {EXPECTED}")),
            mib => Ok(Self { mib }),
        }
    }
}

/// A whole number of KiB, at least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DiskSize {
    bytes: u64,
}

impl DiskSize {
    pub(crate) fn bytes(self) -> u64 {
        self.bytes
    }
}

impl FromStr for DiskSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // Files end before 2^63.
        let bytes = u64::try_from(bytes(text)?).ok().filter(|b| b >> 63 == 0);
        match bytes.ok_or_else(|| "it is larger than any file".to_owned())? {
            0 => Err(format!("a disk needs room; {EXPECTED}")),
            bytes => Ok(Self { bytes }),
        }
    }
}

/// Bytes a second; zero is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rate {
    bytes: u64,
}

impl Rate {
    pub(crate) fn bytes_per_s(self) -> u64 {
        self.bytes
    }
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bytes = u64::try_from(bytes(text)?).map_err(|_| too_large())?;
        Ok(Self { bytes })
    }
}

/// What a disk's size is to become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NewSize {
    /// This.
    To(DiskSize),
    /// This more than it is.
    By(DiskSize),
}

impl FromStr for NewSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix('+') {
            Some(more) => more.parse().map(Self::By),
            None => text.parse().map(Self::To),
        }
    }
}

/// A size for people: `10 GiB`, `1.5 MiB`, `512 bytes`. Shows one place after the point at most.
pub(crate) fn human(bytes: u64) -> String {
    const UNITS: [(u32, &str); 4] = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    for (bits, unit) in UNITS {
        let whole = bytes >> bits;
        if whole == 0 {
            continue;
        }
        let rest = bytes & ((1 << bits) - 1);
        let tenths = (u128::from(rest) * 10) >> bits;
        return if tenths == 0 {
            format!("{whole} {unit}")
        } else {
            format!("{whole}.{tenths} {unit}")
        };
    }
    format!("{bytes} bytes")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mib(text: &str) -> Result<u64, String> {
        text.parse::<MemorySize>().map(MemorySize::mib)
    }

    #[test]
    fn people_write_it_in_many_ways() {
        for (text, expected) in [
            ("512", 512),
            ("512M", 512),
            ("512MiB", 512),
            ("512m", 512),
            ("2G", 2048),
            ("2GiB", 2048),
            ("1T", 1 << 20),
            ("65536K", 64),
        ] {
            assert_eq!(mib(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn a_refusal_says_what_to_write() {
        for (text, word) in [
            ("", "start with a number"),
            ("M", "start with a number"),
            ("-1", "start with a number"),
            (" 1", "start with a number"),
            ("0", "needs memory"),
            ("0G", "needs memory"),
            ("0K", "needs memory"),
            ("1.5G", "fraction"),
            ("512MB", "512MiB"),
            ("2gb", "2GiB"),
            ("1025K", "2M"),
            ("5 apples", "no unit"),
            ("512MM", "no unit"),
            ("99999999999999999999", "larger"),
            ("18446744073709551615T", "larger"),
        ] {
            let refusal = mib(text).unwrap_err();
            assert!(refusal.contains(word), "{text}: {refusal}");
        }
    }

    proptest! {
        #[test]
        fn units_multiply(number in 1u64..1 << 40) {
            prop_assert_eq!(mib(&format!("{number}")), Ok(number));
            prop_assert_eq!(mib(&format!("{number}MiB")), Ok(number));
            prop_assert_eq!(mib(&format!("{number}G")), mib(&format!("{}M", number << 10)));
            prop_assert_eq!(mib(&format!("{number}T")), mib(&format!("{}g", number << 10)));
            prop_assert_eq!(mib(&format!("{}K", number << 10)), Ok(number));
        }

        #[test]
        fn what_is_shown_can_be_read(number in 1u64..) {
            let size = MemorySize { mib: number };
            prop_assert_eq!(size.to_string().parse(), Ok(size));
        }

        #[test]
        fn any_text_is_read_or_refused(text in ".*") {
            match mib(&text) {
                Ok(mib) => prop_assert!(mib > 0 && text.starts_with(|c: char| c.is_ascii_digit())),
                Err(refusal) => prop_assert!(!refusal.is_empty()),
            }
        }

        #[test]
        fn close_misses_too(text in "[0-9]{1,24}[ .,]?[kKmMgGtTéİ]?[iI]?[bB]?") {
            if let Ok(mib) = mib(&text) {
                prop_assert!(mib > 0);
            }
        }
    }

    #[test]
    fn disks_have_sizes_of_their_own() {
        let bytes = |text: &str| text.parse::<DiskSize>().map(DiskSize::bytes);
        assert_eq!(bytes("10G"), Ok(10 << 30));
        assert_eq!(bytes("512"), Ok(512 << 20));
        assert_eq!(bytes("1K"), Ok(1 << 10));
        assert_eq!(bytes("8388607T"), Ok(8_388_607 << 40));
        for (text, word) in [
            ("0", "needs room"),
            ("8388608T", "larger than any file"),
            ("99999999999999999999", "larger"),
            ("1GB", "1GiB"),
            ("1.5G", "1536M"),
            ("G", "start with a number"),
            ("+1G", "start with a number"),
        ] {
            let refusal = bytes(text).unwrap_err();
            assert!(refusal.contains(word), "{text}: {refusal}");
        }
    }

    #[test]
    fn a_new_size_is_a_size_or_so_much_more() {
        let size = |text: &str| DiskSize::from_str(text).unwrap();
        assert_eq!("2G".parse(), Ok(NewSize::To(size("2G"))));
        assert_eq!("+2G".parse(), Ok(NewSize::By(size("2G"))));
        for text in ["", "+", "++1G", "-1G", "+0"] {
            assert!(text.parse::<NewSize>().is_err(), "{text}");
        }
    }

    #[test]
    fn people_read_sizes_in_the_largest_unit() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (512, "512 bytes"),
            (1 << 10, "1 KiB"),
            (3 << 19, "1.5 MiB"),
            ((10 << 30) + 1, "10 GiB"),
            (u64::MAX, "16777215.9 TiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }
}
