//! Counters as text: for Prometheus and its kin, and as Firecracker writes them.
//!
//! [`exposition`] makes the text that is scraped; [`FirecrackerLines`] the groups of a line of Firecracker's metrics file, which tell
//! what has changed since the line before; [`Process`] reads what the host's kernel knows of this process.
//!
//! Deliberately does not know: who counts, when the text is asked for, where it goes.

#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::panic,
        clippy::expect_used
    )
)]

mod exposition;
mod families;
mod firecracker;
mod process;

pub use exposition::{Form, Gauges, exposition};
pub use families::is_known;
pub use firecracker::FirecrackerLines;
pub use process::{Process, ProcessFacts, ThreadFacts};
