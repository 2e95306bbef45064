//! Parcels that come back. A program that depends on this crate and does not mention it goes without.

use nexus::prelude::*;
use nexus_test_catalog::ProductAdded;

#[handler(group = "returns")]
async fn allow_returns(_product: ProductAdded) {}
