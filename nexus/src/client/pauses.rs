//! Pausing groups: what waits for their handlers goes on waiting.

use super::{Client, OperateError};
use crate::store::subscriptions;

impl Client {
    /// Keeps the nodes from claiming messages of a group, until it is [resumed](Self::resume_group); false if it is
    /// paused already.
    ///
    /// What a node has claimed by then is handled, about a quarter of a second's work and the attempts that run.
    /// Events are emitted and delivered as ever, so messages gather in the queue. Retries, redrives and replays wait
    /// there as well; ticks do, too. The pause outlives the nodes and a restart of the server. In SQL it is
    /// `select core.pause_group(namespace, group)`.
    ///
    /// # Errors
    ///
    /// There is no such group, or the database could not be asked.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: &nexus::Client) -> nexus::Result {
    /// client.pause_group("billing").await?;
    /// // The bank is back.
    /// client.resume_group("billing").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn pause_group(&self, group: &str) -> Result<bool, OperateError> {
        self.set_paused(group, true).await
    }

    /// Lets the nodes claim messages of a group again, at once; false if it is not paused. In SQL it is
    /// `select core.resume_group(namespace, group)`, which nodes see at their next poll.
    ///
    /// # Errors
    ///
    /// There is no such group, or the database could not be asked.
    pub async fn resume_group(&self, group: &str) -> Result<bool, OperateError> {
        self.set_paused(group, false).await
    }

    async fn set_paused(&self, group: &str, is_paused: bool) -> Result<bool, OperateError> {
        let queue = self.queue_of(group).await?;
        let set = async {
            let mut connection = self.lend().await?;
            let is_set =
                subscriptions::set_paused(&mut connection, self.namespace(), group, is_paused)
                    .await?;
            connection.give_back().await?;
            Ok(is_set)
        };
        let doing = if is_paused {
            "pause the group"
        } else {
            "resume the group"
        };
        let is_set = self.asked(doing, set).await?;
        if !is_paused {
            self.wake([queue]);
        }
        Ok(is_set)
    }
}
