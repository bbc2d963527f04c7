//! The guest's side, for tests: a driver that writes real rings in real guest memory ([`Driver`]), a stage
//! with an event loop to host workers ([`Stage`]), and the suite that every device passes on every
//! transport ([`conformance`]).

mod conformance;
mod driver;
mod echo;
mod ring;

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use alveole_event_loop::{EventLoop, LoopHandle};
use alveole_guest_memory::{GuestRam, MemoryPlan};
use alveole_interrupts::Doorbell;

pub use conformance::{Carry, Subject, conformance};
pub use driver::{Buffer, Driver, Indirect, Used};
pub use echo::Echo;
pub use ring::FuzzRing;

use crate::{
    Hosting, QueuePart, RestoreError, SavedState, Signals, TransportControl, TransportCore,
    VirtioDevice, Wires,
};

/// The registers of one device as a driver uses them, whatever the transport.
pub trait Access: Send {
    /// All offered features.
    fn device_features(&mut self) -> u64;
    /// Writes all driver features.
    fn set_driver_features(&mut self, features: u64);
    /// Reads the status.
    fn status(&mut self) -> u8;
    /// Writes the status.
    fn set_status(&mut self, status: u8);
    /// Largest size of a queue, 0 where there is none.
    fn queue_max_size(&mut self, queue: u16) -> u16;
    /// Sets size and addresses (descriptors, available, used) of a queue.
    fn set_up_queue(&mut self, queue: u16, size: u16, addrs: [u64; 3]);
    /// Enables a queue.
    fn enable_queue(&mut self, queue: u16);
    /// Whether a queue is enabled.
    fn queue_is_enabled(&mut self, queue: u16) -> bool;
    /// Resets one queue (RING_RESET) and waits until it is done.
    fn reset_queue(&mut self, queue: u16);
    /// Rings a doorbell.
    fn notify(&mut self, queue: u16);
    /// Reads the configuration space.
    fn read_config(&mut self, at: u32, into: &mut [u8]);
    /// Writes the configuration space.
    fn write_config(&mut self, at: u32, from: &[u8]);
    /// The generation of the configuration space.
    fn config_generation(&mut self) -> u32;
    /// The interrupts since the last call, acknowledged.
    fn take_interrupts(&mut self) -> Interrupts;
    /// The core behind the registers, for what is not the driver's business.
    fn with_core(&mut self, act: &mut dyn FnMut(&mut TransportCore));
    /// The owner's side of the transport: pause, save, restore.
    fn with_control(&mut self, act: &mut dyn FnMut(&mut dyn TransportControl));
}

/// What a driver has been told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Interrupts {
    /// Some queue has used buffers.
    pub queue: bool,
    /// The configuration or the status has changed.
    pub config: bool,
}

/// Guest memory and a running event loop.
pub struct Stage {
    ram: GuestRam,
    handle: LoopHandle,
    thread: Option<JoinHandle<()>>,
}

impl Default for Stage {
    fn default() -> Self {
        Self::new()
    }
}

impl Stage {
    /// Bytes of guest memory.
    pub const RAM_BYTES: u64 = 16 << 20;

    /// Sixteen MiB and a loop.
    #[must_use]
    pub fn new() -> Self {
        let ram = GuestRam::map(&MemoryPlan::around_hole(Self::RAM_BYTES).unwrap()).unwrap();
        let mut event_loop = EventLoop::new().unwrap();
        let handle = event_loop.handle();
        let thread = std::thread::spawn(move || event_loop.run().unwrap());
        Self {
            ram,
            handle,
            thread: Some(thread),
        }
    }

    /// Guest memory.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Where workers run.
    #[must_use]
    pub fn hosting(&self) -> Hosting {
        Hosting::alone_on(vec![self.handle.clone()], Duration::from_micros(20))
    }

    /// A core over `wires` for `device`, and its doorbells.
    #[must_use]
    pub fn core(&self, device: Box<dyn VirtioDevice>, wires: Box<dyn Wires>) -> TransportCore {
        let count = device.identity().queue_sizes.len();
        let bells = (0..count).map(|_| Doorbell::new().unwrap()).collect();
        TransportCore::new(
            device,
            self.ram.clone(),
            bells,
            Signals::new(wires),
            self.hosting(),
        )
    }

    /// A device on no transport at all.
    #[must_use]
    pub fn direct(&self, device: Box<dyn VirtioDevice>) -> Box<dyn Access> {
        let told = Arc::new(Mutex::new(Interrupts::default()));
        let core = self.core(device, Box::new(Recorder(told.clone())));
        Box::new(Direct { core, told })
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(
                ended.is_ok() || std::thread::panicking(),
                "the loop panicked"
            );
        }
    }
}

struct Recorder(Arc<Mutex<Interrupts>>);

impl Wires for Recorder {
    fn queue(&self, _: u16) {
        self.0.lock().unwrap().queue = true;
    }
    fn config(&self) {
        self.0.lock().unwrap().config = true;
    }
    fn clear(&self) {
        *self.0.lock().unwrap() = Interrupts::default();
    }
}

/// The core without a transport.
struct Direct {
    core: TransportCore,
    told: Arc<Mutex<Interrupts>>,
}

impl TransportControl for Direct {
    fn pause(&mut self) {
        self.core.pause();
    }
    fn resume(&mut self) {
        self.core.resume();
    }
    fn save(&self) -> Option<SavedState> {
        Some(SavedState::pack("direct", 1, &self.core.save()?))
    }
    fn restore(&mut self, saved: &SavedState) -> Result<(), RestoreError> {
        self.core.restore(&saved.unpack("direct", 1)?)
    }
}

impl Access for Direct {
    fn device_features(&mut self) -> u64 {
        (0..2).rev().fold(0, |all, select| {
            self.core.select_device_features(select);
            (all << 32) | u64::from(self.core.device_features())
        })
    }
    fn set_driver_features(&mut self, features: u64) {
        for select in 0..2 {
            self.core.select_driver_features(select);
            self.core
                .set_driver_features((features >> (32 * select)) as u32);
        }
    }
    fn status(&mut self) -> u8 {
        self.core.status()
    }
    fn set_status(&mut self, status: u8) {
        self.core.set_status(status);
    }
    fn queue_max_size(&mut self, queue: u16) -> u16 {
        self.core.select_queue(queue);
        self.core.queue_max_size()
    }
    fn set_up_queue(&mut self, queue: u16, size: u16, addrs: [u64; 3]) {
        self.core.select_queue(queue);
        self.core.set_queue_size(size);
        let parts = [
            QueuePart::Descriptors,
            QueuePart::Available,
            QueuePart::Used,
        ];
        for (part, addr) in parts.into_iter().zip(addrs) {
            self.core.set_queue_addr(part, addr);
        }
    }
    fn enable_queue(&mut self, queue: u16) {
        self.core.select_queue(queue);
        self.core.enable_queue();
    }
    fn queue_is_enabled(&mut self, queue: u16) -> bool {
        self.core.select_queue(queue);
        self.core.queue_is_enabled()
    }
    fn reset_queue(&mut self, queue: u16) {
        self.core.select_queue(queue);
        self.core.reset_queue();
    }
    fn notify(&mut self, queue: u16) {
        self.core.ring(queue);
    }
    fn read_config(&mut self, at: u32, into: &mut [u8]) {
        self.core.read_config(at, into);
    }
    fn write_config(&mut self, at: u32, from: &[u8]) {
        self.core.write_config(at, from);
    }
    fn config_generation(&mut self) -> u32 {
        self.core.config_generation()
    }
    fn take_interrupts(&mut self) -> Interrupts {
        std::mem::take(&mut *self.told.lock().unwrap())
    }
    fn with_core(&mut self, act: &mut dyn FnMut(&mut TransportCore)) {
        act(&mut self.core);
    }
    fn with_control(&mut self, act: &mut dyn FnMut(&mut dyn TransportControl)) {
        act(self);
    }
}
