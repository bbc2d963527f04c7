//! Ends a machine whose memory another process serves when that process is gone.
//!
//! Whoever touches a page that is not there waits for that process in the kernel: processors, devices, the thread that writes
//! snapshots. So:
//!
//! - The watch has an event loop and a thread of its own, which never touches guest memory. Any other may be waiting.
//! - It tells control, which ends the machine as for any other failure of the host.
//! - Control orders everybody to stop, waits a moment, and leaves behind who still waits for a page ([`crate::Machine::run`] returns): they
//!   end with the process. Nobody lets them go on: the page would read as zeroes, and a disk's thread would write those to the disk. A
//!   processor whose page comes after all looks at its orders before it runs the guest again.
//! - Where nobody had to be left behind, control lets kernel workers go on, with zeroes that nobody will see: KVM has pages brought in by them
//!   while processors stand still, and closing a partition waits for its workers, uninterruptibly.
//!
//! The same holds where the process is there but serves no page: a signal, or any other end, ends the monitor all the same.

use std::sync::Arc;

use alveole_event_loop::{Event as LoopEvent, EventLoopError, Interest, Ops, Token, Worker};
use alveole_guest_memory::{PageServer, ServeError};

use crate::{Event, Mailbox};

const CONNECTION: Token = Token(0);

/// Waits for the end of the connection with the process that serves memory, and keeps it open.
pub(crate) struct ServerWatch {
    server: Arc<PageServer>,
    mailbox: Mailbox,
}

impl ServerWatch {
    pub(crate) fn new(server: Arc<PageServer>, mailbox: &Mailbox) -> Self {
        Self {
            server,
            mailbox: mailbox.clone(),
        }
    }
}

impl Worker for ServerWatch {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn start(&mut self, ops: &mut Ops<'_>) -> Result<(), EventLoopError> {
        // What it may say is not for us: only that it hangs up.
        ops.watch(&*self.server, CONNECTION, Interest::NONE)
    }

    fn on_event(&mut self, event: LoopEvent, ops: &mut Ops<'_>) {
        if !event.ready.hung_up() && !event.ready.error() {
            return;
        }
        // It was watched until now.
        let _ = ops.unwatch(CONNECTION);
        let gone = ServeError::Gone(self.server.path().to_owned());
        self.mailbox.send(Event::LoopEnded(gone.to_string()));
    }
}
