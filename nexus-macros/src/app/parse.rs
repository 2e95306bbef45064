//! The lists, as they were written.
//!
//! ```text
//! app  = { key ":" "[" { path "," } "]" "," }
//! key  = "handlers" | "crons" | "events"
//! ```

use proc_macro2::{Delimiter, Ident, TokenStream, TokenTree};
use syn::{Path, PathArguments, Type, ext::IdentExt};

use super::model::List;
use crate::{
    attr::split_at_commas,
    diagnostics::{Diagnostics, closest, did_you_mean},
};

/// Each key, an example of its list, and what one of its entries is.
const KEYS: [(&str, &str, &str); 3] = [
    (
        "handlers",
        "[invoice, shipping::notify]",
        "a `#[handler]` function by its path, such as `shipping::notify`",
    ),
    (
        "crons",
        "[cleanup, MorningTick]",
        "a `#[cron]` function, type or constant by its path, such as `shipping::cleanup`",
    ),
    (
        "events",
        "[OrderPaid]",
        "an event type, such as `orders::OrderPaid`",
    ),
];

/// What people write for a key that has another name here.
const SYNONYMS: [(&str, &str); 5] = [
    ("schedules", "crons"),
    ("scheduled", "crons"),
    ("tasks", "crons"),
    ("jobs", "crons"),
    ("subscribers", "handlers"),
];

pub(super) fn parse(tokens: TokenStream, diagnostics: &mut Diagnostics) -> List {
    let mut list = List::default();
    let mut seen: Vec<String> = Vec::new();
    for part in split_at_commas(tokens) {
        let [TokenTree::Ident(word), rest @ ..] = &*part else {
            refuse(part, diagnostics);
            continue;
        };
        let key = word.unraw().to_string();
        let Some(&(_, example, entry)) = KEYS.iter().find(|(known, ..)| *known == key) else {
            if starts_value(rest) {
                diagnostics.error(word.span(), unknown(&key));
            } else {
                refuse(part, diagnostics);
            }
            continue;
        };
        if seen.contains(&key) {
            diagnostics.error(
                word.span(),
                format!("`{key}` of `app!` is given twice; write all of it in one list"),
            );
            continue;
        }
        let entries = match rest {
            [TokenTree::Punct(colon), TokenTree::Group(group)]
                if colon.as_char() == ':' && group.delimiter() == Delimiter::Bracket =>
            {
                split_at_commas(group.stream())
            }
            _ => {
                diagnostics.error_over(
                    part.iter().cloned().collect::<TokenStream>(),
                    format!("`{key}` of `app!` takes a list: write `{key}: {example}`"),
                );
                continue;
            }
        };
        for tokens in entries {
            let tokens: TokenStream = tokens.into_iter().collect();
            match &*key {
                "handlers" => list.handlers.extend(path(tokens, entry, diagnostics)),
                "crons" => list.crons.extend(path(tokens, entry, diagnostics)),
                _ => list.events.extend(event(tokens, entry, diagnostics)),
            }
        }
        seen.push(key);
    }
    list
}

fn starts_value(rest: &[TokenTree]) -> bool {
    match rest {
        [TokenTree::Punct(mark)] => matches!(mark.as_char(), ':' | '='),
        [TokenTree::Punct(mark), TokenTree::Group(_), ..] => matches!(mark.as_char(), ':' | '='),
        _ => false,
    }
}

fn refuse(part: Vec<TokenTree>, diagnostics: &mut Diagnostics) {
    diagnostics.error_over(
        part.into_iter().collect::<TokenStream>(),
        format!(
            "`app!` takes its parts by kind: write `app! {{ handlers: [invoice] }}`\n{}",
            known()
        ),
    );
}

fn known() -> String {
    let known: Vec<String> = KEYS.iter().map(|(key, ..)| format!("`{key}`")).collect();
    format!("known kinds: {}", known.join(", "))
}

fn unknown(key: &str) -> String {
    let synonym = SYNONYMS
        .iter()
        .find(|(word, _)| *word == key)
        .map(|&(_, meant)| meant);
    let meant = synonym.or_else(|| closest(key, KEYS.iter().map(|&(known, ..)| known)));
    format!(
        "`app!` knows no `{key}`{}\n{}",
        did_you_mean(meant),
        known()
    )
}

/// The path of an item, whose last segment is a plain name.
fn path(tokens: TokenStream, entry: &str, diagnostics: &mut Diagnostics) -> Option<Path> {
    let path = syn::parse2::<Path>(tokens.clone()).ok().filter(|path| {
        path.segments
            .iter()
            .all(|segment| matches!(segment.arguments, PathArguments::None))
            && path
                .segments
                .last()
                .is_some_and(|last| is_name(&last.ident))
    });
    if path.is_none() {
        diagnostics.error_over(tokens, format!("expected {entry}"));
    }
    path
}

fn is_name(ident: &Ident) -> bool {
    !["self", "super", "crate", "Self"]
        .iter()
        .any(|keyword| ident == keyword)
}

fn event(tokens: TokenStream, entry: &str, diagnostics: &mut Diagnostics) -> Option<Type> {
    let ty = syn::parse2(tokens.clone()).ok();
    if ty.is_none() {
        diagnostics.error_over(tokens, format!("expected {entry}"));
    }
    ty
}
