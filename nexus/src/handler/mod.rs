//! What user code touches: the arguments a handler can take and the results it can return.
//!
//! - arguments: the event first ([`Input`]: `E`, [`Envelope<E>`](crate::Envelope), [`Batch<E>`]),
//!   then any [`FromContext`] ([`State`], [`Ctx`], [`Tick`]) and at most one [`&mut Tx`](Tx);
//! - results: `()`, [`Emit<E>`], `Option<Emit<E>>`, or a `Result` of these ([`IntoOutcome`]);
//! - [`Error`] says whether a failed attempt is worth repeating.

mod checkpoint;
mod context;
mod derived;
mod error;
mod input;
mod outcome;

pub use crate::client::Tx;
pub use checkpoint::checkpoint;
#[cfg(feature = "testing")]
pub(crate) use checkpoint::{CHECKPOINTS, Checkpoints};
pub use context::{Context, Ctx, FromContext, Requirements, State, Tick};
pub(crate) use context::{Shared, StateMap};
#[doc(hidden)]
pub use derived::{DerivedEvent, Usable, Use};
pub(crate) use error::with_sources;
pub use error::{Error, Kind, Result, ResultExt};
pub use input::{Batch, Input, Invocation};
pub(crate) use input::{Delivery, Rejected};
pub use outcome::{Emit, IntoOutcome, Outcome};
