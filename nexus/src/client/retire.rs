//! Giving up subscriptions that no build declares any more.

use std::time::Duration;

use sqlx::Connection;

use super::{ANSWER, Client, OperateError, operate::failed};
use crate::store::{self, retirements};

/// Messages that one transaction gives their fate.
const BATCH: i32 = 1_000;

/// How long to leave the messages to a node that is at them.
const TAKEN_SLEEP: Duration = Duration::from_millis(20);

/// What becomes of the messages of a subscription that is retired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Leftovers {
    /// They become dead letters of the group, with the reason `Retired`. Redrive them once a build has a
    /// handler of that name; without one they soon are dead letters again.
    KeepAsDeadLetters,
    /// They are deleted. The events stay in the log.
    Drop,
}

impl Leftovers {
    fn stored(self) -> &'static str {
        match self {
            Self::KeepAsDeadLetters => "dead_letter",
            Self::Drop => "drop",
        }
    }
}

/// What [`Client::retire`] did, or would do.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Retired {
    /// How many messages waited, those under former names of the handler included. Redriven ones stay where
    /// they are, and do not count.
    pub messages: u64,
    /// How many of these are still there, because a worker had locked them; a node takes care of
    /// them. In a dry run: all.
    pub left: u64,
}

/// Why a subscription could not be retired. Nothing was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RetireError {
    /// There is no such subscription, or it was retired before; the text says so.
    #[error("{reason}")]
    NotSubscribed {
        /// What was not found.
        reason: String,
    },
    /// A live node declares the handler, or runs it for that version; the text names node, app and build. Stop
    /// those nodes first; one that was killed counts as live for 15 seconds.
    #[error("{reason}: stop its nodes first (a killed one counts as live for 15 s)")]
    Declared {
        /// Who declares it.
        reason: String,
    },
    /// The database could not be asked. After a lost connection the subscription may be retired; a
    /// repetition says so.
    #[error(transparent)]
    Operate(#[from] OperateError),
}

fn refused(source: sqlx::Error) -> RetireError {
    if let Some(reason) = retirements::in_use(&source) {
        return RetireError::Declared { reason };
    }
    match store::refusal(&source) {
        Some(reason) => RetireError::NotSubscribed { reason },
        None => failed("retire a subscription")(source).into(),
    }
}

impl Client {
    /// Retires the subscription of a handler that no live build declares, and returns once its messages
    /// are gone. The group of handlers that name none is the app's name.
    ///
    /// From then on no event is sent to it. Its messages become dead letters or are dropped, whichever you say,
    /// in transactions of 1,000; what transactions that are open now still send it shares their fate, for
    /// which nodes look. Its dead letters stay, its running replays are cancelled, its queue is kept. A handler
    /// of that name in a later build is a new one: it is sent what commits after its registration.
    ///
    /// # Errors
    ///
    /// A live node declares the handler, nobody is subscribed by that name, or the database could not be
    /// asked.
    ///
    /// # Cancel safety
    ///
    /// Dropped while it is awaited, the subscription may be retired; then nodes of the namespace move its
    /// messages.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use nexus::prelude::*;
    /// # async fn example(client: &Client) -> nexus::Result {
    /// use nexus::client::Leftovers;
    ///
    /// for gone in client.subscriptions().await?.iter().filter(|s| !s.is_live) {
    ///     let plan = client.retire_dry_run(&gone.group, &gone.handler).await?;
    ///     println!("{} leaves {} messages", gone.handler, plan.messages);
    /// }
    /// client.retire("billing", "book_invoice", Leftovers::KeepAsDeadLetters).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn retire(
        &self,
        group: &str,
        handler: &str,
        leftovers: Leftovers,
    ) -> Result<Retired, RetireError> {
        let (namespace, fate) = (self.namespace(), leftovers.stored());
        let retired = async {
            let mut connection = self.lend().await?;
            let id = retirements::retire(&mut connection, namespace, group, handler, fate).await?;
            connection.give_back().await?;
            Ok(id)
        };
        let id = store::answered_within(ANSWER, retired)
            .await
            .map_err(refused)?;
        let doing = "move the messages of a retired subscription";
        let progress = loop {
            let step = async {
                let mut connection = self.lend().await?;
                let moved = retirements::move_messages(&mut connection, id, BATCH).await?;
                connection.commit().await?;
                let progress = retirements::progress(&mut connection, id).await?;
                connection.give_back().await?;
                Ok((moved, progress))
            };
            match self.asked(doing, step).await? {
                (Some(moved), _) if moved >= BATCH => {}
                // Somebody else is at them.
                (None, progress) if progress.left > 0 => tokio::time::sleep(TAKEN_SLEEP).await,
                (_, progress) => break progress,
            }
        };
        Ok(Retired {
            messages: (progress.messages + progress.left).unsigned_abs(),
            left: progress.left.unsigned_abs(),
        })
    }

    /// Says what [`retire`](Self::retire) would do, or why it would refuse, and changes nothing.
    ///
    /// # Errors
    ///
    /// As of [`retire`](Self::retire).
    pub async fn retire_dry_run(&self, group: &str, handler: &str) -> Result<Retired, RetireError> {
        let found = async {
            let mut connection = self.lend().await?;
            let mut tx = connection.begin().await?;
            let namespace = self.namespace();
            let id = retirements::retire(&mut tx, namespace, group, handler, "drop").await?;
            let found = retirements::progress(&mut tx, id).await?;
            tx.rollback().await?;
            connection.give_back().await?;
            Ok(found)
        };
        let found = store::answered_within(ANSWER, found)
            .await
            .map_err(refused)?;
        Ok(Retired {
            messages: found.left.unsigned_abs(),
            left: found.left.unsigned_abs(),
        })
    }

    /// Gives the messages that wait for a handler in one version of their event type a fate, and returns how
    /// many they were. The subscription stays, and later events of that version wait as before.
    ///
    /// For what was left behind when the handler went on to another version, or another handler of the group
    /// took that version over.
    ///
    /// # Errors
    ///
    /// A live node runs the handler for that version, nobody is subscribed by that name, or the database
    /// could not be asked; then some may have got their fate.
    pub async fn retire_version(
        &self,
        group: &str,
        handler: &str,
        version: u32,
        leftovers: Leftovers,
    ) -> Result<u64, RetireError> {
        let (namespace, fate) = (self.namespace(), leftovers.stored());
        let mut all = 0;
        loop {
            let step = async {
                let mut connection = self.lend().await?;
                let moved = retirements::retire_version(
                    &mut connection,
                    namespace,
                    group,
                    handler,
                    version,
                    fate,
                    BATCH,
                )
                .await?;
                connection.give_back().await?;
                Ok(moved)
            };
            let moved = store::answered_within(ANSWER, step)
                .await
                .map_err(refused)?;
            all += u64::from(moved.unsigned_abs());
            if moved < BATCH {
                return Ok(all);
            }
        }
    }
}
