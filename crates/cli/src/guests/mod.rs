//! Guests of images: started, looked at, spoken with, ended.

mod commands;
mod copy;
mod empty_disk;
mod events;
mod keep;
mod limits;
mod maker;
mod ports;
mod restore;
mod run;
mod sample;
mod served;
mod stats;
mod template;
mod terminal;
mod top;
mod update;
pub(crate) mod volumes;

use std::fmt::Write;
use std::time::SystemTime;

pub(crate) use commands::{GuestCommand, end_and_remove, guest};
pub(crate) use keep::{KeepArgs, keep_vm};
pub(crate) use maker::{Maker, Wanted, changes};
pub(crate) use restore::{Copies, CopyArgs, Taking, flatten, restore, root_disk, take};
pub(crate) use run::{ImageArgs, labels, run_image};

/// How a list is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people
    #[default]
    Text,
    /// For programs
    Json,
}

/// Columns as wide as what is in them.
pub(crate) fn table(head: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut all = vec![head.iter().map(|h| (*h).to_owned()).collect::<Vec<_>>()];
    all.extend(rows);
    let widths: Vec<usize> = (0..head.len())
        .map(|column| {
            let of = |row: &Vec<String>| row.get(column).map_or(0, |cell| cell.chars().count());
            all.iter().map(of).max().unwrap_or_default()
        })
        .collect();
    let mut text = String::new();
    for row in &all {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A time, or how long ago.
pub(crate) fn time_or_ago(text: &str) -> Result<SystemTime, String> {
    if let Ok(time) = humantime::parse_rfc3339_weak(text) {
        return Ok(time);
    }
    let ago = humantime::parse_duration(text).ok();
    ago.and_then(|ago| SystemTime::now().checked_sub(ago))
        .ok_or_else(|| "write a time, as 2026-01-02T03:04:05Z, or how long ago, as 10m".into())
}

/// A word of somebody else, short and without what a terminal would obey.
pub(crate) fn shortened(text: &str) -> String {
    const MOST: usize = 30;
    let text: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if text.chars().count() <= MOST {
        return text;
    }
    let begin: String = text.chars().take(MOST - 1).collect();
    format!("{begin}…")
}

/// A signal by its name or number.
pub(crate) fn signal(text: &str) -> Result<u8, String> {
    let refusal =
        || format!("{text:?} is no signal: write a name, as TERM, or a number from 1 to 64");
    if let Ok(number) = text.parse::<u8>() {
        return Some(number)
            .filter(|n| (1..=64).contains(n))
            .ok_or_else(refusal);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    SIGNALS
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, number)| *number)
        .ok_or_else(refusal)
}

/// Linux's, on this processor (signal(7)).
const SIGNALS: [(&str, u8); 31] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("PWR", 30),
    ("SYS", 31),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_by_name_and_number() {
        for text in ["TERM", "term", "SIGTERM", "15"] {
            assert_eq!(signal(text), Ok(15));
        }
        for text in ["", "0", "65", "SIG", "NOTHING", "-1"] {
            assert!(signal(text).unwrap_err().contains("is no signal"));
        }
    }

    #[test]
    fn columns_are_as_wide_as_what_is_in_them() {
        let rows = vec![
            vec!["a".into(), "bb".into()],
            vec!["cccc".into(), String::new()],
        ];
        assert_eq!(table(&["N", "M"], rows), "N     M\na     bb\ncccc\n");
    }
}
