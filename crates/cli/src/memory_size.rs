//! Sizes of memory as people write them.

use std::fmt;
use std::str::FromStr;

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

    /// `512M`, `2G`, `512MiB`, or a plain number of MiB.
    fn from_str(text: &str) -> Result<Self, String> {
        const EXPECTED: &str = "write 512M, 2G, or a plain number of MiB";
        let end = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        let (digits, unit) = text.split_at(end);
        if digits.is_empty() {
            return Err(format!("it does not start with a number; {EXPECTED}"));
        }
        let too_large = || "it is larger than any machine".to_owned();
        let number: u64 = digits.parse().map_err(|_| too_large())?;
        let mib = match unit.to_ascii_lowercase().as_str() {
            "" | "m" | "mib" => Some(number),
            "g" | "gib" => number.checked_mul(1 << 10),
            "t" | "tib" => number.checked_mul(1 << 20),
            "k" | "kib" if number.is_multiple_of(1024) => Some(number / 1024),
            "k" | "kib" => {
                return Err(format!(
                    "it is no whole number of MiB; write {}M",
                    number.div_ceil(1024)
                ));
            }
            "kb" | "mb" | "gb" | "tb" => {
                return Err(format!(
                    "memory is not counted in powers of 1000; write {digits}{}iB",
                    unit[..1].to_ascii_uppercase()
                ));
            }
            fraction if fraction.starts_with(['.', ',']) => {
                return Err("it is a fraction; write a whole number (1536M for 1.5G)".into());
            }
            _ => return Err(format!("{unit:?} is no unit of memory; {EXPECTED}")),
        };
        match mib.ok_or_else(too_large)? {
            0 => Err(format!("a guest needs memory; {EXPECTED}")),
            mib => Ok(Self { mib }),
        }
    }
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
}
