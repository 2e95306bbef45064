//! What the macros accept, what they refuse, and what they say then.
//!
//! `ui/<macro>/fail` holds a file for each mistake, and beside it what rustc prints. Run with
//! `TRYBUILD=overwrite` to write it anew, and read it like prose. `ui/<macro>/pass` holds what has to
//! compile; these files are modules of this test, so that they are also run.

#[path = "../ui/cron/pass/emits.rs"]
mod cron_emits;
#[path = "../ui/cron/pass/functions.rs"]
mod cron_functions;
#[path = "../ui/derive_event/pass/registration.rs"]
mod event_registration;
#[path = "../ui/derive_event/pass/shapes.rs"]
mod event_shapes;
#[path = "../ui/handler/pass/arguments_and_results.rs"]
mod handler_arguments_and_results;
#[path = "../ui/handler/pass/options.rs"]
mod handler_options;
#[path = "../ui/app/pass/lists.rs"]
mod lists;
#[path = "../ui/handler/pass/places.rs"]
mod places;
#[path = "../ui/handler/pass/strict_lints.rs"]
pub mod strict_lints;

nexus::link!(serde_json, uuid);

#[test]
fn mistakes_are_explained() {
    let cases = trybuild::TestCases::new();
    for name in ["derive_event", "handler", "cron", "app"] {
        cases.compile_fail(format!("ui/{name}/fail/*.rs"));
    }
}
