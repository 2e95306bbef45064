//! Parcels; mentions `nexus_test_labels` for nothing but its handlers.

use nexus::prelude::*;
use nexus_test_catalog::ProductAdded;

nexus::link!(nexus_test_labels);

#[handler(group = "shipping")]
async fn measure_product(_product: ProductAdded) {}

#[cron("0 6 * * 1-5", tz = "Europe/Berlin", group = "shipping")]
async fn call_carrier() {}
