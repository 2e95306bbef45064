//! Looking at what waits, and for how long.

use std::{fmt, time::Duration};

use jiff::Timestamp;

use super::{Client, OperateError};
use crate::store::{depths, subscriptions};

/// Counting stops here.
const MOST: u16 = 1_000;

/// How many there are, counted up to a limit: 1,000 in [lists](Client::groups), 10,000 in
/// [metrics](Client::namespace_metrics).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
#[non_exhaustive]
pub struct Depth {
    /// How many were counted.
    pub counted: u64,
    /// There are more.
    pub is_more: bool,
}

impl Depth {
    pub(super) fn new(found: i64, most: u16) -> Self {
        let most = u64::from(most);
        let found = found.unsigned_abs();
        Self {
            counted: found.min(most),
            is_more: found > most,
        }
    }

    pub(super) fn add(&mut self, other: Self) {
        self.counted += other.counted;
        self.is_more |= other.is_more;
    }
}

/// `17`, or `1000+`.
impl fmt::Display for Depth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let more = if self.is_more { "+" } else { "" };
        f.pad(&format!("{}{more}", self.counted))
    }
}

/// A group, with what waits in its queue.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Group {
    /// Its name.
    pub name: String,
    /// The name of its queue; the table is `pgmq.q_<queue>`.
    pub queue: String,
    /// Since when it is [paused](Client::pause_group); `None` if it is not.
    pub paused_at: Option<Timestamp>,
    /// Messages that wait or are being handled, whoever they are for.
    pub depth: Depth,
    /// How many of those that were counted have failed before.
    pub failed: u64,
    /// Dead letters.
    pub dead_letters: Depth,
    /// Its handlers, by name.
    pub handlers: Vec<GroupHandler>,
}

/// A handler of a group, with what waits for it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct GroupHandler {
    /// Its name.
    pub name: String,
    /// The event type that it is subscribed to.
    pub event_type: String,
    /// The version of it that the handler takes; `None` if no build has said so yet.
    pub event_version: Option<u32>,
    /// The app that declared it last.
    pub app: String,
    /// Whether a live node can run it. If not, its messages wait.
    pub is_live: bool,
    /// Messages that wait for it or are being handled.
    pub depth: Depth,
    /// How long the oldest message has been there that a node may claim, since it was due or came back; `None` if
    /// there is none.
    pub lag: Option<Duration>,
}

impl Group {
    /// The greatest lag of its handlers.
    #[must_use]
    pub fn lag(&self) -> Option<Duration> {
        self.handlers.iter().filter_map(|handler| handler.lag).max()
    }
}

impl Client {
    /// The groups of the namespace with their handlers and what waits for these, by name. Nothing is counted
    /// beyond 1,000, so that it takes a moment however much waits.
    ///
    /// # Errors
    ///
    /// The database could not be asked.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: &nexus::Client) -> nexus::Result {
    /// for group in client.groups().await? {
    ///     println!("{} {} messages, oldest {:?}", group.name, group.depth, group.lag());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn groups(&self) -> Result<Vec<Group>, OperateError> {
        let namespace = self.namespace();
        let most = i64::from(MOST);
        let listed = async {
            let mut connection = self.lend().await?;
            let mut groups = Vec::new();
            for row in subscriptions::group_rows(&mut connection, namespace).await? {
                let messages = depths::of_queue(&mut connection, &row.queue, most).await?;
                let letters = format!("{}_dlq", row.queue);
                let letters = depths::of_queue(&mut connection, &letters, most).await?;
                groups.push(Group {
                    name: row.group,
                    paused_at: row.paused_at,
                    depth: Depth::new(messages.messages, MOST),
                    failed: messages.failed.unsigned_abs().min(u64::from(MOST)),
                    dead_letters: Depth::new(letters.messages, MOST),
                    queue: row.queue,
                    handlers: Vec::new(),
                });
            }
            for row in subscriptions::list(&mut connection, namespace).await? {
                let id = row.subscription_id;
                let waiting = depths::of_handler(&mut connection, id, &row.queue, most).await?;
                if let Some(group) = groups.iter_mut().find(|group| group.name == row.group) {
                    group.handlers.push(GroupHandler {
                        name: row.handler,
                        event_type: row.event_type,
                        event_version: row.event_version.map(i32::unsigned_abs),
                        app: row.app,
                        is_live: row.is_live,
                        depth: Depth::new(waiting.messages, MOST),
                        lag: waiting.lag,
                    });
                }
            }
            connection.give_back().await?;
            Ok(groups)
        };
        self.asked("list groups", listed).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_depth_says_that_there_are_more() {
        for (found, text) in [(0, "0"), (1_000, "1000"), (1_001, "1000+")] {
            assert_eq!(Depth::new(found, MOST).to_string(), text);
        }
        assert_eq!(format!("{:>6}", Depth::new(7, MOST)), "     7");
    }
}
