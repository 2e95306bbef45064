//! What nexus itself does with a message, without a database.
//!
//! `cargo bench -p nexus-benches --bench micro`

use std::hint::black_box;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use nexus::{
    __private::{decode_message, encode_payload, next_tick},
    jiff::Timestamp,
    prelude::*,
};

/// About as large as most events are: 200 bytes of JSON.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "order.placed")]
struct OrderPlaced {
    order_id: u64,
    customer: String,
    lines: Vec<Line>,
}

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
struct Line {
    sku: String,
    count: u32,
}

fn order() -> OrderPlaced {
    OrderPlaced {
        order_id: 4_711,
        customer: "ada@example.com".to_owned(),
        lines: (1..=4)
            .map(|count| Line {
                sku: format!("sku-{count:06}"),
                count,
            })
            .collect(),
    }
}

const HEADERS: &str =
    r#"{"eventId": 4711, "handler": "ship_order", "eventVersion": 1, "subscription": 7}"#;

fn body(payload: &str) -> String {
    format!(
        r#"{{"payload": {payload}, "eventType": "order.placed", "namespace": "shop", "emittedAt": "2026-03-29T01:00:00.123456Z",
           "eventVersion": 1, "correlationId": "4711", "producerNodeId": "shop-7f3a-1"}}"#
    )
}

fn messages(criterion: &mut Criterion) {
    let order = order();
    let payload = serde_json::to_string(&order).expect("it is plain data");
    let body = body(&payload);
    criterion.bench_function("encode an event", |bencher| {
        bencher.iter(|| encode_payload(black_box(&order), 1024 * 1024));
    });
    criterion.bench_function("decode a message", |bencher| {
        bencher.iter(|| decode_message::<OrderPlaced>(black_box(HEADERS), black_box(&body)));
    });
}

fn schedules(criterion: &mut Criterion) {
    let after: Timestamp = "2026-03-28T23:59:30Z".parse().expect("it is a time");
    for (expression, time_zone) in [
        ("*/5 * * * *", "UTC"),
        ("30 2 * * *", "Europe/Berlin"),
        ("0 9 29 2 MON", "America/New_York"),
    ] {
        let next = next_tick(expression, time_zone).expect("it can be read");
        criterion.bench_function(
            &format!("next tick of `{expression}` in {time_zone}"),
            |bencher| {
                bencher.iter(|| next(black_box(after)));
            },
        );
    }
}

/// A hundred handlers, as a program has that was not cut yet.
macro_rules! handlers {
    ($($name:ident)*) => {
        $(#[handler]
        async fn $name(_order: OrderPlaced) {})*
    };
}

handlers! {
    h00 h01 h02 h03 h04 h05 h06 h07 h08 h09 h10 h11 h12 h13 h14 h15 h16 h17 h18 h19 h20 h21 h22 h23 h24
    h25 h26 h27 h28 h29 h30 h31 h32 h33 h34 h35 h36 h37 h38 h39 h40 h41 h42 h43 h44 h45 h46 h47 h48 h49
    h50 h51 h52 h53 h54 h55 h56 h57 h58 h59 h60 h61 h62 h63 h64 h65 h66 h67 h68 h69 h70 h71 h72 h73 h74
    h75 h76 h77 h78 h79 h80 h81 h82 h83 h84 h85 h86 h87 h88 h89 h90 h91 h92 h93 h94 h95 h96 h97 h98 h99
}

fn routes(criterion: &mut Criterion) {
    criterion.bench_function("collect and check 100 handlers", |bencher| {
        bencher.iter_batched(App::discover, |app| app.describe(), BatchSize::SmallInput);
    });
}

criterion_group!(micro, messages, schedules, routes);
criterion_main!(micro);
