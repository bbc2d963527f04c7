//! Any bytes as rings and descriptors. Run in `crates/virtio`:
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run walk_ring -- -max_len=16384 -timeout=20`
#![no_main]

use alveole_virtio::testing::FuzzRing;

thread_local!(static RING: FuzzRing = FuzzRing::new());

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| RING.with(|ring| ring.walk(bytes, |chain, _| assert!(chain.readable_bytes() + chain.writable_bytes() <= 1 << 32))));
