//! A process that emits, and says on its standard output what it sent and what was acknowledged. What it
//! said is kept outside of the database, so that a lost row of the log is noticed.

use std::{
    io::Write as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nexus::{Client, Database, EmitError};

use crate::app::{NAMESPACE, Work};

/// Emits at once.
const LANES: i64 = 4;

/// When an answer counts as lost.
const PATIENCE: Duration = Duration::from_secs(20);

/// How work is emitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// In a transaction of its own.
    Alone,
    /// With a row of the emitter's, in its transaction.
    WithRow,
    /// With an idempotency key, again and again until it is acknowledged.
    Keyed,
    /// Due a second later.
    Later,
}

pub(crate) fn way(number: i64) -> Way {
    match number.rem_euclid(10) {
        1 | 4 | 7 => Way::WithRow,
        5 => Way::Keyed,
        9 => Way::Later,
        _ => Way::Alone,
    }
}

/// What an emitting process is told.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Settings {
    /// The first number; the others follow.
    #[arg(long)]
    from: i64,
    /// How many are emitted each second.
    #[arg(long)]
    rate: f64,
    /// How long the handler `exact` takes for each.
    #[arg(long, default_value_t = 0)]
    takes_ms: u64,
    /// Ends after so many.
    #[arg(long)]
    count: Option<i64>,
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // Who listens may have ended.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// Emits until its standard input ends.
pub(crate) async fn run(settings: Settings, stop: Arc<AtomicBool>) -> anyhow::Result<()> {
    let url = std::env::var("CORE_DATABASE_URL")?;
    let database = Database::from_url(&url, "CORE_DATABASE_URL")?;
    let client = loop {
        match Client::connect(&database, NAMESPACE).await {
            Ok(client) => break client,
            Err(error) if stop.load(Ordering::Relaxed) => return Err(error.into()),
            Err(error) => eprintln!("no connection yet: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    let lanes: Vec<_> = (0..LANES)
        .map(|lane| {
            let (client, settings, stop) = (client.clone(), settings.clone(), Arc::clone(&stop));
            tokio::spawn(async move { emit_lane(&client, &settings, lane, &stop).await })
        })
        .collect();
    for lane in lanes {
        lane.await?;
    }
    Ok(())
}

async fn emit_lane(client: &Client, settings: &Settings, lane: i64, stop: &AtomicBool) {
    #[expect(clippy::cast_precision_loss, reason = "there are four lanes")]
    let every = Duration::from_secs_f64(LANES as f64 / settings.rate);
    let mut clock = tokio::time::interval(every);
    clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut number = settings.from + lane;
    let end = settings
        .count
        .map_or(i64::MAX, |count| settings.from + count);
    while number < end && !stop.load(Ordering::Relaxed) {
        clock.tick().await;
        say(&format!("sent {number}"));
        let work = Work {
            number,
            takes_ms: settings.takes_ms,
        };
        loop {
            match emit(client, &work).await {
                Answer::Stored(id) => say(&format!("acknowledged {number} {id}")),
                Answer::Refused(why) => {
                    eprintln!("{number} was refused: {why}");
                    say(&format!("refused {number}"));
                }
                Answer::Lost(why) if way(number) == Way::Keyed => {
                    eprintln!("{number} got no answer, emitting it again: {why}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
                Answer::Lost(why) => eprintln!("{number} got no answer: {why}"),
            }
            break;
        }
        number += LANES;
    }
}

enum Answer {
    /// It is stored; its id, or 0 if the way it was emitted tells none.
    Stored(i64),
    /// Nothing was stored.
    Refused(String),
    /// It may be stored or not.
    Lost(String),
}

async fn emit(client: &Client, work: &Work) -> Answer {
    let way = way(work.number);
    let emitted = async {
        match way {
            Way::Alone => client.emit(work).await,
            Way::Keyed => {
                let key = format!("work-{}", work.number);
                client.emit(work).idempotency_key(key).await
            }
            Way::Later => client.emit(work).after(Duration::from_secs(1)).await,
            Way::WithRow => {
                let mut tx = client.begin().await.map_err(EmitError::Connect)?;
                sqlx::query("insert into orders (number) values ($1)")
                    .bind(work.number)
                    .execute(&mut *tx)
                    .await
                    .map_err(EmitError::Connect)?;
                tx.emit(work)?;
                tx.commit().await.map(|()| 0)
            }
        }
    };
    match tokio::time::timeout(PATIENCE, emitted).await {
        Err(_) => Answer::Lost(format!("nothing within {PATIENCE:?}")),
        Ok(Ok(id)) => Answer::Stored(id),
        // A key makes a repetition harmless, whatever happened.
        Ok(Err(error)) if way == Way::Keyed => Answer::Lost(text(&error)),
        Ok(Err(error)) if is_certain(&error) => Answer::Refused(text(&error)),
        Ok(Err(error)) => Answer::Lost(text(&error)),
    }
}

/// Whether the error says for certain that nothing was stored.
fn is_certain(error: &EmitError) -> bool {
    !matches!(error, EmitError::Unknown(_))
}

fn text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
