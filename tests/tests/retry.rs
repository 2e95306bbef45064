//! How an attempt ends: retried with backoff, put off, dead-lettered with its history, redriven; a
//! panic or a timeout is a failed attempt and takes nobody along.

use std::{sync::Arc, time::Duration};

use nexus::{
    prelude::*,
    testing::{TestApp, TestDatabase},
};
use nexus_tests::within;
use tokio::sync::mpsc;

/// An order to a handler to behave in some way.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "test.command")]
struct Command {
    number: u32,
    say: String,
}

fn command_again(number: u32) -> Command {
    command(number + 100, "")
}

fn command(number: u32, say: &str) -> Command {
    Command {
        number,
        say: say.to_owned(),
    }
}

type Saw = mpsc::UnboundedSender<(u32, u32)>;

/// Behaves as told; `mended` makes what fails succeed.
#[handler(max_attempts = 3, backoff = "fixed(50ms)", timeout = "500ms")]
async fn obey(
    command: Envelope<Command>,
    ctx: Ctx,
    saw: State<Saw>,
    mended: State<Arc<std::sync::atomic::AtomicBool>>,
) -> nexus::Result {
    let _ = saw.send((command.number, ctx.attempt()));
    if mended.load(std::sync::atomic::Ordering::Relaxed) {
        return Ok(());
    }
    let first = ctx.attempt() == 1;
    match command.say.as_str() {
        "fail once" if first => Err("failed once".into()),
        "fail" => Err(format!("failure {}", ctx.attempt()).into()),
        "panic once" if first => panic!("did not expect this"),
        "hang once" if first => std::future::pending().await,
        "give up" => Err(Error::permanent("no use")),
        "not now" if first && command.meta().redelivery_count() < 3 => {
            Err(Error::snooze(Duration::from_millis(20)))
        }
        _ => Ok(()),
    }
}

/// The same with a transaction that hangs in SQL.
#[handler(max_attempts = 2, backoff = "fixed(10ms)", timeout = "300ms")]
async fn obey_in_sql(command: Envelope<Command>, tx: &mut Tx) -> nexus::Result {
    sqlx::query("insert into effects values ($1)")
        .bind(i64::from(command.number))
        .execute(&mut **tx)
        .await?;
    if command.say == "hang in sql" && command.attempt() == 1 {
        sqlx::query("select pg_sleep(60)")
            .execute(&mut **tx)
            .await?;
    }
    if command.say == "swallow an error" && command.attempt() == 1 {
        // The transaction is aborted now, whatever the handler returns.
        let _ = sqlx::query("select 1/0").execute(&mut **tx).await;
    }
    if command.say == "divide" {
        let divided = sqlx::query("select 1/0").execute(&mut *tx).await;
        return Err(Error::permanent(Wrapped(divided.unwrap_err())));
    }
    if command.say == "commit by hand" {
        sqlx::query("commit").execute(&mut **tx).await?;
    }
    if command.say == "commit by hand and emit" {
        tx.emit(&command_again(command.number))?;
        sqlx::raw_sql("commit; begin").execute(&mut **tx).await?;
    }
    Ok(())
}

/// An error of a library, which shows its source itself.
#[derive(Debug)]
struct Wrapped(sqlx::Error);

impl std::fmt::Display for Wrapped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "no share ({}) for anybody", self.0)
    }
}

impl std::error::Error for Wrapped {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}

/// Takes many at once and chokes on one of them.
#[handler(max_attempts = 2, backoff = "fixed(10ms)", concurrency = 1)]
async fn gulp(commands: Batch<Command>, tx: &mut Tx, saw: State<Saw>) -> nexus::Result {
    assert!(!commands.is_empty());
    let _ = saw.send((u32::try_from(commands.len())?, 0));
    let numbers: Vec<i64> = commands
        .iter()
        .map(|command| command.number.into())
        .collect();
    sqlx::query("insert into effects select unnest($1::bigint[])")
        .bind(&numbers)
        .execute(&mut **tx)
        .await?;
    match commands.iter().find(|command| command.say == "choke") {
        Some(command) => Err(format!("choked on {}", command.number).into()),
        None => Ok(()),
    }
}

struct Test {
    app: TestApp,
    saw: mpsc::UnboundedReceiver<(u32, u32)>,
    mended: Arc<std::sync::atomic::AtomicBool>,
}

impl Test {
    async fn new(handler: &str) -> Self {
        let database = TestDatabase::new().await;
        sqlx::query("create table effects (number bigint)")
            .execute(&database.pool().await)
            .await
            .unwrap();
        let (sender, saw) = mpsc::unbounded_channel();
        let mended = Arc::default();
        let app = App::discover()
            .only([handler])
            .state::<Saw>(sender)
            .state(Arc::clone(&mended));
        let app = TestApp::start_on(&database, app).await;
        Self { app, saw, mended }
    }

    async fn emit(&self, commands: &[Command]) {
        self.app.client().emit_all(commands).await.unwrap();
    }

    async fn idle(&self) {
        self.app.drained().await;
    }

    async fn letters(&self) -> Vec<nexus::client::DeadLetter> {
        self.app.dead_letters().await
    }

    /// (completed, retried, snoozed, dead-lettered)
    fn counts(&self) -> (u64, u64, u64, u64) {
        let stats = &self.app.stats()[0];
        (
            stats.completed,
            stats.retried,
            stats.snoozed,
            stats.dead_lettered,
        )
    }

    async fn effects(&self) -> Vec<i64> {
        sqlx::query_scalar("select number from effects order by 1")
            .fetch_all(self.app.pool())
            .await
            .unwrap()
    }
}

#[tokio::test]
async fn retries_errors_panics_and_timeouts() {
    let test = Test::new("obey").await;
    test.emit(&[
        command(1, "fail once"),
        command(2, "panic once"),
        command(3, "hang once"),
    ])
    .await;
    test.idle().await;
    assert_eq!(test.counts(), (3, 3, 0, 0));
    assert!(test.letters().await.is_empty());
}

#[tokio::test]
async fn waits_for_the_backoff_by_the_clock_of_the_database() {
    /// Fails, and is not tried again for an hour.
    #[handler(backoff = "fixed(1h)")]
    async fn patient(command: Envelope<Command>, saw: State<Saw>) -> nexus::Result {
        let _ = saw.send((command.number, command.attempt()));
        if command.attempt() == 1 {
            Err("once".into())
        } else {
            Ok(())
        }
    }

    let mut test = Test::new("patient").await;
    test.emit(&[command(1, "")]).await;
    assert_eq!(within("it runs", test.saw.recv()).await, Some((1, 1)));
    let pool = test.app.pool();
    nexus_tests::until("the retry is stored", || async {
        let minutes: Option<i32> = sqlx::query_scalar(
            "select (extract(epoch from vt - core.now()) / 60)::int from pgmq.q_core_events_demo
             where headers ? 'settled'",
        )
        .fetch_optional(pool)
        .await
        .unwrap();
        // An hour with a jitter of a fifth.
        minutes.map(|minutes| assert!((48..=72).contains(&minutes), "{minutes}"))
    })
    .await;
    test.app.advance(Duration::from_mins(73)).await;
    assert_eq!(within("it runs again", test.saw.recv()).await, Some((1, 2)));
    test.idle().await;
}

#[tokio::test]
async fn dead_letters_hold_the_history_and_can_be_redriven() {
    let mut test = Test::new("obey").await;
    test.emit(&[command(1, "fail"), command(2, "give up")])
        .await;
    test.idle().await;
    assert_eq!(test.counts(), (0, 2, 0, 2));

    let letters = test.letters().await;
    let exhausted = letters.iter().find(|letter| letter.attempts == 3).unwrap();
    assert_eq!(exhausted.reason, "Attempts exhausted");
    assert_eq!(exhausted.handler.as_deref(), Some("obey"));
    assert_eq!(exhausted.error.as_deref(), Some("failure 3"));
    let errors: Vec<(u32, &str)> = exhausted
        .errors
        .iter()
        .map(|error| (error.attempt, error.error.as_str()))
        .collect();
    assert_eq!(
        errors,
        [(1, "failure 1"), (2, "failure 2"), (3, "failure 3")]
    );
    assert_eq!(exhausted.original["payload"]["number"], 1);
    let permanent = letters.iter().find(|letter| letter.attempts == 1).unwrap();
    assert_eq!(
        (permanent.reason.as_str(), permanent.error.as_deref()),
        ("Permanent error", Some("no use"))
    );

    while test.saw.try_recv().is_ok() {}
    test.mended
        .store(true, std::sync::atomic::Ordering::Relaxed);
    let ids: Vec<i64> = letters.iter().map(|letter| letter.id).collect();
    let redriven = test.app.client().redrive("default", &ids).await.unwrap();
    assert_eq!((redriven.messages, redriven.missing), (2, 0));
    test.idle().await;
    // Redriven messages have all their attempts before them.
    let mut again = [
        test.saw.recv().await.unwrap(),
        test.saw.recv().await.unwrap(),
    ];
    again.sort_unstable();
    assert_eq!(again, [(1, 1), (2, 1)]);
    assert!(test.letters().await.is_empty());
    let redriven = test.app.client().redrive("default", &ids).await.unwrap();
    assert_eq!((redriven.messages, redriven.missing), (0, 2));
    let error = test.app.client().dead_letters("nobody", 1).await;
    assert_eq!(
        error.unwrap_err().to_string(),
        "namespace `demo` has no group `nobody`; it has default"
    );
}

#[tokio::test]
async fn an_error_of_the_server_is_stored_without_the_line_of_the_servers_source() {
    let test = Test::new("obey_in_sql").await;
    test.emit(&[command(1, "divide")]).await;
    test.idle().await;
    let letter = test.app.only_dead_letter().await;
    let said = "error returned from database: division by zero";
    assert_eq!(
        letter.error.unwrap(),
        format!("no share ({said}) for anybody: {said}")
    );
}

#[tokio::test]
async fn a_snooze_counts_as_no_attempt() {
    let test = Test::new("obey").await;
    test.emit(&[command(1, "not now")]).await;
    test.idle().await;
    assert_eq!(test.counts(), (1, 0, 2, 0));
}

#[tokio::test]
async fn a_timeout_rolls_back_and_stops_the_statement() {
    let test = Test::new("obey_in_sql").await;
    test.emit(&[
        command(1, "hang in sql"),
        command(2, "swallow an error"),
        command(3, ""),
    ])
    .await;
    test.idle().await;
    assert_eq!(test.effects().await, [1, 2, 3]);
    let pool = test.app.pool();
    nexus_tests::until("the server stops the statement", || async {
        let running: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity
             where datname = current_database() and query like '%pg_sleep(60)%' and pid <> pg_backend_pid()
               and state = 'active'",
        )
        .fetch_one(pool)
        .await
        .unwrap();
        (running == 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_handler_that_commits_by_hand_is_found_out() {
    let test = Test::new("obey_in_sql").await;
    let commands = [
        command(1, "commit by hand"),
        command(2, "commit by hand and emit"),
        command(3, ""),
    ];
    test.emit(&commands).await;
    test.idle().await;
    // Its effect is there, once; what it emitted is not, for the message was not completed.
    assert_eq!(test.effects().await, [1, 2, 3]);
    assert_eq!(test.counts(), (1, 0, 0, 2));
    for letter in test.letters().await {
        assert_eq!(
            (letter.attempts, letter.reason.as_str()),
            (1, "Permanent error")
        );
        let error = letter.error.unwrap();
        assert!(
            error.contains("ended its transaction by a statement of its own"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_batch_is_one_call_and_one_transaction() {
    let mut test = Test::new("gulp").await;
    test.emit(
        &(0..100)
            .map(|number| command(number, ""))
            .collect::<Vec<_>>(),
    )
    .await;
    test.idle().await;
    assert_eq!(test.effects().await, (0..100).collect::<Vec<i64>>());
    assert_eq!(test.counts(), (100, 0, 0, 0));
    let mut calls = 0;
    while let Ok((size, _)) = test.saw.try_recv() {
        assert!(size <= 100);
        calls += 1;
    }
    assert!(calls < 20, "{calls} calls for 100 messages");
}

#[tokio::test]
async fn a_bad_item_of_a_batch_ends_up_alone() {
    let test = Test::new("gulp").await;
    let commands: Vec<Command> = (0..50)
        .map(|number| command(number, if number == 17 { "choke" } else { "" }))
        .collect();
    test.emit(&commands).await;
    test.idle().await;
    // Everything but the bad item has its effect, once.
    let expected: Vec<i64> = (0..50).filter(|number| *number != 17).collect();
    assert_eq!(test.effects().await, expected);
    let letters = test.letters().await;
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].error.as_deref(), Some("choked on 17"));
    assert_eq!(letters[0].attempts, 2);
}

#[tokio::test]
async fn items_that_do_not_decode_leave_the_batch() {
    let test = Test::new("gulp").await;
    let pool = test.app.pool();
    test.emit(&[command(1, ""), command(2, "")]).await;
    sqlx::query(
        "select core.emit('demo', 'test.command', '{\"number\": \"three\", \"say\": \"\"}')",
    )
    .execute(pool)
    .await
    .unwrap();
    test.emit(&[command(4, "")]).await;
    test.idle().await;
    assert_eq!(test.effects().await, [1, 2, 4]);
    let letters = test.letters().await;
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].reason, "Undecodable payload");
    let error = letters[0].error.as_deref().unwrap();
    assert!(
        error.contains("at `number`") && error.contains("test.command"),
        "{error}"
    );
}
