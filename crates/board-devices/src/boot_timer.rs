//! How a guest's init says that it runs, for boot time measurements: one byte written to one address,
//! the same as Firecracker's boot timer, so that its guest images can be measured with ours.

use alveole_io_bus::{BusDevice, MachineRequest, Outcome};

/// Where Firecracker puts it on x86-64.
pub const BOOT_TIMER_GUEST_ADDR: u64 = 0xc000_0000;
/// Size of the range: one page, as guests map it.
pub const BOOT_TIMER_SIZE_BYTES: u64 = 0x1000;
/// The byte that means "booted".
pub const BOOT_TIMER_MAGIC: u8 = 123;

/// Reports the first boot mark only: a guest that writes it in a loop is not worth a log line each.
#[derive(Debug, Default)]
pub struct BootTimer {
    booted: bool,
}

impl BootTimer {
    /// A guest that has not booted yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

impl BusDevice for BootTimer {
    fn read(&mut self, _offset: u64, _into: &mut [u8]) -> Outcome {
        Outcome::Refused
    }

    fn write(&mut self, offset: u64, from: &[u8]) -> Outcome {
        match (offset, from) {
            (0, &[BOOT_TIMER_MAGIC]) if !self.booted => {
                self.booted = true;
                Outcome::Asks(MachineRequest::Booted)
            }
            (0, &[_]) => Outcome::Done,
            _ => Outcome::Refused,
        }
    }
}
