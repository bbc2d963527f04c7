//! Step 6: the threads exist and wait; nothing is left to be opened or made.

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::thread::JoinHandle;

use alveole_counters::Registry;
use alveole_event_loop::{EventLoop, Worker};
use alveole_thread_sandbox::Role;

use crate::build::processors::WithProcessors;
use crate::build::{BuildError, Options};
use crate::catalog;
use crate::lifecycle::Lifecycle;
use crate::{Event, Machine, Mailbox};

impl WithProcessors {
    pub(super) fn seal(
        self,
        workers: Vec<Box<dyn Worker>>,
        mailbox: Mailbox,
        events: Receiver<Event>,
        options: Options,
    ) -> Result<Machine, BuildError> {
        let mut devices = EventLoop::new()?;
        devices.attach(Box::new(self.console_worker))?;
        for worker in workers {
            devices.attach(worker)?;
        }
        let handle = devices.handle();
        let thread = start_devices(devices, mailbox)?;
        let mut machine = Machine {
            state: Lifecycle::Built,
            vcpus: Vec::new(),
            events,
            console: self.console,
            power_button: self.power_button,
            devices: handle,
            devices_thread: Some(thread),
            registry: Arc::new(Registry::new()),
            options,
            booted: None,
            panicked: None,
            asked_to_stop: false,
            _partition: self.partition,
            _ram: self.ram,
        };
        let mut registry = Registry::new();
        registry.register(machine.console.counters().clone());
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

fn start_devices(mut devices: EventLoop, mailbox: Mailbox) -> Result<JoinHandle<()>, BuildError> {
    let body = move || {
        let ended =
            match alveole_thread_sandbox::enter_with(Role::Devices, "devices", catalog::SECCOMP) {
                Ok(()) => devices.run().map_err(|e| e.to_string()),
                Err(e) => Err(e.to_string()),
            };
        if let Err(why) = ended {
            mailbox.send(Event::LoopEnded(why));
        }
    };
    std::thread::Builder::new()
        .name("devices".into())
        .spawn(body)
        .map_err(BuildError::Thread)
}
