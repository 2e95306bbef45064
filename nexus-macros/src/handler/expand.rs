//! From what was meant to code; cannot fail.

use std::time::Duration;

use proc_macro2::{Ident, Span, TokenStream};
use quote::{ToTokens, format_ident, quote, quote_spanned};
use syn::{Attribute, ReturnType, Type, ext::IdentExt, spanned::Spanned};

use super::model::{Argument, Handler, Trigger};
use crate::duration::Backoff;

/// The function as it was written, and beside it the descriptor and its registration.
///
/// All that is generated sits in one constant, so that it works wherever a function can stand. Each
/// use of an argument's type is a qualified call at that type's span: rustc then reports what is
/// missing once, at the type, with the text of the trait.
pub(crate) fn expand(function: &TokenStream, handler: &Handler) -> TokenStream {
    let Handler {
        ident,
        arguments,
        trigger,
        name,
        ..
    } = handler;
    let path_end = ident.unraw().to_string();
    let descriptor_name = format_ident!(
        "__nexus_handler_{}",
        ident.unraw(),
        span = ident.span().resolved_at(Span::call_site())
    );
    let attributes = handler.attributes.iter().map(allow_instead_of_expect);
    let visibility = respanned(handler.visibility.to_token_stream());
    let group = option(handler.group.as_ref());
    let options = options(handler);
    let trigger_expression = trigger_expression(trigger, arguments);
    let batch = if let Some(ty) = event_type(arguments) {
        let at = at(ty);
        quote_spanned!(at=> <#ty as ::nexus::__private::Input>::BATCH)
    } else {
        quote!(false)
    };
    let uses_tx = arguments
        .iter()
        .any(|argument| matches!(argument, Argument::Tx(_)));
    let requires = requires(arguments);
    let call = call(handler);
    quote! {
        // A handler is async even if it has nothing to wait for.
        #[allow(clippy::unused_async)]
        #function

        #(#attributes)*
        #[doc(hidden)]
        #visibility const #descriptor_name: &'static ::nexus::__private::HandlerDescriptor = {
            static DESCRIPTOR: ::nexus::__private::HandlerDescriptor =
                ::nexus::__private::HandlerDescriptor {
                    name: #name,
                    group: #group,
                    formerly: &[],
                    origin: ::nexus::__private::Origin::new(
                        ::core::concat!(::core::module_path!(), "::", #path_end),
                        ::core::file!(),
                        ::core::line!(),
                    ),
                    trigger: #trigger_expression,
                    batch: #batch,
                    uses_tx: #uses_tx,
                    options: #options,
                    requires: #requires,
                    call: #call,
                };

            #[::nexus::__private::linkme::distributed_slice(::nexus::__private::HANDLERS)]
            #[linkme(crate = ::nexus::__private::linkme)]
            static REGISTRATION: &'static ::nexus::__private::HandlerDescriptor = &DESCRIPTOR;

            &DESCRIPTOR
        };
    }
}

/// A span that points at the user's code but counts as generated, so that no lint looks there.
fn at(tokens: &impl Spanned) -> Span {
    tokens.span().resolved_at(Span::mixed_site())
}

fn respanned(tokens: TokenStream) -> TokenStream {
    tokens
        .into_iter()
        .map(|mut token| {
            token.set_span(token.span().resolved_at(Span::call_site()));
            token
        })
        .collect()
}

/// What the function is expected to do wrong, its descriptor may do, but does not have to.
fn allow_instead_of_expect(attribute: &Attribute) -> TokenStream {
    match attribute.meta.require_list() {
        Ok(list) if list.path.is_ident("expect") => {
            let lints = &list.tokens;
            quote!(#[allow(#lints)])
        }
        _ => attribute.to_token_stream(),
    }
}

fn event_type(arguments: &[Argument]) -> Option<&Type> {
    arguments.iter().find_map(|argument| match argument {
        Argument::Event(ty) => Some(ty),
        _ => None,
    })
}

fn trigger_expression(trigger: &Trigger, arguments: &[Argument]) -> TokenStream {
    match trigger {
        Trigger::Event => {
            let ty = event_type(arguments);
            let at = ty.map_or_else(Span::mixed_site, at);
            quote_spanned! {at=>
                ::nexus::__private::Trigger::Event(<#ty as ::nexus::__private::Input>::EVENT)
            }
        }
        Trigger::Cron(schedule) => {
            let expression = &schedule.expression;
            let time_zone = option(schedule.time_zone.as_ref());
            quote! {
                ::nexus::__private::Trigger::Cron(::nexus::__private::CronDescriptor {
                    expression: #expression,
                    time_zone: #time_zone,
                    misfire: ::core::option::Option::None,
                    grace: ::core::option::Option::None,
                })
            }
        }
    }
}

fn options(handler: &Handler) -> TokenStream {
    let max_attempts = option(handler.max_attempts);
    let backoff = option(handler.backoff.map(|Backoff { first, max }| {
        let (first, max) = (duration(first), duration(max));
        quote!(::nexus::__private::Backoff { first: #first, max: #max })
    }));
    let timeout = option(handler.timeout.map(duration));
    let concurrency = option(handler.concurrency);
    quote! {
        ::nexus::__private::HandlerOptions {
            max_attempts: #max_attempts,
            backoff: #backoff,
            timeout: #timeout,
            concurrency: #concurrency,
        }
    }
}

fn option(value: Option<impl ToTokens>) -> TokenStream {
    if let Some(value) = value {
        quote!(::core::option::Option::Some(#value))
    } else {
        quote!(::core::option::Option::None)
    }
}

fn duration(duration: Duration) -> TokenStream {
    let (seconds, nanos) = (duration.as_secs(), duration.subsec_nanos());
    quote!(::core::time::Duration::new(#seconds, #nanos))
}

fn requires(arguments: &[Argument]) -> TokenStream {
    let requirements = Ident::new("requirements", Span::mixed_site());
    let each: Vec<_> = arguments
        .iter()
        .filter_map(|argument| match argument {
            Argument::Context(ty) => {
                let at = at(ty);
                Some(quote_spanned! {at=>
                    <#ty as ::nexus::__private::FromContext>::require(#requirements);
                })
            }
            Argument::Event(_) | Argument::Tx(_) => None,
        })
        .collect();
    if each.is_empty() {
        quote!(|_| {})
    } else {
        quote!(|#requirements| { #(#each)* })
    }
}

fn call(handler: &Handler) -> TokenStream {
    let Handler {
        ident,
        arguments,
        output,
        ..
    } = handler;
    let invocation = Ident::new("invocation", Span::mixed_site());
    let result = Ident::new("result", Span::mixed_site());
    let mut takes = Vec::new();
    let mut passed = Vec::new();
    for (index, argument) in arguments.iter().enumerate() {
        let local = format_ident!("argument_{index}", span = Span::mixed_site());
        match argument {
            Argument::Event(ty) => {
                let at = at(ty);
                takes.push(quote_spanned! {at=>
                    let #local = <#ty as ::nexus::__private::Input>::take(#invocation)?;
                });
                passed.push(quote!(#local));
            }
            Argument::Context(ty) => {
                let at = at(ty);
                takes.push(quote_spanned! {at=>
                    let #local = <#ty as ::nexus::__private::FromContext>::from_context(
                        #invocation.context(),
                    )?;
                });
                passed.push(quote!(#local));
            }
            // Borrowed in the call itself, after everything that needs the invocation.
            Argument::Tx(ty) => {
                let mut invocation = invocation.clone();
                invocation.set_span(at(ty));
                let at = at(ty);
                passed.push(quote_spanned!(at=> #invocation.tx()));
            }
        }
    }
    let outcome = match output {
        ReturnType::Default => quote! {
            <() as ::nexus::__private::IntoOutcome>::into_outcome(#result)
        },
        ReturnType::Type(_, ty) => {
            let at = at(ty);
            quote_spanned! {at=>
                <#ty as ::nexus::__private::IntoOutcome>::into_outcome(#result)
            }
        }
    };
    let at = at(ident);
    let future = quote_spanned! {at=>
        ::nexus::__private::handler_future_must_be_send(#ident(#(#passed),*)).await
    };
    quote! {
        |#invocation| ::std::boxed::Box::pin(async move {
            #(#takes)*
            let #result = #future;
            #outcome
        })
    }
}
