//! What was measured: samples by VMM and measure, failures, and the kinds of measures there are.
//!
//! Does not know how samples are taken, nor how they are shown.

use std::collections::BTreeMap;

use crate::attempts::Attempts;
use crate::stats::{Summary, summarize};
use crate::vmm::{Kind, Vmm};

/// One row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Measure {
    FirstRun,
    FirstRunOwn,
    InitFast,
    ExitFast,
    InitGiven,
    ExitGiven,
    IoctlsBefore,
    SystemCalls,
    Ioctls,
    Faults,
    Pss,
    PrivateDirty,
    Rss,
    GuestRss,
    Binary,
    Threads,
    ThreadsFiltered,
}

impl Measure {
    pub(crate) const ALL: [Self; 17] = [
        Self::FirstRun,
        Self::FirstRunOwn,
        Self::InitFast,
        Self::ExitFast,
        Self::InitGiven,
        Self::ExitGiven,
        Self::IoctlsBefore,
        Self::SystemCalls,
        Self::Ioctls,
        Self::Faults,
        Self::Pss,
        Self::PrivateDirty,
        Self::Rss,
        Self::GuestRss,
        Self::Binary,
        Self::Threads,
        Self::ThreadsFiltered,
    ];

    /// The name in JSON, and the title in the table.
    pub(crate) fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::FirstRun => ("first_run_ms", "start → first KVM_RUN, ms (under strace)"),
            Self::FirstRunOwn => (
                "first_run_own_ms",
                "the same by its own clock, no strace, ms",
            ),
            Self::InitFast => ("init_fast_ms", "start → init, *fast*, ms"),
            Self::ExitFast => ("exit_fast_ms", "start → process exit, *fast*, ms"),
            Self::InitGiven => ("init_given_ms", "start → init, *given*, ms"),
            Self::ExitGiven => ("exit_given_ms", "start → process exit, *given*, ms"),
            Self::IoctlsBefore => ("ioctls_before_first_run", "ioctls before the first KVM_RUN"),

            Self::SystemCalls => ("system_calls", "system calls, boot to exit"),
            Self::Ioctls => ("ioctls", "of these ioctl, mostly KVM_RUN"),
            Self::Faults => ("page_faults", "page faults of the VMM, boot to exit"),
            Self::Pss => ("pss_mib", "PSS beside guest RAM, MiB"),
            Self::PrivateDirty => ("private_dirty_mib", "of it private dirty, MiB"),
            Self::Rss => ("rss_mib", "RSS beside guest RAM, MiB"),
            Self::GuestRss => ("guest_rss_mib", "RSS of guest RAM, MiB"),
            Self::Binary => ("binary_mib", "binary, stripped, MiB"),
            Self::Threads => ("threads", "threads"),
            Self::ThreadsFiltered => ("threads_filtered", "threads with a seccomp filter"),
        }
    }

    /// Whether less is better, so that a ratio says something.
    pub(crate) fn is_cost(self) -> bool {
        !matches!(
            self,
            Self::Threads | Self::ThreadsFiltered | Self::FirstRunOwn
        )
    }
}

/// All about one VMM.
#[derive(Debug)]
pub(crate) struct Column {
    pub(crate) vmm: Vmm,
    pub(crate) samples: BTreeMap<Measure, Vec<f64>>,
    /// How often each exit was made, by name, in each run that was counted.
    pub(crate) exits: BTreeMap<String, Vec<f64>>,
    pub(crate) attempts: Attempts,
}

/// After so many failures in a row, a VMM is left alone: each may cost a whole time-out.
const MOST_FAILURES_IN_A_ROW: u32 = 3;

impl Column {
    pub(crate) fn new(vmm: Vmm) -> Self {
        Self {
            vmm,
            samples: BTreeMap::new(),
            exits: BTreeMap::new(),
            attempts: Attempts::new(MOST_FAILURES_IN_A_ROW),
        }
    }

    pub(crate) fn is_ours(&self) -> bool {
        self.vmm.kind == Kind::Alveole
    }

    pub(crate) fn add(&mut self, measure: Measure, sample: f64) {
        self.samples.entry(measure).or_default().push(sample);
    }

    pub(crate) fn summary(&self, measure: Measure) -> Option<Summary> {
        summarize(self.samples.get(&measure)?)
    }
}

/// The lowest median among the peers.
pub(crate) fn best_peer(columns: &[Column], measure: Measure) -> Option<(&str, f64)> {
    columns
        .iter()
        .filter(|column| !column.is_ours())
        .filter_map(|column| Some((column.vmm.name.as_str(), column.summary(measure)?.median)))
        .min_by(|a, b| a.1.total_cmp(&b.1))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn column(kind: Kind, samples: &[(Measure, &[f64])]) -> Column {
        let vmm = Vmm {
            name: kind.name().into(),
            kind,
            path: "/x".into(),
            version: "1".into(),
            without_arch_capabilities: false,
        };
        let mut column = Column::new(vmm);
        for (measure, all) in samples {
            all.iter().for_each(|&sample| column.add(*measure, sample));
        }
        column
    }

    #[test]
    fn the_best_peer_is_never_us() {
        let columns = [
            column(Kind::Alveole, &[(Measure::Pss, &[1.0])]),
            column(Kind::Firecracker, &[(Measure::Pss, &[3.0, 2.0, 9.0])]),
            column(Kind::Qemu, &[(Measure::Pss, &[40.0])]),
        ];
        assert_eq!(
            best_peer(&columns, Measure::Pss),
            Some(("firecracker", 3.0))
        );
        assert_eq!(best_peer(&columns, Measure::Threads), None);
    }

    #[test]
    fn three_failures_in_a_row_are_enough() {
        let mut c = column(Kind::Qemu, &[]);
        c.attempts.note(Err("a".into()));
        c.attempts.note(Err("b".into()));
        c.attempts.note(Ok(()));
        c.attempts.note(Err("c".into()));
        assert!(!c.attempts.given_up());
        c.attempts.note(Err("d".into()));
        c.attempts.note(Err("e".into()));
        assert!(c.attempts.given_up());
        assert_eq!((c.attempts.count, c.attempts.failures.len()), (6, 5));
    }
}
