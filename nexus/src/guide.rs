//! The guide: a page for each subject.
//!
//! Each page opens with what matters most and the smallest example, then lists what can be set, what
//! happens when something fails, and what is not promised. The [front page](crate) builds one program
//! step by step; every example here and there is compiled by the crate's tests.

#[doc = include_str!("guide/events.md")]
pub mod events {}

#[doc = include_str!("guide/handlers.md")]
pub mod handlers {}

#[doc = include_str!("guide/transactions.md")]
pub mod transactions {}

#[doc = include_str!("guide/retries.md")]
pub mod retries {}

#[doc = include_str!("guide/dead_letters.md")]
pub mod dead_letters {}

#[doc = include_str!("guide/schedules.md")]
pub mod schedules {}

#[cfg_attr(feature = "testing", doc = include_str!("guide/testing.md"))]
#[cfg_attr(
    not(feature = "testing"),
    doc = "About the test kit; this page comes with the feature `testing`."
)]
pub mod testing {}

#[doc = include_str!("guide/replay.md")]
pub mod replay {}

#[doc = include_str!("guide/deploying.md")]
pub mod deploying {}
