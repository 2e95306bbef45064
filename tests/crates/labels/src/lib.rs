//! Labels for parcels, reached only through `nexus_test_shipping`.

use nexus::prelude::*;

/// A label was printed.
#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "labels.printed")]
pub struct LabelPrinted {
    /// Of which parcel.
    pub parcel: u64,
}

#[handler(group = "shipping")]
async fn count_label(_label: LabelPrinted) {}
