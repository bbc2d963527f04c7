//! Any bytes as the file of `--seccomp-filter`, in either of its forms.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = alveole_thread_sandbox::ExtraFilters::from_bytes(bytes);
});
