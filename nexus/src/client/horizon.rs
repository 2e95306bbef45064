//! Looking for whoever keeps the server from cleaning up.

use std::time::Duration;

use super::{Client, OperateError};
use crate::store::horizon;

/// Whoever holds the oldest snapshot of the database, and so keeps Postgres from removing what was deleted
/// since.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct XminHolder {
    /// What it is: `session`, `prepared transaction`, `replication slot` or `standby`.
    pub kind: String,
    /// The process id of the session, for `pg_terminate_backend`; `None` for a prepared transaction and an
    /// inactive slot.
    pub pid: Option<i32>,
    /// The `application_name` of the session or standby, or the name of the prepared transaction or slot.
    pub name: String,
    /// The role.
    pub user: Option<String>,
    /// What the session does, such as `idle in transaction`. Only for sessions of the client's own role, or
    /// with `pg_read_all_stats`.
    pub state: Option<String>,
    /// How many transactions have begun since.
    pub transactions: i64,
    /// How long its transaction has been open. `None` for slots and standbys; of sessions of other roles only
    /// members of `pg_read_all_stats` get to know it.
    pub age: Option<Duration>,
}

impl Client {
    /// Whoever holds the oldest snapshot of the database at this moment, be it for a moment only; `None` if
    /// nobody does. Nodes look every ten seconds and warn of one that is held for longer than 30 s.
    ///
    /// # Errors
    ///
    /// The database could not be asked.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: &nexus::Client) -> nexus::Result {
    /// if let Some(holder) = client.xmin_holder().await? {
    ///     println!("{} {:?} {} for {:?}", holder.kind, holder.pid, holder.name, holder.age);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn xmin_holder(&self) -> Result<Option<XminHolder>, OperateError> {
        let looked = async {
            let mut connection = self.lend().await?;
            let holder = horizon::oldest_holder(&mut connection).await?;
            connection.give_back().await?;
            Ok(holder)
        };
        let holder = self.asked("look for the oldest snapshot", looked).await?;
        Ok(holder.map(self::holder))
    }
}

pub(super) fn holder(found: horizon::Holder) -> XminHolder {
    XminHolder {
        kind: found.kind,
        pid: found.pid,
        name: found.name,
        user: found.user,
        state: found.state,
        transactions: found.transactions,
        age: found.age,
    }
}
