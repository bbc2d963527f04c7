//! Step 6: the threads exist and wait; nothing is left to be opened or made.

use std::collections::VecDeque;
use std::sync::Arc;

use alveole_counters::Registry;
use alveole_event_loop::Worker;
use alveole_hypervisor::NotedFrom;
use alveole_metrics::Process;

use crate::build::processors::WithProcessors;
use crate::build::{BuildError, Options};
use crate::lifecycle::Lifecycle;
use crate::snapshot::Tracking;
use crate::{Machine, Mailbox, ValidConfig};

impl WithProcessors {
    pub(super) fn seal(
        self,
        config: &ValidConfig,
        workers: Vec<Box<dyn Worker>>,
        mailbox: &Mailbox,
        options: Options,
        state: Lifecycle,
    ) -> Result<Machine, BuildError> {
        let mut threads = self.threads;
        threads.shared.attach(Box::new(self.console_worker))?;
        for worker in workers {
            threads.shared.attach(worker)?;
        }
        let threads = threads.start(&self.sandbox, mailbox)?;
        let mut machine = Machine {
            state,
            goes_on: false,
            working_set: None,
            may_hang: false,
            vcpus: Vec::new(),
            console: self.console,
            power_button: self.power_button,
            keys: self.keys,
            generation: self.generation,
            sandbox: self.sandbox,
            disks: self.disks,
            interfaces: self.interfaces,
            vsock: self.vsock,
            transports: self.transports,
            parts: self.parts,
            tracking: Tracking::default(),
            desk: None,
            files: None,
            deferred: VecDeque::new(),
            threads,
            registry: Arc::new(Registry::new()),
            process: Process::default(),
            options,
            booted: None,
            panicked: None,
            asked_to_stop: false,
            partition: self.partition,
            ram: self.ram,
        };
        if config.track_dirty_pages {
            machine
                .partition
                .track_dirty(&machine.ram, NotedFrom::Now)?;
            machine.ram.track_writes();
            machine.tracking.is_on = true;
        }
        // Noted as written: it is not what the memory files of the snapshot have.
        if state == Lifecycle::Paused {
            machine.generation.renew(&machine.ram)?;
        }
        let mut registry = Registry::new();
        registry.register(machine.console.counters().clone());
        for counters in self.counters {
            registry.register(counters);
        }
        for vcpu in self.vcpus {
            // A failure here drops the machine, which ends the threads that exist already.
            let handle = vcpu.start()?;
            registry.register(handle.counts().clone());
            machine.vcpus.push(handle);
        }
        machine.registry = Arc::new(registry);
        Ok(machine)
    }
}
