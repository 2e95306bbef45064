//! From what was meant to code; cannot fail.

use std::time::Duration;

use proc_macro2::{Ident, Span, TokenStream};
use quote::{ToTokens, format_ident, quote, quote_spanned};
use syn::{Attribute, ReturnType, Type, Visibility, ext::IdentExt, spanned::Spanned};

use super::model::{Argument, Callable, Registration, Schedule, Trigger};
use crate::{duration::Backoff, guard, history::History, misfire::Misfire};

/// The function as it was written, and beside it what `app!` finds under its name.
pub(crate) fn expand(
    function: &TokenStream,
    callable: &Callable,
    registration: &Registration,
) -> TokenStream {
    let function = emitted(function);
    let hidden = hidden_const(
        &guard::handler_item(&callable.ident.unraw().to_string()),
        &callable.ident,
        &callable.visibility,
        &callable.attributes,
        &quote!(&'static ::nexus::__private::HandlerDescriptor),
        &descriptor(callable, registration),
    );
    quote!(#function #hidden)
}

/// A function that `#[cron]` stands on, once or several times.
pub(crate) fn expand_cron(
    function: &TokenStream,
    callable: &Callable,
    registrations: &[Registration],
) -> TokenStream {
    let function = emitted(function);
    let descriptors = registrations
        .iter()
        .map(|registration| descriptor(callable, registration));
    let hidden = hidden_const(
        &guard::task_item(&callable.ident.unraw().to_string()),
        &callable.ident,
        &callable.visibility,
        &callable.attributes,
        &quote!(::nexus::__private::CronItem),
        &quote!(::nexus::__private::CronItem::Function(&[#(#descriptors),*])),
    );
    quote!(#function #hidden)
}

fn emitted(function: &TokenStream) -> TokenStream {
    quote! {
        // A handler is async even if it has nothing to wait for.
        #[allow(clippy::unused_async)]
        #function
    }
}

/// The constant beside an item in which everything generated for it sits, so that it works wherever
/// the item can stand. `app!` finds it: it has the item's visibility and a name made from its own.
pub(crate) fn hidden_const(
    name: &str,
    ident: &Ident,
    visibility: &Visibility,
    attributes: &[Attribute],
    ty: &TokenStream,
    value: &TokenStream,
) -> TokenStream {
    // At the item's name, like the guard: of a repeated name rustc tells once per place.
    let at = ident.span().resolved_at(Span::call_site());
    let name = Ident::new(name, at);
    let attributes = attributes.iter().map(allow_instead_of_expect);
    let visibility = respanned(visibility.to_token_stream());
    quote_spanned! {at=>
        #(#attributes)*
        #[doc(hidden)]
        #visibility const #name: #ty = #value;
    }
}

/// A reference to the descriptor, which is registered.
///
/// Each use of an argument's type is a qualified call at that type's span: rustc then reports what is
/// missing once, at the type, with the text of the trait.
fn descriptor(callable: &Callable, registration: &Registration) -> TokenStream {
    let Callable {
        ident, arguments, ..
    } = callable;
    let Registration {
        trigger,
        name,
        name_at,
        formerly,
        ..
    } = registration;
    let guard = match trigger {
        Trigger::Event => guard::handler(registration.group.as_deref(), name, *name_at),
        Trigger::Cron(_) => guard::task(name, *name_at),
    };
    let path_end = ident.unraw().to_string();
    let group = option(registration.group.as_ref());
    let options = options(registration);
    let trigger = trigger_expression(trigger, arguments);
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
    let call = call(callable);
    quote! {
        {
            static DESCRIPTOR: ::nexus::__private::HandlerDescriptor =
                ::nexus::__private::HandlerDescriptor {
                    name: #name,
                    group: #group,
                    formerly: &[#(#formerly),*],
                    origin: ::nexus::__private::Origin::new(
                        ::core::concat!(::core::module_path!(), "::", #path_end),
                        ::core::file!(),
                        ::core::line!(),
                    ),
                    trigger: #trigger,
                    batch: #batch,
                    uses_tx: #uses_tx,
                    options: #options,
                    requires: #requires,
                    call: ::nexus::__private::Call(&#call),
                };

            #[::nexus::__private::linkme::distributed_slice(::nexus::__private::HANDLERS)]
            #[linkme(crate = ::nexus::__private::linkme)]
            static REGISTRATION: &'static ::nexus::__private::HandlerDescriptor = &DESCRIPTOR;

            #guard

            &DESCRIPTOR
        }
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
            let schedule = schedule_expression(schedule);
            quote!(::nexus::__private::Trigger::Cron(#schedule))
        }
    }
}

/// The `CronDescriptor` of a schedule.
pub(crate) fn schedule_expression(schedule: &Schedule) -> TokenStream {
    let expression = &schedule.expression;
    let time_zone = option(schedule.time_zone.as_ref());
    let misfire = option(schedule.misfire.map(|misfire| match misfire {
        Misfire::Skip => quote!(::nexus::__private::Misfire::Skip),
        Misfire::FireOnce => quote!(::nexus::__private::Misfire::FireOnce),
        Misfire::FireAll { cap } => quote!(::nexus::__private::Misfire::FireAll { cap: #cap }),
    }));
    let grace = option(schedule.grace.map(duration));
    quote! {
        ::nexus::__private::CronDescriptor {
            expression: #expression,
            time_zone: #time_zone,
            misfire: #misfire,
            grace: #grace,
        }
    }
}

fn options(registration: &Registration) -> TokenStream {
    let max_attempts = option(registration.max_attempts);
    let backoff = option(registration.backoff.map(|Backoff { first, max }| {
        let (first, max) = (duration(first), duration(max));
        quote!(::nexus::__private::Backoff { first: #first, max: #max })
    }));
    let timeout = option(registration.timeout.map(duration));
    let concurrency = option(registration.concurrency);
    let from = option(registration.from.map(|from| match from {
        History::Beginning => quote!(::nexus::__private::History::Beginning),
        History::Since(micros) => {
            quote!(::nexus::__private::History::Since { micros: #micros })
        }
    }));
    quote! {
        ::nexus::__private::HandlerOptions {
            max_attempts: #max_attempts,
            backoff: #backoff,
            timeout: #timeout,
            concurrency: #concurrency,
            from: #from,
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

fn call(callable: &Callable) -> TokenStream {
    let Callable {
        ident,
        arguments,
        output,
        ..
    } = callable;
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
