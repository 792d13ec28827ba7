//! The AMQP engine, without sockets; time is given by hand.
//!
//! | room | owns |
//! | --- | --- |
//! | `peers` | who the engine speaks with |
//! | `pair` | the engine with itself: what both ends make of a conversation |
//! | `raw` | bytes written by hand: what is hostile, and what is at fault |
//! | `mutated` | recorded conversations with random changes |

mod mutated;
mod pair;
mod peers;
mod raw;
