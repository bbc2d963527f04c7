//! Any bytes as a request. Run in `crates/mmds`: `RUSTC_BOOTSTRAP=1 cargo fuzz run request -- -max_len=8192 -timeout=20`
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| alveole_mmds::fuzz_request(bytes));
