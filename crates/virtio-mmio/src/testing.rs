//! The registers as a driver uses them.

use alveole_interrupts::IrqLine;
use alveole_io_bus::{BusDevice, Outcome};
use alveole_virtio::testing::{Access, Interrupts, Stage};
use alveole_virtio::{TransportControl, TransportCore, VirtioDevice};

use crate::MmioTransport;

/// Carries `device` on this transport, for the conformance suite and for tests of devices.
#[must_use]
pub fn carry(stage: &Stage, device: Box<dyn VirtioDevice>) -> Box<dyn Access> {
    Box::new(MmioAccess::new(stage, device))
}

/// A driver's view of the register block.
pub struct MmioAccess {
    /// The registers.
    pub registers: MmioTransport,
    /// What they interrupt.
    pub line: IrqLine,
}

impl MmioAccess {
    /// On a new register block.
    #[must_use]
    pub fn new(stage: &Stage, device: Box<dyn VirtioDevice>) -> Self {
        let line = IrqLine::new().unwrap();
        Self {
            registers: MmioTransport::new(line.clone(), |wires| stage.core(device, wires)),
            line,
        }
    }

    /// Reads a register.
    pub fn get(&mut self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        assert_eq!(self.registers.read(offset, &mut bytes), Outcome::Done);
        u32::from_le_bytes(bytes)
    }

    /// Writes a register.
    pub fn set(&mut self, offset: u64, value: u32) {
        let outcome = self.registers.write(offset, &value.to_le_bytes());
        assert_eq!(outcome, Outcome::Done);
    }
}

impl Access for MmioAccess {
    fn device_features(&mut self) -> u64 {
        self.set(0x14, 1);
        let high = u64::from(self.get(0x10));
        self.set(0x14, 0);
        (high << 32) | u64::from(self.get(0x10))
    }
    fn set_driver_features(&mut self, features: u64) {
        for select in 0..2 {
            self.set(0x24, select);
            self.set(0x20, (features >> (32 * select)) as u32);
        }
    }
    fn status(&mut self) -> u8 {
        self.get(0x70).try_into().unwrap()
    }
    fn set_status(&mut self, status: u8) {
        self.set(0x70, u32::from(status));
    }
    fn queue_max_size(&mut self, queue: u16) -> u16 {
        self.set(0x30, u32::from(queue));
        self.get(0x34).try_into().unwrap()
    }
    fn set_up_queue(&mut self, queue: u16, size: u16, addrs: [u64; 3]) {
        self.set(0x30, u32::from(queue));
        self.set(0x38, u32::from(size));
        for (offset, addr) in [0x80, 0x90, 0xa0].into_iter().zip(addrs) {
            self.set(offset, addr as u32);
            self.set(offset + 4, (addr >> 32) as u32);
        }
    }
    fn enable_queue(&mut self, queue: u16) {
        self.set(0x30, u32::from(queue));
        self.set(0x44, 1);
    }
    fn queue_is_enabled(&mut self, queue: u16) -> bool {
        self.set(0x30, u32::from(queue));
        self.get(0x44) == 1
    }
    fn reset_queue(&mut self, queue: u16) {
        self.set(0x30, u32::from(queue));
        self.set(0xc0, 1);
        assert_eq!(self.get(0xc0), 0);
    }
    fn notify(&mut self, queue: u16) {
        self.set(0x50, u32::from(queue));
    }
    fn read_config(&mut self, at: u32, into: &mut [u8]) {
        let outcome = self.registers.read(0x100 + u64::from(at), into);
        assert_eq!(outcome, Outcome::Done);
    }
    fn write_config(&mut self, at: u32, from: &[u8]) {
        let outcome = self.registers.write(0x100 + u64::from(at), from);
        assert_eq!(outcome, Outcome::Done);
    }
    fn config_generation(&mut self) -> u32 {
        self.get(0xfc)
    }
    fn take_interrupts(&mut self) -> Interrupts {
        if self.line.take_edges() == 0 {
            return Interrupts::default();
        }
        let status = self.get(0x60);
        self.set(0x64, status);
        Interrupts {
            queue: status & 1 != 0,
            config: status & 2 != 0,
        }
    }
    fn with_core(&mut self, act: &mut dyn FnMut(&mut TransportCore)) {
        act(self.registers.core());
    }
    fn with_control(&mut self, act: &mut dyn FnMut(&mut dyn TransportControl)) {
        act(&mut self.registers);
    }
}
