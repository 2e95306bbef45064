//! Whether `pg_cron` can fire what the app schedules; refused is everything at once.

use std::collections::BTreeMap;

use jiff::{Timestamp, tz::TimeZone};
use sqlx::PgConnection;

use crate::{
    event::Origin,
    registry::{Problem, Problems},
    runtime::DeclaredTask,
    schedule::Schedule,
    store::pg_cron::{self, Extension, Server},
};

/// Notes in each task how `pg_cron` reads its schedule.
pub(super) async fn assign(
    connection: &mut PgConnection,
    tasks: &mut [DeclaredTask],
    origins: &BTreeMap<String, Origin>,
) -> sqlx::Result<Result<(), Problems>> {
    let server = pg_cron::server(connection).await?;
    let mut problems = of_server(&server);
    // A server without pg_cron has no clock to compare with; that of most is told by the default.
    let zone_name = server.time_zone.as_deref().unwrap_or("GMT");
    match TimeZone::get(zone_name) {
        Ok(zone) => {
            for task in tasks {
                match schedule_of(task, &zone) {
                    Ok(schedule) => task.pg_cron_schedule = Some(schedule),
                    Err(reason) => problems.push(Problem::new(format!(
                        "scheduled task `{}` (`{}`) cannot be fired by pg_cron: {reason}, in {}; change it, or let nodes fire the app's tasks with `Scheduler::Nexus`",
                        task.name, task.expression, origins[&task.name]
                    ))),
                }
            }
        }
        Err(_) => problems.push(Problem::new(format!(
            "pg_cron goes by `cron.timezone`, which is `{zone_name}`, and that is no known time zone: set it to an IANA name such as `GMT`"
        ))),
    }
    Ok(Problems::check(problems))
}

fn schedule_of(task: &DeclaredTask, zone: &TimeZone) -> Result<String, String> {
    Schedule::parse(&task.expression, task.time_zone.as_deref())
        .map_err(|error| error.to_string())?
        .for_pg_cron(zone, Timestamp::now())
        .map_err(|error| error.to_string())
}

/// What keeps the server from firing anything: the first thing to do, and what follows from it later.
fn of_server(server: &Server) -> Vec<Problem> {
    let Server { role, database, .. } = server;
    let mut problems = Vec::new();
    let mut problem = |text: String| problems.push(Problem::new(text));
    if server.extension == Extension::Missing {
        problem(
            "the server has no pg_cron: install it (Debian: `apt-get install postgresql-15-cron`, with the server's version), or let nodes fire the app's tasks with `Scheduler::Nexus`".to_owned(),
        );
    } else if !server.is_loaded {
        problem(format!(
            "the server has not loaded pg_cron: set `shared_preload_libraries = 'pg_cron'` and `cron.database_name = '{database}'` in postgresql.conf and restart it"
        ));
    } else if let Some(other) = server
        .own_database
        .as_ref()
        .filter(|other| *other != database)
    {
        problem(format!(
            "pg_cron works in database `{other}` only, and the app uses `{database}`: set `cron.database_name = '{database}'` in postgresql.conf and restart the server, or use that database"
        ));
    } else if server.extension == Extension::Available {
        problem(format!(
            "pg_cron is not set up in database `{database}`: as a superuser, run `create extension pg_cron` and `grant usage on schema cron to \"{role}\"` there, where `cron.database_name` must be `{database}`"
        ));
    } else if !server.may_schedule {
        problem(format!(
            "role `{role}` may not make jobs of pg_cron: as a superuser, run `grant usage on schema cron to \"{role}\"`"
        ));
    }
    if server.time_zone.is_none() {
        problem(format!(
            "role `{role}` may not see which time zone pg_cron goes by: as a superuser, run `grant pg_read_all_settings to \"{role}\"`"
        ));
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server() -> Server {
        Server {
            role: "app".to_owned(),
            database: "shop".to_owned(),
            is_loaded: true,
            own_database: Some("shop".to_owned()),
            extension: Extension::Created,
            may_schedule: true,
            time_zone: Some("GMT".to_owned()),
        }
    }

    #[test]
    fn says_what_to_do_with_the_server() {
        let told = |server: Server| -> Vec<String> {
            of_server(&server).iter().map(ToString::to_string).collect()
        };
        assert_eq!(told(server()), [""; 0]);
        for (server, expected) in [
            (
                Server {
                    extension: Extension::Missing,
                    ..server()
                },
                "install it",
            ),
            (
                Server {
                    is_loaded: false,
                    own_database: None,
                    ..server()
                },
                "set `shared_preload_libraries = 'pg_cron'` and `cron.database_name = 'shop'`",
            ),
            (
                Server {
                    own_database: Some("postgres".to_owned()),
                    extension: Extension::Available,
                    ..server()
                },
                "pg_cron works in database `postgres` only, and the app uses `shop`",
            ),
            (
                Server {
                    extension: Extension::Available,
                    ..server()
                },
                "run `create extension pg_cron`",
            ),
            (
                Server {
                    may_schedule: false,
                    ..server()
                },
                "run `grant usage on schema cron to \"app\"`",
            ),
            (
                Server {
                    time_zone: None,
                    ..server()
                },
                "run `grant pg_read_all_settings to \"app\"`",
            ),
        ] {
            let told = told(server);
            assert!(told.len() == 1 && told[0].contains(expected), "{told:?}");
        }
    }
}
