//! Opening a console and taking it apart for the threads that use it.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use alveole_interrupts::IrqLine;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use crate::backend::Backend;
use crate::out_queue::{Fate, OutQueue};
use crate::panic_line::PanicLine;
use crate::port::{Drained, Port};
use crate::uart::Registers;
use crate::{ConsoleTarget, ConsoleWorker, OnConsoleEvent, SerialCounters, SerialError, Uart};

/// How long `flush` sleeps before it looks at a console that takes nothing again.
const FLUSH_STEP: Duration = Duration::from_millis(1);

/// An open console, not connected to a machine yet.
pub struct Console {
    backend: Backend,
    fate: Fate,
    bell: Arc<EventFd>,
    timer: TimerFd,
    on_event: OnConsoleEvent,
}

impl Console {
    /// Opens the console. To be called early, on the main thread, before the system call filter is
    /// entered. A terminal is in raw mode from here on; see [`restore_terminal`](crate::restore_terminal).
    ///
    /// # Errors
    /// See [`SerialError`]; nothing is left behind.
    pub fn open(target: &ConsoleTarget, on_event: OnConsoleEvent) -> Result<Self, SerialError> {
        let bell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(SerialError::Descriptor)?;
        let timer = TimerFd::new().map_err(|e| SerialError::Descriptor(e.into()))?;
        let fate = match target {
            ConsoleTarget::None => Fate::Unwanted,
            _ => Fate::Queued,
        };
        let backend = Backend::open(target)?;
        Ok(Self {
            backend,
            fate,
            bell: Arc::new(bell),
            timer,
            on_event,
        })
    }

    /// Looks whether a console in a file could be opened, and makes nothing: for whoever tells all that is wrong at once. Others
    /// are not looked at.
    ///
    /// # Errors
    /// See [`SerialError`].
    pub fn try_file(target: &ConsoleTarget) -> Result<(), SerialError> {
        Backend::try_file(target)
    }

    /// Takes it apart: the UART for a bus, the worker for an event loop, the handle for the owner.
    /// `irq` is the UART's interrupt line, edge triggered.
    #[must_use]
    pub fn into_parts(self, irq: IrqLine) -> (Uart, ConsoleWorker, ConsoleHandle) {
        let Self {
            backend,
            fate,
            bell,
            timer,
            on_event,
        } = self;
        let counters = Arc::new(SerialCounters::default());
        let panic_line = PanicLine::default();
        let queue = Arc::new(OutQueue::new(bell.clone(), counters.clone(), fate));
        let registers = Registers::new(irq, queue.clone(), bell.clone(), panic_line.clone());
        let port = Port::new(backend, queue.clone(), counters.clone());
        let port = Arc::new(Mutex::new(port));
        let uart = Uart::new(registers.clone(), queue);
        let worker = ConsoleWorker::new(port.clone(), registers, bell, timer, on_event);
        (
            uart,
            worker,
            ConsoleHandle {
                port,
                counters,
                panic_line,
            },
        )
    }
}

/// The owner's end of a console. Dropping it closes the console.
pub struct ConsoleHandle {
    port: Arc<Mutex<Port>>,
    counters: Arc<SerialCounters>,
    panic_line: PanicLine,
}

impl ConsoleHandle {
    /// Writes what the guest has written and nobody has taken yet, for at most `patience`. Works on
    /// any thread, whether or not the event loop still runs. Gives the number of bytes left over.
    pub fn flush(&self, patience: Duration) -> usize {
        let until = Instant::now() + patience;
        loop {
            let (drained, waiting) = {
                let mut port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
                (port.drain(), port.waiting())
            };
            match drained {
                Drained::AtRest | Drained::Empty => return waiting,
                _ if Instant::now() >= until => return waiting,
                Drained::More => {}
                Drained::Blocked => thread::sleep(FLUSH_STEP),
            }
        }
    }

    /// Gives back what is not ours: the terminal's settings, the path of the socket. Output is still
    /// written. May be called again.
    pub fn close(&self) {
        self.port
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .backend
            .close();
    }

    /// What the port has counted.
    #[must_use]
    pub fn counters(&self) -> &Arc<SerialCounters> {
        &self.counters
    }

    /// The last "Kernel panic - not syncing: …" that the guest has printed on a whole line. A hint
    /// only: any program in the guest may print it.
    #[must_use]
    pub fn last_panic_line(&self) -> Option<String> {
        self.panic_line.get()
    }
}

impl Drop for ConsoleHandle {
    fn drop(&mut self) {
        self.close();
    }
}
