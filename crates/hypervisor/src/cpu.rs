//! One virtual processor: how it starts, why it came back, where it stands.

use std::fmt;
use std::sync::Arc;

use crate::{CpuState, CpuidEntry, PartitionError};

/// One virtual processor. Used by one thread only; other threads reach it through [`Kick`].
pub trait VirtualCpu: Send {
    /// Gives the processor its features and its first state. Called once, before the first run.
    ///
    /// # Errors
    /// The hypervisor refuses a value.
    fn configure(
        &mut self,
        cpuid: &[CpuidEntry],
        state: &InitialState,
    ) -> Result<(), PartitionError>;

    /// Changes model-specific registers, and remembers which: see [`VirtualCpu::kept_msrs`]. Called after
    /// [`VirtualCpu::configure`], whose values it changes, and before the first run.
    ///
    /// # Errors
    /// Each register that was refused; the others are changed.
    fn change_msrs(&mut self, changes: &[MsrChange]) -> Result<(), Vec<MsrRefusal>>;

    /// The numbers of the registers that [`VirtualCpu::change_msrs`] has changed. They belong to the processor's state,
    /// also where the hypervisor's own list of what to save lacks them.
    fn kept_msrs(&self) -> &[u32];

    /// Runs guest code until something needs an answer. What the last exit asked for (the bytes of a
    /// read) is handed to the guest on the next run.
    ///
    /// # Errors
    /// The hypervisor cannot run the processor; it will not run again.
    fn run(&mut self) -> Result<CpuExit<'_>, CpuError>;

    /// How other threads make [`VirtualCpu::run`] return.
    fn kick(&self) -> Arc<dyn Kick>;

    /// Tells the guest that the processor is made to stand still, so that it does not take the time until its next
    /// run for its own (KVM API, 4.70 `KVM_KVMCLOCK_CTRL`). Best effort: a guest without such a clock cannot be told.
    fn stands_still(&mut self);

    /// All that the processor is. Called between two runs, while every processor of the partition stands still: one that
    /// runs could send this one an interrupt that is neither in this state nor in its own.
    ///
    /// The last run must have ended with [`CpuExit::Interrupted`] (or none has been): what an exit asked
    /// for is handed to the guest by the next run, and is no part of the state before that.
    ///
    /// # Errors
    /// The hypervisor does not answer, or the guest runs guests of its own, whose state is not kept.
    fn save(&mut self) -> Result<CpuState, PartitionError>;

    /// Puts such a state into a processor that has just been made, in place of [`VirtualCpu::configure`]. After an error the processor is of no use.
    ///
    /// # Errors
    /// The state is none ([`CpuState::check`]), or this host cannot hold a part of it; the text names that part.
    fn restore(&mut self, state: &CpuState) -> Result<(), PartitionError>;

    /// Where the processor stands, for a person who reads why the guest ended. Best effort.
    fn position(&mut self) -> CpuPosition;
}

/// Makes a running processor return from [`VirtualCpu::run`] with [`CpuExit::Interrupted`].
pub trait Kick: Send + Sync {
    /// Called by the thread that is going to run the processor, before its first run.
    fn bind_to_this_thread(&self);
    /// Makes the current or else the next run return at once. May be called at any time.
    fn kick(&self);
    /// Forgets a kick that has been noticed. Called by the running thread.
    fn clear(&self);
}

/// Bits of a model-specific register that are set anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsrChange {
    /// Its number.
    pub index: u32,
    /// The bits that are set; the others stay.
    pub mask: u64,
    /// What they are set to.
    pub value: u64,
}

impl MsrChange {
    /// What becomes of a register that holds `old`.
    #[must_use]
    pub fn applied_to(&self, old: u64) -> u64 {
        (old & !self.mask) | (self.value & self.mask)
    }
}

/// Why a model-specific register could not be changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MsrRefusal {
    /// It cannot even be read.
    #[error(
        "model-specific register {0:#x} cannot be changed: the hypervisor of this host has no such register"
    )]
    Unknown(u32),
    /// It cannot hold the value.
    #[error(
        "model-specific register {index:#x} cannot be set to {value:#x}: the hypervisor of this host refuses that value"
    )]
    Value {
        /// Its number.
        index: u32,
        /// The value.
        value: u64,
    },
    /// The hypervisor could not be asked.
    #[error("model-specific register {index:#x} cannot be changed: {why}")]
    Failed {
        /// Its number.
        index: u32,
        /// What the host said.
        why: String,
    },
}

/// The state in which a processor starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InitialState {
    /// 64-bit mode with paging on, flat segments, interrupts off (Linux x86 64-bit boot protocol).
    Long64 {
        /// First instruction.
        rip: u64,
        /// Stack pointer.
        rsp: u64,
        /// Argument: address of the boot parameters.
        rsi: u64,
        /// Top of the page tables.
        page_tables_addr: u64,
        /// Global descriptor table: null, null, 64-bit code (selector 0x10), data (0x18).
        gdt_addr: u64,
        /// Its length in bytes.
        gdt_size_bytes: u16,
    },
    /// 32-bit protected mode, paging off, flat segments, interrupts off (PVH).
    Protected32 {
        /// First instruction.
        eip: u32,
        /// Argument: address of the start info.
        ebx: u32,
        /// Global descriptor table: null, null, 32-bit code (selector 0x10), data (0x18).
        gdt_addr: u64,
        /// Its length in bytes.
        gdt_size_bytes: u16,
    },
    /// Waits for the INIT and start-up interrupts of the boot processor.
    WaitForStartup,
}

/// Why a processor came back.
#[derive(Debug, PartialEq, Eq)]
pub enum CpuExit<'a> {
    /// The guest reads a port; `data` holds one or more elements of `size_bytes`, to be filled in.
    PortRead {
        /// The port.
        port: u16,
        /// Width of one element: 1, 2 or 4.
        size_bytes: usize,
        /// Where the answer goes; `rep ins` asks for several elements at once.
        data: &'a mut [u8],
    },
    /// The guest writes a port.
    PortWrite {
        /// The port.
        port: u16,
        /// Width of one element: 1, 2 or 4.
        size_bytes: usize,
        /// What it writes; `rep outs` gives several elements at once.
        data: &'a [u8],
    },
    /// The guest reads memory that is not RAM.
    MmioRead {
        /// Guest-physical address.
        addr: u64,
        /// Where the answer goes.
        data: &'a mut [u8],
    },
    /// The guest writes memory that is not RAM.
    MmioWrite {
        /// Guest-physical address.
        addr: u64,
        /// What it writes.
        data: &'a [u8],
    },
    /// A kick or a signal ended the run; nothing to answer.
    Interrupted,
    /// The processor shut down: a fault while handling a double fault.
    TripleFault,
    /// The hypervisor gave up on this processor.
    Stuck(StuckReason),
}

/// Why the hypervisor gave up on a processor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StuckReason {
    /// It met an instruction that it would have to emulate and cannot.
    Emulation {
        /// The bytes at the instruction pointer, as far as known.
        instruction: Vec<u8>,
    },
    /// The processor could not enter guest mode.
    EntryRefused {
        /// The hardware's reason code (Intel SDM vol. 3C app. C, AMD APM vol. 2 app. C).
        hardware_reason: u64,
    },
    /// Another error of the hypervisor.
    Internal {
        /// Its own code.
        code: u32,
        /// What it adds.
        data: Vec<u64>,
    },
    /// An exit that this program has no answer for.
    UnknownExit(String),
}

impl fmt::Display for StuckReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Emulation { instruction } if instruction.is_empty() => {
                write!(
                    f,
                    "the hypervisor cannot emulate an instruction (bytes unknown)"
                )
            }
            Self::Emulation { instruction } => write!(
                f,
                "the hypervisor cannot emulate the instruction {}",
                format_bytes(instruction)
            ),
            Self::EntryRefused { hardware_reason } => write!(
                f,
                "the processor refused to enter the guest (hardware reason {hardware_reason:#x})"
            ),
            Self::Internal { code, data } => {
                write!(f, "internal error {code} of the hypervisor, data {data:x?}")
            }
            Self::UnknownExit(what) => write!(f, "the hypervisor returned an unknown exit: {what}"),
        }
    }
}

/// Bytes as two-digit hexadecimal, separated by spaces.
#[must_use]
pub fn format_bytes(bytes: &[u8]) -> String {
    bytes
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect::<Vec<_>>()
        .join(" ")
}

/// Why a processor cannot run any more.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// The guest touched RAM that the host cannot give: a file behind it was cut, or memory ran out.
    #[error(
        "the host could not provide a page of guest memory ({0}); was the kernel or initrd file overwritten while in use, or is the host out of memory?"
    )]
    MemoryFault(std::io::Error),
    /// Anything else.
    #[error("the hypervisor cannot run the processor: {0}")]
    Run(std::io::Error),
}

/// Where a processor stands.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CpuPosition {
    /// Instruction pointer.
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Flags.
    pub rflags: u64,
    /// Code segment base.
    pub cs_base: u64,
    /// Control register 0.
    pub cr0: u64,
    /// Control register 2: the last faulting address.
    pub cr2: u64,
    /// Control register 3: the page tables.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// Extended features.
    pub efer: u64,
    /// rax, rbx, rcx, rdx, rsi, rdi, rbp, r8 to r15.
    pub general: [u64; 15],
    /// Whether the registers could be read.
    pub known: bool,
}

impl CpuPosition {
    const NAMES: [&'static str; 15] = [
        "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11", "r12", "r13",
        "r14", "r15",
    ];

    /// The processor mode: 16-, 32- or 64-bit, paging or not.
    #[must_use]
    pub fn mode(&self) -> &'static str {
        let (protected, paging, long) = (
            self.cr0 & 1 != 0,
            self.cr0 >> 31 & 1 != 0,
            self.efer >> 10 & 1 != 0,
        );
        match (protected, paging, long) {
            (_, _, true) => "64-bit",
            (true, true, _) => "32-bit paged",
            (true, false, _) => "32-bit",
            _ => "16-bit",
        }
    }

    /// All registers, in a few lines.
    #[must_use]
    pub fn registers(&self) -> String {
        let mut text = format!(
            "rip {:#018x} rsp {:#018x} rflags {:#x}\ncr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x}",
            self.rip, self.rsp, self.rflags, self.cr0, self.cr2, self.cr3, self.cr4, self.efer
        );
        for (i, (name, value)) in Self::NAMES.iter().zip(self.general).enumerate() {
            text.push_str(if i % 4 == 0 { "\n" } else { " " });
            text.push_str(&format!("{name} {value:#018x}"));
        }
        text
    }
}

impl fmt::Display for CpuPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.known {
            write!(
                f,
                "at rip {:#x} in {} mode",
                self.cs_base.wrapping_add(self.rip),
                self.mode()
            )
        } else {
            write!(f, "at an unknown place (its registers cannot be read)")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn position_reads_as_a_sentence() {
        let p = CpuPosition {
            rip: 0xffff_ffff_8100_0000,
            cr0: 0x8005_0033,
            efer: 0xd01,
            known: true,
            ..Default::default()
        };
        assert_eq!(p.to_string(), "at rip 0xffffffff81000000 in 64-bit mode");
        assert!(p.registers().contains("efer 0xd01"));
        assert_eq!(p.registers().lines().count(), 6);
        assert_eq!(
            CpuPosition {
                cr0: 1,
                ..p.clone()
            }
            .mode(),
            "64-bit"
        );
        assert_eq!(
            CpuPosition {
                cr0: 0,
                efer: 0,
                ..p
            }
            .mode(),
            "16-bit"
        );
    }

    #[test]
    fn emulation_failure_shows_the_bytes() {
        let r = StuckReason::Emulation {
            instruction: vec![0x48, 0x0f, 0xc7, 0x0e],
        };
        assert!(r.to_string().ends_with("48 0f c7 0e"));
    }
}
