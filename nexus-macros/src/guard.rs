//! Names that a crate may declare once: a second declaration is an error of the compiler that
//! points at both.
//!
//! No macro sees another use of itself. So each declaration exports a macro of its own, which
//! nobody calls and whose name says what is declared: exported macros of a crate share one
//! namespace, whatever module or function they stand in. Across crates nothing clashes; there
//! `app!` and the start of an app look for duplicates.
//!
//! rustc shows these names, so they are worded for it: ``the name `the_only_handler_named__book__in_its_group`
//! is defined multiple times``, ``cannot find value `the_only_handler_named__bok__in_its_group` ``.
//!
//! Names and groups hold no `__` and begin with a letter, so runs of `_` can join and escape: two
//! join, four stand for `-`, and different declarations have different macros.

use proc_macro2::{Ident, Span, TokenStream};
use quote::quote_spanned;

/// Reserves an event type and version; `at` is where it is declared.
pub(crate) fn event(event_type: &str, version: u32, at: Span) -> TokenStream {
    let event_type = event_type.replace('.', "__");
    reserve(
        &format!("the_only_event_type__{event_type}__version_{version}"),
        at,
    )
}

/// Reserves the name of a handler in its group.
pub(crate) fn handler(group: Option<&str>, name: &str, at: Span) -> TokenStream {
    match group {
        None => reserve(&handler_item(name), at),
        Some(group) => reserve(
            &format!("the_only_handler_named__{name}__in_group__{group}"),
            at,
        ),
    }
}

/// Reserves the name of a scheduled task.
pub(crate) fn task(name: &str, at: Span) -> TokenStream {
    reserve(&task_item(name), at)
}

/// What stands beside a handler that is called as its function and names no group. The constant that `app!`
/// looks for has this name too, so that rustc tells only once that both are there twice.
pub(crate) fn handler_item(name: &str) -> String {
    format!("the_only_handler_named__{name}__in_its_group")
}

/// What stands beside a scheduled task that is called as its item, the constant included.
pub(crate) fn task_item(name: &str) -> String {
    format!("the_only_scheduled_task_named__{name}")
}

fn reserve(name: &str, at: Span) -> TokenStream {
    if is_in_a_bundle_of_examples(at) {
        return TokenStream::new();
    }
    // The whole item has the span: rustc underlines the item, not its name. As that of the constant
    // beside the item, so that rustc tells only once that both are there twice.
    let at = at.resolved_at(Span::call_site());
    let ident = Ident::new(&name.replace('-', "____"), at);
    quote_spanned! {at=>
        #[doc(hidden)]
        #[allow(non_local_definitions)]
        #[macro_export]
        macro_rules! #ident {
            () => {};
        }
    }
}

/// rustdoc puts the examples of a crate into one, where they have nothing to do with each other: were a
/// name reserved there, it would compile each of them alone, which takes many times as long.
fn is_in_a_bundle_of_examples(at: Span) -> bool {
    // Outside of a macro, in unit tests, there is no compiler to ask.
    proc_macro::is_available() && at.unwrap().file().contains("doctest_bundle_")
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn different_declarations_have_different_macros() {
        let at = Span::call_site;
        let names = ["a", "b", "a-b", "a_b", "a_", "a-", "b_", "a-b-c", "a_b-c"];
        let mut seen: HashMap<String, (Option<&str>, &str)> = HashMap::new();
        for group in names.iter().copied().map(Some).chain([None]) {
            for name in names {
                let tokens = handler(group, name, at()).to_string();
                if let Some(other) = seen.insert(tokens, (group, name)) {
                    panic!("{other:?} and {:?} share a macro", (group, name));
                }
            }
        }
    }
}
