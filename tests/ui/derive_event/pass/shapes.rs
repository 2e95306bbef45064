//! Every shape of type that can be an event, and where its key comes from.

use nexus::{__private::EVENTS, prelude::*};
use uuid::Uuid;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct ServerStarted;

#[derive(Event, Serialize, Deserialize, JsonSchema)]
#[event(key = 1)]
struct HTTPServerDown(u16, String);

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "user.renamed")]
#[event(version = 3, key = user_id,)]
struct UserRenamed {
    user_id: Uuid,
    r#type: String,
}

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(key = r#type)]
struct RawKey {
    r#type: String,
}

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(key = id)]
enum Order {
    Placed { id: u64, total: u64 },
    Paid { total: u64, id: String },
}

#[derive(Serialize, Deserialize, JsonSchema, Event)]
enum Nothing {}

#[allow(non_camel_case_types)]
#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct r#yield;

fn user_renamed() -> UserRenamed {
    UserRenamed {
        user_id: Uuid::nil(),
        r#type: String::new(),
    }
}

#[test]
fn event_types_come_from_names_and_attributes() {
    assert_eq!(
        (ServerStarted::EVENT_TYPE, ServerStarted::VERSION),
        ("server.started", 1)
    );
    assert_eq!(HTTPServerDown::EVENT_TYPE, "http.server.down");
    assert_eq!(
        (UserRenamed::EVENT_TYPE, UserRenamed::VERSION),
        ("user.renamed", 3)
    );
    assert_eq!(r#yield::EVENT_TYPE, "yield");
}

#[test]
fn keys_come_from_fields() {
    assert_eq!(ServerStarted.event_key(), None);
    assert_eq!(
        HTTPServerDown(80, "web".to_owned()).event_key().as_deref(),
        Some("web")
    );
    assert_eq!(user_renamed().event_key(), Some(Uuid::nil().to_string()));
    assert_eq!(user_renamed().r#type, "");
    assert_eq!(
        RawKey {
            r#type: "a".to_owned()
        }
        .event_key()
        .as_deref(),
        Some("a")
    );
    let paid = Order::Paid {
        total: 1,
        id: "b".to_owned(),
    };
    assert_eq!(paid.event_key().as_deref(), Some("b"));
    assert_eq!(
        Order::Placed { id: 7, total: 1 }.event_key().as_deref(),
        Some("7")
    );
}

#[test]
fn events_are_registered_with_their_origin() {
    let meta = EVENTS
        .iter()
        .map(|event| event.meta)
        .find(|meta| meta.event_type == "user.renamed")
        .expect("the derive registers the type");
    assert_eq!(meta.version, 3);
    assert_eq!(meta.origin.crate_name, "macros");
    assert!(
        meta.origin
            .rust_path
            .ends_with("::event_shapes::UserRenamed"),
        "{}",
        meta.origin
    );
    assert!(meta.origin.file.ends_with("shapes.rs"), "{}", meta.origin);
    assert!(
        EVENTS
            .iter()
            .any(|event| event.meta.event_type == "nothing")
    );
}
