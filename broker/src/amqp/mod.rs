//! AMQP 1.0, both directions: an engine without I/O, a driver for byte streams, and the messages on top.
//!
//! [`Connection`] is a state machine over frames. It is given bytes and the time, and gives events and output;
//! it knows nothing of sockets, tasks or the hub, and depends only on `bytes`, `smallvec` and `thiserror`.
//! [`Driver`] moves its bytes; [`Message`], [`PutToken`] and [`LinkAddress`] are what IoT hubs say over it.
//! Listener and client are the same engine: the first waits for a protocol header and takes sessions and links
//! from its peer, the second dials and attaches its own.
//!
//! Everything of a peer passes [`wire::check_value`] before it is decoded: nesting, sizes and counts are compared
//! with the bytes that are there by a loop, never by recursion. What is decoded are slices of the receive buffer.
//! Everything that can grow has a bound in [`Options`]; reading stops while output or events pile up.
//!
//! ```text
//!             bytes                    events                      commands
//!  transport ───────▶ Connection ───────────────▶ owner ───────────────────────▶ Connection ─▶ Output
//!                     receive, tick   poll_event         accept_attach, send, settle, …
//! ```

mod address;
mod attach;
mod cbs;
mod connection;
pub mod encode;
mod error;
mod event;
pub mod frame;
mod handshake;
mod incoming;
mod io;
mod link;
mod message;
mod output;
pub mod performative;
mod property;
mod put;
mod sasl;
mod serial;
mod session;
mod text;
mod transfer;
pub mod value;
pub mod wire;

pub use address::{AddressError, LinkAddress, LinkKind};
pub use cbs::{CbsError, CbsResponse, PutToken};
pub use connection::Connection;
pub use error::{Condition, Error, WireError};
pub use event::{
    AttachAnswer, AttachOptions, AttachRequest, By, Delivery, DeliveryId, Event, LinkId, Options, Payload,
    SaslCode, Secret, SendError, SendOptions, SessionId,
};
pub use frame::{FRAME_MAX_BYTES, HEADER_AMQP, HEADER_SASL};
pub use io::Driver;
pub use message::{Body, Entries, Message, MessageEncoder, MessageProperties, encode_batch, parse_batch};
pub use output::Output;
pub use performative::{
    Attach, DeliveryTag, Open, Outcome, Properties, ReceiverSettle, Role, SenderSettle, TAG_MAX_BYTES,
    Terminus,
};
pub(crate) use property::{kind_of, put_property};
pub use sasl::ClientSasl;
pub use text::{MessageId, lock_token_tag, parse_timestamp, property_text, tag_lock_token, timestamp_text};
pub use value::{Text, Value};

/// Message format of a batch: every data section is a complete encoded message.
pub const MESSAGE_FORMAT_BATCH: u32 = 0x8001_3700;

/// Most messages of one batch; a transfer with more is refused.
pub const BATCH_MESSAGES_MAX: usize = 4_096;
