//! What a guest processor says of itself: the host's features filtered by the hypervisor, with a topology
//! that is true for this guest: one package, one thread a core.
//!
//! Starts from what the hypervisor supports and only ever clears feature bits, but for three that the
//! in-kernel local APIC provides by itself (x2APIC, TSC deadline) or that say "you are a guest".
//! Sources: Intel SDM vol. 2A CPUID, AMD APM vol. 3 appendix E, Linux Documentation/virt/kvm/x86/cpuid.rst.

mod missing;

pub use missing::{Missing, not_offered};

use alveole_hypervisor::CpuidEntry;

const HYPERVISOR_ECX: u32 = 1 << 31;
const TSC_DEADLINE_ECX: u32 = 1 << 24;
const X2APIC_ECX: u32 = 1 << 21;
const HTT_EDX: u32 = 1 << 28;
/// Leaf 1 EBX bits 31-24 are the initial APIC id, 23-16 the number of logical processors.
const LEAF1_ID_SHIFT: u32 = 24;
const LEAF1_COUNT_SHIFT: u32 = 16;
/// Level types of leaf 0xb, ECX bits 15-8.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// The CPUID entries of processor `index` out of `count`, whose APIC ids are their numbers.
///
/// `supported` is what the hypervisor offers on this host; `tsc_deadline` says whether its local APIC has
/// that timer mode.
#[must_use]
pub fn guest_cpuid(
    supported: &[CpuidEntry],
    index: u32,
    count: u32,
    tsc_deadline: bool,
) -> Vec<CpuidEntry> {
    let core_bits = count.next_power_of_two().trailing_zeros();
    let mut entries: Vec<_> = supported
        .iter()
        // The extended topology leaves are made anew below, with as many levels as there really are.
        .filter(|e| !matches!(e.leaf, 0xb | 0x1f | 0x8000_0026))
        .copied()
        .map(|entry| adapt(entry, index, count, core_bits, tsc_deadline))
        .collect();
    let highest = supported.iter().find(|e| e.leaf == 0).map_or(0, |e| e.eax);
    for leaf in [0xb, 0x1f] {
        if highest >= leaf {
            entries.extend(topology(leaf, index, count, core_bits));
        }
    }
    entries
}

fn adapt(
    mut e: CpuidEntry,
    index: u32,
    count: u32,
    core_bits: u32,
    tsc_deadline: bool,
) -> CpuidEntry {
    let last = count.saturating_sub(1);
    match e.leaf {
        1 => {
            e.ebx = (e.ebx & 0xffff)
                | (index << LEAF1_ID_SHIFT)
                | (count.min(255) << LEAF1_COUNT_SHIFT);
            e.ecx = (e.ecx & !TSC_DEADLINE_ECX) | HYPERVISOR_ECX | X2APIC_ECX;
            if tsc_deadline {
                e.ecx |= TSC_DEADLINE_ECX;
            }
            e.edx = if count > 1 {
                e.edx | HTT_EDX
            } else {
                e.edx & !HTT_EDX
            };
        }
        // Intel caches: EAX 31-26 cores a package - 1, 25-14 threads sharing the cache - 1. The first two
        // levels are a core's own, the last is everybody's.
        4 if e.eax & 0x1f != 0 => {
            let sharing = if e.eax >> 5 & 7 >= 3 { last } else { 0 };
            e.eax = (e.eax & 0x3fff) | (sharing.min(0xfff) << 14) | (last.min(0x3f) << 26);
        }
        // The performance counters are not wired up: none are announced.
        0xa => {
            e = CpuidEntry {
                leaf: e.leaf,
                subleaf: e.subleaf,
                ..CpuidEntry::default()
            }
        }
        // AMD core count: ECX 15-12 width of the core id, 7-0 cores - 1.
        0x8000_0008 => e.ecx = (core_bits << 12) | last.min(0xff),
        // AMD caches: EAX 25-14 threads sharing - 1, as leaf 4.
        0x8000_001d if e.eax & 0x1f != 0 => {
            let sharing = if e.eax >> 5 & 7 >= 3 { last } else { 0 };
            e.eax = (e.eax & 0x3fff) | (sharing.min(0xfff) << 14);
        }
        // AMD topology: extended APIC id; core id, threads a core - 1; node id, nodes - 1.
        0x8000_001e => {
            e.eax = index;
            e.ebx = index & 0xff;
            e.ecx = 0;
            e.edx = 0;
        }
        _ => {}
    }
    e
}

/// Leaf 0xb (or 0x1f): a thread level of one, a core level of `count`, and the end of the list.
fn topology(leaf: u32, index: u32, count: u32, core_bits: u32) -> [CpuidEntry; 3] {
    let level = |subleaf, shift, processors, kind: u32| CpuidEntry {
        leaf,
        subleaf,
        subleaf_matters: true,
        eax: shift,
        ebx: processors,
        ecx: subleaf | kind << 8,
        edx: index,
    };
    [
        level(0, 0, 1, LEVEL_THREAD),
        level(1, core_bits, count, LEVEL_CORE),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use alveole_hypervisor::find_leaf;
    use proptest::prelude::*;

    fn host() -> Vec<CpuidEntry> {
        let leaf = |leaf, eax, ebx, ecx, edx| CpuidEntry {
            leaf,
            eax,
            ebx,
            ecx,
            edx,
            ..CpuidEntry::default()
        };
        let cache = |leaf, subleaf, level: u32| CpuidEntry {
            subleaf,
            subleaf_matters: true,
            ..leaf_of(leaf, 0xfc00_4001 | level << 5)
        };
        fn leaf_of(leaf: u32, eax: u32) -> CpuidEntry {
            CpuidEntry {
                leaf,
                eax,
                ..CpuidEntry::default()
            }
        }
        vec![
            leaf(0, 0x1f, 0, 0, 0),
            leaf(1, 0xa2_0f10, 0x0710_0800, TSC_DEADLINE_ECX | 1, HTT_EDX | 1),
            cache(4, 0, 1),
            cache(4, 3, 3),
            leaf(0xa, 0x0730_0402, 0, 0, 0x603),
            CpuidEntry {
                subleaf_matters: true,
                ecx: 0x100,
                ebx: 2,
                eax: 1,
                ..leaf_of(0xb, 1)
            },
            leaf(0x8000_0008, 0x3030, 0, 0x700f, 0),
            cache(0x8000_001d, 3, 3),
            leaf(0x8000_001e, 9, 0x104, 0x300, 0),
            leaf(0x8000_0026, 1, 2, 3, 4),
        ]
    }

    #[test]
    fn one_processor_is_alone() {
        let c = guest_cpuid(&host(), 0, 1, false);
        let one = find_leaf(&c, 1, 0).unwrap();
        assert_eq!(one.ebx, 0x0001_0800);
        assert_eq!(one.edx, 1);
        assert_eq!(one.ecx, HYPERVISOR_ECX | X2APIC_ECX | 1);
        assert_eq!(find_leaf(&c, 0xa, 0).unwrap().eax, 0);
        assert_eq!(find_leaf(&c, 0x8000_0008, 0).unwrap().ecx, 0);
        assert!(find_leaf(&c, 0x8000_0026, 0).is_none());
        assert_eq!(find_leaf(&c, 4, 3).unwrap().eax >> 14, 0);
    }

    #[test]
    fn caches_are_shared_by_level() {
        let c = guest_cpuid(&host(), 3, 8, true);
        assert_eq!(find_leaf(&c, 4, 0).unwrap().eax >> 14 & 0xfff, 0);
        assert_eq!(find_leaf(&c, 4, 3).unwrap().eax >> 14 & 0xfff, 7);
        assert_eq!(find_leaf(&c, 0x8000_001d, 3).unwrap().eax >> 14 & 0xfff, 7);
        assert_eq!(find_leaf(&c, 0x8000_001e, 0).unwrap().ebx, 3);
        assert_ne!(find_leaf(&c, 1, 0).unwrap().ecx & TSC_DEADLINE_ECX, 0);
    }

    #[test]
    fn only_known_bits_are_ever_added() {
        for count in [1, 2, 64] {
            for new in guest_cpuid(&host(), 0, count, true) {
                let Some(old) = find_leaf(&host(), new.leaf, new.subleaf).copied() else {
                    continue;
                };
                if new.leaf == 1 {
                    let added = HYPERVISOR_ECX | X2APIC_ECX | TSC_DEADLINE_ECX;
                    assert_eq!(new.ecx & !added, old.ecx & !added);
                    assert_eq!(new.edx & !HTT_EDX, old.edx & !HTT_EDX);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn the_topology_tells_every_processor_apart(count in 1u32..255) {
            for index in [0, count / 2, count - 1] {
                let c = guest_cpuid(&host(), index, count, true);
                for leaf in [0xb, 0x1f] {
                    let thread = find_leaf(&c, leaf, 0).unwrap();
                    let core = find_leaf(&c, leaf, 1).unwrap();
                    prop_assert_eq!((thread.eax, thread.ebx, thread.ecx), (0, 1, 0x100));
                    prop_assert_eq!((core.ebx, core.ecx, core.edx), (count, 0x201, index));
                    prop_assert!(index >> core.eax == 0, "one package");
                    prop_assert!(core.eax == 0 || count > 1 << (core.eax - 1));
                }
            }
        }
    }
}
