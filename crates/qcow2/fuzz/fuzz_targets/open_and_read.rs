//! Any bytes as an image. Run in `crates/qcow2`:
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run open_and_read -- -max_len=65536 -timeout=20`
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| alveole_qcow2::fuzz_open_and_read(bytes));
