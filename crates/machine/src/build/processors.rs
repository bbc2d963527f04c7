//! Step 5: the processors exist, know what they are and where they start, or go on.

use std::sync::Arc;

use alveole_board_devices::{Generation, Keys, PowerButton};
use alveole_counters::CounterSet;
use alveole_guest_memory::GuestRam;
use alveole_hypervisor::{InitialState, Partition, RestoredClock, VirtualCpu};
use alveole_saved_state::StateFile;
use alveole_serial::{ConsoleHandle, ConsoleWorker};
use alveole_vcpu::cpuid::{guest_cpuid, not_offered};
use alveole_vcpu::{Buses, Vcpu, template};
use alveole_virtio_blk::BlkHandle;
use alveole_virtio_net::NetHandle;
use alveole_virtio_vsock::VsockHandle;

use crate::build::boot::WithBoot;
use crate::build::devices::WithDevices;
use crate::build::{BuildError, CpuProblem};
use crate::catalog::{Devices, SharedPart, SharedTransport, Threads};
use crate::validate::check_host;
use crate::{Event, Mailbox, ValidConfig, snapshot};

/// The processors exist.
pub(super) struct WithProcessors {
    pub(super) ram: GuestRam,
    pub(super) partition: Box<dyn Partition>,
    pub(super) power_button: PowerButton,
    pub(super) keys: Keys,
    pub(super) generation: Generation,
    pub(super) console: ConsoleHandle,
    pub(super) console_worker: ConsoleWorker,
    pub(super) threads: Threads,
    pub(super) counters: Vec<Arc<dyn CounterSet + Send + Sync>>,
    pub(super) disks: Vec<BlkHandle>,
    pub(super) interfaces: Vec<NetHandle>,
    pub(super) vsock: Option<VsockHandle>,
    pub(super) sandbox: Vec<&'static str>,
    pub(super) transports: Vec<SharedTransport>,
    pub(super) parts: Vec<SharedPart>,
    pub(super) vcpus: Vec<Vcpu>,
}

impl WithBoot {
    pub(super) fn create_processors(
        self,
        config: &ValidConfig,
        mailbox: &Mailbox,
    ) -> Result<WithProcessors, BuildError> {
        let Self {
            ram,
            partition,
            devices,
            entry,
        } = self;
        let supported = partition.supported_cpuid()?;
        check_host(config.cpu_template, &supported)?;
        let tsc_deadline = partition.has_tsc_deadline_timer();
        let wanted = &config.cpu_config;
        let mut problems = Vec::new();
        let lacking = wanted.capabilities.iter();
        let lacking = lacking.filter(|number| !partition.has_capability(**number));
        problems.extend(lacking.map(|number| CpuProblem::Capability(*number)));
        let missing = template::missing_leaves(&wanted.cpuid, &supported);
        problems.extend(missing.into_iter().map(CpuProblem::Leaf));
        let mut cpus = Vec::new();
        for index in 0..config.cpus {
            let mut cpu = partition.create_cpu(index)?;
            let state = if index == 0 {
                entry
            } else {
                InitialState::WaitForStartup
            };
            let mut cpuid = guest_cpuid(&supported, index, config.cpus, tsc_deadline);
            template::apply(&wanted.cpuid, &mut cpuid);
            cpu.configure(&cpuid, &state)?;
            // Last: what the description says of a register is what it holds when the guest starts.
            if let Err(refused) = cpu.change_msrs(&wanted.msrs) {
                problems.extend(refused.into_iter().map(CpuProblem::Msr));
            }
            // All that is wrong with one processor, which is all that is wrong with the others.
            if !problems.is_empty() {
                return Err(BuildError::CpuConfig(problems));
            }
            cpus.push(cpu);
        }
        Ok(WithProcessors::of(ram, partition, devices, cpus, mailbox))
    }
}

impl WithDevices {
    /// Devices and processors as `state` has them.
    pub(super) fn restore(
        self,
        config: &ValidConfig,
        mailbox: &Mailbox,
        mut state: StateFile,
        clock: RestoredClock,
    ) -> Result<WithProcessors, BuildError> {
        let Self {
            ram,
            partition,
            devices,
        } = self;
        let supported = partition.supported_cpuid()?;
        let mut cpus = Vec::new();
        for index in 0..config.cpus {
            let saved = snapshot::cpu_state(&mut state, index)?;
            let missing = not_offered(&saved.cpuid, &supported);
            if !missing.is_empty() {
                return Err(BuildError::Lacking(missing));
            }
            let mut cpu = partition.create_cpu(index)?;
            cpu.restore(&saved)?;
            cpu.stands_still();
            cpus.push(cpu);
        }
        // After the processors, whose local APICs take what an input still asks for.
        partition.restore(&snapshot::partition_state(&mut state)?, clock)?;
        // Last: a device raises again what the guest has not taken yet, and the state of interrupt controllers and local APICs, set
        // after that, would take it away.
        snapshot::restore_devices(&devices, &mut state)?;
        state.finish()?;
        Ok(WithProcessors::of(ram, partition, devices, cpus, mailbox))
    }
}

impl WithProcessors {
    fn of(
        ram: GuestRam,
        partition: Box<dyn Partition>,
        devices: Devices,
        cpus: Vec<Box<dyn VirtualCpu>>,
        mailbox: &Mailbox,
    ) -> Self {
        let Devices {
            ports,
            memory,
            power_button,
            keys,
            generation,
            console,
            console_worker,
            threads,
            counters,
            disks,
            interfaces,
            vsock,
            sandbox,
            transports,
            parts,
            nodes: _,
            cmdline: _,
            cmdline_without_acpi: _,
            pci: _,
        } = devices;
        let buses = Buses {
            ports: ports.freeze(),
            memory: memory.freeze(),
        };
        let vcpu = |(index, cpu)| {
            let mailbox = mailbox.clone();
            Vcpu {
                index,
                cpu,
                buses: buses.clone(),
                sandbox: sandbox.clone(),
                report: Box::new(move |report| mailbox.send(Event::Vcpu(Box::new(report)))),
            }
        };
        let vcpus = (0..).zip(cpus).map(vcpu).collect();
        Self {
            ram,
            partition,
            power_button,
            keys,
            generation,
            console,
            console_worker,
            threads,
            counters,
            disks,
            interfaces,
            vsock,
            sandbox,
            transports,
            parts,
            vcpus,
        }
    }
}
