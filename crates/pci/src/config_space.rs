//! The type 0 configuration space of one function.

use crate::ConfigSpaceStateV1;

/// Length of a configuration space without extended capabilities. What lies behind it reads as all ones, as
/// of a conventional device: Linux then does not look for such capabilities (17 accesses of a boot).
pub const CONFIG_BYTES: usize = 256;

const VENDOR: usize = 0x00;
const DEVICE: usize = 0x02;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
const CACHE_LINE: usize = 0x0c;
const BARS: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2c;
const SUBSYSTEM: usize = 0x2e;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const HEADER_BYTES: usize = 0x40;

const COMMAND_MEMORY: u8 = 1 << 1;
/// Memory, bus master, parity, system errors, INTx disable; there is no I/O space to decode.
const COMMAND_WRITABLE: [u8; 2] = [0b0100_0110, 0b0000_0101];
const STATUS_INTERRUPT: u8 = 1 << 3;
const STATUS_CAPABILITIES: u8 = 1 << 4;
/// Memory, 64 bits wide, not prefetchable: reading a device register may do something.
const BAR_MEMORY_64: u32 = 0b0100;
/// First BAR index that has no second half.
const LAST_BAR: usize = 5;
/// Smallest BAR: a page, so that no two functions share one.
const MIN_BAR_BYTES: u64 = 4096;

/// What a function cannot have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PciError {
    /// A BAR that registers cannot say.
    #[error(
        "BAR {index} of {size_bytes:#x} bytes at {addr:#x}: give a power of two from a page on, a multiple of it, and two free registers"
    )]
    BadBar {
        /// Which register.
        index: usize,
        /// Address.
        addr: u64,
        /// Length.
        size_bytes: u64,
    },
    /// The configuration space is full.
    #[error("no room for capability {id:#x} of {size_bytes} bytes")]
    NoRoom {
        /// Which capability.
        id: u8,
        /// Its length.
        size_bytes: usize,
    },
    /// Too few or too many messages.
    #[error("{0} message-signalled interrupts: a function has 1 to {max}", max = crate::MAX_VECTORS)]
    Vectors(usize),
    /// Two functions in one place, or no such place.
    #[error("device {0} of the PCI bus is taken, or there is no such place")]
    Place(u8),
}

/// Why a saved state cannot be this function's.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PciRestoreError {
    /// Not a configuration space.
    #[error("a configuration space of {0} bytes: it has {CONFIG_BYTES}")]
    Length(usize),
    /// What no guest can write differs.
    #[error(
        "byte {at:#x} of the configuration space is {found:#04x}, here it is {here:#04x}: it is of another function, or of one in another place"
    )]
    Fixed {
        /// Which byte.
        at: usize,
        /// What the state says.
        found: u8,
        /// What it is.
        here: u8,
    },
    /// A BAR register that shows neither its address nor its size.
    #[error("BAR register {at:#x} is {found:#x}: it shows {addr:#x} or, when sized, {size:#x}")]
    Bar {
        /// Which register.
        at: usize,
        /// What the state says.
        found: u32,
        /// The address it shows.
        addr: u32,
        /// The size it shows.
        size: u32,
    },
    /// Another number of messages.
    #[error("{found} messages, the function has {here}")]
    Messages {
        /// What the state says.
        found: usize,
        /// How many there are.
        here: usize,
    },
    /// An address that the table cannot hold.
    #[error("message {index} goes to {address:#x}, which is not a multiple of 4")]
    Message {
        /// Which message.
        index: usize,
        /// Where it goes.
        address: u64,
    },
}

/// Who a function is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ids {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Base class, subclass, programming interface: 0x01_80_00 is a mass storage controller.
    pub class: u32,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
}

/// The configuration space of one function with one header.
///
/// BARs are 64-bit memory BARs at addresses that the machine assigned before the start. They can be sized,
/// but not moved: doorbells and bus ranges were registered when the machine was built. A register that was
/// written with anything but ones in all its address bits shows the fixed address again. Linux keeps what
/// it finds assigned inside the bridge's windows, also with `pci=realloc` and `pci=nocrs` (those move what
/// lies behind bridges); where it did want to move a BAR it reads the register back, finds the old address
/// and says "error updating" (drivers/pci/setup-res.c). Had the new address been stored instead, it would
/// have found nothing wrong and talked to nobody.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
    bars: Vec<Bar>,
    /// Where the next capability goes, and where its address is to be written.
    next_capability: usize,
    last_link: usize,
    moves_refused: u64,
}

#[derive(Debug, Clone, Copy)]
struct Bar {
    at: usize,
    addr: u64,
    size_bytes: u64,
}

/// One of the two registers of a BAR.
#[derive(Debug, Clone, Copy)]
struct Half {
    at: usize,
    /// Address bits as they are.
    addr: u32,
    /// Which address bits a driver finds writable when it asks for the size.
    mask: u32,
    flags: u32,
}

impl Bar {
    fn halves(self) -> [Half; 2] {
        let mask = !self.size_bytes.saturating_sub(1);
        [
            Half {
                at: self.at,
                addr: (self.addr & 0xffff_ffff) as u32,
                mask: (mask & 0xffff_ffff) as u32,
                flags: BAR_MEMORY_64,
            },
            Half {
                at: self.at.saturating_add(4),
                addr: (self.addr >> 32) as u32,
                mask: (mask >> 32) as u32,
                flags: 0,
            },
        ]
    }
}

impl ConfigSpace {
    /// A function without BARs, capabilities and interrupt pin.
    #[must_use]
    pub fn new(ids: &Ids) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            bars: Vec::new(),
            next_capability: HEADER_BYTES,
            last_link: CAPABILITIES,
            moves_refused: 0,
        };
        space.set_ids(ids);
        space.allow(COMMAND, &COMMAND_WRITABLE);
        space.allow(CACHE_LINE, &[0xff]);
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Says who the function is.
    pub fn set_ids(&mut self, ids: &Ids) {
        let [programming, sub, base, _] = ids.class.to_le_bytes();
        self.set(VENDOR, &ids.vendor.to_le_bytes());
        self.set(DEVICE, &ids.device.to_le_bytes());
        self.set(REVISION, &[ids.revision]);
        self.set(CLASS, &[programming, sub, base]);
        self.set(SUBSYSTEM_VENDOR, &ids.subsystem_vendor.to_le_bytes());
        self.set(SUBSYSTEM, &ids.subsystem.to_le_bytes());
    }

    /// Puts a 64-bit memory BAR at registers `index` and `index + 1`.
    ///
    /// # Errors
    /// The registers are taken, or the BAR is not a power of two of at least a page, on a multiple of it.
    pub fn add_memory_bar(
        &mut self,
        index: usize,
        addr: u64,
        size_bytes: u64,
    ) -> Result<(), PciError> {
        let at = BARS.saturating_add(index.saturating_mul(4));
        let taken = |bar: &Bar| bar.at.abs_diff(at) < 8;
        if index >= LAST_BAR
            || self.bars.iter().any(taken)
            || !size_bytes.is_power_of_two()
            || size_bytes < MIN_BAR_BYTES
            || !addr.is_multiple_of(size_bytes)
        {
            return Err(PciError::BadBar {
                index,
                addr,
                size_bytes,
            });
        }
        let bar = Bar {
            at,
            addr,
            size_bytes,
        };
        for half in bar.halves() {
            self.set(half.at, &(half.addr | half.flags).to_le_bytes());
            self.allow(half.at, &[0xff; 4]);
        }
        self.bars.push(bar);
        Ok(())
    }

    /// Appends a capability: its id, a link, `body`. The guest may write the bits that `writable` has;
    /// bytes that it does not reach are read-only. Gives the offset of the capability.
    ///
    /// # Errors
    /// There is no room.
    pub fn add_capability(
        &mut self,
        id: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u16, PciError> {
        let at = self.next_capability;
        let size_bytes = body.len().saturating_add(2);
        let end = at.saturating_add(size_bytes);
        let (Ok(link), Ok(offset)) = (u8::try_from(at), u16::try_from(at)) else {
            return Err(PciError::NoRoom { id, size_bytes });
        };
        if end > CONFIG_BYTES {
            return Err(PciError::NoRoom { id, size_bytes });
        }
        let body_at = at.saturating_add(2);
        self.set(self.last_link, &[link]);
        self.set(at, &[id, 0]);
        self.set(body_at, body);
        self.allow(body_at, writable);
        self.set(STATUS, &[STATUS_CAPABILITIES]);
        self.last_link = at.saturating_add(1);
        self.next_capability = end.next_multiple_of(4);
        Ok(offset)
    }

    /// Whether the function answers at the addresses of its BARs.
    #[must_use]
    pub fn decodes_memory(&self) -> bool {
        self.byte(COMMAND) & COMMAND_MEMORY != 0
    }

    /// Shows whether the function has an interrupt pending (Interrupt Status).
    pub fn set_interrupt_status(&mut self, pending: bool) {
        let rest = self.byte(STATUS) & !STATUS_INTERRUPT;
        self.set(STATUS, &[rest | if pending { STATUS_INTERRUPT } else { 0 }]);
    }

    /// How often the guest has tried to move a BAR.
    #[must_use]
    pub fn moves_refused(&self) -> u64 {
        self.moves_refused
    }

    fn byte(&self, at: usize) -> u8 {
        self.bytes.get(at).copied().unwrap_or(0)
    }

    /// Sets bytes, whatever the guest may write.
    pub fn set(&mut self, at: usize, from: &[u8]) {
        for (place, value) in self.bytes.iter_mut().skip(at).zip(from) {
            *place = *value;
        }
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        for (place, value) in self.writable.iter_mut().skip(at).zip(mask) {
            *place = *value;
        }
    }

    /// Reads from `offset` on; ones behind the end.
    pub fn read(&self, offset: u16, into: &mut [u8]) {
        into.fill(0xff);
        let from = self.bytes.iter().skip(usize::from(offset));
        for (place, value) in into.iter_mut().zip(from) {
            *place = *value;
        }
    }

    /// Takes what the guest may write.
    pub fn write(&mut self, offset: u16, from: &[u8]) {
        let at = usize::from(offset);
        let places = self.bytes.iter_mut().zip(&self.writable).skip(at);
        for ((place, mask), value) in places.zip(from) {
            *place = (*place & !mask) | (value & mask);
        }
        self.settle_bars(at, at.saturating_add(from.len()));
    }

    /// A BAR that was written shows its size or its address, nothing else.
    fn settle_bars(&mut self, start: usize, end: usize) {
        let halves: Vec<Half> = self.bars.iter().flat_map(|bar| bar.halves()).collect();
        for half in halves {
            if half.at >= end || half.at.saturating_add(4) <= start {
                continue;
            }
            let written = word(&self.bytes, half.at) & half.mask;
            let shown = if written == half.mask {
                half.mask
            } else {
                half.addr
            };
            if written != shown {
                self.refuse_move(half.at, written);
            }
            self.set(half.at, &(shown | half.flags).to_le_bytes());
        }
    }

    /// The state.
    #[must_use]
    pub fn save(&self) -> ConfigSpaceStateV1 {
        // Exhaustive, so that a new field has to decide whether it is saved.
        let Self {
            bytes,
            writable: _,
            bars: _,
            next_capability: _,
            last_link: _,
            moves_refused: _,
        } = self;
        ConfigSpaceStateV1 {
            bytes: bytes.to_vec(),
        }
    }

    /// Takes a state over; all or nothing.
    ///
    /// # Errors
    /// It is of a function with other ids, capabilities or BARs.
    pub fn restore(&mut self, saved: &ConfigSpaceStateV1) -> Result<(), PciRestoreError> {
        let ConfigSpaceStateV1 { bytes } = saved;
        let Ok(bytes) = <[u8; CONFIG_BYTES]>::try_from(bytes.as_slice()) else {
            return Err(PciRestoreError::Length(bytes.len()));
        };
        let fixed = bytes.iter().zip(&self.bytes).zip(&self.writable);
        for (at, ((found, here), writable)) in fixed.enumerate() {
            let shown = if at == STATUS { STATUS_INTERRUPT } else { 0 };
            if (found ^ here) & !writable & !shown != 0 {
                let (found, here) = (*found, *here);
                return Err(PciRestoreError::Fixed { at, found, here });
            }
        }
        for half in self.bars.iter().flat_map(|bar| bar.halves()) {
            let found = word(&bytes, half.at);
            let (addr, size) = (half.addr | half.flags, half.mask | half.flags);
            if found != addr && found != size {
                return Err(PciRestoreError::Bar {
                    at: half.at,
                    found,
                    addr,
                    size,
                });
            }
        }
        self.bytes = bytes;
        Ok(())
    }

    fn refuse_move(&mut self, at: usize, wanted: u32) {
        // One line for each function. Abused by a guest that writes its BARs in a loop.
        if self.moves_refused == 0 {
            log::warn!(
                "the guest would move a PCI function: register {at:#x} to {wanted:#x}; it stays where it is"
            );
        }
        self.moves_refused = self.moves_refused.saturating_add(1);
    }
}

fn word(bytes: &[u8; CONFIG_BYTES], at: usize) -> u32 {
    let mut word = [0; 4];
    for (place, byte) in word.iter_mut().zip(bytes.iter().skip(at)) {
        *place = *byte;
    }
    u32::from_le_bytes(word)
}
