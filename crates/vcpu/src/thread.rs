//! The thread that runs one processor.

use std::io;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use alveole_hypervisor::{CpuExit, CpuPosition, CpuState, Kick, StuckReason, VirtualCpu};
use alveole_io_bus::{Bus, MachineRequest, Outcome};
use alveole_thread_sandbox::Role;

use crate::exits::{AccessKind, ExitCounts};
use crate::state::{Effect, Input, State, next};

/// How often to look whether a thread has ended that may never do so.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// The two address spaces a processor reaches.
#[derive(Debug, Clone)]
pub struct Buses {
    /// 16-bit port space.
    pub ports: Bus,
    /// Guest-physical addresses that are not RAM.
    pub memory: Bus,
}

/// What the machine orders a processor to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Run guest code.
    Run,
    /// Pause, and report that.
    Pause,
    /// Report the processor's state. Only for a processor that is paused, and while all others of its machine are.
    Save,
    /// End the thread.
    Stop,
}

/// Word from a processor.
#[derive(Debug)]
pub struct Report {
    /// Which processor.
    pub cpu: u32,
    /// When it happened.
    pub at: Instant,
    /// What happened.
    pub kind: ReportKind,
}

/// What a processor reports.
#[derive(Debug)]
pub enum ReportKind {
    /// It is paused, as ordered.
    Paused,
    /// Its state, as ordered, or why that cannot be told.
    Saved(Box<Result<CpuState, String>>),
    /// The guest asks something of the machine. After [`MachineRequest::PowerOff`] and
    /// [`MachineRequest::Reset`] the processor waits for orders, else it goes on.
    Asked(MachineRequest, CpuPosition),
    /// The processor cannot go on; it waits for the order to stop.
    Ended(EndReason, CpuPosition),
    /// The sandbox could not be entered; the thread is gone.
    NoSandbox(String),
}

/// Why a processor cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EndReason {
    /// It faulted while handling a double fault.
    TripleFault,
    /// The hypervisor gave up on it.
    Stuck(StuckReason),
    /// The host cannot run it any more.
    HostError(String),
}

/// Why a processor could not be started.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// The host gave no thread.
    #[error(
        "cannot start the thread of processor {index}: {source}; is the limit on processes (ulimit -u) reached?"
    )]
    NoThread {
        /// Which processor.
        index: u32,
        /// What the host said.
        source: io::Error,
    },
}

/// A processor that is ready to get its thread.
pub struct Vcpu {
    /// Its number, from 0.
    pub index: u32,
    /// The configured or restored processor.
    pub cpu: Box<dyn VirtualCpu>,
    /// What it reaches.
    pub buses: Buses,
    /// Devices whose registers its accesses reach: what they add to its system calls (see
    /// [`alveole_thread_sandbox::enter_with`]).
    pub sandbox: Vec<&'static str>,
    /// Where its reports go. Called on the processor's thread; must not block.
    pub report: Box<dyn Fn(Report) + Send>,
}

/// The machine's end of a processor.
pub struct VcpuHandle {
    index: u32,
    orders: Sender<Order>,
    kick: Arc<dyn Kick>,
    counts: Arc<ExitCounts>,
    first_run: Arc<OnceLock<Instant>>,
    thread: Option<JoinHandle<()>>,
}

impl Vcpu {
    /// Starts the thread. It enters its sandbox and then waits for orders.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn start(self) -> Result<VcpuHandle, VcpuError> {
        let (orders, inbox) = mpsc::channel();
        let index = self.index;
        let kick = self.cpu.kick();
        let counts = Arc::new(ExitCounts::new(index));
        let first_run = Arc::new(OnceLock::new());
        let runner = Runner {
            vcpu: self,
            orders: inbox,
            kick: kick.clone(),
            counts: counts.clone(),
            first_run: first_run.clone(),
            settled: true,
        };
        let thread = std::thread::Builder::new()
            .name(format!("vcpu {index}"))
            .stack_size(alveole_thread_sandbox::STACK_BYTES)
            .spawn(move || runner.live())
            .map_err(|source| VcpuError::NoThread { index, source })?;
        Ok(VcpuHandle {
            index,
            orders,
            kick,
            counts,
            first_run,
            thread: Some(thread),
        })
    }
}

impl VcpuHandle {
    /// The processor's number.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Sends an order and makes a running processor look at it. An order to a thread that is gone is lost.
    pub fn order(&self, order: Order) {
        // Who is to run and does so already need not be told; who does not waits for orders.
        if self.orders.send(order).is_ok() && order != Order::Run {
            self.kick.kick();
        }
    }

    /// Its exits so far.
    #[must_use]
    pub fn counts(&self) -> &Arc<ExitCounts> {
        &self.counts
    }

    /// When it was about to run its first instruction.
    #[must_use]
    pub fn first_run(&self) -> Option<Instant> {
        self.first_run.get().copied()
    }

    /// Orders the processor to stop and waits until its thread is gone. What it counted stays.
    pub fn stop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.order(Order::Stop);
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}

impl VcpuHandle {
    /// As [`Self::stop`], but waits no longer than `until`: whether the thread is gone. Else it is left to itself: it leaves as soon as
    /// the host lets go of it, without running its guest again.
    pub fn stop_by(&mut self, until: Instant) -> bool {
        let Some(thread) = self.thread.take() else {
            return true;
        };
        self.order(Order::Stop);
        while !thread.is_finished() && Instant::now() < until {
            std::thread::park_timeout(LOOK_AGAIN);
        }
        let is_gone = thread.is_finished();
        if is_gone {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
        is_gone
    }
}

impl Drop for VcpuHandle {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Runner {
    vcpu: Vcpu,
    orders: Receiver<Order>,
    kick: Arc<dyn Kick>,
    counts: Arc<ExitCounts>,
    first_run: Arc<OnceLock<Instant>>,
    /// Whether the last run, if there was one, left nothing to be completed by the next.
    settled: bool,
}

impl Runner {
    fn live(mut self) {
        self.kick.bind_to_this_thread();
        let name = format!("vcpu {}", self.vcpu.index);
        let sandbox = &self.vcpu.sandbox;
        if let Err(e) = alveole_thread_sandbox::enter_with(Role::Vcpu, &name, sandbox) {
            self.report(ReportKind::NoSandbox(e.to_string()));
            return;
        }
        let (mut state, mut effect) = next(State::Created, Input::Entered);
        loop {
            let input = match effect {
                Effect::Leave => return,
                Effect::TellPaused => {
                    self.vcpu.cpu.stands_still();
                    self.report(ReportKind::Paused);
                    self.wait()
                }
                Effect::TellState => {
                    let saved = self.save();
                    self.report(ReportKind::Saved(Box::new(saved)));
                    self.wait()
                }
                Effect::RefuseState => {
                    let why = "it runs; pause it first".to_owned();
                    self.report(ReportKind::Saved(Box::new(Err(why))));
                    self.run()
                }
                Effect::Wait => self.wait(),
                Effect::RunGuest => self.run(),
            };
            (state, effect) = next(state, input);
        }
    }

    /// What an exit asks for (the bytes of a read, the instruction pointer behind an access) gets into the processor when it is
    /// run again, and is no part of its state before (Linux Documentation/virt/kvm/api.rst, KVM_EXIT_IO). Here that has always
    /// happened: orders are looked at after [`CpuExit::Interrupted`] only, and a run completes what is pending before it
    /// heeds `immediate_exit` or a signal (the same page). The exceptions are processors that asked for the machine's end, or
    /// cannot go on: they wait for orders where they are.
    fn save(&mut self) -> Result<CpuState, String> {
        if !self.settled {
            return Err(
                "its guest has asked to be powered off or reset, or cannot go on".to_owned(),
            );
        }
        self.vcpu.cpu.save().map_err(|e| e.to_string())
    }

    fn wait(&self) -> Input {
        // A machine that is gone orders nothing any more.
        self.orders.recv().map_or(Input::Stop, input_of)
    }

    fn run(&mut self) -> Input {
        self.first_run.get_or_init(Instant::now);
        loop {
            match self.run_once() {
                Next::GoOn => {}
                Next::LookAtOrders => {
                    // Cleared first: a kick that comes later ends the next run.
                    self.kick.clear();
                    match self.orders.try_recv() {
                        Ok(order) => return input_of(order),
                        Err(TryRecvError::Disconnected) => return Input::Stop,
                        Err(TryRecvError::Empty) => {}
                    }
                }
                Next::Asked(request) => {
                    let position = self.vcpu.cpu.position();
                    self.report(ReportKind::Asked(request, position));
                    if matches!(request, MachineRequest::PowerOff | MachineRequest::Reset) {
                        return Input::Yielded;
                    }
                }
                Next::Ended(reason) => {
                    let position = self.vcpu.cpu.position();
                    self.report(ReportKind::Ended(reason, position));
                    return Input::Yielded;
                }
            }
        }
    }

    fn run_once(&mut self) -> Next {
        let Self {
            vcpu: Vcpu { cpu, buses, .. },
            counts,
            settled,
            ..
        } = self;
        let exit = cpu.run();
        *settled = matches!(exit, Ok(CpuExit::Interrupted));
        match exit {
            Ok(CpuExit::PortRead {
                port,
                size_bytes,
                data,
            }) => {
                counts.access(AccessKind::PortRead, u64::from(port));
                first_request(
                    data.chunks_mut(size_bytes.max(1))
                        .map(|element| buses.ports.read(u64::from(port), element)),
                )
            }
            Ok(CpuExit::PortWrite {
                port,
                size_bytes,
                data,
            }) => {
                counts.access(AccessKind::PortWrite, u64::from(port));
                first_request(
                    data.chunks(size_bytes.max(1))
                        .map(|element| buses.ports.write(u64::from(port), element)),
                )
            }
            Ok(CpuExit::MmioRead { addr, data }) => {
                counts.access(AccessKind::MmioRead, addr);
                first_request(std::iter::once(buses.memory.read(addr, data)))
            }
            Ok(CpuExit::MmioWrite { addr, data }) => {
                counts.access(AccessKind::MmioWrite, addr);
                first_request(std::iter::once(buses.memory.write(addr, data)))
            }
            Ok(CpuExit::Interrupted) => {
                counts.interrupted();
                Next::LookAtOrders
            }
            Ok(CpuExit::TripleFault) => Next::Ended(EndReason::TripleFault),
            Ok(CpuExit::Stuck(reason)) => Next::Ended(EndReason::Stuck(reason)),
            Err(e) => Next::Ended(EndReason::HostError(e.to_string())),
        }
    }

    fn report(&self, kind: ReportKind) {
        (self.vcpu.report)(Report {
            cpu: self.vcpu.index,
            at: Instant::now(),
            kind,
        });
    }
}

enum Next {
    GoOn,
    LookAtOrders,
    Asked(MachineRequest),
    Ended(EndReason),
}

/// Carries out the elements of one exit in order, up to the first that asks something of the machine.
fn first_request(outcomes: impl Iterator<Item = Outcome>) -> Next {
    for outcome in outcomes {
        if let Outcome::Asks(request) = outcome {
            return Next::Asked(request);
        }
    }
    Next::GoOn
}

fn input_of(order: Order) -> Input {
    match order {
        Order::Run => Input::Run,
        Order::Pause => Input::Pause,
        Order::Save => Input::Save,
        Order::Stop => Input::Stop,
    }
}
