use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use super::{Point, Sleeper};
use crate::{
    runtime::{Route, attempt::Message, settle::Verdict},
    store::queue::Claimed,
};

/// Nothing: this build has no test kit.
#[derive(Debug, Default)]
pub(crate) struct Points;

#[expect(
    clippy::unused_self,
    clippy::unused_async,
    reason = "what it does with the test kit needs them"
)]
impl Points {
    pub(crate) fn alive(&self) -> CancellationToken {
        CancellationToken::new()
    }

    pub(crate) fn is_migrated(&self) -> bool {
        false
    }

    pub(crate) fn is_watched(&self) -> bool {
        false
    }

    pub(crate) fn has_loops(&self) -> bool {
        true
    }

    pub(crate) async fn while_alive<F: Future>(self: Arc<Self>, work: F) -> Option<F::Output> {
        Some(work.await)
    }

    pub(crate) async fn handling<F: Future>(self: Arc<Self>, _route: &Route, call: F) -> F::Output {
        call.await
    }

    pub(crate) async fn reach(
        &self,
        _point: Point,
        _is_of: impl Fn(&str) -> bool,
    ) -> sqlx::Result<()> {
        Ok(())
    }

    pub(crate) async fn claimed(
        &self,
        _queue: &str,
        _messages: &[Claimed],
        _is_of: impl Fn(&str) -> bool,
    ) -> sqlx::Result<()> {
        Ok(())
    }

    pub(crate) async fn sleep(&self, _sleeper: Sleeper, duration: Duration) {
        tokio::time::sleep(duration).await;
    }

    pub(crate) fn begin(&self, _route: &Route, _messages: &[Message]) {}

    pub(crate) fn decided(&self, _message: &Message, _verdict: &Verdict) {}

    pub(crate) fn committed(&self, _message: &Message) {}

    pub(crate) fn split(&self, _message: &Message, _error: &crate::Error) {}

    pub(crate) fn disturbed(&self, _message: &Message, _why: &str) {}

    pub(crate) fn conflicted(&self, _message: &Message, _error: &crate::Error) {}

    pub(crate) fn lost(&self, _message: &Message) {}
}
