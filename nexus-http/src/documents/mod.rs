//! The JSON documents that are answered. The program's `--json` prints the same, which `docs/cli.md` describes.

mod dead_letters;
mod events;
mod namespace;
mod schedules;

pub use dead_letters::*;
pub use events::*;
pub use namespace::*;
pub use schedules::*;
