//! Any bytes as a layer over another one. Run in `crates/image`:
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run apply_layer -- -max_len=65536 -timeout=20`
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| alveole_image::fuzz_layer(bytes));
