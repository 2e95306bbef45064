#![allow(unused)]

use nexus::prelude::*;

#[derive(Serialize, Deserialize, JsonSchema, Event)]
struct UserCreated;

async fn plain(event: UserCreated) {}

#[cron("@daily")]
async fn cleanup() {}

mod mail {
    pub async fn plain(event: super::UserCreated) {}

    #[nexus::handler]
    async fn hidden(event: super::UserCreated) {}
}

fn main() {
    let app = nexus::app! {
        handlers: [plain, cleanup, mail::plain, mail::hidden, mail::typo, nowhere::typo],
        crons: [plain, UserCreated, mail::plain],
    };
}
