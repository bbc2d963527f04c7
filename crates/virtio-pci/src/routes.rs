//! Which event is told by which message.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use alveole_interrupts::IrqLine;
use alveole_pci::MsixSender;
use alveole_virtio::Wires;

use crate::MAX_QUEUES;

/// The event is told by no message.
pub const NO_VECTOR: u16 = 0xffff;

/// Bits of the ISR status.
const QUEUE_INTERRUPT: u8 = 1;
const CONFIG_INTERRUPT: u8 = 2;

/// Shared by the registers, which set it up, and the workers, which use it.
pub(crate) struct Routes {
    sender: MsixSender,
    vectors: u16,
    isr: AtomicU8,
    config: AtomicU16,
    queues: Vec<AtomicU16>,
}

impl Routes {
    pub(crate) fn new(sender: MsixSender, vectors: u16) -> Arc<Self> {
        let unmapped = || AtomicU16::new(NO_VECTOR);
        Arc::new(Self {
            sender,
            vectors,
            isr: AtomicU8::new(0),
            config: unmapped(),
            queues: (0..MAX_QUEUES).map(|_| unmapped()).collect(),
        })
    }

    /// Takes what the ISR status says; reading it forgets it (section 4.1.4.5).
    pub(crate) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    /// ISR status, the configuration's vector, and those of the first `queues` queues.
    pub(crate) fn save(&self, queues: u16) -> (u8, u16, Vec<u16>) {
        // Exhaustive, so that a new field has to decide whether it is saved.
        let Self {
            sender: _,
            vectors: _,
            isr,
            config,
            queues: vectors,
        } = self;
        let vectors = vectors.iter().take(usize::from(queues));
        (
            isr.load(Ordering::Acquire),
            config.load(Ordering::Acquire),
            vectors.map(|v| v.load(Ordering::Acquire)).collect(),
        )
    }

    /// Whether a saved state can be of this function: what is wrong with it, if not.
    pub(crate) fn check(
        &self,
        (isr, config, queues): (u8, u16, &[u16]),
        count: u16,
    ) -> Result<(), String> {
        if isr & !(QUEUE_INTERRUPT | CONFIG_INTERRUPT) != 0 {
            return Err(format!("ISR status {isr:#x}, which has two bits"));
        }
        if queues.len() != usize::from(count) {
            return Err(format!(
                "vectors for {} queues, the device has {count}",
                queues.len()
            ));
        }
        match queues
            .iter()
            .chain([&config])
            .find(|v| self.valid(**v) != **v)
        {
            Some(vector) => Err(format!(
                "vector {vector}, the table has {} entries",
                self.vectors
            )),
            None => Ok(()),
        }
    }

    /// Takes over what was checked.
    pub(crate) fn restore(&self, isr: u8, config: u16, queues: &[u16]) {
        self.isr.store(isr, Ordering::Release);
        self.set_config_vector(config);
        for (queue, vector) in (0..).zip(queues) {
            self.set_queue_vector(queue, *vector);
        }
    }

    /// Whether a device with a pin would raise it now.
    pub(crate) fn has_interrupt(&self) -> bool {
        !self.sender.is_enabled() && self.isr.load(Ordering::Acquire) != 0
    }

    pub(crate) fn config_vector(&self) -> u16 {
        self.config.load(Ordering::Acquire)
    }

    pub(crate) fn set_config_vector(&self, vector: u16) {
        self.config.store(self.valid(vector), Ordering::Release);
    }

    pub(crate) fn queue_vector(&self, queue: u16) -> u16 {
        let slot = self.queues.get(usize::from(queue));
        slot.map_or(NO_VECTOR, |slot| slot.load(Ordering::Acquire))
    }

    pub(crate) fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(slot) = self.queues.get(usize::from(queue)) {
            slot.store(self.valid(vector), Ordering::Release);
        }
    }

    /// A vector that the table does not have fails to map, and reads as none (section 4.1.5.1.2).
    fn valid(&self, vector: u16) -> u16 {
        if vector < self.vectors {
            vector
        } else {
            NO_VECTOR
        }
    }
}

/// The transport's [`Wires`].
pub(crate) struct PciWires(pub(crate) Arc<Routes>);

impl Wires for PciWires {
    fn queue(&self, queue: u16) {
        let routes = &self.0;
        if routes.sender.is_enabled() {
            // NO_VECTOR is no vector of any table.
            routes.sender.signal(routes.queue_vector(queue));
        } else {
            routes.isr.fetch_or(QUEUE_INTERRUPT, Ordering::AcqRel);
        }
    }

    fn direct(&self, queue: u16) -> Option<IrqLine> {
        let routes = &self.0;
        routes.sender.open_line(routes.queue_vector(queue))
    }

    fn config(&self) {
        let routes = &self.0;
        routes.isr.fetch_or(CONFIG_INTERRUPT, Ordering::AcqRel);
        routes.sender.signal(routes.config_vector());
    }

    fn clear(&self) {
        let Routes {
            sender: _,
            vectors: _,
            isr,
            config,
            queues,
        } = self.0.as_ref();
        isr.store(0, Ordering::Release);
        config.store(NO_VECTOR, Ordering::Release);
        for queue in queues {
            queue.store(NO_VECTOR, Ordering::Release);
        }
    }
}
