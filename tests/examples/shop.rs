//! A program of several crates, as an example. `cargo test` runs it: it fails if it has not linked all.

use nexus::prelude::*;

nexus::link!(nexus_test_billing, nexus_test_shipping);

fn main() {
    let app = App::discover().name("shop");
    nexus_tests::check_linked(&app, &["nexus_test_billing", "nexus_test_shipping"]);
    println!("{}", app.describe());
}
