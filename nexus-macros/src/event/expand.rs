//! From what was meant to code; cannot fail.

use proc_macro2::{Ident, Span, TokenStream};
use quote::{quote, quote_spanned};
use syn::{DeriveInput, ext::IdentExt, spanned::Spanned};

use super::model::{Event, Key};
use crate::guard;

pub(super) fn expand(event: &Event) -> TokenStream {
    let Event {
        ident,
        event_type,
        declared_at,
        version,
        key,
        register,
    } = event;
    let name = ident.unraw().to_string();
    let event_key = key.as_ref().map(event_key);
    let registration = if *register {
        let guard = guard::event(event_type, *version, *declared_at);
        quote! {
            #[::nexus::__private::linkme::distributed_slice(::nexus::__private::EVENTS)]
            #[linkme(crate = ::nexus::__private::linkme)]
            static REGISTRATION: &'static ::nexus::__private::EventDescriptor =
                <#ident as ::nexus::Event>::DESCRIPTOR;

            #guard
        }
    } else {
        // The use at which rustc checks that all derives are there.
        quote!(const _: &::nexus::__private::EventDescriptor = <#ident as ::nexus::Event>::DESCRIPTOR;)
    };
    let derived = derived(ident);
    quote! {
        const _: () = {
            #[automatically_derived]
            impl ::nexus::Event for #ident
            where
                // Without the lifetime rustc would check the bound here, where it reports each
                // missing derive apart; so it does at the first use, with the text of the trait.
                for<'defer> #ident: ::nexus::EventPayload,
            {
                const META: ::nexus::__private::EventMeta = ::nexus::__private::EventMeta {
                    event_type: #event_type,
                    version: #version,
                    origin: ::nexus::__private::Origin::new(
                        ::core::concat!(::core::module_path!(), "::", #name),
                        ::core::file!(),
                        ::core::line!(),
                    ),
                };
                #event_key
            }

            #derived
            #registration
        };
    }
}

/// What tells `#[cron]` that the derive is there.
fn derived(ident: &Ident) -> TokenStream {
    quote! {
        #[automatically_derived]
        impl ::nexus::__private::Derived for #ident {
            type Event = Self;

            fn event(&self) -> &Self {
                self
            }
        }
    }
}

fn event_key(Key { member, variants }: &Key) -> TokenStream {
    // A field that cannot be a key is shown where it was chosen: in the attribute.
    let chosen = member.span().resolved_at(Span::call_site());
    let body = match variants {
        None => quote_spanned!(chosen=> ::nexus::__private::EventKey::event_key(&self.#member)),
        Some(variants) => {
            let arms = variants.iter().map(|variant| {
                quote_spanned! {chosen=>
                    Self::#variant { #member: ref key, .. } =>
                        ::nexus::__private::EventKey::event_key(key),
                }
            });
            // Written with `*` and `ref` because that also compiles for an enum without variants.
            quote!(match *self { #(#arms)* })
        }
    };
    quote! {
        fn event_key(&self) -> ::core::option::Option<::std::string::String> {
            ::core::option::Option::Some(#body)
        }
    }
}

/// An implementation for a type whose derive was refused: nothing registers it, and the program
/// does not compile anyway, but what uses the type is spared a second error.
pub(super) fn stub(input: &DeriveInput) -> TokenStream {
    if matches!(input.data, syn::Data::Union(_)) {
        return TokenStream::new();
    }
    let ident = &input.ident;
    let (impl_generics, type_generics, where_clause) = input.generics.split_for_impl();
    let bounds = where_clause.map(|clause| &clause.predicates);
    let name = ident.unraw().to_string();
    let derived = input.generics.params.is_empty().then(|| derived(ident));
    quote! {
        #derived

        #[automatically_derived]
        impl #impl_generics ::nexus::Event for #ident #type_generics
        where
            for<'defer> #ident #type_generics: ::nexus::EventPayload,
            #bounds
        {
            const META: ::nexus::__private::EventMeta = ::nexus::__private::EventMeta {
                event_type: #name,
                version: 1,
                origin: ::nexus::__private::Origin::new(#name, ::core::file!(), ::core::line!()),
            };
        }
    }
}
