//! How a device calls the guest.
//!
//! An [`IrqLine`] is a finished value: whoever wires the machine makes it (over an irqfd, or a plain
//! eventfd in tests) and hands it to the device. The number of the line stays with the wiring.
//!
//! Deliberately does not know: GSI numbers, interrupt controllers, which device holds a line.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// An edge-triggered interrupt line. Clones share the line.
#[derive(Debug, Clone)]
pub struct IrqLine(Arc<EventFd>);

impl IrqLine {
    /// A line that nobody listens to yet; the wiring registers [`IrqLine::event_fd`].
    ///
    /// # Errors
    /// The host has no file descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?)))
    }

    /// Sends one edge to the guest. Edges that come faster than the guest takes them are merged, as on
    /// the wire.
    pub fn pulse(&self) {
        // The only failure is a counter at its maximum: the guest has an edge pending already.
        let _ = self.0.write(1);
    }

    /// The descriptor that becomes readable at each edge: what an irqfd is made from.
    #[must_use]
    pub fn event_fd(&self) -> &EventFd {
        &self.0
    }

    /// Takes the edges sent since the last call. For tests and fakes; a wired line belongs to the
    /// hypervisor.
    #[must_use]
    pub fn take_edges(&self) -> u64 {
        self.0.read().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges_are_counted_once_and_shared_by_clones() {
        let line = IrqLine::new().unwrap();
        let twin = line.clone();
        line.pulse();
        twin.pulse();
        assert_eq!(line.take_edges(), 2);
        assert_eq!(twin.take_edges(), 0);
    }
}
