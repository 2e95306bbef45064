#![allow(unused)]

use nexus::prelude::*;

struct Service;

impl Service {
    #[cron("@daily")]
    async fn cleanup() -> nexus::Result {
        Ok(())
    }

    #[cron("@daily")]
    async fn cleanup_all(this: State<Self>) {}
}

fn main() {}
