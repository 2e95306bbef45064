//! `#[cron]`: a function that runs by the clock. The function itself is the business of
//! [`crate::handler`].

mod expression;
mod parse;
mod zone;

use proc_macro2::TokenStream;

use crate::{
    attr::Arguments,
    diagnostics::{Diagnostics, error_beside},
    handler::{self, Function, HandlerArguments, Trigger},
};

pub(crate) fn cron(arguments: TokenStream, item: &TokenStream) -> TokenStream {
    let mut diagnostics = Diagnostics::default();
    let mut arguments = Arguments::parse(arguments, &parse::ACCEPTED, &mut diagnostics);
    let schedule = parse::schedule(&mut arguments, &mut diagnostics);
    let options = HandlerArguments::take(&mut arguments, &mut diagnostics);
    let trigger = schedule.map(Trigger::Cron);
    let model = diagnostics
        .check(Function::parse(item.clone(), parse::ACCEPTED.attribute))
        .and_then(|function| handler::check(&function, options, trigger, &mut diagnostics));
    match diagnostics.finish(model) {
        Ok(model) => model
            .map(|model| handler::expand(item, &model))
            .unwrap_or_default(),
        Err(error) => error_beside(item, &error),
    }
}
