//! Any bytes as rings, descriptors and packets. Run in `crates/virtio-vsock`:
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run read_packet -- -max_len=16384 -timeout=20`
#![no_main]

use alveole_virtio::testing::FuzzRing;

thread_local!(static RING: FuzzRing = FuzzRing::new());

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| RING.with(|ring| ring.walk(bytes, alveole_virtio_vsock::fuzz_parse)));
