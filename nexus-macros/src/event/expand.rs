//! From what was meant to code; cannot fail.

use proc_macro2::{Ident, Span, TokenStream};
use quote::{quote, quote_spanned};
use syn::{DeriveInput, Generics, ext::IdentExt, spanned::Spanned};

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
                <#ident as ::nexus::__private::DerivedEvent>::USE.descriptor;

            #guard
        }
    } else {
        TokenStream::new()
    };
    let derived = derived(ident, None);
    quote! {
        const _: () = {
            // What is missing is told by who asks, not by this implementation.
            #[diagnostic::do_not_recommend]
            #[automatically_derived]
            impl ::nexus::Event for #ident
            where
                // Without the lifetime rustc would check the bound here, where it reports each
                // missing derive apart; so it does in `DerivedEvent`, with the text of the trait.
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

/// What the other macros ask for, and the one place where rustc asks for all derives.
fn derived(ident: &Ident, generics: Option<&Generics>) -> TokenStream {
    let split = generics.map(Generics::split_for_impl);
    let (impl_generics, type_generics, where_clause) = match &split {
        Some((impl_generics, type_generics, where_clause)) => {
            let bounds = where_clause.map(|clause| &clause.predicates);
            let clause = quote! {
                where for<'defer> #ident #type_generics: ::nexus::EventPayload, #bounds
            };
            (Some(impl_generics), Some(type_generics), Some(clause))
        }
        None => (None, None, None),
    };
    quote! {
        #[automatically_derived]
        impl #impl_generics ::nexus::__private::DerivedEvent for #ident #type_generics
        #where_clause
        {
            type Event = Self;

            const USE: ::nexus::__private::Use<Self> =
                <#ident #type_generics as ::nexus::__private::Usable>::USE;

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
    let is_generic = !input.generics.params.is_empty();
    let derived = derived(ident, is_generic.then_some(&input.generics));
    quote! {
        #derived

        #[diagnostic::do_not_recommend]
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
