//! The sender program.
fn main() {}
