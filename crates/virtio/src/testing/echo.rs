//! The simplest device: gives back what it reads. To test the core, and transports.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use alveole_event_loop::{Event, EventLoopError, Interest, Ops, Token, Worker};

use crate::{
    BrokenRing, Chain, ConfigIrq, Identity, LiveQueue, Progress, QueueWorker, RestoreError,
    SavedState, StartError, StartKit, VirtioDevice,
};

/// Copies what it may read to what it may write, byte for byte, on any number of queues. Its configuration
/// is one little-endian word that the driver may write, and a word that only the host changes.
pub struct Echo {
    queues: usize,
    word: u32,
    host_word: Arc<AtomicU32>,
    one_worker: bool,
    config_irq: Option<ConfigIrq>,
}

impl Echo {
    /// With so many queues, each with a worker of its own.
    #[must_use]
    pub fn new(queues: usize) -> Self {
        Self {
            queues,
            word: 0,
            host_word: Arc::default(),
            one_worker: false,
            config_irq: None,
        }
    }

    /// One worker for all queues.
    #[must_use]
    pub fn with_one_worker(mut self) -> Self {
        self.one_worker = true;
        self
    }
}

impl VirtioDevice for Echo {
    fn identity(&self) -> Identity {
        Identity {
            name: "echo",
            device_id: 63,
            features: 1,
            queue_sizes: vec![64; self.queues],
            config_len: 8,
        }
    }

    fn connect(&mut self, config_irq: ConfigIrq) {
        self.config_irq = Some(config_irq);
    }

    fn read_config(&self, at: u32, into: &mut [u8]) {
        let mut space = [0; 8];
        space[..4].copy_from_slice(&self.word.to_le_bytes());
        space[4..].copy_from_slice(&self.host_word.load(Ordering::Relaxed).to_le_bytes());
        let at = at as usize;
        into.copy_from_slice(&space[at..at + into.len()]);
    }

    fn write_config(&mut self, at: u32, from: &[u8]) {
        let mut space = self.word.to_le_bytes();
        for (byte, value) in from.iter().enumerate() {
            if let Some(place) = space.get_mut(at as usize + byte) {
                *place = *value;
            }
        }
        self.word = u32::from_le_bytes(space);
        // So that tests can have a change by the host.
        if at >= 4 {
            self.host_word.fetch_add(1, Ordering::Relaxed);
            if let Some(irq) = &self.config_irq {
                irq.raise();
            }
        }
    }

    fn start(&mut self, kit: StartKit) -> Result<Vec<Box<dyn QueueWorker>>, StartError> {
        if self.one_worker {
            return Ok(vec![Box::new(EchoWorker(kit.queues))]);
        }
        let workers = kit.queues.into_iter();
        Ok(workers
            .map(|queue| Box::new(EchoWorker(vec![queue])) as Box<dyn QueueWorker>)
            .collect())
    }

    fn reset(&mut self) {
        let Self {
            queues: _,
            word,
            host_word: _,
            one_worker: _,
            config_irq: _,
        } = self;
        *word = 0;
    }

    fn save(&self) -> SavedState {
        SavedState::pack("echo", 1, &self.word)
    }

    fn restore(&mut self, saved: &SavedState) -> Result<(), RestoreError> {
        self.word = saved.unpack("echo", 1)?;
        Ok(())
    }
}

struct EchoWorker(Vec<LiveQueue>);

impl EchoWorker {
    fn serve(queue: &mut LiveQueue) -> Result<(), BrokenRing> {
        let mut chain = Chain::new();
        loop {
            while queue.pop(&mut chain)? {
                let mut bytes = Vec::new();
                for s in chain.readable() {
                    let start = bytes.len();
                    if !queue.ram().contains(s.addr, u64::from(s.len)) {
                        return Err(BrokenRing::NoMemory);
                    }
                    bytes.resize(start + s.len as usize, 0);
                    queue.ram().read(s.addr, &mut bytes[start..]).unwrap();
                }
                let mut written = 0;
                for s in chain.writable() {
                    let now = (bytes.len() - written).min(s.len as usize);
                    queue
                        .ram()
                        .write(s.addr, &bytes[written..written + now])
                        .map_err(|_| BrokenRing::NoMemory)?;
                    written += now;
                }
                queue.complete(chain.head(), u32::try_from(written).unwrap())?;
            }
            queue.notify()?;
            if !queue.want_doorbell()? {
                return Ok(());
            }
        }
    }
}

impl Worker for EchoWorker {
    fn name(&self) -> &'static str {
        "echo"
    }

    fn start(&mut self, ops: &mut Ops<'_>) -> Result<(), EventLoopError> {
        for queue in &self.0 {
            let token = Token(u32::from(queue.index()));
            ops.watch(
                queue.doorbell().event_fd(),
                token,
                Interest::READABLE | Interest::EDGE,
            )?;
        }
        Ok(())
    }

    fn on_event(&mut self, event: Event, _: &mut Ops<'_>) {
        for queue in &mut self.0 {
            if u32::from(queue.index()) == event.token.0
                && !queue.is_broken()
                && let Err(why) = Self::serve(queue)
            {
                queue.fail(why);
            }
        }
    }
}

impl QueueWorker for EchoWorker {
    fn stop(self: Box<Self>) -> Vec<Progress> {
        self.0.into_iter().map(LiveQueue::stop).collect()
    }

    fn queues(&self) -> Vec<u16> {
        self.0.iter().map(LiveQueue::index).collect()
    }
}
