//! The main job of nexus in one file: events emitted and handled in transactions, a follow-up
//! event, a cron tick, a retry that succeeds, a dead letter that is shown and redriven.
//!
//! `cargo run --example quickstart` needs nothing but a Rust toolchain and `PostgreSQL`'s programs
//! on the machine; with `DATABASE_URL` set it uses that server.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use nexus::prelude::*;

/// Somebody has signed up.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "user.signed_up", key = user_id)]
struct SignedUp {
    user_id: u32,
    email: String,
}

/// An account has been opened for a user.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "account.opened", key = user_id)]
struct AccountOpened {
    user_id: u32,
}

/// What the handlers share: an unreliable mail server, and a bank that is closed at first.
#[derive(Default)]
struct World {
    mails_tried: AtomicU32,
    bank_is_open: AtomicBool,
    ticks: AtomicU32,
}

/// Takes the transaction: the account, the follow-up event and the completion of the message
/// commit together, however often the message is delivered.
#[handler]
async fn open_account(user: SignedUp, tx: &mut Tx) -> nexus::Result<Emit<AccountOpened>> {
    sqlx::query("insert into quickstart_accounts (user_id, email) values ($1, $2)")
        .bind(i64::from(user.user_id))
        .bind(&user.email)
        .execute(&mut *tx)
        .await?;
    println!("open_account   opened an account for {}", user.email);
    Ok(Emit(AccountOpened {
        user_id: user.user_id,
    }))
}

/// Fails at first; the second attempt succeeds.
#[handler(backoff = "fixed(200ms)")]
async fn send_welcome(account: Envelope<AccountOpened>, world: State<Arc<World>>) -> nexus::Result {
    let attempt = account.attempt();
    if world.mails_tried.fetch_add(1, Ordering::Relaxed) == 0 {
        println!("send_welcome   attempt {attempt}: the mail server is busy");
        return Err("the mail server is busy".into());
    }
    println!(
        "send_welcome   attempt {attempt}: welcomed user {}",
        account.user_id
    );
    Ok(())
}

/// Gives up at once: the message becomes a dead letter until somebody redrives it.
#[handler(group = "billing")]
async fn charge_fee(account: AccountOpened, world: State<Arc<World>>) -> nexus::Result {
    if !world.bank_is_open.load(Ordering::Relaxed) {
        return Err(Error::permanent("the bank is closed"));
    }
    println!("charge_fee     charged user {}", account.user_id);
    Ok(())
}

/// Ticks once a second in the whole cluster, however many nodes run.
#[cron("* * * * * *")]
async fn heartbeat(tick: Tick, world: State<Arc<World>>) {
    world.ticks.fetch_add(1, Ordering::Relaxed);
    println!("heartbeat      tick of {}", tick.due_at());
}

#[tokio::main]
async fn main() -> nexus::Result {
    let world = Arc::new(World::default());
    let app = App::discover()
        .name("quickstart")
        .namespace("quickstart")
        .state(Arc::clone(&world));
    println!("starting; the first time this takes a few seconds, because a database is made");
    let handle = nexus::start(app).await?;
    let client = handle.client();
    sqlx::query("create table if not exists quickstart_accounts (user_id bigint, email text)")
        .execute(client.pool())
        .await?;

    println!("\n-- emit: in one transaction with a statement of our own --");
    let user_id = std::process::id();
    let mut tx = client.begin().await?;
    sqlx::query("delete from quickstart_accounts where user_id = $1")
        .bind(i64::from(user_id))
        .execute(&mut *tx)
        .await?;
    tx.emit(&SignedUp {
        user_id,
        email: "ada@example.com".to_owned(),
    })?;
    tx.commit().await?;
    handle.idle().await?;

    println!("\n-- dead letters --");
    let letters = client.dead_letters("billing", 1).await?;
    for letter in &letters {
        println!(
            "event {} for {}: {} ({}, {} attempt)",
            letter.event_id.unwrap_or_default(),
            letter.handler.as_deref().unwrap_or("nobody"),
            letter.error.as_deref().unwrap_or("no error"),
            letter.reason,
            letter.attempts,
        );
    }

    println!("\n-- redrive --");
    world.bank_is_open.store(true, Ordering::Relaxed);
    let ids: Vec<i64> = letters.iter().map(|letter| letter.id).collect();
    client.redrive("billing", &ids).await?;
    handle.idle().await?;

    println!("\n-- wait for a tick --");
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while world.ticks.load(Ordering::Relaxed) == 0 {
        if tokio::time::Instant::now() > deadline {
            return Err("no tick within 10 seconds".into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    handle.idle().await?;

    println!(
        "\n{:<12} {:<14} {:<26} {:>9} {:>8} {:>13}",
        "group", "handler", "event type", "completed", "retried", "dead-lettered"
    );
    for stats in handle.stats() {
        println!(
            "{:<12} {:<14} {:<26} {:>9} {:>8} {:>13}",
            stats.group,
            stats.handler,
            stats.event_type,
            stats.completed,
            stats.retried,
            stats.dead_lettered
        );
    }
    handle.shutdown().await;
    Ok(())
}
