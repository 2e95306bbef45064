//! Products, and a handler in a module that nothing calls.

use nexus::prelude::*;

/// A product can be bought.
#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "catalog.product_added")]
pub struct ProductAdded {
    /// Its name.
    pub name: String,
}

mod search {
    use nexus::prelude::*;

    #[handler(group = "catalog")]
    async fn index_product(_product: super::ProductAdded) {}
}
