//! From what was listed to code; cannot fail.

use proc_macro2::{Ident, TokenStream};
use quote::{quote, quote_spanned};
use syn::{Path, ext::IdentExt, spanned::Spanned};

use super::model::List;
use crate::guard;

/// A table that is complete, and checked, while compiling, and the app that is made of it.
pub(super) fn expand(list: &List) -> TokenStream {
    let handlers = list
        .handlers
        .iter()
        .map(|path| hidden(guard::handler_item, path));
    let crons = list.crons.iter().map(|path| hidden(guard::task_item, path));
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
fn hidden(name: impl Fn(&str) -> String, path: &Path) -> Path {
    let mut path = path.clone();
    if let Some(last) = path.segments.last_mut() {
        last.ident = Ident::new(&name(&last.ident.unraw().to_string()), last.ident.span());
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
