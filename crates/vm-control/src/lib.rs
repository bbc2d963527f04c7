//! Words between whoever controls a machine and the machine: what may be asked ([`Command`]), what is answered
//! ([`Answer`], [`Refusal`]), and when it may be asked ([`permit`], a pure table).
//!
//! One thread owns the state of a machine. Everybody else sends it a [`Request`] and gets the answer through the
//! request's [`Reply`], which never blocks the owner.
//!
//! Deliberately does not know: HTTP, threads, devices, how a command is carried out.

mod command;
mod reply;
mod rules;

pub use command::{Answer, Command, InstanceInfo, Refusal, SnapshotTaken};
pub use reply::{Reply, Request};
pub use rules::{State, permit};
