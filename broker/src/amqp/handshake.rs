//! The beginning of a connection: protocol headers, SASL, and the negotiation of open.

use std::time::Duration;

use bytes::{BufMut, Bytes};

use super::connection::{Connection, DEFAULT_PEER_IDLE, Phase};
use super::error::{Condition, Error, Fault};
use super::event::*;
use super::frame::*;
use super::performative::*;
use super::put::*;
use super::value::Text;

/// Mechanisms of the listener, in the order in which they are offered; the last only when the transport proves something.
const SASL_MECHANISMS: [&str; 4] = ["ANONYMOUS", "MSSBCBS", "PLAIN", "EXTERNAL"];

impl Connection {
    pub(super) fn on_header(&mut self, header: [u8; 8]) {
        match (self.client, self.phase, header) {
            (true, Phase::Header, HEADER_SASL) if self.options.sasl.is_some() => {
                self.phase = Phase::SaslMechanisms;
            }
            (true, Phase::Header, HEADER_AMQP) if self.options.sasl.is_some() => {
                let text = "the peer takes no SASL";
                self.finish(Some(Error::new(Condition::UNAUTHORIZED_ACCESS, text)), By::Engine);
            }
            (true, _, HEADER_AMQP) => {
                self.write_open();
                self.phase = Phase::PeerOpen;
            }
            (false, _, HEADER_AMQP) => {
                self.output.tail().put_slice(&HEADER_AMQP);
                self.phase = Phase::PeerOpen;
            }
            (false, Phase::Header, HEADER_SASL) => {
                let offered = SASL_MECHANISMS.len() - usize::from(!self.options.sasl_external);
                let tail = self.output.tail();
                tail.put_slice(&HEADER_SASL);
                put_frame(tail, FrameKind::Sasl, 0, |out| {
                    put_sasl_mechanisms(out, &SASL_MECHANISMS[..offered]);
                });
                self.phase = Phase::SaslInit;
            }
            (client, phase, _) => {
                if !client && phase == Phase::Header {
                    self.output.tail().put_slice(&HEADER_SASL);
                }
                let text = "the peer speaks another protocol";
                self.finish(Some(Error::new(Condition::FRAMING_ERROR, text)), By::Engine);
            }
        }
    }

    pub(super) fn on_sasl(&mut self, frame: &Bytes, body: usize) -> Result<(), Fault> {
        let init = SaslInit::decode(frame, body)?;
        match init.mechanism.as_str() {
            "ANONYMOUS" | "MSSBCBS" => self.write_sasl_outcome(SaslCode::Ok),
            "EXTERNAL" if self.options.sasl_external => self.write_sasl_outcome(SaslCode::Ok),
            "PLAIN" => match init.initial_response.as_ref().and_then(plain) {
                Some((user, password)) => {
                    self.phase = Phase::SaslVerdict;
                    self.events.push_back(Event::SaslPlain { user, password });
                }
                None => self.write_sasl_outcome(SaslCode::Auth),
            },
            _ => self.write_sasl_outcome(SaslCode::Sys),
        }
        Ok(())
    }

    pub(super) fn write_sasl_outcome(&mut self, code: SaslCode) {
        let number = match code {
            SaslCode::Ok => 0,
            SaslCode::Auth => 1,
            SaslCode::Sys => 2,
        };
        put_frame(self.output.tail(), FrameKind::Sasl, 0, |out| put_sasl_outcome(out, number));
        match code {
            SaslCode::Ok => self.phase = Phase::HeaderAfterSasl,
            SaslCode::Auth | SaslCode::Sys => {
                let error = Error::new(Condition::UNAUTHORIZED_ACCESS, "SASL authentication failed");
                self.finish(Some(error), By::Engine);
            }
        }
    }

    pub(super) fn on_open(&mut self, open: Open) -> Result<(), Fault> {
        if !self.open_sent {
            self.write_open();
        }
        if open.max_frame_bytes < FRAME_MIN_MAX_BYTES {
            return Err(Fault::connection(Condition::INVALID_FIELD, "max-frame-size below 512"));
        }
        let idle = open.idle_timeout_millis.filter(|millis| *millis > 0);
        let idle = idle.map(|millis| Duration::from_millis(millis.into()));
        if !self.client && idle.is_some_and(|idle| idle < self.options.peer_idle_timeout_min) {
            return Err(Fault::connection(Condition::NOT_ALLOWED, "idle-time-out is too short"));
        }
        self.heartbeat_every = (idle.unwrap_or(DEFAULT_PEER_IDLE) * 7 / 8).max(Duration::from_millis(1));
        self.counts.frame_max_bytes = open.max_frame_bytes.min(FRAME_MAX_BYTES) as usize;
        self.peer_channel_max = open.channel_max;
        self.phase = Phase::Opened;
        self.phase_deadline = None;
        self.events.push_back(Event::Opened(Box::new(open)));
        Ok(())
    }

    pub(super) fn write_open(&mut self) {
        let millis = u32::try_from(self.options.idle_timeout.as_millis()).unwrap_or(u32::MAX);
        let open = Open {
            container_id: self.options.container_id.clone(),
            hostname: self.options.hostname.clone(),
            max_frame_bytes: FRAME_MAX_BYTES,
            channel_max: self.options.sessions_max.saturating_sub(1),
            idle_timeout_millis: Some(millis),
            properties: self.options.properties.clone(),
        };
        put_frame(self.output.tail(), FrameKind::Amqp, 0, |out| put_open(out, &open));
        self.open_sent = true;
    }
}

/// User and password of a PLAIN response (RFC 4616): authzid NUL authcid NUL password.
fn plain(response: &Bytes) -> Option<(Text, Secret)> {
    let first = response.iter().position(|byte| *byte == 0)?;
    let second = first + 1 + response[first + 1..].iter().position(|byte| *byte == 0)?;
    let user = Text::new(response.slice(first + 1..second)).ok()?;
    let password = Text::new(response.slice(second + 1..)).ok()?;
    (!user.is_empty()).then_some((user, Secret(password)))
}
