//! A process that dies takes nothing along: its messages run again, their effect happens once, and
//! a message that kills its process is given up without its neighbours.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nexus::{Client, Database, prelude::*, testing::TestDatabase};
use nexus_tests::PATIENCE;

/// As the victim declares it.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "victim.work")]
struct Work {
    number: i64,
    then: String,
}

fn victim(database: &TestDatabase) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_victim"));
    command
        .env("CORE_DATABASE_URL", database.url())
        .env("VICTIM_HANDLERS", "work")
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command
}

/// Waits for a line that the victim prints.
fn wait_for(victim: &mut Child, wanted: &str) {
    let out = victim.stdout.take().expect("the victim's output is piped");
    let found = BufReader::new(out)
        .lines()
        .map_while(Result::ok)
        .any(|line| line == wanted);
    assert!(found, "the victim ended without saying {wanted:?}");
}

async fn prepare(database: &TestDatabase, works: &[(i64, &str)]) -> sqlx::PgPool {
    prepare_for("work", database, works).await
}

async fn prepare_for(
    handler: &str,
    database: &TestDatabase,
    works: &[(i64, &str)],
) -> sqlx::PgPool {
    let pool = database.pool().await;
    sqlx::query("create table effects (number bigint primary key)")
        .execute(&pool)
        .await
        .unwrap();
    // Registers the subscription, so that what is emitted now is delivered later.
    let status = victim(database)
        .env("VICTIM_HANDLERS", handler)
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    let client = Client::connect(
        &Database::from_url(database.url(), "the test").unwrap(),
        "demo",
    )
    .await
    .unwrap();
    let works: Vec<Work> = works
        .iter()
        .map(|(number, then)| Work {
            number: *number,
            then: (*then).to_owned(),
        })
        .collect();
    client.emit_all(&works).await.unwrap();
    pool
}

async fn effects(pool: &sqlx::PgPool) -> Vec<i64> {
    sqlx::query_scalar("select number from effects order by 1")
        .fetch_all(pool)
        .await
        .unwrap()
}

#[tokio::test]
async fn a_killed_process_loses_nothing_and_doubles_nothing() {
    let database = TestDatabase::new().await;
    let works: Vec<(i64, &str)> = (0..20)
        .map(|n| (n, if n == 7 { "hang" } else { "" }))
        .collect();
    let pool = prepare(&database, &works).await;

    let mut killed = victim(&database).env("VICTIM_HANGS", "1").spawn().unwrap();
    wait_for(&mut killed, "working on 7");
    killed.kill().unwrap();
    killed.wait().unwrap();
    // Its transaction was rolled back.
    assert!(!effects(&pool).await.contains(&7));

    let status = victim(&database).stdout(Stdio::null()).status().unwrap();
    assert!(status.success());
    assert_eq!(effects(&pool).await, (0..20).collect::<Vec<i64>>());
    let left: i64 = sqlx::query_scalar("select count(*) from pgmq.q_core_events_demo__victim")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(left, 0);
}

#[tokio::test]
async fn a_message_that_kills_its_process_is_given_up_without_its_neighbours() {
    let database = TestDatabase::new().await;
    let works: Vec<(i64, &str)> = (0..40)
        .map(|n| (n, if n == 11 { "abort" } else { "" }))
        .collect();
    let pool = prepare(&database, &works).await;

    let begun = Instant::now();
    let mut deaths = 0;
    while !victim(&database)
        .stdout(Stdio::null())
        .status()
        .unwrap()
        .success()
    {
        deaths += 1;
        assert!(
            begun.elapsed() < PATIENCE * 3,
            "still dying after {deaths} deaths"
        );
    }
    // Ten leases ended without a verdict. On a machine so busy that a lease of one second ends
    // before it is extended, not each of them is a death. No neighbour was given up for it.
    assert!((2..=10).contains(&deaths), "{deaths} deaths");
    let expected: Vec<i64> = (0..40).filter(|number| *number != 11).collect();
    assert_eq!(effects(&pool).await, expected);
    let letters: Vec<(i64, String, String)> = sqlx::query_as(
        "select (message -> 'originalEvent' -> 'payload' ->> 'number')::bigint, message ->> 'reason', message ->> 'error'
         from pgmq.q_core_events_demo__victim_dlq",
    )
    .fetch_all(&pool)
    .await
    .unwrap();
    assert_eq!(letters.len(), 1, "{letters:?}");
    assert_eq!((letters[0].0, letters[0].1.as_str()), (11, "Abandoned"));
    assert!(letters[0].2.contains("10 times"), "{}", letters[0].2);
}

/// Starts the victim again until it ends by itself; returns how often it died.
fn run_until_it_lives(database: &TestDatabase, handler: &str) -> u32 {
    run_with(database, &[("VICTIM_HANDLERS", handler)])
}

fn run_with(database: &TestDatabase, environment: &[(&str, &str)]) -> u32 {
    let begun = Instant::now();
    let mut deaths = 0;
    loop {
        let mut victim = victim(database);
        let victim = victim
            .envs(environment.iter().copied())
            .stdout(Stdio::null());
        if victim.status().unwrap().success() {
            return deaths;
        }
        deaths += 1;
        assert!(
            begun.elapsed() < PATIENCE * 3,
            "still dying after {deaths} deaths"
        );
    }
}

async fn letters(pool: &sqlx::PgPool) -> Vec<(i64, i64, String)> {
    sqlx::query_as(
        "select msg_id, (message -> 'originalEvent' -> 'payload' ->> 'number')::bigint, message ->> 'reason'
         from pgmq.q_core_events_demo__victim_dlq",
    )
    .fetch_all(pool)
    .await
    .unwrap()
}

#[tokio::test]
async fn a_killer_in_a_batch_is_given_up_and_the_batch_runs() {
    let database = TestDatabase::new().await;
    let works: Vec<(i64, &str)> = (0..30)
        .map(|n| (n, if n == 11 { "abort" } else { "" }))
        .collect();
    let pool = prepare_for("work_together", &database, &works).await;
    // Twice all of them die together; from then on each is run alone, so it is the killer only.
    let deaths = run_until_it_lives(&database, "work_together");
    assert!((2..=10).contains(&deaths), "{deaths} deaths");
    let expected: Vec<i64> = (0..30).filter(|number| *number != 11).collect();
    assert_eq!(effects(&pool).await, expected);
    let letters = letters(&pool).await;
    assert_eq!(letters.len(), 1, "{letters:?}");
    assert_eq!((letters[0].1, letters[0].2.as_str()), (11, "Abandoned"));
}

/// What is claimed by deleting is counted by nobody, so a node that starts after a death claims with leases: others
/// of its slots would meet the killer again before the first one has done anything.
#[tokio::test]
async fn a_killer_far_behind_in_a_backlog_is_given_up_and_the_rest_runs() {
    let database = TestDatabase::new().await;
    let works: Vec<(i64, &str)> = (0..400)
        .map(|n| match n {
            270 => (n, "abort"),
            200..280 => (n, "dawdle"),
            _ => (n, ""),
        })
        .collect();
    let pool = prepare_for("work_side_by_side", &database, &works).await;
    let small_batches = [
        ("VICTIM_HANDLERS", "work_side_by_side"),
        ("CORE_BATCH_SIZE", "10"),
    ];
    let deaths = run_with(&database, &small_batches);
    assert!((2..=11).contains(&deaths), "{deaths} deaths");
    let expected: Vec<i64> = (0..400).filter(|number| *number != 270).collect();
    assert_eq!(effects(&pool).await, expected);
    let letters = letters(&pool).await;
    assert_eq!(letters.len(), 1, "{letters:?}");
    assert_eq!((letters[0].1, letters[0].2.as_str()), (270, "Abandoned"));
}

#[tokio::test]
async fn a_killer_ends_on_two_nodes_and_starts_anew_when_redriven() {
    let database = TestDatabase::new().await;
    let works: Vec<(i64, &str)> = (0..40)
        .map(|n| (n, if n == 11 { "abort" } else { "" }))
        .collect();
    let pool = prepare(&database, &works).await;
    let deaths = std::thread::scope(|scope| {
        let nodes = [(); 2].map(|()| scope.spawn(|| run_until_it_lives(&database, "work")));
        nodes.map(|node| node.join().unwrap()).iter().sum::<u32>()
    });
    assert!((2..=10).contains(&deaths), "{deaths} deaths");
    let expected: Vec<i64> = (0..40).filter(|number| *number != 11).collect();
    assert_eq!(effects(&pool).await, expected);
    let letters = letters(&pool).await;
    assert_eq!(letters.len(), 1, "{letters:?}");
    assert_eq!((letters[0].1, letters[0].2.as_str()), (11, "Abandoned"));

    // Redriven it is claimed alone from the start and has eight lives before it: it kills once more, is not
    // given up for that, and is done by a build in which it is mended.
    let connection = Database::from_url(database.url(), "the test").unwrap();
    let client = Client::connect(&connection, "demo").await.unwrap();
    let redriven = client.redrive("victim", &[letters[0].0]).await.unwrap();
    assert_eq!(redriven.messages, 1);
    let died = victim(&database).stdout(Stdio::null()).status().unwrap();
    assert!(!died.success());
    let mended = victim(&database)
        .env("VICTIM_IS_MENDED", "1")
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(mended.success());
    assert_eq!(effects(&pool).await, (0..40).collect::<Vec<i64>>());
    assert!(self::letters(&pool).await.is_empty());
}

#[tokio::test]
async fn sigterm_stops_gently() {
    let database = TestDatabase::new().await;
    let pool = prepare(&database, &[]).await;
    let mut process = victim(&database).env("VICTIM_STAYS", "1").spawn().unwrap();
    nexus_tests::until("the node registers", || async {
        let nodes: i64 = sqlx::query_scalar("select count(*) from core.nodes")
            .fetch_one(&pool)
            .await
            .unwrap();
        (nodes == 1).then_some(())
    })
    .await;
    let killed = Command::new("kill")
        .arg("-TERM")
        .arg(process.id().to_string())
        .status()
        .unwrap();
    assert!(killed.success());
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = process.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < deadline, "the process did not stop");
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert!(status.success(), "{status}");
    let nodes: i64 = sqlx::query_scalar("select count(*) from core.nodes")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(nodes, 0);
}
