//! The port to CPU virtualisation on KVM, and a probe that says what the KVM here is worth.
//!
//! The only crate that issues a KVM ioctl (Linux Documentation/virt/kvm/api.rst).
//!
//! Deliberately does not know: devices, kernels, threads beyond the signal that ends a run.

#![expect(
    unsafe_code,
    reason = "ioctls on shared memory with the kernel are this crate's job"
)]

#[macro_use]
mod same_fields;

mod cpu;
mod cpu_state;
mod kick;
mod partition;
mod partition_state;
mod probe;
mod routing;

pub use partition::KvmPartition;
pub use probe::{ProbeVerdict, probe};

/// Where the kernel offers KVM.
pub const KVM_PATH: &str = "/dev/kvm";
