//! What a guest's processors are told to say of themselves: bits of CPUID answers, laid over what they would say.
//!
//! The same bits are laid over every processor's answers. So those that tell processors apart, and how they lie beside
//! each other, stay what [`guest_cpuid`](crate::cpuid::guest_cpuid) made them: a template that was taken from another
//! machine names them as well, and with one APIC id for all a guest does not boot. Everything else is as the template says,
//! also where `guest_cpuid` had set it. Nobody checks that the host can do what is announced: that is what templates are for.

use alveole_hypervisor::CpuidEntry;

/// Bits of one CPUID answer that are set anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuidChange {
    /// Input in EAX.
    pub leaf: u32,
    /// Input in ECX; 0 where the leaf has no subleaves.
    pub subleaf: u32,
    /// Whether ECX selects among several answers from now on.
    pub subleaf_matters: bool,
    /// Bits of EAX, EBX, ECX and EDX.
    pub registers: [BitChange; 4],
}

/// Bits of one register that are set anew.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BitChange {
    /// The bits; the others stay.
    pub mask: u32,
    /// What they are set to.
    pub value: u32,
}

/// A change of an answer that the hypervisor does not give.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "CPUID leaf {leaf:#x}, subleaf {subleaf:#x} cannot be changed: the hypervisor of this host has no such leaf"
)]
pub struct NoSuchLeaf {
    /// Input in EAX.
    pub leaf: u32,
    /// Input in ECX.
    pub subleaf: u32,
}

/// The changes of answers that are not among `supported`, which is what the hypervisor offers.
#[must_use]
pub fn missing_leaves(changes: &[CpuidChange], supported: &[CpuidEntry]) -> Vec<NoSuchLeaf> {
    let is_there = |c: &&CpuidChange| {
        let same = |e: &CpuidEntry| (e.leaf, e.subleaf) == (c.leaf, c.subleaf);
        !supported.iter().any(same)
    };
    let missing = changes.iter().filter(is_there);
    missing
        .map(|&CpuidChange { leaf, subleaf, .. }| NoSuchLeaf { leaf, subleaf })
        .collect()
}

/// Lays `changes` over one processor's answers. Those of an answer that the processor does not give are left out.
pub fn apply(changes: &[CpuidChange], entries: &mut [CpuidEntry]) {
    for change in changes {
        let same = |e: &&mut CpuidEntry| (e.leaf, e.subleaf) == (change.leaf, change.subleaf);
        let Some(entry) = entries.iter_mut().find(same) else {
            continue;
        };
        let ours = topology_bits(change.leaf);
        if ours != ALL {
            entry.subleaf_matters = change.subleaf_matters;
        }
        let registers = [
            &mut entry.eax,
            &mut entry.ebx,
            &mut entry.ecx,
            &mut entry.edx,
        ];
        for ((register, change), ours) in registers.into_iter().zip(change.registers).zip(ours) {
            let mask = change.mask & !ours;
            *register = (*register & !mask) | (change.value & mask);
        }
    }
}

const ALL: [u32; 4] = [u32::MAX; 4];

/// The bits of a leaf's EAX, EBX, ECX and EDX that no template changes: what [`guest_cpuid`](crate::cpuid::guest_cpuid)
/// says of each processor's place, and that there are no performance counters. Firecracker sets the same ones after its
/// templates (its documentation of CPUID normalization).
fn topology_bits(leaf: u32) -> [u32; 4] {
    match leaf {
        // Initial APIC id, number of logical processors; HTT.
        1 => [0, 0xffff_0000, 0, 1 << 28],
        // Who shares a cache.
        4 => [0xffff_c000, 0, 0, 0],
        0x8000_001d => [0x03ff_c000, 0, 0, 0],
        // Width of the core id, number of cores.
        0x8000_0008 => [0, 0, 0xf0ff, 0],
        0xa | 0xb | 0x1f | 0x8000_001e => ALL,
        _ => [0; 4],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpuid::guest_cpuid;
    use alveole_hypervisor::find_leaf;
    use proptest::prelude::*;

    fn entry(leaf: u32, subleaf: u32, subleaf_matters: bool) -> CpuidEntry {
        CpuidEntry {
            leaf,
            subleaf,
            subleaf_matters,
            eax: 0xaaaa_aaaa,
            ebx: 0xbbbb_bbbb,
            ecx: 0xcccc_cccc,
            edx: 0xdddd_dddd,
        }
    }

    fn change(leaf: u32, subleaf: u32, registers: [(u32, u32); 4]) -> CpuidChange {
        CpuidChange {
            leaf,
            subleaf,
            subleaf_matters: subleaf > 0,
            registers: registers.map(|(mask, value)| BitChange { mask, value }),
        }
    }

    #[test]
    fn named_bits_are_set_and_the_others_stay() {
        let mut entries = [entry(7, 0, true), entry(7, 1, true), entry(9, 0, false)];
        let changes = [
            change(7, 1, [(0xff, 0x11), (0, 0), (u32::MAX, 5), (1 << 31, 0)]),
            change(9, 0, [(1, 1), (0, 0), (0, 0), (0, 0)]),
        ];
        assert_eq!(missing_leaves(&changes, &entries), []);
        apply(&changes, &mut entries);
        assert_eq!(entries[0], entry(7, 0, true));
        assert_eq!(
            entries[1],
            CpuidEntry {
                eax: 0xaaaa_aa11,
                ecx: 5,
                edx: 0x5ddd_dddd,
                ..entry(7, 1, true)
            }
        );
        assert_eq!(entries[2].eax, 0xaaaa_aaab);
    }

    #[test]
    fn what_the_hypervisor_lacks_is_named() {
        let changes = [(7, 1), (7, 2), (1, 1), (0x8000_0001, 0)]
            .map(|(leaf, subleaf)| change(leaf, subleaf, [(0, 0); 4]));
        let missing = missing_leaves(&changes, &[entry(1, 0, false), entry(7, 1, true)]);
        let missing: Vec<_> = missing.iter().map(ToString::to_string).collect();
        assert_eq!(missing.len(), 3);
        assert_eq!(
            missing[2],
            "CPUID leaf 0x80000001, subleaf 0x0 cannot be changed: the hypervisor of this host has no such leaf"
        );
    }

    #[test]
    fn a_template_wins_over_what_we_announce_but_not_over_the_topology() {
        let host = [
            CpuidEntry {
                leaf: 0,
                eax: 0xb,
                ..CpuidEntry::default()
            },
            entry(1, 0, false),
            entry(0xa, 0, false),
            entry(0xb, 0, true),
            entry(0x8000_001e, 0, false),
        ];
        let mut guest = guest_cpuid(&host, 2, 3, true);
        let before = guest.clone();
        let all = |leaf| change(leaf, 0, [(u32::MAX, 0x0123_4567); 4]);
        apply(&[1, 0xa, 0xb, 0x8000_001e].map(all), &mut guest);
        let one = *find_leaf(&guest, 1, 0).unwrap();
        assert_eq!(one.eax, 0x0123_4567);
        assert_eq!(one.ebx, 0x0203_4567, "APIC id 2 of 3");
        assert_eq!(
            one.ecx, 0x0123_4567,
            "no hypervisor, no x2APIC: as the template has it"
        );
        assert_eq!(one.edx, 0x1123_4567, "several processors");
        for leaf in [0xa, 0xb, 0x8000_001e] {
            assert_eq!(find_leaf(&guest, leaf, 0), find_leaf(&before, leaf, 0));
        }
    }

    proptest! {
        #[test]
        fn every_processor_keeps_its_place(
            leaf in prop::sample::select(vec![1u32, 4, 0xa, 0xb, 0x1f, 0x8000_0008, 0x8000_001d, 0x8000_001e]),
            registers in any::<[(u32, u32); 4]>(),
            subleaf_matters in any::<bool>(),
        ) {
            let host: Vec<_> = [1, 4, 0xa, 0xb, 0x1f, 0x8000_0008, 0x8000_001d, 0x8000_001e]
                .map(|leaf| entry(leaf, 0, false))
                .into_iter()
                .chain([CpuidEntry { leaf: 0, eax: 0x1f, ..CpuidEntry::default() }])
                .collect();
            let changed = CpuidChange { subleaf_matters, ..change(leaf, 0, registers) };
            let ids: Vec<_> = [0, 1].map(|index| {
                let mut guest = guest_cpuid(&host, index, 2, true);
                let before = guest.clone();
                apply(&[changed], &mut guest);
                for (new, old) in guest.iter().zip(&before) {
                    // Made anew, it is the same: nothing of the place is lost.
                    if new.leaf != leaf { assert_eq!(new, old); }
                }
                let find = |leaf| *find_leaf(&guest, leaf, 0).unwrap();
                (find(1).ebx >> 24, find(0xb).edx, find(0x1f).edx, find(0x8000_001e).eax)
            }).into();
            prop_assert_eq!(ids, [(0, 0, 0, 0), (1, 1, 1, 1)]);
        }
    }
}
