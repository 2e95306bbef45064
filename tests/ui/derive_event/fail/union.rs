#![allow(unused)]

use nexus::prelude::*;

#[derive(Event)]
union Number {
    int: u32,
    float: f32,
}

fn main() {}
