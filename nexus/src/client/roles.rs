//! Roles that may less than the owner of the schema.

use std::time::Duration;

use sqlx::{Connection, PgConnection};

use super::{ConnectError, Database};
use crate::store::{self, maintenance, roles};

/// What a role may do in a namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Access {
    /// All that an app does: emit, handle, schedule, register, look after dead letters.
    App,
    /// Look at everything, change nothing.
    Read,
}

/// A role of [`Database::create_roles`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CreatedRole {
    /// Its name.
    pub name: String,
    /// What it may do, in a few words.
    pub may: String,
    /// What is left to do, and who has to do it, if the role could not be given everything.
    pub note: Option<String>,
}

/// Why rights could not be given or taken. Nothing was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RoleError {
    /// The database cannot be used.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The role that connected may not do it, or the role or namespace cannot be used so. The reason says
    /// what to do.
    #[error("{reason}")]
    Refused {
        /// What the database answered.
        reason: String,
    },
    /// The database could not be asked.
    #[error("could not {doing}")]
    Database {
        /// What was attempted.
        doing: &'static str,
        /// What went wrong.
        source: sqlx::Error,
    },
}

fn failed(doing: &'static str) -> impl FnOnce(sqlx::Error) -> RoleError {
    move |source| match store::refusal_of_roles(&source) {
        Some(reason) => RoleError::Refused { reason },
        None => RoleError::Database { doing, source },
    }
}

/// Roles and their rights. The role that connects must own schema `core`, or be a member of the role that
/// does; to make roles it needs `createrole`. No password is given or asked for: set one with psql's
/// `\password`, or grant the role to one that can log in. The guide has [the whole
/// story](crate::guide::deploying#roles-and-tenants).
impl Database {
    /// Makes the roles `<prefix>_admin`, `<prefix>_app` and `<prefix>_read`, as far as they are missing, and
    /// gives them their rights in this database. The usual prefix is `nexus`. In SQL: `select * from
    /// core.create_roles()`.
    ///
    /// `…_admin` may all that the owner may, `…_app` runs apps in every namespace and cannot migrate,
    /// `…_read` sees everything. They cannot log in; grant them to roles that can. Roles belong to the whole
    /// server: another database that uses the same prefix gives them rights there as well.
    ///
    /// # Errors
    ///
    /// [`RoleError`] says who has to do what.
    pub async fn create_roles(&self, prefix: &str) -> Result<Vec<CreatedRole>, RoleError> {
        let mut connection = self.verified().await?;
        let created = roles::create(&mut connection, prefix)
            .await
            .map_err(failed("make roles"))?;
        Ok(created
            .into_iter()
            .map(|(name, may, note)| CreatedRole { name, may, note })
            .collect())
    }

    /// Binds a role to a namespace: it sees and touches nothing of others. Makes the namespace, and the role
    /// without the right to log in, if they are missing. Done again, it changes the access. A role may be
    /// bound to several namespaces. In SQL: `select core.grant_namespace('shop', 'shop_app')`.
    ///
    /// # Errors
    ///
    /// [`RoleError`] says who has to do what. Roles that nothing can be kept from, such as superusers, are
    /// refused.
    pub async fn grant_namespace(
        &self,
        namespace: &str,
        role: &str,
        access: Access,
    ) -> Result<(), RoleError> {
        let mut connection = self.verified().await?;
        let access = match access {
            Access::App => "app",
            Access::Read => "read",
        };
        roles::grant(&mut connection, namespace, role, access)
            .await
            .map_err(failed("give rights"))
    }

    /// Takes back what [`grant_namespace`](Self::grant_namespace) gave; false if the role was not bound to
    /// the namespace. The role stays. Nodes that run as the role fail from then on.
    ///
    /// # Errors
    ///
    /// [`RoleError`] says who has to do what.
    pub async fn revoke_namespace(&self, namespace: &str, role: &str) -> Result<bool, RoleError> {
        let mut connection = self.verified().await?;
        roles::revoke(&mut connection, namespace, role)
            .await
            .map_err(failed("take rights back"))
    }

    /// Drops the months of the event log that ended longer ago than `retention`, while emits go on; returns the
    /// names of their tables. Nodes that run as the owner do it by themselves: call it from time to time
    /// where there are none.
    ///
    /// # Errors
    ///
    /// The role that connects has not got the owner's rights, or the database could not be asked. What was
    /// left half done is finished the next time.
    pub async fn drop_expired_log(&self, retention: Duration) -> Result<Vec<String>, RoleError> {
        let doing = "drop expired partitions";
        let mut connection = self.verified().await?;
        let owner = roles::other_owner(&mut connection)
            .await
            .map_err(failed(doing))?;
        if let Some(owner) = owner {
            return Err(RoleError::Refused {
                reason: format!(
                    "expired partitions are dropped by role `{owner}`, which owns schema `core`"
                ),
            });
        }
        maintenance::drop_expired_partitions(&mut connection, retention)
            .await
            .map_err(failed(doing))
    }

    async fn verified(&self) -> Result<PgConnection, ConnectError> {
        self.reach().await?;
        let mut connection = PgConnection::connect_with(self.options())
            .await
            .map_err(|cause| self.unusable(cause))?;
        nexus_migrations::verify(&mut connection)
            .await
            .map_err(ConnectError::Schema)?;
        Ok(connection)
    }
}
