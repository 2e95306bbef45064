//! From what was meant to code; cannot fail.

use proc_macro2::{Span, TokenStream};
use quote::{ToTokens, quote, quote_spanned};
use syn::{Type, ext::IdentExt, spanned::Spanned};

use super::{
    model::Task,
    parse::{Item, What},
};
use crate::{
    guard,
    handler::{hidden_const, schedule_expression},
};

/// The item as it was written, and beside it what `app!` finds under its name.
pub(super) fn expand(tokens: &TokenStream, item: &Item, tasks: &[Task]) -> TokenStream {
    // A type that cannot be an event was reported by its derive.
    if let What::Union { .. } = item.what {
        return tokens.clone();
    }
    if let What::Type { generics, .. } = &item.what
        && !generics.params.is_empty()
    {
        return tokens.clone();
    }
    let descriptors = tasks.iter().map(|task| descriptor(item, task));
    let hidden = hidden_const(
        &guard::task_item(&item.ident.unraw().to_string()),
        &item.ident,
        &item.visibility,
        &item.descriptor_attributes(),
        &quote!(::nexus::__private::CronItem),
        &quote!(::nexus::__private::CronItem::Emits(&[#(#descriptors),*])),
    );
    quote!(#tokens #hidden)
}

/// A reference to the descriptor, which is registered.
///
/// Whatever is asked of the type is asked of `DerivedEvent::Event`: where the type is no event, rustc says
/// so once, and nothing of what would follow.
fn descriptor(item: &Item, task: &Task) -> TokenStream {
    let Item { ident, what, .. } = item;
    let Task {
        name,
        name_at,
        formerly,
        schedule,
    } = task;
    let guard = guard::task(name, *name_at);
    let path_end = ident.unraw().to_string();
    let schedule = schedule_expression(schedule);
    let limit = syn::Ident::new("limit", Span::mixed_site());
    let ty = event_type(item);
    // As the derive's own use of the type, so that rustc tells only once what both of them miss.
    let at = ty.span();
    let event = quote_spanned!(at=> <#ty as ::nexus::__private::DerivedEvent>::Event);
    let value = if let What::Constant { .. } = what {
        quote_spanned!(at=> <#ty as ::nexus::__private::DerivedEvent>::event(&#ident))
    } else {
        quote_spanned!(at=> &<#event as ::nexus::__private::Initial>::initial())
    };
    let descriptor =
        quote_spanned!(at=> <#event as ::nexus::__private::DerivedEvent>::USE.descriptor);
    quote! {
        {
            static DESCRIPTOR: ::nexus::__private::TaskDescriptor =
                ::nexus::__private::TaskDescriptor {
                    name: #name,
                    formerly: &[#(#formerly),*],
                    origin: ::nexus::__private::Origin::new(
                        ::core::concat!(::core::module_path!(), "::", #path_end),
                        ::core::file!(),
                        ::core::line!(),
                    ),
                    schedule: #schedule,
                    event: #descriptor,
                    payload: |#limit| ::nexus::__private::TaskPayload::of_derived(#value, #limit),
                };

            #[::nexus::__private::linkme::distributed_slice(::nexus::__private::TASKS)]
            #[linkme(crate = ::nexus::__private::linkme)]
            static REGISTRATION: &'static ::nexus::__private::TaskDescriptor = &DESCRIPTOR;

            #guard

            &DESCRIPTOR
        }
    }
}

/// The type of the constant, or the type itself.
fn event_type(item: &Item) -> TokenStream {
    match &item.what {
        What::Constant { ty } => Type::to_token_stream(ty),
        _ => item.ident.to_token_stream(),
    }
}
