//! One turn: every complete packet of the input, what it asks of the backend, and what is stored before it is
//! answered.

use std::pin::pin;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;
use tracing::{debug, warn};

use super::{Connection, DROPPED, Publishes};
use crate::backend::{
    Backend, CORRELATION_BYTES_MAX, HeadDrop, MethodAnswer, PublishError, STATUS_UNREADABLE, TwinError,
    TwinOperation, TwinRequest,
};
use crate::head::mqtt::end::{ConnectionEnd, ProtocolError};
use crate::head::mqtt::frame::Frame;
use crate::head::mqtt::packet::{self, Packet, Publish};
use crate::head::mqtt::topic::{self, Inbound};
use crate::head::mqtt::{control, encode};
use crate::message::{Message, Sender};

/// What one turn of decoding brought.
#[derive(Default)]
pub(super) struct Turn {
    messages: Vec<Message>,
    acknowledged: usize,
    count: usize,
    bytes: usize,
    /// SUBACKs and UNSUBACKs, sent when the session is stored.
    answers: BytesMut,
    end: Option<ConnectionEnd>,
}

impl<S, F, C> Connection<'_, S, F, C>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
    F: Future<Output = ()> + Send,
    C: Future<Output = Result<(), PublishError>> + Send + Unpin,
{
    /// Decodes every complete packet of the input, unless too much waits already.
    pub(super) fn turn<B: Backend>(
        &mut self,
        backend: &B,
        client: &mut B::Client,
        sender: &Arc<Sender>,
    ) -> Turn {
        let mut turn = Turn::default();
        let before = self.wire.input.len();
        while turn.end.is_none() && !self.rests(turn.count, turn.bytes) {
            let frame = match Frame::take(&mut self.wire.input) {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(error) => {
                    turn.end = Some(ProtocolError::Frame(error).into());
                    break;
                }
            };
            turn.end = match packet::decode(frame) {
                Err(error) => Some(ProtocolError::Decode(error).into()),
                Ok(packet) => self.packet(backend, client, sender, &mut turn, packet).err(),
            };
        }
        let consumed = before - self.wire.input.len();
        if consumed > 0 {
            self.last_packet = Instant::now();
            self.looked_ahead_bytes = self.looked_ahead_bytes.saturating_sub(consumed);
        }
        if self.wire.input.is_empty() {
            // Even an empty buffer would keep the whole of the last read alive.
            self.wire.input = BytesMut::new();
        }
        // What a client acknowledged in front of its DISCONNECT counts; from one that broke the protocol nothing does.
        if !matches!(turn.end, Some(ConnectionEnd::Protocol(_))) {
            self.deliverer.settle_acknowledged();
        }
        turn
    }

    fn packet<B: Backend>(
        &mut self,
        backend: &B,
        client: &mut B::Client,
        sender: &Arc<Sender>,
        turn: &mut Turn,
        packet: Packet,
    ) -> Result<(), ConnectionEnd> {
        match packet {
            Packet::Connect(_) => return Err(ProtocolError::SecondConnect.into()),
            Packet::Publish(publish) => self.publish(backend, client, sender, turn, publish)?,
            Packet::PubAck(packet_id) => {
                if !self.deliverer.acknowledge(packet_id) {
                    debug!("client {}: PUBACK of the unknown id {packet_id}", self.identity);
                }
            }
            Packet::Subscribe { packet_id, filters } => {
                for (filter, granted) in &filters {
                    let subscribed = self.session.subscribe(&self.identity, filter.as_str(), *granted);
                    subscribed.map_err(ProtocolError::SessionFull)?;
                }
                encode::suback(&mut turn.answers, packet_id, filters.iter().map(|(_, granted)| *granted));
            }
            Packet::Unsubscribe { packet_id, filters } => {
                for filter in &filters {
                    self.session.unsubscribe(filter.as_str());
                }
                encode::unsuback(&mut turn.answers, packet_id);
            }
            Packet::PingReq => match self.pings_answered_ahead.checked_sub(1) {
                Some(left) => self.pings_answered_ahead = left,
                None => encode::pingresp(&mut self.wire.outlet.buffer),
            },
            Packet::Disconnect => return Err(ConnectionEnd::Disconnected),
        }
        Ok(())
    }

    fn publish<B: Backend>(
        &mut self,
        backend: &B,
        client: &mut B::Client,
        sender: &Arc<Sender>,
        turn: &mut Turn,
        publish: Publish,
    ) -> Result<(), ConnectionEnd> {
        const RETAIN: (&str, &str) = ("mqtt-retain", "true");
        const DUP: (&str, &str) = ("mqtt-dup", "true");
        let Publish { topic, payload, packet_id, dup, retain } = publish;
        let added: &[_] = match (retain, dup) {
            (false, false) => &[],
            (true, false) => &[RETAIN],
            (false, true) => &[DUP],
            (true, true) => &[RETAIN, DUP],
        };
        turn.count += 1;
        turn.bytes += topic.bytes().len() + payload.len();
        match topic::read(&self.identity, &topic, added) {
            Inbound::Telemetry(properties) => {
                let message = Message::new(sender.clone(), properties, payload);
                match backend.check(client, &message) {
                    Ok(()) => turn.messages.push(message),
                    Err(PublishError::TooLarge { size_bytes, limit_bytes }) => {
                        return Err(ProtocolError::TooLarge { size_bytes, limit_bytes }.into());
                    }
                    Err(PublishError::Malformed(_)) => self.dropped(backend, client, HeadDrop::BadProperties),
                    Err(error) => return Err(ConnectionEnd::Store(error)),
                }
            }
            Inbound::TwinGet { request_id } => {
                self.twin(backend, client, Some(request_id), TwinOperation::Get)?;
            }
            Inbound::TwinPatch { request_id } => {
                self.twin(backend, client, request_id, TwinOperation::PatchReported(payload))?;
            }
            Inbound::MethodResponse { status, request_id } => match request_id.parse() {
                Ok(call) => {
                    let payload = if status == STATUS_UNREADABLE { Bytes::new() } else { payload };
                    backend.method_answered(client, call, MethodAnswer { status, payload });
                }
                Err(_) => debug!("client {}: the answer to a method that was never called", self.identity),
            },
            Inbound::Drop(reason) => self.dropped(backend, client, reason),
            Inbound::Close(error) => return Err(ProtocolError::Topic(error).into()),
        }
        if let Some(packet_id) = packet_id {
            self.packet_ids.push_back(packet_id);
            turn.acknowledged += 1;
        }
        Ok(())
    }

    /// Hands a twin request to the backend; one that is refused at once is answered at once.
    fn twin<B: Backend>(
        &mut self,
        backend: &B,
        client: &mut B::Client,
        request_id: Option<&str>,
        operation: TwinOperation,
    ) -> Result<(), ConnectionEnd> {
        let refused = match request_id {
            Some(long) if long.len() > CORRELATION_BYTES_MAX => Err(TwinError::Invalid(format!(
                "the request id has {} bytes; the limit is {CORRELATION_BYTES_MAX}",
                long.len()
            ))),
            // Copied: a slice would keep the whole read alive until the answer.
            request_id => {
                let correlation = request_id.map(|id| Bytes::copy_from_slice(id.as_bytes()));
                backend.twin(client, TwinRequest { correlation, operation })
            }
        };
        if let (Err(error), Some(request_id)) = (refused, request_id) {
            let answer = control::twin_failure(request_id, &error);
            self.deliverer.notify(self.wire, &self.session, answer)?;
        }
        Ok(())
    }

    /// Publishes and stores what a turn brought, and only then answers.
    pub(super) async fn finish_turn<B>(
        &mut self,
        backend: &B,
        client: &mut B::Client,
        persistent: bool,
        turn: Turn,
    ) -> Result<(), ConnectionEnd>
    where
        B: Backend<Commit = C>,
    {
        let Turn { messages, acknowledged, count, bytes, answers, end } = turn;
        if count > 0 {
            let commit = if messages.is_empty() {
                None
            } else {
                let publishing = pin!(backend.publish(client, messages));
                Some(self.drive(publishing).await?.map_err(ConnectionEnd::Store)?)
            };
            self.pending += count;
            self.pending_bytes += bytes;
            if self.publishes.capacity() == 0 {
                // Most devices have one message under way.
                self.publishes.reserve_exact(1);
            }
            self.publishes.push_back(Publishes { commit, acknowledged, count, bytes });
        }
        if !answers.is_empty() {
            if persistent {
                Box::pin(self.store_session(backend)).await?;
            }
            self.switch_features(backend, client);
            self.wire.outlet.buffer.extend_from_slice(&answers);
        }
        match end {
            None => Ok(()),
            Some(end) => Err(end),
        }
    }

    /// Stores the session unless it is what is stored already: SDKs subscribe again and again to the same.
    async fn store_session<B: Backend>(&mut self, backend: &B) -> Result<(), ConnectionEnd> {
        let bytes = self.session.to_bytes();
        if self.stored_session != bytes {
            let identity = self.identity.clone();
            let storing = pin!(backend.store_session(&identity, Some(bytes.clone())));
            let stored = self.drive(storing).await?;
            stored.map_err(ConnectionEnd::Store)?;
            self.stored_session = bytes;
        }
        Ok(())
    }

    pub(super) fn switch_features<B: Backend>(&mut self, backend: &B, client: &mut B::Client) {
        let features = self.session.features();
        for (feature, on) in features.changes_since(self.features) {
            backend.subscribe(client, feature, on);
        }
        self.features = features;
    }

    fn dropped<B: Backend>(&self, backend: &B, client: &B::Client, reason: HeadDrop) {
        backend.dropped(client, reason);
        if let Some(suppressed) = DROPPED.admit() {
            warn!(code = "EH2002", suppressed, "client {}: a message was dropped: {reason:?}", self.identity);
        }
    }
}
