//! One KVM vCPU: its first state, its runs, where it stands.

use std::io;
use std::sync::Arc;

use alveole_hypervisor::{
    CpuError, CpuExit, CpuPosition, CpuState, CpuidEntry, InitialState, Kick, MsrChange,
    MsrRefusal, PartitionError, StuckReason, VirtualCpu,
};
use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_INTERNAL_ERROR_EMULATION, Msrs, kvm_cpuid_entry2,
    kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::cpu_state::StateFacts;
use crate::kick::KvmKick;
use crate::partition::refused;

/// IA32_MISC_ENABLE: fast strings on, as every processor has it after reset.
const MSR_MISC_ENABLE: (u32, u64) = (0x1a0, 1);
/// IA32_MTRR_DEF_TYPE: range registers on, everything write-back, as firmware leaves it.
const MSR_MTRR_DEF_TYPE: (u32, u64) = (0x2ff, (1 << 11) | 6);

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Offsets of the local interrupt pins in the local APIC's registers, and what firmware puts there
/// (Intel SDM vol. 3A 11.5.1): LINT0 takes the PIC, LINT1 the NMI.
const APIC_LVT_LINT0: (usize, u32) = (0x350, 0x700);
const APIC_LVT_LINT1: (usize, u32) = (0x360, 0x400);

/// KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES: the error carries the instruction.
const EMULATION_HAS_BYTES: u64 = 1;

pub(crate) struct KvmCpu {
    pub(crate) fd: VcpuFd,
    pub(crate) apic_id: u32,
    kick: Arc<KvmKick>,
    host_msrs: Arc<[(u32, u64)]>,
    pub(crate) facts: Arc<StateFacts>,
    /// What it was configured with. KVM changes bits of it as the guest runs, and makes them anew when it is set.
    pub(crate) cpuid: Vec<CpuidEntry>,
    pub(crate) kept_msrs: Vec<u32>,
}

impl KvmCpu {
    pub(crate) fn new(
        mut fd: VcpuFd,
        apic_id: u32,
        host_msrs: Arc<[(u32, u64)]>,
        facts: Arc<StateFacts>,
    ) -> Self {
        let flag = &raw mut fd.get_kvm_run().immediate_exit;
        // SAFETY: the flag lies in the page that `fd` maps; `drop` retires the kick before `fd` unmaps it.
        let kick = Arc::new(unsafe { KvmKick::new(flag) });
        Self {
            fd,
            apic_id,
            kick,
            host_msrs,
            facts,
            cpuid: Vec::new(),
            kept_msrs: Vec::new(),
        }
    }

    pub(crate) fn act(&self, what: &str) -> String {
        format!("{what} of processor {}", self.apic_id)
    }

    pub(crate) fn set_cpuid(&self, cpuid: &[CpuidEntry]) -> Result<(), PartitionError> {
        let entries: Vec<_> = cpuid
            .iter()
            .map(|e| kvm_cpuid_entry2 {
                function: e.leaf,
                index: e.subleaf,
                flags: if e.subleaf_matters {
                    KVM_CPUID_FLAG_SIGNIFCANT_INDEX
                } else {
                    0
                },
                eax: e.eax,
                ebx: e.ebx,
                ecx: e.ecx,
                edx: e.edx,
                ..Default::default()
            })
            .collect();
        let act = || {
            self.act(&format!(
                "setting {} CPUID entries (KVM_SET_CPUID2)",
                cpuid.len()
            ))
        };
        let list = CpuId::from_entries(&entries).map_err(|_| PartitionError::Refused {
            act: act(),
            source: io::Error::from_raw_os_error(libc::E2BIG),
            hint: "",
        })?;
        self.fd.set_cpuid2(&list).map_err(refused(act(), ""))
    }

    fn set_msrs(&self) -> Result<(), PartitionError> {
        let fixed = [MSR_MISC_ENABLE, MSR_MTRR_DEF_TYPE];
        let entries: Vec<_> = fixed
            .iter()
            .chain(self.host_msrs.iter())
            .map(|&(index, data)| kvm_msr_entry {
                index,
                data,
                ..Default::default()
            })
            .collect();
        let act = || self.act("setting the model-specific registers (KVM_SET_MSRS)");
        let refused_at = |index: u32, source| PartitionError::Refused {
            act: format!("{}, register {index:#x}", act()),
            source,
            hint: "",
        };
        let list = Msrs::from_entries(&entries)
            .map_err(|_| refused_at(0, io::Error::from_raw_os_error(libc::E2BIG)))?;
        let done = self.fd.set_msrs(&list).map_err(refused(act(), ""))?;
        match entries.get(done) {
            None => Ok(()),
            Some(first) => Err(refused_at(
                first.index,
                io::Error::from_raw_os_error(libc::EINVAL),
            )),
        }
    }

    /// One register at a time: KVM stops at the first that it refuses, and says neither why nor of the others.
    fn change_msr(&self, change: &MsrChange) -> Result<(), MsrRefusal> {
        let index = change.index;
        let failed = |why: String| MsrRefusal::Failed { index, why };
        let ioctl = |name: &str, e: kvm_ioctls::Error| failed(format!("{name}: {e}"));
        let entry = kvm_msr_entry {
            index,
            ..Default::default()
        };
        let mut list = Msrs::from_entries(&[entry]).map_err(|e| failed(format!("{e:?}")))?;
        let read = self.fd.get_msrs(&mut list);
        if read.map_err(|e| ioctl("KVM_GET_MSRS", e))? != 1 {
            return Err(MsrRefusal::Unknown(index));
        }
        let mut value = 0;
        for entry in list.as_mut_slice() {
            entry.data = change.applied_to(entry.data);
            value = entry.data;
        }
        let written = self.fd.set_msrs(&list);
        match written.map_err(|e| ioctl("KVM_SET_MSRS", e))? {
            1 => Ok(()),
            _ => Err(MsrRefusal::Value { index, value }),
        }
    }

    fn set_local_interrupts(&self) -> Result<(), PartitionError> {
        let act = || self.act("setting the local interrupt pins (KVM_SET_LAPIC)");
        let mut lapic = self.fd.get_lapic().map_err(refused(act(), ""))?;
        for (offset, value) in [APIC_LVT_LINT0, APIC_LVT_LINT1] {
            for (register, byte) in lapic.regs.iter_mut().skip(offset).zip(value.to_le_bytes()) {
                *register = byte.cast_signed();
            }
        }
        self.fd.set_lapic(&lapic).map_err(refused(act(), ""))
    }

    fn set_registers(&self, state: &InitialState) -> Result<(), PartitionError> {
        let act = || self.act("setting the registers (KVM_SET_SREGS)");
        let mut regs = kvm_regs {
            rflags: 2,
            ..Default::default()
        };
        let mut sregs = self.fd.get_sregs().map_err(refused(act(), ""))?;
        match *state {
            InitialState::WaitForStartup => return Ok(()),
            InitialState::Long64 {
                rip,
                rsp,
                rsi,
                page_tables_addr,
                gdt_addr,
                gdt_size_bytes,
            } => {
                regs.rip = rip;
                regs.rsp = rsp;
                regs.rbp = rsp;
                regs.rsi = rsi;
                set_flat_segments(&mut sregs, true);
                set_gdt(&mut sregs, gdt_addr, gdt_size_bytes);
                sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
                sregs.cr3 = page_tables_addr;
                sregs.cr4 = CR4_PAE;
                sregs.efer = EFER_LME | EFER_LMA;
            }
            InitialState::Protected32 {
                eip,
                ebx,
                gdt_addr,
                gdt_size_bytes,
            } => {
                regs.rip = u64::from(eip);
                regs.rbx = u64::from(ebx);
                set_flat_segments(&mut sregs, false);
                set_gdt(&mut sregs, gdt_addr, gdt_size_bytes);
                sregs.cr0 = CR0_PE | CR0_ET;
                sregs.cr4 = 0;
                sregs.efer = 0;
            }
        }
        self.fd.set_sregs(&sregs).map_err(refused(act(), ""))?;
        self.fd.set_regs(&regs).map_err(refused(
            self.act("setting the registers (KVM_SET_REGS)"),
            "",
        ))
    }

    fn internal_error(&mut self) -> StuckReason {
        // SAFETY: the exit reason says that this field of the union is the valid one; it is plain numbers.
        let error = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let used = usize::try_from(error.ndata)
            .unwrap_or(0)
            .min(error.data.len());
        let data = &error.data[..used];
        if error.suberror != KVM_INTERNAL_ERROR_EMULATION {
            return StuckReason::Internal {
                code: error.suberror,
                data: data.to_vec(),
            };
        }
        // Layout of the emulation failure: flags, then one byte of length and 15 bytes of instruction.
        let instruction = match data {
            [flags, low, high, ..] if flags & EMULATION_HAS_BYTES != 0 => {
                let bytes: Vec<u8> = [low.to_le_bytes(), high.to_le_bytes()].concat();
                let length = usize::from(bytes[0]).min(15);
                bytes[1..=length].to_vec()
            }
            _ => Vec::new(),
        };
        StuckReason::Emulation { instruction }
    }
}

/// What a run returned, without the borrow that ties it to the vCPU.
enum Raw {
    PortRead(u16, *mut u8, usize),
    PortWrite(u16, *const u8, usize),
    MmioRead(u64, *mut u8, usize),
    MmioWrite(u64, *const u8, usize),
    Interrupted,
    TripleFault,
    EntryRefused(u64),
    InternalError,
    MemoryFault,
    Unknown(String),
}

impl VirtualCpu for KvmCpu {
    fn stands_still(&mut self) {
        // EINVAL says that the guest does not use the clock.
        let _ = self.fd.kvmclock_ctrl();
    }

    fn save(&mut self) -> Result<CpuState, PartitionError> {
        self.save_state()
    }

    fn restore(&mut self, state: &CpuState) -> Result<(), PartitionError> {
        self.restore_state(state)
    }

    fn configure(
        &mut self,
        cpuid: &[CpuidEntry],
        state: &InitialState,
    ) -> Result<(), PartitionError> {
        self.set_cpuid(cpuid)?;
        self.cpuid = cpuid.to_vec();
        self.set_msrs()?;
        if *state != InitialState::WaitForStartup {
            self.set_local_interrupts()?;
        }
        self.set_registers(state)
    }

    fn change_msrs(&mut self, changes: &[MsrChange]) -> Result<(), Vec<MsrRefusal>> {
        let mut refused = Vec::new();
        for change in changes {
            match self.change_msr(change) {
                Ok(()) => self.kept_msrs.push(change.index),
                Err(refusal) => refused.push(refusal),
            }
        }
        refused.is_empty().then_some(()).ok_or(refused)
    }

    fn kept_msrs(&self) -> &[u32] {
        &self.kept_msrs
    }

    fn run(&mut self) -> Result<CpuExit<'_>, CpuError> {
        let raw = match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => Raw::PortRead(port, data.as_mut_ptr(), data.len()),
            Ok(VcpuExit::IoOut(port, data)) => Raw::PortWrite(port, data.as_ptr(), data.len()),
            Ok(VcpuExit::MmioRead(addr, data)) => {
                Raw::MmioRead(addr, data.as_mut_ptr(), data.len())
            }
            Ok(VcpuExit::MmioWrite(addr, data)) => Raw::MmioWrite(addr, data.as_ptr(), data.len()),
            Ok(VcpuExit::Intr) => Raw::Interrupted,
            Ok(VcpuExit::Shutdown) => Raw::TripleFault,
            Ok(VcpuExit::FailEntry(reason, _)) => Raw::EntryRefused(reason),
            Ok(VcpuExit::InternalError) => Raw::InternalError,
            Ok(VcpuExit::MemoryFault { .. }) => Raw::MemoryFault,
            Ok(other) => Raw::Unknown(format!("{other:?}")),
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => Raw::Interrupted,
            Err(e) if e.errno() == libc::EFAULT => Raw::MemoryFault,
            Err(e) => return Err(CpuError::Run(e.into())),
        };
        Ok(match raw {
            Raw::PortRead(port, data, len) => {
                let size_bytes = self.port_width(len);
                // SAFETY: the bytes lie in the page shared with the kernel, which lives as long as
                // `self`, and nobody else uses them until the next run.
                let data = unsafe { std::slice::from_raw_parts_mut(data, len) };
                CpuExit::PortRead {
                    port,
                    size_bytes,
                    data,
                }
            }
            Raw::PortWrite(port, data, len) => {
                let size_bytes = self.port_width(len);
                // SAFETY: as for PortRead.
                let data = unsafe { std::slice::from_raw_parts(data, len) };
                CpuExit::PortWrite {
                    port,
                    size_bytes,
                    data,
                }
            }
            Raw::MmioRead(addr, data, len) => {
                // SAFETY: as for PortRead.
                let data = unsafe { std::slice::from_raw_parts_mut(data, len) };
                CpuExit::MmioRead { addr, data }
            }
            Raw::MmioWrite(addr, data, len) => {
                // SAFETY: as for PortRead.
                let data = unsafe { std::slice::from_raw_parts(data, len) };
                CpuExit::MmioWrite { addr, data }
            }
            Raw::Interrupted => CpuExit::Interrupted,
            Raw::TripleFault => CpuExit::TripleFault,
            Raw::EntryRefused(hardware_reason) => {
                CpuExit::Stuck(StuckReason::EntryRefused { hardware_reason })
            }
            Raw::InternalError => CpuExit::Stuck(self.internal_error()),
            Raw::MemoryFault => {
                return Err(CpuError::MemoryFault(io::Error::from_raw_os_error(
                    libc::EFAULT,
                )));
            }
            Raw::Unknown(what) => CpuExit::Stuck(StuckReason::UnknownExit(what)),
        })
    }

    fn kick(&self) -> Arc<dyn Kick> {
        self.kick.clone()
    }

    fn position(&mut self) -> CpuPosition {
        let (Ok(r), Ok(s)) = (self.fd.get_regs(), self.fd.get_sregs()) else {
            return CpuPosition::default();
        };
        CpuPosition {
            rip: r.rip,
            rsp: r.rsp,
            rflags: r.rflags,
            cs_base: s.cs.base,
            cr0: s.cr0,
            cr2: s.cr2,
            cr3: s.cr3,
            cr4: s.cr4,
            efer: s.efer,
            general: [
                r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12,
                r.r13, r.r14, r.r15,
            ],
            known: true,
        }
    }
}

impl KvmCpu {
    /// Width of one element of the port access that has just come back; `len` bytes in all.
    fn port_width(&mut self, len: usize) -> usize {
        // SAFETY: called for port exits only, for which this field of the union is the valid one.
        let size = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io.size };
        usize::from(size).clamp(1, len.max(1))
    }
}

impl Drop for KvmCpu {
    fn drop(&mut self) {
        self.kick.retire();
    }
}

fn set_flat_segments(sregs: &mut kvm_sregs, long: bool) {
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 0x10,
        type_: 0xb,
        present: 1,
        s: 1,
        g: 1,
        l: u8::from(long),
        db: u8::from(!long),
        ..Default::default()
    };
    let data = kvm_segment {
        selector: 0x18,
        type_: 3,
        l: 0,
        db: 1,
        ..code
    };
    sregs.cs = code;
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = data;
    }
    // A busy task state segment: entering guest mode demands one.
    sregs.tr = kvm_segment {
        limit: 0x67,
        selector: 0,
        s: 0,
        g: 0,
        l: 0,
        db: 0,
        ..code
    };
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
}

fn set_gdt(sregs: &mut kvm_sregs, addr: u64, size_bytes: u16) {
    sregs.gdt.base = addr;
    sregs.gdt.limit = size_bytes.saturating_sub(1);
}
