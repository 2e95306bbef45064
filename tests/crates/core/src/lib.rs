//! A library with a handler. Its unit tests use `nexus_test_fixtures`, which depends on it: so they link it
//! twice, once as the crate under test and once as a dependency.

use nexus::prelude::*;

/// Something has started.
#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "core.started")]
pub struct Started {
    /// When, on a clock of its own.
    pub at: u64,
}

#[handler]
async fn on_start(_started: Started) {}

#[cfg(test)]
mod tests {
    use nexus::__private::{EVENTS, HANDLERS};

    use super::*;

    #[test]
    fn what_is_linked_twice_belongs_to_the_app_once() {
        assert_eq!(nexus_test_fixtures::started().at, 7);
        assert_eq!((HANDLERS.len(), EVENTS.len()), (2, 2), "linked once only");
        let app = App::discover();
        app.validate().unwrap();
        let description = app.describe();
        assert_eq!(description.handlers.len(), 1, "{description}");
        assert_eq!(description.events.len(), 1, "{description}");
    }
}
