//! Any bytes as a packed memory file. Run in `crates/page-server`:
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run packed -- -max_len=65536 -timeout=20`
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| alveole_page_server::fuzz_packed(bytes));
