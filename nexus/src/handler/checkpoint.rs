#[cfg(feature = "testing")]
use std::sync::Arc;

#[cfg(feature = "testing")]
use futures_util::future::BoxFuture;

use super::Result;

/// Names a place in a handler at which a test may let it fail, panic, or its node crash.
///
/// Does nothing until a test arms the name (`testing::TestApp::fail_at` and its like). Without feature
/// `testing` it is nothing at all. It works in the handler's own task; in a task that the handler
/// spawns it does nothing.
///
/// # Examples
///
/// ```
/// # use nexus::prelude::*;
/// # #[derive(Serialize, Deserialize, JsonSchema, Event)]
/// # struct OrderPlaced { order_id: i64 }
/// #[handler]
/// async fn charge(order: OrderPlaced) -> nexus::Result {
///     // … charge the card …
///     nexus::checkpoint("charged").await?;
///     // … send the receipt …
///     Ok(())
/// }
/// ```
///
/// # Errors
///
/// Only what a test has asked for; another attempt follows.
pub async fn checkpoint(name: &str) -> Result {
    #[cfg(feature = "testing")]
    if let Ok(checkpoints) = CHECKPOINTS.try_with(Arc::clone) {
        return checkpoints.reached(name).await;
    }
    let _ = name;
    Ok(())
}

/// Who hears of the checkpoints of a running handler.
#[cfg(feature = "testing")]
pub(crate) trait Checkpoints: Send + Sync {
    fn reached<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result>;
}

#[cfg(feature = "testing")]
tokio::task_local! {
    pub(crate) static CHECKPOINTS: Arc<dyn Checkpoints>;
}
