//! Who may do what in which namespace. The functions of the schema hold the rules.

use sqlx::PgConnection;

/// Makes the three roles of the whole database; see `core.create_roles`. By each its name, what it may do,
/// and what is left to do.
pub(crate) async fn create(
    connection: &mut PgConnection,
    prefix: &str,
) -> sqlx::Result<Vec<(String, String, Option<String>)>> {
    sqlx::query_as("select role_name, may, note from core.create_roles($1)")
        .bind(prefix)
        .fetch_all(connection)
        .await
}

/// The owner of the schema, unless the role has its rights.
pub(crate) async fn other_owner(connection: &mut PgConnection) -> sqlx::Result<Option<String>> {
    sqlx::query_scalar(
        "select case when not pg_has_role(core.owner(), 'usage') then pg_get_userbyid(core.owner())::text end",
    )
    .fetch_one(connection)
    .await
}

/// Binds a role to a namespace; see `core.grant_namespace`.
pub(crate) async fn grant(
    connection: &mut PgConnection,
    namespace: &str,
    role: &str,
    access: &str,
) -> sqlx::Result<()> {
    sqlx::query("select core.grant_namespace($1, $2, $3)")
        .bind(namespace)
        .bind(role)
        .bind(access)
        .execute(connection)
        .await
        .map(drop)
}

/// Takes that back; false if the role was not bound to the namespace.
pub(crate) async fn revoke(
    connection: &mut PgConnection,
    namespace: &str,
    role: &str,
) -> sqlx::Result<bool> {
    sqlx::query_scalar("select core.revoke_namespace($1, $2)")
        .bind(namespace)
        .bind(role)
        .fetch_one(connection)
        .await
}
