//! What is read of `cpu-config`, and every message.

use super::*;
use crate::Body;
use proptest::prelude::*;

fn body(text: &str) -> Result<CpuConfig, String> {
    CpuConfig::from_json_bytes(text.as_bytes(), "body").map_err(|e| e.to_string())
}

fn msr(addr: &str, bitmap: &str) -> Result<MsrModifier, String> {
    let text = format!(r#"{{"msr_modifiers": [{{"addr": {addr}, "bitmap": {bitmap}}}]}}"#);
    body(&text).map(|c| c.msr_modifiers[0])
}

#[test]
fn firecrackers_own_example_is_read_and_written() {
    let config = body(
        r#"{
          "kvm_capabilities": ["!56", "171"],
          "cpuid_modifiers": [
            {
              "leaf": "0x1", "subleaf": "0b0", "flags": 0,
              "modifiers": [
                { "register": "eax", "bitmap": "0bxxxx000000000011xx00011011110010" }
              ]
            }
          ],
          "msr_modifiers": [
            { "addr": "266", "bitmap": "0b0000000000000000000000000000000000000000000000000000000000000001" }
          ],
          "vcpu_features": [], "reg_modifiers": null
        }"#,
    )
    .unwrap();
    let want = CpuConfig {
        kvm_capabilities: vec![KvmCapability::Remove(56), KvmCapability::Add(171)],
        cpuid_modifiers: vec![CpuidLeafModifier {
            leaf: 1,
            subleaf: 0,
            flags: 0,
            modifiers: vec![CpuidRegisterModifier {
                register: CpuidRegister::Eax,
                bitmap: Bitmap {
                    mask: 0x0fff_3fff,
                    value: 0x0003_06f2,
                },
            }],
        }],
        msr_modifiers: vec![MsrModifier {
            addr: 0x10a,
            bitmap: Bitmap {
                mask: u64::MAX,
                value: 1,
            },
        }],
    };
    assert_eq!(config, want);
    let zeros = "0".repeat(63);
    assert_eq!(
        serde_json::to_string(&config).unwrap(),
        format!(
            "{{\"kvm_capabilities\":[\"!56\",\"171\"],\"cpuid_modifiers\":[{{\"leaf\":\"0x1\",\"subleaf\":\"0x0\",\
             \"flags\":0,\"modifiers\":[{{\"register\":\"eax\",\"bitmap\":\"0bxxxx000000000011xx00011011110010\"}}]}}],\
             \"msr_modifiers\":[{{\"addr\":\"0x10a\",\"bitmap\":\"0b{zeros}1\"}}]}}"
        )
    );
    assert_eq!(body("{}"), Ok(CpuConfig::default()));
}

#[test]
fn numbers_and_bitmaps_have_their_edges() {
    for (text, number) in [
        (r#""0""#, 0),
        (r#""0x0""#, 0),
        (r#""4294967295""#, u32::MAX),
        (r#""0xffffFFFF""#, u32::MAX),
        (r#""0x00000000000000010""#, 16),
        (r#""0b101""#, 5),
        (r#""010""#, 10),
    ] {
        assert_eq!(msr(text, r#""0b1""#).map(|m| m.addr), Ok(number), "{text}");
    }
    for text in [
        "1",
        "null",
        r#""""#,
        r#"" 1""#,
        r#""0x""#,
        r#""0b""#,
        r#""0b2""#,
        r#""0xg""#,
        r#""0X1""#,
        r#""-1""#,
        r#""+1""#,
        r#""0x+1""#,
        r#""0x1_0""#,
        r#""4294967296""#,
        r#""0x100000000""#,
        r#""é1""#,
        "[]",
    ] {
        let why = msr(text, r#""0b1""#).unwrap_err();
        assert!(
            why.contains("\"msr_modifiers[0].addr\": expected a string with a number of 32 bits"),
            "{text}: {why}"
        );
    }
    for (text, mask, value) in [
        ("0b1", 1, 1),
        ("0b0x", 2, 0),
        ("0b1_x_0_", 5, 4),
        (&format!("0b{}", "x".repeat(64)), 0, 0),
        (&format!("0b1{}", "x".repeat(63)), 1 << 63, 1 << 63),
        (&format!("0b{}", "_0".repeat(64)), u64::MAX, 0),
    ] {
        let want = Bitmap { mask, value };
        assert_eq!(
            msr(r#""0""#, &format!("{text:?}")).map(|m| m.bitmap),
            Ok(want),
            "{text}"
        );
    }
    for (text, part) in [
        ("7", "expected a string, found the number 7"),
        ("null", "expected a string, found null"),
        (r#""""#, "begins with \\\"0b\\\""),
        (r#""101""#, "begins with"),
        (r#""0B1""#, "begins with"),
        (r#""0b""#, "no bit is named"),
        (r#""0b__""#, "no bit is named"),
        (
            r#""0b12""#,
            "'2' says nothing of a bit: 0 clears it, 1 sets it, x leaves it",
        ),
        (r#""0bX""#, "'X' says nothing"),
        (r#""0b 1""#, "' ' says nothing"),
        (r#""0b\u0000""#, "'\\0' says nothing"),
        (
            &format!("\"0b{}\"", "x".repeat(65)),
            "the register has only 64 bits",
        ),
        (
            &format!("\"0b{}\"", "1".repeat(100_000)),
            "the register has only 64 bits",
        ),
    ] {
        let why = msr(r#""0""#, text).unwrap_err();
        assert!(why.contains(&part.replace("\\\"", "\"")), "{text}: {why}");
        assert!(why.starts_with("body:1:") && why.len() < 200, "{why}");
    }
}

#[test]
fn everything_that_is_wrong_is_listed() {
    let long = "1".repeat(33);
    let why = body(&format!(
        r#"{{
          "kvm_capabilities": ["x", 7, "!", "!!1", "4294967296", "-1", "0x10"],
          "cpuid_modifiers": [
            {{ "leaf": 1, "subleaf": "0", "flags": -1,
               "modifiers": [{{ "register": "eip", "bitmap": "0b{long}" }}, {{}}, 7] }},
            {{ "leaf": "1", "subleaf": "0", "flags": 4294967296, "modifiers": null, "index": 1 }}
          ],
          "msr_modifiers": {{}},
          "vcpu_features": [{{ "index": 0, "bitmap": "0b1" }}],
          "reg_modifiers": [{{}}]
        }}"#
    ))
    .unwrap_err();
    for part in [
        "\"kvm_capabilities[0]\": expected the decimal number of a capability, with \"!\" before it to do without, as \
         \"121\" or \"!121\", found the string \"x\"",
        "\"kvm_capabilities[1]\": expected a string, found the number 7",
        "\"kvm_capabilities[2]\": expected the decimal",
        "\"kvm_capabilities[3]\": expected the decimal",
        "\"kvm_capabilities[4]\": expected the decimal",
        "\"kvm_capabilities[5]\": expected the decimal",
        "\"kvm_capabilities[6]\": expected the decimal",
        "\"cpuid_modifiers[0].leaf\": expected a string with a number",
        "\"cpuid_modifiers[0].flags\": expected a whole number from 0 to 4294967295, found the number -1",
        "\"cpuid_modifiers[0].modifiers[0].register\": expected one of \"eax\", \"ebx\", \"ecx\", \"edx\", found the \
         string \"eip\"",
        "\"cpuid_modifiers[0].modifiers[0].bitmap\": the string \"0b1111",
        "only 32 bits",
        "\"cpuid_modifiers[0].modifiers[1].register\": this field is required and missing; add it",
        "\"cpuid_modifiers[0].modifiers[1].bitmap\": this field is required and missing; add it",
        "\"cpuid_modifiers[0].modifiers[2]\": expected an object, found the number 7",
        "\"cpuid_modifiers[1].flags\": expected a whole number",
        "\"cpuid_modifiers[1].modifiers\": this field is required and missing; add it",
        "\"cpuid_modifiers[1]\": unknown field \"index\"; known are: leaf, subleaf, flags, modifiers",
        "\"msr_modifiers\": expected an array, found an object",
        "\"vcpu_features\": this is for aarch64, and this machine is x86-64; remove the key",
        "\"reg_modifiers\": this is for aarch64",
    ] {
        assert!(why.contains(part), "{part}\nin\n{why}");
    }
    assert_eq!(why.lines().count(), 20, "{why}");
}

/// Whatever may be said of processors.
pub(crate) fn any_cpu_config() -> impl Strategy<Value = CpuConfig> {
    let capability = any::<(bool, u32)>().prop_map(|(add, number)| match add {
        true => KvmCapability::Add(number),
        false => KvmCapability::Remove(number),
    });
    let register = prop::sample::select(vec![
        CpuidRegister::Eax,
        CpuidRegister::Ebx,
        CpuidRegister::Ecx,
        CpuidRegister::Edx,
    ]);
    let modifier = (register, any::<(u32, u32)>()).prop_map(|(register, (mask, value))| {
        let value = value & mask;
        CpuidRegisterModifier {
            register,
            bitmap: Bitmap { mask, value },
        }
    });
    let leaf = (
        any::<(u32, u32, u32)>(),
        prop::collection::vec(modifier, 0..3),
    )
        .prop_map(|((leaf, subleaf, flags), modifiers)| CpuidLeafModifier {
            leaf,
            subleaf,
            flags,
            modifiers,
        });
    let msr = any::<(u32, u64, u64)>().prop_map(|(addr, mask, value)| {
        let value = value & mask;
        MsrModifier {
            addr,
            bitmap: Bitmap { mask, value },
        }
    });
    (
        prop::collection::vec(capability, 0..3),
        prop::collection::vec(leaf, 0..3),
        prop::collection::vec(msr, 0..3),
    )
        .prop_map(
            |(kvm_capabilities, cpuid_modifiers, msr_modifiers)| CpuConfig {
                kvm_capabilities,
                cpuid_modifiers,
                msr_modifiers,
            },
        )
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = CpuConfig::from_json_bytes(&bytes, "body");
    }

    #[test]
    fn no_string_makes_it_panic(text in "\\PC{0,80}", prefix in "(0b|0x|!)?[01x_]{0,70}") {
        for text in [format!("{prefix}{text}"), format!("{text}{prefix}"), prefix] {
            let text = serde_json::to_string(&text).unwrap();
            let _ = msr(&text, &text);
            let _ = body(&format!("{{\"kvm_capabilities\": [{text}]}}"));
        }
    }

    #[test]
    fn no_damage_makes_it_panic(
        config in any_cpu_config(),
        at in any::<prop::sample::Index>(),
        with in any::<char>(),
    ) {
        let mut text: Vec<char> = serde_json::to_string(&config).unwrap().chars().collect();
        let at = at.index(text.len());
        text[at] = with;
        let text: String = text.into_iter().collect();
        if let Err(why) = body(&text) {
            prop_assert!(!why.is_empty());
        }
    }
}
