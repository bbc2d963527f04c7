//! CPUID leaves as plain values.

use serde::{Deserialize, Serialize};

/// One CPUID answer: what `cpuid` returns for one leaf and subleaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidEntry {
    /// Input in EAX.
    pub leaf: u32,
    /// Input in ECX, where the leaf has subleaves.
    pub subleaf: u32,
    /// Whether ECX selects among several answers of this leaf.
    pub subleaf_matters: bool,
    /// Output registers.
    pub eax: u32,
    /// Output registers.
    pub ebx: u32,
    /// Output registers.
    pub ecx: u32,
    /// Output registers.
    pub edx: u32,
}

/// The entry that answers `leaf` and `subleaf`.
#[must_use]
pub fn find_leaf(entries: &[CpuidEntry], leaf: u32, subleaf: u32) -> Option<&CpuidEntry> {
    entries
        .iter()
        .find(|e| e.leaf == leaf && (!e.subleaf_matters || e.subleaf == subleaf))
}
