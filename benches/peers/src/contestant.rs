//! What the programs share. Each of them has a handler named `job`, so that each takes what waits for it.
use common::{arg, db_url, env_num, forever, lat, say, w1, w2};
use nexus::{Database, Handle, prelude::*};

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "bench.job")]
pub struct Job {
    pub id: i64,
    pub ts: i64,
    pad: String,
}

impl From<common::Job> for Job {
    fn from(job: common::Job) -> Self {
        let common::Job { id, ts, pad } = job;
        Self { id, ts, pad }
    }
}

#[handler(group = "second")]
async fn second(_job: Job) {}

#[handler(group = "third")]
async fn third(_job: Job) {}

/// `BENCH_HANDLERS=3` adds two handlers that do nothing, each in a group of its own.
fn app() -> App {
    let mut handlers = vec!["job"];
    if env_num("BENCH_HANDLERS", 1) == 3 {
        handlers.extend(["second", "third"]);
    }
    App::discover()
        .namespace("bench")
        .name("bench")
        .database_url(db_url())
        .only(handlers)
        .batch_size(500)
}

async fn start() -> Handle {
    // Connected, as the pools of the others are.
    let app = app().before_start(|_| async {
        say("started");
        Ok(())
    });
    nexus::start(app).await.unwrap()
}

async fn client() -> Client {
    let database = Database::from_url(&db_url(), "DATABASE_URL").unwrap();
    Client::connect(&database, "bench").await.unwrap()
}

pub async fn run() {
    match arg(1).as_str() {
        "setup" => {
            nexus::start(app()).await.unwrap().shutdown().await;
        }
        "w1" => {
            let client = client().await;
            w1(move |job| {
                let client = client.clone();
                async move {
                    client.emit(&Job::from(job)).await.unwrap();
                }
            })
            .await;
        }
        "w2" => {
            let client = client().await;
            w2(|jobs| {
                let client = client.clone();
                async move {
                    let jobs: Vec<Job> = jobs.into_iter().map(Job::from).collect();
                    client.emit_all(&jobs).await.unwrap();
                }
            })
            .await;
        }
        "work" => {
            let _node = start().await;
            forever().await
        }
        "lat" => {
            let node = start().await;
            let client = node.client().clone();
            lat(|job| {
                let client = client.clone();
                async move {
                    client.emit(&Job::from(job)).await.unwrap();
                }
            })
            .await;
        }
        other => panic!("unknown command {other}"),
    }
}
