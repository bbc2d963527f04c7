//! The core's state, out and in.

use crate::transport_core::{QueueSlot, TransportCore};
use crate::{QueueStateV1, RestoreError, SavedState, TransportStateV1, features, status};

/// What the owner of a machine does with a device on its transport, whichever that is: the one way by which a
/// device is stopped, saved, restored and started again behind its driver's back. The processors are paused.
pub trait TransportControl: Send {
    /// Stops all workers; the driver sees nothing of it.
    fn pause(&mut self);

    /// Starts what was paused or restored.
    fn resume(&mut self);

    /// Device, queues and registers, while paused or before the driver has started the device; else nothing.
    fn save(&self) -> Option<SavedState>;

    /// Takes a saved state over; [`Self::resume`] starts it. For a device that was just made, with the same
    /// back end and in the same place.
    ///
    /// # Errors
    /// The state is of another kind or version, or not one that this device can have here. The device is then
    /// of no more use.
    fn restore(&mut self, saved: &SavedState) -> Result<(), RestoreError>;
}

impl TransportCore {
    /// The state, while paused or before the driver has started the device; else nothing.
    #[must_use]
    pub fn save(&self) -> Option<TransportStateV1> {
        // Exhaustive, so that a new field has to decide whether it is saved.
        let Self {
            device,
            identity: _,
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
            running,
            paused: _,
        } = self;
        running.is_empty().then(|| TransportStateV1 {
            status: *status,
            needs_reset: signals.needs_reset(),
            driver_features: *driver_features,
            device_feature_select: *device_feature_select,
            driver_feature_select: *driver_feature_select,
            queue_select: *queue_select,
            config_generation: signals.generation(),
            queues: queues
                .iter()
                .map(|slot| QueueStateV1 {
                    size: slot.size,
                    enabled: slot.enabled,
                    descriptors_addr: slot.descriptors_addr,
                    available_addr: slot.available_addr,
                    used_addr: slot.used_addr,
                    next_avail: slot.next_avail,
                    next_used: slot.next_used,
                })
                .collect(),
            device: device.save(),
        })
    }

    /// Takes a saved state over; [`Self::resume`] starts it.
    ///
    /// # Errors
    /// The state is not one that this device can have; nothing is changed but perhaps the device itself. Where
    /// rings lie is not looked at: a driver may say anything there, and is told at the next start.
    pub fn restore(&mut self, saved: &TransportStateV1) -> Result<(), RestoreError> {
        if !self.running.is_empty() {
            return Err(RestoreError::Running);
        }
        let TransportStateV1 {
            status,
            needs_reset,
            driver_features,
            device_feature_select,
            driver_feature_select,
            queue_select,
            config_generation,
            queues,
            device,
        } = saved;
        let invalid = |why: String| RestoreError::Invalid {
            kind: self.identity.name.to_owned(),
            why,
        };
        if queues.len() != self.queues.len() {
            return Err(invalid(format!(
                "it has {} queues, the device {}",
                queues.len(),
                self.queues.len()
            )));
        }
        let walk = status::ACKNOWLEDGE
            | status::DRIVER
            | status::DRIVER_OK
            | status::FEATURES_OK
            | status::FAILED;
        if status & !walk != 0
            || status & (status::DRIVER_OK | status::FEATURES_OK) == status::DRIVER_OK
        {
            return Err(invalid(format!(
                "status {status:#x}, which no driver can walk to"
            )));
        }
        for (slot, saved) in self.queues.iter().zip(queues) {
            if !saved.size.is_power_of_two() || saved.size > slot.max_size {
                return Err(invalid(format!(
                    "a queue of {} descriptors, where a power of two up to {} is possible",
                    saved.size, slot.max_size
                )));
            }
        }
        // Before they are agreed upon, a driver may write any.
        if status & status::FEATURES_OK != 0 {
            let foreign = driver_features & !self.offered();
            if foreign != 0 {
                return Err(invalid(format!(
                    "features {foreign:#x} that the device does not have"
                )));
            }
            if driver_features & features::VERSION_1 == 0 {
                return Err(invalid("features agreed upon without VERSION_1".into()));
            }
        }
        self.device.restore(device)?;
        self.status = *status;
        let driver_ok = status & status::DRIVER_OK != 0;
        self.signals
            .restore(*config_generation, *needs_reset, driver_ok);
        self.driver_features = *driver_features;
        self.device_feature_select = *device_feature_select;
        self.driver_feature_select = *driver_feature_select;
        self.queue_select = *queue_select;
        for (slot, saved) in self.queues.iter_mut().zip(queues) {
            *slot = QueueSlot {
                max_size: slot.max_size,
                size: saved.size,
                enabled: saved.enabled,
                descriptors_addr: saved.descriptors_addr,
                available_addr: saved.available_addr,
                used_addr: saved.used_addr,
                next_avail: saved.next_avail,
                next_used: saved.next_used,
            };
        }
        self.paused = true;
        Ok(())
    }
}
