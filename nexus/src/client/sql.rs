//! SQL of whoever looks into the database.

use serde_json::Value;

use super::{Client, OperateError, operate::failed};
use crate::store::{self, free_sql};

/// Whether SQL that somebody wrote may change anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SqlAccess {
    /// The server refuses what writes.
    ReadOnly,
    /// Statements that are given together are one transaction, unless they say otherwise.
    Write,
}

/// Why SQL could not be run. What was not committed is rolled back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SqlError {
    /// The server refuses a statement; the text is its own.
    #[error("the server refuses it: {reason}")]
    Refused {
        /// What the server says.
        reason: String,
    },
    /// The database could not be asked.
    #[error(transparent)]
    Operate(#[from] OperateError),
}

const DOING: &str = "run the SQL";

fn refused(error: sqlx::Error) -> SqlError {
    match error.as_database_error() {
        Some(refused) if !store::is_away(&error) || store::is_read_only(&error) => {
            SqlError::Refused {
                reason: refused.message().to_owned(),
            }
        }
        _ => failed(DOING)(error).into(),
    }
}

/// What came of one statement.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct SqlOutcome {
    /// The names of the columns; none if there is no row.
    pub columns: Vec<String>,
    /// The rows: numbers, truth values and JSON as such, everything else in the text of the server.
    pub rows: Vec<Vec<Value>>,
    /// There are more rows than were asked for.
    pub is_cut: bool,
    /// How many rows the statement returned or changed; 0 if it is cut.
    pub affected: u64,
}

/// A query that has a name.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct CannedQuery {
    /// Its name.
    pub name: &'static str,
    /// What it shows.
    pub about: &'static str,
    /// Its text, for [`Client::sql`].
    pub sql: &'static str,
}

/// The queries that the original system's documentation prints, for the namespace of the client that runs them.
#[must_use]
pub fn canned_queries() -> Vec<CannedQuery> {
    free_sql::CANNED
        .iter()
        .map(|&(name, about, sql)| CannedQuery { name, about, sql })
        .collect()
}

impl Client {
    /// Runs SQL that somebody wrote, one statement or several, and returns what came of each, with up to `limit`
    /// rows. `current_setting('nexus.namespace')` is the namespace in there. Takes as long as it takes.
    ///
    /// [`SqlAccess::ReadOnly`] is a guard against mistakes: who wants to can turn it off in the session, to which
    /// nothing else belongs.
    ///
    /// # Errors
    ///
    /// The server refuses a statement ([`SqlError::Refused`]), or the database could not be asked.
    ///
    /// # Cancel safety
    ///
    /// Dropped while it is awaited, the server stops the statement within a second or so, and rolls back what is not
    /// committed.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: &nexus::Client) -> nexus::Result {
    /// use nexus::client::SqlAccess;
    ///
    /// let outcomes = client.sql("select now()", SqlAccess::ReadOnly, 100).await?;
    /// println!("{}", outcomes[0].rows[0][0]);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn sql(
        &self,
        text: &str,
        access: SqlAccess,
        limit: usize,
    ) -> Result<Vec<SqlOutcome>, SqlError> {
        let may_write = access == SqlAccess::Write;
        // It is not given back, so that no setting stays in a session of the pool.
        let prepared = async {
            let mut connection = self.lend().await?;
            let namespace = self.namespace();
            free_sql::prepare(&mut connection, self.pooler(), namespace, may_write).await?;
            Ok(connection)
        };
        let mut connection = self.asked(DOING, prepared).await?;
        let outcomes = free_sql::run(&mut connection, text.to_owned(), limit, may_write)
            .await
            .map_err(refused)?;
        if may_write {
            connection.commit().await.map_err(refused)?;
        }
        Ok(outcomes
            .into_iter()
            .map(|outcome| SqlOutcome {
                columns: outcome.columns,
                rows: outcome.rows,
                is_cut: outcome.is_cut,
                affected: outcome.affected,
            })
            .collect())
    }
}
