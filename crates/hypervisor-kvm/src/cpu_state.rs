//! The state of one KVM vCPU, out and in.
//!
//! Sources: Linux Documentation/virt/kvm/api.rst for each call; arch/x86/kvm/x86.c and lapic.c for what one call does to the
//! state that another one reads or writes, on which the order here rests.

use std::sync::atomic::{AtomicBool, Ordering};

use alveole_hypervisor::state::{
    CpuEvents, CpuState, DebugRegisters, DescriptorTable, GeneralRegisters, LAPIC_BYTES,
    MIN_XSAVE_BYTES, Segment, SpecialRegisters, StateError,
};
use alveole_hypervisor::{PartitionError, find_leaf};
use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    KVM_MAX_MSR_ENTRIES, KVM_STATE_NESTED_FORMAT_SVM, KVM_STATE_NESTED_GIF_SET,
    KVM_STATE_NESTED_GUEST_MODE, Msrs, Xsave, kvm_debugregs, kvm_dtable, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

use crate::cpu::KvmCpu;
use crate::partition::refused;

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
const CR4_VMXE: u64 = 1 << 13;
const EFER_SVME: u64 = 1 << 12;
/// What a `vmxon_pa` says that is none.
const NO_VMXON: u64 = u64::MAX;
/// CPUID leaf 7: shadow stacks.
const SHSTK_ECX: u32 = 1 << 7;
/// KVM_X86_REG_KVM(KVM_REG_GUEST_SSP), Linux 6.18: the shadow stack pointer, which is no model-specific register.
const REG_SHADOW_STACK_POINTER: u64 = 0x2030_0003_0000_0000;
/// Further from any counter that a guest could have than the second within which KVM takes a write for an attempt to
/// synchronise: 18 minutes at 4 GHz.
const FAR_AWAY_TICKS: u64 = 1 << 42;

/// Registers that KVM keeps and does not list: MTRRs (Intel SDM vol. 3A 12.11) and banks of machine check
/// (vol. 3B 16.3.2; api.rst, KVM_GET_MSR_INDEX_LIST, on why these are not listed).
const UNLISTED_MSRS: [(u32, u32); 6] = [
    (0x200, 0x20f),
    (0x250, 0x250),
    (0x258, 0x259),
    (0x268, 0x26f),
    (0x2ff, 0x2ff),
    (0x400, 0x47f),
];

/// Registers that KVM lists and that are no state of a processor, as first and last.
const NO_STATE_MSRS: [(u32, u32); 5] = [
    // The hypervisor's clock under its old numbers: the new ones say the same, and a write here tells KVM that the guest is
    // an old one, which takes the stable clock away from it.
    (0x11, 0x12),
    // IA32_MTRRCAP: a constant of KVM.
    (0xfe, 0xfe),
    // IA32_ARCH_CAPABILITIES: what the host's processor is not vulnerable to. It must stay true on another host.
    (0x10a, 0x10a),
    // IA32_PERF_CAPABILITIES: what the host's performance counters can do. Guests are offered none.
    (0x345, 0x345),
    // Hyper-V's interface, which no guest is offered: some change by themselves, one resets the machine.
    (0x4000_0000, 0x4000_01ff),
];

/// What is asked of the host once for all processors: the threads that save them may not ask any more.
pub(crate) struct StateFacts {
    /// Registers to save, as far as a processor has them; or why they are not known.
    msrs: Result<Vec<u32>, String>,
    /// Size of the XSAVE area.
    xsave_bytes: usize,
    has_xsave2: bool,
    can_scale_tsc: bool,
    tells_nested_state: bool,
    /// Whether the time stamp counter of a processor has been restored.
    tsc_begun: AtomicBool,
}

impl StateFacts {
    pub(crate) fn ask(kvm: &Kvm, vm: &VmFd) -> Self {
        let msrs = kvm
            .get_msr_index_list()
            .map(|listed| msrs_to_save(listed.as_slice()))
            .map_err(|e| {
                format!("asking KVM which registers there are (KVM_GET_MSR_INDEX_LIST): {e}")
            });
        let xsave2_bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Self {
            msrs,
            xsave_bytes: xsave2_bytes.max(MIN_XSAVE_BYTES),
            has_xsave2: xsave2_bytes > 0,
            can_scale_tsc: vm.check_extension(Cap::TscControl),
            tells_nested_state: vm.check_extension(Cap::NestedState),
            tsc_begun: AtomicBool::new(false),
        }
    }
}

fn msrs_to_save(listed: &[u32]) -> Vec<u32> {
    let is_state = |index: &u32| {
        let mut others = NO_STATE_MSRS.iter();
        !others.any(|(first, last)| (first..=last).contains(&index))
    };
    let mut msrs: Vec<u32> = listed.iter().copied().filter(is_state).collect();
    let unlisted = UNLISTED_MSRS.iter().flat_map(|&(first, last)| first..=last);
    for index in unlisted {
        if !listed.contains(&index) {
            msrs.push(index);
        }
    }
    msrs
}

impl KvmCpu {
    /// The order of a save.
    ///
    /// - KVM_GET_MP_STATE is the first: it lets a waiting INIT or start-up interrupt happen, which changes everything else.
    /// - Model-specific registers come before the local APIC: where the processor posts interrupts by itself, the timer may fire
    ///   between the two, and clears its deadline as it sets the interrupt. This way the interrupt is seen twice at worst, a
    ///   spurious one for the guest; the other way round it would be lost, and with it the guest's next ticks.
    /// - KVM_GET_VCPU_EVENTS is the last: the calls before may still move an event on.
    pub(crate) fn save_state(&mut self) -> Result<CpuState, PartitionError> {
        let act = |name: &str| self.act(&format!("saving the state ({name})"));
        let fd = &self.fd;
        let mp_state = fd
            .get_mp_state()
            .map_err(refused(act("KVM_GET_MP_STATE"), ""))?;
        let sregs = fd.get_sregs().map_err(refused(act("KVM_GET_SREGS"), ""))?;
        self.refuse_nested(&sregs)?;
        let regs = fd.get_regs().map_err(refused(act("KVM_GET_REGS"), ""))?;
        let debug = fd
            .get_debug_regs()
            .map_err(refused(act("KVM_GET_DEBUGREGS"), ""))?;
        let xcrs = fd.get_xcrs().map_err(refused(act("KVM_GET_XCRS"), ""))?;
        let xsave = self.save_xsave()?;
        let msrs = self.save_msrs()?;
        let lapic = fd.get_lapic().map_err(refused(act("KVM_GET_LAPIC"), ""))?;
        let events = fd
            .get_vcpu_events()
            .map_err(refused(act("KVM_GET_VCPU_EVENTS"), ""))?;
        let xcrs_used = usize::try_from(xcrs.nr_xcrs).unwrap_or(0);
        Ok(CpuState {
            cpuid: self.cpuid.clone(),
            // EIO: the host's own counter is not stable, so nobody can say it.
            tsc_khz: fd.get_tsc_khz().ok(),
            mp_state: mp_state.mp_state,
            registers: registers_of(&regs),
            special: special_of(&sregs),
            debug: DebugRegisters {
                addresses: debug.db,
                dr6: debug.dr6,
                dr7: debug.dr7,
            },
            xcrs: xcrs
                .xcrs
                .iter()
                .take(xcrs_used)
                .map(|x| (x.xcr, x.value))
                .collect(),
            xsave,
            shadow_stack_pointer: self.save_shadow_stack_pointer(),
            msrs,
            kept_msrs: self.kept_msrs.clone(),
            lapic: lapic.regs.iter().map(|b| b.cast_unsigned()).collect(),
            events: events_of(&events),
        })
    }

    /// A guest that runs guests has state in KVM that is not kept: better refused than lost.
    fn refuse_nested(&self, sregs: &kvm_sregs) -> Result<(), PartitionError> {
        if sregs.cr4 & CR4_VMXE == 0 && sregs.efer & EFER_SVME == 0 {
            return Ok(());
        }
        let mut nested = KvmNestedStateBuffer::empty();
        if !self.facts.tells_nested_state {
            return Err(self.nested("KVM does not say what it holds of that"));
        }
        let act = self.act("saving the state (KVM_GET_NESTED_STATE)");
        let data = self.fd.nested_state(&mut nested);
        let has_data = data.map_err(refused(act, ""))?.is_some();
        let flags = u32::from(nested.flags);
        let is_svm = u32::from(nested.format) == KVM_STATE_NESTED_FORMAT_SVM;
        // SAFETY: `format` says which field of the union is the valid one; both are plain numbers.
        let has_vmxon = !is_svm && unsafe { nested.hdr.vmx.vmxon_pa } != NO_VMXON;
        let holds_interrupts = is_svm && flags & KVM_STATE_NESTED_GIF_SET == 0;
        if has_data || has_vmxon || holds_interrupts || flags & KVM_STATE_NESTED_GUEST_MODE != 0 {
            return Err(self.nested("what KVM holds of that is not kept"));
        }
        Ok(())
    }

    fn nested(&self, why: &str) -> PartitionError {
        PartitionError::NotSaved(format!(
            "processor {} cannot be saved: the guest uses virtualisation (VMX or SVM) for guests of its own, and {why}; \
             end those guests and unload their hypervisor's module",
            self.apic_id
        ))
    }

    /// The area of processors that KVM saves here. There is no flag by which a guest could make it larger later: the
    /// components that must be asked for (AMX) are not asked for, so nobody has them.
    fn save_xsave(&self) -> Result<Vec<u8>, PartitionError> {
        let act = || self.act("saving the state (KVM_GET_XSAVE)");
        if !self.facts.has_xsave2 {
            let area = self.fd.get_xsave().map_err(refused(act(), ""))?;
            return Ok(area.region.iter().flat_map(|w| w.to_le_bytes()).collect());
        }
        let mut area = self.xsave_area()?;
        // SAFETY: the area is as large as KVM said it would fill.
        unsafe { self.fd.get_xsave2(&mut area) }.map_err(refused(act(), ""))?;
        let first = area.as_fam_struct_ref().xsave.region.iter();
        let words = first.chain(area.as_slice());
        let bytes: Vec<u8> = words.flat_map(|w| w.to_le_bytes()).collect();
        Ok(bytes)
    }

    /// An empty area as large as this host wants.
    fn xsave_area(&self) -> Result<Xsave, PartitionError> {
        let extra_words = (self.facts.xsave_bytes - MIN_XSAVE_BYTES).div_ceil(4);
        Xsave::new(extra_words).map_err(|e| PartitionError::Refused {
            act: self.act("making room for the XSAVE area"),
            source: std::io::Error::other(format!("{e:?}")),
            hint: "",
        })
    }

    /// Where shadow stacks are offered, KVM has the register and a way to it, both since Linux 6.18. A template can announce
    /// them where they are not: there is nothing to save then.
    fn save_shadow_stack_pointer(&self) -> Option<u64> {
        let offered = find_leaf(&self.cpuid, 7, 0).is_some_and(|e| e.ecx & SHSTK_ECX != 0);
        let mut value = [0; 8];
        let read = offered
            .then(|| self.fd.get_one_reg(REG_SHADOW_STACK_POINTER, &mut value))?
            .ok();
        read.map(|_| u64::from_le_bytes(value))
    }

    fn save_msrs(&self) -> Result<Vec<(u32, u64)>, PartitionError> {
        let known = self.facts.msrs.as_ref().map_err(|why| {
            PartitionError::NotSaved(format!("processor {} cannot be saved: {why}", self.apic_id))
        })?;
        let mut indices = known.clone();
        for kept in &self.kept_msrs {
            if !indices.contains(kept) {
                indices.push(*kept);
            }
        }
        self.read_msrs(&indices)
    }

    /// The values of those registers that this processor has. KVM stops at the first that it has not.
    fn read_msrs(&self, indices: &[u32]) -> Result<Vec<(u32, u64)>, PartitionError> {
        let act = || self.act("saving the state (KVM_GET_MSRS)");
        let mut values = Vec::with_capacity(indices.len());
        let mut rest = indices;
        while !rest.is_empty() {
            let (chunk, _) = rest.split_at(rest.len().min(KVM_MAX_MSR_ENTRIES));
            let entries: Vec<_> = chunk.iter().map(|&index| (index, 0)).collect();
            let mut list = msr_list(&entries, act())?;
            let read = self.fd.get_msrs(&mut list).map_err(refused(act(), ""))?;
            let entries = list.as_slice().iter().take(read);
            values.extend(entries.map(|e| (e.index, e.data)));
            rest = rest.get(after(read, chunk.len())..).unwrap_or_default();
        }
        Ok(values)
    }

    /// The order of a restore. Guest memory is in place already: KVM reads page tables, and what the hypervisor's own
    /// model-specific registers point to.
    ///
    /// - CPUID is the first: KVM refuses bits of every other register for features that the processor has not.
    /// - The frequency of the time stamp counter comes before its value, which KVM keeps as an offset at that frequency.
    /// - KVM_SET_MP_STATE before the registers: what KVM_GET_MP_STATE let happen has been read into them.
    /// - KVM_SET_REGS before the events: it drops a waiting exception.
    /// - KVM_SET_SREGS, with the base and mode of the local APIC, before the registers of that APIC.
    /// - The local APIC before the model-specific registers: a deadline is taken only if its timer is in that mode, and registers
    ///   of the hypervisor's interface ask whether the APIC is on. Among these, see [`KvmCpu::restore_msrs`].
    /// - KVM_SET_VCPU_EVENTS is the last: all of the above may put an event in or take it away.
    pub(crate) fn restore_state(&mut self, state: &CpuState) -> Result<(), PartitionError> {
        state.check().map_err(|e| self.wrong(e))?;
        self.set_cpuid(&state.cpuid)?;
        self.restore_tsc_khz(state.tsc_khz)?;
        let act = |name: &str| self.act(&format!("restoring the state ({name})"));
        let fd = &self.fd;
        let mp_state = kvm_mp_state {
            mp_state: state.mp_state,
        };
        fd.set_mp_state(mp_state).map_err(refused(
            format!("{}, {}", act("KVM_SET_MP_STATE"), state.mp_state),
            "",
        ))?;
        fd.set_regs(&kvm_regs_of(&state.registers))
            .map_err(refused(act("KVM_SET_REGS"), ""))?;
        let special = &state.special;
        fd.set_sregs(&kvm_sregs_of(special)).map_err(refused(
            format!(
                "{}, special.cr0 {:#x} cr3 {:#x} cr4 {:#x} cr8 {:#x} efer {:#x} apic_base {:#x}",
                act("KVM_SET_SREGS"),
                special.cr0,
                special.cr3,
                special.cr4,
                special.cr8,
                special.efer,
                special.apic_base
            ),
            "one of them has a bit that this processor does not know",
        ))?;
        self.restore_xsave(&state.xsave)?;
        self.restore_xcrs(&state.xcrs)?;
        let debug = kvm_debugregs {
            db: state.debug.addresses,
            dr6: state.debug.dr6,
            dr7: state.debug.dr7,
            ..Default::default()
        };
        fd.set_debug_regs(&debug).map_err(refused(
            format!(
                "{}, debug.dr6 {:#x} dr7 {:#x}",
                act("KVM_SET_DEBUGREGS"),
                debug.dr6,
                debug.dr7
            ),
            "",
        ))?;
        let mut lapic = kvm_lapic_state {
            regs: [0; LAPIC_BYTES],
        };
        for (register, byte) in lapic.regs.iter_mut().zip(&state.lapic) {
            *register = byte.cast_signed();
        }
        fd.set_lapic(&lapic)
            .map_err(refused(act("KVM_SET_LAPIC"), ""))?;
        self.restore_msrs(&state.msrs)?;
        self.restore_shadow_stack_pointer(state.shadow_stack_pointer)?;
        fd.set_vcpu_events(&kvm_events_of(&state.events))
            .map_err(refused(
                format!("{}, {:?}", act("KVM_SET_VCPU_EVENTS"), state.events),
                "",
            ))?;
        // The guest was told that it stands still (`stands_still`) by a request that KVM had not carried out when the state
        // was saved. EINVAL says that the guest does not use the clock.
        let _ = fd.kvmclock_ctrl();
        self.cpuid.clone_from(&state.cpuid);
        self.kept_msrs.clone_from(&state.kept_msrs);
        Ok(())
    }

    /// Gives the time stamp counter the guest's frequency. KVM itself takes a difference of 250 in a million for none, which
    /// is what two measurements of one processor differ by (arch/x86/kvm/x86.c, `tsc_tolerance_ppm`).
    fn restore_tsc_khz(&self, saved: Option<u32>) -> Result<(), PartitionError> {
        let (Some(saved), Ok(host)) = (saved, self.fd.get_tsc_khz()) else {
            return Ok(());
        };
        let differs = u64::from(saved.abs_diff(host)) * 1_000_000 > u64::from(saved) * 250;
        if saved == host || !differs && !self.facts.can_scale_tsc {
            return Ok(());
        }
        let refuse = |why: String| self.wrong(StateError::new("tsc_khz", saved, why));
        if !self.facts.can_scale_tsc {
            return Err(refuse(format!(
                "the time stamp counter of this host runs at {host} kHz, and its processor cannot scale it for a guest \
                 (KVM_CAP_TSC_CONTROL); restore on a host with the same frequency"
            )));
        }
        self.fd.set_tsc_khz(saved).map_err(|e| {
            refuse(format!(
                "the time stamp counter of this host runs at {host} kHz, and cannot be scaled that far (KVM_SET_TSC_KHZ: {e})"
            ))
        })
    }

    fn restore_xsave(&self, saved: &[u8]) -> Result<(), PartitionError> {
        let host_bytes = self.facts.xsave_bytes;
        let beyond = saved.get(host_bytes..).unwrap_or_default();
        if beyond.iter().any(|b| *b != 0) {
            return Err(self.wrong(StateError::new(
                "xsave",
                format!("{} bytes long", saved.len()),
                format!(
                    "this host keeps {host_bytes}, and what is beyond is in use: its processor lacks a feature of the one that was saved"
                ),
            )));
        }
        let mut area = self.xsave_area()?;
        let mut words = saved.chunks_exact(4).map(|b| {
            let mut word = [0; 4];
            word.copy_from_slice(b);
            u32::from_le_bytes(word)
        });
        let (head, tail) = {
            let mut take = |count: usize| -> Vec<u32> { words.by_ref().take(count).collect() };
            (take(MIN_XSAVE_BYTES / 4), take(area.as_slice().len()))
        };
        // SAFETY: the length of the array at the end is left as it is.
        let fixed = unsafe { area.as_mut_fam_struct() };
        for (to, from) in fixed.xsave.region.iter_mut().zip(head) {
            *to = from;
        }
        for (to, from) in area.as_mut_slice().iter_mut().zip(tail) {
            *to = from;
        }
        // SAFETY: the area is as large as this host's KVM reads.
        unsafe { self.fd.set_xsave2(&area) }.map_err(refused(
            self.act("restoring the state (KVM_SET_XSAVE), xsave"),
            "it names components that this host's processor has not, or holds what none can have",
        ))
    }

    fn restore_xcrs(&self, saved: &[(u32, u64)]) -> Result<(), PartitionError> {
        // A processor without XSAVE has none, and KVM refuses even an empty list there.
        if saved.is_empty() {
            return Ok(());
        }
        let mut xcrs = kvm_xcrs {
            nr_xcrs: u32::try_from(saved.len()).unwrap_or(u32::MAX),
            ..Default::default()
        };
        for (to, (number, value)) in xcrs.xcrs.iter_mut().zip(saved) {
            (to.xcr, to.value) = (*number, *value);
        }
        self.fd.set_xcrs(&xcrs).map_err(refused(
            format!(
                "{}, xcrs {saved:x?}",
                self.act("restoring the state (KVM_SET_XCRS)")
            ),
            "it names components that this host's processor has not",
        ))
    }

    fn restore_shadow_stack_pointer(&self, saved: Option<u64>) -> Result<(), PartitionError> {
        let Some(saved) = saved else { return Ok(()) };
        let set = self
            .fd
            .set_one_reg(REG_SHADOW_STACK_POINTER, &saved.to_le_bytes());
        match set {
            // Never used, and this host has none.
            Err(_) if saved == 0 => Ok(()),
            Err(e) => Err(self.wrong(StateError::new(
                "shadow_stack_pointer",
                format!("{saved:#x}"),
                format!("this host refuses it (KVM_SET_ONE_REG: {e})"),
            ))),
            Ok(_) => Ok(()),
        }
    }

    /// The time stamp counter is the first: the deadline, which is the last, is compared with it.
    fn restore_msrs(&self, saved: &[(u32, u64)]) -> Result<(), PartitionError> {
        let of = |wanted: u32| saved.iter().copied().filter(move |(i, _)| *i == wanted);
        let tsc: Vec<_> = of(MSR_TSC).collect();
        if let Some((_, value)) = tsc.first()
            && !self.facts.tsc_begun.swap(true, Ordering::Relaxed)
        {
            // KVM takes a value within a second of what the counter of the partition shows for an attempt to synchronise, and
            // keeps what it shows (arch/x86/kvm/x86.c, kvm_synchronize_tsc). For the processors after the first that is
            // right: they ran by one counter, and do again. For the first it is wrong where KVM compares with the start-up
            // value, too (before Linux 6.7): a guest younger than a second would go on in its past. So the counter is moved
            // far away once.
            self.write_msrs(&[(MSR_TSC, value.wrapping_add(FAR_AWAY_TICKS))])?;
        }
        self.write_msrs(&tsc)?;
        let special = [MSR_TSC, MSR_TSC_DEADLINE];
        let others = saved.iter().copied().filter(|(i, _)| !special.contains(i));
        self.write_msrs(&others.collect::<Vec<_>>())?;
        self.write_msrs(&of(MSR_TSC_DEADLINE).collect::<Vec<_>>())
    }

    /// Writes registers. KVM stops at the first that it refuses: see [`KvmCpu::accept_refusal`].
    fn write_msrs(&self, wanted: &[(u32, u64)]) -> Result<(), PartitionError> {
        let act = || self.act("restoring the state (KVM_SET_MSRS)");
        let mut rest = wanted;
        while !rest.is_empty() {
            let (chunk, _) = rest.split_at(rest.len().min(KVM_MAX_MSR_ENTRIES));
            let list = msr_list(chunk, act())?;
            let written = self.fd.set_msrs(&list).map_err(refused(act(), ""))?;
            if let Some((index, value)) = chunk.get(written) {
                self.accept_refusal(*index, *value)?;
            }
            rest = rest.get(after(written, chunk.len())..).unwrap_or_default();
        }
        Ok(())
    }

    /// A register that this host does not let anybody write does no harm where it holds the value already, or where it does not
    /// exist and the guest has never put anything into it.
    fn accept_refusal(&self, index: u32, value: u64) -> Result<(), PartitionError> {
        let why = match self.read_msrs(&[index])?.first() {
            Some((_, held)) if *held == value => return Ok(()),
            None if value == 0 => return Ok(()),
            Some((_, held)) => {
                format!("this host refuses that value; the register holds {held:#x}")
            }
            None => "this host has no such register".to_owned(),
        };
        Err(self.wrong(StateError::new(
            format!("msrs: register {index:#x}"),
            format!("{value:#x}"),
            why,
        )))
    }

    fn wrong(&self, source: StateError) -> PartitionError {
        PartitionError::State {
            of: format!("processor {}", self.apic_id),
            source,
        }
    }
}

/// How many registers of a chunk are dealt with: those before the one at which KVM stopped, and that one.
fn after(done: usize, chunk: usize) -> usize {
    if done < chunk { done + 1 } else { chunk }
}

fn msr_list(entries: &[(u32, u64)], act: String) -> Result<Msrs, PartitionError> {
    let entries: Vec<_> = entries
        .iter()
        .map(|&(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        })
        .collect();
    Msrs::from_entries(&entries).map_err(|e| PartitionError::Refused {
        act,
        source: std::io::Error::other(format!("{} registers: {e:?}", entries.len())),
        hint: "",
    })
}

same_fields!(
    registers_of, kvm_regs_of, kvm_regs, GeneralRegisters,
    rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags
);

same_fields!(table_of, kvm_dtable_of, kvm_dtable, DescriptorTable, base limit);

fn special_of(s: &kvm_sregs) -> SpecialRegisters {
    SpecialRegisters {
        cs: segment_of(&s.cs),
        ds: segment_of(&s.ds),
        es: segment_of(&s.es),
        fs: segment_of(&s.fs),
        gs: segment_of(&s.gs),
        ss: segment_of(&s.ss),
        tr: segment_of(&s.tr),
        ldt: segment_of(&s.ldt),
        gdt: table_of(&s.gdt),
        idt: table_of(&s.idt),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        interrupt_bitmap: s.interrupt_bitmap,
    }
}

fn kvm_sregs_of(s: &SpecialRegisters) -> kvm_sregs {
    kvm_sregs {
        cs: kvm_segment_of(&s.cs),
        ds: kvm_segment_of(&s.ds),
        es: kvm_segment_of(&s.es),
        fs: kvm_segment_of(&s.fs),
        gs: kvm_segment_of(&s.gs),
        ss: kvm_segment_of(&s.ss),
        tr: kvm_segment_of(&s.tr),
        ldt: kvm_segment_of(&s.ldt),
        gdt: kvm_dtable_of(&s.gdt),
        idt: kvm_dtable_of(&s.idt),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        interrupt_bitmap: s.interrupt_bitmap,
    }
}

fn segment_of(s: &kvm_segment) -> Segment {
    Segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        kind: s.type_,
        present: s.present,
        dpl: s.dpl,
        db: s.db,
        s: s.s,
        l: s.l,
        g: s.g,
        avl: s.avl,
        unusable: s.unusable,
    }
}

fn kvm_segment_of(s: &Segment) -> kvm_segment {
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.kind,
        present: s.present,
        dpl: s.dpl,
        db: s.db,
        s: s.s,
        l: s.l,
        g: s.g,
        avl: s.avl,
        unusable: s.unusable,
        padding: 0,
    }
}

fn events_of(e: &kvm_vcpu_events) -> CpuEvents {
    CpuEvents {
        exception_injected: e.exception.injected,
        exception_pending: e.exception.pending,
        exception_vector: e.exception.nr,
        exception_has_error_code: e.exception.has_error_code,
        exception_error_code: e.exception.error_code,
        exception_has_payload: e.exception_has_payload,
        exception_payload: e.exception_payload,
        interrupt_injected: e.interrupt.injected,
        interrupt_vector: e.interrupt.nr,
        interrupt_soft: e.interrupt.soft,
        interrupt_shadow: e.interrupt.shadow,
        nmi_injected: e.nmi.injected,
        nmi_pending: e.nmi.pending,
        nmi_masked: e.nmi.masked,
        sipi_vector: e.sipi_vector,
        smi_in_smm: e.smi.smm,
        smi_pending: e.smi.pending,
        smi_inside_nmi: e.smi.smm_inside_nmi,
        smi_latched_init: e.smi.latched_init,
        triple_fault_pending: e.triple_fault.pending,
        flags: e.flags,
    }
}

fn kvm_events_of(e: &CpuEvents) -> kvm_vcpu_events {
    let mut to = kvm_vcpu_events {
        sipi_vector: e.sipi_vector,
        flags: e.flags,
        exception_has_payload: e.exception_has_payload,
        exception_payload: e.exception_payload,
        ..Default::default()
    };
    to.exception.injected = e.exception_injected;
    to.exception.pending = e.exception_pending;
    to.exception.nr = e.exception_vector;
    to.exception.has_error_code = e.exception_has_error_code;
    to.exception.error_code = e.exception_error_code;
    to.interrupt.injected = e.interrupt_injected;
    to.interrupt.nr = e.interrupt_vector;
    to.interrupt.soft = e.interrupt_soft;
    to.interrupt.shadow = e.interrupt_shadow;
    to.nmi.injected = e.nmi_injected;
    to.nmi.pending = e.nmi_pending;
    to.nmi.masked = e.nmi_masked;
    to.smi.smm = e.smi_in_smm;
    to.smi.pending = e.smi_pending;
    to.smi.smm_inside_nmi = e.smi_inside_nmi;
    to.smi.latched_init = e.smi_latched_init;
    to.triple_fault.pending = e.triple_fault_pending;
    to
}
