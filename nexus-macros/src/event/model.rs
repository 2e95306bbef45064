//! What a `#[derive(Event)]` means.

use proc_macro2::{Ident, Span};
use syn::Member;

pub(super) struct Event {
    pub(super) ident: Ident,
    #[expect(
        clippy::struct_field_names,
        reason = "an event type is one word here and in the database"
    )]
    pub(super) event_type: String,
    /// Where the event type is declared: `type = "…"`, or the name of the type.
    pub(super) declared_at: Span,
    pub(super) version: u32,
    pub(super) key: Option<Key>,
    /// Whether it is collected, and the only one of its event type in the crate.
    pub(super) register: bool,
}

/// The field that holds the entity an event is about.
pub(super) struct Key {
    /// As written in the attribute, where mistakes about it are shown.
    pub(super) member: Member,
    /// The variants of an enum, all of which have the field; `None` for a struct.
    pub(super) variants: Option<Vec<Ident>>,
}
