//! The figures of a namespace when the node that collects them loses the database.

use std::time::Duration;

use nexus::Handle;
use nexus_tests::within;

use crate::{
    Test,
    proxy::{Line, Proxy},
    stop,
};

fn tells_figures(node: &Handle) -> bool {
    node.metrics().contains("nexus_group_depth{")
}

fn tells_when(node: &Handle) -> bool {
    node.metrics()
        .contains("nexus_namespace_collected_timestamp_seconds{")
}

async fn until_it(what: &str, is_so: impl Fn() -> bool) {
    within(what, async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn figures_are_not_told_for_longer_than_they_hold() {
    let test = Test::new().await;
    let proxy = Proxy::new(&test.database).await;
    let first = test.app(["has_an_effect"]).database_url(&proxy.url);
    let first = nexus::start(first).await.unwrap();
    let second = nexus::start(test.app(["has_an_effect"])).await.unwrap();
    until_it("the first node tells figures", || tells_figures(&first)).await;
    assert!(!tells_when(&second));

    // The others notice when its heartbeat has been missing for 15 s, and by then it has stopped telling.
    proxy.state.send(Line::Silent).unwrap();
    until_it("the second node tells figures", || tells_figures(&second)).await;
    assert!(!tells_figures(&first));
    // Only when it knew them last.
    assert!(tells_when(&first));

    // Back again, it is the one that started first.
    proxy.state.send(Line::Up).unwrap();
    until_it("the first node tells figures again", || {
        tells_figures(&first)
    })
    .await;
    until_it("the second node does not", || !tells_when(&second)).await;
    stop(first).await;
    stop(second).await;
}

#[tokio::test]
async fn without_the_database_there_are_no_figures_but_when_they_were_known() {
    let test = Test::new().await;
    let proxy = Proxy::new(&test.database).await;
    let node = test.app(["has_an_effect"]).database_url(&proxy.url);
    let node = nexus::start(node).await.unwrap();
    until_it("there are figures", || tells_figures(&node)).await;
    proxy.state.send(Line::Down).unwrap();
    until_it("there are none", || !tells_figures(&node)).await;
    assert!(tells_when(&node));
    proxy.state.send(Line::Up).unwrap();
    until_it("there are figures again", || tells_figures(&node)).await;
    stop(node).await;
}
