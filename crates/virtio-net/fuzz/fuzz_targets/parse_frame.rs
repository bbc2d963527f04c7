//! Any bytes as rings, descriptors and frames to be sent. Run in `crates/virtio-net`:
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run parse_frame -- -max_len=16384 -timeout=20`
#![no_main]

use alveole_virtio::testing::FuzzRing;

thread_local!(static RING: FuzzRing = FuzzRing::new());

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // Which features were agreed upon, and whether the source is looked at.
    let [options, rest @ ..] = bytes else { return };
    let features = if options & 1 == 0 { u64::MAX } else { 0 };
    let source = (options & 2 != 0).then_some([0; 6]);
    RING.with(|ring| {
        ring.walk(rest, |chain, ram| {
            alveole_virtio_net::fuzz_frame(chain, ram, features, source);
        });
    });
});
