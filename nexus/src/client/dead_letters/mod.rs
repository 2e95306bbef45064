//! Looking after dead letters.
//!
//! - [`DeadLetters`] lists them, [`Client::dead_letter_summary`] counts them by cause; [`DeadLetterFilter`]
//!   says which.
//! - [`Redrive`] puts them back, [`EditedRedrive`] one of them with another payload.
//! - [`Purge`] deletes them.

mod edit;
mod filter;
mod list;
mod purge;
mod redrive;

pub use edit::{EditError, EditedRedrive, PayloadProblems};
pub use filter::DeadLetterFilter;
pub use list::{
    DeadLetter, DeadLetterCause, DeadLetterCursor, DeadLetters, InvalidCursor, PastRedrive,
};
pub use purge::{Purge, Purged};
pub use redrive::{LeftLetters, LeftWhy, Redrive, Redriven, RedrivenHandler};

use super::{ANSWER, Client, Lent, OperateError, operate::failed};
use crate::store::{
    self, Failure,
    dead_letters::{self, Horizon},
    maintenance,
};

/// Dead letters moved or deleted by one statement.
const BATCH: i32 = 500;

/// How often a statement is repeated that the server gave up for the sake of another one.
const DEADLOCKS: u32 = 5;

/// Whether a statement that failed is worth another try: after a deadlock, or when a queue was dropped by
/// hand, which is made again.
#[derive(Debug, Default)]
struct Again {
    deadlocks: u32,
    is_mended: bool,
}

impl Again {
    /// Returns if the statement is to be tried again; else with its error.
    async fn after(
        &mut self,
        error: sqlx::Error,
        client: &Client,
        connection: &mut Lent,
    ) -> sqlx::Result<()> {
        let code = error
            .as_database_error()
            .and_then(sqlx::error::DatabaseError::code);
        if matches!(code.as_deref(), Some("40P01" | "40001")) && self.deadlocks < DEADLOCKS {
            self.deadlocks += 1;
            return connection.restart().await;
        }
        if store::classify(&error) == Failure::MissingTable && !self.is_mended {
            self.is_mended = true;
            connection.restart().await?;
            maintenance::mend(connection, client.namespace(), &error).await?;
            return Ok(());
        }
        Err(error)
    }
}

/// Where a redrive or a purge that begins now ends.
async fn horizon(client: &Client, connection: &mut Lent, queue: &str) -> sqlx::Result<Horizon> {
    let mut again = Again::default();
    loop {
        match store::answered_within(ANSWER, dead_letters::horizon(connection, queue)).await {
            Ok(horizon) => return Ok(horizon),
            Err(error) => again.after(error, client, connection).await?,
        }
    }
}

/// What went wrong after `done` dead letters.
fn interrupted(doing: &'static str, done: u64) -> impl FnOnce(sqlx::Error) -> OperateError {
    move |source| {
        if done == 0 {
            failed(doing)(source)
        } else {
            OperateError::Interrupted {
                doing,
                done,
                source,
            }
        }
    }
}
