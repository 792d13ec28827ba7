//! Delivery: one pump per endpoint, which owns its order, window, backoff and expiry.
//!
//! A pump reads its queues, the most urgent first, hands messages to the consumer of the moment, and settles
//! what the consumer answers. What is under way when a consumer goes or fails is read again from the first
//! entry that is not settled, so nothing overtakes a failed message, and whatever repeats is a suffix.

mod attempts;
mod backoff;
mod in_flight;
mod losses;
mod module;
mod pace;
mod presence;
mod sent;
mod share;
mod source;

pub use attempts::ATTEMPTS_MAX;
pub use backoff::{Backoff, BackoffOptions, PAUSE_SECS_MAX};
pub(crate) use losses::Loss;
pub use losses::Losses;
pub use module::{ModulePump, ModulePumpOptions};
pub use presence::{Consumer, Presence};
pub(crate) use sent::{Run, SentMetrics};
pub use share::LOWER_SHARE_PERCENT_MAX;
pub(crate) use source::{QueueReader, Queued};
