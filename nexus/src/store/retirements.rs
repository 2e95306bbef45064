//! Subscriptions that are retired, and the messages they leave behind.

use sqlx::{AssertSqlSafe, PgConnection, Row, SqlSafeStr};

use super::table;

/// Retires a subscription and returns its id; see `core.retire`.
pub(crate) async fn retire(
    connection: &mut PgConnection,
    namespace: &str,
    group: &str,
    handler: &str,
    fate: &str,
) -> sqlx::Result<i64> {
    sqlx::query_scalar("select core.retire($1, $2, $3, $4)")
        .bind(namespace)
        .bind(group)
        .bind(handler)
        .bind(fate)
        .fetch_one(connection)
        .await
}

/// Gives some of the messages of a retired subscription their fate; `None` if somebody else is at it, or it
/// is over. See `core.move_retired`.
pub(crate) async fn move_messages(
    connection: &mut PgConnection,
    subscription_id: i64,
    limit: i32,
) -> sqlx::Result<Option<i32>> {
    sqlx::query_scalar("select core.move_retired($1, $2)")
        .bind(subscription_id)
        .bind(limit)
        .fetch_one(connection)
        .await
}

/// The retired subscriptions of the namespace that may still be sent messages.
pub(crate) async fn open(connection: &mut PgConnection, namespace: &str) -> sqlx::Result<Vec<i64>> {
    sqlx::query_scalar(
        "select subscription_id from core.retirements
         where namespace = $1 and settled_at is null order by 1",
    )
    .bind(namespace)
    .fetch_all(connection)
    .await
}

/// What became of the messages of a retired subscription.
#[derive(Debug)]
pub(crate) struct Moved {
    pub(crate) messages: i64,
    /// Those that are still there.
    pub(crate) left: i64,
}

/// How many messages of a retired subscription have been given their fate, and how many wait for it.
pub(crate) async fn progress(
    connection: &mut PgConnection,
    subscription_id: i64,
) -> sqlx::Result<Moved> {
    let row = sqlx::query(
        "select messages, queue_name, names from core.retirements where subscription_id = $1",
    )
    .bind(subscription_id)
    .fetch_one(&mut *connection)
    .await?;
    let text = format!(
        "select count(*) from {}
         where headers ->> 'handler' = any ($1) and headers ->> 'attempts' is distinct from '0'",
        table(row.get(1))
    );
    let left = sqlx::query_scalar(AssertSqlSafe(text).into_sql_str())
        .bind(row.get::<Vec<String>, _>(2))
        .fetch_one(connection)
        .await?;
    Ok(Moved {
        messages: row.get(0),
        left,
    })
}

/// Gives up to `limit` messages of a version their fate and returns how many; see `core.retire_version`.
pub(crate) async fn retire_version(
    connection: &mut PgConnection,
    namespace: &str,
    group: &str,
    handler: &str,
    version: u32,
    fate: &str,
    limit: i32,
) -> sqlx::Result<i32> {
    sqlx::query_scalar("select core.retire_version($1, $2, $3, $4, $5, $6)")
        .bind(namespace)
        .bind(group)
        .bind(handler)
        .bind(i32::try_from(version).unwrap_or(i32::MAX))
        .bind(fate)
        .bind(limit)
        .fetch_one(connection)
        .await
}

/// Whether the statement was refused because a live node declares the handler; with the text that names it.
pub(crate) fn in_use(error: &sqlx::Error) -> Option<String> {
    let error = error.as_database_error()?;
    (error.code().as_deref() == Some("55006")).then(|| error.message().to_owned())
}
