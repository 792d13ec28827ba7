//! Owns the operator's way into a running hub: HTTP/1.1 with JSON over a Unix socket, and the verbs that use it.
//!
//! A [`Request`](request::Request) is one typed verb; it alone knows its method, path and body, and hub and command
//! line read and write it through the same type. An [`answer`] is the JSON that comes back. So a new verb is one
//! variant, one answer and one arm in [`Verbs`](verbs::Verbs).
//!
//! Who may use it: the user of the hub, and root. The socket has mode 0600, in a folder where nobody else can put
//! another in its place, and the credentials of every peer are asked from the kernel (`SO_PEERCRED`, unix(7)) before a byte is read. No
//! answer holds a key or a token; bodies of messages are shown only when they are asked for.
//!
//! What changes something is a POST and does nothing unless it says `"apply": true`.

pub mod answer;
mod body;
pub mod client;
pub mod clients;
pub mod command;
pub mod print;
pub mod request;
pub mod server;
pub mod shown;
pub mod socket;
pub mod status;
pub mod table;
pub mod tap;
pub mod verbs;

/// Longest body of a request, in bytes; room for [`IDS_MAX`] ids.
pub const REQUEST_BODY_BYTES_MAX: usize = 64 * 1024;
/// Longest body of an answer, in bytes. One page of messages is far below it, JSON escapes included.
pub const ANSWER_BODY_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Messages of one answer, at most.
pub const PAGE_MESSAGES_MAX: u16 = 1_000;
/// Stored bytes that are read for one answer, at most; the first message is shown whatever its size.
pub const PAGE_BYTES_MAX: usize = 2 * 1024 * 1024;
/// Dead letters that one request names, at most.
pub const IDS_MAX: usize = 1_000;
