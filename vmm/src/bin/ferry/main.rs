//! `ferry`.
fn main() {}
