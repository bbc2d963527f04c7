//! How much of everything there is.

use std::path::Path;
use std::thread;

use super::{Finding, field, missing, ok, read, warn};

/// A guest of the default size, and room for the host beside it.
const LEAST_MEMORY_MIB: u64 = 512;
/// A VMM with devices and many vCPUs holds some hundred descriptors.
const LEAST_FILES: u64 = 1024;
/// Rings of io_uring and registered buffers of a guest's disks lock this much at most.
const LEAST_LOCKED_KIB: u64 = 8 << 10;

pub(super) fn processors() -> Finding {
    match thread::available_parallelism() {
        Ok(count) => ok(format!("{count} for this process")),
        Err(e) => warn(format!("cannot count them: {e}"), "nothing, if guests run"),
    }
}

pub(super) fn memory() -> Finding {
    judge_memory(&read("/proc/meminfo").unwrap_or_default())
}

fn judge_memory(meminfo: &str) -> Finding {
    let mib = |name| field(meminfo, name).and_then(kib).map(|kib| kib >> 10);
    let (Some(total), Some(available)) = (mib("MemTotal"), mib("MemAvailable")) else {
        return warn("/proc/meminfo does not say", "mount procfs at /proc");
    };
    let finding = format!("{available} MiB available of {total} MiB");
    if available < LEAST_MEMORY_MIB {
        return warn(
            finding,
            format!("end something: a small guest and its host want {LEAST_MEMORY_MIB} MiB"),
        );
    }
    ok(finding)
}

/// `1234 kB` is 1234.
fn kib(value: &str) -> Option<u64> {
    value.strip_suffix(" kB")?.trim().parse().ok()
}

const THP: &str = "/sys/kernel/mm/transparent_hugepage";

pub(super) fn transparent_huge_pages() -> Finding {
    judge_thp(
        read(Path::new(THP).join("enabled"))
            .as_deref()
            .and_then(chosen),
        read(Path::new(THP).join("shmem_enabled"))
            .as_deref()
            .and_then(chosen),
    )
}

/// The word in brackets: `always [madvise] never` is `madvise`.
fn chosen(setting: &str) -> Option<&str> {
    setting
        .split_whitespace()
        .find_map(|word| word.strip_prefix('[')?.strip_suffix(']'))
}

fn judge_thp(anonymous: Option<&str>, shared: Option<&str>) -> Finding {
    match anonymous {
        None => missing(
            "this kernel has none: guests run, with more page faults",
            "run a kernel with CONFIG_TRANSPARENT_HUGEPAGE",
        ),
        Some("never") => warn(
            "switched off: guests run, with more page faults",
            format!("echo madvise | sudo tee {THP}/enabled"),
        ),
        Some(word) => ok(format!(
            "{word}; in shared memory: {}",
            shared.unwrap_or("none")
        )),
    }
}

const HUGETLB: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

pub(super) fn reserved_huge_pages() -> Finding {
    let number = |name| read(Path::new(HUGETLB).join(name))?.parse().ok();
    judge_hugetlb(number("nr_hugepages"), number("free_hugepages"))
}

/// Reserving none is the usual thing and no fault.
fn judge_hugetlb(reserved: Option<u64>, free: Option<u64>) -> Finding {
    match (reserved, free) {
        (Some(0), _) => ok(
            "none of 2 MiB reserved; guests with \"huge_pages\": \"2M\" need them, others do not",
        ),
        (Some(reserved), free) => ok(format!(
            "{} of {reserved} free, 2 MiB each",
            free.unwrap_or_default()
        )),
        (None, _) => missing(
            "this kernel has none of 2 MiB (guests do without)",
            "run a kernel with CONFIG_HUGETLBFS",
        ),
    }
}

/// A limit of this process; none: unlimited.
type Limit = Option<u64>;

/// Soft and hard limit from `/proc/self/limits`, where columns are set apart by two spaces at least.
fn limit(limits: &str, name: &str) -> Option<(Limit, Limit)> {
    let rest = limits.lines().find_map(|line| line.strip_prefix(name))?;
    let mut words = rest.split_whitespace().map(|word| match word {
        "unlimited" => Some(None),
        number => number.parse().ok().map(Some),
    });
    Some((words.next()??, words.next()??))
}

fn show(limit: Limit, unit: &str) -> String {
    limit.map_or_else(|| "unlimited".into(), |value| format!("{value}{unit}"))
}

/// Whether the limit leaves this much.
fn leaves(limit: Limit, least: u64) -> bool {
    limit.is_none_or(|limit| limit >= least)
}

pub(super) fn open_files() -> Finding {
    judge_files(&read("/proc/self/limits").unwrap_or_default())
}

fn judge_files(limits: &str) -> Finding {
    let Some((soft, hard)) = limit(limits, "Max open files") else {
        return warn("/proc/self/limits does not say", "mount procfs at /proc");
    };
    let finding = format!("{}, can be raised to {}", show(soft, ""), show(hard, ""));
    if leaves(soft, LEAST_FILES) {
        ok(finding)
    } else if leaves(hard, LEAST_FILES) {
        warn(finding, format!("ulimit -n {LEAST_FILES}"))
    } else {
        warn(
            finding,
            format!("raise nofile to {LEAST_FILES} in /etc/security/limits.conf"),
        )
    }
}

pub(super) fn locked_memory() -> Finding {
    judge_locked(&read("/proc/self/limits").unwrap_or_default())
}

fn judge_locked(limits: &str) -> Finding {
    let Some((soft, hard)) = limit(limits, "Max locked memory") else {
        return warn("/proc/self/limits does not say", "mount procfs at /proc");
    };
    let [soft, hard] = [soft, hard].map(|limit| limit.map(|bytes| bytes >> 10));
    let finding = format!(
        "{}, can be raised to {}",
        show(soft, " KiB"),
        show(hard, " KiB")
    );
    if leaves(soft, LEAST_LOCKED_KIB) {
        ok(finding)
    } else if leaves(hard, LEAST_LOCKED_KIB) {
        warn(finding, format!("ulimit -l {LEAST_LOCKED_KIB}"))
    } else {
        warn(
            finding,
            format!("raise memlock to {LEAST_LOCKED_KIB} in /etc/security/limits.conf"),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn memory_is_read_in_mib() {
        let meminfo = |available: u64| {
            format!("MemTotal:       24684092 kB\nMemFree: 1 kB\nMemAvailable:   {available} kB\n")
        };
        let (status, finding, _) = judge_memory(&meminfo(524_288));
        assert_eq!(
            (status, finding.as_str()),
            (Status::Ok, "512 MiB available of 24105 MiB")
        );
        assert_eq!(judge_memory(&meminfo(524_287)).0, Status::Warn);
        assert_eq!(judge_memory("MemTotal: 5 pages").0, Status::Warn);
    }

    #[test]
    fn the_chosen_word_is_in_brackets() {
        assert_eq!(chosen("always [madvise] never"), Some("madvise"));
        assert_eq!(chosen("always madvise never"), None);
        assert_eq!(
            judge_thp(chosen("[always] madvise never"), None).0,
            Status::Ok
        );
        assert_eq!(
            judge_thp(chosen("always madvise [never]"), None).0,
            Status::Warn
        );
        assert_eq!(judge_thp(None, None).0, Status::Missing);
    }

    #[test]
    fn reserved_pages_are_counted() {
        assert_eq!(judge_hugetlb(Some(0), Some(0)).0, Status::Ok);
        assert!(judge_hugetlb(Some(8), Some(3)).1.starts_with("3 of 8"));
        assert_eq!(judge_hugetlb(None, None).0, Status::Missing);
    }

    const LIMITS: &str = "\
Limit                     Soft Limit           Hard Limit           Units     
Max open files            256                  524288               files     
Max locked memory         65536                unlimited            bytes     
Max file locks            unlimited            unlimited            locks     ";

    #[test]
    fn limits_are_read_by_column() {
        assert_eq!(
            limit(LIMITS, "Max open files"),
            Some((Some(256), Some(524_288)))
        );
        assert_eq!(
            limit(LIMITS, "Max locked memory"),
            Some((Some(65_536), None))
        );
        assert_eq!(limit(LIMITS, "Max file locks"), Some((None, None)));
        assert_eq!(limit(LIMITS, "Max wishes"), None);
    }

    #[test]
    fn a_low_limit_says_how_to_raise_it() {
        let cure = |limits: &str| judge_files(limits).2;
        assert!(cure(LIMITS).unwrap().starts_with("ulimit -n"));
        assert!(
            cure("Max open files 256 256")
                .unwrap()
                .contains("limits.conf")
        );
        assert_eq!(cure("Max open files 1024 1024"), None);
        assert_eq!(judge_locked(LIMITS).2.unwrap(), "ulimit -l 8192");
        assert_eq!(
            judge_locked("Max locked memory unlimited unlimited").0,
            Status::Ok
        );
        assert_eq!(judge_locked("").0, Status::Warn);
    }
}
