//! Settings: the builder's value, else the environment's, else the default.

use std::{fmt::Display, ops::RangeInclusive, str::FromStr, time::Duration};

use tracing_subscriber::{EnvFilter, filter::LevelFilter};

use crate::event::check_name;

/// A variable of the environment with a value that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{variable} is `{value}`, which is refused: {accepted}")]
pub struct ConfigError {
    variable: &'static str,
    value: String,
    accepted: String,
}

/// Reads the environment; tests bring their own.
pub(crate) struct Environment<'a> {
    lookup: &'a dyn Fn(&str) -> Option<String>,
}

impl<'a> Environment<'a> {
    pub(crate) fn new(lookup: &'a dyn Fn(&str) -> Option<String>) -> Self {
        Self { lookup }
    }

    /// The value of a variable that is set and not empty.
    pub(crate) fn text(&self, variable: &str) -> Option<String> {
        (self.lookup)(variable).filter(|value| !value.trim().is_empty())
    }

    /// A value that `check` accepts; its error says what is accepted.
    pub(crate) fn checked<E: Display>(
        &self,
        variable: &'static str,
        check: impl FnOnce(&str) -> Result<(), E>,
    ) -> Result<Option<String>, ConfigError> {
        let Some(value) = self.text(variable) else {
            return Ok(None);
        };
        match check(&value) {
            Ok(()) => Ok(Some(value)),
            Err(error) => Err(ConfigError {
                variable,
                value,
                accepted: error.to_string(),
            }),
        }
    }

    /// A whole number within bounds.
    pub(crate) fn number<T: FromStr + PartialOrd + Display>(
        &self,
        variable: &'static str,
        unit: &str,
        range: RangeInclusive<T>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.text(variable) else {
            return Ok(None);
        };
        match value.trim().parse::<T>() {
            Ok(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(ConfigError {
                variable,
                value,
                accepted: format!(
                    "a whole number of {unit} from {} to {}",
                    range.start(),
                    range.end()
                ),
            }),
        }
    }
}

/// What `CORE_LOG_LEVEL` asks for; `info` without it.
pub(crate) fn log_filter(environment: &Environment<'_>) -> Result<EnvFilter, ConfigError> {
    let variable = "CORE_LOG_LEVEL";
    let value = environment
        .text(variable)
        .unwrap_or_else(|| "info".to_owned());
    // A single word that is no level would be taken for the name of a module, and silence all others.
    let is_level = value.contains(['=', ',', '[']) || value.parse::<LevelFilter>().is_ok();
    match EnvFilter::try_new(&value) {
        Ok(filter) if is_level => Ok(filter),
        refused => Err(ConfigError {
            variable,
            accepted: format!(
                "{}a level (error, warn, info, debug, trace, off) or a filter such as info,nexus=debug",
                refused
                    .err()
                    .map(|error| format!("{error}; "))
                    .unwrap_or_default()
            ),
            value,
        }),
    }
}

/// What a node works with, as far as the builder said.
#[derive(Debug, Clone, Default)]
pub(crate) struct Overrides {
    pub(crate) namespace: Option<String>,
    pub(crate) node_id: Option<String>,
    pub(crate) database_url: Option<String>,
    pub(crate) idle_poll: Option<Duration>,
    pub(crate) lease: Option<Duration>,
    pub(crate) batch_size: Option<usize>,
    pub(crate) pool_size: Option<u32>,
    pub(crate) shutdown_timeout: Option<Duration>,
    pub(crate) max_payload_bytes: Option<usize>,
    pub(crate) retention: Option<Duration>,
    pub(crate) letter_retention: Option<Duration>,
    pub(crate) connect_timeout: Option<Duration>,
    pub(crate) pooler: Option<Pooler>,
}

/// What stands between the app and the server; see [`App::pooler`](crate::App::pooler).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Pooler {
    /// Nothing, or a pooler in session mode: a connection is one to the server for as long as it is
    /// open. The default.
    #[default]
    Session,
    /// A pooler such as `PgBouncer` in transaction mode: a connection is one to the server for a
    /// transaction only, and the next transaction may get another.
    Transaction,
}

impl FromStr for Pooler {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.trim() {
            "session" => Ok(Self::Session),
            "transaction" => Ok(Self::Transaction),
            _ => Err("`session` (also without a pooler) or `transaction`"),
        }
    }
}

impl Overrides {
    /// What the builder was given and cannot be used: the same bounds as for the environment.
    pub(crate) fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut refuse = |text: String| problems.push(text);
        if let Some(Err(error)) = self
            .namespace
            .as_deref()
            .map(|name| check_name("namespace", name))
        {
            refuse(error.to_string());
        }
        if self
            .node_id
            .as_deref()
            .is_some_and(|id| id.is_empty() || id.len() > MAX_NODE_ID)
        {
            refuse(format!(
                "App::node_id is a text of 1 to {MAX_NODE_ID} bytes"
            ));
        }
        let bounded = [
            (
                "App::lease",
                self.lease,
                LEASE_SECONDS,
                Duration::from_secs as fn(u64) -> Duration,
                "seconds",
            ),
            (
                "App::idle_poll",
                self.idle_poll,
                IDLE_POLL_MS,
                Duration::from_millis,
                "milliseconds",
            ),
            (
                "App::connect_timeout",
                self.connect_timeout,
                CONNECT_SECONDS,
                Duration::from_secs,
                "seconds",
            ),
        ];
        for (what, value, range, unit, name) in bounded {
            if value.is_some_and(|value| value < unit(*range.start()) || value > unit(*range.end()))
            {
                refuse(format!(
                    "{what} is from {} to {} {name}",
                    range.start(),
                    range.end()
                ));
            }
        }
        if self
            .max_payload_bytes
            .is_some_and(|bytes| bytes > MAX_PAYLOAD_BYTES)
        {
            refuse(format!(
                "App::max_payload_bytes is at most {MAX_PAYLOAD_BYTES} bytes, what Postgres can store"
            ));
        }
        problems
    }
}

/// Bounds of settings, for the environment and the builder.
const LEASE_SECONDS: RangeInclusive<u64> = 1..=43_200;
const IDLE_POLL_MS: RangeInclusive<u64> = 1..=60_000;
const LETTER_DAYS: RangeInclusive<u64> = 1..=36_500;
const CONNECT_SECONDS: RangeInclusive<u64> = 0..=86_400;
/// How long a start waits for the database, unless the app says otherwise.
pub(crate) const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
const MAX_NODE_ID: usize = 100;
/// jsonb takes up to 255 MiB; the envelope needs some.
const MAX_PAYLOAD_BYTES: usize = 200 * 1024 * 1024;
/// Most bytes of a payload, unless the app says otherwise.
pub(crate) const DEFAULT_PAYLOAD_BYTES: usize = 1024 * 1024;

/// The same with everything filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Config {
    pub(crate) namespace: String,
    pub(crate) node_id: Option<String>,
    /// The URL and where it came from.
    pub(crate) database_url: Option<(String, &'static str)>,
    pub(crate) idle_poll: Duration,
    pub(crate) lease: Duration,
    pub(crate) batch_size: usize,
    pub(crate) pool_size: u32,
    pub(crate) shutdown_timeout: Duration,
    pub(crate) max_payload_bytes: usize,
    pub(crate) retention: Duration,
    pub(crate) letter_retention: Duration,
    pub(crate) connect_timeout: Duration,
    pub(crate) pooler: Pooler,
}

const DAY: Duration = Duration::from_hours(24);

/// What a URL of a database looks like.
pub(crate) const URL_EXAMPLE: &str = "postgres://user:password@host:5432/database";

/// The scheme of a URL that is no database of Postgres'. The rest of it is nobody's business: it may hold a
/// password.
pub(crate) fn other_scheme(url: &str) -> Option<&str> {
    let (scheme, _) = url.trim_start().split_once("://")?;
    let is_ours = ["postgres", "postgresql"]
        .iter()
        .any(|ours| scheme.eq_ignore_ascii_case(ours));
    let is_scheme = |byte: u8| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte);
    (!is_ours && scheme.bytes().all(is_scheme)).then_some(scheme)
}

impl Config {
    /// Every wrong variable is reported.
    pub(crate) fn resolve(
        overrides: &Overrides,
        environment: &Environment<'_>,
    ) -> Result<Self, Vec<ConfigError>> {
        let mut errors = Vec::new();
        let mut keep = |error| errors.push(error);
        let namespace = environment
            .checked("CORE_NAMESPACE", |name| check_name("namespace", name))
            .unwrap_or_else(|error| {
                keep(error);
                None
            });
        let node_id = environment
            .checked("CORE_NODE_ID", |id| {
                if id.len() <= MAX_NODE_ID {
                    Ok(())
                } else {
                    Err("a text of at most 100 bytes")
                }
            })
            .unwrap_or_else(|error| {
                keep(error);
                None
            });
        let pooler = environment
            .checked("CORE_POOLER", |mode| mode.parse::<Pooler>().map(drop))
            .unwrap_or_else(|error| {
                keep(error);
                None
            });
        let mut number = |variable, unit, range| {
            environment
                .number::<u64>(variable, unit, range)
                .unwrap_or_else(|error| {
                    keep(error);
                    None
                })
        };
        let idle_poll = number("CORE_IDLE_POLL_INTERVAL_MS", "milliseconds", IDLE_POLL_MS);
        let lease = number("CORE_VISIBILITY_TIMEOUT_SECONDS", "seconds", LEASE_SECONDS);
        let batch_size = number("CORE_BATCH_SIZE", "messages", 1..=10_000);
        let letter_days = number("CORE_DEAD_LETTER_RETENTION_DAYS", "days", LETTER_DAYS);
        let connect_timeout = number("CORE_CONNECT_TIMEOUT_SECONDS", "seconds", CONNECT_SECONDS);
        let database_url = overrides
            .database_url
            .clone()
            .map(|url| (url, "App::database_url"))
            .or_else(|| {
                ["CORE_DATABASE_URL", "DATABASE_URL"]
                    .into_iter()
                    .find_map(|variable| environment.text(variable).map(|url| (url, variable)))
            });
        if let Some((url, variable)) = &database_url
            && let Some(scheme) = other_scheme(url)
        {
            keep(ConfigError {
                variable,
                value: format!("{scheme}://…"),
                accepted: format!("it is not a database URL such as {URL_EXAMPLE}"),
            });
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        let retention = overrides.retention.unwrap_or(183 * DAY);
        Ok(Self {
            namespace: overrides
                .namespace
                .clone()
                .or(namespace)
                .unwrap_or_else(|| "demo".to_owned()),
            node_id: overrides.node_id.clone().or(node_id),
            database_url,
            idle_poll: overrides
                .idle_poll
                .or(idle_poll.map(Duration::from_millis))
                .unwrap_or(Duration::from_millis(250)),
            lease: overrides
                .lease
                .or(lease.map(Duration::from_secs))
                .unwrap_or(Duration::from_secs(10)),
            batch_size: overrides
                .batch_size
                .or(batch_size.and_then(|size| size.try_into().ok()))
                .unwrap_or(100),
            pool_size: overrides.pool_size.unwrap_or(20),
            shutdown_timeout: overrides
                .shutdown_timeout
                .unwrap_or(Duration::from_secs(30)),
            max_payload_bytes: overrides.max_payload_bytes.unwrap_or(DEFAULT_PAYLOAD_BYTES),
            retention,
            letter_retention: overrides
                .letter_retention
                .or(letter_days.map(|days| Duration::from_hours(24 * days)))
                .unwrap_or(retention),
            connect_timeout: overrides
                .connect_timeout
                .or(connect_timeout.map(Duration::from_secs))
                .unwrap_or(DEFAULT_CONNECT_TIMEOUT),
            pooler: overrides
                .pooler
                .or(pooler.and_then(|mode| mode.parse().ok()))
                .unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(
        variables: &[(&str, &str)],
        overrides: &Overrides,
    ) -> Result<Config, Vec<ConfigError>> {
        let lookup = |name: &str| {
            variables
                .iter()
                .find(|(known, _)| *known == name)
                .map(|(_, value)| (*value).to_owned())
        };
        Config::resolve(overrides, &Environment::new(&lookup))
    }

    #[test]
    fn has_a_default_for_everything() {
        let config = resolve(&[], &Overrides::default()).unwrap();
        assert_eq!(config.namespace, "demo");
        assert_eq!(config.lease, Duration::from_secs(10));
        assert_eq!(config.idle_poll, Duration::from_millis(250));
        assert_eq!(config.batch_size, 100);
        assert_eq!(config.database_url, None);
        assert_eq!(config.connect_timeout, Duration::from_secs(30));
        assert_eq!(config.pooler, Pooler::Session);
        assert_eq!(config.letter_retention, 183 * DAY);
    }

    #[test]
    fn dead_letters_are_kept_as_long_as_the_log_unless_something_else_is_said() {
        let variables = [("CORE_DEAD_LETTER_RETENTION_DAYS", "30")];
        let mut overrides = Overrides {
            retention: Some(7 * DAY),
            ..Overrides::default()
        };
        let kept = |variables: &[_], overrides: &_| {
            resolve(variables, overrides).unwrap().letter_retention
        };
        assert_eq!(kept(&[], &overrides), 7 * DAY);
        assert_eq!(kept(&variables, &overrides), 30 * DAY);
        overrides.letter_retention = Some(DAY);
        assert_eq!(kept(&variables, &overrides), DAY);
    }

    #[test]
    fn prefers_the_builder_to_the_environment_to_the_default() {
        let variables = [
            ("CORE_NAMESPACE", "env"),
            ("CORE_BATCH_SIZE", "7"),
            ("DATABASE_URL", "b"),
            ("CORE_DATABASE_URL", "a"),
        ];
        let overrides = Overrides {
            namespace: Some("code".to_owned()),
            ..Overrides::default()
        };
        let config = resolve(&variables, &overrides).unwrap();
        assert_eq!(config.namespace, "code");
        assert_eq!(config.batch_size, 7);
        assert_eq!(
            config.database_url,
            Some(("a".to_owned(), "CORE_DATABASE_URL"))
        );
        let empty = resolve(
            &[("CORE_DATABASE_URL", " "), ("DATABASE_URL", "b")],
            &Overrides::default(),
        );
        assert_eq!(
            empty.unwrap().database_url,
            Some(("b".to_owned(), "DATABASE_URL"))
        );
    }

    #[test]
    fn knows_the_urls_of_postgres_by_their_scheme() {
        for ours in [
            "postgres://db/shop",
            "postgresql://db/shop",
            "Postgres://db/shop",
            // Whoever connects says what is wrong with these.
            "host=db dbname=shop",
            "se:cret@db://shop",
            "",
        ] {
            assert_eq!(other_scheme(ours), None, "{ours}");
        }
        assert_eq!(other_scheme("mysql://db/shop"), Some("mysql"));
        assert_eq!(
            other_scheme(" jdbc+postgresql://db"),
            Some("jdbc+postgresql")
        );
    }

    #[test]
    fn takes_levels_and_filters_but_no_single_word_that_is_neither() {
        let filter = |value: &str| {
            let lookup = |name: &str| (name == "CORE_LOG_LEVEL").then(|| value.to_owned());
            log_filter(&Environment::new(&lookup)).map(drop)
        };
        for accepted in ["", "info", "DEBUG", "info,nexus=debug", "nexus=trace"] {
            filter(accepted).unwrap();
        }
        for refused in ["loud", "warning", "nexus=loud"] {
            let error = filter(refused).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!(
                    "CORE_LOG_LEVEL is `{refused}`, which is refused: "
                )),
                "{error}"
            );
        }
    }

    #[test]
    fn reports_every_bad_value_with_what_is_accepted() {
        let variables = [
            ("CORE_NAMESPACE", "a b"),
            ("CORE_IDLE_POLL_INTERVAL_MS", "soon"),
            ("CORE_VISIBILITY_TIMEOUT_SECONDS", "0"),
            ("CORE_BATCH_SIZE", "-1"),
            ("DATABASE_URL", "mysql://root:secret@db/shop"),
            ("CORE_DEAD_LETTER_RETENTION_DAYS", "0"),
            ("CORE_CONNECT_TIMEOUT_SECONDS", "a while"),
            ("CORE_POOLER", "statement"),
        ];
        let errors = resolve(&variables, &Overrides::default()).unwrap_err();
        assert_eq!(errors.len(), 8);
        let said: Vec<String> = errors.iter().map(ToString::to_string).collect();
        assert!(said.contains(&"CORE_DEAD_LETTER_RETENTION_DAYS is `0`, which is refused: a whole number of days from 1 to 36500".to_owned()), "{said:?}");
        assert_eq!(
            errors[7].to_string(),
            "DATABASE_URL is `mysql://…`, which is refused: it is not a database URL such as postgres://user:password@host:5432/database"
        );
        assert_eq!(
            errors[1].to_string(),
            "CORE_POOLER is `statement`, which is refused: `session` (also without a pooler) or `transaction`"
        );
        assert_eq!(
            errors[3].to_string(),
            "CORE_VISIBILITY_TIMEOUT_SECONDS is `0`, which is refused: a whole number of seconds from 1 to 43200"
        );
    }
}
