//! Step 4: the machine's tables, the kernel, the initrd and the command line lie in guest memory.

use alveole_boot_loader::{BootSource, EntryPreference, EntryState, Placement};
use alveole_guest_memory::GuestRam;
use alveole_hypervisor::{InitialState, Partition};

use crate::build::devices::WithDevices;
use crate::build::{BuildError, Options};
use crate::catalog::{self, Devices};
use crate::resources::BootFiles;
use crate::{ValidConfig, layout};

/// Everything the guest finds in memory is there.
pub(super) struct WithBoot {
    pub(super) ram: GuestRam,
    pub(super) partition: Box<dyn Partition>,
    pub(super) devices: Devices,
    pub(super) entry: InitialState,
}

impl WithDevices {
    pub(super) fn load_boot(
        self,
        config: &ValidConfig,
        files: BootFiles,
        options: Options,
    ) -> Result<WithBoot, BuildError> {
        let Self {
            ram,
            partition,
            mut devices,
        } = self;
        let board = alveole_acpi::Board {
            cpu_apic_ids: (0..config.cpus).collect(),
            io_apic_addr: layout::IO_APIC_ADDR,
            power: catalog::power_registers(),
            power_button_gsi: layout::POWER_BUTTON_GSI,
            generation: alveole_acpi::Generation {
                id_addr: layout::GENERATION_ID_ADDR,
                clock_addr: layout::VM_CLOCK_ADDR,
                gsi: layout::GENERATION_GSI,
            },
            pci: devices.pci.take(),
            nodes: std::mem::take(&mut devices.nodes),
        };
        let tables = alveole_acpi::build(&board, layout::ACPI_ADDR)?;
        ram.write(tables.load_addr, &tables.bytes)?;
        ram.write(layout::RESTART_ADDR, &catalog::restart_code())?;
        devices.generation.renew(&ram)?;
        if let Some(table) = alveole_acpi::mp_table(&board) {
            ram.write(alveole_acpi::MP_TABLE_ADDR, &table)?;
        }
        let BootFiles {
            kernel,
            kernel_path,
            initrd,
        } = files;
        // Mapped, guests share the kernel's pages and nothing is read before the start; copied, it lies in
        // huge pages and the guest meets few faults. Faults are what a shadowing hypervisor is slow at.
        let nested = partition.has_nested_paging();
        let suits = if nested {
            Placement::Map
        } else {
            Placement::Copy
        };
        let placement = options.placement.unwrap_or(suits);
        let cmdline = catalog::complete_cmdline(
            &config.cmdline,
            &devices.cmdline,
            &devices.cmdline_without_acpi,
        );
        let source = BootSource {
            kernel: &kernel,
            kernel_path: &kernel_path,
            initrd: initrd.as_ref().map(|(file, path)| (file, path.as_path())),
            cmdline: &cmdline,
            entry: EntryPreference::Auto,
        };
        let loaded = alveole_boot_loader::load(&ram, &source, Some(tables.rsdp_addr), placement)?;
        Ok(WithBoot {
            ram,
            partition,
            devices,
            entry: initial_state(&loaded.entry),
        })
    }
}

fn initial_state(entry: &EntryState) -> InitialState {
    match *entry {
        EntryState::Long64 {
            rip,
            rsp,
            boot_params_addr,
            page_tables_addr,
            gdt_addr,
            gdt_size_bytes,
        } => InitialState::Long64 {
            rip,
            rsp,
            rsi: boot_params_addr,
            page_tables_addr,
            gdt_addr,
            gdt_size_bytes,
        },
        EntryState::Protected32 {
            eip,
            start_info_addr,
            gdt_addr,
            gdt_size_bytes,
        } => InitialState::Protected32 {
            eip,
            ebx: start_info_addr,
            gdt_addr,
            gdt_size_bytes,
        },
    }
}
