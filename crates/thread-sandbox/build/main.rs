//! Turns `resources/seccomp/x86_64` into static BPF tables: `$OUT_DIR/filters.rs`.
//!
//! A mistake in a policy file ends the build and names the file and the rule.

mod compile;
mod policy;

use std::error::Error;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

use policy::{Policy, Role};

fn main() {
    if let Err(error) = run() {
        println!("cargo::error={error}");
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("no CARGO_MANIFEST_DIR")?);
    let folder = here.join("../../resources/seccomp/x86_64").canonicalize()?;
    println!("cargo::rerun-if-changed={}", folder.display());
    println!("cargo::rerun-if-changed=build");
    let target = env::var("CARGO_CFG_TARGET_ARCH")?;
    if target != "x86_64" {
        return Err(format!("there are no filters for {target} yet; only for x86_64").into());
    }
    let policy = Policy::read(&folder)?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("no OUT_DIR")?).join("filters.rs");
    write(&policy, &out)
}

fn write(policy: &Policy, out: &Path) -> Result<(), Box<dyn Error>> {
    let mut text = String::from("// Made by build/main.rs; do not edit.\n\n");
    writeln!(
        text,
        "pub(crate) const PID_MARKER: u32 = {:#x};\n",
        compile::PID_MARKER
    )?;

    text.push_str("pub(crate) fn base(role: Role) -> &'static [sock_filter] {\n    match role {\n");
    for role in Role::ALL {
        let block = compile::block(&policy.of_role(role))?;
        writeln!(text, "        Role::{role:?} => &{},", literal(&block))?;
    }
    text.push_str("    }\n}\n\n");

    text.push_str("pub(crate) const DEVICES: &[&str] = &[");
    for (device, _) in &policy.devices {
        write!(text, "{device:?}, ")?;
    }
    text.push_str("];\n\n");

    text.push_str("pub(crate) static FRAGMENTS: &[(&str, Role, &[sock_filter])] = &[\n");
    for (device, roles) in &policy.devices {
        for (role, rules) in roles {
            let block = compile::block(&rules.iter().collect::<Vec<_>>())?;
            writeln!(
                text,
                "    ({device:?}, Role::{role:?}, &{}),",
                literal(&block)
            )?;
        }
    }
    text.push_str("];\n\n");

    text.push_str("/// Names of the system calls by number; empty where there is none.\n");
    text.push_str("pub(crate) static SYSCALL_NAMES: &[&str] = &[\n");
    for name in policy::syscall_names() {
        writeln!(text, "    {name:?},")?;
    }
    text.push_str("];\n");
    fs::write(out, text)?;
    Ok(())
}

fn literal(block: &[compile::Instruction]) -> String {
    let mut text = String::from("[\n");
    for i in block {
        text.push_str(&format!(
            "            sock_filter {{ code: {:#x}, jt: {}, jf: {}, k: {:#x} }},\n",
            i.code, i.jt, i.jf, i.k
        ));
    }
    text + "        ]"
}
