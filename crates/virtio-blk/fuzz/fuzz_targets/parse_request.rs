//! Any bytes as rings, descriptors and requests. Run in `crates/virtio-blk`:
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run parse_request -- -max_len=16384 -timeout=20`
#![no_main]

use alveole_virtio::testing::FuzzRing;

thread_local!(static RING: FuzzRing = FuzzRing::new());

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| RING.with(|ring| ring.walk(bytes, |chain, ram| alveole_virtio_blk::fuzz_parse(chain, ram, 1 << 20))));
