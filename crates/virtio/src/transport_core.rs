//! The state of one device between its transport's registers and its workers.

mod saving;

use std::sync::Arc;

use alveole_guest_memory::GuestRam;
use alveole_interrupts::Doorbell;
use virtio_queue::{Queue, QueueState};

pub use saving::TransportControl;

use crate::hosting::Hosted;
use crate::{
    ConfigIrq, Hosting, Identity, LiveQueue, Signals, StartError, StartKit, VirtioDevice, features,
    status,
};

/// Section 2.7: alignment of the three parts of a split virtqueue.
const DESCRIPTORS_ALIGN: u64 = 16;
const AVAILABLE_ALIGN: u64 = 2;
const USED_ALIGN: u64 = 4;

/// What every transport shares. See the crate's head.
///
/// Used under the bus's lock of the transport's registers. [`Self::set_status`], [`Self::reset_queue`]
/// and their like wait for the event loop that hosts the workers; that loop never waits for anybody.
pub struct TransportCore {
    device: Box<dyn VirtioDevice>,
    identity: Identity,
    ram: GuestRam,
    doorbells: Vec<Doorbell>,
    signals: Arc<Signals>,
    hosting: Hosting,
    status: u8,
    driver_features: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
    queues: Vec<QueueSlot>,
    running: Vec<Hosted>,
    paused: bool,
}

/// What a driver has set up for one queue, and how far it came when it stopped last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct QueueSlot {
    max_size: u16,
    size: u16,
    enabled: bool,
    descriptors_addr: u64,
    available_addr: u64,
    used_addr: u64,
    next_avail: u16,
    next_used: u16,
}

impl QueueSlot {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            enabled: false,
            descriptors_addr: 0,
            available_addr: 0,
            used_addr: 0,
            next_avail: 0,
            next_used: 0,
        }
    }
}

/// One of the three addresses of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueuePart {
    /// The descriptor table.
    Descriptors,
    /// The available ring (driver area).
    Available,
    /// The used ring (device area).
    Used,
}

impl TransportCore {
    /// A device as it is after a reset. `doorbells` are as many as the device has queues, `signals` is over
    /// the transport's wires.
    #[must_use]
    pub fn new(
        mut device: Box<dyn VirtioDevice>,
        ram: GuestRam,
        doorbells: Vec<Doorbell>,
        signals: Arc<Signals>,
        hosting: Hosting,
    ) -> Self {
        device.connect(ConfigIrq(signals.clone()));
        let identity = device.identity();
        let queues = identity.queue_sizes.iter().copied();
        Self {
            queues: queues.map(QueueSlot::new).collect(),
            identity,
            device,
            ram,
            doorbells,
            signals,
            hosting,
            status: 0,
            driver_features: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            running: Vec::new(),
            paused: false,
        }
    }

    /// What the device is.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// How often the device had to be given up.
    #[must_use]
    pub fn signals(&self) -> &Arc<Signals> {
        &self.signals
    }

    // Features -----------------------------------------------------------------------------------

    fn offered(&self) -> u64 {
        self.identity.features | features::OF_EVERY_DEVICE
    }

    /// Selects which 32 of the offered features are shown.
    pub fn select_device_features(&mut self, select: u32) {
        self.device_feature_select = select;
    }

    /// The selection of [`Self::select_device_features`].
    #[must_use]
    pub fn device_feature_select(&self) -> u32 {
        self.device_feature_select
    }

    /// The selected 32 offered features.
    #[must_use]
    pub fn device_features(&self) -> u32 {
        half(self.offered(), self.device_feature_select)
    }

    /// Selects which 32 of its features the driver writes.
    pub fn select_driver_features(&mut self, select: u32) {
        self.driver_feature_select = select;
    }

    /// The selection of [`Self::select_driver_features`].
    #[must_use]
    pub fn driver_feature_select(&self) -> u32 {
        self.driver_feature_select
    }

    /// The selected 32 of the driver's features.
    #[must_use]
    pub fn driver_features(&self) -> u32 {
        half(self.driver_features, self.driver_feature_select)
    }

    /// Takes 32 of the driver's features; ignored once features are agreed upon.
    pub fn set_driver_features(&mut self, value: u32) {
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        let value = u64::from(value);
        match self.driver_feature_select {
            0 => self.driver_features = (self.driver_features & !0xffff_ffff) | value,
            1 => self.driver_features = (self.driver_features & 0xffff_ffff) | (value << 32),
            // There are no features beyond 64 yet: none was offered.
            _ => {}
        }
    }

    /// Whether both sides have agreed on `feature`.
    #[must_use]
    pub fn has(&self, feature: u64) -> bool {
        self.status & status::FEATURES_OK != 0 && self.driver_features & feature != 0
    }

    // Status -------------------------------------------------------------------------------------

    /// The device status.
    #[must_use]
    pub fn status(&self) -> u8 {
        if self.signals.needs_reset() {
            self.status | status::NEEDS_RESET
        } else {
            self.status
        }
    }

    /// Takes a write to the device status (section 2.1): zero resets, new bits are steps of the walk,
    /// bits that are left out stay.
    pub fn set_status(&mut self, value: u8) {
        if value == 0 {
            self.reset();
            return;
        }
        let new = value & !self.status;
        self.status |= new & (status::ACKNOWLEDGE | status::DRIVER | status::FAILED);
        if new & status::FEATURES_OK != 0 && self.features_are_fine() {
            self.status |= status::FEATURES_OK;
        }
        if new & status::DRIVER_OK != 0
            && self.status & status::FEATURES_OK != 0
            && !self.signals.needs_reset()
        {
            let queues: Vec<u16> = self.enabled_queues();
            // Only what really runs is reported.
            if self.serve(&queues) {
                self.status |= status::DRIVER_OK;
                self.signals.driver_ok();
            }
        }
    }

    fn features_are_fine(&self) -> bool {
        // Section 6.1: a device here does not speak the older versions.
        self.driver_features & !self.offered() == 0
            && self.driver_features & features::VERSION_1 != 0
    }

    /// Stops everything and forgets what the driver has said.
    pub fn reset(&mut self) {
        self.stop(|_| true);
        self.device.reset();
        let identity = self.device.identity();
        // Exhaustive, so that a new field has to decide what a reset does to it.
        let Self {
            device: _,
            identity: own_identity,
            ram: _,
            doorbells: _,
            signals,
            hosting: _,
            status,
            driver_features,
            device_feature_select,
            driver_feature_select,
            queue_select,
            queues,
            running: _,
            paused: _,
        } = self;
        *status = 0;
        *driver_features = 0;
        *device_feature_select = 0;
        *driver_feature_select = 0;
        *queue_select = 0;
        for slot in queues.iter_mut() {
            *slot = QueueSlot::new(slot.max_size);
        }
        *own_identity = identity;
        signals.reset();
    }

    // Queues -------------------------------------------------------------------------------------

    /// Number of queues.
    #[must_use]
    pub fn queue_count(&self) -> u16 {
        u16::try_from(self.queues.len()).unwrap_or(u16::MAX)
    }

    /// Selects the queue that the queue registers belong to.
    pub fn select_queue(&mut self, queue: u16) {
        self.queue_select = queue;
    }

    /// The selected queue.
    #[must_use]
    pub fn queue_select(&self) -> u16 {
        self.queue_select
    }

    fn slot(&self) -> Option<&QueueSlot> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The selected queue, while it may be changed.
    fn slot_in_setup(&mut self) -> Option<&mut QueueSlot> {
        self.queues
            .get_mut(usize::from(self.queue_select))
            .filter(|slot| !slot.enabled)
    }

    /// Largest size of the selected queue; 0 where there is none.
    #[must_use]
    pub fn queue_max_size(&self) -> u16 {
        self.slot().map_or(0, |slot| slot.max_size)
    }

    /// Size of the selected queue; 0 where there is none.
    #[must_use]
    pub fn queue_size(&self) -> u16 {
        self.slot().map_or(0, |slot| slot.size)
    }

    /// Sets the size of the selected queue. Sizes that are not a power of two or too large are ignored.
    pub fn set_queue_size(&mut self, size: u16) {
        if let Some(slot) = self.slot_in_setup()
            && size.is_power_of_two()
            && size <= slot.max_size
        {
            slot.size = size;
        }
    }

    /// An address of the selected queue; 0 where there is none.
    #[must_use]
    pub fn queue_addr(&self, part: QueuePart) -> u64 {
        self.slot().map_or(0, |slot| match part {
            QueuePart::Descriptors => slot.descriptors_addr,
            QueuePart::Available => slot.available_addr,
            QueuePart::Used => slot.used_addr,
        })
    }

    /// Sets an address of the selected queue. It is checked when the queue starts.
    pub fn set_queue_addr(&mut self, part: QueuePart, addr: u64) {
        if let Some(slot) = self.slot_in_setup() {
            match part {
                QueuePart::Descriptors => slot.descriptors_addr = addr,
                QueuePart::Available => slot.available_addr = addr,
                QueuePart::Used => slot.used_addr = addr,
            }
        }
    }

    /// Whether the selected queue is enabled.
    #[must_use]
    pub fn queue_is_enabled(&self) -> bool {
        self.slot().is_some_and(|slot| slot.enabled)
    }

    /// Enables the selected queue. It is served from DRIVER_OK on, or at once when that is past.
    pub fn enable_queue(&mut self) {
        let queue = self.queue_select;
        let Some(slot) = self.slot_in_setup() else {
            return;
        };
        slot.enabled = true;
        if self.status & status::DRIVER_OK != 0 && !self.signals.needs_reset() {
            self.serve(&[queue]);
        }
    }

    /// Stops the selected queue and forgets its set-up (section 2.6.1, and QueueReady of 4.2.2.2).
    pub fn reset_queue(&mut self) {
        let queue = self.queue_select;
        if self.slot().is_none() {
            return;
        }
        let rest = self.stop(|queues| queues.contains(&queue));
        if let Some(slot) = self.queues.get_mut(usize::from(queue)) {
            *slot = QueueSlot::new(slot.max_size);
        }
        // Others that the same worker served go on.
        let rest: Vec<u16> = rest.into_iter().filter(|q| *q != queue).collect();
        if !rest.is_empty() && !self.signals.needs_reset() {
            self.serve(&rest);
        }
    }

    /// Rings the doorbell of `queue`, for a notification that came as an exit.
    pub fn ring(&self, queue: u16) {
        if let Some(bell) = self.doorbells.get(usize::from(queue)) {
            bell.ring();
        }
    }

    fn enabled_queues(&self) -> Vec<u16> {
        (0u16..)
            .zip(&self.queues)
            .filter_map(|(index, slot)| slot.enabled.then_some(index))
            .collect()
    }

    // Configuration space ------------------------------------------------------------------------

    /// The generation of the configuration space.
    #[must_use]
    pub fn config_generation(&self) -> u32 {
        self.signals.generation()
    }

    /// Copies the configuration space from `at` on; zeros behind its end.
    pub fn read_config(&self, at: u32, into: &mut [u8]) {
        into.fill(0);
        let left = self.identity.config_len.saturating_sub(at);
        let len = into.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        if let Some(into) = into.get_mut(..len)
            && len > 0
        {
            self.device.read_config(at, into);
        }
    }

    /// Takes a write to the configuration space; ignored where it passes its end.
    pub fn write_config(&mut self, at: u32, from: &[u8]) {
        let len = u32::try_from(from.len()).unwrap_or(u32::MAX);
        if at
            .checked_add(len)
            .is_some_and(|end| end <= self.identity.config_len)
        {
            self.device.write_config(at, from);
        }
    }

    // Service ------------------------------------------------------------------------------------

    /// Starts these queues, all or none; says so and sets NEEDS_RESET where that fails.
    fn serve(&mut self, queues: &[u16]) -> bool {
        match self.start(queues) {
            Ok(()) => true,
            Err(e) => {
                self.stop(|hosted| hosted.iter().any(|q| queues.contains(q)));
                self.signals.say(self.identity.name, &e);
                self.signals.need_reset();
                false
            }
        }
    }

    fn start(&mut self, queues: &[u16]) -> Result<(), StartError> {
        if queues.is_empty() {
            return Ok(());
        }
        let live = queues
            .iter()
            .map(|index| self.live_queue(*index))
            .collect::<Result<Vec<_>, _>>()?;
        let workers = self.device.start(StartKit {
            ram: self.ram.clone(),
            features: self.driver_features,
            queues: live,
            longest_look: self.hosting.longest_look(),
        })?;
        for worker in workers {
            // An attach is over when the worker's descriptors are watched.
            self.running.push(self.hosting.attach(worker)?);
        }
        // What came while nobody listened: requests from before DRIVER_OK, or during a pause.
        for queue in queues {
            self.ring(*queue);
        }
        Ok(())
    }

    fn live_queue(&self, index: u16) -> Result<LiveQueue, StartError> {
        let bad = |why: String| StartError::BadQueue { queue: index, why };
        let at = usize::from(index);
        let (Some(slot), Some(doorbell)) = (self.queues.get(at), self.doorbells.get(at)) else {
            return Err(bad("there is no such queue".into()));
        };
        let size = u64::from(slot.size);
        // Sections 2.7.5, 2.7.6 and 2.7.8, with the two bytes of the event index.
        let parts = [
            (
                "descriptor table",
                slot.descriptors_addr,
                size.saturating_mul(16),
                DESCRIPTORS_ALIGN,
            ),
            (
                "available ring",
                slot.available_addr,
                size.saturating_mul(2).saturating_add(6),
                AVAILABLE_ALIGN,
            ),
            (
                "used ring",
                slot.used_addr,
                size.saturating_mul(8).saturating_add(6),
                USED_ALIGN,
            ),
        ];
        for (name, addr, len, align) in parts {
            if !addr.is_multiple_of(align) {
                return Err(bad(format!(
                    "its {name} at {addr:#x} is not aligned to {align}"
                )));
            }
            if !self.ram.contains(addr, len) {
                return Err(bad(format!(
                    "its {name} at {addr:#x}+{len:#x} is not in guest memory"
                )));
            }
        }
        let queue = Queue::try_from(QueueState {
            max_size: slot.max_size,
            next_avail: slot.next_avail,
            next_used: slot.next_used,
            event_idx_enabled: self.driver_features & features::EVENT_IDX != 0,
            size: slot.size,
            ready: true,
            desc_table: slot.descriptors_addr,
            avail_ring: slot.available_addr,
            used_ring: slot.used_addr,
        })
        .map_err(|e| bad(e.to_string()))?;
        Ok(LiveQueue::new(
            index,
            queue,
            self.ram.clone(),
            doorbell.clone(),
            self.signals.clone(),
            self.identity.name,
        ))
    }

    /// Stops the workers whose queues match, keeps where they stopped, and tells which queues they served.
    fn stop(&mut self, matches: impl Fn(&[u16]) -> bool) -> Vec<u16> {
        let (stopping, going_on) = std::mem::take(&mut self.running)
            .into_iter()
            .partition(|hosted: &Hosted| matches(&hosted.queues));
        self.running = going_on;
        let mut stopped = Vec::new();
        for hosted in stopping {
            stopped.extend_from_slice(&hosted.queues);
            for progress in hosted.stop() {
                if let Some(slot) = self.queues.get_mut(usize::from(progress.queue)) {
                    slot.next_avail = progress.next_avail;
                    slot.next_used = progress.next_used;
                }
            }
        }
        stopped
    }

    // Pause and resume -----------------------------------------------------------------------

    /// Stops all workers; the driver sees nothing of it. The processors are paused.
    pub fn pause(&mut self) {
        self.stop(|_| true);
        self.paused = true;
    }

    /// Starts what [`Self::pause`] stopped, or what was restored.
    pub fn resume(&mut self) {
        self.paused = false;
        if self.status & status::DRIVER_OK != 0
            && !self.signals.needs_reset()
            && self.running.is_empty()
        {
            let queues = self.enabled_queues();
            self.serve(&queues);
        }
    }
}

impl Drop for TransportCore {
    /// Workers must not outlive the device they are lent from.
    fn drop(&mut self) {
        self.stop(|_| true);
    }
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => (features & 0xffff_ffff) as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
