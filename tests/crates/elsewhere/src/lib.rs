//! Another crate with handlers, for tests of what only shows across crates.
//!
//! It is linked only into the tests that name it.

mod orders;

pub use orders::*;
