//! The generated code is silent under the strictest lints.

#![forbid(unsafe_code)]
#![deny(
    warnings,
    missing_docs,
    unreachable_pub,
    unused,
    unused_qualifications,
    unused_results
)]
#![deny(
    missing_debug_implementations,
    single_use_lifetimes,
    let_underscore_drop,
    deprecated
)]
#![deny(clippy::all, clippy::pedantic, clippy::nursery, clippy::cargo)]

use nexus::prelude::*;

/// A user has signed up.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "strict.user_created", key = user_id)]
pub struct UserCreated {
    /// Who.
    pub user_id: u64,
}

/// What happened to an order.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "strict.order", key = id)]
pub enum Order {
    /// It was placed.
    Placed {
        /// Which.
        id: u64,
    },
}

/// Greets.
///
/// # Errors
///
/// Never.
#[handler(
    group = "strict",
    max_attempts = 5,
    backoff = "exponential(1s..10m)",
    timeout = "30s"
)]
pub async fn greet_strictly(event: UserCreated, tx: &mut Tx) -> nexus::Result<Emit<Order>> {
    let _ = tx.emit(&event)?;
    Ok(Emit(Order::Placed { id: event.user_id }))
}

/// What the function may do, its descriptor may do as well.
#[handler]
#[expect(deprecated, reason = "the limits are replaced in the next release")]
pub async fn takes_what_is_deprecated(event: UserCreated, limits: State<old::Limits>) {
    drop((event, limits));
}

/// Cleans up.
#[cron("@hourly")]
pub async fn clean_up_strictly() {}

/// What is on its way out.
pub mod old {
    /// How much is allowed.
    #[derive(Debug)]
    #[deprecated = "use the quota"]
    pub struct Limits;
}
