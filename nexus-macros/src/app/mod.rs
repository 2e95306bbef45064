//! `app!`: an app by a list, instead of all that is linked.

mod expand;
mod model;
mod parse;

use proc_macro2::TokenStream;

use crate::diagnostics::Diagnostics;

pub(crate) fn app(arguments: TokenStream) -> TokenStream {
    let mut diagnostics = Diagnostics::default();
    let list = parse::parse(arguments, &mut diagnostics);
    match diagnostics.finish(list) {
        Ok(list) => expand::expand(&list),
        Err(error) => expand::stub(&error),
    }
}
