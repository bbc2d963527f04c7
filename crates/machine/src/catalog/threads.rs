//! The event loops of a machine: one for everybody, and those that disks and busy devices have for themselves.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use alveole_event_loop::{EventLoop, LoopHandle, Worker};
use alveole_thread_sandbox::Role;
use alveole_virtio::Hosting;

use crate::build::{BuildError, DiskThreads};
use crate::{Event, Mailbox};

/// Name of the loop that everybody shares.
const SHARED: &str = "devices";

/// How long a disk's or an interface's thread looks for the next request before it sleeps: some two wake-ups of a thread.
/// Abused by a guest that asks again just in time, which costs the host this much of a processor for each
/// request, and the guest as much of its own.
const LONGEST_LOOK: Duration = Duration::from_micros(50);

/// How often to look whether a thread has ended that may never do so.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// More threads than the host has processors would only wait for each other.
fn at_most_host(workers: usize) -> usize {
    let host = std::thread::available_parallelism().map_or(1, usize::from);
    workers.clamp(1, host)
}

/// Event loops that no thread runs yet.
pub(crate) struct Threads {
    pub(crate) shared: EventLoop,
    own: Vec<(String, EventLoop)>,
}

/// Event loops that threads run.
pub(crate) struct Running {
    loops: Vec<LoopHandle>,
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    pub(crate) fn new() -> Result<Self, BuildError> {
        Ok(Self {
            shared: EventLoop::new()?,
            own: Vec::new(),
        })
    }

    /// On the loop that everybody shares.
    pub(crate) fn shared(&self) -> Hosting {
        Hosting::on(vec![self.shared.handle()])
    }

    /// On a loop of its own, by this name.
    pub(crate) fn for_device(&mut self, name: &str) -> Result<Hosting, BuildError> {
        let own = EventLoop::new()?;
        let hosting = Hosting::alone_on(vec![own.handle()], LONGEST_LOOK);
        self.own.push((name.to_owned(), own));
        Ok(hosting)
    }

    /// Gives `worker` a loop of its own, by its name.
    pub(crate) fn alone(&mut self, worker: Box<dyn Worker>) -> Result<(), BuildError> {
        let mut own = EventLoop::new()?;
        let name = worker.name().to_owned();
        own.attach(worker)?;
        self.own.push((name, own));
        Ok(())
    }

    /// Where the workers of a disk with so many queues run.
    pub(crate) fn for_disk(
        &mut self,
        name: &str,
        queues: usize,
        kind: DiskThreads,
    ) -> Result<Hosting, BuildError> {
        let count = match kind {
            DiskThreads::Shared => return Ok(self.shared()),
            DiskThreads::PerDisk => 1,
            DiskThreads::PerQueue => at_most_host(queues),
        };
        self.own("disk", name, queues, count)
    }

    /// Where the workers of a network interface with so many pairs of queues run: a thread for each pair.
    pub(crate) fn for_interface(
        &mut self,
        name: &str,
        pairs: usize,
    ) -> Result<Hosting, BuildError> {
        self.own("net", name, pairs, at_most_host(pairs))
    }

    /// `count` loops for the `workers` of one device alone.
    fn own(
        &mut self,
        kind: &str,
        name: &str,
        workers: usize,
        count: usize,
    ) -> Result<Hosting, BuildError> {
        let mut loops = Vec::new();
        for index in 0..count {
            let own = EventLoop::new()?;
            loops.push(own.handle());
            let name = if count == 1 {
                format!("{kind} {name}")
            } else {
                format!("{kind} {name}/{index}")
            };
            self.own.push((name, own));
        }
        // With several workers on one thread, to look for one would keep the others waiting.
        if workers > count {
            return Ok(Hosting::on(loops));
        }
        Ok(Hosting::alone_on(loops, LONGEST_LOOK))
    }

    /// Gives each loop its thread.
    pub(crate) fn start(
        self,
        sandbox: &[&'static str],
        mailbox: &Mailbox,
    ) -> Result<Running, BuildError> {
        let mut running = Running {
            loops: Vec::new(),
            threads: Vec::new(),
        };
        let shared = (SHARED.to_owned(), self.shared);
        for (name, event_loop) in std::iter::once(shared).chain(self.own) {
            running.loops.push(event_loop.handle());
            // A failure drops what runs already, which ends it.
            let thread = start(name, event_loop, sandbox.to_vec(), mailbox.clone())?;
            running.threads.push(thread);
        }
        Ok(running)
    }
}

impl Running {
    /// Whether [`Self::stop`] has not been called.
    pub(crate) fn are_running(&self) -> bool {
        !self.threads.is_empty()
    }

    /// Ends all loops and waits for their threads until `until`. How many have not ended by then: they are left to themselves, and nobody
    /// who takes a device apart waits for them.
    pub(crate) fn stop_by(&mut self, until: Instant) -> usize {
        for handle in &self.loops {
            handle.stop();
        }
        let mut left = 0;
        for (thread, handle) in self.threads.drain(..).zip(&self.loops) {
            while !thread.is_finished() && Instant::now() < until {
                std::thread::park_timeout(LOOK_AGAIN);
            }
            if thread.is_finished() {
                let _ = thread.join();
            } else {
                handle.abandon();
                left += 1;
            }
        }
        left
    }

    /// Ends all loops and waits for their threads.
    pub(crate) fn stop(&mut self) {
        for handle in &self.loops {
            handle.stop();
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
    }
}

fn start(
    name: String,
    mut event_loop: EventLoop,
    sandbox: Vec<&'static str>,
    mailbox: Mailbox,
) -> Result<JoinHandle<()>, BuildError> {
    // The kernel keeps fifteen bytes of a thread's name.
    let short: String = name.chars().take(15).collect();
    let body = move || {
        let ended = match alveole_thread_sandbox::enter_with(Role::Devices, &name, &sandbox) {
            Ok(()) => event_loop.run().map_err(|e| e.to_string()),
            Err(e) => Err(e.to_string()),
        };
        if let Err(why) = ended {
            mailbox.send(Event::LoopEnded(why));
        }
    };
    std::thread::Builder::new()
        .name(short)
        .stack_size(alveole_thread_sandbox::STACK_BYTES)
        .spawn(body)
        .map_err(BuildError::Thread)
}
