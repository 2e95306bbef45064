//! Counts what was lost and doubled.
//!
//! What must be there follows from what the emitters said ([`Ledger`]) and from the log:
//!
//! - an acknowledged emit is in the log once, with the id it was acknowledged with; a refused one is not;
//!   one without an answer is there once or not at all,
//! - the emitter's own row is there if the event of the same transaction is, and only then,
//! - each event has one effect of each exactly-once handler of its type, and at least one of the other,
//! - an event that a handler emits is there once for each event it handled,
//! - given up is what has to be, once, and nothing else,
//! - each tick is one event with one effect; without a gap if no tick may be missing.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use sqlx::PgPool;

use crate::{
    app::{CRON, EXACTLY_ONCE, Fate, fate},
    emitter::{Way, way},
    ledger::{Fact, Ledger},
    report::Outcome,
    scene::BY_HAND,
};

/// Which due times must have been fired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ticks {
    /// Every one between a task's first and last.
    All,
    /// Those of a task may pause, because no live build declared it.
    MayPause,
}

/// So many cases of one kind are shown.
const SHOWN: usize = 5;

/// What is there, by event.
struct Found {
    /// Number of each work.
    work: BTreeMap<i64, i64>,
    /// Ids of what a handler emitted for an event, by type and the event's id.
    caused: HashMap<(&'static str, i64), Vec<i64>>,
    /// Effects by handler and event.
    effects: HashMap<(String, i64), u64>,
    orders: BTreeMap<i64, u64>,
    /// Dead letters: handler, event and why.
    letters: Vec<(Option<String>, Option<i64>, String)>,
}

const CAUSED: [(&str, &str); 2] = [("fault.followed", "follow"), ("fault.sided", "side")];

pub(crate) async fn count(
    pool: &PgPool,
    ledger: &Ledger,
    ticks: Ticks,
    outcome: &mut Outcome,
) -> anyhow::Result<()> {
    let found = find(pool).await?;
    count_emits(&found, ledger, outcome);
    count_effects(&found, outcome);
    count_letters(&found, outcome);
    count_ticks(pool, &found, ticks, outcome).await?;
    Ok(())
}

async fn find(pool: &PgPool) -> anyhow::Result<Found> {
    let work: Vec<(i64, i64)> = sqlx::query_as(
        "select event_id, (payload ->> 'number')::bigint from core.event_log where event_type = 'fault.work'",
    )
    .fetch_all(pool)
    .await?;
    let mut caused: HashMap<(&'static str, i64), Vec<i64>> = HashMap::new();
    for (event_type, _) in CAUSED {
        let rows: Vec<(i64, i64)> = sqlx::query_as(
            "select causation_id::bigint, event_id from core.event_log where event_type = $1",
        )
        .bind(event_type)
        .fetch_all(pool)
        .await?;
        for (cause, id) in rows {
            caused.entry((event_type, cause)).or_default().push(id);
        }
    }
    let effects: Vec<(String, i64, i64)> =
        sqlx::query_as("select handler, event_id, count(*) from effects group by 1, 2")
            .fetch_all(pool)
            .await?;
    let orders: Vec<(i64, i64)> = sqlx::query_as("select number, count(*) from orders group by 1")
        .fetch_all(pool)
        .await?;
    let letters = sqlx::query_as(
        "select headers ->> 'handler',
                case when headers ->> 'eventId' ~ '^-?[0-9]+$' then (headers ->> 'eventId')::bigint end,
                concat(message ->> 'reason', ': ', message ->> 'error')
         from (table pgmq.q_core_events_faults_dlq union all table pgmq.q_core_events_faults__small_dlq) q",
    )
    .fetch_all(pool)
    .await?;
    Ok(Found {
        work: work.into_iter().collect(),
        caused,
        effects: effects
            .into_iter()
            .map(|(handler, id, count)| ((handler, id), count.unsigned_abs()))
            .collect(),
        orders: orders
            .into_iter()
            .map(|(number, count)| (number, count.unsigned_abs()))
            .collect(),
        letters,
    })
}

/// Collects cases of one kind, and shows the first few.
struct Cases(&'static str, Vec<String>);

impl Cases {
    fn new(what: &'static str) -> Self {
        Self(what, Vec::new())
    }

    fn push(&mut self, case: impl Into<String>) {
        self.1.push(case.into());
    }

    fn report(self, outcome: &mut Outcome) -> u64 {
        let count = self.1.len();
        if count > 0 {
            let shown = self.1[..count.min(SHOWN)].join(", ");
            outcome.violation(format!("{count} × {}: {shown}", self.0));
        }
        count as u64
    }
}

fn count_emits(found: &Found, ledger: &Ledger, outcome: &mut Outcome) {
    let mut rows: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
    for (id, number) in &found.work {
        rows.entry(*number).or_default().push(*id);
    }
    let facts = ledger.facts();
    let mut missing = Cases::new("acknowledged and not in the log");
    let mut twice = Cases::new("in the log more than once");
    let mut other = Cases::new("in the log under another id than was acknowledged");
    let mut refused = Cases::new("reported as not stored, and in the log");
    let mut torn =
        Cases::new("an event without the emitter's row of its transaction, or the reverse");
    let (mut unknown, mut stored) = (0_u64, 0_u64);
    for (number, fact) in &facts {
        let ids = rows.get(number).map_or(&[][..], Vec::as_slice);
        if ids.len() > 1 {
            twice.push(number.to_string());
        }
        match fact {
            Fact::Acknowledged(_) if ids.is_empty() => missing.push(number.to_string()),
            Fact::Acknowledged(id) if *id != 0 && !ids.contains(id) => {
                other.push(number.to_string());
            }
            Fact::Refused if !ids.is_empty() => refused.push(number.to_string()),
            Fact::Acknowledged(_) | Fact::Refused => {}
            Fact::Unknown => {
                unknown += 1;
                stored += u64::from(!ids.is_empty());
            }
        }
        let orders = found.orders.get(number).copied().unwrap_or_default();
        let must_have = *number < BY_HAND && way(*number) == Way::WithRow;
        if orders != if must_have { ids.len() as u64 } else { 0 } {
            torn.push(number.to_string());
        }
    }
    let strangers = rows.keys().filter(|number| !facts.contains_key(number));
    let mut unheard = Cases::new("in the log and never sent");
    strangers.for_each(|number| unheard.push(number.to_string()));
    outcome.emitted += found.work.len() as u64;
    outcome.lost += missing.report(outcome);
    outcome.doubled += twice.report(outcome);
    for cases in [other, refused, torn, unheard] {
        cases.report(outcome);
    }
    if unknown > 0 {
        outcome.note(format!(
            "emits that got no answer: {unknown}, of which {stored} are stored"
        ));
    }
    let refused = facts.values().filter(|fact| **fact == Fact::Refused);
    let refused = refused.count();
    if refused > 0 {
        outcome.note(format!("emits that were refused with an error: {refused}"));
    }
}

fn count_effects(found: &Found, outcome: &mut Outcome) {
    let mut missing = Cases::new("without its effect");
    let mut twice = Cases::new("with more than one effect");
    let mut rolled_back = Cases::new("given up, and its effect is there");
    let mut uncaused = Cases::new("handled without the event that its handler emits");
    let mut caused_twice =
        Cases::new("handled, and the event that its handler emits is there twice");
    let of = |handler: &str, id: i64| {
        let key = (handler.to_owned(), id);
        found.effects.get(&key).copied().unwrap_or_default()
    };
    let mut once = |handler: &str, id: i64, outcome: &mut Outcome| {
        let count = of(handler, id);
        outcome.effects += count;
        match count {
            0 => missing.push(format!("{handler} of {id}")),
            1 => {}
            _ => twice.push(format!("{handler} of {id} ({count})")),
        }
    };
    let mut unseen = Cases::new("never seen by the at-least-once handler");
    for (&id, &number) in &found.work {
        let is_given_up = fate(number) == Fate::IsGivenUp;
        if is_given_up && of("exact", id) > 0 {
            rolled_back.push(id.to_string());
        }
        if !is_given_up {
            once("exact", id, outcome);
        }
        once("together", id, outcome);
        match of("plain", id) {
            0 => unseen.push(id.to_string()),
            count => outcome.again += count - 1,
        }
        for (event_type, handler) in CAUSED {
            let none = Vec::new();
            let caused = found.caused.get(&(event_type, id)).unwrap_or(&none);
            let expected = usize::from(handler == "side" || !is_given_up);
            if caused.len() < expected {
                uncaused.push(format!("{event_type} of {id}"));
            } else if caused.len() > expected {
                caused_twice.push(format!("{event_type} of {id}"));
            }
            for &id in caused {
                once(handler, id, outcome);
            }
        }
    }
    outcome.lost += missing.report(outcome) + unseen.report(outcome) + uncaused.report(outcome);
    outcome.doubled += twice.report(outcome) + caused_twice.report(outcome);
    rolled_back.report(outcome);

    // Effects of what is not in the log: the log has lost something, or was never told.
    let known: BTreeSet<i64> = found
        .work
        .keys()
        .chain(found.caused.values().flatten())
        .copied()
        .collect();
    let mut ghosts = Cases::new("an effect of an event that is not in the log");
    for (handler, id) in found.effects.keys() {
        let is_of_work = EXACTLY_ONCE.contains(&handler.as_str()) || handler == "plain";
        if is_of_work && !known.contains(id) {
            ghosts.push(format!("{handler} of {id}"));
        }
    }
    ghosts.report(outcome);
}

fn count_letters(found: &Found, outcome: &mut Outcome) {
    let mut expected: BTreeSet<i64> = found
        .work
        .iter()
        .filter(|(_, number)| fate(**number) == Fate::IsGivenUp)
        .map(|(id, _)| *id)
        .collect();
    let mut wrong = Cases::new("a dead letter that should be none");
    let mut by_hand = 0;
    for (handler, event_id, why) in &found.letters {
        let is_expected = handler.as_deref() == Some("exact")
            && why.starts_with("Permanent error: this work is not to be done");
        match event_id {
            Some(id) if is_expected && expected.remove(id) => {}
            // Of no event: put into a queue by hand. Whoever did it counts them.
            None => by_hand += 1,
            Some(id) if !found.work.contains_key(id) && *id <= 0 => by_hand += 1,
            Some(id) => wrong.push(format!("{handler:?} of {id}: {why}")),
        }
    }
    if by_hand > 0 {
        outcome.note(format!(
            "dead letters of messages put in by hand: {by_hand}"
        ));
    }
    let mut missing = Cases::new("given up and no dead letter");
    for id in expected {
        missing.push(id.to_string());
    }
    outcome.lost += missing.report(outcome);
    wrong.report(outcome);
}

/// Task, due time in seconds since 1970, event, whether that is in the log, how many were left out.
type FiredTick = (String, i64, Option<i64>, bool, Option<i64>);

async fn count_ticks(
    pool: &PgPool,
    found: &Found,
    ticks: Ticks,
    outcome: &mut Outcome,
) -> anyhow::Result<()> {
    let fired: Vec<FiredTick> = sqlx::query_as(
        "select s.name, extract(epoch from t.due_at)::bigint, t.event_id,
                exists (select from core.event_log l where l.event_id = t.event_id), t.left_out
         from core.ticks t join core.scheduled_tasks s using (task_id)
         where not t.is_manual
         order by s.name, t.due_at",
    )
    .fetch_all(pool)
    .await?;
    let mut missing =
        Cases::new("a tick that is in the log and had no effect, or is not in the log");
    let mut twice = Cases::new("a tick with more than one effect");
    let mut gaps = Cases::new("due times that were not fired");
    let mut last: Option<(&str, i64)> = None;
    let mut ids = BTreeSet::new();
    for (task, due, event_id, is_logged, left_out) in &fired {
        if let Some((before, second)) = last
            && before == task
            && ticks == Ticks::All
            && *due != second + 1
        {
            gaps.push(format!("{task} between {second} and {due}"));
        }
        last = Some((task, *due));
        let Some(id) = event_id else {
            if ticks == Ticks::All {
                gaps.push(format!("{task} left out {left_out:?} until {due}"));
            }
            continue;
        };
        ids.insert(*id);
        outcome.emitted += 1;
        let handler = if task == CRON { CRON } else { "pulse" };
        let key = (handler.to_owned(), *id);
        let count = found.effects.get(&key).copied().unwrap_or_default();
        outcome.effects += count;
        if count == 0 || !is_logged {
            missing.push(format!("{task} at {due}"));
        }
        if count > 1 {
            twice.push(format!("{task} at {due} ({count})"));
        }
    }
    outcome.lost += missing.report(outcome) + gaps.report(outcome);
    outcome.doubled += twice.report(outcome);

    // The log knows no tick that `core.ticks` does not.
    let unknown: i64 = sqlx::query_scalar(
        "select count(*) from core.event_log l
         where l.scheduled_task_id is not null
           and not exists (select from core.ticks t where t.event_id = l.event_id)",
    )
    .fetch_one(pool)
    .await?;
    if unknown > 0 {
        outcome.violation(format!("{unknown} events of ticks that were never fired"));
    }
    if !ids.is_empty() {
        outcome.note(format!("ticks: {}", ids.len()));
    }
    Ok(())
}
