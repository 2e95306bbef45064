//! Invoices; mentions `nexus_test_catalog` by using its event.

use nexus::prelude::*;
use nexus_test_catalog::ProductAdded;

/// An invoice was sent.
#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "billing.invoice_sent")]
pub struct InvoiceSent {
    /// Its number.
    pub number: u64,
}

#[handler(group = "billing")]
async fn price_product(_product: ProductAdded) {}

#[handler(group = "billing")]
async fn book_invoice(_invoice: InvoiceSent) {}

#[cron("@daily", group = "billing")]
async fn remind() {}
