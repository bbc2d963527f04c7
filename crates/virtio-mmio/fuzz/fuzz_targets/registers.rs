//! Any accesses to the register block, with any rings in guest memory. Run in `crates/virtio-mmio`:
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run registers -- -max_len=4096 -timeout=20`
#![no_main]

use alveole_io_bus::BusDevice;
use alveole_virtio::testing::{Echo, Stage};
use alveole_virtio_mmio::testing::MmioAccess;

thread_local!(static STAGE: Stage = Stage::new());

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| STAGE.with(|stage| {
    let mut mmio = MmioAccess::new(stage, Box::new(Echo::new(2)));
    for access in bytes.chunks_exact(8) {
        let offset = u64::from(u16::from_le_bytes([access[0], access[1]]) % 0x1100);
        let width = 1 << (access[2] % 4);
        let mut value = [access[4], access[5], access[6], access[7], 0, 0, 0, 0];
        match access[3] % 3 {
            0 => drop(mmio.registers.read(offset, &mut value[..width])),
            1 => drop(mmio.registers.write(offset, &value[..width])),
            // Into the rings, wherever the driver put them.
            _ => drop(stage.ram().write(offset, &value[..width])),
        }
    }
}));
