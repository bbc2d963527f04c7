//! Any bytes as rings, descriptors and control commands. Run in `crates/virtio-net`:
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run parse_command -- -max_len=16384 -timeout=20`
#![no_main]

use alveole_virtio::testing::FuzzRing;

thread_local!(static RING: FuzzRing = FuzzRing::new());

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| RING.with(|ring| ring.walk(bytes, alveole_virtio_net::fuzz_control)));
