//! `#[cron]`: a function that runs by the clock, or an event that is emitted by it.
//!
//! Functions are the business of [`crate::handler`]. What emits, a type or a constant, is a [`Task`].
//! Several attributes on one item are several tasks: the first takes the others along, so that they
//! can be told apart.

mod check;
mod expand;
mod model;
mod parse;

use proc_macro2::TokenStream;

use crate::{
    attr::Arguments,
    diagnostics::{Diagnostics, error_beside},
    handler::{self, Function, HandlerArguments, Registration, Trigger},
};
use model::Task;
use parse::{Item, Use};

pub(crate) fn cron(arguments: TokenStream, item: &TokenStream) -> TokenStream {
    let (uses, item) = parse::uses(arguments, item);
    let mut diagnostics = Diagnostics::default();
    let expanded = match Item::parse(&item) {
        Some(carrier) => tasks(&uses, &carrier, &mut diagnostics)
            .map(|tasks| expand::expand(&item, &carrier, &tasks)),
        None => diagnostics
            .check(Function::parse(item.clone(), parse::FUNCTION.attribute).map_err(parse::kinds))
            .and_then(|function| {
                let registrations = registrations(&uses, &function, &mut diagnostics);
                let callable = handler::check(&function, false, &mut diagnostics);
                registrations.map(|all| handler::expand_cron(&item, &callable, &all))
            }),
    };
    match diagnostics.finish(expanded) {
        Ok(expanded) => expanded.unwrap_or_default(),
        Err(error) => error_beside(&handler::without_registrations(&item), &error),
    }
}

/// What each attribute of a function says; `None` after a mistake, which is reported.
fn registrations(
    uses: &[Use],
    function: &Function,
    diagnostics: &mut Diagnostics,
) -> Option<Vec<Registration>> {
    let all: Vec<_> = uses
        .iter()
        .map(|attribute| {
            let mut arguments =
                Arguments::parse(attribute.arguments.clone(), &parse::FUNCTION, diagnostics);
            let schedule = parse::schedule(&mut arguments, attribute, diagnostics);
            let options = HandlerArguments::take(&mut arguments, diagnostics);
            let trigger = schedule.map(Trigger::Cron);
            handler::check_options(function, options, trigger, diagnostics)
        })
        .collect();
    check::refuse_same_names(
        uses,
        all.iter().map(|one| one.as_ref().map(Registration::name)),
        diagnostics,
    );
    all.into_iter().collect()
}

/// What each attribute of a type or a constant says; `None` after a mistake, which is reported.
fn tasks(uses: &[Use], item: &Item, diagnostics: &mut Diagnostics) -> Option<Vec<Task>> {
    check::check_item(item, diagnostics);
    let all: Vec<_> = uses
        .iter()
        .map(|attribute| {
            let mut arguments =
                Arguments::parse(attribute.arguments.clone(), &parse::EMITS, diagnostics);
            let schedule = parse::schedule(&mut arguments, attribute, diagnostics);
            check::check(item, &mut arguments, schedule, diagnostics)
        })
        .collect();
    check::refuse_same_names(
        uses,
        all.iter().map(|one| one.as_ref().map(|task| &*task.name)),
        diagnostics,
    );
    all.into_iter().collect()
}
