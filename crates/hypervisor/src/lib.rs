//! The port to CPU virtualisation: what the machine needs of a hypervisor, as two traits and plain values.
//!
//! [`Partition`] is one guest's address space and interrupt wiring, [`VirtualCpu`] one of its processors.
//! The port on KVM is `alveole-hypervisor-kvm`; the scripted fake in [`fake`] (feature `fake`, for tests
//! only) plays a guest from a list of exits.
//!
//! Deliberately does not know: KVM, devices, threads, what the guest runs.

mod cpu;
mod cpuid;
#[cfg(feature = "fake")]
pub mod fake;
pub mod state;

pub use cpu::{
    CpuError, CpuExit, CpuPosition, InitialState, Kick, MsrChange, MsrRefusal, StuckReason,
    VirtualCpu, format_bytes,
};
pub use cpuid::{CpuidEntry, find_leaf};
pub use state::{CpuState, PartitionState, RestoredClock, StateError};

use alveole_guest_memory::GuestRam;
use alveole_interrupts::{Doorbell, IrqLine, MsiVector};

/// One guest: its physical memory, its interrupt lines, its processors.
pub trait Partition: Send + Sync {
    /// Shows `ram` to the guest. Called once, before any processor or interrupt line is asked for.
    ///
    /// # Errors
    /// The hypervisor refuses a range.
    fn map_ram(&mut self, ram: &GuestRam) -> Result<(), PartitionError>;

    /// The CPUID leaves that this host and hypervisor can give to a guest. Nothing that is not in this
    /// list may be advertised.
    ///
    /// # Errors
    /// The hypervisor does not answer.
    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>, PartitionError>;

    /// Largest number of processors a guest can have here.
    fn max_cpus(&self) -> u32;

    /// Whether the local APIC timer has the TSC deadline mode.
    fn has_tsc_deadline_timer(&self) -> bool;

    /// Whether the processor translates guest addresses itself (EPT, NPT). Without, the hypervisor shadows
    /// the guest's page tables, and a page that the guest touches first costs about ten times as much.
    fn has_nested_paging(&self) -> bool;

    /// Whether the hypervisor has a capability, by its own number for it (`KVM_CAP_...` of `linux/kvm.h`).
    fn has_capability(&self, number: u32) -> bool;

    /// Makes the processor with this APIC id.
    ///
    /// # Errors
    /// The hypervisor refuses one more processor.
    fn create_cpu(&self, apic_id: u32) -> Result<Box<dyn VirtualCpu>, PartitionError>;

    /// An edge-triggered interrupt line wired to global system interrupt `gsi`.
    ///
    /// # Errors
    /// No such interrupt, or the host is out of file descriptors.
    fn irq_line(&self, gsi: u32) -> Result<IrqLine, PartitionError>;

    /// A message-signalled interrupt. It has no message yet; the guest may choose one at any time.
    ///
    /// # Errors
    /// There are too many, or the host is out of file descriptors.
    fn msi_vector(&self) -> Result<MsiVector, PartitionError>;

    /// A doorbell that rings when the guest writes guest-physical address `addr`, which is not RAM: the
    /// write does not come out as an exit.
    ///
    /// # Errors
    /// The address is taken, or the host is out of file descriptors.
    fn doorbell(&self, addr: u64, rings_on: DoorbellValue) -> Result<Doorbell, PartitionError>;

    /// The state of interrupt controllers and clock. Every processor stands still, and nobody raises an interrupt meanwhile.
    ///
    /// # Errors
    /// The hypervisor does not answer.
    fn save(&self) -> Result<PartitionState, PartitionError>;

    /// Puts such a state into a partition whose processors have not run. They have been restored before: an
    /// interrupt that an input of the I/O APIC still asks for is delivered to their local APICs here, and would be lost
    /// under a state that is put into those later.
    ///
    /// # Errors
    /// The state is none ([`PartitionState::check`]), or the hypervisor refuses a part of it.
    fn restore(&self, state: &PartitionState, clock: RestoredClock) -> Result<(), PartitionError>;

    /// Begins to note which pages of `ram` are written by the guest, and by the hypervisor for it. What this process writes
    /// (devices, also those that the kernel plays) is not noted. May be called while the guest runs, and again.
    ///
    /// # Errors
    /// The hypervisor refuses.
    fn track_dirty(&self, ram: &GuestRam, from: NotedFrom) -> Result<(), PartitionError>;

    /// Which pages have been written since the last call, or since [`Partition::track_dirty`] (see [`NotedFrom`]): for each range of
    /// `ram`, in order, one bit a page of 4 KiB, bit 0 of the first word for the first. They count as not written from then
    /// on. May be called while the guest runs: what it writes meanwhile is told by this call or by the next. No page that was
    /// written is left out; one that was read for the first time may be told as well.
    ///
    /// # Errors
    /// Nothing is noted: [`Partition::track_dirty`] was not called.
    fn take_dirty(&self, ram: &GuestRam) -> Result<Vec<Vec<u64>>, PartitionError>;

    /// Ends what [`Partition::track_dirty`] began, so that writes cost nothing more.
    ///
    /// # Errors
    /// The hypervisor refuses.
    fn untrack_dirty(&self, ram: &GuestRam) -> Result<(), PartitionError>;
}

/// From when on written pages are noted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotedFrom {
    /// From the call on. It takes the longer the more memory there is: writes to all of it are to be seen.
    Now,
    /// From the first [`Partition::take_dirty`] on, which may tell all pages, and takes that time while the guest runs. The call itself takes
    /// none, where the hypervisor knows such a way; else this is [`NotedFrom::Now`].
    FirstTake,
}

/// Which writes ring a doorbell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DoorbellValue {
    /// Any write of any width.
    Any,
    /// A 32-bit write of this value.
    Word(u32),
}

/// Why the hypervisor could not do its part.
#[derive(Debug, thiserror::Error)]
pub enum PartitionError {
    /// The hypervisor cannot be opened at all. The text names cause and cure.
    #[error("{0}")]
    Unavailable(String),
    /// One request was refused.
    #[error("{act} was refused: {source}{}", if hint.is_empty() { String::new() } else { format!("; {hint}") })]
    Refused {
        /// What was asked, with its values.
        act: String,
        /// What the host said.
        source: std::io::Error,
        /// What to do about it, or empty.
        hint: &'static str,
    },
    /// A saved state cannot be restored here.
    #[error("the saved state of {of} cannot be restored: {source}")]
    State {
        /// Whose it is.
        of: String,
        /// What is wrong with it.
        source: StateError,
    },
    /// Something cannot be saved as it is. The text names cause and cure.
    #[error("{0}")]
    NotSaved(String),
}
