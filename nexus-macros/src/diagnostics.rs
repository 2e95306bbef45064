//! Collecting errors, so that one build shows every mistake.

use std::fmt::Display;

pub(crate) use nexus_cron::{closest, did_you_mean};
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

#[cfg(test)]
mod tests {
    use super::*;

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
