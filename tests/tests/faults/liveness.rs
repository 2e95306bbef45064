//! Nodes that are busy, blocked or dead.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use nexus::{
    prelude::*,
    testing::{TestApp, TestDatabase},
};
use nexus_tests::within;

use crate::{Gate, Order, Saw, Test, orders, pass};

/// How often handlers have run.
#[derive(Debug, Clone, Default)]
struct Runs(Arc<AtomicUsize>);

/// Keeps a thread of the async runtime busy for longer than the lease, and lets nothing else run on it.
#[handler]
async fn hogs_a_thread(order: Order, runs: State<Runs>) {
    runs.0.fetch_add(1, Ordering::SeqCst);
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(2_500) {
        // Half of them burn, half of them sleep.
        if order.number % 2 == 0 {
            std::thread::sleep(Duration::from_millis(50));
        } else {
            std::hint::spin_loop();
        }
    }
}

/// Waits at the gate, for as long as it takes.
#[handler(timeout = "1h")]
async fn takes_long(order: Order, saw: State<Saw>, gate: State<Gate>) {
    let _ = saw.send(("takes_long", order.number));
    pass(&gate).await;
}

/// Holds a connection for longer than the lease.
#[handler]
async fn holds_on(_order: Order, runs: State<Runs>, tx: &mut Tx) -> nexus::Result {
    runs.0.fetch_add(1, Ordering::SeqCst);
    sqlx::query("select pg_sleep(4)").execute(&mut **tx).await?;
    Ok(())
}

/// Two nodes with a short lease, of which the first gets all messages before the second is there.
async fn nobody_takes_what_a_busy_node_holds(handler: &'static str, count: i64) {
    let test = Test::new().await;
    let runs = Runs::default();
    let app = || {
        test.app([handler])
            .state(runs.clone())
            .pool_size(4)
            .lease(Duration::from_secs(1))
    };
    // Subscribed before the events are there.
    nexus::start(app()).await.unwrap().shutdown().await;
    let one = nexus::start(app()).await.unwrap();
    test.client().await.emit_all(&orders(count)).await.unwrap();
    let other = app();
    // On threads of its own, so that it is not busy itself.
    let other = std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let app = nexus::start(other).await.unwrap();
            within("all is settled", app.idle()).await.unwrap();
            app.shutdown().await
        })
    });
    within("all is settled", one.idle()).await.unwrap();
    let mut stats = one.shutdown().await;
    stats.extend(
        tokio::task::spawn_blocking(|| other.join().unwrap())
            .await
            .unwrap(),
    );
    assert_eq!(
        runs.0.load(Ordering::SeqCst),
        usize::try_from(count).unwrap(),
        "{stats:?}"
    );
    assert!(stats.iter().all(|stats| stats.lost == 0), "{stats:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_threads_are_all_blocked_loses_no_lease() {
    nobody_takes_what_a_busy_node_holds("hogs_a_thread", 6).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_pool_is_exhausted_loses_no_lease() {
    nobody_takes_what_a_busy_node_holds("holds_on", 9).await;
}

#[tokio::test]
async fn what_a_dead_node_held_runs_again_within_15_s_however_long_its_handler_may_run() {
    let mut test = Test::new().await;
    let database: &TestDatabase = &test.database;
    let app = || {
        App::discover()
            .only(["takes_long"])
            .state(test.sender.clone())
            .state(Arc::clone(&test.gate))
    };
    let one = TestApp::start_on(database, app()).await;
    one.client().emit_all(&orders(3)).await.unwrap();
    for _ in 0..3 {
        within("it runs", test.saw.recv()).await.unwrap();
    }
    let two = TestApp::start_on(database, app()).await;
    one.crash();
    two.advance(Duration::from_secs(15)).await;
    test.gate.add_permits(6);
    for _ in 0..3 {
        within("it runs again", test.saw.recv()).await.unwrap();
    }
    two.settled().await;
    assert_eq!(two.shutdown().await[0].completed, 3);
}
