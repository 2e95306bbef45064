#![allow(unused)]

use nexus::prelude::*;
use nexus_test_elsewhere::{pack, sweep_elsewhere};

fn main() {
    let app = nexus::app! {
        handlers: [pack],
        crons: [sweep_elsewhere],
    };
}
