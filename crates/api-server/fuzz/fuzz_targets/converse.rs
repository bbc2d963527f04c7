//! Any bytes on a connection: heads, bodies, routes and every body's reader.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| alveole_api_server::fuzz::converse(bytes));
