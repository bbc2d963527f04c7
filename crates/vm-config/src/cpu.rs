//! `cpu-config`: what a guest's processors are to say of themselves, bit by bit.
//!
//! The wire form is Firecracker's (its documentation of custom CPU templates): numbers are strings in any of three
//! notations, bits are strings of `0` (clear it), `1` (set it) and `x` (leave it).

use std::fmt;
use std::path::PathBuf;

use serde::{Serialize, Serializer};

use crate::object::{Leaf, Object, Value};
use crate::read::words;

/// Where a description has its `cpu-config`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum CpuConfigSource {
    /// In itself.
    Here(CpuConfig),
    /// In a file of its own, which whoever reads the description is to read as well.
    File(PathBuf),
}

/// What a guest's processors are to say of themselves, other than they would.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CpuConfig {
    /// What the host's KVM must be capable of.
    pub kvm_capabilities: Vec<KvmCapability>,
    /// Changes of CPUID answers.
    pub cpuid_modifiers: Vec<CpuidLeafModifier>,
    /// Changes of model-specific registers.
    pub msr_modifiers: Vec<MsrModifier>,
}

/// A capability of KVM by its number in `linux/kvm.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvmCapability {
    /// It must be there.
    Add(u32),
    /// It need not be there.
    Remove(u32),
}

/// Changes of one CPUID answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CpuidLeafModifier {
    /// Input in EAX.
    #[serde(serialize_with = "in_hex")]
    pub leaf: u32,
    /// Input in ECX; 0 where the leaf has no subleaves.
    #[serde(serialize_with = "in_hex")]
    pub subleaf: u32,
    /// KVM's flags of the answer: bit 0 says that ECX selects it (`KVM_CPUID_FLAG_SIGNIFCANT_INDEX`).
    pub flags: u32,
    /// The registers that change.
    pub modifiers: Vec<CpuidRegisterModifier>,
}

/// Changes of one register of a CPUID answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct CpuidRegisterModifier {
    /// Which.
    pub register: CpuidRegister,
    /// Its bits.
    pub bitmap: Bitmap<u32>,
}

/// A register in which CPUID answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CpuidRegister {
    /// EAX.
    #[default]
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// Changes of one model-specific register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MsrModifier {
    /// Its number.
    #[serde(serialize_with = "in_hex")]
    pub addr: u32,
    /// Its bits.
    pub bitmap: Bitmap<u64>,
}

/// Which bits of a register are set anew, and to what.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bitmap<T> {
    /// The bits that are set anew; the others stay.
    pub mask: T,
    /// What they are set to; 0 outside of `mask`.
    pub value: T,
}

/// A register that a [`Bitmap`] is for.
pub trait Register: Copy + Default + Into<u64> + TryFrom<u64> {
    /// Its width.
    const BITS: u32;
}

impl Register for u32 {
    const BITS: u32 = u32::BITS;
}

impl Register for u64 {
    const BITS: u32 = u64::BITS;
}

impl<T: Register> Bitmap<T> {
    /// Reads `0b` and up to as many characters as the register has bits, the highest first. Where there are fewer, the
    /// bits that are not named stay, as Firecracker has it; underscores do not count.
    ///
    /// # Errors
    /// It is none: what is wrong with it.
    fn parse(text: &str) -> Result<Self, String> {
        let bits = text
            .strip_prefix("0b")
            .ok_or("a bitmap begins with \"0b\"")?;
        let (mut mask, mut value, mut count) = (0u64, 0u64, 0u32);
        for bit in bits.chars().filter(|c| *c != '_') {
            count += 1;
            if count > T::BITS {
                return Err(format!("the register has only {} bits", T::BITS));
            }
            mask <<= 1;
            value <<= 1;
            match bit {
                'x' => {}
                '0' => mask |= 1,
                '1' => {
                    mask |= 1;
                    value |= 1;
                }
                other => {
                    return Err(format!(
                        "{other:?} says nothing of a bit: 0 clears it, 1 sets it, x leaves it"
                    ));
                }
            }
        }
        if count == 0 {
            return Err("no bit is named".to_owned());
        }
        // Neither has more bits than the register.
        let of = |bits| T::try_from(bits).unwrap_or_default();
        Ok(Self {
            mask: of(mask),
            value: of(value),
        })
    }
}

impl<T: Register> fmt::Display for Bitmap<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mask, value): (u64, u64) = (self.mask.into(), self.value.into());
        f.write_str("0b")?;
        (0..T::BITS)
            .rev()
            .try_for_each(|bit| match (mask >> bit & 1, value >> bit & 1) {
                (0, _) => f.write_str("x"),
                (_, bit) => write!(f, "{bit}"),
            })
    }
}

impl<T: Register> Serialize for Bitmap<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl KvmCapability {
    fn parse(text: &str) -> Option<Self> {
        let (make, number): (fn(u32) -> Self, _) = match text.strip_prefix('!') {
            Some(number) => (Self::Remove, number),
            None => (Self::Add, text),
        };
        digits(number, 10).map(make)
    }
}

impl fmt::Display for KvmCapability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Add(number) => write!(f, "{number}"),
            Self::Remove(number) => write!(f, "!{number}"),
        }
    }
}

impl Serialize for KvmCapability {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for CpuidRegister {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eax => "eax",
            Self::Ebx => "ebx",
            Self::Ecx => "ecx",
            Self::Edx => "edx",
        })
    }
}

words! { CpuidRegister, "one of \"eax\", \"ebx\", \"ecx\", \"edx\"",
"eax" => CpuidRegister::Eax, "ebx" => CpuidRegister::Ebx, "ecx" => CpuidRegister::Ecx,
"edx" => CpuidRegister::Edx, }

fn in_hex<S: Serializer>(number: &u32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{number:#x}"))
}

/// A number that stands in a string.
#[derive(Default)]
struct Quoted(u32);

impl Leaf for Quoted {
    const EXPECTED: &'static str =
        "a string with a number of 32 bits, as \"0x10a\", \"0b100001010\" or \"266\"";

    fn from_json(raw: &str) -> Option<Self> {
        let text: String = serde_json::from_str(raw).ok()?;
        let (number, radix) = match text.split_at_checked(2) {
            Some(("0x", number)) => (number, 16),
            Some(("0b", number)) => (number, 2),
            _ => (text.as_str(), 10),
        };
        digits(number, radix).map(Self)
    }
}

/// Digits and nothing else: the standard library would take a sign as well.
fn digits(text: &str, radix: u32) -> Option<u32> {
    let only = text.bytes().all(|b| b.is_ascii_alphanumeric());
    only.then(|| u32::from_str_radix(text, radix).ok())?
}

/// The value of `cpu-config` in a description.
pub(crate) fn source(value: &Value<'_>) -> Option<CpuConfigSource> {
    if value.is_string() {
        return value.read().map(CpuConfigSource::File);
    }
    value.section(cpu_config).map(CpuConfigSource::Here)
}

pub(crate) fn cpu_config(body: &mut Object<'_>) -> CpuConfig {
    for key in ["vcpu_features", "reg_modifiers"] {
        body.refuse(
            key,
            "this is for aarch64, and this machine is x86-64; remove the key",
        );
    }
    CpuConfig {
        kvm_capabilities: body.entries("kvm_capabilities", capability),
        cpuid_modifiers: body.list("cpuid_modifiers", leaf_modifier),
        msr_modifiers: body.list("msr_modifiers", msr_modifier),
    }
}

fn capability(value: &Value<'_>) -> Option<KvmCapability> {
    let capability = KvmCapability::parse(&value.read::<String>()?);
    if capability.is_none() {
        value.wrong(format_args!(
            "expected the decimal number of a capability, with \"!\" before it to do without, as \"121\" or \"!121\", \
             found {}",
            value.shown()
        ));
    }
    capability
}

fn leaf_modifier(entry: &mut Object<'_>) -> CpuidLeafModifier {
    CpuidLeafModifier {
        leaf: entry.required::<Quoted>("leaf").0,
        subleaf: entry.required::<Quoted>("subleaf").0,
        flags: entry.required("flags"),
        modifiers: entry.required_list("modifiers", |entry| CpuidRegisterModifier {
            register: entry.required("register"),
            bitmap: bitmap(entry),
        }),
    }
}

fn msr_modifier(entry: &mut Object<'_>) -> MsrModifier {
    MsrModifier {
        addr: entry.required::<Quoted>("addr").0,
        bitmap: bitmap(entry),
    }
}

fn bitmap<T: Register>(entry: &mut Object<'_>) -> Bitmap<T> {
    let Some(value) = entry.required_value("bitmap") else {
        return Bitmap::default();
    };
    let Some(text) = value.read::<String>() else {
        return Bitmap::default();
    };
    Bitmap::parse(&text).unwrap_or_else(|why| {
        value.wrong(format_args!("{} is no bitmap: {why}", value.shown()));
        Bitmap::default()
    })
}

#[cfg(test)]
pub(crate) mod tests;
