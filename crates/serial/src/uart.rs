//! The UART as the guest sees it.

use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use alveole_interrupts::IrqLine;
use alveole_io_bus::{BusDevice, Outcome};
use alveole_saved_state::{RestoreError, SavedState, Saves};
use vm_superio::Trigger;
use vm_superio::serial::{Serial, SerialEvents, SerialState};
use vmm_sys_util::eventfd::EventFd;

use crate::SerialCounters;
use crate::out_queue::OutQueue;
use crate::panic_line::{LineWatch, PanicLine};
use crate::state::{KIND, UartStateV1, VERSION};

/// Ports that a 16550 takes.
pub const UART_PORTS: u64 = 8;

/// Offset of the transmitter holding register.
const THR: u8 = 0;
/// Offset of the interrupt enable register, unless the divisor latch is there, and its bits for received data and the empty transmitter.
const IER: u8 = 1;
const IER_RECEIVED: u8 = 1;
const IER_EMPTY: u8 = 2;
/// Offset of the interrupt identification register, what tells the interrupts apart in it, and two of those.
const IIR: u8 = 2;
const IIR_WHICH: u8 = 0x0f;
const IIR_NONE: u8 = 0x01;
const IIR_RECEIVED: u8 = 0x04;
/// Offset of the line control register, and its bit that puts the divisor latch at 0 and 1.
const LCR: u8 = 3;
const LCR_DIVISOR: u8 = 0x80;
/// Offset of the line status register, and its bit for received data.
const LSR: u8 = 5;
const LSR_RECEIVED: u8 = 1;
/// Offset of the modem control register, which ends loop-back mode.
const MCR: u8 = 4;

/// The UART, to be placed on a port bus: [`UART_PORTS`] ports, one byte each.
pub struct Uart {
    registers: Registers,
    queue: Arc<OutQueue>,
}

impl Uart {
    pub(crate) fn new(registers: Registers, queue: Arc<OutQueue>) -> Self {
        Self { registers, queue }
    }

    fn port(offset: u64) -> Option<u8> {
        u8::try_from(offset)
            .ok()
            .filter(|&o| u64::from(o) < UART_PORTS)
    }
}

impl BusDevice for Uart {
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Outcome {
        let (Some(port), [byte]) = (Self::port(offset), into) else {
            return Outcome::Refused;
        };
        let mut serial = self.registers.lock();
        *byte = serial.read(port);
        if port == IIR && *byte & IIR_WHICH == IIR_NONE && has_input(&mut serial) {
            *byte = *byte & !IIR_WHICH | IIR_RECEIVED;
        }
        Outcome::Done
    }

    fn write(&mut self, offset: u64, from: &[u8]) -> Outcome {
        let (Some(port), &[byte]) = (Self::port(offset), from) else {
            return Outcome::Refused;
        };
        if port == THR {
            // Before the lock: the event loop takes it for input and must not wait for a console.
            self.queue.wait_for_room();
        }
        let mut serial = self.registers.lock();
        if port == IER && disables_empty(&mut serial, byte) {
            // What else was told of is told of anew, by the write.
            let _ = serial.read(IIR);
        }
        // Nothing here can fail: neither the interrupt nor the queue has an error.
        let _ = serial.write(port, byte);
        if port == MCR {
            serial.events().ring_if_wanted();
        }
        Outcome::Done
    }
}

impl Saves for Uart {
    fn save(&self) -> SavedState {
        let state = UartStateV1::of(self.registers.lock().state());
        SavedState::pack(KIND, VERSION, &state)
    }

    fn restore(&mut self, saved: &SavedState) -> Result<(), RestoreError> {
        let state: UartStateV1 = saved.unpack(KIND, VERSION)?;
        self.registers.restore(&state.registers())
    }
}

/// Whether the guest is to be told that there is input for as long as there is, as by a 16550. `vm-superio` forgets it with the first
/// byte that is read: a driver that reads some and then asks whether that was all (Linux does after 256) would leave the rest
/// until somebody types more.
fn has_input(serial: &mut Inner) -> bool {
    serial.read(LCR) & LCR_DIVISOR == 0
        && serial.read(IER) & IER_RECEIVED != 0
        && serial.read(LSR) & LSR_RECEIVED != 0
}

/// Whether this byte for the interrupt enable register takes the interrupt of the empty transmitter back. A 16550 names none that is disabled;
/// `vm-superio` does until the guest asks: a driver that has written its last byte and disabled the interrupt (Linux does both in one)
/// would look at line and modem again for nothing, three accesses for each byte that a guest prints alone.
fn disables_empty(serial: &mut Inner, byte: u8) -> bool {
    serial.read(LCR) & LCR_DIVISOR == 0
        && serial.read(IER) & IER_EMPTY != 0
        && byte & IER_EMPTY == 0
}

type Inner = Serial<Edge, RxBell, Output>;

/// The registers, shared by the bus and the worker that brings input.
#[derive(Clone)]
pub(crate) struct Registers {
    serial: Arc<Mutex<Inner>>,
    wires: Wires,
}

/// What the registers are connected to.
#[derive(Clone)]
struct Wires {
    irq: IrqLine,
    queue: Arc<OutQueue>,
    bell: Arc<EventFd>,
    panic_line: PanicLine,
}

impl Wires {
    fn parts(&self) -> (Edge, RxBell, Output) {
        let bell = RxBell {
            wanted: AtomicBool::new(false),
            bell: self.bell.clone(),
        };
        let output = Output {
            queue: self.queue.clone(),
            lines: LineWatch::new(self.panic_line.clone()),
        };
        (Edge(self.irq.clone()), bell, output)
    }
}

impl Registers {
    pub(crate) fn new(
        irq: IrqLine,
        queue: Arc<OutQueue>,
        bell: Arc<EventFd>,
        panic_line: PanicLine,
    ) -> Self {
        let wires = Wires {
            irq,
            queue,
            bell,
            panic_line,
        };
        let (edge, bell, output) = wires.parts();
        let serial = Serial::with_events(edge, bell, output);
        Self {
            serial: Arc::new(Mutex::new(serial)),
            wires,
        }
    }

    /// Registers as they were saved. An interrupt that was raised is raised again: to a guest it is one that it need not have
    /// taken yet.
    fn restore(&self, state: &SerialState) -> Result<(), RestoreError> {
        let (edge, bell, output) = self.wires.parts();
        let serial = Serial::from_state(state, edge, bell, output);
        *self.lock() = serial.map_err(|_| RestoreError::Invalid {
            kind: KIND.into(),
            why: format!(
                "{} bytes of input, where its FIFO holds 64",
                state.in_buffer.len()
            ),
        })?;
        Ok(())
    }

    /// Gives the guest as many of `bytes` as its FIFO takes; how many. When some are left, the bell
    /// rings once the guest has read all it has.
    pub(crate) fn receive(&self, bytes: &[u8], counters: &SerialCounters) -> usize {
        let mut serial = self.lock();
        // A full FIFO and loop-back mode take nothing.
        let taken = serial.enqueue_raw_bytes(bytes).unwrap_or(0);
        if taken < bytes.len() {
            serial.events().wanted.store(true, Ordering::Relaxed);
        }
        counters.bytes_in.add(taken as u64);
        taken
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The interrupt: one edge each.
struct Edge(IrqLine);

impl Trigger for Edge {
    type E = Infallible;
    fn trigger(&self) -> Result<(), Infallible> {
        self.0.pulse();
        Ok(())
    }
}

/// Wakes the event loop when the guest has emptied its FIFO and more is waiting. Only touched under
/// the lock of the registers.
struct RxBell {
    wanted: AtomicBool,
    bell: Arc<EventFd>,
}

impl RxBell {
    fn ring_if_wanted(&self) {
        if self.wanted.swap(false, Ordering::Relaxed) {
            // Fails only with the counter at its maximum: the loop has been woken already.
            let _ = self.bell.write(1);
        }
    }
}

impl SerialEvents for RxBell {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.ring_if_wanted();
    }
}

/// Where the transmitter sends its bytes.
struct Output {
    queue: Arc<OutQueue>,
    lines: LineWatch,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            self.lines.see(byte);
            self.queue.push(byte);
        }
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
