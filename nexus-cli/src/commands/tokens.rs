//! `nexus tokens`

use std::time::Duration;

use clap::{Args, Subcommand};
use nexus::{
    client::{Scope, Token},
    jiff::Timestamp,
};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    console::{BAD, Cell, Console, DIM, GOOD, Table},
    moments::{duration, relative},
    session::Session,
};

#[derive(Debug, Subcommand)]
pub(crate) enum Tokens {
    /// List the tokens of the namespace, also those that have ended
    #[command(after_help = "Example: nexus tokens list --namespace shop")]
    List,
    /// Make a token for a program that comes over HTTP, and print it: this once
    Create(Create),
    /// Revoke a token: it is refused from now on, everywhere
    #[command(after_help = "\
It cannot be put in force again.

Example: nexus tokens revoke 6f1c6d0e-3d0c-4c8e-9a3b-2b1d4f1f7a10")]
    Revoke {
        /// The id that `nexus tokens list` shows; no part of the secret
        id: Uuid,
        /// Only tell which one that is
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Debug, Args)]
#[command(after_help = "\
Only a hash of its secret is kept. The token alone goes to standard output, all else to standard error. Once a namespace has a \
token, nobody is served without one.

Example: nexus tokens create \"shop frontend\" --scope emit --expires-in 365d > token")]
pub(crate) struct Create {
    /// What it is called, for people
    name: String,
    /// What it allows: emit, read or operate; give it several times, none includes another
    #[arg(long = "scope", value_name = "SCOPE", required = true)]
    scopes: Vec<Scope>,
    /// After this it is refused, such as 90d; without it, it works until it is revoked
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    expires_in: Option<Duration>,
}

impl Tokens {
    pub(crate) async fn run(self, session: &Session, console: &Console) -> anyhow::Result<()> {
        match self {
            Self::List => list(session, console).await,
            Self::Create(create) => create.run(session, console).await,
            Self::Revoke { id, dry_run } => revoke(id, dry_run, session, console).await,
        }
    }
}

async fn list(session: &Session, console: &Console) -> anyhow::Result<()> {
    let tokens = session.client.tokens().await?;
    if console.is_json {
        let documents = tokens.iter().map(|token| document(token, session.now));
        return console.print_json_list(documents);
    }
    if tokens.is_empty() {
        return console.print("there is no token: only this machine is served\n");
    }
    let mut table = Table::new(["token", "name", "scopes", "state", "made", "last used"]);
    for token in &tokens {
        let used = token.last_used_at.map(|at| relative(session.now, at));
        table.row([
            token.id.to_string().into(),
            (&token.name).into(),
            scopes(token).join(", ").into(),
            state(token, session.now),
            relative(session.now, token.created_at).into(),
            used.unwrap_or_else(|| "never".to_owned()).into(),
        ]);
    }
    console.print(&table.text(""))
}

impl Create {
    async fn run(self, session: &Session, console: &Console) -> anyhow::Result<()> {
        let client = &session.client;
        let is_first = !client.has_tokens().await?;
        let created = client
            .create_token(&self.name, &self.scopes, self.expires_in)
            .await?;
        if console.is_json {
            let mut document = document(&created.token, session.now);
            document["token"] = created.text.into();
            return console.print_json(&document);
        }
        console.print(&format!("{}\n", created.text))?;
        let id = created.token.id;
        console.say(&format!(
            "{DIM}keep it, it is not shown again; nexus tokens revoke {id} ends it{DIM:#}"
        ));
        if is_first {
            console.say(&format!(
                "{DIM}from now on nobody in namespace {} is served without a token, this machine included{DIM:#}",
                client.namespace()
            ));
        }
        Ok(())
    }
}

async fn revoke(
    id: Uuid,
    is_dry: bool,
    session: &Session,
    console: &Console,
) -> anyhow::Result<()> {
    let client = &session.client;
    let find = async || -> anyhow::Result<Token> {
        let found = client
            .tokens()
            .await?
            .into_iter()
            .find(|token| token.id == id);
        let namespace = client.namespace();
        found.ok_or_else(|| {
            anyhow::anyhow!("namespace `{namespace}` has no token {id}; see `nexus tokens list`")
        })
    };
    let mut token = find().await?;
    let was_revoked = token.revoked_at.is_some();
    if !is_dry && !was_revoked {
        let what = format!("token {id} `{}` will be refused, for good", token.name);
        session.ask(console, &what).await?;
        client.revoke_token(id).await?;
        token = find().await?;
    }
    if console.is_json {
        let mut document = document(&token, session.now);
        document["isDryRun"] = is_dry.into();
        return console.print_json(&document);
    }
    let done = match (was_revoked, is_dry) {
        (true, _) => "was revoked before",
        (false, true) => "would be revoked",
        (false, false) => "is revoked",
    };
    let text = format!("token {id} `{}` {done}", token.name);
    console.print(&format!("{}\n", crate::console::safe(&text)))
}

fn scopes(token: &Token) -> Vec<String> {
    token.scopes.iter().map(ToString::to_string).collect()
}

fn is_in_force(token: &Token, now: Timestamp) -> bool {
    token.revoked_at.is_none() && token.expires_at.is_none_or(|at| at > now)
}

fn state(token: &Token, now: Timestamp) -> Cell {
    match (token.revoked_at, token.expires_at) {
        (Some(at), _) => Cell::new(format!("revoked {}", relative(now, at)), BAD),
        (None, Some(at)) if is_in_force(token, now) => {
            Cell::new(format!("ends {}", relative(now, at)), GOOD)
        }
        (None, Some(at)) => Cell::new(format!("ended {}", relative(now, at)), BAD),
        (None, None) => Cell::new("in force", GOOD),
    }
}

fn document(token: &Token, now: Timestamp) -> Value {
    json!({
        "tokenId": token.id,
        "name": token.name,
        "scopes": scopes(token),
        "isInForce": is_in_force(token, now),
        "createdAt": token.created_at,
        "expiresAt": token.expires_at,
        "revokedAt": token.revoked_at,
        "lastUsedAt": token.last_used_at,
    })
}
