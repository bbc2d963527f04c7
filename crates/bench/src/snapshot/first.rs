//! How soon a restored guest executes its first instruction: a guest of a few bytes that writes to the serial port and does nothing else, so that
//! the first byte on stdout is of its first instruction or the one behind that.
//!
//! Does not know what becomes of the times.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use serde_json::json;

use super::life::{Arrivals, BEAT, Files, Process};
use super::table::Row;
use super::template::{Guest, Template, execute};
use super::{Plan, milliseconds};
use crate::api::code;
use crate::vmm::{Kind, Vmm, utf8};

/// Copies of one template: the first finds what no copy has touched yet.
const COPIES: usize = 4;

/// Writes the byte of a beat to the serial port for ever.
fn guest() -> Vec<u8> {
    // mov dx, 0x3f8; mov al, BEAT; out dx, al; jmp to it
    vec![0x66, 0xba, 0xf8, 0x03, 0xb0, BEAT, 0xee, 0xeb, 0xfd]
}

/// Restores such a guest of `mib` by each way there is, from `folder`.
pub(super) fn measure(
    plan: &Plan,
    vmm: &Vmm,
    mib: u64,
    folder: &Path,
    add: &mut dyn FnMut(Row, f64),
) -> anyhow::Result<()> {
    let arrivals = Arrivals::new()?;
    let files = Files::new(folder, "first");
    take(plan, vmm, mib, &files, &arrivals).context("snapshot of a tiny guest")?;

    let mut process = Process::start(plan, vmm, &plan.scratch.join("second"), &arrivals)?;
    let sent = Instant::now();
    process.send_load(&files)?;
    process.beat()?;
    add(Row::LoadInstruction, milliseconds(sent.elapsed()));
    add(Row::StartInstruction, milliseconds(process.start.elapsed()));
    drop(process);
    // Peers know no such thing.
    if vmm.kind != Kind::Alveole {
        return Ok(());
    }
    let template = Template::start(plan, vmm, &files)?;
    let folder = plan.scratch.join("copied");
    for number in 0..COPIES {
        let mut guest = Guest::start(plan, &template, &folder, None, &arrivals)?;
        guest.beat()?;
        let row = match number {
            0 => Row::CopyInstruction,
            _ => Row::LaterInstruction,
        };
        add(row, milliseconds(guest.start.elapsed()));
    }
    let folder = plan.scratch.join("executed");
    let (mut run, start) = execute(plan, vmm, &template, &folder, &arrivals)?;
    run.wait_for(BEAT).map_err(anyhow::Error::msg)?;
    add(Row::ExecutedInstruction, milliseconds(start.elapsed()));
    Ok(())
}

fn take(
    plan: &Plan,
    vmm: &Vmm,
    mib: u64,
    files: &Files,
    arrivals: &Arrivals,
) -> anyhow::Result<()> {
    let kernel = plan.scratch.join("tiny-kernel");
    fs::write(&kernel, code::tiny_kernel(&guest()))?;
    let mut process = Process::start(plan, vmm, &plan.scratch.join("first"), arrivals)?;
    let source = json!({"kernel_image_path": utf8(&kernel)?});
    let machine = json!({"vcpu_count": plan.cpus, "mem_size_mib": mib});
    process.ask("PUT", "/boot-source", &source.to_string())?;
    process.ask("PUT", "/machine-config", &machine.to_string())?;
    process.ask("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#)?;
    process.run.wait_for(BEAT).map_err(anyhow::Error::msg)?;
    process.take_full(files)
}
