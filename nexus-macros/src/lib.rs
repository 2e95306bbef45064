//! The macros of nexus. Use them through the package `nexus`, which re-exports them.

mod attr;
mod cron;
mod diagnostics;
mod duration;
mod event;
mod handler;
mod name;

use proc_macro::TokenStream;

/// d
#[proc_macro_derive(Event, attributes(event))]
pub fn derive_event(input: TokenStream) -> TokenStream {
    event::derive(&syn::parse_macro_input!(input)).into()
}

/// h
#[proc_macro_attribute]
pub fn handler(arguments: TokenStream, item: TokenStream) -> TokenStream {
    handler::handler(arguments.into(), &item.into()).into()
}

/// c
#[proc_macro_attribute]
pub fn cron(arguments: TokenStream, item: TokenStream) -> TokenStream {
    cron::cron(arguments.into(), &item.into()).into()
}
