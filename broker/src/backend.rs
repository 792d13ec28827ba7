//! The one trait between the protocol heads and whoever serves the clients behind them.
//!
//! The edge hub and the cloud stand-in both implement [`Backend`], so each head is written once, and a hub can be
//! another hub's upstream.
//!
//! What a head may rely on, and must do:
//!
//! * [`Backend::login`] is the only way to a [`Backend::Client`]; dropping the client ends the identity's
//!   connection. A newer login of the same identity wins: the older connection finds [`Command::Close`] in its
//!   mailbox.
//! * Messages of one client are published in the order of the calls; [`Backend::publish`] returns once they are in
//!   line, the [`Backend::Commit`] resolves when they are stored at the configured durability. Only then does
//!   the head acknowledge.
//! * Twin requests are answered through the mailbox, [`Command::TwinAnswer`], in any order. A method call comes as
//!   [`Command::Invoke`] and is answered with [`Backend::method_answered`]. Both end with the connection.
//! * Deliveries come through the mailbox. Whatever the head learns of them goes to the delivery's [`Settler`];
//!   when the connection ends, all that was not settled is offered again by the backend.

mod delivery;
mod mailbox;
mod method;
mod twin;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;

use crate::identity::Identity;
use crate::message::Message;

pub use delivery::{Deliveries, Outcome, Settler, Target};
pub use mailbox::{CommandReceiver, Mailbox, MailboxClosed, Place};
pub use method::{CallId, MethodAnswer, MethodCall, STATUS_UNREADABLE};
pub use twin::{
    CORRELATION_BYTES_MAX, DesiredPatch, TwinAnswer, TwinError, TwinOperation, TwinReply, TwinRequest,
};

/// Commands that wait for one connection at most. The hub waits (or parks) when the mailbox is full.
pub const MAILBOX_COMMANDS_MAX: usize = 64;

/// Who serves the clients of the heads.
pub trait Backend: Clone + Send + Sync + 'static {
    /// What the backend keeps for one connected identity. Dropping it ends the connection.
    type Client: Send + 'static;
    /// Resolves when published messages are stored.
    type Commit: Future<Output = Result<(), PublishError>> + Send + Unpin + 'static;

    /// Checks credentials and registers the connection; an older one of the same identity is closed.
    ///
    /// # Errors
    /// [`LoginError::Refused`] when the credentials are bad, [`LoginError::Unavailable`] when that cannot be told.
    fn login(
        &self,
        login: Login,
        mailbox: Mailbox,
    ) -> impl Future<Output = Result<Self::Client, LoginError>> + Send;

    /// Checks newer credentials of a connected client. If they are good, they stand in the place of those that it proved
    /// before, so that it is they that end its connection one day; while this takes, the older ones stand. The client
    /// may be used, and dropped, meanwhile.
    ///
    /// # Errors
    /// [`LoginError::Refused`] when they are bad: the head ends the client. [`LoginError::Unavailable`] when that cannot
    /// be told: the older ones go on to stand.
    fn reauthenticate(
        &self,
        client: &Self::Client,
        login: Login,
    ) -> impl Future<Output = Result<(), LoginError>> + Send + 'static + use<Self>;

    /// Makes a message of the client's; the head gives properties and body as they came.
    fn sender(&self, client: &Self::Client) -> Arc<crate::message::Sender>;

    /// Whether the message may be published at all; asked before [`Backend::publish`], for each message.
    ///
    /// # Errors
    /// [`PublishError::TooLarge`], or [`PublishError::Malformed`] for a blank output name.
    fn check(&self, client: &Self::Client, message: &Message) -> Result<(), PublishError>;

    /// Puts messages in line: all or none of them. Waits while the store has no room for more requests. Once messages
    /// of an MQTT client were not stored, no later ones of that connection are, or they would overtake: the head closes it.
    ///
    /// # Errors
    /// When the store is closed.
    fn publish(
        &self,
        client: &mut Self::Client,
        messages: Vec<Message>,
    ) -> impl Future<Output = Result<Self::Commit, PublishError>> + Send;

    /// Switches a feature of the client on or off.
    fn subscribe(&self, client: &mut Self::Client, feature: Feature, on: bool);

    /// Takes a twin request; it is answered through the mailbox.
    ///
    /// # Errors
    /// When it is refused at once; then there is no other answer.
    fn twin(&self, client: &mut Self::Client, request: TwinRequest) -> Result<(), TwinError>;

    /// Takes the answer to a [`Command::Invoke`]. One that nobody waits for is counted and dropped.
    fn method_answered(&self, client: &mut Self::Client, call: CallId, answer: MethodAnswer);

    /// The stored MQTT session of an identity, as [`Backend::store_session`] took it.
    fn load_session(&self, identity: &Identity) -> impl Future<Output = Option<Bytes>> + Send;

    /// Stores the MQTT session of an identity, or forgets it; durable when it resolves.
    ///
    /// # Errors
    /// When the store refuses it.
    fn store_session(
        &self,
        identity: &Identity,
        session: Option<Bytes>,
    ) -> impl Future<Output = Result<(), PublishError>> + Send;

    /// Counts a message that a head drops without offering it (decided: acknowledged, counted, warned of).
    fn dropped(&self, client: &Self::Client, reason: HeadDrop);
}

/// Why a head itself drops a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HeadDrop {
    /// The topic is none that the hub knows.
    BadTopic,
    /// The property bag in the topic does not parse.
    BadProperties,
}

/// A client that wants to connect.
#[derive(Debug, Clone)]
pub struct Login {
    /// Whom it claims to be.
    pub identity: Identity,
    /// What it shows for it.
    pub credentials: Credentials,
    /// On-behalf-of: ids from the target (first) to the acting edge device (last). At least two, or the login is not
    /// on behalf of anybody.
    pub auth_chain: Option<Arc<str>>,
    /// Product and version of the client's SDK (`DeviceClientType`); free text, may be empty.
    pub product_info: Arc<str>,
    /// Plug-and-play model of the client.
    pub model_id: Option<Arc<str>>,
    /// The head it came through.
    pub protocol: Protocol,
    /// Where the connection comes from.
    pub peer: Option<SocketAddr>,
}

/// A protocol that clients speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// MQTT 3.1.1.
    Mqtt,
    /// AMQP 1.0.
    Amqp,
}

/// What a client shows to prove who it is. `Debug` never prints a token.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// The text of a SAS token.
    SasToken(Arc<str>),
    /// The certificate chain of the TLS handshake, leaf first, in DER.
    Certificate(Vec<Bytes>),
    /// Nothing at all.
    None,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Credentials::SasToken(_) => "SasToken(..)",
            Credentials::Certificate(_) => "Certificate(..)",
            Credentials::None => "None",
        })
    }
}

/// Why a login fails.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoginError {
    /// The credentials are bad; trying again with them is of no use.
    #[error("refused: {0}")]
    Refused(String),
    /// It cannot be decided now, or there is no room; the client should come again.
    #[error("unavailable: {0}")]
    Unavailable(String),
}

/// Why messages are not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// The message is larger than the limit.
    #[error("the message has {size_bytes} bytes; the limit is {limit_bytes}")]
    TooLarge {
        /// Its size.
        size_bytes: usize,
        /// The limit.
        limit_bytes: usize,
    },
    /// The message cannot be routed, whatever the routes.
    #[error("the message is malformed: {0}")]
    Malformed(&'static str),
    /// The store has reached its limit or the disk is full.
    #[error("the store is full: {0}")]
    Full(String),
    /// The store failed or is closing.
    #[error("the store failed: {0}")]
    Store(String),
}

/// What a client switches on by subscribing or attaching.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Feature {
    /// Messages routed to the inputs of the module.
    ModuleInputs,
    /// Cloud-to-device messages.
    CloudToDevice,
    /// Direct methods.
    Methods,
    /// Notifications of changed desired properties.
    DesiredProperties,
    /// Answers to twin requests.
    TwinResponses,
}

/// What the hub asks of a connection.
#[derive(Debug)]
pub enum Command {
    /// Send messages to an input of the module, or to the device.
    Deliver(Deliveries),
    /// Answer a twin request.
    TwinAnswer(TwinAnswer),
    /// Tell the client of changed desired properties. Sent only while [`Feature::DesiredProperties`] is on.
    Desired(DesiredPatch),
    /// Call a direct method. Sent only while [`Feature::Methods`] is on.
    Invoke(MethodCall),
    /// Close the connection.
    Close(CloseReason),
}

/// Why the hub closes a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CloseReason {
    /// A newer connection of the same identity took over.
    TakenOver,
    /// The credentials expired, or the identity was disabled or removed.
    Unauthorized,
    /// The hub is stopping.
    Stopping,
    /// An operator closed it; the client may come again.
    Kicked,
}
