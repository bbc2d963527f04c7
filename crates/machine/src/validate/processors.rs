//! What a description says of processors, beyond their number.

use std::collections::{BTreeMap, BTreeSet};

use alveole_hypervisor::MsrChange;
use alveole_vcpu::template::{BitChange, CpuidChange};
use alveole_vm_config::{
    CpuConfig, CpuConfigSource, CpuTemplate, CpuidRegister, KvmCapability, VmConfig,
};

use super::{Invalid, templates};

/// KVM_CPUID_FLAG_SIGNIFCANT_INDEX (`linux/kvm.h`, with this spelling). KVM makes nothing of the other flags since Linux 5.8.
const SUBLEAF_MATTERS: u32 = 1;

/// What processors are to say of themselves.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ValidCpuConfig {
    /// What the hypervisor must be capable of.
    pub(crate) capabilities: BTreeSet<u32>,
    pub(crate) cpuid: Vec<CpuidChange>,
    pub(crate) msrs: Vec<MsrChange>,
}

/// What counts of the two ways to say it: the bits, as in Firecracker's descriptions, and only without them the name.
pub(super) fn source(
    config: &VmConfig,
    broken: &mut Vec<Invalid>,
) -> (CpuTemplate, Option<CpuConfigSource>) {
    if let Some(said) = &config.cpu_config {
        return (CpuTemplate::None, Some(said.clone()));
    }
    let template = config.machine_config.cpu_template.unwrap_or_default();
    match templates::cpu_config(template) {
        Ok(bits) => (template, bits.map(CpuConfigSource::Here)),
        Err(why) => {
            let name = format!("{template:?}");
            broken.push(Invalid::BadTemplate { name, why });
            (template, None)
        }
    }
}

pub(super) fn validate(
    source: Option<&CpuConfigSource>,
    broken: &mut Vec<Invalid>,
) -> ValidCpuConfig {
    match source {
        None => ValidCpuConfig::default(),
        Some(CpuConfigSource::Here(config)) => ValidCpuConfig {
            capabilities: capabilities(config),
            cpuid: cpuid(config, broken),
            msrs: msrs(config, broken),
        },
        Some(CpuConfigSource::File(path)) => {
            broken.push(Invalid::UnreadCpuConfig(path.clone()));
            ValidCpuConfig::default()
        }
    }
}

/// Those that are asked for and not taken out again, as Firecracker counts them. What this program needs of KVM by itself
/// cannot be taken out: it could not run without.
fn capabilities(config: &CpuConfig) -> BTreeSet<u32> {
    let (mut wanted, mut waived) = (BTreeSet::new(), BTreeSet::new());
    for capability in &config.kvm_capabilities {
        match capability {
            KvmCapability::Add(number) => wanted.insert(*number),
            KvmCapability::Remove(number) => waived.insert(*number),
        };
    }
    &wanted - &waived
}

/// One change a leaf, in the order of the leaves; several modifiers of one are one if they do not name the same register.
fn cpuid(config: &CpuConfig, broken: &mut Vec<Invalid>) -> Vec<CpuidChange> {
    let mut flags = BTreeMap::new();
    let mut named = BTreeSet::new();
    let mut changes = BTreeMap::new();
    for modifier in &config.cpuid_modifiers {
        let (leaf, subleaf) = (modifier.leaf, modifier.subleaf);
        let (first, second) = (
            *flags.entry((leaf, subleaf)).or_insert(modifier.flags),
            modifier.flags,
        );
        if first != second {
            broken.push(Invalid::CpuidFlags {
                leaf,
                subleaf,
                first,
                second,
            });
        }
        let change = changes
            .entry((leaf, subleaf))
            .or_insert_with(|| CpuidChange {
                leaf,
                subleaf,
                subleaf_matters: first & SUBLEAF_MATTERS != 0,
                registers: [BitChange::default(); 4],
            });
        for m in &modifier.modifiers {
            let register = m.register;
            if !named.insert((leaf, subleaf, register)) {
                broken.push(Invalid::CpuidTwice {
                    leaf,
                    subleaf,
                    register,
                });
            }
            let [eax, ebx, ecx, edx] = &mut change.registers;
            let place = match register {
                CpuidRegister::Eax => eax,
                CpuidRegister::Ebx => ebx,
                CpuidRegister::Ecx => ecx,
                CpuidRegister::Edx => edx,
            };
            *place = BitChange {
                mask: m.bitmap.mask,
                value: m.bitmap.value,
            };
        }
    }
    changes.into_values().collect()
}

/// In the order of the description: one register may matter to what another takes.
fn msrs(config: &CpuConfig, broken: &mut Vec<Invalid>) -> Vec<MsrChange> {
    let mut named = BTreeSet::new();
    let modifiers = config.msr_modifiers.iter();
    modifiers
        .map(|m| {
            if !named.insert(m.addr) {
                broken.push(Invalid::MsrTwice(m.addr));
            }
            MsrChange {
                index: m.addr,
                mask: m.bitmap.mask,
                value: m.bitmap.value,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use alveole_vm_config::Body;

    fn checked(text: &str) -> (ValidCpuConfig, Vec<String>) {
        let config = CpuConfig::from_json_bytes(text.as_bytes(), "body").unwrap();
        let mut broken = Vec::new();
        let valid = validate(Some(&CpuConfigSource::Here(config)), &mut broken);
        (valid, broken.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn modifiers_of_one_leaf_are_one_change() {
        let (valid, broken) = checked(
            r#"{
              "kvm_capabilities": ["3", "!2", "3", "2", "!9"],
              "cpuid_modifiers": [
                {"leaf": "7", "subleaf": "0", "flags": 1, "modifiers": [{"register": "edx", "bitmap": "0b01"}]},
                {"leaf": "1", "subleaf": "0", "flags": 0, "modifiers": []},
                {"leaf": "7", "subleaf": "0", "flags": 1, "modifiers": [{"register": "eax", "bitmap": "0b1x"}]}
              ],
              "msr_modifiers": [
                {"addr": "9", "bitmap": "0bx"}, {"addr": "8", "bitmap": "0b10"}
              ]
            }"#,
        );
        assert_eq!(broken, [""; 0]);
        assert_eq!(valid.capabilities, BTreeSet::from([3]));
        let bits = |mask, value| BitChange { mask, value };
        let of = |leaf, subleaf_matters, registers| CpuidChange {
            leaf,
            subleaf: 0,
            subleaf_matters,
            registers,
        };
        let none = bits(0, 0);
        assert_eq!(
            valid.cpuid,
            [
                of(1, false, [none; 4]),
                of(7, true, [bits(2, 2), none, none, bits(3, 1)]),
            ]
        );
        let msrs: Vec<_> = valid
            .msrs
            .iter()
            .map(|m| (m.index, m.mask, m.value))
            .collect();
        assert_eq!(msrs, [(9, 0, 0), (8, 3, 2)]);
    }

    #[test]
    fn what_is_said_twice_is_told() {
        let (_, broken) = checked(
            r#"{
              "cpuid_modifiers": [
                {"leaf": "7", "subleaf": "1", "flags": 1, "modifiers": [
                  {"register": "ebx", "bitmap": "0b1"}, {"register": "ebx", "bitmap": "0b1"}]},
                {"leaf": "7", "subleaf": "0", "flags": 1, "modifiers": [{"register": "ebx", "bitmap": "0b1"}]},
                {"leaf": "0x7", "subleaf": "0x1", "flags": 0, "modifiers": [{"register": "ebx", "bitmap": "0b1"}]}
              ],
              "msr_modifiers": [{"addr": "266", "bitmap": "0b1"}, {"addr": "0x10a", "bitmap": "0b1"}]
            }"#,
        );
        let twice = "cpuid_modifiers name ebx of leaf 0x7, subleaf 0x1 twice: put all of its bits into one bitmap";
        assert_eq!(
            broken,
            [
                twice,
                "cpuid_modifiers give leaf 0x7, subleaf 0x1 the flags 1 and 0: give it the same everywhere",
                twice,
                "msr_modifiers name 0x10a twice: put all of its bits into one bitmap",
            ]
        );
    }

    #[test]
    fn a_file_that_was_not_read_is_no_template() {
        let mut broken = Vec::new();
        let source = CpuConfigSource::File("t2.json".into());
        validate(Some(&source), &mut broken);
        assert_eq!(broken, [Invalid::UnreadCpuConfig("t2.json".into())]);
    }
}
