use super::{DerivedEvent, Error, Result};
use crate::event::Outgoing;

/// An event to emit when the attempt completes.
///
/// Returned from a handler. It is stored by the same statement as the completion: both happen or
/// neither.
///
/// # Examples
///
/// ```
/// # use nexus::prelude::*;
/// # #[derive(Serialize, Deserialize, JsonSchema, Event)]
/// # struct UserCreated { user_id: u64 }
/// # #[derive(Serialize, Deserialize, JsonSchema, Event)]
/// # struct AccountOpened { user_id: u64 }
/// #[handler]
/// async fn open_account(user: UserCreated) -> nexus::Result<Emit<AccountOpened>> {
///     Ok(Emit(AccountOpened { user_id: user.user_id }))
/// }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Emit<E>(pub E);

/// What a handler may return: `()`, [`Emit<E>`], `Option<Emit<E>>`, or a `Result` of these.
#[diagnostic::on_unimplemented(
    message = "a handler cannot return `{Self}`",
    label = "not a handler's result",
    note = "return `()`, `Emit<E>`, `Option<Emit<E>>` or a `Result` of these",
    note = "for several events, or several types of them, take `tx: &mut Tx` and call `tx.emit(&event)?` for each"
)]
pub trait IntoOutcome {
    /// The outcome of the attempt.
    ///
    /// # Errors
    ///
    /// The handler's own error, or that an event to emit cannot be stored.
    fn into_outcome(self) -> Result<Outcome>;
}

/// What a successful attempt leaves to be stored.
#[derive(Debug, Default)]
pub struct Outcome {
    pub(crate) emits: Vec<Outgoing>,
}

/// What a handler may return without a `Result` around it.
#[diagnostic::on_unimplemented(
    message = "a handler cannot return `{Self}`",
    label = "not a handler's result",
    note = "return `()`, `Emit<E>`, `Option<Emit<E>>` or a `Result` of these",
    note = "for several events, or several types of them, take `tx: &mut Tx` and call `tx.emit(&event)?` for each"
)]
#[doc(hidden)]
pub trait Success {
    fn into_outcome(self) -> Result<Outcome>;
}

impl Success for () {
    fn into_outcome(self) -> Result<Outcome> {
        Ok(Outcome::default())
    }
}

impl<E: DerivedEvent> Success for Emit<E> {
    fn into_outcome(self) -> Result<Outcome> {
        Ok(Outcome {
            emits: vec![(E::USE.outgoing)(&self.0, usize::MAX).map_err(Error::permanent)?],
        })
    }
}

impl<E: DerivedEvent> Success for Option<Emit<E>> {
    fn into_outcome(self) -> Result<Outcome> {
        self.map_or_else(|| Ok(Outcome::default()), Success::into_outcome)
    }
}

impl IntoOutcome for () {
    fn into_outcome(self) -> Result<Outcome> {
        Success::into_outcome(self)
    }
}

impl<E: DerivedEvent> IntoOutcome for Emit<E> {
    fn into_outcome(self) -> Result<Outcome> {
        Success::into_outcome(self)
    }
}

impl<E: DerivedEvent> IntoOutcome for Option<Emit<E>> {
    fn into_outcome(self) -> Result<Outcome> {
        Success::into_outcome(self)
    }
}

/// What a handler's error may be: everything that becomes an [`Error`] by `?`.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be the error of a handler",
    label = "not an error",
    note = "implement `std::error::Error` for `{Self}`, or return `nexus::Result`, whose error takes others by `?`"
)]
#[doc(hidden)]
pub trait HandlerError: Into<Error> {}

#[diagnostic::do_not_recommend]
impl<E: Into<Error>> HandlerError for E {}

impl<T: Success, E: HandlerError> IntoOutcome for std::result::Result<T, E> {
    fn into_outcome(self) -> Result<Outcome> {
        self.map_err(Into::into).and_then(Success::into_outcome)
    }
}
