//! Tokens of programs that come over HTTP.

use std::time::Duration;

use jiff::Timestamp;
use sqlx::{PgConnection, Row, postgres::PgRow};
use uuid::Uuid;

use super::{micros, timestamp};

/// A token, without its secret.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) token_id: Uuid,
    pub(crate) name: String,
    pub(crate) scopes: Vec<String>,
    pub(crate) created_at: Timestamp,
    pub(crate) expires_at: Option<Timestamp>,
    pub(crate) revoked_at: Option<Timestamp>,
    pub(crate) last_used_at: Option<Timestamp>,
}

fn stored(row: &PgRow) -> sqlx::Result<Stored> {
    let at = |column| Ok::<_, sqlx::Error>(row.try_get::<Option<i64>, _>(column)?.map(timestamp));
    Ok(Stored {
        token_id: row.try_get("token_id")?,
        name: row.try_get("name")?,
        scopes: row.try_get("scopes")?,
        created_at: timestamp(row.try_get("created_at")?),
        expires_at: at("expires_at")?,
        revoked_at: at("revoked_at")?,
        last_used_at: at("last_used_at")?,
    })
}

/// Stores a token. With a lifetime it ends that long from now.
pub(crate) async fn create(
    connection: &mut PgConnection,
    namespace: &str,
    token_id: Uuid,
    name: &str,
    scopes: &[&str],
    secret_sha256: &[u8],
    lifetime: Option<Duration>,
) -> sqlx::Result<Stored> {
    let row = sqlx::query(
        "insert into core.tokens (token_id, namespace, name, scopes, secret_sha256, expires_at)
         values ($1, $2, $3, $4, $5, core.now() + $6 * interval '1 microsecond')
         returning token_id, name, scopes,
                   (extract(epoch from created_at) * 1000000)::bigint as created_at,
                   (extract(epoch from expires_at) * 1000000)::bigint as expires_at,
                   null::bigint as revoked_at, null::bigint as last_used_at",
    )
    .bind(token_id)
    .bind(namespace)
    .bind(name)
    .bind(scopes)
    .bind(secret_sha256)
    .bind(lifetime.map(micros))
    .fetch_one(connection)
    .await?;
    stored(&row)
}

/// Every token of the namespace, the oldest first.
pub(crate) async fn list(
    connection: &mut PgConnection,
    namespace: &str,
) -> sqlx::Result<Vec<Stored>> {
    let rows = sqlx::query(
        "select token_id, name, scopes,
                (extract(epoch from created_at) * 1000000)::bigint as created_at,
                (extract(epoch from expires_at) * 1000000)::bigint as expires_at,
                (extract(epoch from revoked_at) * 1000000)::bigint as revoked_at,
                (extract(epoch from last_used_at) * 1000000)::bigint as last_used_at
         from core.tokens
         where namespace = $1
         order by core.tokens.created_at, token_id",
    )
    .bind(namespace)
    .fetch_all(connection)
    .await?;
    rows.iter().map(stored).collect()
}

/// A token in force, the hash of its secret, and whether its last use is to be noted.
pub(crate) async fn in_force(
    connection: &mut PgConnection,
    namespace: &str,
    token_id: Uuid,
) -> sqlx::Result<Option<(Stored, Vec<u8>, bool)>> {
    let row = sqlx::query(
        "select token_id, name, scopes, secret_sha256,
                (extract(epoch from created_at) * 1000000)::bigint as created_at,
                (extract(epoch from expires_at) * 1000000)::bigint as expires_at,
                null::bigint as revoked_at,
                (extract(epoch from last_used_at) * 1000000)::bigint as last_used_at,
                last_used_at is null or last_used_at < core.now() - interval '1 minute' as is_to_be_noted
         from core.tokens
         where token_id = $1 and namespace = $2 and revoked_at is null
           and (expires_at is null or expires_at > core.now())",
    )
    .bind(token_id)
    .bind(namespace)
    .fetch_optional(connection)
    .await?;
    let Some(row) = row else {
        return Ok(None);
    };
    let hash = row.try_get("secret_sha256")?;
    Ok(Some((stored(&row)?, hash, row.try_get("is_to_be_noted")?)))
}

/// Whether the namespace has a token in force.
pub(crate) async fn is_any_in_force(
    connection: &mut PgConnection,
    namespace: &str,
) -> sqlx::Result<bool> {
    sqlx::query_scalar(
        "select exists (
             select from core.tokens
             where namespace = $1 and revoked_at is null
               and (expires_at is null or expires_at > core.now()))",
    )
    .bind(namespace)
    .fetch_one(connection)
    .await
}

/// Notes that a token was used, unless somebody else has within the last minute.
pub(crate) async fn note_use(connection: &mut PgConnection, token_id: Uuid) -> sqlx::Result<()> {
    sqlx::query(
        "update core.tokens set last_used_at = core.now()
         where token_id = $1
           and (last_used_at is null or last_used_at < core.now() - interval '1 minute')",
    )
    .bind(token_id)
    .execute(connection)
    .await
    .map(drop)
}

/// Revokes a token; false if there is none that is not revoked yet.
pub(crate) async fn revoke(
    connection: &mut PgConnection,
    namespace: &str,
    token_id: Uuid,
) -> sqlx::Result<bool> {
    let done = sqlx::query(
        "update core.tokens set revoked_at = core.now()
         where token_id = $1 and namespace = $2 and revoked_at is null",
    )
    .bind(token_id)
    .bind(namespace)
    .execute(connection)
    .await?;
    Ok(done.rows_affected() > 0)
}
