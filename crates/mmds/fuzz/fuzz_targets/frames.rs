//! Any bytes as frames of a guest. Run in `crates/mmds`: `RUSTC_BOOTSTRAP=1 cargo fuzz run frames -- -max_len=16384 -timeout=20`
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| alveole_mmds::fuzz_frames(bytes));
