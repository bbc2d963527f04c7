//! The function as a driver uses it: found on the bus by its ids, its capabilities walked, its BAR sized.

use std::sync::{Arc, Mutex};

use alveole_interrupts::{IrqLine, MsiMessage, MsiVector};
use alveole_io_bus::{Bus, BusBuilder, Outcome};
use alveole_pci::{ECAM_BYTES, RootBus};
use alveole_virtio::testing::{Access, Interrupts, Stage};
use alveole_virtio::{TransportControl, TransportCore, VirtioDevice};

use crate::{BAR_BYTES, NO_VECTOR, PciTransport};

/// Where the configuration window is.
pub const ECAM_ADDR: u64 = 0xe800_0000;
/// Where the BAR is: over 4 GiB, so that both halves matter.
pub const BAR_ADDR: u64 = 0x12_3456_8000;
/// The device's place on the bus.
pub const DEVICE: u64 = 3;

/// Carries `device` on this transport, for the conformance suite and for tests of devices.
#[must_use]
pub fn carry(stage: &Stage, device: Box<dyn VirtioDevice>) -> Box<dyn Access> {
    Box::new(PciAccess::new(stage, device))
}

/// A vector as tests see it: its line, and every message it was connected to.
#[derive(Clone)]
pub struct SeenVector {
    /// Takes an edge for each message sent.
    pub line: IrqLine,
    /// The messages, in order.
    pub connected: Arc<Mutex<Vec<Option<MsiMessage>>>>,
}

/// A virtio structure as its capability says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Structure {
    /// Type of the structure.
    pub cfg_type: u8,
    /// Where the capability is in the configuration space.
    pub at: u16,
    /// Its own length.
    pub cap_len: u8,
    /// Address: the BAR's plus the offset.
    pub addr: u64,
    /// Length of the structure.
    pub length: u32,
}

/// A driver's view of one function.
pub struct PciAccess {
    /// The memory bus, with configuration window and BAR.
    pub bus: Bus,
    /// The function behind it.
    pub function: Arc<Mutex<PciTransport>>,
    /// Its messages: for the configuration, then for each queue.
    pub vectors: Vec<SeenVector>,
    /// Every virtio capability, in the order of the list.
    pub structures: Vec<Structure>,
    /// Address and length of the BAR, as sized.
    pub bar: (u64, u64),
    /// Where the MSI-X capability is.
    pub msix_at: u16,
    /// Where the MSI-X table is.
    pub table_addr: u64,
    common: u64,
    device: Structure,
    notify: u64,
    multiplier: u32,
}

impl PciAccess {
    /// On a new bus, as a kernel finds the function at its start: found, sized, MSI-X enabled.
    #[must_use]
    pub fn new(stage: &Stage, device: Box<dyn VirtioDevice>) -> Self {
        let mut access = Self::untouched(stage, device);
        access.probe();
        access.enable_msix();
        access
    }

    /// On a new bus, not touched yet.
    #[must_use]
    pub fn untouched(stage: &Stage, device: Box<dyn VirtioDevice>) -> Self {
        let count = device.identity().queue_sizes.len() + 1;
        let seen: Vec<SeenVector> = (0..count)
            .map(|_| SeenVector {
                line: IrqLine::new().unwrap(),
                connected: Arc::default(),
            })
            .collect();
        let vectors = seen.iter().map(|vector| {
            let log = vector.connected.clone();
            let connect = move |message| {
                log.lock().unwrap().push(message);
                Ok(())
            };
            MsiVector::new(vector.line.clone(), Arc::new(connect))
        });
        let transport = PciTransport::new(BAR_ADDR, vectors.collect(), |wires| {
            stage.core(device, wires)
        });
        let function = Arc::new(Mutex::new(transport.unwrap()));
        let mut root = RootBus::new();
        root.place(u8::try_from(DEVICE).unwrap(), function.clone())
            .unwrap();
        let mut bus = BusBuilder::new();
        let root = Arc::new(Mutex::new(root));
        bus.place("ecam", ECAM_ADDR, ECAM_BYTES, root).unwrap();
        bus.place("virtio", BAR_ADDR, BAR_BYTES, function.clone())
            .unwrap();
        let nowhere = Structure {
            cfg_type: 0,
            at: 0,
            cap_len: 0,
            addr: 0,
            length: 0,
        };
        Self {
            bus: bus.freeze(),
            function,
            vectors: seen,
            structures: Vec::new(),
            bar: (0, 0),
            msix_at: 0,
            table_addr: 0,
            common: 0,
            device: nowhere,
            notify: 0,
            multiplier: 0,
        }
    }

    /// Reads `N` bytes at a physical address.
    pub fn load<const N: usize>(&self, addr: u64) -> [u8; N] {
        let mut bytes = [0; N];
        let outcome = self.bus.read(addr, &mut bytes);
        assert_eq!(outcome, Outcome::Done, "read of {N} bytes at {addr:#x}");
        bytes
    }

    /// Writes bytes to a physical address.
    pub fn store(&self, addr: u64, bytes: &[u8]) {
        let outcome = self.bus.write(addr, bytes);
        assert_eq!(outcome, Outcome::Done, "write of {bytes:?} at {addr:#x}");
    }

    fn config_addr(offset: u16) -> u64 {
        ECAM_ADDR + (DEVICE << 15) + u64::from(offset)
    }

    /// Reads the configuration space.
    pub fn config<const N: usize>(&self, offset: u16) -> [u8; N] {
        self.load(Self::config_addr(offset))
    }

    /// Reads four bytes of the configuration space.
    pub fn config_u32(&self, offset: u16) -> u32 {
        u32::from_le_bytes(self.config(offset))
    }

    /// Writes the configuration space.
    pub fn set_config(&self, offset: u16, bytes: &[u8]) {
        self.store(Self::config_addr(offset), bytes);
    }

    /// Every capability: id, offset.
    #[must_use]
    pub fn capabilities(&self) -> Vec<(u8, u16)> {
        let mut all = Vec::new();
        let [mut at] = self.config::<1>(0x34);
        while at != 0 {
            let [id, next] = self.config::<2>(u16::from(at));
            all.push((id, u16::from(at)));
            assert!(all.len() < 48, "the list is a circle");
            at = next;
        }
        all
    }

    /// Sizes the BAR, reads the capabilities, lets the function decode memory and send messages.
    pub fn probe(&mut self) {
        let [vendor, other] = self.config::<2>(0);
        assert_eq!([vendor, other], 0x1af4u16.to_le_bytes());
        let was = [self.config_u32(0x10), self.config_u32(0x14)];
        assert_eq!(was[0] & 0xf, 4, "64 bits, memory, not prefetchable");
        self.set_config(0x10, &[0xff; 4]);
        self.set_config(0x14, &[0xff; 4]);
        let mask = [self.config_u32(0x10) & !0xf, self.config_u32(0x14)];
        self.set_config(0x10, &was[0].to_le_bytes());
        self.set_config(0x14, &was[1].to_le_bytes());
        let join = |[low, high]: [u32; 2]| (u64::from(high) << 32) | u64::from(low & !0xf);
        self.bar = (join(was), (!join(mask)).wrapping_add(1));
        self.set_config(4, &6u16.to_le_bytes());
        for (id, at) in self.capabilities() {
            match id {
                0x09 => {
                    let [cap_len, cfg_type, _, _] = self.config::<4>(at + 2);
                    self.structures.push(Structure {
                        cfg_type,
                        at,
                        cap_len,
                        addr: self.bar.0 + u64::from(self.config_u32(at + 8)),
                        length: self.config_u32(at + 12),
                    });
                }
                0x11 => {
                    self.msix_at = at;
                    let offset = self.config_u32(at + 4);
                    assert_eq!(offset & 7, 0, "in BAR 0");
                    self.table_addr = self.bar.0 + u64::from(offset);
                }
                _ => {}
            }
        }
        self.common = self.structure(1).unwrap().addr;
        let notify = self.structure(2).unwrap();
        self.notify = notify.addr;
        self.multiplier = self.config_u32(notify.at + 16);
        if let Some(device) = self.structure(4) {
            self.device = device;
        }
    }

    /// A second view of the same function, to look at while a driver holds the first. `device` is another like
    /// its own.
    #[must_use]
    pub fn share(&self, stage: &Stage, device: Box<dyn VirtioDevice>) -> Self {
        let mut other = Self::untouched(stage, device);
        other.bus = self.bus.clone();
        other.function = self.function.clone();
        other.vectors.clone_from(&self.vectors);
        other.know(self);
        other
    }

    /// The messages that wait, by number.
    #[must_use]
    pub fn pending(&self) -> Vec<usize> {
        let at = self.bar.0 + u64::from(self.config_u32(self.msix_at + 8) & !7);
        let bits = u64::from_le_bytes(self.load(at));
        (0..64).filter(|bit| bits & 1 << bit != 0).collect()
    }

    /// Goes on with what was found out of another view of the same function: a driver whose device has moved
    /// looks for nothing again.
    pub fn know(&mut self, as_of: &Self) {
        self.structures.clone_from(&as_of.structures);
        self.bar = as_of.bar;
        self.msix_at = as_of.msix_at;
        self.table_addr = as_of.table_addr;
        self.common = as_of.common;
        self.device = as_of.device;
        self.notify = as_of.notify;
        self.multiplier = as_of.multiplier;
    }

    /// The first structure of a type.
    #[must_use]
    pub fn structure(&self, cfg_type: u8) -> Option<Structure> {
        self.structures
            .iter()
            .find(|s| s.cfg_type == cfg_type)
            .copied()
    }

    /// Goes as Linux does: enabled with the function masked, each entry filled while masked, then unmasked.
    pub fn enable_msix(&self) {
        let [low, high] = self.config::<2>(self.msix_at + 2);
        // Whoever was here before may have left the mask set.
        let high = high & !0xc0;
        self.set_config(self.msix_at + 2, &[low, high | 0xc0]);
        for index in 0..self.vectors.len() {
            self.set_entry(index, 0xfee0_0000, 0x30 + u32::try_from(index).unwrap());
        }
        self.set_config(self.msix_at + 2, &[low, high | 0x80]);
        for index in 0..self.vectors.len() {
            self.mask(index, false);
        }
    }

    /// Address of a field of an entry of the MSI-X table.
    #[must_use]
    pub fn entry_addr(&self, index: usize, field: u64) -> u64 {
        self.table_addr + 16 * index as u64 + field
    }

    /// Writes the message of an entry, in three writes.
    pub fn set_entry(&self, index: usize, address: u64, data: u32) {
        self.store(self.entry_addr(index, 0), &(address as u32).to_le_bytes());
        let high = (address >> 32) as u32;
        self.store(self.entry_addr(index, 4), &high.to_le_bytes());
        self.store(self.entry_addr(index, 8), &data.to_le_bytes());
    }

    /// Masks or unmasks an entry.
    pub fn mask(&self, index: usize, masked: bool) {
        self.store(self.entry_addr(index, 12), &u32::from(masked).to_le_bytes());
    }

    /// Reads a field of the common configuration.
    pub fn get<const N: usize>(&self, offset: u64) -> u32 {
        let bytes = self.load::<N>(self.common + offset);
        bytes
            .iter()
            .rev()
            .fold(0, |value, byte| (value << 8) | u32::from(*byte))
    }

    /// Writes a field of the common configuration.
    pub fn set<const N: usize>(&self, offset: u64, value: u32) {
        self.store(self.common + offset, &value.to_le_bytes()[..N]);
    }

    /// Whether an access stays in the room for the device's configuration: behind it there is something else,
    /// and a device without configuration has no structure for it.
    fn reaches_config(&self, at: u32, len: usize) -> bool {
        self.device.length > 0 && u64::from(at) + len as u64 <= 0x1000
    }

    /// Takes the edges of a vector.
    #[must_use]
    pub fn take(&self, vector: usize) -> bool {
        self.vectors[vector].line.take_edges() > 0
    }
}

impl Access for PciAccess {
    fn device_features(&mut self) -> u64 {
        self.set::<4>(0x00, 1);
        let high = u64::from(self.get::<4>(0x04));
        self.set::<4>(0x00, 0);
        (high << 32) | u64::from(self.get::<4>(0x04))
    }
    fn set_driver_features(&mut self, features: u64) {
        for select in 0..2 {
            self.set::<4>(0x08, select);
            self.set::<4>(0x0c, (features >> (32 * select)) as u32);
        }
    }
    fn status(&mut self) -> u8 {
        self.get::<1>(0x14).try_into().unwrap()
    }
    fn set_status(&mut self, status: u8) {
        self.set::<1>(0x14, u32::from(status));
        if status == 0 {
            // What was sent before does not count.
            for vector in &self.vectors {
                let _ = vector.line.take_edges();
            }
        } else if self.get::<2>(0x10) == u32::from(NO_VECTOR) {
            self.set::<2>(0x10, 0);
        }
    }
    fn queue_max_size(&mut self, queue: u16) -> u16 {
        // The register shows the largest size until a driver sets another; the driver here asks before.
        self.set::<2>(0x16, u32::from(queue));
        let mut max = 0;
        self.with_core(&mut |core| max = core.queue_max_size());
        let size = self.get::<2>(0x18);
        assert_eq!(size == 0, max == 0);
        max
    }
    fn set_up_queue(&mut self, queue: u16, size: u16, addrs: [u64; 3]) {
        self.set::<2>(0x16, u32::from(queue));
        self.set::<2>(0x18, u32::from(size));
        for (offset, addr) in [0x20, 0x28, 0x30].into_iter().zip(addrs) {
            self.set::<4>(offset, addr as u32);
            self.set::<4>(offset + 4, (addr >> 32) as u32);
        }
        let vector = u32::from(queue) + 1;
        self.set::<2>(0x1a, vector);
        let taken = self.get::<2>(0x1a);
        let there = usize::from(queue) + 1 < self.vectors.len();
        assert_eq!(taken, if there { vector } else { NO_VECTOR.into() });
    }
    fn enable_queue(&mut self, queue: u16) {
        self.set::<2>(0x16, u32::from(queue));
        self.set::<2>(0x1c, 1);
    }
    fn queue_is_enabled(&mut self, queue: u16) -> bool {
        self.set::<2>(0x16, u32::from(queue));
        self.get::<2>(0x1c) == 1
    }
    fn reset_queue(&mut self, queue: u16) {
        self.set::<2>(0x16, u32::from(queue));
        self.set::<2>(0x3a, 1);
        assert_eq!(self.get::<2>(0x3a), 0);
    }
    fn notify(&mut self, queue: u16) {
        self.set::<2>(0x16, u32::from(queue));
        let offset = u64::from(self.get::<2>(0x1e)) * u64::from(self.multiplier);
        self.store(self.notify + offset, &queue.to_le_bytes());
    }
    fn read_config(&mut self, at: u32, into: &mut [u8]) {
        if self.reaches_config(at, into.len()) {
            let outcome = self.bus.read(self.device.addr + u64::from(at), into);
            assert_eq!(outcome, Outcome::Done);
        }
    }
    fn write_config(&mut self, at: u32, from: &[u8]) {
        if self.reaches_config(at, from.len()) {
            self.store(self.device.addr + u64::from(at), from);
        }
    }
    fn config_generation(&mut self) -> u32 {
        self.get::<1>(0x15)
    }
    fn take_interrupts(&mut self) -> Interrupts {
        let config = self.take(0);
        // All are asked, so that none is left for the next call.
        let told: Vec<bool> = (1..self.vectors.len()).map(|v| self.take(v)).collect();
        Interrupts {
            queue: told.contains(&true),
            config,
        }
    }
    fn with_core(&mut self, act: &mut dyn FnMut(&mut TransportCore)) {
        act(self.function.lock().unwrap().core());
    }
    fn with_control(&mut self, act: &mut dyn FnMut(&mut dyn TransportControl)) {
        act(&mut *self.function.lock().unwrap());
    }
}
