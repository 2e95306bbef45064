//! Schema `core`: its version, its objects, the months of its log.

use nexus_migrations::MigrateError;
use sqlx::PgConnection;

use super::{Finding, not_checked};
use crate::store::{self, diagnosis};

/// What a schema is that this build does not work with. An error if the connection was lost.
pub(super) fn of_version(error: MigrateError, namespace: &str) -> sqlx::Result<Finding> {
    let what = error.to_string();
    let migrate = "nexus migrate up, as the role that owns schema `core`";
    Ok(match error {
        MigrateError::ServerTooOld { .. } => Finding::error(
            "server-too-old",
            what,
            "upgrade the server, or use another one",
        ),
        MigrateError::SchemaTooOld { found: 0, .. } => {
            Finding::error("schema-missing", what, "nexus migrate up")
        }
        MigrateError::SchemaTooOld { .. } => Finding::error("schema-older", what, migrate),
        MigrateError::SchemaTooNew { .. } => Finding::error(
            "schema-newer",
            what,
            "run nexus and apps of the newer release",
        ),
        MigrateError::Edited { name, .. } => Finding::error(
            "schema-edited",
            what,
            "use the release that has migrated it, or a new database",
        )
        .about(name),
        MigrateError::ForeignSchema => Finding::error(
            "schema-foreign",
            what,
            "use another database, or rename that schema",
        ),
        MigrateError::NotAllowed { grant, .. } => Finding::error(
            "schema-denied",
            what,
            format!(
                "as the owner of schema `core`: {}",
                grant.replace("<namespace>", namespace)
            ),
        ),
        MigrateError::Database { source, .. } if store::is_unanswered(&source) => {
            return Err(source);
        }
        // Behind a pooler in transaction mode, where it is not asked what to grant.
        MigrateError::Database { source, .. } if store::is_denied(&source) => Finding::error(
            "schema-denied",
            source.to_string(),
            format!(
                "as the owner of schema `core`: select core.grant_namespace('{namespace}', '<role>')"
            ),
        ),
        MigrateError::Database { source, .. } => not_checked("the version of the schema", &source),
        _ => Finding::error("schema-unusable", what, "nexus migrate status"),
    })
}

pub(super) async fn objects(connection: &mut PgConnection) -> sqlx::Result<Vec<Finding>> {
    let drift = nexus_migrations::drift(connection).await?;
    Ok(drift
        .into_iter()
        .map(|drift| {
            let object = &drift.object;
            let made = match drift.file {
                Some(file) => format!("make it as migrations/sql/{file}.up.sql does"),
                None => "make it as a new database has it (pg_dump --schema-only --schema core)"
                    .to_owned(),
            };
            let finding = match &drift.found {
                None => Finding::error("object-missing", format!("{object} is missing"), made),
                Some(found) if found.ends_with("invalid") => Finding::error(
                    "object-changed",
                    format!("{object} is not valid, and not used"),
                    format!(
                        "reindex index core.{}",
                        drift.object.rsplit('.').next().unwrap_or_default()
                    ),
                ),
                Some(_) if object.starts_with("function ") => Finding::warning(
                    "object-changed",
                    format!("{object} is another one than this build makes"),
                    made,
                ),
                Some(found) => Finding::warning(
                    "object-changed",
                    format!(
                        "{object} is `{found}`, this build makes it `{}`",
                        drift.expected
                    ),
                    made,
                ),
            };
            finding.about(drift.object)
        })
        .collect())
}

pub(super) async fn partitions(connection: &mut PgConnection) -> sqlx::Result<Vec<Finding>> {
    let months = diagnosis::months(connection).await?;
    let help = "select core.ensure_partitions(); nodes do it every minute, twelve months ahead";
    let mut missing = months
        .iter()
        .filter(|(_, is_there)| !is_there)
        .map(|(month, _)| month.as_str())
        .peekable();
    let Some(first) = missing.peek() else {
        return Ok(Vec::new());
    };
    let now = months.first().map(|(month, _)| month.as_str());
    let finding = if Some(*first) == now {
        Finding::error(
            "partition-missing",
            "the log has no partition for this month: emits by SQL fail, apps make it when they meet this",
            help,
        )
    } else {
        Finding::warning(
            "partitions-few",
            "the log soon has no partition for new events, as no node has looked after it for months",
            help,
        )
    };
    let months: Vec<&str> = missing.collect();
    Ok(vec![finding.about(months.join(", "))])
}
