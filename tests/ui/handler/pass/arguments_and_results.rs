//! Everything that a handler can take and return.

use nexus::{__private::HANDLERS, FromContext, handler::Context, prelude::*};

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, Event)]
struct Ping {
    number: u32,
}

#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
struct Pong;

struct Db;

/// An argument of the user's own making.
struct Attempt(u32);

impl FromContext for Attempt {
    fn from_context(context: &Context) -> nexus::Result<Self> {
        Ok(Self(Ctx::from_context(context)?.attempt()))
    }
}

#[handler]
async fn takes_the_event(_: Ping) {}

#[handler]
async fn takes_an_envelope(ping: Envelope<Ping>) -> nexus::Result {
    drop(ping);
    Ok(())
}

#[handler]
async fn takes_a_batch(pings: Batch<Ping>, tx: &mut Tx) -> nexus::Result {
    for _ in &pings {
        tx.emit(&Pong)?;
    }
    Ok(())
}

#[handler]
async fn takes_everything(
    Ping { number }: Ping,
    db: State<Db>,
    tx: &mut Tx,
    ctx: Ctx,
    client: Client,
    Attempt(attempt): Attempt,
) -> nexus::Result {
    drop((db, client));
    if ctx.is_last_attempt() && attempt > number {
        tx.emit(&Pong)?;
    }
    Ok(())
}

#[handler]
async fn returns_an_event(_: Ping) -> Emit<Pong> {
    Emit(Pong)
}

#[handler]
async fn may_return_an_event(ping: Ping) -> Option<Emit<Pong>> {
    (ping.number > 0).then_some(Emit(Pong))
}

#[handler]
async fn may_fail_or_return_an_event(_: Ping) -> nexus::Result<Option<Emit<Pong>>> {
    Ok(Some(Emit(Pong)))
}

#[handler]
async fn fails_with_anyhow(_: Ping) -> anyhow::Result<Emit<Pong>> {
    anyhow::bail!("no luck")
}

#[handler]
async fn fails_with_an_error_of_std(_: Ping) -> Result<(), std::io::Error> {
    Ok(())
}

#[handler]
async fn fails_with_text(_: Ping) -> Result<(), String> {
    Err("no luck".to_owned())
}

#[tokio::test]
async fn functions_can_still_be_called() {
    let ping = Ping { number: 1 };
    assert!(may_return_an_event(ping.clone()).await.is_some());
    assert!(fails_with_anyhow(ping).await.is_err());
}

#[test]
fn descriptors_know_what_arguments_need() {
    let find = |name| {
        let found = HANDLERS.iter().find(|handler| handler.name == name);
        *found.expect("the handler is registered")
    };
    assert!(find("takes_a_batch").batch && find("takes_a_batch").uses_tx);
    assert!(!find("takes_an_envelope").batch && !find("takes_an_envelope").uses_tx);
    assert!(find("takes_everything").uses_tx);
}
