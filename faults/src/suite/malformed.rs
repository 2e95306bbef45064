//! What no program of ours writes is put into queues and headers by hand.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Plan;
use crate::{
    app::Work,
    audit::Ticks,
    cluster::Cluster,
    report::{Outcome, seconds},
    scene::{Node, Scene},
};

pub(super) async fn play(plan: &Plan, cluster: &Cluster) -> anyhow::Result<Outcome> {
    let mut scene = Scene::new(cluster, "malformed").await?;
    let played = script(plan, &mut scene).await;
    Ok(scene.end(played, Ticks::All).await)
}

/// Headers as ours, with some of them replaced; null takes one away.
fn headers(changes: &Value) -> Value {
    let mut headers =
        json!({ "eventId": 0, "eventVersion": 1, "subscription": 1, "handler": "exact" });
    change(&mut headers, changes);
    headers
}

/// An envelope as ours, with some fields replaced; null takes one away.
fn envelope(changes: &Value) -> Value {
    let mut envelope = json!({
        "namespace": "faults", "eventType": "fault.work", "payload": { "number": 1, "takes_ms": 0 },
        "emittedAt": "2026-01-02T03:04:05.678Z", "producerNodeId": "by-hand", "eventVersion": 1,
        "correlationId": "1",
    });
    change(&mut envelope, changes);
    envelope
}

fn change(object: &mut Value, changes: &Value) {
    for (name, value) in changes.as_object().into_iter().flatten() {
        if value.is_null() {
            object
                .as_object_mut()
                .and_then(|object| object.remove(name));
        } else {
            object[name] = value.clone();
        }
    }
}

/// Every kind of malformed message: its body and its headers. Each must end as a dead letter.
fn kinds() -> Vec<(String, Option<Value>)> {
    let mut kinds = Vec::new();
    let mut add = |body: String, headers: Option<Value>| kinds.push((body, headers));
    let whole = || envelope(&json!({})).to_string();
    let ours = || Some(headers(&json!({})));

    // Nothing that could be adopted, and the same with headers as ours.
    for body in [
        "null",
        "true",
        "5",
        "1e300",
        "\"text\"",
        "[]",
        "[1, {}]",
        "{}",
        "\"\"",
        "{\"payload\": {}}",
        "{\"eventType\": null}",
        "{\"eventType\": \"\"}",
        "{\"eventType\": 7}",
        "{\"eventType\": [\"fault.work\"]}",
    ] {
        add(body.to_owned(), None);
        add(body.to_owned(), ours());
    }
    for (field, value) in [
        ("namespace", json!("another")),
        ("namespace", json!({})),
        ("eventVersion", json!(0)),
        ("eventVersion", json!(-1)),
        ("eventVersion", json!(1.5)),
        ("eventVersion", json!("new")),
        ("eventVersion", json!(99_999_999_999_i64)),
        ("emittedAt", json!("tomorrow")),
        ("emittedAt", json!("infinity")),
        ("emittedAt", json!("2026-13-45T99:99:99Z")),
        ("emittedAt", json!([])),
        ("eventType", json!("x".repeat(101))),
        ("key", json!({ "a": 1 })),
        ("correlationId", json!([])),
        ("scheduledTaskId", json!("no uuid")),
    ] {
        add(envelope(&json!({ field: value })).to_string(), None);
    }
    for (field, value) in [
        ("eventType", json!("another.type")),
        ("emittedAt", json!("tomorrow")),
        ("emittedAt", json!(5)),
        ("payload", json!("text")),
        ("payload", json!({})),
        ("payload", json!({ "number": "one", "takes_ms": 0 })),
        ("payload", json!({ "number": 1, "takes_ms": -1 })),
        ("payload", json!([1, 2, 3])),
    ] {
        add(envelope(&json!({ field: value })).to_string(), ours());
    }
    // Without the others it is understood.
    for field in ["eventType", "emittedAt", "payload"] {
        add(envelope(&json!({ field: null })).to_string(), ours());
    }
    for (name, value) in [
        ("eventId", json!("seven")),
        ("eventId", json!(-1.5)),
        ("eventId", json!([])),
        ("eventId", Value::Null),
        ("attempts", json!("many")),
        ("attempts", json!(-1)),
        ("attempts", json!(99_999_999_999_i64)),
        ("errors", json!("none")),
        ("errors", json!([1, 2])),
        ("errors", json!([{ "attempt": "x" }])),
        ("subscription", json!("mine")),
        ("subscription", json!({})),
        ("subscription", Value::Null),
        ("abandoned", json!(10)),
        ("abandoned", json!(-3.5)),
    ] {
        // Null takes it away.
        let mut all = headers(&json!({}));
        if value.is_null() {
            change(&mut all, &json!({ name: null }));
        } else {
            all[name] = value;
        }
        add(whole(), Some(all));
    }
    for handler in ["nobody", "", "exact ", "EXACT", "every_second2"] {
        add(whole(), Some(headers(&json!({ "handler": handler }))));
    }
    // Larger than any message may be, and deeper than any parser goes.
    let large = json!({ "payload": { "number": 1, "takes_ms": 0, "text": "x".repeat(1_200_000) } });
    add(envelope(&large).to_string(), None);
    add(envelope(&large).to_string(), ours());
    let deep = format!("{}{}", "[".repeat(900), "]".repeat(900));
    let body = whole().replace("\"takes_ms\":0", &format!("\"takes_ms\":{deep}"));
    add(body, ours());
    kinds
}

async fn script(plan: &Plan, scene: &mut Scene) -> anyhow::Result<()> {
    for _ in 0..2 {
        scene.add_node(Node::new(plan.lease())).await?;
    }
    scene.ready().await?;
    let mut next = 0;
    // Until caches, plans and connections are there.
    drain(scene, &mut next).await?;
    let alone = drain(scene, &mut next)
        .await?
        .min(drain(scene, &mut next).await?);

    let kinds = kinds();
    let copies = plan.pick(2, 10);
    let mut refused_at_once = 0;
    let mut put = 0_i64;
    for _ in 0..copies {
        for (body, headers) in &kinds {
            // In the first one nobody has the handler of headers as ours.
            for queue in ["core_events_faults", "core_events_faults__small"] {
                let sent = sqlx::query("select pgmq.send($1, $2::jsonb, $3::jsonb)")
                    .bind(queue)
                    .bind(body)
                    .bind(headers.as_ref().map(Value::to_string))
                    .execute(&scene.pool)
                    .await;
                match sent {
                    Ok(_) => put += 1,
                    // The queue itself takes no such header.
                    Err(sqlx::Error::Database(_)) => refused_at_once += 1,
                    Err(error) => return Err(error.into()),
                }
            }
        }
    }
    let begun = Instant::now();
    let beside = drain(scene, &mut next).await?;
    scene.outcome.note(format!(
        "{} kinds, {put} messages; 400 events beside them took {}, {} without them",
        kinds.len(),
        seconds(beside),
        seconds(alone)
    ));
    scene
        .outcome
        .require(beside < alone * 2 + Duration::from_secs(1), || {
            "malformed messages slow the others down".to_owned()
        });
    if refused_at_once > 0 {
        scene.outcome.note(format!(
            "{refused_at_once} could not be put in: the queue refuses such headers"
        ));
    }
    if !plan.is_long {
        // What is for nobody is given up when it has waited for a minute.
        sqlx::raw_sql(
            "update pgmq.q_core_events_faults set enqueued_at = enqueued_at - interval '2 minutes';
             update pgmq.q_core_events_faults__small set enqueued_at = enqueued_at - interval '2 minutes'",
        )
        .execute(&scene.pool)
        .await?;
    }
    // None is left, and each has a reason.
    scene.recover().await?;
    scene.outcome.note(format!(
        "the last one was a dead letter after {}",
        seconds(begun.elapsed())
    ));
    let reasons: Vec<(Option<String>, i64)> = sqlx::query_as(
        "select message ->> 'reason', count(*)
         from (table pgmq.q_core_events_faults_dlq union all table pgmq.q_core_events_faults__small_dlq) q
         where coalesce(headers ->> 'eventId', '0') in ('0', 'seven', '-1.5', '[]')
           and coalesce(message ->> 'error', '') <> ''
         group by 1 order by 1",
    )
    .fetch_all(&scene.pool)
    .await?;
    let total: i64 = reasons.iter().map(|(_, count)| count).sum();
    scene.outcome.note(format!("reasons: {reasons:?}"));
    scene.outcome.require(total == put, || {
        format!("{put} malformed messages became {total} dead letters with a reason")
    });
    Ok(())
}

/// Emits 400 events; how long until all have run.
async fn drain(scene: &mut Scene, next: &mut i64) -> anyhow::Result<Duration> {
    let client = scene.client().await?;
    let works: Vec<Work> = (0..400)
        .map(|index| Work {
            // None that is retried: its backoff would count.
            number: crate::scene::BY_HAND + 50 * (*next + index) + 1,
            takes_ms: 0,
        })
        .collect();
    *next += 400;
    let begun = Instant::now();
    let ids = client.emit_all(&works).await?;
    for (work, id) in works.iter().zip(&ids) {
        scene
            .ledger
            .read(&format!("acknowledged {} {id}", work.number));
    }
    let last = ids.iter().max().copied().unwrap_or_default();
    let first = ids.iter().min().copied().unwrap_or_default();
    loop {
        scene.tend()?;
        let left: i64 = sqlx::query_scalar(
            "select count(*) from pgmq.q_core_events_faults__small
             where headers ->> 'eventId' ~ '^[0-9]+$'
               and (headers ->> 'eventId')::bigint between $1 and $2",
        )
        .bind(first)
        .bind(last)
        .fetch_one(&scene.pool)
        .await?;
        if left == 0 {
            break;
        }
        anyhow::ensure!(
            begun.elapsed() < crate::scene::PATIENCE,
            "{left} events wait"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let took = begun.elapsed();
    client.pool().close().await;
    Ok(took)
}
