//! `#[derive(Event)]`.

mod check;
mod expand;
mod model;
mod parse;

use proc_macro2::TokenStream;
use syn::DeriveInput;

use crate::diagnostics::Diagnostics;

pub(crate) fn derive(input: &DeriveInput) -> TokenStream {
    let mut diagnostics = Diagnostics::default();
    let attribute = parse::parse(input, &mut diagnostics);
    let model = check::check(input, attribute, &mut diagnostics);
    match diagnostics.finish(model) {
        // What the `#[cron]` below refuses.
        Ok(_) if !check::can_be_event(input) => expand::stub(input),
        Ok(model) => expand::expand(&model),
        Err(error) => {
            let mut tokens = error.into_compile_error();
            // Whatever uses the type as an event shall not fail as well.
            tokens.extend(expand::stub(input));
            tokens
        }
    }
}
