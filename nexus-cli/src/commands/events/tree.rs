//! What follows from what, drawn.

use std::{collections::BTreeSet, fmt::Write as _, time::Duration};

use nexus::{
    client::{Delivery, DeliveryState, LoggedEvent},
    jiff::{SignedDuration, Timestamp},
};

use super::type_and_version;
use crate::{
    console::{BAD, BOLD, DIM, GOOD, WARN, cut, safe},
    moments::relative,
    session::Session,
};

/// Events of one chain that are drawn.
const MOST: u32 = 200;

/// The events with the correlation id of this one, oldest first. It is one of them.
pub(super) async fn chain(
    session: &Session,
    event: &LoggedEvent,
    within: Duration,
) -> anyhow::Result<Vec<LoggedEvent>> {
    let client = &session.client;
    let Some(correlation_id) = &event.correlation_id else {
        return Ok(vec![event.clone()]);
    };
    // Mostly it is the id of the event that everything began with.
    let first = match correlation_id.parse() {
        Ok(id) if id != event.event_id => client.event(id).await?,
        _ => None,
    };
    let mut chain = client
        .events()
        .correlation_id(correlation_id)
        .oldest_first();
    let from = first.as_ref().map_or(event.emitted_at, |first| {
        first.emitted_at.min(event.emitted_at)
    });
    if let (false, Ok(within)) = (within.is_zero(), SignedDuration::try_from(within)) {
        // Where nothing says when it began, as long before as after.
        let is_known = first.is_some() || *correlation_id == event.event_id.to_string();
        let from = if is_known {
            Some(from)
        } else {
            from.checked_sub(within).ok()
        };
        if let Some(from) = from {
            chain = chain.since(from);
        }
        if let Ok(until) = event.emitted_at.checked_add(within) {
            chain = chain.until(until);
        }
    }
    let mut events = chain.list(MOST).await?;
    if !events.iter().any(|found| found.event_id == event.event_id) {
        events.push(event.clone());
    }
    if let Some(first) = first
        && !events.iter().any(|found| found.event_id == first.event_id)
    {
        events.insert(0, first);
    }
    Ok(events)
}

/// The chain as a tree, an event a line, and below it its handlers and what followed from it.
pub(super) fn draw(
    chain: &[LoggedEvent],
    deliveries: &[Delivery],
    shown: i64,
    now: Timestamp,
) -> String {
    let mut drawing = Drawing {
        chain,
        deliveries,
        shown,
        now,
        drawn: BTreeSet::new(),
        text: String::new(),
    };
    let ids: BTreeSet<String> = chain
        .iter()
        .map(|event| event.event_id.to_string())
        .collect();
    let is_root = |event: &&LoggedEvent| {
        let cause = event.causation_id.as_ref();
        cause.is_none_or(|cause| !ids.contains(cause))
    };
    for root in chain.iter().filter(is_root) {
        drawing.draw(root, "", "");
    }
    // Who says that it was caused by itself, or in a circle.
    for event in chain {
        drawing.draw(event, "", "");
    }
    if chain.len() >= MOST as usize {
        let _ = writeln!(
            drawing.text,
            "{DIM}… only the first {MOST} are drawn{DIM:#}"
        );
    }
    drawing.text
}

struct Drawing<'a> {
    chain: &'a [LoggedEvent],
    deliveries: &'a [Delivery],
    shown: i64,
    now: Timestamp,
    drawn: BTreeSet<i64>,
    text: String,
}

impl Drawing<'_> {
    fn draw(&mut self, event: &LoggedEvent, first: &str, rest: &str) {
        if !self.drawn.insert(event.event_id) {
            return;
        }
        let style = if event.event_id == self.shown {
            BOLD
        } else {
            DIM
        };
        let _ = writeln!(
            self.text,
            "{first}{style}{} {}{style:#}  {DIM}{}{DIM:#}",
            event.event_id,
            safe(&type_and_version(event)),
            relative(self.now, event.emitted_at)
        );
        let id = event.event_id;
        let deliveries: Vec<_> = self
            .deliveries
            .iter()
            .filter(|delivery| delivery.event_id == id)
            .collect();
        let cause = id.to_string();
        let followers: Vec<_> = self
            .chain
            .iter()
            .filter(|follower| follower.causation_id.as_deref() == Some(&cause))
            .filter(|follower| !self.drawn.contains(&follower.event_id))
            .collect();
        let branches = deliveries.len() + followers.len();
        let prefixes = |index: usize| {
            if index + 1 == branches {
                (format!("{rest}└─ "), format!("{rest}   "))
            } else {
                (format!("{rest}├─ "), format!("{rest}│  "))
            }
        };
        for (index, delivery) in deliveries.iter().enumerate() {
            let (first, rest) = prefixes(index);
            self.draw_delivery(delivery, &first, &rest);
        }
        for (index, follower) in followers.iter().enumerate() {
            let (first, rest) = prefixes(deliveries.len() + index);
            self.draw(follower, &first, &rest);
        }
    }

    fn draw_delivery(&mut self, delivery: &Delivery, first: &str, rest: &str) {
        let now = self.now;
        let (style, state) = match &delivery.state {
            DeliveryState::Ready { since } => (
                WARN,
                format!("waits for a node since {}", relative(now, *since)),
            ),
            DeliveryState::Running { .. } => (
                GOOD,
                format!("attempt {} is running", delivery.attempts + 1),
            ),
            DeliveryState::Waiting { until } => (
                WARN,
                format!(
                    "attempt {} is due {}",
                    delivery.attempts + 1,
                    relative(now, *until)
                ),
            ),
            DeliveryState::DeadLetter {
                id,
                reason,
                failed_at,
                ..
            } => (
                BAD,
                format!("dead letter {id}, {}: {reason}", relative(now, *failed_at)),
            ),
            DeliveryState::Done => (GOOD, "done".to_owned()),
            DeliveryState::NotSent => (DIM, "was not sent".to_owned()),
            _ => (DIM, "?".to_owned()),
        };
        let _ = writeln!(
            self.text,
            "{first}{}/{}: {style}{}{style:#}",
            safe(&delivery.group),
            safe(&delivery.handler),
            safe(&state)
        );
        for error in &delivery.errors {
            let _ = writeln!(
                self.text,
                "{rest}attempt {}: {}  {DIM}{}{DIM:#}",
                error.attempt,
                cut(&safe(&error.error), 120),
                safe(&error.at)
            );
        }
    }
}
