//! What a running device may tell the guest.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use alveole_interrupts::IrqLine;

/// Most log lines about broken rings and refused starts of one device. Abused by a guest that breaks its
/// ring and resets the device in a loop.
pub const MAX_TROUBLE_LINES: u32 = 10;

/// Called with the line by which a queue interrupts directly from now on; none: through [`Wires::queue`] only.
pub type RouteWatch = Arc<dyn Fn(Option<IrqLine>) + Send + Sync>;

/// How a transport tells the driver something. Supplied by the transport, called from any thread.
pub trait Wires: Send + Sync {
    /// Queue `queue` has used buffers.
    fn queue(&self, queue: u16);
    /// A line on which an edge does all that [`Self::queue`] does, for who cannot call: the host's kernel. None: there
    /// is more to it at the moment. The transport says when this changes ([`Signals::routes_changed`]).
    fn direct(&self, queue: u16) -> Option<IrqLine> {
        let _ = queue;
        None
    }
    /// The configuration, or the status, has changed.
    fn config(&self);
    /// The device was reset: nothing that was told before counts any more.
    fn clear(&self);
}

/// The part of a device's state that its worker's thread changes: shared by core, transport and worker.
pub struct Signals {
    wires: Box<dyn Wires>,
    needs_reset: AtomicBool,
    generation: AtomicU32,
    listener: Mutex<Listener>,
    trouble: AtomicU32,
    /// By queue: who wants to know how it interrupts.
    watches: Mutex<Vec<(u16, RouteWatch)>>,
}

/// Whether changes of the configuration are told: from DRIVER_OK on (section 2.4.1).
#[derive(Debug, Default)]
struct Listener {
    driver_ok: bool,
    /// Something changed since the reset that the driver may have read before.
    missed: bool,
}

impl Signals {
    /// Over the wires of one transport.
    #[must_use]
    pub fn new(wires: Box<dyn Wires>) -> Arc<Self> {
        Arc::new(Self {
            wires,
            needs_reset: AtomicBool::new(false),
            generation: AtomicU32::new(0),
            listener: Mutex::default(),
            trouble: AtomicU32::new(0),
            watches: Mutex::default(),
        })
    }

    /// Tells the driver that `queue` has used buffers.
    pub(crate) fn queue(&self, queue: u16) {
        self.wires.queue(queue);
    }

    pub(crate) fn direct(&self, queue: u16) -> Option<IrqLine> {
        self.wires.direct(queue)
    }

    fn watches(&self) -> MutexGuard<'_, Vec<(u16, RouteWatch)>> {
        self.watches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn watch_route(&self, queue: u16, watch: RouteWatch) {
        self.watches().push((queue, watch));
    }

    pub(crate) fn forget_route(&self, queue: u16) {
        self.watches().retain(|(other, _)| *other != queue);
    }

    /// To be called by the transport, with its registers locked, when [`Wires::direct`] may answer otherwise than before.
    /// What the driver has masked when this returns sends nothing any more.
    pub fn routes_changed(&self) {
        // They may wait for a worker, which may be about to look here.
        let watches = self.watches().clone();
        for (queue, watch) in watches {
            watch(self.wires.direct(queue));
        }
    }

    fn listener(&self) -> MutexGuard<'_, Listener> {
        self.listener.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The configuration space has changed: a new generation, and an interrupt (section 2.5.1), which waits for
    /// a driver that is not ready yet.
    pub(crate) fn config_changed(&self) {
        let mut listener = self.listener();
        self.generation.fetch_add(1, Ordering::AcqRel);
        if listener.driver_ok {
            self.wires.config();
        } else {
            listener.missed = true;
        }
    }

    /// The driver is ready, and told of what it may have missed.
    pub(crate) fn driver_ok(&self) {
        let mut listener = self.listener();
        listener.driver_ok = true;
        if std::mem::take(&mut listener.missed) {
            self.wires.config();
        }
    }

    /// The device cannot go on without a reset (section 2.1.2).
    pub(crate) fn need_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.wires.config();
    }

    pub(crate) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    pub(crate) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn restore(&self, generation: u32, needs_reset: bool, driver_ok: bool) {
        self.listener().driver_ok = driver_ok;
        self.generation.store(generation, Ordering::Release);
        self.needs_reset.store(needs_reset, Ordering::Release);
    }

    /// After a reset. The generation stays: a driver that compares two readings must not be fooled.
    pub(crate) fn reset(&self) {
        let mut listener = self.listener();
        *listener = Listener::default();
        self.needs_reset.store(false, Ordering::Release);
        self.wires.clear();
    }

    /// Says in the log what went wrong, unless there is too much of it.
    pub(crate) fn say(&self, name: &str, what: &dyn std::fmt::Display) {
        let line = self.trouble.fetch_add(1, Ordering::Relaxed);
        if line < MAX_TROUBLE_LINES {
            log::warn!("{name}: {what}; the device waits for a reset by the guest");
            if line == MAX_TROUBLE_LINES - 1 {
                log::warn!("{name}: no more is said about this device");
            }
        }
    }

    /// How often the device had to be given up until a reset.
    #[must_use]
    pub fn trouble(&self) -> u32 {
        self.trouble.load(Ordering::Relaxed)
    }
}

/// Tells the driver that the configuration space has changed: the owner's or the device's doing.
#[derive(Clone)]
pub struct ConfigIrq(pub(crate) Arc<Signals>);

impl ConfigIrq {
    /// A new generation, and the interrupt once the driver is ready. The change itself must be visible in the
    /// configuration space before.
    pub fn raise(&self) {
        self.0.config_changed();
    }
}
