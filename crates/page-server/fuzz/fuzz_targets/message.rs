//! Any bytes as what a monitor says of its memory. Run in `crates/page-server`:
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run message -- -max_len=8192 -timeout=20`
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| alveole_page_server::fuzz_message(bytes));
