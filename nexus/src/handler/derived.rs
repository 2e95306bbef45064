//! What `#[derive(Event)]` leaves for the code of the other macros.

use super::{Delivery, Result};
use crate::event::{EncodeError, Event, EventDescriptor, Outgoing};

/// A type with `#[derive(Event)]`, whether or not it has the other derives that an event needs.
///
/// An [`Event`] has them all. If generated code asked for `Event`, rustc would report a derive that is
/// missing at every handler of the type; so it asks for this, which the derive implements in any case,
/// and rustc reports it where the type is declared.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an event",
    label = "an event is needed here",
    note = "add `#[derive(Event, Serialize, Deserialize, JsonSchema)]` to `{Self}`"
)]
#[doc(hidden)]
pub trait DerivedEvent: Sized + 'static {
    /// The type itself.
    type Event;

    const USE: Use<Self>;

    fn event(&self) -> &Self::Event;
}

/// What can be done with an event.
#[doc(hidden)]
#[derive(Debug)]
pub struct Use<E> {
    pub descriptor: &'static EventDescriptor,
    pub(crate) decode: fn(&Delivery) -> Result<E>,
    pub(crate) outgoing: fn(&E, usize) -> std::result::Result<Outgoing, EncodeError>,
}

/// Where the derive asks for all that an event needs, once.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be an event",
    label = "missing a derive",
    note = "write `#[derive(Event, Serialize, Deserialize, JsonSchema)]`"
)]
#[doc(hidden)]
pub trait Usable: Sized {
    const USE: Use<Self>;
}

#[diagnostic::do_not_recommend]
impl<E: Event> Usable for E {
    const USE: Use<Self> = Use {
        descriptor: E::DESCRIPTOR,
        decode: Delivery::decode,
        outgoing: Outgoing::new,
    };
}
