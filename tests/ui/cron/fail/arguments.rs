#![allow(unused)]

use nexus::prelude::*;

#[cron("@daily")]
async fn cleanup(tx: Tx, db: &Db, again: &mut Tx, more: &mut Tx) -> u32 {
    1
}

struct Db;

fn main() {}
