//! The rules of functions that become handlers.

use std::time::Duration;

use proc_macro2::{Span, TokenStream, TokenTree};
use quote::ToTokens;
use syn::{
    Attribute, FnArg, GenericParam, LitStr, PathArguments, PathSegment, ReturnType, Signature,
    Type, TypeReference, ext::IdentExt,
};

use super::{
    model::{Argument, Callable, Registration, Trigger},
    parse::{Function, HandlerArguments},
};
use crate::{
    attr::{is_macro, split_off},
    diagnostics::Diagnostics,
    history, name,
};

/// Postgres holds `statement_timeout` in milliseconds as `integer`, which is 24.8 days.
const LONGEST_TIMEOUT: Duration = Duration::from_hours(576);

/// The function that was meant. After a mistake, which is reported, the result is not to be used.
pub(crate) fn check(
    function: &Function,
    takes_event: bool,
    diagnostics: &mut Diagnostics,
) -> Callable {
    refuse_second_registration(function, diagnostics);
    check_signature(function, diagnostics);
    let arguments = check_arguments(function, takes_event, diagnostics);
    check_output(function, diagnostics);
    Callable {
        ident: function.signature.ident.clone(),
        visibility: function.visibility.clone(),
        attributes: function
            .attributes
            .iter()
            .filter(|a| concerns_descriptor(a))
            .cloned()
            .collect(),
        arguments,
        output: function.signature.output.clone(),
    }
}

/// What an attribute of the function says; `None` after a mistake, which is reported. Without a
/// trigger, because that one is wrong, the rules are checked as for a cron function.
pub(crate) fn check_options(
    function: &Function,
    options: HandlerArguments,
    trigger: Option<Trigger>,
    diagnostics: &mut Diagnostics,
) -> Option<Registration> {
    let check_name = match trigger {
        Some(Trigger::Event) => name::check_name,
        _ => name::check_cron_name,
    };
    let (name, name_at) = handler_name(function, &options, check_name, diagnostics);
    if let Some(group) = &options.group
        && let Err(reason) = name::check_name(&group.value())
    {
        diagnostics.error(group.span(), format!("group `{}` {reason}", group.value()));
    }
    let formerly = check_formerly(&options.formerly, &name, check_name, diagnostics);
    if let Some((at, timeout)) = options.timeout
        && timeout > LONGEST_TIMEOUT
    {
        diagnostics.error(at, "invalid `timeout`: the longest is `24d`");
    }
    let from = options.from.as_ref().and_then(|text| {
        history::parse(&text.value())
            .map_err(|reason| diagnostics.error(text.span(), format!("invalid `from`: {reason}")))
            .ok()
    });
    Some(Registration {
        trigger: trigger?,
        name,
        name_at,
        group: options.group.map(|group| group.value()),
        formerly,
        from,
        max_attempts: options.max_attempts,
        backoff: options.backoff,
        timeout: options.timeout.map(|(_, timeout)| timeout),
        concurrency: options.concurrency,
    })
}

/// Names that something had before: each once, well formed, and not the one it has.
pub(crate) fn check_formerly(
    formerly: &[LitStr],
    name: &str,
    check_name: fn(&str) -> Result<(), String>,
    diagnostics: &mut Diagnostics,
) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for literal in formerly {
        let former = literal.value();
        if let Err(reason) = check_name(&former) {
            diagnostics.error(literal.span(), format!("former name `{former}` {reason}"));
        } else if former == name {
            diagnostics.error(
                literal.span(),
                format!("`{former}` is the name that it has now; `formerly` lists the names that it had before"),
            );
        } else if names.contains(&former) {
            diagnostics.error(
                literal.span(),
                format!("former name `{former}` is given twice; remove one of them"),
            );
        }
        names.push(former);
    }
    names
}

pub(crate) fn concerns_descriptor(attribute: &Attribute) -> bool {
    ["cfg", "allow", "expect"]
        .iter()
        .any(|name| attribute.path().is_ident(name))
}

/// What events run and what the clock runs take different arguments.
fn refuse_second_registration(function: &Function, diagnostics: &mut Diagnostics) {
    for attribute in &function.attributes {
        let is = |name| is_macro(attribute, name);
        if is("handler") && function.attribute == "#[handler]" {
            diagnostics.error_over(
                attribute,
                "a function takes one `#[handler]`; for another one write a second function that calls this one",
            );
        } else if is("handler") || is("cron") {
            diagnostics.error_over(
                attribute,
                "a function is run by events or by the clock, not by both; write a second function that calls this one",
            );
        }
    }
}

/// The function for the case of an error: without what would only repeat it.
pub(crate) fn without_registrations(function: &TokenStream) -> TokenStream {
    let is_registration =
        |attribute: &Attribute| is_macro(attribute, "handler") || is_macro(attribute, "cron");
    split_off(function, is_registration).1
}

/// Whether `Self` is named, which has a meaning only where no handler can stand.
pub(crate) fn names_self(tokens: TokenStream) -> bool {
    tokens.into_iter().any(|token| match token {
        TokenTree::Ident(name) => name == "Self",
        TokenTree::Group(group) => names_self(group.stream()),
        _ => false,
    })
}

fn handler_name(
    function: &Function,
    options: &HandlerArguments,
    check_name: fn(&str) -> Result<(), String>,
    diagnostics: &mut Diagnostics,
) -> (String, Span) {
    let ident = &function.signature.ident;
    let (name, at, advice) = match &options.name {
        Some(literal) => (literal.value(), literal.span(), String::new()),
        None => (
            ident.unraw().to_string(),
            ident.span(),
            ", so it cannot name the handler; add `name = \"…\"`".to_owned(),
        ),
    };
    if let Err(reason) = check_name(&name) {
        let what = if options.name.is_some() {
            "handler name"
        } else {
            "function name"
        };
        diagnostics.error(at, format!("{what} `{name}` {reason}{advice}"));
    }
    (name, at)
}

fn check_signature(function: &Function, diagnostics: &mut Diagnostics) {
    let Function {
        attribute,
        signature,
        ..
    } = function;
    if signature.asyncness.is_none() {
        diagnostics.error(
            signature.fn_token.span,
            format!(
                "`{attribute}` functions must be async: write `async fn {}`",
                signature.ident
            ),
        );
    }
    if let syn::Safety::Unsafe(keyword) = signature.safety {
        diagnostics.error(
            keyword.span,
            format!("`{attribute}` functions cannot be `unsafe`: nexus calls them, and can keep no promises for you"),
        );
    }
    let mentions_self = names_self(signature.inputs.to_token_stream())
        || names_self(signature.output.to_token_stream());
    if mentions_self && signature.receiver().is_none() {
        diagnostics.error(
            signature.ident.span(),
            format!("`{attribute}` functions are free functions: move `{}` out of the `impl` block, and write the type instead of `Self`", signature.ident),
        );
    }
    let generics = &signature.generics;
    if generics
        .params
        .iter()
        .any(|param| !matches!(param, GenericParam::Lifetime(_)))
    {
        diagnostics.error_over(
            generics,
            format!("`{attribute}` functions cannot be generic: a handler is registered once, with concrete types"),
        );
    } else if !generics.params.is_empty() {
        diagnostics.error_over(
            generics,
            format!("`{attribute}` functions take no lifetime parameters: arguments are owned, except `&mut Tx`"),
        );
    }
}

fn check_arguments(
    function: &Function,
    takes_event: bool,
    diagnostics: &mut Diagnostics,
) -> Vec<Argument> {
    let Function {
        attribute,
        signature,
        ..
    } = function;
    if signature.inputs.is_empty() && takes_event {
        diagnostics.error(
            parentheses(signature),
            format!(
                "a handler needs its event as the first argument: write `async fn {}(event: MyEvent)`",
                signature.ident
            ),
        );
    }
    let mut arguments = Vec::new();
    let mut took_tx = false;
    for (index, input) in signature.inputs.iter().enumerate() {
        let typed = match input {
            FnArg::Typed(typed) => typed,
            FnArg::Receiver(receiver) => {
                diagnostics.error_over(
                    receiver,
                    format!("`{attribute}` functions are free functions and take no `self`; put shared values in `State<T>`"),
                );
                // What follows is not the first argument that was meant.
                return arguments;
            }
        };
        if let Some(cfg) = typed
            .attrs
            .iter()
            .find(|attribute| attribute.path().is_ident("cfg"))
        {
            diagnostics.error_over(
                cfg,
                format!("`{attribute}` cannot see whether `#[cfg]` keeps this argument; put the `#[cfg]` on two functions"),
            );
        }
        let ty = &*typed.ty;
        let is_event = takes_event && index == 0;
        let argument = match (ungrouped(ty), is_event) {
            (Type::Reference(reference), _) if names_tx(&reference.elem) => {
                check_tx(reference, is_event, &mut took_tx, diagnostics);
                Argument::Tx(ty.clone())
            }
            (Type::Reference(reference), _)
                if !is_event && let Some(wrapper) = wraps_event(&reference.elem) =>
            {
                refuse_event(ty, &wrapper, takes_event, diagnostics);
                continue;
            }
            (Type::Reference(reference), _) => {
                refuse_reference(reference, is_event, diagnostics);
                continue;
            }
            (Type::ImplTrait(_), _) => {
                diagnostics.error_over(
                    ty,
                    format!("`{attribute}` functions cannot be generic: name the concrete type of this argument"),
                );
                continue;
            }
            (owned, _) if names_tx(owned) => {
                diagnostics.error_over(
                    ty,
                    "the transaction is lent to the handler, which cannot keep it: take it as `&mut Tx`",
                );
                continue;
            }
            (owned, true) => {
                if is_surely_no_event(owned) {
                    diagnostics.error_over(
                        ty,
                        format!(
                            "the first argument of a handler is its event; put `{}` after it",
                            display(owned)
                        ),
                    );
                    // The event behind it would be reported as no handler argument.
                    return arguments;
                }
                Argument::Event(ty.clone())
            }
            (owned, false) => {
                if let Some(wrapper) = wraps_event(owned) {
                    refuse_event(ty, &wrapper, takes_event, diagnostics);
                    continue;
                }
                // What is called `Tick` and taken like ours is ours: an event would come first.
                if takes_event && last_segment(owned).is_some_and(|last| last.ident == "Tick") {
                    diagnostics.error_over(
                        ty,
                        "a `#[handler]` is run by events and gets no `Tick`: it tells a `#[cron]` function when it was due; for what is known of the event take `Ctx` or `Envelope<E>`",
                    );
                    continue;
                }
                Argument::Context(ty.clone())
            }
        };
        arguments.push(argument);
    }
    arguments
}

/// From the first parenthesis to the last, as far as the compiler can join them.
fn parentheses(signature: &Signature) -> Span {
    signature.paren_token.span.join()
}

fn check_tx(
    reference: &TypeReference,
    is_event: bool,
    took_tx: &mut bool,
    diagnostics: &mut Diagnostics,
) {
    if reference.mutability.is_none() {
        diagnostics.error_over(reference, "take the transaction as `&mut Tx`");
    } else if is_event {
        diagnostics.error_over(
            reference,
            "the first argument of a handler is its event; put the transaction after it",
        );
    } else if *took_tx {
        diagnostics.error_over(
            reference,
            "the transaction can be taken only once: there is one per attempt, and it also carries the completion",
        );
    }
    *took_tx = true;
}

/// An event where none is taken.
fn refuse_event(ty: &Type, wrapper: &str, takes_event: bool, diagnostics: &mut Diagnostics) {
    let message = if takes_event {
        format!(
            "a handler takes one event, as its first argument, so `{wrapper}` cannot come after it; write a second handler for the other event"
        )
    } else {
        format!(
            "a `#[cron]` function is run by the clock and takes no `{wrapper}`; for events write `#[handler]`"
        )
    };
    diagnostics.error_over(ty, message);
}

fn refuse_reference(reference: &TypeReference, is_event: bool, diagnostics: &mut Diagnostics) {
    let element = display(&reference.elem);
    let message = if is_event {
        format!("a handler takes its event by value: write `{element}`")
    } else if reference.mutability.is_some() {
        format!(
            "only the transaction is taken by `&mut`, as `&mut Tx`; for a shared value write `State<{element}>`"
        )
    } else if is_extractor(&reference.elem) {
        format!("arguments are owned, except `&mut Tx`: write `{element}`")
    } else {
        format!(
            "arguments are owned, except `&mut Tx`; for a shared value write `State<{element}>`"
        )
    };
    diagnostics.error_over(reference, message);
}

fn check_output(function: &Function, diagnostics: &mut Diagnostics) {
    if let ReturnType::Type(_, ty) = &function.signature.output
        && let Type::ImplTrait(_) = ungrouped(ty)
    {
        diagnostics.error_over(
            ty,
            format!("`{}` functions name their result: `()`, `Emit<E>`, `Option<Emit<E>>` or a `Result` of these", function.attribute),
        );
    }
}

/// A type without the invisible group around a fragment of `macro_rules!`, and without parentheses.
fn ungrouped(ty: &Type) -> &Type {
    match ty {
        Type::Group(group) => ungrouped(&group.elem),
        Type::Paren(paren) => ungrouped(&paren.elem),
        other => other,
    }
}

fn last_segment(ty: &Type) -> Option<&PathSegment> {
    match ungrouped(ty) {
        Type::Path(path) if path.qself.is_none() => path.path.segments.last(),
        _ => None,
    }
}

fn names_tx(ty: &Type) -> bool {
    last_segment(ty).is_some_and(|last| last.ident == "Tx" && last.arguments.is_none())
}

/// Whether a type has the name of an argument of ours that no event has: generic, or `Ctx`.
fn is_surely_no_event(ty: &Type) -> bool {
    last_segment(ty)
        .is_some_and(|last| last.ident == "Ctx" || last.ident == "State" && is_generic(last))
}

/// Whether a type has the name of an argument of ours; an event may have it too.
fn is_extractor(ty: &Type) -> bool {
    let is_named = |name: &&str| last_segment(ty).is_some_and(|last| last.ident == name);
    is_surely_no_event(ty) || ["Client", "Tick"].iter().any(is_named)
}

fn wraps_event(ty: &Type) -> Option<String> {
    let last = last_segment(ty)?;
    ((last.ident == "Envelope" || last.ident == "Batch") && is_generic(last)).then(|| display(ty))
}

fn is_generic(segment: &PathSegment) -> bool {
    matches!(segment.arguments, PathArguments::AngleBracketed(_))
}

/// A type as people write it: without the blanks that its tokens are joined with.
fn display(ty: &Type) -> String {
    let mut text = ungrouped(ty).to_token_stream().to_string();
    for mark in ["::", "<", ">"] {
        text = text
            .replace(&format!(" {mark}"), mark)
            .replace(&format!("{mark} "), mark);
    }
    text.replace(" ,", ",").replace("& ", "&")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_types_as_they_are_written() {
        for text in [
            "Db",
            "crate::db::Db",
            "Vec<Option<u8>>",
            "HashMap<String, u8>",
            "[u8]",
        ] {
            assert_eq!(display(&syn::parse_str(text).unwrap()), text);
        }
    }
}
