//! CPU templates that have a name: which bits of what processors say they set, and on which processors they are true.
//!
//! The bits and the models are Firecracker's (its documentation of CPU templates); the bits are files in the form of a `cpu-config`.

use alveole_hypervisor::{CpuidEntry, find_leaf};
use alveole_vm_config::{Body, CpuConfig, CpuTemplate};

/// Bits of leaf 1 EAX that say which model it is: all but the processor type and what is reserved (Intel SDM vol. 2A, CPUID).
const MODEL_BITS: u32 = 0x0fff_0fff;

/// Leaf 0 EBX, EDX, ECX of the two makers.
const INTEL: &[u8; 12] = b"GenuineIntel";
const AMD: &[u8; 12] = b"AuthenticAMD";

/// A model: what it is called, its maker, and leaf 1 EAX (family, model and stepping).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Model(&'static str, &'static [u8; 12], u32);

const SKYLAKE: Model = Model("Skylake", INTEL, 0x5_0654);
const CASCADE_LAKE: Model = Model("Cascade Lake", INTEL, 0x5_0657);
const ICE_LAKE: Model = Model("Ice Lake", INTEL, 0x6_06a6);
const MILAN: Model = Model("Milan", AMD, 0xa0_0f11);

/// A template of a host's processor that is not for it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "cpu_template {template:?} is for {} only, and this host has {host}: run the guest on such a host, or say in cpu-config which bits it is to \
     see", listed(.models)
)]
pub struct NotForHost {
    template: CpuTemplate,
    models: &'static [Model],
    host: String,
}

/// The file of a template; none for [`CpuTemplate::None`].
fn file(template: CpuTemplate) -> Option<&'static str> {
    Some(match template {
        CpuTemplate::None => return None,
        CpuTemplate::C3 => include_str!("../../../../resources/cpu-templates/x86_64/C3.json"),
        CpuTemplate::T2 => include_str!("../../../../resources/cpu-templates/x86_64/T2.json"),
        CpuTemplate::T2S => include_str!("../../../../resources/cpu-templates/x86_64/T2S.json"),
        CpuTemplate::T2CL => include_str!("../../../../resources/cpu-templates/x86_64/T2CL.json"),
        CpuTemplate::T2A => include_str!("../../../../resources/cpu-templates/x86_64/T2A.json"),
    })
}

/// What `template` sets.
///
/// # Errors
/// Its file is wrong, which is a mistake in this program.
pub(super) fn cpu_config(template: CpuTemplate) -> Result<Option<CpuConfig>, String> {
    let Some(text) = file(template) else {
        return Ok(None);
    };
    let name = format!("{template:?}.json");
    let read = CpuConfig::from_json_bytes(text.as_bytes(), &name);
    read.map(Some).map_err(|e| e.to_string())
}

fn models(template: CpuTemplate) -> &'static [Model] {
    match template {
        CpuTemplate::None => &[],
        CpuTemplate::C3 | CpuTemplate::T2 => &[SKYLAKE, CASCADE_LAKE, ICE_LAKE],
        CpuTemplate::T2S => &[SKYLAKE, CASCADE_LAKE],
        CpuTemplate::T2CL => &[CASCADE_LAKE, ICE_LAKE],
        CpuTemplate::T2A => &[MILAN],
    }
}

/// Whether `template` is true on a host whose hypervisor supports these answers, which name the host's own processor.
///
/// # Errors
/// It is not; what it is for, and what is here.
pub(crate) fn check_host(
    template: CpuTemplate,
    supported: &[CpuidEntry],
) -> Result<(), NotForHost> {
    let models = models(template);
    let (maker, eax) = processor(supported);
    let same = |m: &&Model| *m.1 == maker && m.2 & MODEL_BITS == eax & MODEL_BITS;
    let Some(model) = models.iter().find(same) else {
        if template == CpuTemplate::None {
            return Ok(());
        }
        let maker = String::from_utf8_lossy(&maker);
        let (family, model, stepping) = family_model_stepping(eax);
        return Err(NotForHost {
            template,
            models,
            host: format!("a {maker:?} of family {family}, model {model}, stepping {stepping}"),
        });
    };
    if template == CpuTemplate::C3 && *model == SKYLAKE {
        // It takes away what would tell the guest's kernel of it.
        log::warn!(
            "cpu_template \"C3\" on Skylake: the guest's kernel does not mitigate MMIO stale data"
        );
    }
    Ok(())
}

fn processor(supported: &[CpuidEntry]) -> ([u8; 12], u32) {
    let mut maker = [0; 12];
    if let Some(leaf) = find_leaf(supported, 0, 0) {
        let parts = [leaf.ebx, leaf.edx, leaf.ecx];
        for (place, part) in maker.chunks_exact_mut(4).zip(parts) {
            place.copy_from_slice(&part.to_le_bytes());
        }
    }
    let eax = find_leaf(supported, 1, 0).map_or(0, |leaf| leaf.eax);
    (maker, eax)
}

/// As they are counted for people (Intel SDM vol. 2A, CPUID; AMD APM vol. 3, E.3.2): the extended parts belong to family 15, the model's
/// to Intel's family 6, too.
fn family_model_stepping(eax: u32) -> (u32, u32, u32) {
    let bits = |low: u32, count: u32| (eax >> low) & ((1 << count) - 1);
    let (family, model) = (bits(8, 4), bits(4, 4));
    let whole_family = if family == 15 {
        family + bits(20, 8)
    } else {
        family
    };
    let whole_model = match family {
        6 | 15 => bits(16, 4) << 4 | model,
        _ => model,
    };
    (whole_family, whole_model, bits(0, 4))
}

fn listed(models: &[Model]) -> String {
    let name = |m: &Model| {
        let (family, model, stepping) = family_model_stepping(m.2);
        format!(
            "{} (family {family}, model {model}, stepping {stepping})",
            m.0
        )
    };
    models.iter().map(name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const ALL: [CpuTemplate; 5] = [
        CpuTemplate::C3,
        CpuTemplate::T2,
        CpuTemplate::T2S,
        CpuTemplate::T2CL,
        CpuTemplate::T2A,
    ];

    fn host(maker: &[u8; 12], eax: u32) -> Vec<CpuidEntry> {
        let part = |at: usize| u32::from_le_bytes(maker[at..at + 4].try_into().unwrap());
        vec![
            CpuidEntry {
                ebx: part(0),
                edx: part(4),
                ecx: part(8),
                ..CpuidEntry::default()
            },
            CpuidEntry {
                leaf: 1,
                eax,
                ..CpuidEntry::default()
            },
        ]
    }

    #[test]
    fn the_whole_table_of_who_may_have_what() {
        let (yes, no) = (true, false);
        // C3, T2, T2S, T2CL, T2A
        for (maker, eax, want) in [
            (INTEL, 0x5_0654, [yes, yes, yes, no, no]),
            (INTEL, 0x5_0657, [yes, yes, yes, yes, no]),
            (INTEL, 0x6_06a6, [yes, yes, no, yes, no]),
            (AMD, 0xa0_0f11, [no, no, no, no, yes]),
            // Another stepping, Sapphire Rapids, Rome, nobody; and the models by another maker.
            (INTEL, 0x5_0655, [no; 5]),
            (INTEL, 0x8_06f8, [no; 5]),
            (AMD, 0x83_0f10, [no; 5]),
            (AMD, 0x5_0654, [no; 5]),
            (INTEL, 0xa0_0f11, [no; 5]),
            (b"\0\0\0\0\0\0\0\0\0\0\0\0", 0, [no; 5]),
            // The type, and what is reserved, do not count.
            (INTEL, 0xf005_f657 & !0xc000, [yes, yes, yes, yes, no]),
        ] {
            let supported = host(maker, eax);
            for (template, want) in ALL.into_iter().zip(want) {
                let checked = check_host(template, &supported);
                assert_eq!(
                    checked.is_ok(),
                    want,
                    "{template:?} on {eax:#x}: {checked:?}"
                );
            }
            assert_eq!(check_host(CpuTemplate::None, &supported), Ok(()));
        }
    }

    #[test]
    fn a_refusal_says_what_it_is_for_and_what_is_here() {
        let refused = check_host(CpuTemplate::T2A, &host(INTEL, 0x6_06a6)).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "cpu_template T2A is for Milan (family 25, model 1, stepping 1) only, and this host has a \"GenuineIntel\" of family 6, \
             model 106, stepping 6: run the guest on such a host, or say in cpu-config which bits it is to see"
        );
        let refused = check_host(CpuTemplate::T2S, &host(AMD, 0xa0_0f11)).unwrap_err();
        let text = refused.to_string();
        let models = "Skylake (family 6, model 85, stepping 4), Cascade Lake (family 6, model 85, stepping 7) only";
        assert!(text.contains(models), "{text}");
    }

    /// Each file is read, names the leaves that it should and no register twice; and those that are to be alike are.
    #[test]
    fn every_template_is_a_whole_cpu_config() {
        for template in ALL {
            let config = cpu_config(template).unwrap().unwrap();
            let leaves: Vec<_> = config.cpuid_modifiers.iter().map(|m| m.leaf).collect();
            let mut want = vec![1, 7, 0xd, 0xd, 0x8000_0001, 0x8000_0008];
            if template == CpuTemplate::C3 {
                want.pop();
            }
            assert_eq!(leaves, want, "{template:?}");
            let msrs: Vec<_> = config.msr_modifiers.iter().map(|m| m.addr).collect();
            let has_msr = matches!(template, CpuTemplate::T2S | CpuTemplate::T2CL);
            assert_eq!(
                msrs,
                if has_msr { vec![0x10a] } else { vec![] },
                "{template:?}"
            );
            let mut broken = Vec::new();
            let source = alveole_vm_config::CpuConfigSource::Here(config);
            super::super::processors::validate(Some(&source), &mut broken);
            assert_eq!(broken, [], "{template:?}");
        }
        let of = |template| cpu_config(template).unwrap().unwrap().cpuid_modifiers;
        assert_eq!(of(CpuTemplate::T2), of(CpuTemplate::T2S));
        assert_eq!(cpu_config(CpuTemplate::None), Ok(None));
    }
}
