//! What a guest was told that its processors can do, and another host cannot give.
//!
//! Sources: Intel SDM vol. 2A CPUID, AMD APM vol. 3 appendix E, Linux Documentation/virt/kvm/x86/cpuid.rst; the names are
//! those of `/proc/cpuinfo` on Linux where it has one.

use std::fmt;

use alveole_hypervisor::{CpuidEntry, find_leaf};

/// Something that a guest was told and that a host cannot give.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Missing {
    /// The processor is another maker's (leaf 0): what its instructions and registers do differs in ways that no bit tells.
    Vendor {
        /// The maker of the guest's processor, as CPUID says it.
        saved: String,
        /// The maker of this host's.
        host: String,
    },
    /// One feature.
    Feature {
        /// Input in EAX.
        leaf: u32,
        /// Input in ECX.
        subleaf: u32,
        /// Which output register: `eax`, `ebx`, `ecx` or `edx`.
        register: &'static str,
        /// Which bit of it, 0 to 31.
        bit: u32,
        /// Its usual name, where it has one.
        name: Option<&'static str>,
    },
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vendor { saved, host } => write!(
                f,
                "the guest's processor is one of {saved:?}, this host's one of {host:?} (CPUID leaf 0x0)"
            ),
            Self::Feature {
                leaf,
                subleaf,
                register,
                bit,
                name,
            } => write!(
                f,
                "{} (CPUID leaf {leaf:#x}, subleaf {subleaf:#x}, {register} bit {bit})",
                name.unwrap_or("a feature without a name")
            ),
        }
    }
}

/// The features that `saved`, which a guest's processor answers, has and `supported`, which the hypervisor of this host
/// offers, has not; and the maker, if that is another.
///
/// A template may have announced more than its host had from the start. That is told as well: whoever restores
/// knows whether there was one.
#[must_use]
pub fn not_offered(saved: &[CpuidEntry], supported: &[CpuidEntry]) -> Vec<Missing> {
    let mut missing = Vec::new();
    let (saved_vendor, host_vendor) = (vendor(saved), vendor(supported));
    if saved_vendor != host_vendor {
        missing.push(Missing::Vendor {
            saved: saved_vendor,
            host: host_vendor,
        });
    }
    for features in FEATURES {
        let value = |entries| {
            let entry = find_leaf(entries, features.leaf, features.subleaf);
            entry.map_or(0, |e| features.register.of(e))
        };
        let lacking = value(saved) & !value(supported) & !features.not_compared;
        for bit in (0..32).filter(|bit| lacking >> bit & 1 != 0) {
            let name = features.names.get(bit as usize).copied();
            missing.push(Missing::Feature {
                leaf: features.leaf,
                subleaf: features.subleaf,
                register: features.register.name(),
                bit,
                name: name.filter(|name| !name.is_empty()),
            });
        }
    }
    missing
}

fn vendor(entries: &[CpuidEntry]) -> String {
    let Some(e) = find_leaf(entries, 0, 0) else {
        return String::new();
    };
    let bytes = [e.ebx, e.edx, e.ecx].map(u32::to_le_bytes).concat();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    fn of(self, e: &CpuidEntry) -> u32 {
        match self {
            Self::Eax => e.eax,
            Self::Ebx => e.ebx,
            Self::Ecx => e.ecx,
            Self::Edx => e.edx,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Eax => "eax",
            Self::Ebx => "ebx",
            Self::Ecx => "ecx",
            Self::Edx => "edx",
        }
    }
}

/// A register whose bits are features.
struct Features {
    leaf: u32,
    subleaf: u32,
    register: Register,
    /// Bits that the hypervisor does not offer and that guests have all the same, or that take something away when they are set.
    not_compared: u32,
    /// From bit 0 on; empty where there is none.
    names: &'static [&'static str],
}

use Register::{Eax, Ebx, Ecx, Edx};

const fn features(
    leaf: u32,
    subleaf: u32,
    register: Register,
    not_compared: u32,
    names: &'static [&'static str],
) -> Features {
    Features {
        leaf,
        subleaf,
        register,
        not_compared,
        names,
    }
}

/// Given by the in-kernel local APIC on every host (x2APIC, TSC deadline), set as the guest runs (OSXSAVE), or no
/// feature (hypervisor).
const LEAF1_ECX_OWN: u32 = 1 << 21 | 1 << 24 | 1 << 27 | 1 << 31;
/// How many processors there are (HTT).
const LEAF1_EDX_OWN: u32 = 1 << 28;
/// The x87 unit does less: FDP_EXCPTN_ONLY, ZERO_FCS_FDS. A host that does more gives what was promised.
const LEAF7_EBX_LESS: u32 = 1 << 6 | 1 << 13;
/// Set as the guest runs (OSPKE); a width, not a feature (MAWAU).
const LEAF7_ECX_OWN: u32 = 1 << 4 | 0x1f << 17;
/// One answer for all cores (CmpLegacy), by how many there are.
const EXTENDED_ECX_OWN: u32 = 1 << 1;

const XSAVE_COMPONENTS: &[&str] = &[
    "x87",
    "sse",
    "avx",
    "mpx bound registers",
    "mpx bound status",
    "avx512 opmask",
    "avx512 zmm_hi256",
    "avx512 hi16_zmm",
    "intel_pt state",
    "pkru",
    "pasid",
    "cet_u",
    "cet_s",
    "hdc",
    "uintr state",
    "lbr",
    "hwp",
    "amx_tile configuration",
    "amx_tile data",
    "apx",
];

#[rustfmt::skip]
const FEATURES: &[Features] = &[
    features(1, 0, Ecx, LEAF1_ECX_OWN, &[
        "sse3", "pclmulqdq", "dtes64", "monitor", "ds_cpl", "vmx", "smx", "est", "tm2", "ssse3", "cid", "sdbg", "fma", "cx16",
        "xtpr", "pdcm", "", "pcid", "dca", "sse4_1", "sse4_2", "x2apic", "movbe", "popcnt", "tsc_deadline_timer", "aes", "xsave",
        "osxsave", "avx", "f16c", "rdrand", "hypervisor",
    ]),
    features(1, 0, Edx, LEAF1_EDX_OWN, &[
        "fpu", "vme", "de", "pse", "tsc", "msr", "pae", "mce", "cx8", "apic", "", "sep", "mtrr", "pge", "mca", "cmov", "pat",
        "pse36", "pn", "clflush", "", "dts", "acpi", "mmx", "fxsr", "sse", "sse2", "ss", "ht", "tm", "ia64", "pbe",
    ]),
    features(7, 0, Ebx, LEAF7_EBX_LESS, &[
        "fsgsbase", "tsc_adjust", "sgx", "bmi1", "hle", "avx2", "fdp_excptn_only", "smep", "bmi2", "erms", "invpcid", "rtm",
        "cqm", "zero_fcs_fds", "mpx", "rdt_a", "avx512f", "avx512dq", "rdseed", "adx", "smap", "avx512ifma", "", "clflushopt",
        "clwb", "intel_pt", "avx512pf", "avx512er", "avx512cd", "sha_ni", "avx512bw", "avx512vl",
    ]),
    features(7, 0, Ecx, LEAF7_ECX_OWN, &[
        "prefetchwt1", "avx512vbmi", "umip", "pku", "ospke", "waitpkg", "avx512_vbmi2", "shstk", "gfni", "vaes", "vpclmulqdq",
        "avx512_vnni", "avx512_bitalg", "tme", "avx512_vpopcntdq", "", "la57", "", "", "", "", "", "rdpid", "key_locker",
        "bus_lock_detect", "cldemote", "", "movdiri", "movdir64b", "enqcmd", "sgx_lc", "pks",
    ]),
    features(7, 0, Edx, 0, &[
        "", "sgx_keys", "avx512_4vnniw", "avx512_4fmaps", "fsrm", "uintr", "", "", "avx512_vp2intersect", "srbds_ctrl", "md_clear",
        "rtm_always_abort", "", "tsx_force_abort", "serialize", "hybrid_cpu", "tsxldtrk", "", "pconfig", "arch_lbr", "ibt", "",
        "amx_bf16", "avx512_fp16", "amx_tile", "amx_int8", "spec_ctrl", "intel_stibp", "flush_l1d", "arch_capabilities",
        "core_capabilities", "spec_ctrl_ssbd",
    ]),
    features(7, 1, Eax, 0, &[
        "sha512", "sm3", "sm4", "rao_int", "avx_vnni", "avx512_bf16", "lass", "cmpccxadd", "arch_perfmon_ext", "", "fzrm", "fsrs",
        "fsrc", "", "", "", "", "fred", "lkgs", "wrmsrns", "nmi_src", "amx_fp16", "hreset", "avx_ifma", "", "", "lam", "msrlist",
    ]),
    features(7, 1, Ebx, 0, &[]),
    features(7, 1, Ecx, 0, &[]),
    features(7, 1, Edx, 0, &[
        "", "", "", "", "avx_vnni_int8", "avx_ne_convert", "", "", "amx_complex", "", "avx_vnni_int16", "", "", "", "prefetchi",
        "", "", "", "cet_sss", "avx10",
    ]),
    features(0xd, 0, Eax, 0, XSAVE_COMPONENTS),
    features(0xd, 0, Edx, 0, &[]),
    features(0xd, 1, Eax, 0, &["xsaveopt", "xsavec", "xgetbv1", "xsaves", "xfd"]),
    features(0xd, 1, Ecx, 0, XSAVE_COMPONENTS),
    features(0xd, 1, Edx, 0, &[]),
    features(0x8000_0001, 0, Ecx, EXTENDED_ECX_OWN, &[
        "lahf_lm", "cmp_legacy", "svm", "extapic", "cr8_legacy", "abm", "sse4a", "misalignsse", "3dnowprefetch", "osvw", "ibs",
        "xop", "skinit", "wdt", "", "lwp", "fma4", "tce", "", "nodeid_msr", "", "tbm", "topoext", "perfctr_core", "perfctr_nb", "",
        "bpext", "ptsc", "perfctr_llc", "mwaitx",
    ]),
    features(0x8000_0001, 0, Edx, 0, &[
        "fpu", "vme", "de", "pse", "tsc", "msr", "pae", "mce", "cx8", "apic", "", "syscall", "mtrr", "pge", "mca", "cmov", "pat",
        "pse36", "", "mp", "nx", "", "mmxext", "mmx", "fxsr", "fxsr_opt", "pdpe1gb", "rdtscp", "", "lm", "3dnowext", "3dnow",
    ]),
    features(0x8000_0008, 0, Ebx, 0, &[
        "clzero", "irperf", "xsaveerptr", "", "rdpru", "", "", "", "", "wbnoinvd", "", "", "amd_ibpb", "", "amd_ibrs", "amd_stibp",
        "ibrs_always_on", "amd_stibp_always_on", "ibrs_preferred", "ibrs_same_mode", "", "", "", "amd_ppin", "amd_ssbd",
        "virt_ssbd", "amd_ssb_no", "cppc", "amd_psfd", "btc_no", "amd_ibpb_ret", "brs",
    ]),
    // What the hypervisor does for guests: KVM_FEATURE_...
    features(0x4000_0001, 0, Eax, 0, &[
        "kvm clocksource", "kvm nop_io_delay", "kvm mmu_op", "kvm clocksource2", "kvm async_pf", "kvm steal_time", "kvm pv_eoi",
        "kvm pv_unhalt", "", "kvm pv_tlb_flush", "kvm async_pf_vmexit", "kvm pv_send_ipi", "kvm poll_control",
        "kvm pv_sched_yield", "kvm async_pf_int", "kvm msi_ext_dest_id", "kvm hc_map_gpa_range", "kvm migration_control",
        "", "", "", "", "", "", "kvm clocksource_stable",
    ]),
];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    use crate::cpuid::guest_cpuid;

    fn leaf(leaf: u32, subleaf: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry {
        CpuidEntry {
            leaf,
            subleaf,
            subleaf_matters: matches!(leaf, 7 | 0xd),
            eax,
            ebx,
            ecx,
            edx,
        }
    }

    fn maker(name: &[u8; 12]) -> CpuidEntry {
        let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
        leaf(0, 0, [0x1f, word(0), word(8), word(4)])
    }

    fn told(saved: &[CpuidEntry], supported: &[CpuidEntry]) -> Vec<String> {
        let missing = not_offered(saved, supported);
        missing.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_a_host_lacks_is_named_with_its_place() {
        let intel = maker(b"GenuineIntel");
        let saved = [
            intel,
            leaf(1, 0, [0, 0, 1 << 12 | 1 << 25, 1 << 26]),
            leaf(7, 0, [1, 1 << 16 | 1 << 5, 0, 1 << 29]),
            leaf(7, 1, [1 << 4, 0, 0, 0]),
            leaf(0xd, 0, [0xe7, 0, 0, 0]),
            leaf(0x8000_0001, 0, [0, 0, 0, 1 << 26]),
            leaf(0x4000_0001, 0, [1 << 14, 0, 0, 0]),
        ];
        let host = [
            intel,
            leaf(1, 0, [0, 0, 1 << 25, 1 << 26]),
            leaf(7, 0, [0, 1 << 5, 0, 0]),
            leaf(0xd, 0, [7, 0, 0, 0]),
            leaf(0x8000_0001, 0, [0, 0, 0, 0]),
        ];
        assert_eq!(
            told(&saved, &host),
            [
                "fma (CPUID leaf 0x1, subleaf 0x0, ecx bit 12)",
                "avx512f (CPUID leaf 0x7, subleaf 0x0, ebx bit 16)",
                "arch_capabilities (CPUID leaf 0x7, subleaf 0x0, edx bit 29)",
                "avx_vnni (CPUID leaf 0x7, subleaf 0x1, eax bit 4)",
                "avx512 opmask (CPUID leaf 0xd, subleaf 0x0, eax bit 5)",
                "avx512 zmm_hi256 (CPUID leaf 0xd, subleaf 0x0, eax bit 6)",
                "avx512 hi16_zmm (CPUID leaf 0xd, subleaf 0x0, eax bit 7)",
                "pdpe1gb (CPUID leaf 0x80000001, subleaf 0x0, edx bit 26)",
                "kvm async_pf_int (CPUID leaf 0x40000001, subleaf 0x0, eax bit 14)",
            ]
        );
        assert_eq!(told(&host, &saved), [""; 0], "a host may have more");
        let unknown = [intel, leaf(7, 0, [0, 0, 1 << 15, 0])];
        assert_eq!(
            told(&unknown, &host),
            ["a feature without a name (CPUID leaf 0x7, subleaf 0x0, ecx bit 15)"]
        );
    }

    #[test]
    fn another_maker_is_a_difference_of_its_own() {
        let missing = told(&[maker(b"GenuineIntel")], &[maker(b"AuthenticAMD")]);
        assert_eq!(
            missing,
            [
                "the guest's processor is one of \"GenuineIntel\", this host's one of \"AuthenticAMD\" (CPUID leaf 0x0)"
            ]
        );
    }

    #[test]
    fn names_stand_at_their_bits() {
        for f in FEATURES {
            assert!(f.names.len() <= 32, "leaf {:#x}", f.leaf);
        }
        // The last of each list: none was forgotten or doubled before it.
        for (bit, name) in [(1 << 30, "rdrand"), (1 << 29, "f16c"), (1 << 20, "sse4_2")] {
            let saved = [leaf(1, 0, [0, 0, bit, 0])];
            assert!(told(&saved, &[])[0].starts_with(name), "{name}");
        }
        let bits = |register: usize, bit: u32| {
            let mut registers = [0; 4];
            registers[register] = 1 << bit;
            registers
        };
        for (at, sub, register, bit, name) in [
            (1, 0, 3, 26, "sse2"),
            (1, 0, 3, 31, "pbe"),
            (7, 0, 1, 31, "avx512vl"),
            (7, 0, 2, 22, "rdpid"),
            (7, 0, 2, 31, "pks"),
            (7, 0, 3, 26, "spec_ctrl"),
            (7, 0, 3, 31, "spec_ctrl_ssbd"),
            (7, 1, 0, 27, "msrlist"),
            (7, 1, 3, 18, "cet_sss"),
            (0xd, 1, 0, 3, "xsaves"),
            (0xd, 1, 2, 11, "cet_u"),
            (0xd, 0, 0, 18, "amx_tile data"),
            (0x8000_0001, 0, 2, 29, "mwaitx"),
            (0x8000_0001, 0, 3, 27, "rdtscp"),
            (0x8000_0001, 0, 3, 31, "3dnow"),
            (0x8000_0008, 0, 1, 24, "amd_ssbd"),
            (0x8000_0008, 0, 1, 31, "brs"),
            (0x4000_0001, 0, 0, 24, "kvm clocksource_stable"),
        ] {
            let saved = [leaf(at, sub, bits(register, bit))];
            let text = told(&saved, &[]);
            assert!(text[0].starts_with(&format!("{name} (")), "{text:?}");
        }
    }

    proptest! {
        /// What this program itself gives its guests is offered on the same host, whatever the host has.
        #[test]
        fn no_guest_of_a_host_misses_anything_there(
            registers in prop::array::uniform7(any::<[u32; 4]>()),
            count in 1u32..64,
        ) {
            let leaves = [(1, 0), (7, 0), (7, 1), (0xd, 0), (0xd, 1), (0x8000_0001, 0), (0x8000_0008, 0)];
            let mut host = vec![maker(b"AuthenticAMD")];
            for ((at, sub), registers) in leaves.into_iter().zip(registers) {
                host.push(leaf(at, sub, registers));
            }
            let guest = guest_cpuid(&host, count - 1, count, true);
            prop_assert_eq!(told(&guest, &host), [""; 0]);
        }

        #[test]
        fn exactly_the_bits_that_are_lacking_are_told(saved in any::<u32>(), host in any::<u32>()) {
            let of = |value| [leaf(7, 0, [0, 0, 0, value])];
            let missing = not_offered(&of(saved), &of(host));
            let bits = missing.iter().map(|m| match m {
                Missing::Feature { register: "edx", bit, .. } => 1 << bit,
                other => panic!("{other:?}"),
            });
            prop_assert_eq!(bits.fold(0, |all, bit: u32| all | bit), saved & !host);
        }
    }
}
