//! One vCPU thread and its state machine; what a guest processor looks like (CPUID); what its exits were.
//!
//! A [`Vcpu`] enters its sandbox, waits for orders, runs guest code, and routes what the guest touches to
//! two buses. It reports what ends or interests the machine through a channel and never waits for a
//! device.
//!
//! Deliberately does not know: KVM, which devices are on the buses, what the machine does with a report.

pub mod cpuid;
mod exits;
mod state;
pub mod template;
mod thread;

pub use exits::{ACCESS_SLOTS, Access, AccessKind, ExitCounts};
pub use state::{Effect, Input, State, next};
pub use thread::{Buses, EndReason, Order, Report, ReportKind, Vcpu, VcpuError, VcpuHandle};
