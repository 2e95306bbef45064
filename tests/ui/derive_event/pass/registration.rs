//! Events that are not collected, so that several types can have one event type.

use nexus::{__private::EVENTS, prelude::*};

mod one {
    use nexus::prelude::*;

    #[derive(Serialize, Deserialize, JsonSchema, Event)]
    #[event(type = "registration.ping", register = false)]
    pub(super) struct Ping;
}

mod two {
    use nexus::prelude::*;

    #[derive(Serialize, Deserialize, JsonSchema, Event)]
    #[event(type = "registration.ping", register = false)]
    pub(super) struct Ping {
        pub(super) number: u8,
    }
}

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "registration.ping", register = true)]
struct Ping;

/// Names that differ only in what a Rust name cannot hold are different names.
#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "registration_ping")]
struct Underscore;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "registration.ping", version = 2)]
struct NextVersion;

#[handler(name = "registration-ping")]
async fn with_a_dash(_: one::Ping) {}

#[handler(name = "registration_ping")]
async fn with_an_underscore(ping: two::Ping) {
    assert!(ping.number > 0);
}

#[handler(name = "registration_ping", group = "another")]
async fn in_another_group(_: Ping) {}

#[test]
fn only_what_is_to_be_registered_is_collected() {
    let pings: Vec<_> = EVENTS
        .iter()
        .filter(|event| event.meta.event_type == "registration.ping")
        .map(|event| (event.meta.version, event.meta.origin.rust_path))
        .collect();
    assert_eq!(pings.len(), 2, "{pings:?}");
    assert!(pings.iter().all(|(_, path)| !path.contains("::one::")));
    assert_eq!(one::Ping::EVENT_TYPE, two::Ping::EVENT_TYPE);
    assert_eq!(two::Ping { number: 1 }.number, 1);
}
