//! Dead letters: look, redrive, purge.

use std::{sync::Arc, time::Duration};

use axum::{Extension, Json, extract::State, http::HeaderMap};
use nexus::client::{DeadLetterCursor, DeadLetterFilter};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    Service, Shared,
    access::Caller,
    documents::{DeadLetter, DeadLetterCause, Purged, Redriven},
    events::{next_page, page},
    extract::{self, Path, Query},
    openapi::{Missing, Refusals, Steering},
    problem::{Kind, Problem, ProblemDocument},
};

pub(crate) fn reading() -> OpenApiRouter<Arc<Service>> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(causes))
        .routes(routes!(show))
}

pub(crate) fn steering() -> OpenApiRouter<Arc<Service>> {
    OpenApiRouter::new()
        .routes(routes!(redrive))
        .routes(routes!(redrive_one))
        .routes(routes!(purge))
}

/// Which dead letters.
#[derive(Debug, Serialize, Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Wanted {
    /// Only those of this group; needed for `cursor`.
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<String>,
    /// Only those of this handler.
    #[serde(skip_serializing_if = "Option::is_none")]
    handler: Option<String>,
    /// Only those of this event type.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    event_type: Option<String>,
    /// Only those of this cause.
    #[serde(skip_serializing_if = "Option::is_none")]
    fingerprint: Option<String>,
    /// At most so many, of each group; 50 if it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
    /// Where the page before ended: the last letter's `cursor`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[param(pattern = "^[0-9]{1,16}-[0-9]{1,18}$")]
    cursor: Option<String>,
}

/// List dead letters, the newest first
///
/// Of one group, or of each. Of one group, the header `Link` with `rel="next"` leads to the next page.
#[utoipa::path(get, path = "/dead-letters", tag = "dead letters", params(Wanted),
    responses(
        (status = 200, description = "The dead letters.", body = Vec<DeadLetter>,
            headers(("Link" = Option<String>, description = "The next page."))),
        Missing,
        Refusals,
    ))]
async fn list(
    State(service): Shared,
    Query(wanted): Query<Wanted>,
) -> Result<(HeaderMap, Json<Vec<DeadLetter>>), Problem> {
    let client = &service.client;
    let limit = page(wanted.limit)?;
    let cursor = match &wanted.cursor {
        None => None,
        Some(_) if wanted.group.is_none() => {
            return Err(Problem::new(
                Kind::Request,
                "cursor needs a group, because each has pages of its own",
            ));
        }
        Some(text) => {
            let cursor = text.parse::<DeadLetterCursor>();
            Some(cursor.map_err(|error| Problem::new(Kind::Request, error.to_string()))?)
        }
    };
    let which = Which {
        handler: wanted.handler.clone(),
        event_type: wanted.event_type.clone(),
        fingerprint: wanted.fingerprint.clone(),
        ..Which::default()
    };
    let filter = which.filter()?;
    let groups = if let Some(group) = &wanted.group {
        vec![group.clone()]
    } else {
        let groups = client.groups().await?;
        groups.into_iter().map(|group| group.name).collect()
    };
    let mut letters = Vec::new();
    for group in &groups {
        let mut page = client.dead_letters(group, limit).filter(filter.clone());
        if let Some(cursor) = cursor {
            page = page.after(cursor);
        }
        letters.extend(page.await?);
    }
    letters.sort_by_key(|letter| std::cmp::Reverse(letter.failed_at));
    let is_full = wanted.group.is_some() && letters.len() >= limit as usize;
    let last = letters.last().filter(|_| is_full);
    let headers = next_page(last.map(|last| Wanted {
        cursor: Some(last.cursor().to_string()),
        ..wanted
    }));
    Ok((
        headers,
        Json(letters.into_iter().map(DeadLetter::from).collect()),
    ))
}

/// Count dead letters by cause
///
/// By group, handler, event type and cause. Takes seconds where there are millions.
#[utoipa::path(get, path = "/dead-letters/causes", tag = "dead letters",
    responses(
        (status = 200, description = "The causes.", body = Vec<DeadLetterCause>),
        Refusals,
    ))]
async fn causes(State(service): Shared) -> Result<Json<Vec<DeadLetterCause>>, Problem> {
    let all = DeadLetterFilter::new();
    let causes = service.client.dead_letter_summary(all).await?;
    Ok(Json(
        causes.into_iter().map(DeadLetterCause::from).collect(),
    ))
}

/// Show a dead letter
#[utoipa::path(get, path = "/dead-letters/{group}/{id}", tag = "dead letters",
    params(("group" = String, Path, description = "The group."), ("id" = i64, Path, description = "The dead letter's id.")),
    responses(
        (status = 200, description = "The dead letter.", body = DeadLetter),
        Missing,
        Refusals,
    ))]
async fn show(
    State(service): Shared,
    Path((group, id)): Path<(String, i64)>,
) -> Result<Json<DeadLetter>, Problem> {
    let found = service.client.dead_letters(&group, 1).filter(&[id]).await?;
    let letter = found.into_iter().next().ok_or_else(|| {
        Problem::new(
            Kind::NotFound,
            format!(
                "group `{group}` has no dead letter {id}: it was redriven or purged, or never was"
            ),
        )
    })?;
    Ok(Json(letter.into()))
}

/// Which dead letters of the group: those that fulfil every condition. If there is none, `all` has to be true.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Which {
    /// Those with these ids.
    #[schema(nullable = false)]
    ids: Option<Vec<i64>>,
    /// Those of this handler.
    handler: Option<String>,
    /// Those of this event type.
    event_type: Option<String>,
    /// Those of this cause.
    fingerprint: Option<String>,
    /// Those that were given up at least so long ago.
    #[schema(minimum = 0)]
    older_than_seconds: Option<f64>,
    /// Those that were given up less than so long ago.
    #[schema(minimum = 0)]
    newer_than_seconds: Option<f64>,
    /// Every dead letter of the group.
    all: bool,
}

impl Which {
    fn filter(&self) -> Result<DeadLetterFilter, Problem> {
        let mut filter = DeadLetterFilter::new();
        if let Some(ids) = &self.ids {
            filter = filter.ids(ids.iter().copied());
        }
        if let Some(handler) = text("handler", self.handler.as_ref())? {
            filter = filter.handler(handler);
        }
        if let Some(event_type) = text("eventType", self.event_type.as_ref())? {
            filter = filter.event_type(event_type);
        }
        if let Some(fingerprint) = text("fingerprint", self.fingerprint.as_ref())? {
            filter = filter.fingerprint(fingerprint);
        }
        if let Some(age) = age("olderThanSeconds", self.older_than_seconds)? {
            filter = filter.older_than(age);
        }
        if let Some(age) = age("newerThanSeconds", self.newer_than_seconds)? {
            filter = filter.newer_than(age);
        }
        Ok(filter)
    }

    /// The same, once it was said that all are meant where nothing was said of which.
    fn meant(&self) -> Result<DeadLetterFilter, Problem> {
        let filter = self.filter()?;
        match (filter == DeadLetterFilter::new(), self.all) {
            (true, false) => Err(Problem::new(
                Kind::Invalid,
                "say which dead letters: by `ids`, by a condition, or by `all`",
            )),
            (false, true) => Err(Problem::new(
                Kind::Invalid,
                "`all` is every dead letter of the group: leave the other conditions out",
            )),
            _ => Ok(filter),
        }
    }
}

/// A text that the database can compare with one of its own.
fn text<'a>(name: &str, given: Option<&'a String>) -> Result<Option<&'a str>, Problem> {
    match given {
        Some(given) if given.contains('\0') => Err(Problem::new(
            Kind::Invalid,
            format!("`{name}` holds the character U+0000, which is in no name"),
        )),
        given => Ok(given.map(String::as_str)),
    }
}

fn age(name: &str, seconds: Option<f64>) -> Result<Option<Duration>, Problem> {
    let age = seconds.map(Duration::try_from_secs_f64).transpose();
    age.map_err(|error| Problem::new(Kind::Invalid, format!("`{name}`: {error}")))
}

/// Which dead letters to put back, and how.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(example = json!({ "which": { "handler": "charge_fee" }, "rate": 50 }))]
struct RedriveRequest {
    which: Which,
    /// At most so many, the oldest first.
    limit: Option<u64>,
    /// Lets at most so many become due in a second.
    #[schema(minimum = 1)]
    rate: Option<u32>,
    /// Who does it, for the history of the messages; the token's name if it is not given.
    by: Option<String>,
    /// Only tells what would be done.
    #[serde(default)]
    dry_run: bool,
}

/// Put back one dead letter, as it is or with another payload.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schema(example = json!({ "payload": { "order": 7, "amount": 12.5 }, "by": "ada" }))]
struct RedriveOneRequest {
    /// The payload instead of the original one, which has to fit the declared schema.
    #[schema(nullable = false)]
    payload: Option<Value>,
    /// Who does it, for the history of the message; the token's name if it is not given.
    by: Option<String>,
    /// Only tells what would be done.
    dry_run: bool,
}

/// Which dead letters to delete.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(example = json!({ "which": { "eventType": "coupon.offered", "olderThanSeconds": 2_592_000 }, "dryRun": true }))]
struct PurgeRequest {
    which: Which,
    /// Only tells how many they are.
    #[serde(default)]
    dry_run: bool,
}

/// Put dead letters of a group back into its queue
///
/// In batches of 500, each whole or not at all; given up for want of time, the same request does the rest.
#[utoipa::path(post, path = "/dead-letters/{group}/redrive", tag = "dead letters",
    params(("group" = String, Path, description = "The group.")),
    request_body = RedriveRequest,
    responses(
        (status = 200, description = "What was done.", body = Redriven),
        Steering,
        Missing,
        Refusals,
    ))]
async fn redrive(
    State(service): Shared,
    Extension(caller): Extension<Caller>,
    Path(group): Path<String>,
    extract::Json(request): extract::Json<RedriveRequest>,
) -> Result<Json<Redriven>, Problem> {
    let mut redrive = service.client.redrive(&group, request.which.meant()?);
    if let Some(limit) = request.limit {
        redrive = redrive.limit(limit);
    }
    if let Some(rate) = request.rate {
        redrive = redrive.rate(rate, Duration::from_secs(1));
    }
    if let Some(by) = request.by.or(caller.name()) {
        redrive = redrive.by(by);
    }
    if request.dry_run {
        redrive = redrive.dry_run();
    }
    Ok(Json(Redriven::new(redrive.await?, request.dry_run)))
}

/// Put one dead letter back
#[utoipa::path(post, path = "/dead-letters/{group}/{id}/redrive", tag = "dead letters",
    params(("group" = String, Path, description = "The group."), ("id" = i64, Path, description = "The dead letter's id.")),
    request_body = RedriveOneRequest,
    responses(
        (status = 200, description = "What was done.", body = Redriven),
        (status = 409, description = "It cannot be put back with another payload.", body = ProblemDocument<'static>, content_type = "application/problem+json"),
        Steering,
        Missing,
        Refusals,
    ))]
async fn redrive_one(
    State(service): Shared,
    Extension(caller): Extension<Caller>,
    Path((group, id)): Path<(String, i64)>,
    extract::Json(request): extract::Json<RedriveOneRequest>,
) -> Result<Json<Redriven>, Problem> {
    let client = &service.client;
    let by = request.by.or(caller.name());
    let done = if let Some(payload) = &request.payload {
        let mut redrive = client.redrive_edited(&group, id, payload);
        if let Some(by) = by {
            redrive = redrive.by(by);
        }
        if request.dry_run {
            redrive = redrive.dry_run();
        }
        redrive.await?
    } else {
        let mut redrive = client.redrive(&group, &[id]);
        if let Some(by) = by {
            redrive = redrive.by(by);
        }
        if request.dry_run {
            redrive = redrive.dry_run();
        }
        redrive.await?
    };
    if done.missing > 0 {
        return Err(Problem::new(
            Kind::NotFound,
            format!("group `{group}` has no dead letter {id}"),
        ));
    }
    Ok(Json(Redriven::new(done, request.dry_run)))
}

/// Delete dead letters of a group for good
///
/// Their events stay in the log. In batches of 500; given up for want of time, the same request does the rest.
#[utoipa::path(post, path = "/dead-letters/{group}/purge", tag = "dead letters",
    params(("group" = String, Path, description = "The group.")),
    request_body = PurgeRequest,
    responses(
        (status = 200, description = "What was done.", body = Purged),
        Steering,
        Missing,
        Refusals,
    ))]
async fn purge(
    State(service): Shared,
    Path(group): Path<String>,
    extract::Json(request): extract::Json<PurgeRequest>,
) -> Result<Json<Purged>, Problem> {
    let mut purge = service
        .client
        .purge_dead_letters(&group, request.which.meant()?);
    if request.dry_run {
        purge = purge.dry_run();
    }
    let done = purge.await?;
    Ok(Json(Purged {
        dead_letters: done.letters,
        is_dry_run: request.dry_run,
    }))
}
