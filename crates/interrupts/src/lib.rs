//! How a device calls the guest, and how the guest calls a device.
//!
//! An [`IrqLine`], an [`MsiVector`] and a [`Doorbell`] are finished values: whoever wires the machine makes
//! them (over irqfds and ioeventfds, or plain eventfds in tests) and hands them to the device. Numbers and
//! addresses stay with the wiring.
//!
//! Deliberately does not know: GSI numbers, interrupt controllers, which device holds a line.

use std::fmt;
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

/// What a message-signalled interrupt writes, and where (PCI Local Bus 3.0, section 6.8.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiMessage {
    /// The guest-physical address.
    pub address: u64,
    /// The value.
    pub data: u32,
}

/// Connects an [`MsiVector`] to the message that the guest has chosen for it; made by the wiring.
pub type MsiConnect = dyn Fn(Option<MsiMessage>) -> io::Result<()> + Send + Sync;

/// A message-signalled interrupt whose message the guest chooses while it runs. Clones share it.
#[derive(Clone)]
pub struct MsiVector {
    line: IrqLine,
    connect: Arc<MsiConnect>,
}

impl MsiVector {
    /// A vector over `line`; `connect` is called with each new message, or none to disconnect.
    #[must_use]
    pub fn new(line: IrqLine, connect: Arc<MsiConnect>) -> Self {
        Self { line, connect }
    }

    /// Sends the message once. Nothing happens while there is none.
    pub fn signal(&self) {
        self.line.pulse();
    }

    /// Sends `message` from here on; `None` sends nothing.
    ///
    /// # Errors
    /// The hypervisor refuses the message.
    pub fn connect(&self, message: Option<MsiMessage>) -> io::Result<()> {
        (self.connect)(message)
    }

    /// The line behind it, for tests and fakes.
    #[must_use]
    pub fn line(&self) -> &IrqLine {
        &self.line
    }
}

impl fmt::Debug for MsiVector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MsiVector").field(&self.line).finish()
    }
}

/// Becomes readable when the guest writes a notify address. Clones share it.
#[derive(Debug, Clone)]
pub struct Doorbell(Arc<EventFd>);

impl Doorbell {
    /// A doorbell that nobody can ring but [`Doorbell::ring`]; the wiring registers
    /// [`Doorbell::event_fd`].
    ///
    /// # Errors
    /// The host has no file descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?)))
    }

    /// Rings, as a write of the guest does.
    pub fn ring(&self) {
        // The only failure is a counter at its maximum: it is readable already.
        let _ = self.0.write(1);
    }

    /// The descriptor to watch; edge-triggered, it need not be read.
    #[must_use]
    pub fn event_fd(&self) -> &EventFd {
        &self.0
    }

    /// Takes the rings since the last call.
    #[must_use]
    pub fn take_rings(&self) -> u64 {
        self.0.read().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vector_tells_its_wiring_each_message() {
        use std::sync::Mutex;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        let vector = MsiVector::new(
            IrqLine::new().unwrap(),
            Arc::new(move |message| {
                log.lock().unwrap().push(message);
                Ok(())
            }),
        );
        let message = MsiMessage {
            address: 0xfee0_0000,
            data: 0x41,
        };
        vector.connect(Some(message)).unwrap();
        vector.clone().signal();
        vector.connect(None).unwrap();
        assert_eq!(*seen.lock().unwrap(), [Some(message), None]);
        assert_eq!(vector.line().take_edges(), 1);
    }

    #[test]
    fn a_doorbell_counts_its_rings() {
        let bell = Doorbell::new().unwrap();
        bell.clone().ring();
        bell.ring();
        assert_eq!(bell.take_rings(), 2);
        assert_eq!(bell.take_rings(), 0);
    }

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
