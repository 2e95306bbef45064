//! What a `#[cron]` on a type or a constant means.

use proc_macro2::Span;

use crate::handler::Schedule;

/// A scheduled task that emits an event.
pub(super) struct Task {
    pub(super) name: String,
    /// Where the name stands: in the attribute, or that of the item.
    pub(super) name_at: Span,
    pub(super) formerly: Vec<String>,
    pub(super) schedule: Schedule,
}
