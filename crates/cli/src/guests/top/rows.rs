//! What the view is about: VMs, how they are sorted, which of them are shown.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use alveole_instance::Vm;
use clap::ValueEnum;
use serde_json::{Value, json};

use crate::guests::sample::{UNKNOWN, Usage};
use crate::guests::shortened;

/// A VM, and what it uses.
#[derive(Clone, Debug, Default)]
pub(super) struct Row {
    pub(super) name: String,
    id: String,
    image: String,
    labels: BTreeMap<String, String>,
    state: String,
    pub(super) usage: Usage,
}

/// By what they are sorted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sort {
    /// The name
    Name,
    /// Processor time of guest and monitor together
    #[default]
    Cpu,
    /// Processor time of the monitor alone
    Vmm,
    /// Memory on this host (PSS)
    Memory,
    /// Memory that the guest uses
    GuestMemory,
    /// What disks carry
    Disk,
    /// What network interfaces carry
    Net,
    /// Exits to the monitor
    Exits,
}

impl Sort {
    /// Its key.
    pub(super) fn by_key(key: char) -> Option<Self> {
        Some(match key {
            'n' => Self::Name,
            'c' => Self::Cpu,
            'v' => Self::Vmm,
            'm' => Self::Memory,
            'g' => Self::GuestMemory,
            'd' => Self::Disk,
            't' => Self::Net,
            'x' => Self::Exits,
            _ => return None,
        })
    }

    /// Its neighbour, round and round.
    pub(super) fn beside(self, by: isize) -> Self {
        let all = Self::value_variants();
        let at = all.iter().position(|sort| *sort == self).unwrap_or(0);
        let count = all.len().cast_signed();
        let to = (at.cast_signed() + by).rem_euclid(count);
        all[to.cast_unsigned()]
    }

    fn word(self) -> String {
        let value = self.to_possible_value();
        value.map_or(String::new(), |value| value.get_name().to_owned())
    }

    #[expect(clippy::cast_precision_loss, reason = "an order of sizes")]
    fn figure(self, usage: &Usage) -> Option<f64> {
        let sum = |pair: Option<(f64, f64)>| pair.map(|(a, b)| a + b);
        match self {
            Self::Name => None,
            Self::Cpu => Some(usage.cpu_guest_percent + usage.cpu_monitor_percent),
            Self::Vmm => Some(usage.cpu_monitor_percent),
            Self::Memory => usage.pss_bytes.map(|bytes| bytes as f64),
            Self::GuestMemory => usage.memory_bytes.map(|(used, _)| used as f64),
            Self::Disk => sum(usage.disk),
            Self::Net => sum(usage.network),
            Self::Exits => usage.exits_per_s,
        }
    }
}

impl Row {
    pub(super) fn new(vm: &Vm, phase: String, answers: bool, usage: Usage) -> Self {
        Self {
            name: vm.name.clone(),
            id: vm.record.id.clone(),
            image: vm.record.image.clone(),
            labels: vm.record.labels.clone(),
            // An agent that is silent is worth a word.
            state: if phase == "running" && !answers {
                "no answer".into()
            } else {
                phase
            },
            usage,
        }
    }

    pub(super) fn as_json(&self) -> Value {
        let mut json = self.usage.as_json();
        json["name"] = json!(self.name);
        json["id"] = json!(self.id);
        json["image"] = json!(self.image);
        json["labels"] = json!(self.labels);
        json["state"] = json!(self.state);
        json
    }

    fn fits(&self, filter: &str) -> bool {
        let filter = filter.to_lowercase();
        let has = |text: &str| text.to_lowercase().contains(&filter);
        has(&self.name)
            || has(&self.image)
            || self.id.starts_with(&filter)
            || self
                .labels
                .iter()
                .any(|(name, value)| has(&format!("{name}={value}")))
    }
}

/// A column.
pub(super) struct Column {
    pub(super) title: &'static str,
    /// As narrow as it can be.
    pub(super) width: u16,
    /// Where there is no room for all, those with the highest go first.
    pub(super) spare: u8,
    pub(super) cell: fn(&Row) -> String,
}

pub(super) const COLUMNS: [Column; 11] = [
    Column {
        title: "NAME",
        width: 12,
        spare: 0,
        cell: |row| row.name.clone(),
    },
    Column {
        title: "STATE",
        width: 9,
        spare: 7,
        cell: |row| row.state.clone(),
    },
    Column {
        title: "GUEST%",
        width: 6,
        spare: 0,
        cell: |row| format!("{:.1}", row.usage.cpu_guest_percent),
    },
    Column {
        title: "VMM%",
        width: 5,
        spare: 1,
        cell: |row| format!("{:.1}", row.usage.cpu_monitor_percent),
    },
    Column {
        title: "PSS",
        width: 6,
        spare: 2,
        cell: |row| row.usage.pss_bytes.map_or(UNKNOWN.into(), short),
    },
    Column {
        title: "GUEST MEM",
        width: 12,
        spare: 3,
        cell: |row| {
            let memory = row.usage.memory_bytes;
            memory.map_or(UNKNOWN.into(), |(used, all)| {
                format!("{}/{}", short(used), short(all))
            })
        },
    },
    Column {
        title: "DISK R/W /s",
        width: 11,
        spare: 4,
        cell: |row| pair(row.usage.disk),
    },
    Column {
        title: "NET IN/OUT /s",
        width: 13,
        spare: 5,
        cell: |row| pair(row.usage.network),
    },
    Column {
        title: "EXITS/s",
        width: 7,
        spare: 6,
        cell: |row| {
            let exits = row.usage.exits_per_s;
            exits.map_or(UNKNOWN.into(), |exits| format!("{exits:.0}"))
        },
    },
    Column {
        title: "TASKS",
        width: 5,
        spare: 8,
        cell: |row| row.usage.tasks.map_or(UNKNOWN.into(), |n| n.to_string()),
    },
    Column {
        title: "IMAGE",
        width: 16,
        spare: 9,
        cell: |row| shortened(&row.image),
    },
];

/// A size in few characters: `512`, `1.5K`, `238M`.
#[expect(clippy::cast_precision_loss, reason = "three figures of it are shown")]
fn short(bytes: u64) -> String {
    let mut size = bytes as f64;
    for unit in ["", "K", "M", "G", "T"] {
        if size < 10.0 && !unit.is_empty() {
            return format!("{size:.1}{unit}");
        }
        // What is shown as 1024 is the next unit's.
        if size < 1023.5 || unit == "T" {
            return format!("{size:.0}{unit}");
        }
        size /= 1024.0;
    }
    UNKNOWN.into()
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "rates in bytes"
)]
fn pair(pair: Option<(f64, f64)>) -> String {
    pair.map_or(UNKNOWN.into(), |(a, b)| {
        format!("{}/{}", short(a as u64), short(b as u64))
    })
}

/// All VMs that run, and what of them is shown in which order.
#[derive(Debug, Default)]
pub(super) struct Rows {
    all: Vec<Row>,
    pub(super) sort: Sort,
    pub(super) reversed: bool,
    pub(super) filter: String,
}

impl Rows {
    pub(super) fn new(sort: Sort, filter: &str) -> Self {
        Self {
            sort,
            filter: filter.into(),
            ..Self::default()
        }
    }

    pub(super) fn set(&mut self, all: Vec<Row>) {
        self.all = all;
    }

    /// Those that are shown: the largest first, names from a to z, what is not known last.
    pub(super) fn shown(&self) -> Vec<&Row> {
        let fits = |row: &&Row| row.fits(&self.filter);
        let mut shown: Vec<&Row> = self.all.iter().filter(fits).collect();
        shown.sort_by(|a, b| {
            let figures = [a, b].map(|row| self.sort.figure(&row.usage));
            let order = match figures {
                [Some(a), Some(b)] => {
                    let order = b.total_cmp(&a);
                    if self.reversed {
                        order.reverse()
                    } else {
                        order
                    }
                }
                [Some(_), None] => Ordering::Less,
                [None, Some(_)] => Ordering::Greater,
                [None, None] => Ordering::Equal,
            };
            let names = a.name.cmp(&b.name);
            let by_name = self.sort == Sort::Name && self.reversed;
            order.then(if by_name { names.reverse() } else { names })
        });
        shown
    }

    /// The line above all.
    pub(super) fn head(&self) -> String {
        let shown = self.shown();
        let sum = |of: fn(&Usage) -> f64| {
            let figures = shown.iter().map(|row| of(&row.usage));
            // The sum of none is -0.
            figures.fold(0.0, |sum, figure| sum + figure)
        };
        let pss = shown.iter().filter_map(|row| row.usage.pss_bytes);
        let order = if self.reversed { ", reversed" } else { "" };
        let of_all = if self.filter.is_empty() {
            String::new()
        } else {
            format!(" of {} by '{}'", self.all.len(), shortened(&self.filter))
        };
        format!(
            "alveole top: {} VMs{of_all}, sorted by {}{order}; guests {:.1}%, monitors {:.1}%, PSS {}, {:.0} exits/s",
            shown.len(),
            self.sort.word(),
            sum(|usage| usage.cpu_guest_percent),
            sum(|usage| usage.cpu_monitor_percent),
            short(pss.fold(0, u64::saturating_add)),
            sum(|usage| usage.exits_per_s.unwrap_or_default()),
        )
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn row(name: &str, cpu: f64, exits: Option<f64>) -> Row {
        Row {
            name: name.into(),
            id: format!("{:0<12}", name.len()),
            image: "debian:12".into(),
            state: "running".into(),
            usage: Usage {
                cpu_guest_percent: cpu,
                exits_per_s: exits,
                ..Usage::default()
            },
            ..Row::default()
        }
    }

    fn names(rows: &Rows) -> Vec<&str> {
        rows.shown().iter().map(|row| &*row.name).collect()
    }

    #[test]
    fn the_largest_come_first_and_the_unknown_last() {
        let mut rows = Rows::default();
        rows.set(vec![
            row("b", 1.0, None),
            row("c", 5.0, Some(3.0)),
            row("a", 1.0, Some(9.0)),
        ]);
        assert_eq!(names(&rows), ["c", "a", "b"]);
        rows.sort = Sort::Exits;
        assert_eq!(names(&rows), ["a", "c", "b"]);
        rows.reversed = true;
        assert_eq!(names(&rows), ["c", "a", "b"]);
        rows.sort = Sort::Name;
        assert_eq!(names(&rows), ["c", "b", "a"]);
        assert_eq!(Sort::Exits.beside(1), Sort::Name);
        assert_eq!(Sort::Name.beside(-1), Sort::Exits);
    }

    #[test]
    fn names_ids_images_and_labels_are_filtered_by() {
        let mut labelled = row("web", 0.0, None);
        labelled.labels = [("tier".to_owned(), "Front".to_owned())].into();
        labelled.image = "nginx".into();
        let mut rows = Rows::default();
        rows.set(vec![labelled, row("db-primary", 0.0, None)]);
        for (filter, expected) in [
            ("", &["db-primary", "web"][..]),
            ("WEB", &["web"]),
            ("debian", &["db-primary"]),
            ("tier=front", &["web"]),
            ("3000", &["web"]),
            ("000", &[]),
        ] {
            rows.filter = filter.into();
            assert_eq!(names(&rows), expected, "{filter}");
        }
        rows.filter = "web".into();
        assert!(
            rows.head().contains("1 VMs of 2 by 'web'"),
            "{}",
            rows.head()
        );
    }

    #[test]
    fn sizes_are_short() {
        for (bytes, expected) in [
            (0, "0"),
            (1023, "1023"),
            (1024, "1.0K"),
            (1536, "1.5K"),
            (10 << 10, "10K"),
            ((1 << 20) - 1, "1.0M"),
            (238 << 20, "238M"),
            (u64::MAX, "16777216T"),
        ] {
            assert_eq!(short(bytes), expected);
        }
    }
}
