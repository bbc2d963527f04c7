//! What clients ask of a machine that has been started.

use std::sync::PoisonError;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use alveole_board_devices::Pressed;
use alveole_counters::CounterSet;
use alveole_metrics::Gauges;
use alveole_vcpu::{Order, ReportKind};
use alveole_virtio_blk::BlkHandle;
use alveole_virtio_net::NetHandle;
use alveole_vm_config::{DriveUpdate, NetworkInterfaceUpdate};
use alveole_vm_control::{Answer, Command, Refusal, Reply, Request, State, permit};

use crate::catalog::{drive_name, interface_name};
use crate::control::Tick;
use crate::files::Job;
use crate::lifecycle::{Change, Lifecycle};
use crate::validate::limits;
use crate::{Desk, End, Event, Machine, Opened};

type Outcome = Result<Answer, Refusal>;

impl Machine {
    /// The state as clients see it.
    pub(super) fn told_state(&self) -> State {
        match self.state {
            Lifecycle::Built => State::NotStarted,
            Lifecycle::Running => State::Running,
            Lifecycle::Paused => State::Paused,
            Lifecycle::Stopped => State::Ended,
        }
    }

    /// Carries out what a client asks for, and answers.
    pub(super) fn handle_request(
        &mut self,
        request: Request,
        events: &Receiver<Event>,
        tick: &mut Tick<'_>,
    ) -> Option<End> {
        let Request { command, reply } = request;
        let state = self.told_state();
        if let Err(refusal) = permit(state, &command) {
            reply.send(Err(refusal));
            return None;
        }
        let what = command.to_string();
        let outcome = match command {
            Command::Pause => match self.pause(events, tick) {
                None => Ok(Answer::Done),
                end => return end,
            },
            Command::Resume => {
                self.resume();
                Ok(Answer::Done)
            }
            Command::CreateSnapshot(create) => {
                // Answered when it is written.
                return self.create_snapshot(create, reply, events, tick);
            }
            Command::SendCtrlAltDel => self.press_ctrl_alt_del(&what),
            Command::FlushMetrics => match tick(self) {
                Ok(()) => Ok(Answer::Done),
                Err(why) => Err(Refusal::Failed(format!("cannot {what}: {why}"))),
            },
            Command::PatchDrive(update) => {
                // Answered when what lies at a path is open.
                self.patch_drive(update, &what, reply);
                return None;
            }
            Command::GetMetrics { open_metrics } => match &self.desk {
                Some(desk) => {
                    let machine = (&*self.registry, &self.process, self.gauges());
                    Ok(desk.exposition(state, open_metrics, Some(machine)))
                }
                None => Err(nobody(&what)),
            },
            Command::SetLink { iface_id, up } => self.set_link(&iface_id, up, &what),
            Command::PatchNetworkInterface(update) => self.patch_interface(&update, &what),
            other => match &mut self.desk {
                Some(desk) => desk.carry_out(state, other),
                None => Err(nobody(&what)),
            },
        };
        reply.send(outcome);
        None
    }

    /// The keys where the guest listens to its keyboard, else the power button; never both, which would ask for two things.
    fn press_ctrl_alt_del(&mut self, what: &str) -> Outcome {
        match self.keys.press_ctrl_alt_del() {
            Pressed::Yes => Ok(Answer::Done),
            Pressed::NobodyListens => {
                log::info!(
                    "the guest does not listen to its keyboard: pressing the power button instead of Ctrl-Alt-Del"
                );
                self.press_power_button();
                Ok(Answer::Done)
            }
            Pressed::Unread => Err(Refusal::Failed(format!(
                "cannot {what}: it has not read the keys that were pressed before; wait for it, or end this process by a signal"
            ))),
        }
    }

    /// What is measured and is no counter.
    fn gauges(&self) -> Gauges {
        let began = self.desk.as_ref().map(Desk::began);
        let since_start = |at: Option<Instant>| {
            let us = at?.saturating_duration_since(began?).as_micros();
            u64::try_from(us).ok()
        };
        let milestones = self.milestones();
        Gauges {
            guest_memory_bytes: Some(self.ram.size_bytes()),
            first_instruction_us: since_start(milestones.first_instruction),
            booted_us: since_start(milestones.booted),
            ..Gauges::default()
        }
    }

    /// Processors first, then the devices: nobody works for a guest that does not run. The end, should the machine
    /// come to it meanwhile.
    pub(crate) fn pause(&mut self, events: &Receiver<Event>, tick: &mut Tick<'_>) -> Option<End> {
        if self.state == Lifecycle::Paused {
            return None;
        }
        let start = Instant::now();
        for vcpu in &self.vcpus {
            vcpu.order(Order::Pause);
        }
        let mut running = self.vcpus.len();
        while running > 0 {
            let Ok(event) = events.recv() else {
                let why = "every thread of the machine is gone";
                return Some(End::HostError(why.into()));
            };
            match event {
                Event::Vcpu(report) if matches!(report.kind, ReportKind::Paused) => running -= 1,
                // One thing after the other.
                Event::Request(request) => self.deferred.push_back(request),
                Event::Ahead => self.tracking.ahead_waits = true,
                other => {
                    if let Some(end) = self.handle(other, events, tick) {
                        return Some(end);
                    }
                }
            }
        }
        for transport in &self.transports {
            let mut transport = transport.lock().unwrap_or_else(PoisonError::into_inner);
            transport.pause();
        }
        // It was running, and nobody else changes that.
        let _ = self.change(Change::Pause);
        log::info!("paused within {:?}", start.elapsed());
        None
    }

    /// Devices first, then the processors.
    pub(crate) fn resume(&mut self) {
        if self.state == Lifecycle::Running {
            return;
        }
        for transport in &self.transports {
            let mut transport = transport.lock().unwrap_or_else(PoisonError::into_inner);
            transport.resume();
        }
        for vcpu in &self.vcpus {
            vcpu.order(Order::Run);
        }
        let _ = self.change(Change::Resume);
        if let Some(working_set) = &self.working_set {
            working_set.guest_runs();
        }
        log::info!("resumed");
    }

    fn patch_drive(&mut self, update: DriveUpdate, what: &str, reply: Reply) {
        if update.path_on_host.is_none() {
            return reply.send(self.limit_drive(&update, what));
        }
        let Some(desk) = &mut self.desk else {
            return reply.send(Err(nobody(what)));
        };
        let (_, drive) = match desk.changed_drive(&update, what) {
            Ok(changed) => changed,
            Err(refusal) => return reply.send(Err(refusal)),
        };
        let Some(disk) = self.disk(&update.drive_id).cloned() else {
            return reply.send(Err(nobody(what)));
        };
        match &self.files {
            Some(files) => files.open(Job {
                disk,
                drive,
                update,
                reply,
            }),
            None => reply.send(Err(nobody(what))),
        }
    }

    pub(crate) fn disk(&self, id: &str) -> Option<&BlkHandle> {
        let name = drive_name(id);
        self.disks.iter().find(|d| d.counters().name() == name)
    }

    /// Nothing but bounds changes: there is nothing to open, and no rule of the machine that they could break.
    fn limit_drive(&mut self, update: &DriveUpdate, what: &str) -> Outcome {
        let desk = self.desk.as_mut().ok_or_else(|| nobody(what))?;
        desk.change_drive_limits(update, what)?;
        let disk = self.disk(&update.drive_id).ok_or_else(|| nobody(what))?;
        if let Some(limiter) = &update.rate_limiter {
            disk.change_limits(limits(limiter));
        }
        Ok(Answer::Done)
    }

    /// What a client wants to be put into a drive is open, or cannot be opened.
    pub(super) fn put_in(&mut self, opened: Opened) {
        let Opened {
            disk,
            update,
            reply,
            medium,
        } = opened;
        let what = Command::PatchDrive(update.clone()).to_string();
        let Some(desk) = &mut self.desk else {
            return reply.send(Err(nobody(&what)));
        };
        // Anew: other changes may have been carried out since the job was handed over.
        let next = match desk.changed_drive(&update, &what) {
            Ok((next, _)) => next,
            Err(refusal) => return reply.send(Err(refusal)),
        };
        let put = match medium {
            Ok(Some(medium)) => {
                disk.put_in(medium);
                Ok(())
            }
            Ok(None) => disk.refresh().map(drop).map_err(|e| e.to_string()),
            Err(why) => Err(why),
        };
        if let Err(why) = put {
            return reply.send(Err(Refusal::Failed(format!("cannot {what}: {why}"))));
        }
        if let Some(limiter) = &update.rate_limiter {
            disk.change_limits(limits(limiter));
        }
        desk.set_config(next);
        reply.send(Ok(Answer::Done));
    }

    fn set_link(&self, id: &str, up: bool, what: &str) -> Outcome {
        let name = interface_name(id);
        let all = self.interfaces.iter();
        match all.clone().find(|i| i.counters().name() == name) {
            Some(interface) => {
                interface.set_link(up);
                Ok(Answer::Done)
            }
            None => {
                let name =
                    |i: &NetHandle| i.counters().name().trim_start_matches("net ").to_owned();
                let known: Vec<_> = all.map(name).collect();
                Err(Refusal::Failed(format!(
                    "cannot {what}: the machine has no such network interface; it has {}",
                    if known.is_empty() {
                        "none".to_owned()
                    } else {
                        known.join(", ")
                    }
                )))
            }
        }
    }

    fn patch_interface(&mut self, update: &NetworkInterfaceUpdate, what: &str) -> Outcome {
        let desk = self.desk.as_mut().ok_or_else(|| nobody(what))?;
        desk.change_interface(update, what)?;
        let name = interface_name(&update.iface_id);
        let interface = self.interfaces.iter().find(|i| i.counters().name() == name);
        let interface = interface.ok_or_else(|| nobody(what))?;
        if let Some(limiter) = &update.rx_rate_limiter {
            interface.change_rx_limits(limits(limiter));
        }
        if let Some(limiter) = &update.tx_rate_limiter {
            interface.change_tx_limits(limits(limiter));
        }
        Ok(Answer::Done)
    }
}

/// A machine is asked whose owner has not given it what it needs to answer.
fn nobody(what: &str) -> Refusal {
    Refusal::Failed(format!(
        "cannot {what}: this is a bug of the monitor, please report it"
    ))
}
