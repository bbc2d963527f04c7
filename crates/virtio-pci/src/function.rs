//! One device as a PCI function.

use std::sync::Arc;

use alveole_interrupts::MsiVector;
use alveole_io_bus::{BusDevice, Outcome};
use alveole_pci::{ConfigSpace, Function, Ids, MsixTable, PciError};
use alveole_virtio::{RestoreError, SavedState, TransportControl, TransportCore, Wires};

use crate::common::{self, Generation, Register};
use crate::layout::{
    BAR_BYTES, COMMON, COMMON_BYTES, DEVICE, DEVICE_BYTES, ISR, ISR_BYTES, MAX_QUEUES, MAX_VECTORS,
    MSIX_PENDING, MSIX_TABLE, NOTIFY, NOTIFY_MULTIPLIER, Part, notify_offset, part_at,
};
use crate::routes::{PciWires, Routes};
use crate::state::{KIND, PciStateV1, VERSION};

const VENDOR: u16 = 0x1af4;
/// PCI device ids are this plus the virtio device type.
const FIRST_DEVICE: u16 = 0x1040;
/// Subsystem ids likewise; from here on no legacy driver takes the device for its own.
const FIRST_SUBSYSTEM: u16 = 0x40;
const REVISION: u8 = 1;
/// The register of the one BAR, and what the capabilities call it.
const BAR: u8 = 0;

const VENDOR_CAPABILITY: u8 = 0x09;
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;
/// Length of a virtio capability (struct virtio_pci_cap).
const CAPABILITY_BYTES: u8 = 16;
/// Fields of the configuration access capability, from its start.
const WINDOW_BAR: u16 = 4;
const WINDOW_OFFSET: u16 = 8;
const WINDOW_LENGTH: u16 = 12;
const WINDOW_DATA: u16 = 16;
const WINDOW_DATA_BYTES: u16 = 4;

/// Why a device cannot be a PCI function.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PciTransportError {
    /// The function itself.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// More than the BAR has room for.
    #[error(
        "a device with {queues} queues, {vectors} interrupt vectors and {config_len} bytes of configuration: at most {MAX_QUEUES}, {MAX_VECTORS} and {DEVICE_BYTES} fit"
    )]
    TooLarge {
        /// Queues.
        queues: u16,
        /// Vectors.
        vectors: usize,
        /// Bytes of configuration.
        config_len: u32,
    },
}

/// A device as a PCI function: its configuration space ([`Function`]) and its BAR ([`BusDevice`]).
pub struct PciTransport {
    core: TransportCore,
    space: ConfigSpace,
    msix: MsixTable,
    routes: Arc<Routes>,
    generation: Generation,
    /// Where the configuration access capability is.
    window: u16,
}

impl PciTransport {
    /// A function whose BAR is at `bar_addr`, a multiple of [`BAR_BYTES`]; `make_core` gets the wires to
    /// make the core with. The owner places it there and puts it on the root bus.
    ///
    /// # Errors
    /// The address is not such a multiple, or there are no vectors, or too much of anything.
    pub fn new(
        bar_addr: u64,
        vectors: Vec<MsiVector>,
        make_core: impl FnOnce(Box<dyn Wires>) -> TransportCore,
    ) -> Result<Self, PciTransportError> {
        let count = vectors.len();
        // The core needs the wires, they need the table, and that a space: the ids come last.
        let mut space = ConfigSpace::new(&Ids {
            vendor: VENDOR,
            device: FIRST_DEVICE,
            revision: REVISION,
            class: 0,
            subsystem_vendor: VENDOR,
            subsystem: FIRST_SUBSYSTEM,
        });
        space.add_memory_bar(usize::from(BAR), bar_addr, BAR_BYTES)?;
        let table = low(MSIX_TABLE);
        let msix = MsixTable::new(vectors, &mut space, BAR, table, low(MSIX_PENDING))?;
        let routes = Routes::new(msix.sender(), u16::try_from(count).unwrap_or(0));
        let core = make_core(Box::new(PciWires(routes.clone())));
        let (id, config_len) = (core.identity().device_id, core.identity().config_len);
        let queues = core.queue_count();
        if queues > MAX_QUEUES || count > MAX_VECTORS || u64::from(config_len) > DEVICE_BYTES {
            return Err(PciTransportError::TooLarge {
                queues,
                vectors: count,
                config_len,
            });
        }
        space.set_ids(&Ids {
            vendor: VENDOR,
            device: FIRST_DEVICE.saturating_add(id),
            revision: REVISION,
            class: class_of(id),
            subsystem_vendor: VENDOR,
            subsystem: FIRST_SUBSYSTEM.saturating_add(id),
        });
        add(&mut space, COMMON_CFG, COMMON, COMMON_BYTES, &[])?;
        add(&mut space, ISR_CFG, ISR, ISR_BYTES, &[])?;
        if config_len > 0 {
            add(&mut space, DEVICE_CFG, DEVICE, config_len.into(), &[])?;
        }
        let bells = notify_offset(queues.max(1)).saturating_sub(NOTIFY);
        let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
        add(&mut space, NOTIFY_CFG, NOTIFY, bells, &multiplier)?;
        let window = add(&mut space, PCI_CFG, 0, 0, &[0; 4])?;
        Ok(Self {
            core,
            space,
            msix,
            routes,
            generation: Generation::default(),
            window,
        })
    }

    /// The core behind the registers.
    pub fn core(&mut self) -> &mut TransportCore {
        &mut self.core
    }

    /// How often the guest has tried to move the BAR.
    #[must_use]
    pub fn moves_refused(&self) -> u64 {
        self.space.moves_refused()
    }

    /// What the window of the configuration access capability shows: an offset in the BAR and a length, if
    /// the driver has set it to something that virtio registers can be behind.
    fn window_target(&self) -> Option<(u64, usize)> {
        let field = |at: u16| {
            let mut bytes = [0; 4];
            self.space.read(self.window.saturating_add(at), &mut bytes);
            u32::from_le_bytes(bytes)
        };
        let len = usize::try_from(field(WINDOW_LENGTH)).ok()?;
        let offset = u64::from(field(WINDOW_OFFSET));
        let [bar, ..] = field(WINDOW_BAR).to_le_bytes();
        let fits = bar == BAR && matches!(len, 1 | 2 | 4);
        let aligned = offset.is_multiple_of(u64::try_from(len.max(1)).ok()?);
        (fits && aligned && offset < MSIX_TABLE).then_some((offset, len))
    }

    fn touches_window_data(&self, offset: u16, len: usize) -> bool {
        let data = self.window.saturating_add(WINDOW_DATA);
        let end = usize::from(offset).saturating_add(len);
        end > usize::from(data) && offset < data.saturating_add(WINDOW_DATA_BYTES)
    }

    fn read_bar(&mut self, offset: u64, into: &mut [u8]) -> Outcome {
        if let (true, Some((low, high))) =
            (is_wide(offset, into.len()), into.split_at_mut_checked(4))
        {
            let _ = self.read_bar(offset, low);
            return self.read_bar(offset.saturating_add(4), high);
        }
        match part_at(offset, into.len()) {
            Some((Part::Common, at)) => {
                let Some(register) = Register::at(at, into.len()) else {
                    return Outcome::Refused;
                };
                let generation = &mut self.generation;
                let value = common::read(&self.core, &self.routes, generation, register);
                for (place, byte) in into.iter_mut().zip(value.to_le_bytes()) {
                    *place = byte;
                }
            }
            Some((Part::Isr, _)) => into.fill(self.routes.take_isr()),
            Some((Part::Device, at)) => {
                self.generation.look(&self.core);
                let at = u32::try_from(at).unwrap_or(u32::MAX);
                self.core.read_config(at, into);
            }
            Some((Part::Notify, _)) => into.fill(0),
            Some((Part::MsixTable, at)) => return self.msix.read_table(at, into),
            Some((Part::MsixPending, at)) => return self.msix.read_pending(at, into),
            None => return Outcome::Refused,
        }
        Outcome::Done
    }

    fn write_bar(&mut self, offset: u64, from: &[u8]) -> Outcome {
        if let (true, Some((low, high))) = (is_wide(offset, from.len()), from.split_at_checked(4)) {
            let _ = self.write_bar(offset, low);
            return self.write_bar(offset.saturating_add(4), high);
        }
        match part_at(offset, from.len()) {
            Some((Part::Common, at)) => {
                let Some(register) = Register::at(at, from.len()) else {
                    return Outcome::Refused;
                };
                let mut value = [0; 4];
                for (place, byte) in value.iter_mut().zip(from) {
                    *place = *byte;
                }
                let value = u32::from_le_bytes(value);
                common::write(&mut self.core, &self.routes, register, value);
            }
            Some((Part::Device, at)) => {
                let at = u32::try_from(at).unwrap_or(u32::MAX);
                self.core.write_config(at, from);
            }
            // The address says which queue, whatever is written, as for a doorbell.
            Some((Part::Notify, at)) => match at.checked_div(u64::from(NOTIFY_MULTIPLIER)) {
                Some(queue) if at.is_multiple_of(u64::from(NOTIFY_MULTIPLIER)) => {
                    self.core.ring(u16::try_from(queue).unwrap_or(u16::MAX));
                }
                _ => return Outcome::Refused,
            },
            Some((Part::MsixTable, at)) => {
                let outcome = self.msix.write_table(at, from);
                self.core.signals().routes_changed();
                return outcome;
            }
            // Read-only.
            Some((Part::Isr | Part::MsixPending, _)) => {}
            None => return Outcome::Refused,
        }
        Outcome::Done
    }
}

impl TransportControl for PciTransport {
    fn pause(&mut self) {
        self.core.pause();
    }

    fn resume(&mut self) {
        self.core.resume();
    }

    fn save(&self) -> Option<SavedState> {
        // Exhaustive, so that a new field has to decide whether it is saved.
        let Self {
            core,
            space,
            msix,
            routes,
            generation,
            window: _,
        } = self;
        let (isr, config_vector, queue_vectors) = routes.save(core.queue_count());
        let (shown_generation, seen_generation) = generation.save();
        let state = PciStateV1 {
            core: core.save()?,
            space: space.save(),
            msix: msix.save(),
            isr,
            config_vector,
            queue_vectors,
            shown_generation,
            seen_generation,
        };
        Some(SavedState::pack(KIND, VERSION, &state))
    }

    fn restore(&mut self, saved: &SavedState) -> Result<(), RestoreError> {
        let PciStateV1 {
            core,
            space,
            msix,
            isr,
            config_vector,
            queue_vectors,
            shown_generation,
            seen_generation,
        } = saved.unpack(KIND, VERSION)?;
        let invalid = |why: String| RestoreError::Invalid {
            kind: KIND.into(),
            why,
        };
        let routes = (isr, config_vector, queue_vectors.as_slice());
        self.routes
            .check(routes, self.core.queue_count())
            .map_err(invalid)?;
        self.msix.check(&msix).map_err(|e| invalid(e.to_string()))?;
        self.core.restore(&core)?;
        self.space
            .restore(&space)
            .map_err(|e| invalid(e.to_string()))?;
        self.routes.restore(isr, config_vector, &queue_vectors);
        self.generation = Generation::restored(shown_generation, seen_generation);
        // Last, because it may send what waits.
        self.msix
            .restore(&msix, &self.space)
            .map_err(|e| invalid(e.to_string()))
    }
}

impl Function for PciTransport {
    fn read_config(&mut self, offset: u16, into: &mut [u8]) {
        self.space.set_interrupt_status(self.routes.has_interrupt());
        if self.touches_window_data(offset, into.len())
            && let Some((target, len)) = self.window_target()
        {
            let mut bytes = [0; 4];
            if let Some(bytes) = bytes.get_mut(..len) {
                if self.read_bar(target, bytes) != Outcome::Done {
                    bytes.fill(0xff);
                }
                let data = self.window.saturating_add(WINDOW_DATA);
                self.space.set(usize::from(data), bytes);
            }
        }
        self.space.read(offset, into);
    }

    fn write_config(&mut self, offset: u16, from: &[u8]) {
        self.space.write(offset, from);
        self.msix.follow(&self.space);
        self.core.signals().routes_changed();
        if self.touches_window_data(offset, from.len())
            && let Some((target, len)) = self.window_target()
        {
            let mut bytes = [0; 4];
            let data = self.window.saturating_add(WINDOW_DATA);
            self.space.read(data, &mut bytes);
            if let Some(bytes) = bytes.get(..len) {
                // What is refused there is lost, as a write to the BAR is.
                let _ = self.write_bar(target, bytes);
            }
        }
    }
}

impl BusDevice for PciTransport {
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Outcome {
        if !self.space.decodes_memory() {
            return Outcome::Refused;
        }
        self.read_bar(offset, into)
    }

    fn write(&mut self, offset: u64, from: &[u8]) -> Outcome {
        if !self.space.decodes_memory() {
            return Outcome::Refused;
        }
        self.write_bar(offset, from)
    }
}

/// Whether an access is to all of a field of 64 bits. Section 4.1.3.1 asks drivers for its halves, but some write
/// it in one piece, and bridges cut that into halves for hardware.
fn is_wide(offset: u64, len: usize) -> bool {
    matches!(part_at(offset, len), Some((Part::Common, at)) if common::is_wide(at, len))
}

/// Adds one virtio capability; all but the access window are read-only.
fn add(
    space: &mut ConfigSpace,
    cfg_type: u8,
    offset: u64,
    length: u64,
    extra: &[u8],
) -> Result<u16, PciError> {
    let extra_bytes = u8::try_from(extra.len()).unwrap_or(u8::MAX);
    let len = CAPABILITY_BYTES.saturating_add(extra_bytes);
    let mut body = vec![len, cfg_type, BAR, 0, 0, 0];
    body.extend(low(offset).to_le_bytes());
    body.extend(low(length).to_le_bytes());
    body.extend(extra);
    // From the third byte on: length and type, bar, id and padding, offset, length, data.
    const WINDOW_WRITABLE: [u8; 18] = [
        0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    ];
    let writable: &[u8] = if cfg_type == PCI_CFG {
        &WINDOW_WRITABLE
    } else {
        &[]
    };
    space.add_capability(VENDOR_CAPABILITY, &body, writable)
}

/// What is in the BAR fits 32 bits.
fn low(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// Base class, subclass and interface for a virtio device type, for people who list devices: drivers go by
/// the ids (PCI Code and ID Assignment 1.14, 1).
fn class_of(device_id: u16) -> u32 {
    match device_id {
        // Network: Ethernet controller.
        1 => 0x02_00_00,
        // Block, SCSI host, file system: other mass storage.
        2 | 8 | 26 => 0x01_80_00,
        // Console, vsock: other communication.
        3 | 19 => 0x07_80_00,
        // GPU: other display.
        16 => 0x03_80_00,
        // Input: other input.
        18 => 0x09_80_00,
        // Entropy, crypto: other encryption.
        4 | 20 => 0x10_80_00,
        // Anything else: unassigned class.
        _ => 0xff_00_00,
    }
}
