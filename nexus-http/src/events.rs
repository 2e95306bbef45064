//! Looking at the log.

use std::sync::Arc;

use axum::{Json, extract::State, http::HeaderMap};
use jiff::{Timestamp, tz::TimeZone};
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    Service, Shared,
    documents::{Event, EventWithDeliveries},
    extract::{Path, Query},
    openapi::{Missing, Refusals},
    problem::{Kind, Problem},
};

pub(crate) fn reading() -> OpenApiRouter<Arc<Service>> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(show))
}

/// Which events.
#[derive(Debug, Serialize, Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Wanted {
    /// Only events of this type.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    event_type: Option<String>,
    /// Only events about this entity. No index knows of it: give `since` as well where the log is long.
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    /// Only events with this correlation id. No index knows of it: give `since` as well where the log is long.
    #[serde(skip_serializing_if = "Option::is_none")]
    correlation_id: Option<String>,
    /// Only events from this time on.
    #[serde(skip_serializing_if = "Option::is_none")]
    since: Option<Timestamp>,
    /// Only events before this time.
    #[serde(skip_serializing_if = "Option::is_none")]
    until: Option<Timestamp>,
    /// The oldest first instead of the newest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    oldest_first: Option<bool>,
    /// At most so many; 50 if it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
    /// Where the page before ended: the last event's id.
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<i64>,
}

/// List events of the log
///
/// By their ids. The header `Link` with `rel="next"` leads to the next page; without it there is none.
#[utoipa::path(get, path = "/events", tag = "events", params(Wanted),
    responses(
        (status = 200, description = "The events.", body = Vec<Event>,
            headers(("Link" = Option<String>, description = "The next page."))),
        Refusals,
    ))]
async fn list(
    State(service): Shared,
    Query(wanted): Query<Wanted>,
) -> Result<(HeaderMap, Json<Vec<Event>>), Problem> {
    let limit = page(wanted.limit)?;
    let times = [wanted.since, wanted.until];
    if times.into_iter().flatten().any(is_ancient) {
        return Err(Problem::new(
            Kind::Request,
            "since and until are times of our era, which the database knows",
        ));
    }
    let is_oldest_first = wanted.oldest_first.unwrap_or_default();
    let mut events = service.client.events();
    if let Some(event_type) = &wanted.event_type {
        events = events.event_type(event_type);
    }
    if let Some(key) = &wanted.key {
        events = events.key(key);
    }
    if let Some(id) = &wanted.correlation_id {
        events = events.correlation_id(id);
    }
    if let Some(since) = wanted.since {
        events = events.since(since);
    }
    if let Some(until) = wanted.until {
        events = events.until(until);
    }
    if is_oldest_first {
        events = events.oldest_first();
    }
    events = match wanted.cursor {
        Some(id) if is_oldest_first => events.after_id(id),
        Some(id) => events.before_id(id),
        None => events,
    };
    let events = events.list(limit).await?;
    let last = events.last().filter(|_| events.len() >= limit as usize);
    let headers = next_page(last.map(|last| Wanted {
        cursor: Some(last.event_id),
        ..wanted
    }));
    Ok((headers, Json(events.into_iter().map(Event::from).collect())))
}

fn is_ancient(time: Timestamp) -> bool {
    time.to_zoned(TimeZone::UTC).year() < 1
}

/// How many a page has.
pub(crate) fn page(limit: Option<u32>) -> Result<u32, Problem> {
    match limit {
        None => Ok(50),
        Some(limit @ 1..=1000) => Ok(limit),
        Some(other) => Err(Problem::new(
            Kind::Request,
            format!("limit is {other}, expected 1 to 1000"),
        )),
    }
}

/// The header that leads to the next page, if there is one.
pub(crate) fn next_page(next: Option<impl Serialize>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let query = next.and_then(|next| serde_urlencoded::to_string(next).ok());
    let link = query.and_then(|query| format!("<?{query}>; rel=\"next\"").try_into().ok());
    if let Some(link) = link {
        headers.insert(axum::http::header::LINK, link);
    }
    headers
}

/// Show an event with what became of it
///
/// Walks through the queues of the namespace, which takes a second where a million messages wait. What belongs to
/// the event is listed by its correlation id.
#[utoipa::path(get, path = "/events/{id}", tag = "events",
    params(("id" = i64, Path, description = "The event's id.")),
    responses(
        (status = 200, description = "The event.", body = EventWithDeliveries),
        Missing,
        Refusals,
    ))]
async fn show(
    State(service): Shared,
    Path(id): Path<i64>,
) -> Result<Json<EventWithDeliveries>, Problem> {
    let client = &service.client;
    let event = client.event(id).await?.ok_or_else(|| {
        let namespace = client.namespace();
        Problem::new(
            Kind::NotFound,
            format!("namespace `{namespace}` has no event {id} in its log"),
        )
    })?;
    let deliveries = client.deliveries(&[id]).await?;
    Ok(Json(EventWithDeliveries::new(event, deliveries)))
}
