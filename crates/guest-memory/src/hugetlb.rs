//! Pages of hugetlbfs: what the host has of them, and why it gave none (Linux Documentation/admin-guide/mm/hugetlbpage.rst).
//!
//! Mapping them reserves them, so that a lack is an error then. What the reservation does not count is the limit of a cgroup
//! (`hugetlb.2MB.max`): that is charged when a page is first touched, and who passes it gets SIGBUS. Where there may be such a limit,
//! all pages are taken when they are mapped.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::{MemoryPlan, PlanError};

/// Size of such a page, in bytes.
pub(crate) const HUGE_PAGE_BYTES: u64 = 2 << 20;
const HUGE_PAGE_MIB: u64 = HUGE_PAGE_BYTES >> 20;
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
const CGROUPS: &str = "/sys/fs/cgroup";

/// Which pages of the host RAM is made of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum HostPages {
    /// Anonymous memory, taken when it is touched, in transparent huge pages where the host gives them.
    #[default]
    Anonymous,
    /// Pages of 2 MiB from the host's pool (hugetlbfs), all reserved when they are mapped. Nothing is shared with a file, and no
    /// child inherits them: to copy one takes another of the pool, and where there is none Linux takes it from the child.
    Huge2M,
}

impl HostPages {
    /// How large a page is at least, in bytes.
    #[must_use]
    pub fn size_bytes(self) -> u64 {
        match self {
            Self::Anonymous => crate::PAGE_SIZE,
            Self::Huge2M => HUGE_PAGE_BYTES,
        }
    }

    /// Whether the ranges of `plan` can be made of such pages.
    ///
    /// # Errors
    /// One is not a whole number of them.
    pub fn check(self, plan: &MemoryPlan) -> Result<(), PlanError> {
        let size = self.size_bytes();
        let mut ranges = plan.ranges().iter();
        match ranges.all(|r| r.start.is_multiple_of(size) && r.size_bytes.is_multiple_of(size)) {
            true => Ok(()),
            false => Err(PlanError::NotHugePages(plan.size_bytes())),
        }
    }
}

/// The host's pool of pages of 2 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HugePagePool {
    /// Pages that it has.
    pub total: u64,
    /// Pages that nobody has or was promised, and those that it may make besides (`nr_overcommit_hugepages`).
    pub free: u64,
}

impl HugePagePool {
    /// As the host says it; nothing where it does not, as in a jail.
    pub(crate) fn read() -> Option<Self> {
        Self::read_at(Path::new(POOL))
    }

    fn read_at(folder: &Path) -> Option<Self> {
        let number = |name| {
            let text = std::fs::read_to_string(folder.join(name)).ok()?;
            text.trim().parse::<u64>().ok()
        };
        let spare = || number("nr_overcommit_hugepages")?.checked_sub(number("surplus_hugepages")?);
        let free = number("free_hugepages")?.saturating_sub(number("resv_hugepages")?);
        Some(Self {
            total: number("nr_hugepages")?,
            free: free.saturating_add(spare().unwrap_or_default()),
        })
    }
}

/// Why the pool did not give `needed` pages, and what to do.
pub(crate) struct Lack<'a> {
    pub(crate) needed: u64,
    pub(crate) pool: &'a Option<HugePagePool>,
    pub(crate) source: &'a io::Error,
}

impl fmt::Display for Lack<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            needed,
            pool,
            source,
        } = self;
        write!(
            f,
            "cannot reserve {needed} huge pages of {HUGE_PAGE_MIB} MiB for guest memory: {source}; "
        )?;
        match pool {
            Some(HugePagePool { total, free }) if free < needed => write!(
                f,
                "{free} are free, of {total} that the host has: set sysctl vm.nr_hugepages={}, or say huge_pages \"Transparent\"",
                total.saturating_add(needed - free)
            ),
            Some(HugePagePool { free, .. }) => write!(
                f,
                "{free} are free: look at the limits of this process (ulimit -v) and its cgroup (hugetlb.2MB.rsvd.max, cpuset.mems)"
            ),
            None => write!(
                f,
                "how many are free, {POOL} says on the host, where sysctl vm.nr_hugepages makes more; a cgroup may limit them \
                 (hugetlb.2MB.rsvd.max); or say huge_pages \"Transparent\""
            ),
        }
    }
}

/// Whether a cgroup may keep this process from touching pages that it has reserved: one that it is in, or is within, has a limit; or nobody can
/// say so, as in a jail, which has no `/proc`.
pub(crate) fn may_be_limited() -> bool {
    let limits = std::fs::read_to_string("/proc/self/cgroup");
    limits.map_or(true, |text| has_limit(&text, Path::new(CGROUPS)))
}

/// Of a `/proc/PID/cgroup` (cgroups(7)).
fn has_limit(of_process: &str, cgroups: &Path) -> bool {
    of_process.lines().any(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(place)) = (parts.next(), parts.next()) else {
            return true;
        };
        let (roots, file) = match controllers {
            "" => (
                vec![cgroups.to_owned(), cgroups.join("unified")],
                "hugetlb.2MB.max",
            ),
            v1 if v1.split(',').any(|name| name == "hugetlb") => {
                (vec![cgroups.join("hugetlb")], "hugetlb.2MB.limit_in_bytes")
            }
            _ => return false,
        };
        let is_outside = place.split('/').any(|part| part == "..");
        let place = place.trim_start_matches('/');
        let mut there = roots
            .iter()
            .filter(|root| root.join(place).is_dir())
            .peekable();
        is_outside || there.peek().is_none() || there.any(|root| any_limited(root, place, file))
    })
}

fn any_limited(root: &Path, place: &str, file: &str) -> bool {
    /// What cgroups of version 1 say for no limit is a little less than this (2^63, in whole pages).
    const NO_LIMIT_BYTES: u64 = 1 << 62;
    let mut at: PathBuf = root.join(place);
    loop {
        // Not there: this cgroup limits nothing of it.
        if let Ok(said) = std::fs::read_to_string(at.join(file)) {
            let bytes = said.trim().parse::<u64>();
            // The root of all has no such file in version 2: what is seen as the root lies within others.
            let is_cut = at == root && file == "hugetlb.2MB.max";
            let is_free = said.trim() == "max" || bytes.is_ok_and(|bytes| bytes >= NO_LIMIT_BYTES);
            if is_cut || !is_free {
                return true;
            }
        }
        if at == root || !at.pop() {
            return false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_huge_pages::MorePages;
    use crate::test_server::{TestServer, may_serve};
    use crate::{AccessError, GuestRam, MapError, PAGE_SIZE, PageKind, PageServer, PageSet};
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use tempfile::TempDir;

    const MIB: u64 = 1 << 20;

    fn plan(mib: u64) -> MemoryPlan {
        MemoryPlan::around_hole(mib * MIB).unwrap()
    }

    fn huge(mib: u64) -> GuestRam {
        GuestRam::map_of(&plan(mib), HostPages::Huge2M).unwrap()
    }

    fn content(ram: &GuestRam) -> Vec<u8> {
        let mut all = vec![0; ram.size_bytes() as usize];
        ram.read(0, &mut all).unwrap();
        all
    }

    /// How many KiB of private huge pages of a pool this process has at the address.
    fn private_hugetlb_kib(host_addr: u64) -> u64 {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let begins = format!("{host_addr:x}-");
        let mut of_mapping = maps.lines().skip_while(|line| !line.starts_with(&begins));
        let line = of_mapping.find_map(|line| line.strip_prefix("Private_Hugetlb:"));
        let kib = line.unwrap().trim().strip_suffix(" kB").unwrap();
        kib.parse().unwrap()
    }

    #[test]
    fn ram_is_made_of_pages_of_the_pool_when_it_is_touched() {
        let test = "ram_is_made_of_pages_of_the_pool_when_it_is_touched";
        let Some(_more) = MorePages::make(test, 8) else {
            return;
        };
        let ram = huge(16);
        let (_, host_addr) = ram.mapped_ranges().next().unwrap();
        assert_eq!(host_addr % HUGE_PAGE_BYTES, 0);
        if !may_be_limited() {
            assert_eq!(private_hugetlb_kib(host_addr), 0);
        }
        ram.write(5 * MIB, b"touched").unwrap();
        assert!(private_hugetlb_kib(host_addr) >= 2048);
        // Where a cgroup may have a limit.
        ram.take_huge_pages().unwrap();
        assert_eq!(private_hugetlb_kib(host_addr), 16 * 1024);
        let mut back = [0; 7];
        ram.read(5 * MIB, &mut back).unwrap();
        assert_eq!(&back, b"touched");
    }

    #[test]
    fn a_lack_is_an_error_when_ram_is_mapped() {
        let Some(pool) = HugePagePool::read() else {
            crate::test_server::skip(
                "a_lack_is_an_error_when_ram_is_mapped",
                "this kernel has no huge pages of 2 MiB",
            );
            return;
        };
        // Others may give pages back meanwhile.
        let mib = (pool.free + 512) * 2;
        let why = GuestRam::map_of(&plan(mib), HostPages::Huge2M).unwrap_err();
        assert!(matches!(why, MapError::NoHugePages { .. }), "{why}");
        let told = why.to_string();
        assert!(
            told.contains(&format!("{} huge pages", mib / 2)) && told.contains("vm.nr_hugepages="),
            "{told}"
        );
    }

    /// In a process of its own, which is in the cgroup: others must not be.
    #[test]
    fn a_cgroups_limit_is_an_error_when_ram_is_mapped() {
        const CGROUP: &str = "ALVEOLE_TEST_HUGETLB_CGROUP";
        let test = "a_cgroups_limit_is_an_error_when_ram_is_mapped";
        if let Some(cgroup) = std::env::var_os(CGROUP) {
            std::fs::write(PathBuf::from(cgroup).join("cgroup.procs"), "0").unwrap();
            let why = GuestRam::map_of(&plan(16), HostPages::Huge2M).unwrap_err();
            assert!(matches!(why, MapError::HugePagesLimited { .. }), "{why}");
            assert!(why.to_string().contains("hugetlb.2MB.max"), "{why}");
            huge(4);
            return;
        }
        let root = Path::new(CGROUPS);
        let cgroup = root.join(format!("alveole-test-{}", std::process::id()));
        let make = || {
            let known = std::fs::read_to_string(root.join("cgroup.controllers"))?;
            if !known.split_whitespace().any(|name| name == "hugetlb") {
                return Err(io::Error::other(format!("it has {}", known.trim())));
            }
            std::fs::write(root.join("cgroup.subtree_control"), "+hugetlb")?;
            std::fs::create_dir(&cgroup)?;
            std::fs::write(cgroup.join("hugetlb.2MB.max"), "4194304")
        };
        if let Err(why) = make() {
            let _ = std::fs::remove_dir(&cgroup);
            let why = format!("no hugetlb controller (version 2) at {CGROUPS}: {why}");
            crate::test_server::skip(test, &why);
            return;
        }
        let limited = MorePages::make(test, 8).map(|_more| {
            std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", &format!("hugetlb::tests::{test}"), "--nocapture"])
                .env(CGROUP, &cgroup)
                .status()
                .unwrap()
        });
        std::fs::remove_dir(&cgroup).unwrap();
        assert!(limited.is_none_or(|status| status.success()), "{limited:?}");
    }

    #[test]
    fn odd_sizes_are_refused() {
        let why = GuestRam::map_of(&plan(65), HostPages::Huge2M).unwrap_err();
        assert!(why.to_string().contains("not a multiple of 2 MiB"), "{why}");
        let behind_the_hole = HostPages::Huge2M.check(&plan(3073));
        assert!(behind_the_hole.is_err());
        assert_eq!(HostPages::Huge2M.check(&plan(3074)), Ok(()));
    }

    #[test]
    fn files_are_copied_into_it() {
        let Some(_more) = MorePages::make("files_are_copied_into_it", 2) else {
            return;
        };
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..3 * PAGE_SIZE).map(|i| (i % 251) as u8).collect();
        std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).unwrap();
        let ram = huge(4);
        ram.place_file(&file, 0, 8 * PAGE_SIZE, 3 * PAGE_SIZE)
            .unwrap();
        file.set_len(0).unwrap();
        let mut back = vec![0; bytes.len()];
        ram.read(8 * PAGE_SIZE, &mut back).unwrap();
        assert!(back == bytes);
        let outside = ram.place_file(&file, 0, 4 * MIB, 1).unwrap_err();
        assert!(matches!(outside, AccessError::Outside { .. }), "{outside}");
    }

    /// Full and a diff; a huge page of which no small page was touched is a hole.
    #[test]
    fn a_chain_of_snapshots_is_the_memory() {
        let Some(_more) = MorePages::make("a_chain_of_snapshots_is_the_memory", 16) else {
            return;
        };
        let ram = huge(16);
        for page in 0..700 {
            ram.write_plain(page * 3 * PAGE_SIZE, &(page + 1)).unwrap();
        }
        let files = [(); 2].map(|()| tempfile::tempfile().unwrap());
        let full = ram.save_pages(&PageSet::all(4096), &files[0]).unwrap();
        assert_eq!(full.pages_of(PageKind::Data), 700);
        ram.write(0, &[0; 4096]).unwrap();
        ram.write(15 * MIB, b"newer").unwrap();
        let changed = PageSet::from_runs(4096, [0..1, 3840..3841]).unwrap();
        let diff = ram.save_pages(&changed, &files[1]).unwrap();
        let layers = [(&files[0], &full), (&files[1], &diff)];
        let want = content(&ram);
        drop(ram);
        let back = GuestRam::copy_snapshot(&plan(16), &layers, HostPages::Huge2M).unwrap();
        assert!(content(&back) == want);
        assert_eq!(back.host_pages(), HostPages::Huge2M);
        assert!(content(&GuestRam::map_snapshot(&plan(16), &layers).unwrap()) == want);
    }

    /// The pool has no page more than RAM is made of, so that no child could have one copied.
    #[test]
    fn a_capture_is_the_memory_of_one_instant_though_no_child_inherits_it() {
        let test = "a_capture_is_the_memory_of_one_instant_though_no_child_inherits_it";
        let Some(_more) = MorePages::make(test, 32) else {
            return;
        };
        let ram = huge(64);
        let pages = ram.pages();
        let (end, stop, stopped) = (
            AtomicBool::new(false),
            AtomicBool::new(false),
            AtomicUsize::new(0),
        );
        let write = || {
            let mut random = 7u64;
            while !end.load(Ordering::Relaxed) {
                while stop.load(Ordering::Acquire) {
                    stopped.store(1, Ordering::Release);
                    std::hint::spin_loop();
                }
                stopped.store(0, Ordering::Release);
                random = random.wrapping_mul(6_364_136_223_846_793_005) + 1;
                let addr = (random >> 20) % (pages * 512) * 8;
                ram.write_plain(addr, &random).unwrap();
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(write);
            // All at once, which is more than is copied; then nearly all ahead.
            for ahead in [false, true, true] {
                let file = tempfile::tempfile().unwrap();
                let mut prepared = ram.prepare_capture(&file).unwrap();
                let stand_still = || {
                    stop.store(true, Ordering::Release);
                    while stopped.load(Ordering::Acquire) == 0 {
                        std::thread::yield_now();
                    }
                };
                let go_on = || {
                    stop.store(false, Ordering::Release);
                    while stopped.load(Ordering::Acquire) == 1 {
                        std::thread::yield_now();
                    }
                };
                stand_still();
                ram.track_writes();
                go_on();
                if ahead {
                    prepared.write_ahead(&PageSet::all(pages)).unwrap();
                }
                stand_still();
                let changed = match ahead {
                    true => ram.take_written(),
                    false => PageSet::all(pages),
                };
                let want = content(&ram);
                let capture = prepared.start(&changed).unwrap();
                go_on();
                let map = capture.wait().unwrap();
                let back = GuestRam::map_snapshot(&plan(64), &[(&file, &map)]).unwrap();
                assert!(content(&back) == want, "ahead: {ahead}");
            }
            end.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn another_process_serves_whole_huge_pages() {
        let test = "another_process_serves_whole_huge_pages";
        if !may_serve(test) {
            return;
        }
        let Some(_more) = MorePages::make(test, 8) else {
            return;
        };
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("u");
        let served = TestServer::start(&path, |number| {
            Some(vec![number as u8 + 1; HUGE_PAGE_BYTES as usize])
        })
        .unwrap();
        let server = PageServer::connect(&path).unwrap();
        let ram = GuestRam::map_served(&plan(16), &server, HostPages::Huge2M).unwrap();
        assert_eq!(ram.read_plain::<u8>(5 * MIB).unwrap(), 3);
        assert_eq!(ram.read_plain::<u8>(4 * MIB).unwrap(), 3);
        assert_eq!(served.served(), 1);
        let hosts: Vec<_> = ram.mapped_ranges().map(|(_, host)| host).collect();
        let told: serde_json::Value = serde_json::from_str(&served.message()).unwrap();
        assert_eq!(
            told,
            serde_json::json!([{ "base_host_virt_addr": hosts[0], "size": 16 * MIB, "offset": 0,
                "page_size": HUGE_PAGE_BYTES, "page_size_kib": HUGE_PAGE_BYTES }])
        );
        // What nobody has touched is asked for, not taken for zero.
        let file = tempfile::tempfile().unwrap();
        let capture = ram.capture_in_child(&PageSet::all(4096), &file).unwrap();
        let map = capture.wait().unwrap();
        assert_eq!(map.pages_of(PageKind::Data), 4096);
        let back = GuestRam::map_snapshot(&plan(16), &[(&file, &map)]).unwrap();
        for number in 0..8 {
            assert_eq!(
                back.read_plain::<u8>((number * 2 + 1) * MIB).unwrap(),
                number as u8 + 1
            );
        }
        assert_eq!(served.served(), 8);
    }

    #[test]
    fn what_lacks_is_said_with_the_cure() {
        let source = io::Error::from_raw_os_error(libc::ENOMEM);
        let told = |pool| {
            let lack = Lack {
                needed: 128,
                pool: &pool,
                source: &source,
            };
            lack.to_string()
        };
        let few = told(Some(HugePagePool { total: 8, free: 3 }));
        assert!(few.contains("128 huge pages of 2 MiB"), "{few}");
        assert!(
            few.contains("3 are free, of 8") && few.contains("vm.nr_hugepages=133"),
            "{few}"
        );
        let many = told(Some(HugePagePool {
            total: 500,
            free: 500,
        }));
        assert!(many.contains("hugetlb.2MB.rsvd.max"), "{many}");
        let unknown = told(None);
        assert!(unknown.contains("/sys/kernel/mm/hugepages"), "{unknown}");
    }

    #[test]
    fn the_pool_counts_what_is_promised_and_what_may_be_made() {
        let dir = TempDir::new().unwrap();
        assert_eq!(HugePagePool::read_at(dir.path()), None);
        for (name, value) in [
            ("nr_hugepages", "10\n"),
            ("free_hugepages", "6\n"),
            ("resv_hugepages", "4\n"),
            ("nr_overcommit_hugepages", "5\n"),
            ("surplus_hugepages", "2\n"),
        ] {
            std::fs::write(dir.path().join(name), value).unwrap();
        }
        let pool = HugePagePool { total: 10, free: 5 };
        assert_eq!(HugePagePool::read_at(dir.path()), Some(pool));
    }

    #[test]
    fn limits_of_cgroups_are_found_all_the_way_up() {
        let dir = TempDir::new().unwrap();
        let root = dir.path();
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        std::fs::create_dir_all(root.join("hugetlb/v1")).unwrap();
        let write = |name: &str, value: &str| std::fs::write(root.join(name), value).unwrap();
        write("a/b/hugetlb.2MB.max", "max\n");
        assert!(!has_limit("0::/a/b\n", root));
        assert!(!has_limit("0::/\n", root));
        write("a/hugetlb.2MB.max", "4194304\n");
        assert!(has_limit("0::/a/b\n", root));
        assert!(!has_limit("0::/\n", root));
        // Seen from elsewhere, or no such file: better too careful.
        assert!(has_limit("0::/../x\n", root));
        assert!(has_limit("0::/elsewhere\n", root));
        assert!(has_limit("nonsense\n", root));
        std::fs::create_dir_all(root.join("unified/c")).unwrap();
        assert!(!has_limit("0::/c\n", root));
        write("unified/c/hugetlb.2MB.max", "0\n");
        assert!(has_limit("0::/c\n", root));
        // In a namespace of cgroups, what is above is not seen.
        write("hugetlb.2MB.max", "max\n");
        assert!(has_limit("0::/\n", root));
        std::fs::remove_file(root.join("hugetlb.2MB.max")).unwrap();
        let v1 = "5:cpu,cpuacct:/a\n4:hugetlb:/v1\n";
        write(
            "hugetlb/v1/hugetlb.2MB.limit_in_bytes",
            "9223372036854771712\n",
        );
        assert!(!has_limit(v1, root));
        write("hugetlb/v1/hugetlb.2MB.limit_in_bytes", "0\n");
        assert!(has_limit(v1, root));
    }
}
