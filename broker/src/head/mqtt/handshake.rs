//! From the accepted socket to CONNACK: one CONNECT, one login, one session.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{timeout, timeout_at};
use tracing::{info, warn};

use super::connection::{MqttLimits, Peer};
use super::encode::{self, ConnectCode};
use super::end::{ConnectionEnd, ProtocolError};
use super::frame::{Frame, PACKET_BYTES_MAX};
use super::packet::{self, Connect, DecodeError, Packet, Text, Will};
use super::session::Session;
use super::username::UserName;
use super::wire::Wire;
use crate::backend::{
    Backend, CommandReceiver, Credentials, Login, LoginError, MAILBOX_COMMANDS_MAX, Mailbox, Protocol,
};
use crate::head::warn_limit::WarnLimit;
use crate::identity::Identity;

static REFUSED: WarnLimit = WarnLimit::new();

/// A client that was let in.
pub(super) struct Admitted<C> {
    pub(super) client: C,
    pub(super) mailbox: CommandReceiver,
    pub(super) identity: Identity,
    pub(super) session: Session,
    /// The session as the store has it; empty when it has none.
    pub(super) stored_session: Bytes,
    /// Whether subscriptions are stored.
    pub(super) persistent: bool,
    pub(super) keep_alive_secs: u16,
    pub(super) will: Option<Will>,
}

/// Reads CONNECT and answers it.
pub(super) async fn admit<S, B>(
    wire: &mut Wire<S>,
    backend: &B,
    limits: &MqttLimits,
    peer: Peer,
) -> Result<Box<Admitted<B::Client>>, ConnectionEnd>
where
    S: AsyncRead + AsyncWrite + Unpin,
    B: Backend,
{
    let connect = arrived(wire, limits, &peer).await?;
    let (sender, mailbox) = Mailbox::channel(MAILBOX_COMMANDS_MAX);
    let login = match login(&connect, limits, peer) {
        Ok(login) => login,
        Err((code, reason)) => return Err(refuse(wire, code, &reason)),
    };
    let identity = login.identity.clone();
    let persistent = !connect.clean_session;
    // Subscriptions are only looked at once the identity is known to be the client's.
    let entering = timeout(limits.login_max, async {
        let client = backend.login(login, sender).await?;
        let stored = backend.load_session(&identity).await;
        if !persistent && stored.is_some() {
            let forgotten = backend.store_session(&identity, None).await;
            forgotten.map_err(|error| LoginError::Unavailable(error.to_string()))?;
        }
        Ok((client, stored.filter(|_| persistent)))
    });
    let (client, stored) = match reading_ahead(wire, entering).await? {
        Ok(Ok(entered)) => entered,
        Ok(Err(LoginError::Refused(reason))) => {
            return Err(refuse_identity(wire, &identity, ConnectCode::NotAuthorized, &reason));
        }
        Ok(Err(LoginError::Unavailable(reason))) => {
            return Err(refuse_identity(wire, &identity, ConnectCode::Unavailable, &reason));
        }
        Err(_) => {
            return Err(refuse_identity(
                wire,
                &identity,
                ConnectCode::Unavailable,
                "the login takes too long",
            ));
        }
    };
    let stored_session = stored.unwrap_or_default();
    let (session, session_present) = match Session::from_bytes(&identity, &stored_session) {
        Ok(session) => (session, true),
        Err(_) if stored_session.is_empty() => (Session::default(), false),
        Err(error) => {
            // To refuse would lock the client out for good; without session-present it knows to subscribe again.
            warn!(code = "EH2006", "client {identity}: {error}; it starts without subscriptions");
            (Session::default(), false)
        }
    };
    encode::connack(&mut wire.outlet.buffer, session_present, ConnectCode::Accepted);
    info!("client {identity} connected over MQTT");
    let will = connect.will.map(|will| Will {
        topic: will.topic.detached(),
        payload: Bytes::copy_from_slice(&will.payload),
        ..will
    });
    Ok(Box::new(Admitted {
        client,
        mailbox,
        identity,
        session,
        stored_session,
        persistent,
        keep_alive_secs: connect.keep_alive_secs,
        will,
    }))
}

/// Refuses whoever connects.
pub(super) async fn refuse_any<S>(
    wire: &mut Wire<S>,
    limits: &MqttLimits,
    peer: &Peer,
    reason: &str,
) -> ConnectionEnd
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    match arrived(wire, limits, peer).await {
        Ok(_) => refuse(wire, ConnectCode::NotAuthorized, reason),
        Err(end) => end,
    }
}

/// CONNECT, in time and of a protocol level that is spoken here.
async fn arrived<S>(wire: &mut Wire<S>, limits: &MqttLimits, peer: &Peer) -> Result<Connect, ConnectionEnd>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let deadline = peer.accepted_at + limits.connect_arrival_max;
    let place = limits.anteroom.enter();
    let connect = tokio::select! {
        biased;
        connect = timeout_at(deadline, read_connect(wire)) => connect,
        () = place.sent_away() => return Err(ConnectionEnd::Crowded),
    };
    drop(place);
    match connect.map_err(|_| ConnectionEnd::ConnectTimeout)? {
        Err(ConnectionEnd::Protocol(ProtocolError::Decode(DecodeError::ProtocolLevel(level)))) => {
            Err(refuse(wire, ConnectCode::ProtocolLevel, &format!("protocol level {level}")))
        }
        connect => connect,
    }
}

/// What CONNECT asks for, or how it is refused without asking anybody.
fn login(connect: &Connect, limits: &MqttLimits, peer: Peer) -> Result<Login, (ConnectCode, String)> {
    let refused = |code, reason: &str| Err((code, reason.to_owned()));
    let user_name = connect.user_name.as_ref().map(Text::as_str).unwrap_or_default();
    let client_id = connect.client_id.as_str();
    if user_name.trim().is_empty() || client_id.trim().is_empty() {
        return refused(ConnectCode::Unavailable, "the user name or client id is missing");
    }
    let user_name =
        UserName::parse(user_name).map_err(|error| (ConnectCode::Unavailable, error.to_string()))?;
    let credentials = match connect.password.as_ref().filter(|password| !password.is_empty()) {
        Some(password) => match std::str::from_utf8(password) {
            Ok(token) => Credentials::SasToken(token.into()),
            Err(_) => return refused(ConnectCode::NotAuthorized, "the password is no text"),
        },
        None if peer.certificates.is_empty() => {
            return refused(ConnectCode::NotAuthorized, "neither a password nor a certificate");
        }
        None if !limits.certificate_authentication => {
            return refused(ConnectCode::NotAuthorized, "certificate authentication is off");
        }
        None => Credentials::Certificate(peer.certificates),
    };
    if client_id != user_name.identity.to_string() {
        return refused(ConnectCode::NotAuthorized, "the client id is not the identity of the user name");
    }
    if matches!(credentials, Credentials::Certificate(_)) && user_name.identity.module_id().is_some() {
        return refused(ConnectCode::NotAuthorized, "a module cannot use a certificate");
    }
    let auth_chain = match user_name.on_behalf_of() {
        None => None,
        Some(true) => user_name.auth_chain,
        Some(false) => {
            return refused(ConnectCode::NotAuthorized, "the auth-chain does not begin with the identity");
        }
    };
    Ok(Login {
        identity: user_name.identity,
        credentials,
        auth_chain,
        product_info: user_name.product_info,
        model_id: user_name.model_id,
        protocol: Protocol::Mqtt,
        peer: peer.address,
    })
}

async fn read_connect<S>(wire: &mut Wire<S>) -> Result<Connect, ConnectionEnd>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    loop {
        // The first byte tells; nothing else is buffered before a CONNECT.
        if wire.input.first().is_some_and(|first| *first != 0x10) {
            return Err(ConnectionEnd::Protocol(ProtocolError::ConnectExpected));
        }
        if let Some(frame) = Frame::take(&mut wire.input).map_err(ProtocolError::Frame)? {
            return match packet::decode(frame).map_err(ProtocolError::Decode)? {
                Packet::Connect(connect) => Ok(connect),
                _ => Err(ProtocolError::ConnectExpected.into()),
            };
        }
        poll_fn(|cx| wire.poll_read(cx)).await;
        if wire.peer_closed() || wire.broken() {
            return Err(ConnectionEnd::PeerClosed);
        }
    }
}

/// Keeps what the client sends while `future` runs, up to one packet of the largest size.
async fn reading_ahead<S, F>(wire: &mut Wire<S>, future: F) -> Result<F::Output, ConnectionEnd>
where
    S: AsyncRead + AsyncWrite + Unpin,
    F: Future,
{
    let mut future = pin!(future);
    poll_fn(|cx| {
        if let Poll::Ready(output) = future.as_mut().poll(cx) {
            return Poll::Ready(Ok(output));
        }
        while wire.input.len() < PACKET_BYTES_MAX && wire.poll_read(cx).is_ready() {
            if wire.peer_closed() || wire.broken() {
                return Poll::Ready(Err(ConnectionEnd::PeerClosed));
            }
        }
        Poll::Pending
    })
    .await
}

fn refuse_identity<S>(
    wire: &mut Wire<S>,
    identity: &Identity,
    code: ConnectCode,
    reason: &str,
) -> ConnectionEnd
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    refuse(wire, code, &format!("client {identity}: {reason}"))
}

fn refuse<S>(wire: &mut Wire<S>, code: ConnectCode, reason: &str) -> ConnectionEnd
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    if let Some(suppressed) = REFUSED.admit() {
        warn!(code = "EH2007", suppressed, "MQTT connection refused with code {}: {reason}", code as u8);
    }
    encode::connack(&mut wire.outlet.buffer, false, code);
    ConnectionEnd::Refused(code)
}
