//! Any accesses to configuration space and BAR, with any rings in guest memory. Run in `crates/virtio-pci`:
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run registers -- -max_len=4096 -timeout=20`
#![no_main]

use alveole_virtio::testing::{Echo, Stage};
use alveole_virtio_pci::testing::{BAR_ADDR, ECAM_ADDR, PciAccess};

thread_local!(static STAGE: Stage = Stage::new());

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| STAGE.with(|stage| {
    let pci = PciAccess::untouched(stage, Box::new(Echo::new(2)));
    for access in bytes.chunks_exact(8) {
        let offset = u64::from(u16::from_le_bytes([access[0], access[1]]));
        let width = 1 << (access[2] % 4);
        let mut value = [access[4], access[5], access[6], access[7], 0, 0, 0, 0];
        match access[3] % 5 {
            0 => drop(pci.bus.read(BAR_ADDR + offset % 0x8100, &mut value[..width])),
            1 => drop(pci.bus.write(BAR_ADDR + offset % 0x8100, &value[..width])),
            2 => drop(pci.bus.read(ECAM_ADDR + offset, &mut value[..width])),
            3 => drop(pci.bus.write(ECAM_ADDR + offset, &value[..width])),
            // Into the rings, wherever the driver put them.
            _ => drop(stage.ram().write(offset, &value[..width])),
        }
    }
}));
