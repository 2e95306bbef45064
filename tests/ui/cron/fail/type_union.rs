#![allow(unused)]

use nexus::prelude::*;

#[cron("@daily")]
union Number {
    int: u32,
    float: f32,
}

#[cron("@daily")]
#[derive(Event)]
union Above {
    int: u32,
    float: f32,
}

#[derive(Event)]
#[cron("@daily")]
union Below {
    int: u32,
    float: f32,
}

fn main() {}
