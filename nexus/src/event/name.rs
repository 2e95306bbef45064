//! The grammar of names that are stored.
//!
//! `nexus-macros/src/name.rs` and `core.check_name` in the database hold the same rules: a change to
//! one is a change to all three.

/// Why a name was refused; its text says what is accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} `{name}` is refused: {reason}")]
pub struct InvalidName {
    what: &'static str,
    name: String,
    reason: String,
}

impl InvalidName {
    pub(crate) fn new(what: &'static str, name: &str, reason: impl Into<String>) -> Self {
        Self {
            what,
            name: name.to_owned(),
            reason: reason.into(),
        }
    }
}

/// Longest event type, in bytes.
const MAX_EVENT_TYPE: usize = 100;

/// Checks an event type: words of `a-z` and `0-9` joined by a single `_`, segments joined by `.`,
/// each segment starting with a letter, at most 100 bytes.
///
/// # Errors
///
/// [`InvalidName`], which says what is wrong with the name.
pub fn check_event_type(name: &str) -> Result<(), InvalidName> {
    let refuse = |reason: &str| Err(InvalidName::new("event type", name, reason));
    if name.is_empty() {
        return refuse("it is empty; write something like `user.created`");
    }
    if name.len() > MAX_EVENT_TYPE {
        return refuse("it is longer than 100 bytes");
    }
    let word = |word: &str| {
        !word.is_empty()
            && word
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
    };
    let segment = |segment: &str| {
        segment.starts_with(|c: char| c.is_ascii_lowercase()) && segment.split('_').all(word)
    };
    if !name.split('.').all(segment) {
        return refuse(
            "segments are joined by `.`, start with a letter and are made of `a-z`, `0-9` and single `_`, like `user.created`",
        );
    }
    Ok(())
}

/// Checks the name of an app, group, node, handler or namespace, without the limits that a
/// queue's name adds: letters, digits, `_` and `-`, starting with a letter, no `__`.
///
/// `what` is the word that the error uses for it. The database checks again, and also the length
/// of the queue's name that results.
///
/// # Errors
///
/// [`InvalidName`], which says what is wrong with the name.
pub fn check_name(what: &'static str, name: &str) -> Result<(), InvalidName> {
    let refuse = |reason: &str| Err(InvalidName::new(what, name, reason));
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if name.is_empty() {
        return refuse("it is empty");
    }
    if !name.starts_with(|c: char| c.is_ascii_alphabetic()) {
        return refuse("it must start with a letter");
    }
    if let Some(other) = name.chars().find(|&c| !allowed(c)) {
        return refuse(&format!(
            "`{other}` is not allowed; use letters, digits, `_` and `-`"
        ));
    }
    if name.replace('-', "_").contains("__") {
        return refuse("`__` separates namespace and group in the names of queues");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_dotted_lower_case_event_types() {
        for name in [
            "a",
            "user.created",
            "http.server_down.v2",
            "tick.my_app.clean_up",
        ] {
            check_event_type(name).unwrap();
        }
    }

    #[test]
    fn refuses_event_types_that_are_not_well_formed() {
        for name in [
            "",
            "User.created",
            "user..created",
            "user.",
            "a__b",
            "_a",
            "a_",
            "1a",
            "a-b",
        ] {
            assert!(check_event_type(name).is_err(), "{name:?} was accepted");
        }
        assert!(check_event_type(&"a".repeat(101)).is_err());
    }

    #[test]
    fn refuses_names_that_could_not_name_a_queue() {
        for name in ["", "1a", "a b", "a__b", "a-_b", "ä"] {
            assert!(check_name("group", name).is_err(), "{name:?} was accepted");
        }
        check_name("group", "Billing-2").unwrap();
    }
}
