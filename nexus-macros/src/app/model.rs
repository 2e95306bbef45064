//! What an `app!` lists.

use syn::{Path, Type};

#[derive(Default)]
pub(super) struct List {
    /// Functions with `#[handler]`.
    pub(super) handlers: Vec<Path>,
    /// Functions, types and constants with `#[cron]`.
    pub(super) crons: Vec<Path>,
    /// Event types that no handler and no schedule brings along.
    pub(super) events: Vec<Type>,
}
