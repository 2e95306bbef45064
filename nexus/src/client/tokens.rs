//! Tokens, which programs show that come over HTTP.

use std::{fmt, str::FromStr, time::Duration};

use jiff::Timestamp;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use uuid::Uuid;

use super::{Client, OperateError};
use crate::store::tokens;

/// What a token allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Scope {
    /// To emit events.
    Emit,
    /// To look at everything in the namespace, payloads included.
    Read,
    /// To steer: dead letters, scheduled tasks, groups. Does not include looking.
    Operate,
}

impl Scope {
    fn name(self) -> &'static str {
        match self {
            Self::Emit => "emit",
            Self::Read => "read",
            Self::Operate => "operate",
        }
    }
}

/// `emit`, `read` or `operate`.
impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A text that is no [`Scope`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no scope of a token: expected emit, read or operate")]
pub struct InvalidScope(String);

impl FromStr for Scope {
    type Err = InvalidScope;

    fn from_str(text: &str) -> Result<Self, InvalidScope> {
        [Self::Emit, Self::Read, Self::Operate]
            .into_iter()
            .find(|scope| scope.name() == text)
            .ok_or_else(|| InvalidScope(text.to_owned()))
    }
}

/// A token as it is kept: without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Token {
    /// Its id, which is no secret; what [`Client::revoke_token`] takes.
    pub id: Uuid,
    /// What it was called when it was made.
    pub name: String,
    /// What it allows.
    pub scopes: Vec<Scope>,
    /// When it was made.
    pub created_at: Timestamp,
    /// From when on it is refused; `None` if never.
    pub expires_at: Option<Timestamp>,
    /// Since when it is refused, because it was revoked.
    pub revoked_at: Option<Timestamp>,
    /// When it was last used, to within a minute.
    pub last_used_at: Option<Timestamp>,
}

impl Token {
    fn new(stored: tokens::Stored) -> Self {
        Self {
            id: stored.token_id,
            name: stored.name,
            // A scope of a later release allows nothing here.
            scopes: stored
                .scopes
                .iter()
                .filter_map(|scope| scope.parse().ok())
                .collect(),
            created_at: stored.created_at,
            expires_at: stored.expires_at,
            revoked_at: stored.revoked_at,
            last_used_at: stored.last_used_at,
        }
    }
}

/// A token that was just made, with its secret, which is kept nowhere.
#[derive(Clone)]
#[non_exhaustive]
pub struct CreatedToken {
    /// What is kept.
    pub token: Token,
    /// What the program has to show: `nexus_`, the id, and the secret. Nobody can tell it again.
    pub text: String,
}

/// Without the secret.
impl fmt::Debug for CreatedToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CreatedToken")
            .field("token", &self.token)
            .finish_non_exhaustive()
    }
}

/// Why a token could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// A name has from 1 to 100 characters, none of which is a control character.
    #[error(
        "a token's name has from 1 to 100 characters and no control characters, found {name:?}"
    )]
    Name {
        /// What was given.
        name: String,
    },
    /// Without a scope it would allow nothing.
    #[error("a token needs at least one scope: emit, read or operate")]
    NoScope,
    /// A token that does not end has no lifetime; one that does lives for up to a hundred years.
    #[error(
        "a token lives for up to a hundred years, found {lifetime:?}: leave it out for one without end"
    )]
    Lifetime {
        /// What was given.
        lifetime: Duration,
    },
    /// The database could not be asked.
    #[error(transparent)]
    Operate(#[from] OperateError),
}

const LONGEST_LIFETIME: Duration = Duration::from_hours(24 * 36_525);

/// What every token begins with, so that it is known wherever one has leaked to.
const PREFIX: &str = "nexus_";

impl Client {
    /// Makes a token for a program that comes over HTTP, in this client's namespace; see the crate `nexus-http`.
    /// It works at once. Without a lifetime it works until it is [revoked](Self::revoke_token).
    ///
    /// # Errors
    ///
    /// [`TokenError`]: the name, the scopes, the lifetime, or the database could not be asked.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use nexus::client::Scope;
    /// # use std::time::Duration;
    /// # async fn example(client: &nexus::Client) -> nexus::Result {
    /// let year = Duration::from_hours(24 * 365);
    /// let created = client.create_token("shop frontend", &[Scope::Emit], Some(year)).await?;
    /// println!("keep this, it is not shown again: {}", created.text);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn create_token(
        &self,
        name: &str,
        scopes: &[Scope],
        lifetime: Option<Duration>,
    ) -> Result<CreatedToken, TokenError> {
        if name.is_empty() || name.chars().count() > 100 || name.contains(char::is_control) {
            return Err(TokenError::Name {
                name: name.to_owned(),
            });
        }
        if scopes.is_empty() {
            return Err(TokenError::NoScope);
        }
        if let Some(lifetime) = lifetime
            && lifetime > LONGEST_LIFETIME
        {
            return Err(TokenError::Lifetime { lifetime });
        }
        let mut scopes: Vec<&str> = scopes.iter().map(|scope| scope.name()).collect();
        scopes.sort_unstable();
        scopes.dedup();
        let id = Uuid::new_v4();
        // 122 random bits each.
        let secret = [Uuid::new_v4(), Uuid::new_v4()].map(|part| part.simple().to_string());
        let secret = secret.concat();
        let made = async {
            let mut connection = self.lend().await?;
            let stored = tokens::create(
                &mut connection,
                self.namespace(),
                id,
                name,
                &scopes,
                &Sha256::digest(&secret),
                lifetime,
            )
            .await?;
            connection.give_back().await?;
            Ok(stored)
        };
        let stored = self.asked("make a token", made).await?;
        Ok(CreatedToken {
            token: Token::new(stored),
            text: format!("{PREFIX}{}_{secret}", id.simple()),
        })
    }

    /// The tokens of the namespace, the oldest first, also those that are revoked or have expired.
    ///
    /// # Errors
    ///
    /// The database could not be asked.
    pub async fn tokens(&self) -> Result<Vec<Token>, OperateError> {
        let listed = async {
            let mut connection = self.lend().await?;
            let stored = tokens::list(&mut connection, self.namespace()).await?;
            connection.give_back().await?;
            Ok(stored)
        };
        let stored = self.asked("list tokens", listed).await?;
        Ok(stored.into_iter().map(Token::new).collect())
    }

    /// Revokes a token: from now on it is refused, everywhere. False if the namespace has no such token, or it was
    /// revoked before.
    ///
    /// # Errors
    ///
    /// The database could not be asked.
    pub async fn revoke_token(&self, id: Uuid) -> Result<bool, OperateError> {
        let revoked = async {
            let mut connection = self.lend().await?;
            let is_revoked = tokens::revoke(&mut connection, self.namespace(), id).await?;
            connection.give_back().await?;
            Ok(is_revoked)
        };
        self.asked("revoke a token", revoked).await
    }

    /// The token that a program shows, if this namespace has it and it is in force. Notes that it was used, at
    /// most once a minute; where the role may not write, nothing is noted.
    ///
    /// How long it takes tells nothing about a secret: the token is looked up by its id, and what is compared
    /// are hashes, in constant time.
    ///
    /// # Errors
    ///
    /// The database could not be asked.
    pub async fn token_of(&self, shown: &str) -> Result<Option<Token>, OperateError> {
        let Some((id, secret)) = parts(shown) else {
            return Ok(None);
        };
        let hash = Sha256::digest(secret);
        let looked = async {
            let mut connection = self.lend().await?;
            let found = tokens::in_force(&mut connection, self.namespace(), id).await?;
            let found = found.filter(|(_, expected, _)| bool::from(hash[..].ct_eq(expected)));
            let Some((stored, _, is_to_be_noted)) = found else {
                connection.give_back().await?;
                return Ok(None);
            };
            if is_to_be_noted {
                match tokens::note_use(&mut connection, id).await {
                    Ok(()) => connection.give_back().await?,
                    Err(error) => {
                        tracing::debug!(%error, token = %id, "could not note the use of a token");
                        connection.give_up().await;
                    }
                }
            } else {
                connection.give_back().await?;
            }
            Ok(Some(stored))
        };
        let stored = self.asked("look for a token", looked).await?;
        Ok(stored.map(Token::new))
    }

    /// Whether the namespace has a token in force.
    ///
    /// # Errors
    ///
    /// The database could not be asked.
    pub async fn has_tokens(&self) -> Result<bool, OperateError> {
        let asked = async {
            let mut connection = self.lend().await?;
            let is_any = tokens::is_any_in_force(&mut connection, self.namespace()).await?;
            connection.give_back().await?;
            Ok(is_any)
        };
        self.asked("look for tokens", asked).await
    }
}

/// The id and the secret in a token's text.
fn parts(shown: &str) -> Option<(Uuid, &str)> {
    let (id, secret) = shown.strip_prefix(PREFIX)?.split_once('_')?;
    let is_secret = secret.len() == 64 && secret.bytes().all(|byte| byte.is_ascii_hexdigit());
    let id = Uuid::try_parse(id).ok().filter(|_| id.len() == 32)?;
    is_secret.then_some((id, secret))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_texts_of_the_form_of_a_token_are_looked_up() {
        let id = "0".repeat(32);
        let secret = "a".repeat(64);
        assert!(parts(&format!("nexus_{id}_{secret}")).is_some());
        for shown in [
            String::new(),
            format!("{id}_{secret}"),
            format!("nexus_{id}{secret}"),
            format!("nexus_{id}_{secret}0"),
            format!("nexus_{id}_{}", "x".repeat(64)),
            format!("nexus_{}_{secret}", Uuid::nil()),
            format!("nexus_{id}_{}", &secret[1..]),
            format!("nexus_{id}_{secret}\0"),
        ] {
            assert!(parts(&shown).is_none(), "{shown}");
        }
    }

    #[test]
    fn a_created_token_does_not_show_its_secret() {
        let created = CreatedToken {
            token: Token {
                id: Uuid::nil(),
                name: "ci".to_owned(),
                scopes: vec![Scope::Emit],
                created_at: Timestamp::UNIX_EPOCH,
                expires_at: None,
                revoked_at: None,
                last_used_at: None,
            },
            text: "nexus_secret".to_owned(),
        };
        assert!(!format!("{created:?}").contains("secret"), "{created:?}");
    }
}
