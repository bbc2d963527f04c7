//! The state of the interrupt controllers that KVM plays, and of the guest's clock, out and in.
//!
//! Sources: Linux Documentation/virt/kvm/api.rst, KVM_GET_IRQCHIP, KVM_SET_IRQCHIP, KVM_GET_CLOCK and KVM_SET_CLOCK.

use std::time::{SystemTime, UNIX_EPOCH};

use alveole_hypervisor::PartitionError;
use alveole_hypervisor::state::{ClockState, IoApicState, PartitionState, PicState, RestoredClock};
use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_ioapic_state, kvm_irqchip, kvm_pic_state,
};
use kvm_ioctls::{Cap, VmFd};

use crate::partition::refused;

const PICS: [u32; 2] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE];

pub(crate) fn save(vm: &VmFd) -> Result<PartitionState, PartitionError> {
    let mut state = PartitionState::default();
    for (to, chip) in state.pics.iter_mut().zip(PICS) {
        let chip = get_chip(vm, chip)?;
        // SAFETY: for these chips KVM fills in this field of the union, which is plain numbers.
        *to = pic_of(unsafe { &chip.chip.pic });
    }
    let chip = get_chip(vm, KVM_IRQCHIP_IOAPIC)?;
    // SAFETY: likewise.
    state.io_apic = io_apic_of(unsafe { &chip.chip.ioapic });
    let clock = vm
        .get_clock()
        .map_err(refused("saving the guest's clock (KVM_GET_CLOCK)", ""))?;
    let gives = |flag| clock.flags & flag != 0;
    state.clock = ClockState {
        ns: clock.clock,
        flags: clock.flags,
        realtime_ns: if gives(KVM_CLOCK_REALTIME) {
            clock.realtime
        } else {
            wall_time_ns()
        },
        host_tsc: gives(KVM_CLOCK_HOST_TSC).then_some(clock.host_tsc),
    };
    Ok(state)
}

/// The interrupt controllers, then the clock: so that the guest's time stands still for as long as possible.
pub(crate) fn restore(
    vm: &VmFd,
    state: &PartitionState,
    clock: RestoredClock,
) -> Result<(), PartitionError> {
    state.check().map_err(|source| PartitionError::State {
        of: "the interrupt controllers".into(),
        source,
    })?;
    for (from, chip) in state.pics.iter().zip(PICS) {
        let mut to = chip_of(chip);
        to.chip.pic = kvm_pic_of(from);
        set_chip(vm, &to)?;
    }
    let mut to = chip_of(KVM_IRQCHIP_IOAPIC);
    to.chip.ioapic = kvm_io_apic_of(&state.io_apic);
    set_chip(vm, &to)?;
    let kvm_advances = u32::try_from(vm.check_extension_int(Cap::AdjustClock))
        .is_ok_and(|flags| flags & KVM_CLOCK_REALTIME != 0);
    let saved = &state.clock;
    let mut to = kvm_clock_data {
        clock: saved.ns,
        ..Default::default()
    };
    match clock {
        RestoredClock::AsSaved => {}
        RestoredClock::AdvanceByWallTime if kvm_advances => {
            to.flags = KVM_CLOCK_REALTIME;
            to.realtime = saved.realtime_ns;
        }
        // Before Linux 5.16. As KVM does it, a wall clock that went back meanwhile advances nothing.
        RestoredClock::AdvanceByWallTime => {
            let gone_by = wall_time_ns().saturating_sub(saved.realtime_ns);
            to.clock = saved.ns.saturating_add(gone_by);
        }
    }
    vm.set_clock(&to).map_err(refused(
        format!("restoring the guest's clock (KVM_SET_CLOCK), {saved:?}"),
        "",
    ))
}

/// In ns since 1970; 0 on a host whose clock stands before that.
fn wall_time_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

fn chip_of(chip_id: u32) -> kvm_irqchip {
    kvm_irqchip {
        chip_id,
        ..Default::default()
    }
}

fn get_chip(vm: &VmFd, chip_id: u32) -> Result<kvm_irqchip, PartitionError> {
    let mut chip = chip_of(chip_id);
    vm.get_irqchip(&mut chip).map_err(refused(
        format!("saving interrupt controller {chip_id} (KVM_GET_IRQCHIP)"),
        "",
    ))?;
    Ok(chip)
}

fn set_chip(vm: &VmFd, chip: &kvm_irqchip) -> Result<(), PartitionError> {
    vm.set_irqchip(chip).map_err(refused(
        format!(
            "restoring interrupt controller {} (KVM_SET_IRQCHIP)",
            chip.chip_id
        ),
        "",
    ))
}

same_fields!(
    pic_of, kvm_pic_of, kvm_pic_state, PicState,
    last_irr irr imr isr priority_add irq_base read_reg_select poll special_mask init_state auto_eoi rotate_on_auto_eoi
    special_fully_nested_mode init4 elcr elcr_mask
);

fn io_apic_of(a: &kvm_ioapic_state) -> IoApicState {
    IoApicState {
        base_address: a.base_address,
        selected_register: a.ioregsel,
        id: a.id,
        irr: a.irr,
        // SAFETY: both fields of the union are the same 64 bits.
        redirections: a.redirtbl.iter().map(|r| unsafe { r.bits }).collect(),
    }
}

fn kvm_io_apic_of(a: &IoApicState) -> kvm_ioapic_state {
    let mut to = kvm_ioapic_state {
        base_address: a.base_address,
        ioregsel: a.selected_register,
        id: a.id,
        irr: a.irr,
        ..Default::default()
    };
    for (to, from) in to.redirtbl.iter_mut().zip(&a.redirections) {
        to.bits = *from;
    }
    to
}
