//! The admin wrapper people type.
fn main() {}
