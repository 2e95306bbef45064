//! What a `#[derive(Event)]` means.

use proc_macro2::Ident;
use syn::Member;

pub(super) struct Event {
    pub(super) ident: Ident,
    #[expect(
        clippy::struct_field_names,
        reason = "an event type is one word here and in the database"
    )]
    pub(super) event_type: String,
    pub(super) version: u32,
    pub(super) key: Option<Key>,
}

/// The field that holds the entity an event is about.
pub(super) struct Key {
    /// As written in the attribute, where mistakes about it are shown.
    pub(super) member: Member,
    /// The variants of an enum, all of which have the field; `None` for a struct.
    pub(super) variants: Option<Vec<Ident>>,
}
