//! From what was listed to code; cannot fail.

use proc_macro2::TokenStream;
use quote::{format_ident, quote, quote_spanned};
use syn::{Path, ext::IdentExt, spanned::Spanned};

use super::model::List;

/// A table that is complete, and checked, while compiling, and the app that is made of it.
pub(super) fn expand(list: &List) -> TokenStream {
    let handlers = list
        .handlers
        .iter()
        .map(|path| hidden("nexus_handler__", path));
    let crons = list.crons.iter().map(|path| hidden("nexus_cron__", path));
    let events = list.events.iter().map(|ty| {
        let at = ty.span();
        quote_spanned!(at=> <#ty as ::nexus::__private::DerivedEvent>::USE.descriptor)
    });
    quote! {
        {
            static LIST: ::nexus::__private::List = ::nexus::__private::List::new(
                &[#(#handlers),*],
                &[#(#crons),*],
                &[#(#events),*],
            );

            // Every name is compared with every other.
            #[allow(long_running_const_eval)]
            const _: () = LIST.check();

            ::nexus::App::of_list(&LIST)
        }
    }
}

/// The constant beside an item, which the item's macro has made.
fn hidden(prefix: &str, path: &Path) -> Path {
    let mut path = path.clone();
    if let Some(last) = path.segments.last_mut() {
        last.ident = format_ident!("{prefix}{}", last.ident.unraw(), span = last.ident.span());
    }
    path
}

/// An app of nothing, beside the error: what is called on it does not fail as well.
pub(super) fn stub(error: &syn::Error) -> TokenStream {
    let error = error.to_compile_error();
    quote! {
        {
            #error
            static LIST: ::nexus::__private::List = ::nexus::__private::List::new(&[], &[], &[]);
            ::nexus::App::of_list(&LIST)
        }
    }
}
