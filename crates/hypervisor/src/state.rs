//! The state of a processor, and of the devices that the hypervisor itself plays, as plain values that a file can hold.
//!
//! What each value means is what KVM says of it (Linux Documentation/virt/kvm/api.rst; the section stands with each part), so
//! that nothing is lost or invented on the way. Values may come from a file that somebody has forged: [`CpuState::check`] and
//! [`PartitionState::check`] find lists and numbers that cannot be, whatever the host; a hypervisor refuses the rest.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::CpuidEntry;

/// Most CPUID entries of a processor, as KVM has it (`KVM_MAX_CPUID_ENTRIES`).
pub const MAX_CPUID_ENTRIES: usize = 256;
/// Most model-specific registers in a saved state. KVM knows fewer than 400; a forged file could name 2^32.
pub const MAX_SAVED_MSRS: usize = 2048;
/// Most extended control registers (`KVM_MAX_XCRS`).
pub const MAX_XCRS: usize = 16;
/// Registers of a local APIC, in bytes (`KVM_APIC_REG_SIZE`).
pub const LAPIC_BYTES: usize = 1024;
/// The XSAVE area without its extension, in bytes: the size of `struct kvm_xsave`.
pub const MIN_XSAVE_BYTES: usize = 4096;
/// A bound on the XSAVE area in bytes. With AMX it is 11 KiB.
pub const MAX_XSAVE_BYTES: usize = 64 << 10;
/// Inputs of the I/O APIC (`KVM_IOAPIC_NUM_PINS`).
pub const IO_APIC_PINS: usize = 24;

/// All that a processor is, between two runs.
///
/// It lacks, on purpose: the PDPTRs of a guest in 32-bit PAE mode (`KVM_GET_SREGS2`; they are read again from guest memory when
/// the registers are set), and the state of a guest that runs guests (`KVM_GET_NESTED_STATE`): such a processor is not
/// saved, [`VirtualCpu::save`](crate::VirtualCpu::save) says so. There is no exit that waits for its completion either: see there.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuState {
    /// What `cpuid` answers, as it was configured (`KVM_SET_CPUID2`). At most [`MAX_CPUID_ENTRIES`].
    pub cpuid: Vec<CpuidEntry>,
    /// Frequency of the guest's time stamp counter in kHz, where the hypervisor says it (4.56 `KVM_GET_TSC_KHZ`).
    pub tsc_khz: Option<u32>,
    /// Whether it runs, halts or waits for another processor: 0 to 4 (4.38 `KVM_GET_MP_STATE`).
    pub mp_state: u32,
    /// General registers (4.11 `KVM_GET_REGS`).
    pub registers: GeneralRegisters,
    /// Segments and control registers (4.13 `KVM_GET_SREGS`).
    pub special: SpecialRegisters,
    /// Debug registers (4.33 `KVM_GET_DEBUGREGS`).
    pub debug: DebugRegisters,
    /// Extended control registers, number and value (4.44 `KVM_GET_XCRS`). Only number 0 exists.
    pub xcrs: Vec<(u32, u64)>,
    /// FPU, SSE, AVX and whatever else `xsave` stores (4.42 `KVM_GET_XSAVE`, and `KVM_GET_XSAVE2` since Linux 5.17): [`MIN_XSAVE_BYTES`] or
    /// more, as many as the hypervisor that saved it wants.
    pub xsave: Vec<u8>,
    /// The shadow stack pointer, where the processor has shadow stacks (4.69 `KVM_GET_ONE_REG`, Linux 6.18).
    pub shadow_stack_pointer: Option<u64>,
    /// Model-specific registers, number and value (4.18 `KVM_GET_MSRS`). At most [`MAX_SAVED_MSRS`].
    pub msrs: Vec<(u32, u64)>,
    /// Which of them were changed by [`VirtualCpu::change_msrs`](crate::VirtualCpu::change_msrs).
    pub kept_msrs: Vec<u32>,
    /// Registers of the local APIC, [`LAPIC_BYTES`] (4.57 `KVM_GET_LAPIC`).
    pub lapic: Vec<u8>,
    /// Exceptions and interrupts on their way into the processor (4.31 `KVM_GET_VCPU_EVENTS`).
    pub events: CpuEvents,
}

/// General registers, instruction pointer and flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the registers' own names say it")]
pub struct GeneralRegisters {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

/// Segments, descriptor tables, control registers, local APIC base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the registers' own names say it")]
pub struct SpecialRegisters {
    pub cs: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ss: Segment,
    pub tr: Segment,
    pub ldt: Segment,
    pub gdt: DescriptorTable,
    pub idt: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub apic_base: u64,
    /// One bit for the external interrupt, if any, that has been acknowledged and not delivered yet.
    pub interrupt_bitmap: [u64; 4],
}

/// A segment register with what the processor caches of its descriptor (Intel SDM vol. 3A 3.4.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Segment {
    /// Linear address of its first byte.
    pub base: u64,
    /// Its last offset, in bytes.
    pub limit: u32,
    /// The visible part.
    pub selector: u16,
    /// Type, 0 to 15.
    pub kind: u8,
    /// Whether it is present: 0 or 1, like all that follow but `dpl`.
    pub present: u8,
    /// Privilege level, 0 to 3.
    pub dpl: u8,
    /// Default operand size.
    pub db: u8,
    /// Code or data, and no system segment.
    pub s: u8,
    /// 64-bit code.
    pub l: u8,
    /// Granularity: the limit was in pages.
    pub g: u8,
    /// For system software.
    pub avl: u8,
    /// Holds nothing.
    pub unusable: u8,
}

/// Where a descriptor table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DescriptorTable {
    /// Linear address.
    pub base: u64,
    /// Its last offset, in bytes.
    pub limit: u16,
}

/// Debug registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DebugRegisters {
    /// DR0 to DR3: addresses of breakpoints.
    pub addresses: [u64; 4],
    /// Status, 32 bits.
    pub dr6: u64,
    /// Control, 32 bits.
    pub dr7: u64,
}

/// Exceptions and interrupts on their way into a processor. Flags of one byte are 0 or 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(
    missing_docs,
    reason = "the fields are those of struct kvm_vcpu_events"
)]
pub struct CpuEvents {
    pub exception_injected: u8,
    pub exception_pending: u8,
    /// Vector, 0 to 31.
    pub exception_vector: u8,
    pub exception_has_error_code: u8,
    pub exception_error_code: u32,
    pub exception_has_payload: u8,
    pub exception_payload: u64,
    pub interrupt_injected: u8,
    pub interrupt_vector: u8,
    pub interrupt_soft: u8,
    /// Which instruction holds interrupts back for one more: 1 `mov ss`, 2 `sti`.
    pub interrupt_shadow: u8,
    pub nmi_injected: u8,
    /// How many wait: 0 to 2.
    pub nmi_pending: u8,
    pub nmi_masked: u8,
    pub sipi_vector: u32,
    pub smi_in_smm: u8,
    pub smi_pending: u8,
    pub smi_inside_nmi: u8,
    pub smi_latched_init: u8,
    pub triple_fault_pending: u8,
    /// Which of these mean something (`KVM_VCPUEVENT_VALID_...`).
    pub flags: u32,
}

/// The state of the devices that the hypervisor plays for all processors together, and of the guest's clock.
///
/// Which message a message-signalled interrupt has is known to the device that has it, and restored there.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartitionState {
    /// First and second interrupt controller of a PC (4.26 `KVM_GET_IRQCHIP`).
    pub pics: [PicState; 2],
    /// The I/O APIC (the same).
    pub io_apic: IoApicState,
    /// The clock that guests read as kvm-clock (4.29 `KVM_GET_CLOCK`).
    pub clock: ClockState,
}

/// One PIC: the fields of `struct kvm_pic_state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the fields are those of struct kvm_pic_state")]
pub struct PicState {
    pub last_irr: u8,
    pub irr: u8,
    pub imr: u8,
    pub isr: u8,
    /// 0 to 7.
    pub priority_add: u8,
    pub irq_base: u8,
    pub read_reg_select: u8,
    pub poll: u8,
    pub special_mask: u8,
    pub init_state: u8,
    pub auto_eoi: u8,
    pub rotate_on_auto_eoi: u8,
    pub special_fully_nested_mode: u8,
    pub init4: u8,
    pub elcr: u8,
    pub elcr_mask: u8,
}

/// The I/O APIC.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IoApicState {
    /// Guest-physical address of its registers.
    pub base_address: u64,
    /// Which register is selected, 0 to 0xff.
    pub selected_register: u32,
    /// Its number.
    pub id: u32,
    /// Inputs that ask for an interrupt, one bit each.
    pub irr: u32,
    /// What each input sends: [`IO_APIC_PINS`] entries, in the layout of the chip (82093AA data sheet, 3.2.4).
    pub redirections: Vec<u64>,
}

/// The guest's clock, kvm-clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockState {
    /// What it said, in ns since the guest began.
    pub ns: u64,
    /// What the hypervisor said of it (`KVM_CLOCK_TSC_STABLE`, ...), for people who look at a file.
    pub flags: u32,
    /// The host's wall time at that moment, in ns since 1970: of the same instant where the hypervisor gives it
    /// (`KVM_CLOCK_REALTIME`, Linux 5.16), else read right after.
    pub realtime_ns: u64,
    /// The host's time stamp counter at that instant, where the hypervisor gives it (`KVM_CLOCK_HOST_TSC`).
    pub host_tsc: Option<u64>,
}

/// From where a guest's clock goes on when it is restored.
///
/// The clock is kvm-clock alone. The time stamp counter goes on where it stood in both cases: timers are set on it, and a guest
/// that takes its time from it must be told the time by other means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RestoredClock {
    /// From where it stood: for the guest, no time has gone by.
    #[default]
    AsSaved,
    /// From where it stood, and the host's wall time since then.
    AdvanceByWallTime,
}

/// A saved state that cannot be restored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value}: {why}")]
pub struct StateError {
    /// Which part of the state.
    pub field: String,
    /// What it holds.
    pub value: String,
    /// Why that cannot be, or not here.
    pub why: String,
}

impl StateError {
    /// `field` holds `value`, and `why` that does not do.
    pub fn new(field: impl Into<String>, value: impl fmt::Display, why: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            value: value.to_string(),
            why: why.into(),
        }
    }
}

impl CpuState {
    /// Looks for lists and numbers that no processor can have.
    ///
    /// # Errors
    /// The first of them.
    pub fn check(&self) -> Result<(), StateError> {
        at_most("cpuid", "entries", self.cpuid.len(), MAX_CPUID_ENTRIES)?;
        at_most("msrs", "registers", self.msrs.len(), MAX_SAVED_MSRS)?;
        at_most(
            "kept_msrs",
            "registers",
            self.kept_msrs.len(),
            MAX_SAVED_MSRS,
        )?;
        at_most("xcrs", "registers", self.xcrs.len(), MAX_XCRS)?;
        for (index, value) in &self.xcrs {
            if *index != 0 {
                return Err(StateError::new(
                    format!("xcrs: register {index}"),
                    format!("{value:#x}"),
                    "a processor has number 0 only",
                ));
            }
        }
        let xsave = self.xsave.len();
        if !(MIN_XSAVE_BYTES..=MAX_XSAVE_BYTES).contains(&xsave) || !xsave.is_multiple_of(4) {
            return Err(StateError::new(
                "xsave",
                format!("{xsave} bytes long"),
                format!("it has {MIN_XSAVE_BYTES} to {MAX_XSAVE_BYTES} bytes, in words of four"),
            ));
        }
        exactly("lapic", "bytes", self.lapic.len(), LAPIC_BYTES)?;
        number("mp_state", self.mp_state.into(), 4)?;
        if self.tsc_khz == Some(0) {
            return Err(StateError::new("tsc_khz", 0, "a counter that stands still"));
        }
        self.special.check()?;
        number("debug.dr6", self.debug.dr6, u32::MAX.into())?;
        number("debug.dr7", self.debug.dr7, u32::MAX.into())?;
        self.events.check()
    }
}

impl SpecialRegisters {
    fn check(&self) -> Result<(), StateError> {
        for (name, segment) in [
            ("cs", &self.cs),
            ("ds", &self.ds),
            ("es", &self.es),
            ("fs", &self.fs),
            ("gs", &self.gs),
            ("ss", &self.ss),
            ("tr", &self.tr),
            ("ldt", &self.ldt),
        ] {
            for (field, value, limit) in [
                ("kind", segment.kind, 15),
                ("present", segment.present, 1),
                ("dpl", segment.dpl, 3),
                ("db", segment.db, 1),
                ("s", segment.s, 1),
                ("l", segment.l, 1),
                ("g", segment.g, 1),
                ("avl", segment.avl, 1),
                ("unusable", segment.unusable, 1),
            ] {
                number(&format!("special.{name}.{field}"), value.into(), limit)?;
            }
        }
        let waiting: u32 = self.interrupt_bitmap.iter().map(|b| b.count_ones()).sum();
        if waiting > 1 {
            return Err(StateError::new(
                "special.interrupt_bitmap",
                format!("{:x?}", self.interrupt_bitmap),
                format!("{waiting} interrupts cannot be on their way at once, at most one"),
            ));
        }
        Ok(())
    }
}

impl CpuEvents {
    fn check(&self) -> Result<(), StateError> {
        for (field, value, limit) in [
            ("exception_injected", self.exception_injected, 1),
            ("exception_pending", self.exception_pending, 1),
            ("exception_vector", self.exception_vector, 31),
            ("exception_has_error_code", self.exception_has_error_code, 1),
            ("exception_has_payload", self.exception_has_payload, 1),
            ("interrupt_injected", self.interrupt_injected, 1),
            ("interrupt_soft", self.interrupt_soft, 1),
            ("interrupt_shadow", self.interrupt_shadow, 3),
            ("nmi_injected", self.nmi_injected, 1),
            ("nmi_pending", self.nmi_pending, 2),
            ("nmi_masked", self.nmi_masked, 1),
            ("smi_in_smm", self.smi_in_smm, 1),
            ("smi_pending", self.smi_pending, 1),
            ("smi_inside_nmi", self.smi_inside_nmi, 1),
            ("smi_latched_init", self.smi_latched_init, 1),
            ("triple_fault_pending", self.triple_fault_pending, 1),
        ] {
            number(&format!("events.{field}"), value.into(), limit)?;
        }
        number("events.sipi_vector", self.sipi_vector.into(), 0xff)
    }
}

impl PartitionState {
    /// Looks for lists and numbers that no interrupt controller can have.
    ///
    /// # Errors
    /// The first of them.
    pub fn check(&self) -> Result<(), StateError> {
        for (i, pic) in self.pics.iter().enumerate() {
            number(
                &format!("pics[{i}].priority_add"),
                pic.priority_add.into(),
                7,
            )?;
            number(&format!("pics[{i}].init_state"), pic.init_state.into(), 3)?;
        }
        let io_apic = &self.io_apic;
        let pins = io_apic.redirections.len();
        exactly("io_apic.redirections", "entries", pins, IO_APIC_PINS)?;
        number(
            "io_apic.selected_register",
            io_apic.selected_register.into(),
            0xff,
        )?;
        number("io_apic.irr", io_apic.irr.into(), (1 << IO_APIC_PINS) - 1)
    }
}

fn at_most(field: &str, what: &str, found: usize, limit: usize) -> Result<(), StateError> {
    if found <= limit {
        return Ok(());
    }
    Err(StateError::new(
        field,
        format!("a list of {found} {what}"),
        format!("there are at most {limit}"),
    ))
}

fn exactly(field: &str, what: &str, found: usize, wanted: usize) -> Result<(), StateError> {
    if found == wanted {
        return Ok(());
    }
    Err(StateError::new(
        field,
        format!("a list of {found} {what}"),
        format!("it has {wanted}"),
    ))
}

fn number(field: &str, value: u64, limit: u64) -> Result<(), StateError> {
    if value <= limit {
        return Ok(());
    }
    Err(StateError::new(
        field,
        format!("{value:#x}"),
        format!("it is at most {limit:#x}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu() -> CpuState {
        CpuState {
            cpuid: vec![CpuidEntry {
                leaf: 7,
                subleaf_matters: true,
                ebx: 9,
                ..CpuidEntry::default()
            }],
            tsc_khz: Some(2_000_000),
            xcrs: vec![(0, 7)],
            xsave: vec![1; MIN_XSAVE_BYTES],
            shadow_stack_pointer: Some(u64::MAX),
            msrs: vec![(0xc000_0080, u64::MAX)],
            kept_msrs: vec![0x8b],
            lapic: vec![0xff; LAPIC_BYTES],
            ..CpuState::default()
        }
    }

    fn partition() -> PartitionState {
        PartitionState {
            io_apic: IoApicState {
                redirections: vec![u64::MAX; IO_APIC_PINS],
                ..IoApicState::default()
            },
            ..PartitionState::default()
        }
    }

    #[test]
    fn states_pass_through_a_file_and_nothing_is_added_there() {
        let text = serde_json::to_string(&cpu()).unwrap();
        assert_eq!(serde_json::from_str::<CpuState>(&text).unwrap(), cpu());
        let text = serde_json::to_string(&partition()).unwrap();
        let back: PartitionState = serde_json::from_str(&text).unwrap();
        assert_eq!(back, partition());
        for (inside, what) in [
            ("", "state"),
            ("special", "registers"),
            ("events", "events"),
        ] {
            let mut value = serde_json::to_value(cpu()).unwrap();
            let place = match inside {
                "" => &mut value,
                inside => &mut value[inside],
            };
            place["from_the_future"] = 1.into();
            let e = serde_json::from_value::<CpuState>(value).unwrap_err();
            assert!(e.to_string().contains("from_the_future"), "{what}: {e}");
        }
        let mut value = serde_json::to_value(cpu()).unwrap();
        value.as_object_mut().unwrap().remove("lapic");
        let e = serde_json::from_value::<CpuState>(value).unwrap_err();
        assert!(e.to_string().contains("lapic"), "{e}");
    }

    #[test]
    fn what_no_processor_can_be_is_told_with_field_and_value() {
        cpu().check().unwrap();
        partition().check().unwrap();
        let mut wrong = cpu();
        wrong.lapic.pop();
        assert_eq!(
            wrong.check().unwrap_err().to_string(),
            "lapic is a list of 1023 bytes: it has 1024"
        );
        let mut wrong = cpu();
        wrong.special.gs.dpl = 4;
        assert_eq!(
            wrong.check().unwrap_err().to_string(),
            "special.gs.dpl is 0x4: it is at most 0x3"
        );
        let mut wrong = cpu();
        wrong.xsave.push(0);
        let e = wrong.check().unwrap_err().to_string();
        assert!(e.starts_with("xsave is 4097 bytes long"), "{e}");
        let mut wrong = partition();
        wrong.io_apic.redirections.clear();
        assert_eq!(
            wrong.check().unwrap_err().to_string(),
            "io_apic.redirections is a list of 0 entries: it has 24"
        );
    }
}
