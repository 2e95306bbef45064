use std::{fmt, future::IntoFuture};

use futures_util::future::BoxFuture;

use super::{Again, BATCH, DeadLetterFilter, horizon, interrupted};
use crate::{
    client::{ANSWER, Client, OperateError, operate::failed},
    store::{self, dead_letters},
};

/// What a purge has done, or would do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Purged {
    /// How many dead letters were deleted, or would be.
    pub letters: u64,
}

/// Dead letters about to be deleted: set options, then await it. Made by
/// [`Client::purge_dead_letters`].
///
/// They are deleted in batches of up to 500, each by a statement of its own. Dropped while it is
/// awaited, some batches are gone and the others not.
#[must_use = "a purge does nothing until it is awaited"]
pub struct Purge<'a> {
    client: &'a Client,
    group: &'a str,
    filter: DeadLetterFilter,
    is_dry: bool,
    progress: Option<Progress<'a>>,
}

type Progress<'a> = Box<dyn FnMut(Purged) + Send + 'a>;

impl fmt::Debug for Purge<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Purge")
            .field("group", &self.group)
            .field("filter", &self.filter)
            .field("is_dry", &self.is_dry)
            .finish_non_exhaustive()
    }
}

impl<'a> Purge<'a> {
    /// Is told after each batch how many are gone so far.
    pub fn on_progress(mut self, told: impl FnMut(Purged) + Send + 'a) -> Self {
        self.progress = Some(Box::new(told));
        self
    }

    /// Only tells what would be done, and changes nothing.
    pub fn dry_run(self) -> Self {
        Self {
            is_dry: true,
            ..self
        }
    }
}

const DOING: &str = "purge dead letters";

impl<'a> IntoFuture for Purge<'a> {
    type Output = Result<Purged, OperateError>;
    type IntoFuture = BoxFuture<'a, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let Self {
                client,
                group,
                filter,
                is_dry,
                mut progress,
            } = self;
            let namespace = client.namespace();
            let queue = client.queue_of(group).await?;
            let lent = store::answered_within(ANSWER, client.lend()).await;
            let mut connection = lent.map_err(failed(DOING))?;
            let horizon = horizon(client, &mut connection, &queue)
                .await
                .map_err(failed(DOING))?;
            let until = Some(horizon.msg_id);
            let mut letters = 0;
            for filter in filter.pieces(BATCH.unsigned_abs() as usize) {
                if is_dry {
                    let count = dead_letters::count(&mut connection, namespace, group, &filter);
                    let count = store::answered_within(ANSWER, count).await;
                    letters += count.map_err(failed(DOING))?.unsigned_abs();
                    continue;
                }
                let mut again = Again::default();
                loop {
                    let batch = dead_letters::purge(
                        &mut connection,
                        namespace,
                        group,
                        &filter,
                        BATCH,
                        until,
                    );
                    match store::answered_within(ANSWER, batch).await {
                        Ok(0) => break,
                        Ok(batch) => {
                            connection
                                .commit()
                                .await
                                .map_err(interrupted(DOING, letters))?;
                            letters += batch.unsigned_abs();
                            if let Some(progress) = &mut progress {
                                progress(Purged { letters });
                            }
                        }
                        Err(error) => again
                            .after(error, client, &mut connection)
                            .await
                            .map_err(interrupted(DOING, letters))?,
                    }
                }
            }
            connection
                .give_back()
                .await
                .map_err(interrupted(DOING, if is_dry { 0 } else { letters }))?;
            if !is_dry && letters > 0 {
                tracing::info!(group, letters, "purged dead letters");
            }
            Ok(Purged { letters })
        })
    }
}

impl Client {
    /// Deletes dead letters of a group for good: by id, or those that a [filter](DeadLetterFilter) means;
    /// an empty filter is all of them. Their events stay in the log. Await it for how many they were;
    /// [`dry_run`](Purge::dry_run) only counts.
    ///
    /// Awaiting it fails if the group does not exist, or the database could not be asked;
    /// [`OperateError::Interrupted`] says how far it got.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use nexus::{client::DeadLetterFilter, prelude::*};
    /// # use std::time::Duration;
    /// # async fn example(client: &Client) -> nexus::Result {
    /// let filter = DeadLetterFilter::new()
    ///     .event_type("coupon.offered")
    ///     .older_than(Duration::from_hours(24 * 30));
    /// let purged = client.purge_dead_letters("mails", filter).await?;
    /// println!("{} letters are gone", purged.letters);
    /// # Ok(())
    /// # }
    /// ```
    pub fn purge_dead_letters<'a>(
        &'a self,
        group: &'a str,
        which: impl Into<DeadLetterFilter>,
    ) -> Purge<'a> {
        Purge {
            client: self,
            group,
            filter: which.into(),
            is_dry: false,
            progress: None,
        }
    }
}
