//! The thin VMM: one process runs one guest.
fn main() {}
