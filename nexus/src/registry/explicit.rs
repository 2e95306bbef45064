//! The parts of an app by name: what `nexus::app!` makes, and what `#[cron]` leaves for it.

use super::{HandlerDescriptor, TaskDescriptor};

/// What `#[cron]` makes of an item; a descriptor for each attribute.
#[doc(hidden)]
#[derive(Debug, Clone, Copy)]
pub enum CronItem {
    /// A function, which runs.
    Function(&'static [&'static HandlerDescriptor]),
    /// A type or a constant, which is emitted.
    Emits(&'static [&'static TaskDescriptor]),
}

/// What `#[derive(Event)]` leaves for `#[cron]`.
///
/// Beside [`Event`], which a type with too few derives implements only conditionally: whether the
/// derive is there has to be clear, or rustc reports what follows from its absence as well.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an event",
    label = "`#[cron]` on a type or a constant emits an event",
    note = "add `#[derive(Event, Serialize, Deserialize, JsonSchema)]` to `{Self}`",
    note = "to run code by the clock, put `#[cron]` on an `async fn`"
)]
#[doc(hidden)]
pub trait Derived {
    /// The type itself.
    type Event;

    fn event(&self) -> &Self::Event;
}

/// The value of a type that `#[cron]` emits.
#[diagnostic::on_unimplemented(
    message = "`{Self}` has no default value, which `#[cron]` would emit",
    label = "`Default` is missing",
    note = "add `Default` to its derives, or put `#[cron]` on a constant: `const NAME: {Self} = …;`"
)]
#[doc(hidden)]
pub trait Initial {
    fn initial() -> Self;
}

#[diagnostic::do_not_recommend]
impl<T: Default> Initial for T {
    fn initial() -> Self {
        Self::default()
    }
}
