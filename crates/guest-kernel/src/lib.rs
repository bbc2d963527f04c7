//! Kernels that guests boot: where they come from, which of their modules a machine needs, and the initramfs with these and the agent.
//!
//! Deliberately does not know: how a guest is run, what its agent says, images. Packages and module trees are others' and
//! may be damaged: what is wrong with them is an error.

mod compressed;
mod error;
mod initramfs;
mod modules;
mod package;
mod store;

pub use error::KernelError;
pub use initramfs::write_initramfs;
pub use modules::{MACHINE, ModuleTree};
pub use store::{Kernel, KernelStore, Source};
