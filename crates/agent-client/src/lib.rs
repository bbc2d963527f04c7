//! The host's side of sessions with the agent in a guest.
//!
//! Deliberately does not know: machines, images, what people type. The guest is hostile.

mod duplex;
mod error;
mod guest;
mod session;
mod streams;

pub use duplex::{Duplex, Gone, Sender};
pub use error::AgentError;
pub use guest::Guest;
pub use session::Session;
pub use streams::{Controls, Streams};
