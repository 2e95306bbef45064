//! Handlers and events wherever a function can stand.

use nexus::{__private::HANDLERS, prelude::*};

mod nested {
    pub(crate) mod deeper {
        use nexus::prelude::*;

        #[derive(Serialize, Deserialize, JsonSchema, Event)]
        pub(crate) struct Placed;

        #[handler]
        pub(crate) async fn in_a_nested_module(_: Placed) {}

        #[handler]
        pub(in crate::places) async fn visible_to_a_module(_: super::deeper::Placed) {}
    }
}

use nested::deeper::Placed;

/// Both macros get their names, types and options from the outer one.
macro_rules! handlers {
    ($($name:ident($event:ident as $event_type:literal, $other:ty) in $group:expr;)*) => {$(
        #[derive(Serialize, Deserialize, JsonSchema, Event)]
        #[event(type = $event_type)]
        struct $event;

        #[handler(group = $group, max_attempts = 3)]
        async fn $name(_: $event, other: $other, tx: &mut Tx) -> nexus::Result {
            drop(other);
            tx.emit(&$event)?;
            Ok(())
        }
    )*};
}

handlers! {
    made_by_a_macro(Made as "places.made", State<u8>) in "one";
    made_by_the_same_macro(MadeToo as "places.made_too", Ctx) in "two";
}

#[handler]
async fn r#match(_: Placed) {}

/// A module, its function and the re-export of it share a name.
mod send_receipt {
    use nexus::prelude::*;

    use super::Placed;

    #[handler]
    pub(super) async fn send_receipt(_: Placed) {}

    #[cron("@daily")]
    pub(super) async fn sweep_places() {}
}

use send_receipt::{send_receipt, sweep_places};

/// A field of the user's type is not hidden by one of `State`.
#[derive(Clone, Copy)]
struct Limit(u8);

#[handler]
async fn reads_a_field_of_a_state(_: Placed, limit: State<Limit>) -> nexus::Result {
    if limit.0 == 0 {
        return Err(Error::permanent("nothing is allowed"));
    }
    Ok(())
}

const _: () = {
    #[derive(Serialize, Deserialize, JsonSchema, Event, Default)]
    #[event(type = "places.in_a_constant")]
    #[cron("@daily")]
    struct InAConstant;

    #[handler]
    async fn in_a_constant(_: InAConstant) {
        #[handler]
        async fn in_a_handler(_: InAConstant) {}
    }
};

#[cfg(any())]
mod absent {}

/// Left out, whichever attribute comes first.
#[handler]
#[cfg(any())]
async fn left_out(_: absent::Nothing) {}

#[cfg(any())]
#[handler]
async fn left_out_too(_: absent::Nothing) {}

/// Names of the prelude that mean something else here do not confuse the generated code.
mod shadowed {
    #![allow(dead_code, non_camel_case_types)]

    use nexus::{Ctx, Event, handler};
    use schemars::JsonSchema;
    use serde::{Deserialize, Serialize};

    struct Option;
    struct Some;
    struct None;
    struct Result;
    struct Ok;
    struct Box;
    struct String;
    struct Duration;
    mod core {}
    mod std {}
    mod nexus_macros {}

    #[derive(Serialize, Deserialize, JsonSchema, Event)]
    #[event(type = "places.shadowed", key = key)]
    struct Shadowed {
        key: u8,
    }

    #[handler(group = "g", timeout = "1s", backoff = "fixed(1s)")]
    async fn between_other_names(_: Shadowed, invocation: Ctx, result: Ctx) {
        drop((invocation, result));
    }
}

fn is_registered(name: &str) -> bool {
    HANDLERS.iter().any(|handler| handler.name == name)
}

#[test]
fn handlers_are_registered_from_every_place() {
    #[derive(Serialize, Deserialize, JsonSchema, Event)]
    #[event(type = "places.local")]
    struct Local;

    #[handler]
    async fn local_to_a_function(_: Local) {}

    for name in [
        "in_a_nested_module",
        "visible_to_a_module",
        "made_by_a_macro",
        "made_by_the_same_macro",
        "match",
        "between_other_names",
        "local_to_a_function",
        "send_receipt",
        "sweep_places",
        "reads_a_field_of_a_state",
        "in_a_constant",
        "in_a_handler",
    ] {
        assert!(is_registered(name), "{name}");
    }
    assert!(!is_registered("left_out") && !is_registered("left_out_too"));
}

#[tokio::test]
async fn functions_are_called_by_their_own_name() {
    send_receipt(Placed).await;
    sweep_places().await;
}

#[test]
fn a_group_can_come_from_a_macro() {
    let two = HANDLERS
        .iter()
        .find(|handler| handler.name == "made_by_the_same_macro");
    assert_eq!(two.and_then(|handler| handler.group), Some("two"));
}
