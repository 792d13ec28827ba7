//! The edgehub program.
fn main() {}
