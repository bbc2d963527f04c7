//! MSI-X (PCI Local Bus 3.0, 6.8.2): the table and the pending bits, and what sends.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use alveole_interrupts::{IrqLine, MsiMessage, MsiVector};
use alveole_io_bus::Outcome;

use crate::{ConfigSpace, MsixEntryStateV1, MsixStateV1, PciError, PciRestoreError};

/// Most messages of one function.
pub const MAX_VECTORS: usize = 2048;

const CAPABILITY_ID: u8 = 0x11;
/// Message control: bits of its upper byte.
const FUNCTION_MASK: u8 = 1 << 6;
const ENABLE: u8 = 1 << 7;
const ENTRY_BYTES: u64 = 16;
/// Vector control: the one bit that is not reserved.
const MASKED: u32 = 1;

/// A gate does not let messages through.
const CLOSED: u8 = 1;
/// A message waits at a closed gate.
const PENDING: u8 = 2;

struct Gate {
    vector: MsiVector,
    state: AtomicU8,
}

struct Shared {
    enabled: AtomicBool,
    gates: Vec<Gate>,
}

/// Sends a function's messages, from any thread. Clones share it.
#[derive(Clone)]
pub struct MsixSender(Arc<Shared>);

impl MsixSender {
    /// Sends message `vector`, or remembers it while it is masked. Nothing while MSI-X is disabled.
    ///
    /// A message that is on its way while the guest masks it may still arrive, as on a real bus.
    pub fn signal(&self, vector: u16) {
        if !self.is_enabled() {
            return;
        }
        let Some(gate) = self.0.gates.get(usize::from(vector)) else {
            return;
        };
        let waits = gate
            .state
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |state| {
                (state & CLOSED != 0).then_some(state | PENDING)
            });
        if waits.is_err() {
            gate.vector.signal();
        }
    }

    /// The line that sends message `vector`, while messages of it pass: enabled, not masked. Who signals by it must ask
    /// again after each change that the guest makes.
    #[must_use]
    pub fn open_line(&self, vector: u16) -> Option<IrqLine> {
        let gate = self.0.gates.get(usize::from(vector))?;
        let is_open = self.is_enabled() && gate.state.load(Ordering::Acquire) & CLOSED == 0;
        is_open.then(|| gate.vector.line().clone())
    }

    /// Whether the guest has enabled MSI-X.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.0.enabled.load(Ordering::Acquire)
    }
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    message: MsiMessage,
    masked: bool,
    /// What the vector was connected to last.
    connected: Option<MsiMessage>,
}

/// The MSI-X table of one function, its pending bits and its capability.
///
/// A vector is connected to its message when that can be sent and is another than before: each change
/// costs the hypervisor a grace period. It is never disconnected; what may not be sent stops here.
pub struct MsixTable {
    shared: Arc<Shared>,
    entries: Vec<Entry>,
    function_masked: bool,
    /// Offset of message control in the configuration space.
    control_at: u16,
    trouble_said: bool,
}

impl MsixTable {
    /// One entry for each vector, all masked. Adds the capability to `space`: table and pending bits are in
    /// BAR `bar` at these offsets, multiples of 8.
    ///
    /// # Errors
    /// No vector or more than [`MAX_VECTORS`]; the configuration space is full.
    pub fn new(
        vectors: Vec<MsiVector>,
        space: &mut ConfigSpace,
        bar: u8,
        table_offset: u32,
        pending_offset: u32,
    ) -> Result<Self, PciError> {
        let count = vectors.len();
        let last = count
            .checked_sub(1)
            .filter(|_| count <= MAX_VECTORS)
            .and_then(|last| u16::try_from(last).ok())
            .ok_or(PciError::Vectors(count))?;
        let mut body = last.to_le_bytes().to_vec();
        for offset in [table_offset, pending_offset] {
            body.extend(((offset & !7) | u32::from(bar & 7)).to_le_bytes());
        }
        let at = space.add_capability(CAPABILITY_ID, &body, &[0, FUNCTION_MASK | ENABLE])?;
        let gates = vectors.into_iter().map(|vector| Gate {
            vector,
            state: AtomicU8::new(CLOSED),
        });
        let masked = Entry {
            message: MsiMessage {
                address: 0,
                data: 0,
            },
            masked: true,
            connected: None,
        };
        Ok(Self {
            shared: Arc::new(Shared {
                enabled: AtomicBool::new(false),
                gates: gates.collect(),
            }),
            entries: vec![masked; count],
            function_masked: false,
            control_at: at.saturating_add(2),
            trouble_said: false,
        })
    }

    /// What sends the messages.
    #[must_use]
    pub fn sender(&self) -> MsixSender {
        MsixSender(self.shared.clone())
    }

    /// Number of messages.
    #[must_use]
    pub fn count(&self) -> usize {
        self.entries.len()
    }

    /// To be called after each write to the configuration space: follows message control.
    pub fn follow(&mut self, space: &ConfigSpace) {
        let was_enabled = self.shared.enabled.load(Ordering::Acquire);
        if self.control(space) != (was_enabled, self.function_masked) {
            self.take_control(space);
        }
    }

    /// Message control: whether messages are enabled, and whether all are masked.
    fn control(&self, space: &ConfigSpace) -> (bool, bool) {
        let mut control = [0; 2];
        space.read(self.control_at, &mut control);
        let [_, control] = control;
        (control & ENABLE != 0, control & FUNCTION_MASK != 0)
    }

    fn take_control(&mut self, space: &ConfigSpace) {
        let (enabled, function_masked) = self.control(space);
        self.function_masked = function_masked;
        self.shared.enabled.store(enabled, Ordering::Release);
        for index in 0..self.entries.len() {
            self.settle(index);
        }
    }

    /// The state.
    #[must_use]
    pub fn save(&self) -> MsixStateV1 {
        // Exhaustive, so that a new field has to decide whether it is saved.
        let Self {
            shared,
            entries,
            function_masked: _,
            control_at: _,
            trouble_said: _,
        } = self;
        let entries = entries.iter().zip(&shared.gates);
        MsixStateV1 {
            entries: entries
                .map(|(entry, gate)| {
                    let Entry {
                        message: MsiMessage { address, data },
                        masked,
                        connected: _,
                    } = *entry;
                    MsixEntryStateV1 {
                        address,
                        data,
                        masked,
                        pending: gate.state.load(Ordering::Acquire) & PENDING != 0,
                    }
                })
                .collect(),
        }
    }

    /// Whether a state can be this table's.
    ///
    /// # Errors
    /// It has another number of messages, or one that the table cannot hold.
    pub fn check(&self, saved: &MsixStateV1) -> Result<(), PciRestoreError> {
        let MsixStateV1 { entries } = saved;
        if entries.len() != self.entries.len() {
            return Err(PciRestoreError::Messages {
                found: entries.len(),
                here: self.entries.len(),
            });
        }
        match entries.iter().position(|entry| entry.address & 3 != 0) {
            Some(index) => Err(PciRestoreError::Message {
                index,
                address: entries.get(index).map_or(0, |entry| entry.address),
            }),
            None => Ok(()),
        }
    }

    /// Takes a state over. `space` is restored already: it says whether messages are enabled. What waits and
    /// may be sent is sent.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn restore(
        &mut self,
        saved: &MsixStateV1,
        space: &ConfigSpace,
    ) -> Result<(), PciRestoreError> {
        self.check(saved)?;
        let gates = self.shared.gates.iter();
        for ((entry, gate), saved) in self.entries.iter_mut().zip(gates).zip(&saved.entries) {
            let MsixEntryStateV1 {
                address,
                data,
                masked,
                pending,
            } = *saved;
            entry.message = MsiMessage { address, data };
            entry.masked = masked;
            let waits = if pending { PENDING } else { 0 };
            gate.state.store(CLOSED | waits, Ordering::Release);
        }
        self.take_control(space);
        Ok(())
    }

    /// Opens or closes the gate of an entry, as the table now says.
    fn settle(&mut self, index: usize) {
        let enabled = self.shared.enabled.load(Ordering::Acquire);
        let (Some(entry), Some(gate)) = (self.entries.get_mut(index), self.shared.gates.get(index))
        else {
            return;
        };
        if !enabled {
            // Nothing is pending in a function that may not send.
            gate.state.store(CLOSED, Ordering::Release);
            return;
        }
        if self.function_masked || entry.masked {
            gate.state.fetch_or(CLOSED, Ordering::AcqRel);
            return;
        }
        if entry.connected != Some(entry.message) {
            if let Err(e) = gate.vector.connect(Some(entry.message)) {
                gate.state.fetch_or(CLOSED, Ordering::AcqRel);
                // One line for each function. Abused by a guest that goes on asking for it.
                if !self.trouble_said {
                    log::warn!("the hypervisor refuses message {:x?}: {e}", entry.message);
                    self.trouble_said = true;
                }
                return;
            }
            entry.connected = Some(entry.message);
        }
        if gate.state.swap(0, Ordering::AcqRel) & PENDING != 0 {
            gate.vector.signal();
        }
    }

    /// Reads 4 or 8 bytes of the table.
    pub fn read_table(&self, offset: u64, into: &mut [u8]) -> Outcome {
        if !fits(offset, into.len()) {
            return Outcome::Refused;
        }
        for (at, word) in (offset..).step_by(4).zip(into.chunks_mut(4)) {
            let index = usize::try_from(at / ENTRY_BYTES).unwrap_or(usize::MAX);
            let value = self.entries.get(index).map_or(0, |entry| {
                let MsiMessage { address, data } = entry.message;
                match at % ENTRY_BYTES {
                    0 => (address & 0xffff_ffff) as u32,
                    4 => (address >> 32) as u32,
                    8 => data,
                    _ if entry.masked => MASKED,
                    _ => 0,
                }
            });
            word.copy_from_slice(&value.to_le_bytes());
        }
        Outcome::Done
    }

    /// Writes 4 or 8 bytes of the table.
    pub fn write_table(&mut self, offset: u64, from: &[u8]) -> Outcome {
        if !fits(offset, from.len()) {
            return Outcome::Refused;
        }
        // Eight bytes that are aligned to eight lie in one entry.
        let index = usize::try_from(offset / ENTRY_BYTES).unwrap_or(usize::MAX);
        let Some(entry) = self.entries.get_mut(index) else {
            return Outcome::Done;
        };
        let before = (entry.message, entry.masked);
        for (at, word) in (offset..).step_by(4).zip(from.chunks(4)) {
            let value = <[u8; 4]>::try_from(word).map_or(0, u32::from_le_bytes);
            let address = entry.message.address;
            match at % ENTRY_BYTES {
                // The two lowest bits are always zero.
                0 => entry.message.address = (address & !0xffff_ffff) | u64::from(value & !3),
                4 => entry.message.address = (address & 0xffff_ffff) | (u64::from(value) << 32),
                8 => entry.message.data = value,
                _ => entry.masked = value & MASKED != 0,
            }
        }
        if (entry.message, entry.masked) != before {
            self.settle(index);
        }
        Outcome::Done
    }

    /// Reads 4 or 8 bytes of the pending bits. They are read-only.
    pub fn read_pending(&self, offset: u64, into: &mut [u8]) -> Outcome {
        if !fits(offset, into.len()) {
            return Outcome::Refused;
        }
        let first = usize::try_from(offset).unwrap_or(usize::MAX);
        for (at, place) in (first..).zip(into.iter_mut()) {
            let gates = self.shared.gates.iter().skip(at.saturating_mul(8));
            let bits = [1, 2, 4, 8, 16, 32, 64, 128];
            *place = gates.zip(bits).fold(0, |byte: u8, (gate, bit)| {
                match gate.state.load(Ordering::Acquire) & PENDING {
                    0 => byte,
                    _ => byte | bit,
                }
            });
        }
        Outcome::Done
    }
}

/// Section 6.8.2: software uses aligned accesses of four or eight bytes here.
fn fits(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}
