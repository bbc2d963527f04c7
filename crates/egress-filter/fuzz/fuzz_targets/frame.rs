//! Any bytes as a frame of the guest, and to it, behind a header of the link. Run in `crates/egress-filter`:
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run frame -- -max_len=512 -timeout=20`
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| alveole_egress_filter::fuzz(bytes));
