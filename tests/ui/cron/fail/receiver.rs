#![allow(unused)]

use nexus::prelude::*;

struct Service;

impl Service {
    #[cron("@daily")]
    async fn cleanup(&self) {}
}

fn main() {}
