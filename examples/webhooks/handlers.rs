//! The handlers: three of each event, in three groups, which fail and lag independently.
//!
//! A handler takes one event type. So each is a function of one line, written by a macro, and the
//! work is done by a generic function: [`count`], [`copy`] and [`index`].

use nexus::prelude::*;
use sqlx::{PgPool, types::Json};

use super::events::{
    CheckRun, Counts, Delivered, Fork, IssueComment, Issues, Other, PullRequest, PullRequestReview,
    Push, Release, Star, WorkflowRun, with_known_events,
};

macro_rules! define_handlers {
    ($($name:ident: $event:ident,)*) => {
        define_handlers! { @all $($name: $event,)* other: Other, }
    };
    (@all $($name:ident: $event:ident,)*) => {
        /// The app's own group. Few at once, because deliveries of one repository wait for each
        /// other's transactions anyway.
        mod statistics {
            use super::{$($event,)* Envelope, Tx, handler};
            $(
                #[handler(concurrency = 2, max_attempts = 5, backoff = "exponential(200ms..5s)")]
                async fn $name(delivery: Envelope<$event>, tx: &mut Tx) -> nexus::Result {
                    super::count(&delivery, tx).await
                }
            )*
        }

        mod audit {
            use super::{$($event,)* Client, Envelope, handler};
            $(
                #[handler(group = "audit", max_attempts = 5, backoff = "exponential(200ms..5s)")]
                async fn $name(delivery: Envelope<$event>, client: Client) -> nexus::Result {
                    super::copy(&delivery, &client).await
                }
            )*
        }

        mod index {
            use super::{$($event,)* Batch, Tx, handler};
            $(
                #[handler(group = "index", concurrency = 2, max_attempts = 5, backoff = "exponential(200ms..5s)")]
                async fn $name(deliveries: Batch<$event>, tx: &mut Tx) -> nexus::Result {
                    super::index(&deliveries, tx).await
                }
            )*
        }
    };
}
with_known_events!(define_handlers);

/// Counts a delivery for its repository. With the handler's transaction: the row and the completion
/// of the message commit together, so every delivery counts exactly once.
async fn count<E: Delivered>(delivery: &Envelope<E>, tx: &mut Tx) -> nexus::Result {
    let Counts {
        issues_opened,
        pull_requests_merged,
        comments,
        commits,
        releases,
        stars,
        forks,
        failures,
    } = delivery.counts();
    sqlx::query(
        "insert into webhooks_repositories as r
             (namespace, repository, deliveries, issues_opened, pull_requests_merged, comments,
              commits, releases, stars, forks, failures)
         values ($1, left($2, 300), 1, $3, $4, $5, $6, $7, $8, $9, $10)
         on conflict (namespace, repository) do update set
             deliveries = r.deliveries + 1,
             issues_opened = r.issues_opened + excluded.issues_opened,
             pull_requests_merged = r.pull_requests_merged + excluded.pull_requests_merged,
             comments = r.comments + excluded.comments,
             commits = r.commits + excluded.commits,
             releases = r.releases + excluded.releases,
             stars = r.stars + excluded.stars,
             forks = r.forks + excluded.forks,
             failures = r.failures + excluded.failures",
    )
    .bind(delivery.meta().namespace())
    .bind(delivery.repository())
    .bind(issues_opened)
    .bind(pull_requests_merged)
    .bind(comments)
    .bind(commits)
    .bind(releases)
    .bind(stars)
    .bind(forks)
    .bind(failures)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Keeps a copy. Without a transaction the message may be delivered again after the copy was made;
/// the event's id makes the second copy harmless, and no connection is held between statements.
async fn copy<E: Delivered>(delivery: &Envelope<E>, client: &Client) -> nexus::Result {
    sqlx::query(
        "insert into webhooks_audit (event_id, namespace, event_type, emitted_at, sender, payload)
         values ($1, $2, $3, $4::text::timestamptz, $5, $6)
         on conflict (event_id) do nothing",
    )
    .bind(delivery.event_id())
    .bind(delivery.meta().namespace())
    .bind(E::EVENT_TYPE)
    .bind(delivery.emitted_at().to_string())
    .bind(delivery.sender())
    .bind(Json(delivery.event()))
    .execute(client.pool())
    .await?;
    Ok(())
}

/// Makes deliveries findable by the words of their subject: many by one statement.
async fn index<E: Delivered>(deliveries: &Batch<E>, tx: &mut Tx) -> nexus::Result {
    let ids: Vec<i64> = deliveries.iter().map(Envelope::event_id).collect();
    let repositories: Vec<Option<&str>> = deliveries
        .iter()
        .map(|delivery| delivery.repository())
        .collect();
    let subjects: Vec<String> = deliveries
        .iter()
        .map(|delivery| delivery.subject())
        .collect();
    sqlx::query(
        "insert into webhooks_index (event_id, namespace, event_type, repository, subject)
         select d.event_id, $1, $2, d.repository, left(d.subject, 1000)
         from unnest($3::bigint[], $4::text[], $5::text[]) as d (event_id, repository, subject)
         on conflict (event_id) do update set
             repository = excluded.repository,
             subject = excluded.subject",
    )
    .bind(deliveries[0].meta().namespace())
    .bind(E::EVENT_TYPE)
    .bind(ids)
    .bind(repositories)
    .bind(subjects)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Creates what is missing of the example's tables.
pub(crate) async fn create_tables(pool: &PgPool) -> sqlx::Result<()> {
    // One implicit transaction. Two that create the same table at once would fail without the lock.
    sqlx::raw_sql(
        "select pg_advisory_xact_lock(hashtextextended('webhooks: tables', 0));

         -- The repository is null for what belongs to none, such as an event of an organization.
         create table if not exists webhooks_repositories (
             namespace text not null,
             repository text,
             deliveries bigint not null,
             issues_opened bigint not null,
             pull_requests_merged bigint not null,
             comments bigint not null,
             commits bigint not null,
             releases bigint not null,
             stars bigint not null,
             forks bigint not null,
             failures bigint not null,
             unique nulls not distinct (namespace, repository)
         );

         create table if not exists webhooks_audit (
             event_id bigint primary key,
             namespace text not null,
             event_type text not null,
             emitted_at timestamptz not null,
             sender text,
             payload jsonb not null
         );

         create table if not exists webhooks_index (
             event_id bigint primary key,
             namespace text not null,
             event_type text not null,
             repository text,
             subject text not null,
             words tsvector not null generated always as (to_tsvector('simple', subject)) stored
         );
         create index if not exists webhooks_index_words on webhooks_index using gin (words);",
    )
    .execute(pool)
    .await?;
    Ok(())
}
