//! Collecting errors, so that one build shows every mistake, and guessing what was meant.

use std::fmt::Display;

use proc_macro2::{Span, TokenStream};
use quote::ToTokens;

/// The mistakes found so far in one use of a macro.
#[derive(Default)]
pub(crate) struct Diagnostics {
    found: Option<syn::Error>,
}

impl Diagnostics {
    /// Reports a mistake at one token.
    pub(crate) fn error(&mut self, at: Span, message: impl Display) {
        self.add(syn::Error::new(at, message));
    }

    /// Reports a mistake that all of `tokens` make.
    pub(crate) fn error_over(&mut self, tokens: impl ToTokens, message: impl Display) {
        self.add(syn::Error::new_spanned(tokens, message));
    }

    pub(crate) fn add(&mut self, error: syn::Error) {
        match &mut self.found {
            Some(found) => found.combine(error),
            None => self.found = Some(error),
        }
    }

    /// Takes the value or keeps the error.
    pub(crate) fn check<T>(&mut self, result: syn::Result<T>) -> Option<T> {
        result.map_err(|error| self.add(error)).ok()
    }

    /// Whether nothing was reported.
    pub(crate) fn is_empty(&self) -> bool {
        self.found.is_none()
    }

    /// `value`, if nothing was reported.
    pub(crate) fn finish<T>(self, value: T) -> syn::Result<T> {
        self.found.map_or(Ok(value), Err)
    }
}

/// What replaces an attribute's item after an error: the error, and the item as it was written, so
/// that its other uses do not fail as well.
pub(crate) fn error_beside(item: &TokenStream, error: &syn::Error) -> TokenStream {
    let mut tokens = error.to_compile_error();
    tokens.extend(item.clone());
    tokens
}

/// The known word that looks most like `given`, if one does.
pub(crate) fn closest<'a>(
    given: &str,
    known: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let given = given.to_lowercase();
    let tolerated = (given.chars().count() / 3).max(1);
    known
        .into_iter()
        .map(|word| {
            (
                strsim::damerau_levenshtein(&given, &word.to_lowercase()),
                word,
            )
        })
        .filter(|&(distance, _)| distance <= tolerated)
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, word)| word)
}

/// `; did you mean …?`, or nothing.
pub(crate) fn did_you_mean(word: Option<impl Display>) -> String {
    word.map(|word| format!("; did you mean `{word}`?"))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: [&str; 4] = ["group", "name", "max_attempts", "timeout"];

    #[test]
    fn finds_the_word_that_was_meant() {
        for (given, meant) in [
            ("max_atempts", "max_attempts"),
            ("gruop", "group"),
            ("Name", "name"),
            ("timout", "timeout"),
        ] {
            assert_eq!(closest(given, KNOWN), Some(meant));
        }
    }

    #[test]
    fn guesses_nothing_from_another_word() {
        for given in ["queue", "x", ""] {
            assert_eq!(closest(given, KNOWN), None);
        }
    }

    #[test]
    fn reports_all_mistakes_together() {
        let mut diagnostics = Diagnostics::default();
        diagnostics.error(Span::call_site(), "one");
        diagnostics.error(Span::call_site(), "two");
        let all: Vec<_> = diagnostics
            .finish(())
            .unwrap_err()
            .into_iter()
            .map(|e| e.to_string())
            .collect();
        assert_eq!(all, ["one", "two"]);
    }
}
