//! Can the KVM of this machine run an unmodified 64-bit kernel? Asked of a tiny guest, not guessed.
//!
//! A KVM without hardware virtualisation behind it opens and answers like any other, but interprets guest
//! code: slowly, and not all of it. The probe therefore runs instructions that every 64-bit kernel runs
//! and interpreters tend to lack (`popcnt`, `cmpxchg16b`, SSE), and times a loop.

use std::fmt;
use std::time::{Duration, Instant};

use alveole_guest_memory::{GuestRam, MemoryPlan};
use alveole_hypervisor::{
    CpuExit, InitialState, Partition, PartitionError, StuckReason, VirtualCpu,
};

use crate::KvmPartition;

/// What the probe guest found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeVerdict {
    /// Guest code runs as it is, at the speed of the processor.
    Capable,
    /// Guest code is interpreted; an unmodified kernel would crawl, or die at an unknown instruction.
    Interpreted(String),
    /// The guest did something no processor does.
    Broken(String),
}

impl fmt::Display for ProbeVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Capable => write!(f, "an unmodified 64-bit kernel runs here"),
            Self::Interpreted(why) => {
                write!(
                    f,
                    "this KVM has no hardware virtualisation behind it: {why}"
                )
            }
            Self::Broken(why) => write!(f, "the probe guest went astray: {why}"),
        }
    }
}

const RAM_BYTES: u64 = 64 << 10;
const PML4_ADDR: u64 = 0x1000;
const PDPT_ADDR: u64 = 0x2000;
const PD_ADDR: u64 = 0x3000;
const GDT_ADDR: u64 = 0x4000;
const CODE_ADDR: u64 = 0x8000;
const STACK_ADDR: u64 = 0x9000;
const DATA_ADDR: u32 = 0xa000;
const ANSWER_PORT: u16 = 0xf4;
const ANSWER: u8 = 0x2a;
/// How often the loop is timed, at most: a busy host interrupts one run, hardly all.
const TRIES: u32 = 5;
/// Turns of the timed loop, two instructions each.
const LOOP_TURNS: u32 = 200_000;
/// An interpreter needs some 200 ms for the loop, a processor 0.1 ms, QEMU's emulation of one 10 ms.
const LOOP_LIMIT: Duration = Duration::from_millis(80);

/// Runs the probe guest. Takes about a millisecond on hardware virtualisation, at most a second.
///
/// # Errors
/// KVM is missing, not accessible or too old; the text says what to do.
pub fn probe() -> Result<ProbeVerdict, PartitionError> {
    let refused = |act: &str, e: &dyn fmt::Display| {
        PartitionError::Unavailable(format!("cannot {act} for the probe guest: {e}"))
    };
    let mut partition = KvmPartition::new()?;
    let plan = MemoryPlan::around_hole(RAM_BYTES).map_err(|e| refused("plan memory", &e))?;
    let ram = GuestRam::map(&plan).map_err(|e| refused("map memory", &e))?;
    fill(&ram).map_err(|e| refused("fill memory", &e))?;
    partition.map_ram(&ram)?;
    let mut cpu = partition.create_cpu(0)?;
    cpu.configure(
        &partition.supported_cpuid()?,
        &InitialState::Long64 {
            rip: CODE_ADDR,
            rsp: STACK_ADDR,
            rsi: u64::from(DATA_ADDR),
            page_tables_addr: PML4_ADDR,
            gdt_addr: GDT_ADDR,
            gdt_size_bytes: 32,
        },
    )?;
    Ok(judge(cpu.as_mut()))
}

fn judge(cpu: &mut dyn VirtualCpu) -> ProbeVerdict {
    let mut start = Instant::now();
    let mut tries = 0;
    loop {
        match cpu.run() {
            Ok(CpuExit::Interrupted) => {}
            Ok(CpuExit::PortWrite {
                port: ANSWER_PORT,
                data: [ANSWER],
                ..
            }) => {
                let took = start.elapsed();
                if took <= LOOP_LIMIT {
                    return ProbeVerdict::Capable;
                }
                tries += 1;
                if tries < TRIES {
                    start = Instant::now();
                    continue;
                }
                return ProbeVerdict::Interpreted(format!(
                    "{} instructions took {} ms, so they are interpreted one by one",
                    2 * LOOP_TURNS,
                    took.as_millis()
                ));
            }
            Ok(CpuExit::Stuck(reason @ StuckReason::Emulation { .. })) => {
                return ProbeVerdict::Interpreted(format!("{reason}, which every kernel uses"));
            }
            Ok(CpuExit::Stuck(reason)) => return ProbeVerdict::Broken(reason.to_string()),
            Ok(other) => return ProbeVerdict::Broken(format!("it came back with {other:?}")),
            Err(e) => return ProbeVerdict::Broken(e.to_string()),
        }
    }
}

fn fill(ram: &GuestRam) -> Result<(), alveole_guest_memory::AccessError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    ram.write_plain(PML4_ADDR, &(PDPT_ADDR | PRESENT_WRITABLE))?;
    ram.write_plain(PDPT_ADDR, &(PD_ADDR | PRESENT_WRITABLE))?;
    ram.write_plain(PD_ADDR, &(PRESENT_WRITABLE | LARGE))?;
    for (slot, descriptor) in [(2, 0x00af_9b00_0000_ffff_u64), (3, 0x00cf_9300_0000_ffff)] {
        ram.write_plain(GDT_ADDR + slot * 8, &descriptor)?;
    }
    ram.write(CODE_ADDR, &code())
}

/// The guest, as bytes. The data address arrives in rsi.
fn code() -> Vec<u8> {
    let turns = LOOP_TURNS.to_le_bytes();
    let parts: [&[u8]; 11] = [
        &[0x0f, 0x20, 0xe0],             // mov rax, cr4
        &[0x0d, 0x00, 0x06, 0x00, 0x00], // or eax, OSFXSR | OSXMMEXCPT
        &[0x0f, 0x22, 0xe0],             // mov cr4, rax
        &[0xb9],                         // mov ecx, turns
        &turns,
        &[0xff, 0xc9, 0x75, 0xfc],       // 1: dec ecx; jnz 1b
        &[0xf3, 0x48, 0x0f, 0xb8, 0xc1], // popcnt rax, rcx
        &[0x31, 0xd2, 0x31, 0xc0, 0x48, 0x0f, 0xc7, 0x0e], // xor edx,edx; xor eax,eax; cmpxchg16b [rsi]
        &[0x66, 0x0f, 0x6f, 0x06],                         // movdqa xmm0, [rsi]
        &[0xb0, ANSWER, 0x66, 0xba, 0xf4, 0x00, 0xee], // mov al, ANSWER; mov dx, ANSWER_PORT; out dx, al
        &[0xeb, 0xdd],                                 // jmp to the mov ecx, for another try
    ];
    parts.concat()
}
