//! A process that makes copies of itself for who asks, and how they are asked for: the README beside says how it is used, and its limits.
//!
//! Deliberately does not know: what is prepared, what the words of a copy mean, what a virtual machine is.

#![expect(
    unsafe_code,
    reason = "fork, descriptors by number, and calls that nix does not have"
)]

mod copy;
mod template;
mod wire;

pub use copy::{AskError, Copy, HowEnded};
pub use template::{Numbers, Template, TemplateError};
pub use wire::{MAX_DESCRIPTORS, MAX_REQUEST_BYTES};
