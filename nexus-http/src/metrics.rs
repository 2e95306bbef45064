//! Figures for whoever watches the namespace: for Prometheus, and in the form of the original server.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, header},
    response::{IntoResponse, Response},
};
use mime::Mime;
use nexus::client::NamespaceMetrics;
use serde::Serialize;
use tokio::sync::Mutex;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    Service, Shared,
    openapi::Refusals,
    problem::{Kind, Problem, ProblemDocument},
};

/// The database is asked once in so long, however many ask here, and whatever it answers.
const FRESH_FOR: Duration = Duration::from_secs(5);

const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

pub(crate) fn reading() -> OpenApiRouter<Arc<Service>> {
    OpenApiRouter::new().routes(routes!(metrics))
}

type Figures = Result<Arc<NamespaceMetrics>, Problem>;

/// What the database answered last, and when.
#[derive(Default)]
pub(crate) struct Latest(Mutex<Option<(Instant, Figures)>>);

impl Service {
    async fn figures(&self) -> Figures {
        // Who comes meanwhile waits for the same answer.
        let mut latest = self.latest.0.lock().await;
        if let Some((at, figures)) = &*latest
            && at.elapsed() < FRESH_FOR
        {
            return figures.clone();
        }
        let figures = self.client.namespace_metrics().await;
        let figures = figures.map(Arc::new).map_err(Problem::from);
        *latest = Some((Instant::now(), figures.clone()));
        figures
    }
}

/// What the original server answers.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Metrics, example = json!({ "queueDepth": 17, "deadLetterQueueDepth": 0 }))]
struct Snapshot {
    /// Messages that wait or are being handled, in all groups, of each counted up to 10,000.
    queue_depth: u64,
    /// Dead letters of all groups, of each counted up to 10,000.
    dead_letter_queue_depth: u64,
}

impl From<&NamespaceMetrics> for Snapshot {
    fn from(metrics: &NamespaceMetrics) -> Self {
        let groups = metrics.groups.iter();
        Self {
            queue_depth: groups.clone().map(|group| group.depth.counted).sum(),
            dead_letter_queue_depth: groups.map(|group| group.dead_letters.counted).sum(),
        }
    }
}

/// Show the figures of the namespace
///
/// In the text format of Prometheus. Who accepts `application/json` rather than `text/plain` gets what the original server
/// answers. The database is asked at most once in five seconds.
#[utoipa::path(get, path = "/metrics", tag = "namespace",
    responses(
        (status = 200, description = "The figures; `docs/metrics.md` has their names.",
            content((String = "text/plain"), (Snapshot = "application/json"))),
        (status = 406, description = "Neither is accepted.",
            body = ProblemDocument<'static>, content_type = "application/problem+json"),
        Refusals,
    ))]
async fn metrics(State(service): Shared, headers: HeaderMap) -> Result<Response, Problem> {
    let mut response = match preferred(&headers)? {
        Form::Json => Json(Snapshot::from(&*service.figures().await?)).into_response(),
        Form::Text => {
            let text = match (&service.settings.node, service.figures().await) {
                (Some(node), Ok(figures)) => node.text_with(&figures),
                // What the node has counted is there all the same.
                (Some(node), Err(_)) => node.text(),
                (None, figures) => figures?.text(),
            };
            ([(header::CONTENT_TYPE, TEXT)], text).into_response()
        }
    };
    let headers = response.headers_mut();
    headers.insert(header::VARY, header::ACCEPT.into());
    Ok(response)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Text,
    Json,
}

/// What the caller accepts rather, as RFC 9110 has it in 12.5.1. Of other parameters than `q` nothing depends.
fn preferred(headers: &HeaderMap) -> Result<Form, Problem> {
    let values = headers.get_all(header::ACCEPT).iter();
    let ranges: Vec<&str> = values
        .flat_map(|value| value.to_str().unwrap_or("?").split(','))
        .map(str::trim)
        .filter(|range| !range.is_empty())
        .collect();
    if ranges.is_empty() {
        return Ok(Form::Text);
    }
    // What is no media range accepts nothing.
    let ranges: Vec<(Mime, f32)> = ranges
        .iter()
        .filter_map(|range| {
            let range: Mime = range.parse().ok()?;
            let quality = range.get_param("q");
            let quality = quality.map_or(Some(1.0), |quality| quality.as_str().parse().ok())?;
            (0.0..=1.0).contains(&quality).then_some((range, quality))
        })
        .collect();
    let text = quality(&ranges, &mime::TEXT_PLAIN);
    let json = quality(&ranges, &mime::APPLICATION_JSON);
    if text.max(json) <= 0.0 {
        return Err(Problem::new(
            Kind::NotAcceptable,
            "there is `text/plain` and `application/json`",
        ));
    }
    Ok(if json > text { Form::Json } else { Form::Text })
}

/// That of the range which says most precisely what is offered.
fn quality(ranges: &[(Mime, f32)], offered: &Mime) -> f32 {
    let precision = |range: &Mime| match (range.type_(), range.subtype()) {
        (mime::STAR, mime::STAR) => Some(0),
        (kind, mime::STAR) => (kind == offered.type_()).then_some(1),
        (kind, name) => (kind == offered.type_() && name == offered.subtype()).then_some(2),
    };
    let matching = ranges
        .iter()
        .filter_map(|(range, quality)| Some((precision(range)?, *quality)));
    let most_precise =
        matching.max_by(|one, other| one.0.cmp(&other.0).then(one.1.total_cmp(&other.1)));
    most_precise.map_or(0.0, |(_, quality)| quality)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(accept: &[&str]) -> Option<Form> {
        let accept = accept
            .iter()
            .map(|value| (header::ACCEPT, value.parse().unwrap()));
        preferred(&accept.collect()).ok()
    }

    #[test]
    fn the_caller_gets_what_it_likes_most() {
        let (text, json) = (Some(Form::Text), Some(Form::Json));
        for (accept, expected) in [
            ("", text),
            ("*/*", text),
            ("text/plain", text),
            ("text/*", text),
            ("application/json", json),
            ("application/*", json),
            ("Application/JSON; charset=utf-8", json),
            // Prometheus, a browser.
            (
                "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
                text,
            ),
            (
                "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
                text,
            ),
            // The greater wins, whatever comes first; if they are alike it is the text.
            ("application/json;q=0.4, text/plain;q=0.5", text),
            ("text/plain;q=0.4, application/json;q=0.5", json),
            ("application/json, text/plain", text),
            ("application/json, */*;q=0.9", json),
            // What is more precise counts, also if it is less.
            ("text/plain;q=0, */*", json),
            (
                "text/plain;q=0.1, text/*;q=0.9, application/json;q=0.5",
                json,
            ),
            ("application/json;q=0, */*;q=0.1", text),
            // Neither, or nothing that can be understood.
            ("text/html", None),
            ("application/openmetrics-text", None),
            ("text/plain;q=0", None),
            ("text/plain;q=2", None),
            ("text/plain;q=much", None),
            ("json", None),
            ("json, text/plain", text),
        ] {
            assert_eq!(form(&[accept]), expected, "{accept}");
        }
        assert_eq!(form(&[]), text);
        assert_eq!(form(&["text/html", "application/json"]), json);
    }
}
