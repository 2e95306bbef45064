//! The cron expressions and time zones that nexus accepts, and what it says of others.
//!
//! `#[cron]` asks while it is compiled and a client when a task is made at run time: the same is accepted,
//! and the same said. This is a part of nexus, of no use and with no promises without it.

mod expression;
mod guess;
mod zone;

pub use expression::{Mistake, check_expression};
pub use guess::{closest, did_you_mean};
pub use zone::check_time_zone;
