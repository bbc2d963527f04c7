//! Which interrupt reaches which input of which controller, and which is sent as which message.
//!
//! KVM takes the whole table at once (Documentation/virt/kvm/api.rst, KVM_SET_GSI_ROUTING); the lines of
//! the two controllers are as KVM has them by itself, messages take numbers behind them.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use alveole_interrupts::{MsiConnect, MsiMessage};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;

/// Inputs of the I/O APIC; each has the GSI of its number.
const IO_APIC_PINS: u32 = 24;
/// Inputs of the two PICs together.
const PIC_PINS: u32 = 16;
const PINS_OF_A_PIC: u32 = 8;
/// Most messages of one guest. KVM itself has room for 4096 entries (KVM_MAX_IRQ_ROUTES). Abused by
/// nobody: devices ask for theirs before the guest runs.
const MAX_MESSAGES: u32 = 2048;

/// The routing table of one guest.
pub(crate) struct Routing {
    vm: Arc<VmFd>,
    state: Mutex<State>,
}

struct State {
    next_gsi: u32,
    messages: BTreeMap<u32, MsiMessage>,
}

impl Routing {
    pub(crate) fn new(vm: Arc<VmFd>) -> Arc<Self> {
        Arc::new(Self {
            vm,
            state: Mutex::new(State {
                next_gsi: IO_APIC_PINS,
                messages: BTreeMap::new(),
            }),
        })
    }

    /// A number for one more message; none when there are too many.
    pub(crate) fn take_gsi(&self) -> Option<u32> {
        let mut state = self.lock();
        let gsi = state.next_gsi;
        if gsi >= IO_APIC_PINS + MAX_MESSAGES {
            return None;
        }
        state.next_gsi += 1;
        Some(gsi)
    }

    /// What connects `gsi` to messages.
    pub(crate) fn connector(self: &Arc<Self>, gsi: u32) -> Arc<MsiConnect> {
        let routing = self.clone();
        Arc::new(move |message| routing.connect(gsi, message))
    }

    fn connect(&self, gsi: u32, message: Option<MsiMessage>) -> io::Result<()> {
        let mut state = self.lock();
        let before = match message {
            Some(message) => state.messages.insert(gsi, message),
            None => state.messages.remove(&gsi),
        };
        // Each new table costs KVM a grace period.
        if before == message {
            return Ok(());
        }
        let entries = table(&state.messages);
        let set = KvmIrqRouting::from_entries(&entries)
            .map_err(|e| io::Error::other(format!("the routing table does not fit: {e}")))
            .and_then(|table| self.vm.set_gsi_routing(&table).map_err(io::Error::from));
        if set.is_err() {
            match before {
                Some(before) => state.messages.insert(gsi, before),
                None => state.messages.remove(&gsi),
            };
        }
        set
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn table(messages: &BTreeMap<u32, MsiMessage>) -> Vec<kvm_irq_routing_entry> {
    let pic = (0..PIC_PINS).map(|gsi| {
        let chip = if gsi < PINS_OF_A_PIC {
            KVM_IRQCHIP_PIC_MASTER
        } else {
            KVM_IRQCHIP_PIC_SLAVE
        };
        chip_entry(gsi, chip, gsi % PINS_OF_A_PIC)
    });
    let io_apic = (0..IO_APIC_PINS).map(|gsi| chip_entry(gsi, KVM_IRQCHIP_IOAPIC, gsi));
    let messages = messages.iter().map(|(gsi, message)| kvm_irq_routing_entry {
        gsi: *gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: (message.address & 0xffff_ffff) as u32,
                address_hi: (message.address >> 32) as u32,
                data: message.data,
                ..Default::default()
            },
        },
        ..Default::default()
    });
    pic.chain(io_apic).chain(messages).collect()
}

fn chip_entry(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    }
}
