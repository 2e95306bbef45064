//! Roles that may less than the owner of the schema, and namespaces that are kept apart by them.
//!
//! - [`catalog`]: every table, view and function of the schema says who may do what with it,
//! - [`hostile`]: what a role that is bound to one namespace tries against another one,
//! - [`locks`]: what it can hold up, and who is named then,
//! - [`apps`]: an app that runs as such a role has all that an app has,
//! - [`administration`]: roles are made, bound and unbound, and migrate or verify,
//! - [`secrets`]: passwords are shown nowhere.

mod administration;
mod apps;
mod catalog;
mod hostile;
mod locks;
mod secrets;

use std::sync::Mutex;

use nexus::testing::TestDatabase;
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool, SqlSafeStr};

/// The password of every role that a test makes: with what a URL must encode, and found by its middle
/// in whatever form.
const PASSWORD: &str = "p/w-secret:7@#";
const ENCODED: &str = "p%2Fw-secret%3A7%40%23";
const MIDDLE: &str = "w-secret";

/// A database with roles of its own. Roles belong to the whole server, so their names hold the database's.
struct Test {
    database: TestDatabase,
    pool: PgPool,
    name: String,
    roles: Mutex<Vec<String>>,
}

impl Test {
    async fn new() -> Self {
        Self::on(TestDatabase::new().await).await
    }

    async fn on(database: TestDatabase) -> Self {
        let pool = database.pool().await;
        let name: String = scalar(&pool, "select current_database()::text").await;
        let test = Self {
            database,
            pool,
            name,
            roles: Mutex::default(),
        };
        test.sweep().await;
        test
    }

    /// Drops the roles of tests that failed, whose databases are gone.
    async fn sweep(&self) {
        let left: Vec<String> = sqlx::query_scalar(
            "select rolname::text from pg_roles
             where rolname ~ '^nexus_t_[0-9a-f]+_[0-9]+_[0-9]+_'
               and not exists (select from pg_database where datname = substring(rolname from '^nexus_t_[0-9a-f]+_[0-9]+_[0-9]+'))",
        )
        .fetch_all(&self.pool)
        .await
        .unwrap();
        for role in left {
            // Another test may be doing the same.
            let drop = AssertSqlSafe(format!("drop role if exists {role}")).into_sql_str();
            let _ = sqlx::raw_sql(drop).execute(&self.pool).await;
        }
    }

    /// The name of a role that is dropped when the test ends.
    fn name_role(&self, suffix: &str) -> String {
        let role = format!("{}_{suffix}", self.name);
        self.roles.lock().unwrap().push(role.clone());
        role
    }

    /// A role that can log in and may do nothing.
    async fn role(&self, suffix: &str) -> String {
        let role = self.name_role(suffix);
        execute(
            &self.pool,
            &format!("create role {role} login password '{PASSWORD}'"),
        )
        .await;
        role
    }

    /// A role that is bound to a namespace.
    async fn tenant(&self, namespace: &str, access: &str) -> String {
        let role = self.role(&format!("{namespace}_{access}")).await;
        execute(
            &self.pool,
            &format!("select core.grant_namespace('{namespace}', '{role}', '{access}')"),
        )
        .await;
        role
    }

    /// A schema for what the role makes itself, first in its search path.
    async fn own_schema(&self, role: &str) {
        execute(
            &self.pool,
            &format!("create schema {role}; grant all on schema {role} to {role}"),
        )
        .await;
    }

    /// The URL of the database with the role in place of its user.
    fn url_of(&self, role: &str) -> String {
        let (scheme, rest) = self.database.url().split_once("://").expect("it is a URL");
        let (_, host) = rest.rsplit_once('@').expect("the URL names a user");
        format!("{scheme}://{role}:{ENCODED}@{host}")
    }

    async fn connect_as(&self, role: &str) -> PgConnection {
        PgConnection::connect(&self.url_of(role)).await.unwrap()
    }

    /// Drops the roles of the test.
    async fn end(self) {
        let Self { pool, roles, .. } = &self;
        sqlx::raw_sql(
            "select core.revoke_namespace(a.namespace, r.rolname)
             from core.role_access a join pg_roles r on r.oid = a.role",
        )
        .execute(pool)
        .await
        .unwrap();
        let roles = std::mem::take(&mut *roles.lock().unwrap());
        for role in roles.into_iter().rev() {
            execute(
                pool,
                &format!("drop schema if exists {role} cascade; drop role if exists {role}"),
            )
            .await;
        }
    }
}

fn sql(text: &str) -> sqlx::SqlStr {
    AssertSqlSafe(text.to_owned()).into_sql_str()
}

#[track_caller]
fn execute<'a>(
    executor: impl sqlx::PgExecutor<'a> + 'a,
    text: &str,
) -> impl Future<Output = ()> + 'a {
    let at = std::panic::Location::caller();
    let text = text.to_owned();
    async move {
        if let Err(error) = sqlx::raw_sql(sql(&text)).execute(executor).await {
            panic!("{at}: {text}: {error}");
        }
    }
}

async fn scalar<'a, T>(executor: impl sqlx::PgExecutor<'a>, text: &str) -> T
where
    T: for<'r> sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres> + Send + Unpin,
{
    sqlx::query_scalar(sql(text))
        .fetch_one(executor)
        .await
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}

async fn texts<'a>(executor: impl sqlx::PgExecutor<'a>, text: &str) -> Vec<String> {
    sqlx::query_scalar(sql(text))
        .fetch_all(executor)
        .await
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// The message of a statement that is refused.
async fn refused(connection: &mut PgConnection, text: &str) -> String {
    match sqlx::raw_sql(sql(text)).execute(connection).await {
        Ok(_) => panic!("{text} was not refused"),
        Err(error) => error.to_string(),
    }
}
