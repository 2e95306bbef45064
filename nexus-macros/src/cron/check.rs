//! The rules of types and constants that are emitted by the clock, and of several attributes.

use std::collections::HashSet;

use quote::ToTokens;
use syn::ext::IdentExt;

use super::{
    model::Task,
    parse::{Item, Use, What},
};
use crate::{
    attr::{Arguments, is_macro},
    diagnostics::Diagnostics,
    handler::{Schedule, check_formerly, names_self},
    name,
};

/// Two attributes on one item are two tasks, which have to be told apart. A name is `None` after a
/// mistake.
pub(super) fn refuse_same_names<'a>(
    uses: &[Use],
    names: impl Iterator<Item = Option<&'a str>>,
    diagnostics: &mut Diagnostics,
) {
    let mut seen = HashSet::new();
    for (attribute, name) in uses.iter().zip(names) {
        if let Some(name) = name
            && !seen.insert(name)
        {
            diagnostics.error_over(
                attribute,
                format!("each `#[cron]` of an item is a task of its own, and another one is called `{name}`: give this one a `name = \"…\"`"),
            );
        }
    }
}

/// What is emitted must be one value.
pub(super) fn check_item(item: &Item, diagnostics: &mut Diagnostics) {
    for attribute in &item.attributes {
        if is_macro(attribute, "handler") {
            diagnostics.error_over(attribute, "`#[handler]` goes on an `async fn`");
        }
    }
    match &item.what {
        What::Type { generics, is_event } => {
            // Where the derive stands below, it says so itself.
            if !generics.params.is_empty() && !is_event {
                diagnostics.error_over(
                    generics,
                    "`#[cron]` emits an event, and an event cannot be generic: one event type stands for exactly one JSON Schema",
                );
            }
        }
        What::Union { keyword, is_event } => {
            if !is_event {
                diagnostics.error(
                    keyword.span,
                    "an event cannot be a union; use a struct or an enum",
                );
            }
        }
        What::Constant { ty } => {
            if names_self(ty.to_token_stream()) {
                diagnostics.error_over(
                    ty,
                    "`#[cron]` goes on a constant of a module: move it out of the `impl` block, and write the type instead of `Self`",
                );
            } else if item.ident == "_" {
                diagnostics.error(
                    item.ident.span(),
                    "`#[cron]` needs the constant by name: write one instead of `_`, such as `HOURLY`",
                );
            }
        }
        What::Static { keyword } => diagnostics.error(
            keyword.span,
            "`#[cron]` emits the same event each time: write `const` instead of `static`",
        ),
    }
}

/// What one attribute means; `None` after a mistake, which is reported.
pub(super) fn check(
    item: &Item,
    arguments: &mut Arguments,
    schedule: Option<Schedule>,
    diagnostics: &mut Diagnostics,
) -> Option<Task> {
    let literal = arguments.text("name", diagnostics);
    let formerly = arguments.texts("formerly", diagnostics);
    let (name, name_at) = if let Some(literal) = &literal {
        (literal.value(), literal.span())
    } else {
        let ident = item.ident.unraw().to_string();
        (name::task_name_of(&ident), item.ident.span())
    };
    if let Err(reason) = name::check_task_name(&name) {
        if literal.is_some() {
            diagnostics.error(name_at, format!("task name `{name}` {reason}"));
        } else if item.ident != "_" {
            diagnostics.error(
                name_at,
                format!(
                    "no task can be named after `{}`; add `name = \"…\"` to `#[cron]`",
                    item.ident
                ),
            );
        }
    }
    let formerly = check_formerly(&formerly, &name, name::check_task_name, diagnostics);
    Some(Task {
        name,
        name_at,
        formerly,
        schedule: schedule?,
    })
}
