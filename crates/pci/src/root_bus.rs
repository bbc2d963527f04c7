//! Functions behind the memory-mapped configuration window.

use std::sync::{Arc, Mutex, PoisonError};

use alveole_io_bus::{BusDevice, Outcome};
use alveole_saved_state::{RestoreError, SavedState, Saves};

use crate::{ConfigSpace, ConfigSpaceStateV1, Ids, PciError};

/// Length of the configuration window of one bus (PCI Express Base 5.0, 7.2.2).
pub const ECAM_BYTES: u64 = 1 << 20;
/// Places on the bus, the host bridge's among them.
pub const DEVICES: u8 = 32;

/// A host bridge that no driver has quirks for: the one that QEMU gives boards without a chip set.
const HOST_BRIDGE: Ids = Ids {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_00_00,
    subsystem_vendor: 0,
    subsystem: 0,
};

/// A function as the bus sees it: its configuration space, 4 KiB of it.
pub trait Function: Send {
    /// Reads 1, 2 or 4 bytes from `offset` on.
    fn read_config(&mut self, offset: u16, into: &mut [u8]);
    /// Writes 1, 2 or 4 bytes from `offset` on.
    fn write_config(&mut self, offset: u16, from: &[u8]);
}

impl Function for ConfigSpace {
    fn read_config(&mut self, offset: u16, into: &mut [u8]) {
        self.read(offset, into);
    }

    fn write_config(&mut self, offset: u16, from: &[u8]) {
        self.write(offset, from);
    }
}

/// A function as the bus shares it with whoever answers at its BARs.
pub type SharedFunction = Arc<Mutex<dyn Function>>;

/// Bus 0 of segment 0, to be placed as [`ECAM_BYTES`] on the bus for memory accesses. All devices have one
/// function.
pub struct RootBus {
    bridge: Arc<Mutex<ConfigSpace>>,
    devices: Vec<Option<SharedFunction>>,
}

impl Default for RootBus {
    fn default() -> Self {
        Self::new()
    }
}

impl RootBus {
    /// A bus with a host bridge at 00:00.0.
    #[must_use]
    pub fn new() -> Self {
        let bridge = Arc::new(Mutex::new(ConfigSpace::new(&HOST_BRIDGE)));
        let mut devices = vec![Some(bridge.clone() as SharedFunction)];
        devices.resize_with(usize::from(DEVICES), || None);
        Self { bridge, devices }
    }

    /// Puts a function at 00:`device`.0.
    ///
    /// # Errors
    /// The place is taken, or there is no such place.
    pub fn place(&mut self, device: u8, function: SharedFunction) -> Result<(), PciError> {
        match self.devices.get_mut(usize::from(device)) {
            Some(place @ None) => {
                *place = Some(function);
                Ok(())
            }
            _ => Err(PciError::Place(device)),
        }
    }

    /// Who answers at an offset of the window, and at which register: bits 19-15 are the device, 14-12 the
    /// function, the rest the register.
    fn find(&self, offset: u64, len: usize) -> Option<(&SharedFunction, u16)> {
        if offset >= ECAM_BYTES || !matches!(len, 1 | 2 | 4) || offset & 0x7000 != 0 {
            return None;
        }
        let register = u16::try_from(offset & 0xfff).ok()?;
        let device = usize::try_from(offset >> 15).ok()?;
        let function = self.devices.get(device)?.as_ref()?;
        // An access that would reach into the next function is nobody's.
        let end = usize::from(register).checked_add(len)?;
        (end <= 0x1000).then_some((function, register))
    }
}

const KIND: &str = "pci-host";
const VERSION: u32 = 1;

/// The host bridge. Functions are saved by whoever shares them.
impl Saves for RootBus {
    fn save(&self) -> SavedState {
        // Exhaustive, so that a new field has to decide whether it is saved.
        let Self { bridge, devices: _ } = self;
        let bridge = bridge.lock().unwrap_or_else(PoisonError::into_inner);
        SavedState::pack(KIND, VERSION, &bridge.save())
    }

    fn restore(&mut self, saved: &SavedState) -> Result<(), RestoreError> {
        let state: ConfigSpaceStateV1 = saved.unpack(KIND, VERSION)?;
        let mut bridge = self.bridge.lock().unwrap_or_else(PoisonError::into_inner);
        bridge.restore(&state).map_err(|e| RestoreError::Invalid {
            kind: KIND.into(),
            why: e.to_string(),
        })
    }
}

impl BusDevice for RootBus {
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Outcome {
        match self.find(offset, into.len()) {
            Some((function, register)) => function
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .read_config(register, into),
            // What kernels look for is not there: no error, but all ones.
            None => into.fill(0xff),
        }
        Outcome::Done
    }

    fn write(&mut self, offset: u64, from: &[u8]) -> Outcome {
        if let Some((function, register)) = self.find(offset, from.len()) {
            function
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .write_config(register, from);
        }
        Outcome::Done
    }
}
