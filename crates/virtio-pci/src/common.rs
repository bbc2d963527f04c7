//! The common configuration structure of section 4.1.4.3.

use alveole_virtio::{QueuePart, TransportCore};

use crate::routes::{NO_VECTOR, Routes};

/// One register: a field, or one half of a field of 64 bits. Drivers access each in its own width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Register {
    DeviceFeatureSelect,
    DeviceFeature,
    DriverFeatureSelect,
    DriverFeature,
    ConfigMsixVector,
    NumQueues,
    DeviceStatus,
    ConfigGeneration,
    QueueSelect,
    QueueSize,
    QueueMsixVector,
    QueueEnable,
    QueueNotifyOff,
    AddrLow(QueuePart),
    AddrHigh(QueuePart),
    /// queue_notify_data, admin_queue_index, admin_queue_num: of features that are not offered.
    Absent,
    QueueReset,
}

impl Register {
    /// The register of so many bytes at `offset`.
    pub(crate) fn at(offset: u64, len: usize) -> Option<Self> {
        use Register::*;
        let (register, bytes) = match offset {
            0x00 => (DeviceFeatureSelect, 4),
            0x04 => (DeviceFeature, 4),
            0x08 => (DriverFeatureSelect, 4),
            0x0c => (DriverFeature, 4),
            0x10 => (ConfigMsixVector, 2),
            0x12 => (NumQueues, 2),
            0x14 => (DeviceStatus, 1),
            0x15 => (ConfigGeneration, 1),
            0x16 => (QueueSelect, 2),
            0x18 => (QueueSize, 2),
            0x1a => (QueueMsixVector, 2),
            0x1c => (QueueEnable, 2),
            0x1e => (QueueNotifyOff, 2),
            0x20 => (AddrLow(QueuePart::Descriptors), 4),
            0x24 => (AddrHigh(QueuePart::Descriptors), 4),
            0x28 => (AddrLow(QueuePart::Available), 4),
            0x2c => (AddrHigh(QueuePart::Available), 4),
            0x30 => (AddrLow(QueuePart::Used), 4),
            0x34 => (AddrHigh(QueuePart::Used), 4),
            0x38 | 0x3c | 0x3e => (Absent, 2),
            0x3a => (QueueReset, 2),
            _ => return None,
        };
        (bytes == len).then_some(register)
    }
}

/// Whether an access is to both halves of an address at once.
pub(crate) fn is_wide(offset: u64, len: usize) -> bool {
    let halves = (Register::at(offset, 4), len);
    matches!(halves, (Some(Register::AddrLow(_)), 8))
}

/// The generation as drivers see it: eight bits that change when a driver looks and something is new, so
/// that not even 256 changes between two looks are missed (section 4.1.4.3.1).
#[derive(Debug, Default)]
pub(crate) struct Generation {
    shown: u8,
    seen: u32,
}

impl Generation {
    /// What is shown, and what was seen.
    pub(crate) fn save(&self) -> (u8, u32) {
        let Self { shown, seen } = *self;
        (shown, seen)
    }

    pub(crate) fn restored(shown: u8, seen: u32) -> Self {
        Self { shown, seen }
    }

    pub(crate) fn look(&mut self, core: &TransportCore) -> u8 {
        let now = core.config_generation();
        if now != self.seen {
            self.seen = now;
            self.shown = self.shown.wrapping_add(1);
        }
        self.shown
    }
}

pub(crate) fn read(
    core: &TransportCore,
    routes: &Routes,
    generation: &mut Generation,
    register: Register,
) -> u32 {
    match register {
        Register::DeviceFeatureSelect => core.device_feature_select(),
        Register::DeviceFeature => core.device_features(),
        Register::DriverFeatureSelect => core.driver_feature_select(),
        Register::DriverFeature => core.driver_features(),
        Register::ConfigMsixVector => u32::from(routes.config_vector()),
        Register::NumQueues => u32::from(core.queue_count()),
        Register::DeviceStatus => u32::from(core.status()),
        Register::ConfigGeneration => u32::from(generation.look(core)),
        Register::QueueSelect => u32::from(core.queue_select()),
        Register::QueueSize => u32::from(core.queue_size()),
        Register::QueueMsixVector => u32::from(routes.queue_vector(core.queue_select())),
        Register::QueueEnable => u32::from(core.queue_is_enabled()),
        // In units of the multiplier: the queue's own number.
        Register::QueueNotifyOff if core.queue_max_size() != 0 => u32::from(core.queue_select()),
        Register::AddrLow(part) => (core.queue_addr(part) & 0xffff_ffff) as u32,
        Register::AddrHigh(part) => (core.queue_addr(part) >> 32) as u32,
        // A queue reset is over when the write that asks for it returns.
        Register::QueueReset | Register::QueueNotifyOff | Register::Absent => 0,
    }
}

pub(crate) fn write(core: &mut TransportCore, routes: &Routes, register: Register, value: u32) {
    let word = (value & 0xffff) as u16;
    match register {
        Register::DeviceFeatureSelect => core.select_device_features(value),
        Register::DriverFeatureSelect => core.select_driver_features(value),
        Register::DriverFeature => core.set_driver_features(value),
        Register::ConfigMsixVector => routes.set_config_vector(word),
        Register::DeviceStatus => core.set_status((value & 0xff) as u8),
        Register::QueueSelect => core.select_queue(word),
        Register::QueueSize => core.set_queue_size(word),
        Register::QueueMsixVector if core.queue_max_size() != 0 => {
            routes.set_queue_vector(core.queue_select(), word);
            core.signals().routes_changed();
        }
        Register::QueueEnable if word == 1 => core.enable_queue(),
        Register::AddrLow(part) => {
            let high = core.queue_addr(part) & !0xffff_ffff;
            core.set_queue_addr(part, high | u64::from(value));
        }
        Register::AddrHigh(part) => {
            let low = core.queue_addr(part) & 0xffff_ffff;
            core.set_queue_addr(part, low | (u64::from(value) << 32));
        }
        Register::QueueReset if word == 1 => {
            core.reset_queue();
            routes.set_queue_vector(core.queue_select(), NO_VECTOR);
        }
        // Read-only, or a value that means nothing.
        Register::DeviceFeature
        | Register::NumQueues
        | Register::ConfigGeneration
        | Register::QueueMsixVector
        | Register::QueueEnable
        | Register::QueueNotifyOff
        | Register::QueueReset
        | Register::Absent => {}
    }
}
