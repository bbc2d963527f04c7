//! A process that makes copies of itself for who asks, and how they are asked for. See the README beside.

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
