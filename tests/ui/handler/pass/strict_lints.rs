//! The generated code is silent under the strictest lints.

#![forbid(unsafe_code)]
#![deny(
    warnings,
    missing_docs,
    unreachable_pub,
    unused,
    unused_qualifications,
    unused_results
)]
#![deny(missing_debug_implementations, single_use_lifetimes, deprecated)]
#![deny(
    absolute_paths_not_starting_with_crate,
    elided_lifetimes_in_paths,
    explicit_outlives_requirements,
    let_underscore_drop,
    macro_use_extern_crate,
    meta_variable_misuse,
    non_local_definitions,
    redundant_imports,
    redundant_lifetimes,
    trivial_casts,
    trivial_numeric_casts,
    unit_bindings,
    unnameable_types,
    unused_lifetimes,
    unused_macro_rules,
    variant_size_differences
)]
#![deny(clippy::all, clippy::pedantic, clippy::nursery, clippy::cargo)]
#![deny(
    clippy::absolute_paths,
    clippy::allow_attributes_without_reason,
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::clone_on_ref_ptr,
    clippy::dbg_macro,
    clippy::default_numeric_fallback,
    clippy::else_if_without_else,
    clippy::empty_structs_with_brackets,
    clippy::exhaustive_enums,
    clippy::expect_used,
    clippy::if_then_some_else_none,
    clippy::indexing_slicing,
    clippy::integer_division,
    clippy::let_underscore_must_use,
    clippy::let_underscore_untyped,
    clippy::map_err_ignore,
    clippy::missing_assert_message,
    clippy::missing_docs_in_private_items,
    clippy::multiple_inherent_impl,
    clippy::panic,
    clippy::pattern_type_mismatch,
    clippy::print_stdout,
    clippy::same_name_method,
    clippy::shadow_reuse,
    clippy::shadow_same,
    clippy::shadow_unrelated,
    clippy::str_to_string,
    clippy::todo,
    clippy::undocumented_unsafe_blocks,
    clippy::unwrap_in_result,
    clippy::unwrap_used,
    clippy::use_debug,
    clippy::wildcard_enum_match_arm
)]

use nexus::prelude::*;

/// A user has signed up.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "strict.user_created", key = user_id)]
pub struct UserCreated {
    /// Who.
    pub user_id: u64,
}

/// What happened to an order.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "strict.order", key = id)]
#[non_exhaustive]
pub enum Order {
    /// It was placed.
    Placed {
        /// Which.
        id: u64,
    },
}

/// Greets.
///
/// # Errors
///
/// Never.
#[handler(
    group = "strict",
    max_attempts = 5,
    backoff = "exponential(1s..10m)",
    timeout = "30s"
)]
pub async fn greet_strictly(event: UserCreated, tx: &mut Tx) -> nexus::Result<Emit<Order>> {
    tx.emit(&event).map(drop)?;
    Ok(Emit(Order::Placed { id: event.user_id }))
}

/// What the function may do, its descriptor may do as well.
#[handler]
#[expect(deprecated, reason = "the limits are replaced in the next release")]
pub async fn takes_what_is_deprecated(event: UserCreated, limits: State<old::Limits>) {
    drop((event, limits));
}

/// Cleans up.
#[cron("@hourly")]
pub async fn clean_up_strictly() {}

/// Breakfast is due.
#[cron("0 7 * * *", tz = "Europe/Berlin", misfire = "fire_all(3)")]
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "strict.breakfast")]
pub struct Breakfast {
    /// For how many.
    pub guests: u8,
}

/// Breakfast for two.
#[cron("0 9 * * SAT,SUN", name = "late_breakfast", formerly = "brunch")]
pub const LATE_BREAKFAST: Breakfast = Breakfast { guests: 2 };

/// An app of all of it.
pub fn strict_app() -> App {
    nexus::app! {
        handlers: [greet_strictly, takes_what_is_deprecated],
        crons: [clean_up_strictly, Breakfast, LATE_BREAKFAST],
        events: [Order],
    }
}

/// What is on its way out.
pub mod old {
    /// How much is allowed.
    #[derive(Debug)]
    #[deprecated = "use the quota"]
    pub struct Limits;
}
