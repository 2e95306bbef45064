//! The grammar of stored names. `nexus` checks the same rules again when an app starts, because
//! names can also come from configuration.

/// Longest event type, in bytes.
const MAX_EVENT_TYPE: usize = 100;

/// Whether `name` is words of `a-z` and `0-9` joined by a single `_`, in segments joined by `.`,
/// each segment starting with a letter, at most 100 bytes.
pub(crate) fn is_event_type(name: &str) -> bool {
    name.len() <= MAX_EVENT_TYPE && name.split('.').all(is_segment)
}

fn is_segment(segment: &str) -> bool {
    let is_word = |word: &str| {
        !word.is_empty()
            && word
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
    };
    segment.starts_with(|c: char| c.is_ascii_lowercase()) && segment.split('_').all(is_word)
}

/// Why `name` cannot be the name of a handler or group: letters, digits, `_` and `-`, starting
/// with a letter, no two `_` or `-` in a row.
pub(crate) fn check_name(name: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if name.is_empty() {
        return Err("is empty".to_owned());
    }
    if !name.starts_with(|c: char| c.is_ascii_alphabetic()) {
        return Err("does not start with a letter".to_owned());
    }
    if let Some(other) = name.chars().find(|&c| !allowed(c)) {
        return Err(format!(
            "holds {other:?}; use letters, digits, `_` and `-`, starting with a letter"
        ));
    }
    if name.replace('-', "_").contains("__") {
        return Err("holds two `_` or `-` in a row, which names of queues reserve".to_owned());
    }
    Ok(())
}

/// Why `name` cannot be the name of a `#[cron]` function: its ticks are events of the type
/// `tick.<app>.<name>`.
pub(crate) fn check_cron_name(name: &str) -> Result<(), String> {
    check_name(name)?;
    if is_segment(name) {
        return Ok(());
    }
    Err("does not fit into the event type of its ticks, `tick.<app>.<name>`; use words of `a-z` and `0-9`, joined by single `_`".to_owned())
}

/// Why `name` cannot be the name of a scheduled task that emits.
pub(crate) fn check_task_name(name: &str) -> Result<(), String> {
    check_name(name)?;
    if is_segment(name) {
        return Ok(());
    }
    Err("is not well formed; use words of `a-z` and `0-9`, joined by single `_`".to_owned())
}

/// The name of the scheduled task that a type or constant makes: `MorningTick` is `morning_tick`,
/// `HOURLY_DIGEST` is `hourly_digest`.
pub(crate) fn task_name_of(name: &str) -> String {
    words_of(name).join("_")
}

/// The event type that a type's name stands for: `UserCreated` is `user.created`, `HTTPServerDown`
/// is `http.server.down`.
pub(crate) fn event_type_of(type_name: &str) -> Option<String> {
    let name = words_of(type_name).join(".");
    is_event_type(&name).then_some(name)
}

/// A well formed event type that `given` may have meant.
pub(crate) fn meant_event_type(given: &str) -> Option<String> {
    let segments = given
        .split(['.', ':', '/', ' '])
        .filter(|segment| !segment.is_empty());
    let name = segments
        .map(|segment| {
            let joint = if segment.contains('_') { "_" } else { "." };
            words_of(segment).join(joint)
        })
        .collect::<Vec<_>>()
        .join(".");
    is_event_type(&name).then_some(name)
}

/// The words of a name in camel, snake or kebab case, in lower case.
fn words_of(name: &str) -> Vec<String> {
    let letters: Vec<char> = name.chars().collect();
    let mut words = vec![String::new()];
    for (index, &letter) in letters.iter().enumerate() {
        let before = index.checked_sub(1).map(|before| letters[before]);
        let after = letters.get(index + 1);
        let starts_word = letter.is_uppercase()
            && before.is_some_and(|before| {
                !before.is_uppercase() || after.is_some_and(|after| after.is_lowercase())
            });
        if starts_word || letter == '_' || letter == '-' {
            words.push(String::new());
        }
        if letter != '_' && letter != '-' {
            words
                .last_mut()
                .expect("there is a first word")
                .extend(letter.to_lowercase());
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_type_names_into_segments() {
        for (type_name, event_type) in [
            ("UserCreated", "user.created"),
            ("HTTPServerDown", "http.server.down"),
            ("ServerHTTP", "server.http"),
            ("Order2Paid", "order2.paid"),
            ("User_Created", "user.created"),
            ("ping", "ping"),
            ("A", "a"),
            ("OrderV2", "order.v2"),
        ] {
            assert_eq!(event_type_of(type_name).as_deref(), Some(event_type));
        }
        assert_eq!(event_type_of("Größe"), None);
        assert_eq!(event_type_of(&"A".repeat(101)), None);
    }

    #[test]
    fn names_tasks_after_types_and_constants() {
        for (name, task) in [
            ("MorningTick", "morning_tick"),
            ("HOURLY", "hourly"),
            ("HOURLY_DIGEST_2", "hourly_digest_2"),
            ("_HOURLY", "hourly"),
        ] {
            assert_eq!(task_name_of(name), task);
            assert_eq!(check_task_name(task), Ok(()));
        }
        assert!(check_task_name(&task_name_of("Größe")).is_err());
        assert!(check_task_name("clean-up").is_err());
    }

    #[test]
    fn guesses_the_event_type_that_was_meant() {
        for (given, meant) in [
            ("User-Created", "user.created"),
            ("user..created", "user.created"),
            ("UserCreated", "user.created"),
            ("user.Created", "user.created"),
            ("user__created", "user_created"),
            ("billing::invoice_sent", "billing.invoice_sent"),
            (" user.created", "user.created"),
        ] {
            assert_eq!(meant_event_type(given).as_deref(), Some(meant), "{given}");
        }
        assert_eq!(meant_event_type("1st"), None);
        assert_eq!(meant_event_type(""), None);
    }

    #[test]
    fn accepts_only_well_formed_event_types() {
        for name in ["a", "user.created", "http.server_down.v2"] {
            assert!(is_event_type(name), "{name}");
        }
        for name in [
            "",
            "User",
            "user..created",
            "user.",
            "a__b",
            "_a",
            "a_",
            "1a",
            "a-b",
        ] {
            assert!(!is_event_type(name), "{name}");
        }
    }

    #[test]
    fn says_why_a_name_is_refused() {
        for (name, part) in [
            ("", "is empty"),
            ("1a", "does not start with a letter"),
            ("a b", "holds ' '"),
            ("a__b", "in a row"),
            ("a-_b", "in a row"),
            ("ä", "does not start with a letter"),
        ] {
            assert!(check_name(name).unwrap_err().contains(part), "{name}");
        }
        assert_eq!(check_name("Billing-2"), Ok(()));
        assert!(
            check_cron_name("clean-up")
                .unwrap_err()
                .contains("does not fit")
        );
        assert_eq!(check_cron_name("clean_up"), Ok(()));
    }
}
