//! The control thread: the one owner of a machine's state from the first instruction to the end.
//!
//! Everybody else (processors, console, signals) sends [`Event`]s and waits for nothing. Waiting goes one
//! way only: control waits for processors and for the devices loop, never the other way round.

mod requests;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use alveole_board_devices::{Generation, Keys, PowerButton};
use alveole_counters::Registry;
use alveole_guest_memory::GuestRam;
use alveole_hypervisor::{CpuPosition, Partition};
use alveole_io_bus::MachineRequest;
use alveole_metrics::Process;
use alveole_serial::{ConsoleEvent, ConsoleHandle};
use alveole_thread_sandbox::Role;
use alveole_vcpu::{EndReason, Order, Report, ReportKind, VcpuHandle};
use alveole_virtio_blk::BlkHandle;
use alveole_virtio_net::NetHandle;
use alveole_virtio_vsock::VsockHandle;

use alveole_vm_control::Request;

use crate::build::{OnSigterm, Options};
use crate::catalog::{Running, SharedPart, SharedTransport};
use crate::lifecycle::{Change, Lifecycle, next};
use crate::snapshot::{Taken, Tracking, WorkingSet};
use crate::{Desk, End, Files, Opened};

/// Of this architecture.
const PAGE_BYTES: u64 = 4096;
/// How long a guest may go on after its kernel has said that it panicked: time for a crash dump's first
/// words and for `panic=` to reset the machine. A kernel told not to reboot would spin for ever.
const PANIC_GRACE: Duration = Duration::from_secs(10);
/// How long the console may take to write what the guest said last. A reader that does not read must not
/// keep a dead machine alive.
const CONSOLE_FLUSH: Duration = Duration::from_secs(2);

/// How long the threads of a machine whose memory another process serves may take to stop. Abused by a process that serves no page,
/// for which they would wait for ever.
const HANGING: Duration = Duration::from_millis(500);

/// Something that control must know of.
#[derive(Debug)]
pub enum Event {
    /// Word from a processor.
    Vcpu(Box<Report>),
    /// Word from the person at the console.
    Console(ConsoleEvent),
    /// A signal to this process.
    Signal(i32),
    /// The devices loop, or the thread that opens files, or serves the API, is gone, and why.
    LoopEnded(String),
    /// A client asks for something.
    Request(Request),
    /// What a client wants to be put into a drive is open, or cannot be opened.
    Opened(Box<Opened>),
    /// Memory of a live snapshot has been written while the guest runs: another round can begin.
    Ahead,
    /// The memory of a snapshot is captured: the guest may go on.
    Captured,
    /// A snapshot is written, or cannot be.
    Taken(Box<Taken>),
}

/// What is called now and then while the guest runs; the reason where it could not do its work.
pub type Tick<'a> = dyn FnMut(&Machine) -> Result<(), String> + 'a;

/// Where events are sent. Sending never blocks.
#[derive(Debug, Clone)]
pub struct Mailbox(Sender<Event>);

impl Mailbox {
    /// A mailbox and the end that control reads.
    #[must_use]
    pub fn new() -> (Self, Receiver<Event>) {
        let (sender, receiver) = mpsc::channel();
        (Self(sender), receiver)
    }

    /// Sends an event. Lost when the machine has ended.
    pub fn send(&self, event: Event) {
        let _ = self.0.send(event);
    }
}

/// The moments of a boot.
#[derive(Debug, Clone, Copy, Default)]
pub struct Milestones {
    /// The first processor was about to run its first instruction.
    pub first_instruction: Option<Instant>,
    /// The guest said that its init runs.
    pub booted: Option<Instant>,
}

/// A machine that is built and waits for [`Machine::run`].
pub struct Machine {
    pub(crate) state: Lifecycle,
    pub(crate) vcpus: Vec<VcpuHandle>,
    pub(crate) console: ConsoleHandle,
    pub(crate) power_button: PowerButton,
    pub(crate) keys: Keys,
    pub(crate) generation: Generation,
    /// What the devices add to the system calls of threads.
    pub(crate) sandbox: Vec<&'static str>,
    pub(crate) disks: Vec<BlkHandle>,
    pub(crate) interfaces: Vec<NetHandle>,
    pub(crate) vsock: Option<VsockHandle>,
    /// Virtio devices behind their transports, in the order of their places.
    pub(crate) transports: Vec<SharedTransport>,
    /// Other parts that have a state.
    pub(crate) parts: Vec<SharedPart>,
    pub(crate) tracking: Tracking,
    /// A machine that is paused when it is built is to run at once.
    pub(crate) goes_on: bool,
    /// Who reads or records what it touches first.
    pub(crate) working_set: Option<WorkingSet>,
    /// Another process serves its memory: whoever touches a page may wait for ever.
    pub(crate) may_hang: bool,
    /// What clients have said and are told; none: nobody can ask.
    pub(crate) desk: Option<Desk>,
    /// The thread that opens files for clients.
    pub(crate) files: Option<Files>,
    /// What clients asked for while processors were being paused.
    pub(crate) deferred: VecDeque<Request>,
    /// The event loops of devices.
    pub(crate) threads: Running,
    pub(crate) registry: Arc<Registry>,
    /// What the host's kernel knows of this process.
    pub(crate) process: Process,
    pub(crate) options: Options,
    pub(crate) booted: Option<Instant>,
    /// When, on which processor and where the guest's kernel said that it panicked.
    pub(crate) panicked: Option<(Instant, u32, CpuPosition)>,
    pub(crate) asked_to_stop: bool,
    /// After the processors: they go first when the machine is dropped, then what they run on.
    pub(crate) partition: Box<dyn Partition>,
    pub(crate) ram: GuestRam,
}

impl Machine {
    /// All counters of this machine.
    #[must_use]
    pub fn counters(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// What tells the guest that it goes on as another machine.
    #[must_use]
    pub fn generation(&self) -> &Generation {
        &self.generation
    }

    /// The owner's handles on the disks, in the order in which the guest finds them.
    #[must_use]
    pub fn disks(&self) -> &[BlkHandle] {
        &self.disks
    }

    /// The owner's handles on the network interfaces, in the order in which the guest finds them.
    #[must_use]
    pub fn interfaces(&self) -> &[NetHandle] {
        &self.interfaces
    }

    /// The owner's handle on the socket device, if the guest has one.
    #[must_use]
    pub fn vsock(&self) -> Option<&VsockHandle> {
        self.vsock.as_ref()
    }

    /// The moments of the boot so far.
    #[must_use]
    pub fn milestones(&self) -> Milestones {
        Milestones {
            first_instruction: self.vcpus.first().and_then(VcpuHandle::first_run),
            booted: self.booted,
        }
    }

    /// Lets clients ask: requests that arrive as events are answered from now on. `files` opens what they put into
    /// drives; without it none can be changed.
    pub fn answer_clients(&mut self, desk: Desk, files: Option<Files>) {
        self.desk = Some(desk);
        self.process = Process::open(PAGE_BYTES);
        self.files = files;
    }

    /// Confines the calling thread to the control role, lets the guest run and drives it until it ends. `events` is
    /// the other end of the mailbox that the machine was built with.
    ///
    /// `tick` is called every `period`, and once when the guest has ended (for counters), when the guest has said
    /// that its init runs, and when a client asks for it.
    pub fn run(&mut self, events: &Receiver<Event>, period: Duration, tick: &mut Tick<'_>) -> End {
        let end = match alveole_thread_sandbox::enter_with(Role::Control, "control", &self.sandbox)
        {
            Ok(()) => self.drive(events, period, tick),
            Err(e) => End::HostError(e.to_string()),
        };
        self.wind_down();
        say_if_failed(tick(self));
        end
    }

    fn drive(&mut self, events: &Receiver<Event>, period: Duration, tick: &mut Tick<'_>) -> End {
        match self.state {
            Lifecycle::Paused => {
                // Its processors hear of it as soon as they run.
                self.generation.announce();
                if self.goes_on {
                    self.resume();
                }
            }
            _ => {
                if let Err(why) = self.change(Change::Start) {
                    return End::HostError(why.into());
                }
                for vcpu in &self.vcpus {
                    vcpu.order(Order::Run);
                }
                log::info!("the guest runs");
            }
        }
        let mut next_tick = Instant::now() + period;
        loop {
            if std::mem::take(&mut self.tracking.ahead_waits)
                && let Some(end) = self.go_on_ahead(events, tick)
            {
                return end;
            }
            if let Some(request) = self.deferred.pop_front() {
                if let Some(end) = self.handle_request(request, events, tick) {
                    return end;
                }
                continue;
            }
            let deadline = match &self.panicked {
                Some((at, ..)) => next_tick.min(*at + PANIC_GRACE),
                None => next_tick,
            };
            match events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(event) => {
                    let was_booted = self.booted;
                    if let Some(end) = self.handle(event, events, tick) {
                        return end;
                    }
                    if was_booted.is_none() && self.booted.is_some() {
                        say_if_failed(tick(self));
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    if let Some((at, cpu, position)) = &self.panicked
                        && at.elapsed() >= PANIC_GRACE
                    {
                        return self.panic(*cpu, position.clone());
                    }
                    say_if_failed(tick(self));
                    next_tick = Instant::now() + period;
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return End::HostError("every thread of the machine is gone".into());
                }
            }
        }
    }

    pub(crate) fn handle(
        &mut self,
        event: Event,
        events: &Receiver<Event>,
        tick: &mut Tick<'_>,
    ) -> Option<End> {
        match event {
            Event::Vcpu(report) => self.handle_report(*report),
            Event::Console(ConsoleEvent::Quit) => Some(End::Quit),
            Event::Console(ConsoleEvent::PowerButton) => {
                self.press_power_button();
                None
            }
            Event::Console(ConsoleEvent::TerminalLost) => {
                self.options.end_with_terminal.then_some(End::TerminalLost)
            }
            Event::Signal(number) => self.handle_signal(number),
            Event::LoopEnded(why) => Some(End::HostError(why)),
            Event::Request(request) => self.handle_request(request, events, tick),
            Event::Opened(opened) => {
                self.put_in(*opened);
                None
            }
            // It was waited for, or nobody waits any more.
            Event::Captured => None,
            Event::Ahead => self.go_on_ahead(events, tick),
            Event::Taken(taken) => {
                self.snapshot_taken(*taken);
                None
            }
        }
    }

    /// Every signal ends the machine, but for the first SIGTERM where that is to ask the guest to power off.
    fn handle_signal(&mut self, number: i32) -> Option<End> {
        const SIGTERM: i32 = 15;
        let ask = self.options.on_sigterm == OnSigterm::PressPowerButton;
        if number != SIGTERM || !ask || self.asked_to_stop {
            return Some(End::Signal(number));
        }
        self.asked_to_stop = true;
        log::info!("SIGTERM: pressing the guest's power button; a second SIGTERM ends it at once");
        self.press_power_button();
        None
    }

    fn press_power_button(&mut self) {
        match self.change(Change::PressPowerButton) {
            Ok(()) => self.power_button.press(),
            Err(why) => log::warn!("the power button does nothing: {why}"),
        }
    }

    fn handle_report(&mut self, report: Report) -> Option<End> {
        let cpu = report.cpu;
        match report.kind {
            // It is waited for where it was ordered.
            ReportKind::Paused | ReportKind::Saved(_) => None,
            ReportKind::NoSandbox(why) => Some(End::HostError(why)),
            ReportKind::Asked(MachineRequest::Booted, _) => {
                self.booted.get_or_insert(report.at);
                None
            }
            ReportKind::Asked(MachineRequest::Panicked, position) => {
                self.panicked.get_or_insert((report.at, cpu, position));
                None
            }
            ReportKind::Asked(MachineRequest::PowerOff, position) => {
                Some(End::PowerOff { cpu, position })
            }
            ReportKind::Asked(MachineRequest::Reset, position) => {
                if self.has_panicked() {
                    return Some(self.panic(cpu, position));
                }
                Some(End::Reboot { cpu, position })
            }
            ReportKind::Ended(EndReason::TripleFault, position) => {
                if self.has_panicked() {
                    return Some(self.panic(cpu, position));
                }
                Some(End::TripleFault { cpu, position })
            }
            ReportKind::Ended(EndReason::Stuck(reason), position) => Some(End::Stuck {
                cpu,
                reason,
                position,
            }),
            ReportKind::Ended(EndReason::HostError(why), position) => {
                Some(End::HostError(format!("vCPU {cpu} {position}: {why}")))
            }
        }
    }

    /// A kernel without the driver of the panic port still says on the console that it panicked.
    fn has_panicked(&self) -> bool {
        self.panicked.is_some() || self.console.last_panic_line().is_some()
    }

    fn panic(&self, cpu: u32, position: CpuPosition) -> End {
        End::Panic {
            cpu,
            position,
            message: self.console.last_panic_line(),
        }
    }

    fn change(&mut self, change: Change) -> Result<(), &'static str> {
        self.state = next(self.state, change)?;
        if let Some(desk) = &self.desk {
            desk.post(self.told_state());
        }
        Ok(())
    }

    /// Processors first, then the devices: nobody works for a guest that does not run.
    fn wind_down(&mut self) {
        let _ = self.change(Change::Stop);
        let until = Instant::now() + HANGING;
        let mut left = 0;
        if self.may_hang {
            for vcpu in &self.vcpus {
                vcpu.order(Order::Stop);
            }
            let gone = self.vcpus.iter_mut().map(|vcpu| vcpu.stop_by(until));
            left += gone.filter(|gone| !gone).count();
        }
        for vcpu in &mut self.vcpus {
            vcpu.stop();
        }
        let lost = self.console.flush(CONSOLE_FLUSH);
        if lost > 0 {
            log::warn!("nobody took the last {lost} bytes of the console");
        }
        if self.may_hang {
            left += self.threads.stop_by(until);
        }
        self.threads.stop();
        // KVM has pages brought in by workers of the kernel's while a processor waits (asynchronous page faults), and waits for those
        // before a partition is gone: for ever, uninterruptibly, if nobody puts the pages in any more.
        // Not while a snapshot is written: it would be one of zeroes.
        if self.may_hang && left == 0 && !self.tracking.is_underway() {
            self.ram.stop_being_served();
        }
        if left > 0 {
            log::warn!(
                "{left} threads wait for pages of guest memory that nobody has put in; they end with this process"
            );
        }
        if let Some(working_set) = self.working_set.take() {
            working_set.end();
        }
        if let Some(vsock) = &self.vsock {
            vsock.remove_socket();
        }
    }
}

/// What was written now and then could not be: the guest goes on.
fn say_if_failed(told: Result<(), String>) {
    if let Err(why) = told {
        log::warn!("{why}");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.threads.are_running() {
            self.wind_down();
        }
    }
}
