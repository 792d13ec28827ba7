//! Frames of the peer on their way to whom they concern: the connection, a session, a link.

use bytes::Bytes;

use super::connection::{Connection, Phase};
use super::error::{Condition, Error, Fault};
use super::event::*;
use super::frame::*;
use super::performative::*;
use super::session::SessionState;

impl Connection {
    pub(super) fn on_frame(&mut self, header: FrameHeader, frame: Bytes) -> Result<(), Fault> {
        match (self.phase, header.kind) {
            (Phase::SaslInit, FrameKind::Sasl) => return self.on_sasl(&frame, header.body),
            (Phase::SaslMechanisms | Phase::SaslOutcome, FrameKind::Sasl) => {
                return self.on_server_sasl(&frame, header.body);
            }
            (Phase::SaslMechanisms | Phase::SaslOutcome | Phase::SaslInit, FrameKind::Amqp)
            | (_, FrameKind::Sasl) => {
                return Err(Fault::connection(Condition::FRAMING_ERROR, "frame type does not fit"));
            }
            (_, FrameKind::Amqp) => {}
        }
        if header.body == header.size {
            return Ok(()); // heartbeat
        }
        let performative = Performative::decode(&frame, header.body)?;
        match (self.phase, performative) {
            (Phase::PeerOpen, Performative::Open(open)) => self.on_open(open),
            (_, Performative::Close(error)) => {
                if self.phase != Phase::CloseSent {
                    self.write_close(None);
                }
                self.finish(error, By::Peer);
                Ok(())
            }
            (Phase::CloseSent, _) => Ok(()),
            (Phase::PeerOpen, _) => {
                Err(Fault::connection(Condition::ILLEGAL_STATE, "the first frame must be an open"))
            }
            (_, Performative::Open(_)) => Err(Fault::connection(Condition::ILLEGAL_STATE, "a second open")),
            (_, Performative::Begin(begin)) => self.on_begin(header.channel, &begin),
            (_, performative) => self.on_session_frame(header.channel, performative, frame),
        }
    }

    fn on_begin(&mut self, channel: u16, begin: &Begin) -> Result<(), Fault> {
        if channel >= self.options.sessions_max || self.peer_channels.get(channel.into()).is_some() {
            return Err(Fault::connection(Condition::NOT_ALLOWED, "begin on a channel that is not free"));
        }
        let id = match begin.remote_channel {
            Some(ours) => {
                let session = self.sessions.get(usize::from(ours)).and_then(Option::as_deref);
                match session {
                    Some(session) if session.peer_channel.is_none() => session.id,
                    _ => return Err(Fault::connection(Condition::NOT_ALLOWED, "answer to no begin")),
                }
            }
            None => self
                .place_session(SessionState::Mapped)
                .ok_or_else(|| Fault::connection(Condition::RESOURCE_LIMIT_EXCEEDED, "too many sessions"))?,
        };
        self.peer_channels.insert(channel.into(), id.channel.into());
        let client = self.client;
        let Some((session, mut shared)) = self.any_session_mut(id.channel) else { return Ok(()) };
        session.on_begin(channel, begin);
        if begin.remote_channel.is_none() {
            session.write_begin(&mut shared);
            if client {
                let error = Error::new(Condition::NOT_ALLOWED, "this end takes no sessions");
                session.write_end(&mut shared, Some(&error));
                return Ok(());
            }
        }
        if session.state == SessionState::Mapped {
            self.events.push_back(Event::SessionBegun { session: id });
        }
        Ok(())
    }

    fn on_session_frame(
        &mut self,
        peer_channel: u16,
        performative: Performative,
        frame: Bytes,
    ) -> Result<(), Fault> {
        let Some(channel) = self.peer_channels.get(peer_channel.into()) else {
            return Err(Fault::connection(Condition::NOT_ALLOWED, "frame on a channel without session"));
        };
        let channel = channel as u16; // what is stored in the table is a channel
        let Some((session, mut shared)) = self.any_session_mut(channel) else { return Ok(()) };
        let id = session.id;
        if let Performative::End(error) = performative {
            if session.state != SessionState::EndSent {
                session.write_end(&mut shared, None);
                self.events.push_back(Event::SessionEnded { session: id, error, by: By::Peer });
            }
            self.drop_session(peer_channel, channel);
            return Ok(());
        }
        if session.state == SessionState::EndSent {
            return Ok(());
        }
        let result = match performative {
            Performative::Transfer(transfer, payload) => {
                session.on_transfer(&mut shared, transfer, frame.slice(payload..))
            }
            Performative::Disposition(disposition) => {
                session.on_disposition(&mut shared, disposition);
                Ok(())
            }
            Performative::Flow(flow) => {
                session.on_flow(&mut shared, &flow);
                Ok(())
            }
            Performative::Attach(attach) => session.on_attach(&mut shared, attach),
            Performative::Detach(detach) => {
                session.on_detach(&mut shared, detach);
                Ok(())
            }
            Performative::Open(_)
            | Performative::Begin(_)
            | Performative::End(_)
            | Performative::Close(_) => Ok(()),
        };
        match result {
            Ok(()) => self.list_due(channel),
            Err(Fault::Connection(error)) => return Err(Fault::Connection(error)),
            Err(Fault::Session(error) | Fault::Link(error)) => {
                session.write_end(&mut shared, Some(&error));
                let event = Event::SessionEnded { session: id, error: Some(error), by: By::Engine };
                self.events.push_back(event);
            }
        }
        Ok(())
    }
}
