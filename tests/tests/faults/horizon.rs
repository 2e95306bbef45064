//! Whoever keeps the server from cleaning up is named.

use nexus_tests::until;
use sqlx::{ConnectOptions, Connection, PgConnection, postgres::PgConnectOptions};

use crate::{Test, failover::warnings, order, stop};

const CULPRIT: &str = "a report that takes all day";

/// Holds a snapshot from now on.
async fn hold_a_snapshot(test: &Test) -> (PgConnection, i32) {
    let options: PgConnectOptions = test.database.url().parse().unwrap();
    let mut culprit = options.application_name(CULPRIT).connect().await.unwrap();
    sqlx::raw_sql("begin isolation level repeatable read; select 1")
        .execute(&mut culprit)
        .await
        .unwrap();
    let pid = sqlx::query_scalar("select pg_backend_pid()")
        .fetch_one(&mut culprit)
        .await
        .unwrap();
    (culprit, pid)
}

#[tokio::test]
async fn whoever_holds_a_snapshot_for_long_is_named_and_work_goes_on() {
    let mut test = Test::new().await;
    let (warnings, _guard) = warnings();
    let (culprit, pid) = hold_a_snapshot(&test).await;
    let app = nexus::start(test.app(["gated"])).await.unwrap();
    let client = app.client();
    let holder = until("the holder is found", || async {
        let holder = client.xmin_holder().await.unwrap();
        holder.filter(|holder| holder.name == CULPRIT)
    })
    .await;
    assert_eq!((holder.kind.as_str(), holder.pid), ("session", Some(pid)));
    assert_eq!(holder.state.as_deref(), Some("idle in transaction"));
    assert!(holder.age.is_some(), "{holder:?}");
    until("the log names it", || async {
        (warnings.of("somebody keeps PostgreSQL from cleaning up") > 0).then_some(())
    })
    .await;
    test.gate.add_permits(1);
    client.emit(&order(1, "")).await.unwrap();
    assert_eq!(test.next().await, ("gated", 1));
    culprit.close().await.unwrap();
    until("nobody holds one", || async {
        let holder = client.xmin_holder().await.unwrap();
        holder
            .is_none_or(|holder| holder.name != CULPRIT)
            .then_some(())
    })
    .await;
    stop(app).await;
}
