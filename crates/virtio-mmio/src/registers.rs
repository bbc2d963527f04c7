//! The register block of section 4.2.2.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use alveole_interrupts::IrqLine;
use alveole_io_bus::{BusDevice, Outcome};
use alveole_virtio::{QueuePart, RestoreError, SavedState, TransportControl, TransportCore, Wires};

use crate::NOTIFY_OFFSET;
use crate::state::{KIND, MmioStateV1, STATE_VERSION};

/// "virt"
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// Nobody has registered one; QEMU's is as good as any for drivers that print it.
const VENDOR: u32 = u32::from_le_bytes(*b"ALVE");

const MAGIC_VALUE: u64 = 0x00;
const VERSION_OFFSET: u64 = 0x04;
const DEVICE_ID: u64 = 0x08;
const VENDOR_ID: u64 = 0x0c;
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SEL: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SEL: u64 = 0x24;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_SIZE_MAX: u64 = 0x34;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const STATUS: u64 = 0x70;
const QUEUE_DESC: u64 = 0x80;
const QUEUE_DRIVER: u64 = 0x90;
const QUEUE_DEVICE: u64 = 0xa0;
/// High halves of the three addresses.
const HIGH: u64 = 4;
const SHM_LEN_LOW: u64 = 0xb0;
const SHM_BASE_HIGH: u64 = 0xbc;
const QUEUE_RESET: u64 = 0xc0;
const CONFIG_GENERATION: u64 = 0xfc;
const CONFIG: u64 = 0x100;

/// Bits of InterruptStatus.
const USED_BUFFER: u32 = 1;
const CONFIG_CHANGE: u32 = 2;

/// The interrupt line of one device and the register that says what it was for.
pub struct MmioWires {
    line: IrqLine,
    status: Arc<AtomicU32>,
}

impl MmioWires {
    /// Over `line`, which takes edges.
    #[must_use]
    pub fn new(line: IrqLine) -> Self {
        Self {
            line,
            status: Arc::default(),
        }
    }

    fn raise(&self, cause: u32) {
        self.status.fetch_or(cause, Ordering::AcqRel);
        self.line.pulse();
    }
}

impl Wires for MmioWires {
    fn queue(&self, _: u16) {
        self.raise(USED_BUFFER);
    }

    fn config(&self) {
        self.raise(CONFIG_CHANGE);
    }

    fn clear(&self) {
        self.status.store(0, Ordering::Release);
    }
}

/// The registers of one device.
pub struct MmioTransport {
    core: TransportCore,
    line: IrqLine,
    interrupt_status: Arc<AtomicU32>,
}

impl MmioTransport {
    /// Over a core; `make_core` gets the wires to make it with.
    pub fn new(line: IrqLine, make_core: impl FnOnce(Box<dyn Wires>) -> TransportCore) -> Self {
        let wires = MmioWires::new(line.clone());
        let interrupt_status = wires.status.clone();
        Self {
            core: make_core(Box::new(wires)),
            line,
            interrupt_status,
        }
    }

    /// The core behind the registers.
    pub fn core(&mut self) -> &mut TransportCore {
        &mut self.core
    }

    fn read_register(&self, offset: u64) -> u32 {
        let core = &self.core;
        match offset {
            MAGIC_VALUE => MAGIC,
            VERSION_OFFSET => VERSION,
            DEVICE_ID => u32::from(core.identity().device_id),
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => core.device_features(),
            QUEUE_SIZE_MAX => u32::from(core.queue_max_size()),
            QUEUE_READY => u32::from(core.queue_is_enabled()),
            INTERRUPT_STATUS => self.interrupt_status.load(Ordering::Acquire),
            STATUS => u32::from(core.status()),
            CONFIG_GENERATION => core.config_generation(),
            // Section 4.2.2.1: a region that does not exist has length and base of all ones.
            SHM_LEN_LOW..=SHM_BASE_HIGH => u32::MAX,
            // A queue reset is over when the write that asks for it returns; the rest is write-only,
            // or nothing.
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        let core = &mut self.core;
        match offset {
            DEVICE_FEATURES_SEL => core.select_device_features(value),
            DRIVER_FEATURES => core.set_driver_features(value),
            DRIVER_FEATURES_SEL => core.select_driver_features(value),
            QUEUE_SEL => core.select_queue(u16::try_from(value).unwrap_or(u16::MAX)),
            QUEUE_SIZE => core.set_queue_size(u16::try_from(value).unwrap_or(0)),
            QUEUE_READY => match value {
                0 if core.queue_is_enabled() => core.reset_queue(),
                1 => core.enable_queue(),
                _ => {}
            },
            NOTIFY_OFFSET => {
                if let Ok(queue) = u16::try_from(value) {
                    core.ring(queue);
                }
            }
            INTERRUPT_ACK => {
                self.interrupt_status.fetch_and(!value, Ordering::AcqRel);
            }
            // Bits above the status are nobody's.
            STATUS => core.set_status((value & 0xff) as u8),
            QUEUE_RESET if value == 1 => core.reset_queue(),
            _ => {
                for (base, part) in [
                    (QUEUE_DESC, QueuePart::Descriptors),
                    (QUEUE_DRIVER, QueuePart::Available),
                    (QUEUE_DEVICE, QueuePart::Used),
                ] {
                    let value = u64::from(value);
                    let old = core.queue_addr(part);
                    if offset == base {
                        core.set_queue_addr(part, (old & !0xffff_ffff) | value);
                    } else if Some(offset) == base.checked_add(HIGH) {
                        core.set_queue_addr(part, (old & 0xffff_ffff) | (value << 32));
                    }
                }
            }
        }
    }
}

impl TransportControl for MmioTransport {
    fn pause(&mut self) {
        self.core.pause();
    }

    fn resume(&mut self) {
        self.core.resume();
        // The edge may have been on its way when the state was saved. One too many does no harm: the register
        // says what it was for.
        if self.interrupt_status.load(Ordering::Acquire) != 0 {
            self.line.pulse();
        }
    }

    fn save(&self) -> Option<SavedState> {
        // Exhaustive, so that a new field has to decide whether it is saved.
        let Self {
            core,
            line: _,
            interrupt_status,
        } = self;
        let state = MmioStateV1 {
            core: core.save()?,
            interrupt_status: interrupt_status.load(Ordering::Acquire),
        };
        Some(SavedState::pack(KIND, STATE_VERSION, &state))
    }

    fn restore(&mut self, saved: &SavedState) -> Result<(), RestoreError> {
        let MmioStateV1 {
            core,
            interrupt_status,
        } = saved.unpack(KIND, STATE_VERSION)?;
        if interrupt_status & !(USED_BUFFER | CONFIG_CHANGE) != 0 {
            return Err(RestoreError::Invalid {
                kind: KIND.into(),
                why: format!("interrupt status {interrupt_status:#x}, which has two bits"),
            });
        }
        self.core.restore(&core)?;
        self.interrupt_status
            .store(interrupt_status, Ordering::Release);
        Ok(())
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Outcome {
        if let Some(at) = offset.checked_sub(CONFIG) {
            self.core
                .read_config(u32::try_from(at).unwrap_or(u32::MAX), into);
            return Outcome::Done;
        }
        // Section 4.2.2.2: a driver uses nothing but aligned 32-bit accesses here.
        if into.len() != 4 || !offset.is_multiple_of(4) {
            return Outcome::Refused;
        }
        into.copy_from_slice(&self.read_register(offset).to_le_bytes());
        Outcome::Done
    }

    fn write(&mut self, offset: u64, from: &[u8]) -> Outcome {
        if let Some(at) = offset.checked_sub(CONFIG) {
            self.core
                .write_config(u32::try_from(at).unwrap_or(u32::MAX), from);
            return Outcome::Done;
        }
        match <[u8; 4]>::try_from(from) {
            Ok(bytes) if offset.is_multiple_of(4) => {
                self.write_register(offset, u32::from_le_bytes(bytes));
                Outcome::Done
            }
            _ => Outcome::Refused,
        }
    }
}
