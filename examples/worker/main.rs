//! The original nexus-core's worker: logs each event of a type that the environment names, and emits a heartbeat by the
//! clock.
//!
//! ```sh
//! CORE_WORKER_SCHEDULE='* * * * *' cargo run --example worker
//! ```
//!
//! `example.env` beside the folder lists the variables. Workers of one type share its events; the example `server` takes
//! them in. Three things are better than they were: the heartbeat has a handler; it is one scheduled task however often
//! the worker starts (`worker-heartbeat`, or `worker-heartbeat-<CORE_NODE_ID>` for a node with an id of its own); and it
//! is removed by a start without `CORE_WORKER_SCHEDULE`.

use nexus::{Handle, UntypedHandler, prelude::*};
use nexus_examples::{app, prepare, signalled, variable_of};
use serde_json::{Value, json};

/// What the worker is for. The span around it says which event and attempt it is.
async fn acknowledge(event: Envelope<Value>, _: Ctx) -> nexus::Result {
    tracing::info!(
        producer = event.meta().producer_node_id(),
        "{}: {}",
        event.meta().event_type(),
        event.event()
    );
    Ok(())
}

/// Named for the type, so that workers of different types do not take each other's place.
fn handler(event_type: &str) -> UntypedHandler {
    let name = format!("acknowledge_{}", event_type.replace('.', "_"));
    UntypedHandler::new(event_type, name, acknowledge)
}

/// Makes the scheduled task what the environment says.
async fn schedule_heartbeat(handle: &Handle, heartbeat: &str) -> nexus::Result {
    let client = handle.client();
    let mut name = "worker-heartbeat".to_owned();
    if let Some(id) = variable_of("CORE_NODE_ID") {
        name = format!("{name}-{id}");
    }
    match variable_of("CORE_WORKER_SCHEDULE") {
        Some(expression) => {
            let payload = json!({ "nodeId": variable_of("CORE_NODE_ID") });
            let task = client.schedule_json(&name, &expression, heartbeat, &payload);
            task.await
                .map_err(|error| format!("CORE_WORKER_SCHEDULE is `{expression}`: {error}"))?;
            tracing::info!("task {name} emits {heartbeat}, {expression}");
        }
        None if client.unschedule(&name).await? => tracing::info!("task {name} is removed"),
        None => {}
    }
    Ok(())
}

fn main() -> nexus::Result {
    prepare()?;
    work()
}

#[tokio::main]
async fn work() -> nexus::Result {
    let event_type = variable_of("CORE_WORKER_EVENT").unwrap_or_else(|| "demo.event".to_owned());
    let heartbeat = format!("{event_type}.heartbeat");
    let app = app("worker")
        .handle(handler(&event_type))
        .handle(handler(&heartbeat));
    let handle = nexus::start(app).await?;
    tracing::info!(node = handle.node_id(), "handling {event_type}");
    let fenced = handle.fenced();
    let ended = async {
        schedule_heartbeat(&handle, &heartbeat).await?;
        tokio::select! {
            signalled = signalled() => Ok(signalled?),
            () = fenced => Err("another process has started with this CORE_NODE_ID".into()),
        }
    };
    let ended = ended.await;
    handle.shutdown().await;
    ended
}
