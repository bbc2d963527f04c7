//! A hypervisor that plays guests from a script: every run of a processor takes the next [`Step`].
//!
//! For tests of everything above the port, without KVM. What the guest would have read is recorded.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use alveole_guest_memory::GuestRam;
use alveole_interrupts::{Doorbell, IrqLine, MsiMessage, MsiVector};

use crate::state::{IO_APIC_PINS, IoApicState, LAPIC_BYTES, MIN_XSAVE_BYTES};
use crate::{
    CpuError, CpuExit, CpuPosition, CpuState, CpuidEntry, DoorbellValue, InitialState, Kick,
    MsrChange, MsrRefusal, NotedFrom, Partition, PartitionError, PartitionState, RestoredClock,
    StateError, StuckReason, VirtualCpu,
};

/// Size of the pages whose writes are noted.
const PAGE_BYTES: u64 = 4096;

/// One thing the scripted guest does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Reads one element of a port.
    PortRead(u16, usize),
    /// Writes bytes to a port, one element of that width.
    PortWrite(u16, Vec<u8>),
    /// Writes bytes to a port, one byte at a time (`rep outsb`).
    PortWriteString(u16, Vec<u8>),
    /// Reads MMIO.
    MmioRead(u64, usize),
    /// Writes MMIO.
    MmioWrite(u64, Vec<u8>),
    /// Writes bytes to RAM, and goes on with the next step.
    RamWrite(u64, Vec<u8>),
    /// Runs code that needs nobody until it is kicked.
    Compute,
    /// Faults three times.
    TripleFault,
    /// Meets an instruction nobody can emulate.
    Stuck(StuckReason),
    /// The hypervisor fails.
    Fail,
}

/// A message-signalled interrupt of a scripted partition: its line, and the message it has.
#[derive(Clone)]
pub struct FakeVector {
    /// Takes an edge whenever the device signals.
    pub line: IrqLine,
    /// What the guest has connected it to.
    pub message: Arc<Mutex<Option<MsiMessage>>>,
}

#[derive(Default)]
struct Shared {
    scripts: Vec<VecDeque<Step>>,
    reads: Vec<Vec<u8>>,
    configured: Vec<(u32, Vec<CpuidEntry>, InitialState)>,
    msrs: BTreeMap<(u32, u32), u64>,
    lines: Vec<(u32, IrqLine)>,
    vectors: Vec<FakeVector>,
    doorbells: Vec<(u64, DoorbellValue, Doorbell)>,
    ram: Option<GuestRam>,
    pauses: usize,
    state: Option<PartitionState>,
    restored: Option<(PartitionState, RestoredClock)>,
    restored_cpus: BTreeMap<u32, CpuState>,
    /// Numbers of the pages that were written, while they are noted.
    dirty: Option<BTreeSet<u64>>,
}

/// The model-specific registers of scripted processors, and what they hold at first.
pub const MSRS: [(u32, u64); 2] = [(0x10a, 0xff00), (0x8b, 0x1234)];
/// One of them that keeps what it holds: any other value is refused.
pub const FIXED_MSR: (u32, u64) = (0x3a, 1);
/// Frequency of their time stamp counters; they have no other.
pub const TSC_KHZ: u32 = 2_000_000;
/// The one capability of scripted hypervisors.
pub const CAPABILITY: u32 = 121;

/// The scripted partition. Clones share the script and the record.
#[derive(Clone, Default)]
pub struct FakePartition {
    shared: Arc<Mutex<Shared>>,
    refuse_cpu: Option<u32>,
    cpuid: Option<Vec<CpuidEntry>>,
}

impl FakePartition {
    /// A partition whose processor `i` plays `scripts[i]` and then computes until kicked.
    #[must_use]
    pub fn new(scripts: Vec<Vec<Step>>) -> Self {
        let scripts = scripts.into_iter().map(VecDeque::from).collect();
        Self {
            shared: Arc::new(Mutex::new(Shared {
                scripts,
                ..Shared::default()
            })),
            refuse_cpu: None,
            cpuid: None,
        }
    }

    /// The same, but it supports these CPUID answers.
    #[must_use]
    pub fn supporting(mut self, cpuid: Vec<CpuidEntry>) -> Self {
        self.cpuid = Some(cpuid);
        self
    }

    /// The same, but making processor `apic_id` fails.
    #[must_use]
    pub fn refusing_cpu(mut self, apic_id: u32) -> Self {
        self.refuse_cpu = Some(apic_id);
        self
    }

    /// What the guest read so far, one entry an access, in the order the accesses were completed.
    #[must_use]
    pub fn reads(&self) -> Vec<Vec<u8>> {
        self.lock().reads.clone()
    }

    /// How each processor was configured: APIC id, CPUID, first state.
    #[must_use]
    pub fn configured(&self) -> Vec<(u32, Vec<CpuidEntry>, InitialState)> {
        self.lock().configured.clone()
    }

    /// What processor `apic_id` holds in the model-specific register `index`, if it was changed.
    #[must_use]
    pub fn msr(&self, apic_id: u32, index: u32) -> Option<u64> {
        self.lock().msrs.get(&(apic_id, index)).copied()
    }

    /// What was put into the partition by [`Partition::restore`], and how its clock was to go on.
    #[must_use]
    pub fn restored(&self) -> Option<(PartitionState, RestoredClock)> {
        self.lock().restored.clone()
    }

    /// What was put into processor `apic_id` by [`VirtualCpu::restore`].
    #[must_use]
    pub fn restored_cpu(&self, apic_id: u32) -> Option<CpuState> {
        self.lock().restored_cpus.get(&apic_id).cloned()
    }

    /// What [`Partition::save`] gives from now on.
    pub fn set_state(&self, state: PartitionState) {
        self.lock().state = Some(state);
    }

    /// How often a processor was told that it is made to stand still.
    #[must_use]
    pub fn pauses(&self) -> usize {
        self.lock().pauses
    }

    /// The interrupt lines handed out, with their numbers.
    #[must_use]
    pub fn lines(&self) -> Vec<(u32, IrqLine)> {
        self.lock().lines.clone()
    }

    /// The message-signalled interrupts handed out, in order.
    #[must_use]
    pub fn vectors(&self) -> Vec<FakeVector> {
        self.lock().vectors.clone()
    }

    /// The doorbells handed out, with address and value. A scripted write rings none: it comes out as an
    /// exit.
    #[must_use]
    pub fn doorbells(&self) -> Vec<(u64, DoorbellValue, Doorbell)> {
        self.lock().doorbells.clone()
    }

    /// The RAM the guest was shown.
    #[must_use]
    pub fn ram(&self) -> Option<GuestRam> {
        self.lock().ram.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Partition for FakePartition {
    fn map_ram(&mut self, ram: &GuestRam) -> Result<(), PartitionError> {
        self.lock().ram = Some(ram.clone());
        Ok(())
    }

    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>, PartitionError> {
        if let Some(cpuid) = &self.cpuid {
            return Ok(cpuid.clone());
        }
        let leaf = |leaf, eax, ecx, edx| CpuidEntry {
            leaf,
            eax,
            ecx,
            edx,
            ..Default::default()
        };
        Ok(vec![
            leaf(0, 0xb, 0, 0),
            leaf(1, 0, 1 << 21, 1 << 9),
            leaf(0xb, 0, 0, 0),
        ])
    }

    fn max_cpus(&self) -> u32 {
        64
    }

    fn has_tsc_deadline_timer(&self) -> bool {
        true
    }

    fn has_nested_paging(&self) -> bool {
        true
    }

    fn has_capability(&self, number: u32) -> bool {
        number == CAPABILITY
    }

    fn create_cpu(&self, apic_id: u32) -> Result<Box<dyn VirtualCpu>, PartitionError> {
        if self.refuse_cpu == Some(apic_id) {
            return Err(PartitionError::Refused {
                act: format!("making processor {apic_id}"),
                source: io::Error::from_raw_os_error(12),
                hint: "the script says so",
            });
        }
        Ok(Box::new(FakeCpu {
            apic_id,
            partition: self.clone(),
            kick: Arc::new(FakeKick::default()),
            buffer: Vec::new(),
            reading: false,
            state: CpuState {
                xsave: vec![0; MIN_XSAVE_BYTES],
                lapic: vec![0; LAPIC_BYTES],
                tsc_khz: Some(TSC_KHZ),
                msrs: MSRS.into_iter().chain([FIXED_MSR]).collect(),
                ..CpuState::default()
            },
        }))
    }

    fn irq_line(&self, gsi: u32) -> Result<IrqLine, PartitionError> {
        let line = IrqLine::new().map_err(|source| PartitionError::Refused {
            act: format!("making interrupt line {gsi}"),
            source,
            hint: "",
        })?;
        self.lock().lines.push((gsi, line.clone()));
        Ok(line)
    }

    fn msi_vector(&self) -> Result<MsiVector, PartitionError> {
        let line = IrqLine::new().map_err(refused("making a message-signalled interrupt"))?;
        let message = Arc::new(Mutex::new(None));
        self.lock().vectors.push(FakeVector {
            line: line.clone(),
            message: message.clone(),
        });
        Ok(MsiVector::new(
            line,
            Arc::new(move |new| {
                *message.lock().unwrap_or_else(PoisonError::into_inner) = new;
                Ok(())
            }),
        ))
    }

    fn doorbell(&self, addr: u64, rings_on: DoorbellValue) -> Result<Doorbell, PartitionError> {
        let bell = Doorbell::new().map_err(refused("making a doorbell"))?;
        self.lock().doorbells.push((addr, rings_on, bell.clone()));
        Ok(bell)
    }

    fn save(&self) -> Result<PartitionState, PartitionError> {
        Ok(self.lock().state.clone().unwrap_or_else(|| PartitionState {
            io_apic: IoApicState {
                redirections: vec![0; IO_APIC_PINS],
                ..IoApicState::default()
            },
            ..PartitionState::default()
        }))
    }

    fn restore(&self, state: &PartitionState, clock: RestoredClock) -> Result<(), PartitionError> {
        state.check().map_err(wrong("the interrupt controllers"))?;
        let mut shared = self.lock();
        // Controllers that are set forget what was asked of them before.
        for (_, line) in &shared.lines {
            let _ = line.take_edges();
        }
        shared.state = Some(state.clone());
        shared.restored = Some((state.clone(), clock));
        Ok(())
    }

    fn track_dirty(&self, ram: &GuestRam, from: NotedFrom) -> Result<(), PartitionError> {
        let mut shared = self.lock();
        let dirty = shared.dirty.get_or_insert_default();
        if from == NotedFrom::FirstTake {
            let ranges = ram.mapped_ranges();
            let pages = ranges.flat_map(|(range, _)| {
                let first = range.start / PAGE_BYTES;
                first..first + range.size_bytes / PAGE_BYTES
            });
            dirty.extend(pages);
        }
        Ok(())
    }

    fn take_dirty(&self, ram: &GuestRam) -> Result<Vec<Vec<u64>>, PartitionError> {
        let mut shared = self.lock();
        let Some(dirty) = shared.dirty.as_mut().map(std::mem::take) else {
            let nothing = io::Error::from_raw_os_error(2);
            return Err(refused("taking the list of written pages")(nothing));
        };
        let bitmaps = ram.mapped_ranges().map(|(range, _)| {
            let pages = range.size_bytes / PAGE_BYTES;
            let mut bitmap = vec![0_u64; usize::try_from(pages.div_ceil(64)).unwrap_or(0)];
            for page in 0..pages {
                if dirty.contains(&(range.start / PAGE_BYTES + page)) {
                    bitmap[page as usize / 64] |= 1 << (page % 64);
                }
            }
            bitmap
        });
        Ok(bitmaps.collect())
    }

    fn untrack_dirty(&self, _: &GuestRam) -> Result<(), PartitionError> {
        self.lock().dirty = None;
        Ok(())
    }
}

impl Shared {
    fn note_written(&mut self, addr: u64, bytes: &[u8]) {
        if let (Some(dirty), Some(last)) = (&mut self.dirty, bytes.len().checked_sub(1)) {
            dirty.extend(addr / PAGE_BYTES..=(addr + last as u64) / PAGE_BYTES);
        }
    }
}

fn wrong(of: impl Into<String>) -> impl FnOnce(StateError) -> PartitionError {
    let of = of.into();
    move |source| PartitionError::State { of, source }
}

fn refused(act: &'static str) -> impl FnOnce(io::Error) -> PartitionError {
    move |source| PartitionError::Refused {
        act: act.into(),
        source,
        hint: "",
    }
}

#[derive(Default)]
struct FakeKick {
    kicked: Mutex<bool>,
    changed: Condvar,
}

impl Kick for FakeKick {
    fn bind_to_this_thread(&self) {}
    fn kick(&self) {
        *self.kicked.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }
    fn clear(&self) {
        *self.kicked.lock().unwrap_or_else(PoisonError::into_inner) = false;
    }
}

/// `KVM_MP_STATE_UNINITIALIZED`.
const WAITS_FOR_STARTUP: u32 = 1;

struct FakeCpu {
    apic_id: u32,
    partition: FakePartition,
    kick: Arc<FakeKick>,
    buffer: Vec<u8>,
    reading: bool,
    /// What is saved. RAX counts the steps that were played.
    state: CpuState,
}

impl VirtualCpu for FakeCpu {
    fn configure(
        &mut self,
        cpuid: &[CpuidEntry],
        state: &InitialState,
    ) -> Result<(), PartitionError> {
        self.partition
            .lock()
            .configured
            .push((self.apic_id, cpuid.to_vec(), *state));
        self.state.cpuid = cpuid.to_vec();
        match *state {
            InitialState::Long64 { rip, rsp, rsi, .. } => {
                let registers = &mut self.state.registers;
                (registers.rip, registers.rsp, registers.rsi) = (rip, rsp, rsi);
            }
            InitialState::Protected32 { eip, ebx, .. } => {
                let registers = &mut self.state.registers;
                (registers.rip, registers.rbx) = (eip.into(), ebx.into());
            }
            InitialState::WaitForStartup => self.state.mp_state = WAITS_FOR_STARTUP,
        }
        Ok(())
    }

    fn change_msrs(&mut self, changes: &[MsrChange]) -> Result<(), Vec<MsrRefusal>> {
        let mut refused = Vec::new();
        for change in changes {
            let index = change.index;
            let mut known = MSRS.into_iter().chain([FIXED_MSR]);
            let Some((_, old)) = known.find(|(known, _)| *known == index) else {
                refused.push(MsrRefusal::Unknown(index));
                continue;
            };
            let value = change.applied_to(old);
            if index == FIXED_MSR.0 && value != old {
                refused.push(MsrRefusal::Value { index, value });
                continue;
            }
            self.state.kept_msrs.push(index);
            let mut held = self.state.msrs.iter_mut();
            if let Some((_, held)) = held.find(|(held, _)| *held == index) {
                *held = value;
            }
            let at = (self.apic_id, index);
            self.partition.lock().msrs.insert(at, value);
        }
        refused.is_empty().then_some(()).ok_or(refused)
    }

    fn kept_msrs(&self) -> &[u32] {
        &self.state.kept_msrs
    }

    fn run(&mut self) -> Result<CpuExit<'_>, CpuError> {
        if std::mem::take(&mut self.reading) {
            self.partition.lock().reads.push(self.buffer.clone());
        }
        let kick = self.kick.clone();
        let lock = || kick.kicked.lock().unwrap_or_else(PoisonError::into_inner);
        let mut kicked = lock();
        if *kicked {
            return Ok(CpuExit::Interrupted);
        }
        let step = loop {
            let mut shared = self.partition.lock();
            let script = shared.scripts.get_mut(self.apic_id as usize);
            let step = script
                .and_then(VecDeque::pop_front)
                .unwrap_or(Step::Compute);
            if step != Step::Compute {
                self.state.registers.rax += 1;
            }
            match step {
                Step::RamWrite(addr, bytes) => {
                    let ram = shared.ram.clone();
                    // Without any lock: where somebody serves the RAM, this may wait for ever.
                    drop((shared, kicked));
                    if let Some(ram) = ram {
                        ram.write(addr, &bytes)
                            .map_err(|e| CpuError::Run(io::Error::other(e.to_string())))?;
                    }
                    self.partition.lock().note_written(addr, &bytes);
                    kicked = lock();
                }
                step => break step,
            }
        };
        let data = &mut self.buffer;
        Ok(match step {
            Step::Compute | Step::RamWrite(..) => {
                let waited = kick.changed.wait_while(kicked, |k| !*k);
                drop(waited);
                CpuExit::Interrupted
            }
            Step::PortRead(port, size_bytes) => {
                self.reading = true;
                *data = vec![0; size_bytes];
                CpuExit::PortRead {
                    port,
                    size_bytes,
                    data,
                }
            }
            Step::PortWrite(port, bytes) => {
                *data = bytes;
                CpuExit::PortWrite {
                    port,
                    size_bytes: data.len(),
                    data,
                }
            }
            Step::PortWriteString(port, bytes) => {
                *data = bytes;
                CpuExit::PortWrite {
                    port,
                    size_bytes: 1,
                    data,
                }
            }
            Step::MmioRead(addr, size_bytes) => {
                self.reading = true;
                *data = vec![0; size_bytes];
                CpuExit::MmioRead { addr, data }
            }
            Step::MmioWrite(addr, bytes) => {
                *data = bytes;
                CpuExit::MmioWrite { addr, data }
            }
            Step::TripleFault => CpuExit::TripleFault,
            Step::Stuck(reason) => CpuExit::Stuck(reason),
            Step::Fail => return Err(CpuError::Run(io::Error::from_raw_os_error(5))),
        })
    }

    fn kick(&self) -> Arc<dyn Kick> {
        self.kick.clone()
    }

    fn stands_still(&mut self) {
        self.partition.lock().pauses += 1;
    }

    fn save(&mut self) -> Result<CpuState, PartitionError> {
        Ok(self.state.clone())
    }

    fn restore(&mut self, state: &CpuState) -> Result<(), PartitionError> {
        let of = || format!("processor {}", self.apic_id);
        state.check().map_err(wrong(of()))?;
        let known = |index| MSRS.iter().chain([&FIXED_MSR]).any(|(k, _)| *k == index);
        for (index, value) in &state.msrs {
            if !known(*index) && *value != 0 {
                return Err(wrong(of())(StateError::new(
                    format!("model-specific register {index:#x}"),
                    format!("{value:#x}"),
                    "this hypervisor has no such register",
                )));
            }
        }
        if state.tsc_khz.is_some_and(|khz| khz != TSC_KHZ) {
            return Err(wrong(of())(StateError::new(
                "tsc_khz",
                format!("{:?}", state.tsc_khz),
                format!("this hypervisor has {TSC_KHZ} only"),
            )));
        }
        self.state = state.clone();
        let mut shared = self.partition.lock();
        shared.restored_cpus.insert(self.apic_id, state.clone());
        Ok(())
    }

    fn position(&mut self) -> CpuPosition {
        CpuPosition {
            rip: 0x1000,
            known: true,
            ..CpuPosition::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alveole_guest_memory::MemoryPlan;

    #[test]
    fn what_was_configured_is_saved_restored_and_told() {
        let partition = FakePartition::new(vec![vec![Step::PortWrite(1, vec![2])]]);
        let mut cpu = partition.create_cpu(0).unwrap();
        let cpuid = partition.supported_cpuid().unwrap();
        let start = InitialState::Protected32 {
            eip: 0x100,
            ebx: 3,
            gdt_addr: 0,
            gdt_size_bytes: 0,
        };
        cpu.configure(&cpuid, &start).unwrap();
        let (index, old) = MSRS[0];
        let change = MsrChange {
            index,
            mask: 1,
            value: 1,
        };
        cpu.change_msrs(&[change]).unwrap();
        cpu.run().unwrap();
        let state = cpu.save().unwrap();
        state.check().unwrap();
        assert_eq!(state.cpuid, cpuid);
        let registers = state.registers;
        assert_eq!((registers.rip, registers.rbx, registers.rax), (0x100, 3, 1));
        assert!(state.msrs.contains(&(index, old | 1)));

        let fresh = FakePartition::new(vec![]);
        let mut again = fresh.create_cpu(0).unwrap();
        again.restore(&state).unwrap();
        assert_eq!(again.save().unwrap(), state);
        assert_eq!(again.kept_msrs(), [index]);
        assert_eq!(fresh.restored_cpu(0), Some(state.clone()));

        let mut forged = state.clone();
        forged.msrs.push((0x123, 0));
        again.restore(&forged).unwrap();
        forged.msrs.push((0x123, 1));
        let e = again.restore(&forged).unwrap_err().to_string();
        assert!(e.contains("register 0x123 is 0x1"), "{e}");

        let saved = partition.save().unwrap();
        fresh
            .restore(&saved, RestoredClock::AdvanceByWallTime)
            .unwrap();
        assert_eq!(
            fresh.restored(),
            Some((saved, RestoredClock::AdvanceByWallTime))
        );
    }

    #[test]
    fn written_pages_are_told_once_and_only_while_they_are_noted() {
        let script = [0x3000_u64, 0x5ffe, 0x5000, 0x7000]
            .map(|addr| vec![Step::RamWrite(addr, vec![1; 4]), Step::PortRead(1, 1)]);
        let mut partition = FakePartition::new(vec![script.concat()]);
        let ram = GuestRam::map(&MemoryPlan::around_hole(1 << 20).unwrap()).unwrap();
        partition.map_ram(&ram).unwrap();
        let mut cpu = partition.create_cpu(0).unwrap();
        partition.take_dirty(&ram).unwrap_err();
        cpu.run().unwrap();
        assert_eq!(ram.read_plain::<u32>(0x3000).unwrap(), 0x0101_0101);
        partition.track_dirty(&ram, NotedFrom::Now).unwrap();
        let none = vec![vec![0; 4]];
        assert_eq!(partition.take_dirty(&ram).unwrap(), none, "before");
        cpu.run().unwrap();
        cpu.run().unwrap();
        let pages = vec![vec![1 << 5 | 1 << 6, 0, 0, 0]];
        assert_eq!(partition.take_dirty(&ram).unwrap(), pages);
        assert_eq!(partition.take_dirty(&ram).unwrap(), none, "told already");
        partition.untrack_dirty(&ram).unwrap();
        cpu.run().unwrap();
        partition.take_dirty(&ram).unwrap_err();
        partition.track_dirty(&ram, NotedFrom::FirstTake).unwrap();
        assert_eq!(partition.take_dirty(&ram).unwrap(), [[u64::MAX; 4]]);
        assert_eq!(partition.take_dirty(&ram).unwrap(), none);
    }
}
