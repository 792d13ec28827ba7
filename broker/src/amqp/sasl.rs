//! SASL as the end that dials: one mechanism, one response, one outcome (AMQP 1.0 §5.3).

use bytes::{BufMut, Bytes, BytesMut};

use super::connection::{Connection, Phase};
use super::error::{Condition, Error, Fault, WireError};
use super::event::Secret;
use super::frame::*;
use super::put::put_sasl_init;
use super::value::{Reader, Text};
use super::wire::{compound_header, u32_at};

/// Mechanisms of a server that are looked at.
const MECHANISMS_MAX: u32 = 64;

/// How a client authenticates before the open. `Debug` prints no password.
#[derive(Debug, Clone)]
pub enum ClientSasl {
    /// As nobody.
    Anonymous,
    /// With a user name and password (RFC 4616).
    Plain {
        /// The user name.
        user: Text,
        /// The password.
        password: Secret,
    },
    /// As the subject of the TLS certificate.
    External,
}

impl ClientSasl {
    /// The mechanism's name.
    pub fn mechanism(&self) -> &'static str {
        match self {
            ClientSasl::Anonymous => "ANONYMOUS",
            ClientSasl::Plain { .. } => "PLAIN",
            ClientSasl::External => "EXTERNAL",
        }
    }

    fn response(&self) -> BytesMut {
        let mut response = BytesMut::new();
        if let ClientSasl::Plain { user, password } = self {
            for part in [user.as_str(), password.expose()] {
                response.put_u8(0);
                response.put_slice(part.as_bytes());
            }
        }
        response
    }
}

/// What a server sends before it knows the client.
enum FromServer {
    Mechanisms(Vec<Text>),
    Outcome(u8),
}

impl FromServer {
    fn decode(frame: &Bytes, body: usize) -> Result<Self, WireError> {
        let mut reader = Reader::new(frame, body);
        match reader.descriptor()? {
            0x40 => {
                let encoded = reader.list()?.encoded()?.ok_or(WireError::MissingField)?;
                symbols(&encoded).map(FromServer::Mechanisms)
            }
            0x44 => Ok(FromServer::Outcome(reader.list()?.u8()?.ok_or(WireError::MissingField)?)),
            // No mechanism of ours has a challenge.
            _ => Err(WireError::UnexpectedDescriptor),
        }
    }
}

/// The symbols of an array, or the one that stands for an array of one. The encoding was checked.
fn symbols(encoded: &Bytes) -> Result<Vec<Text>, WireError> {
    let at = |pos: usize| encoded.get(pos).copied().ok_or(WireError::Truncated);
    let short = match at(0)? {
        0xe0 => true,
        0xf0 => false,
        _ => {
            let value = Reader::new(encoded, 0).value()?;
            return value.as_text().map(|text| vec![text.clone()]).ok_or(WireError::WrongType);
        }
    };
    let (_, count, mut pos) = compound_header(encoded, 1, short)?;
    if count == 0 {
        return Ok(Vec::new());
    }
    let wide = match at(pos)? {
        0xa3 => false,
        0xb3 => true,
        _ => return Err(WireError::WrongType),
    };
    pos += 1;
    (0..count.min(MECHANISMS_MAX))
        .map(|_| {
            let (len, begin) = match wide {
                false => (usize::from(at(pos)?), pos + 1),
                true => (u32_at(encoded, pos)? as usize, pos + 4),
            };
            pos = begin.checked_add(len).filter(|end| *end <= encoded.len()).ok_or(WireError::Truncated)?;
            Text::new(encoded.slice(begin..pos))
        })
        .collect()
}

impl Connection {
    pub(super) fn on_server_sasl(&mut self, frame: &Bytes, body: usize) -> Result<(), Fault> {
        let refused = |text: String| Err(Fault::Connection(Error::new(Condition::UNAUTHORIZED_ACCESS, text)));
        let Some(sasl) = &self.options.sasl else {
            return Err(Fault::connection(Condition::FRAMING_ERROR, "frame type does not fit"));
        };
        match (self.phase, FromServer::decode(frame, body)?) {
            (Phase::SaslMechanisms, FromServer::Mechanisms(offered)) => {
                let mechanism = sasl.mechanism();
                if !offered.iter().any(|name| name.as_str() == mechanism) {
                    let offered: Vec<&str> = offered.iter().map(Text::as_str).collect();
                    return refused(format!("the peer offers no {mechanism}, but {}", offered.join(", ")));
                }
                let hostname = self.options.hostname.as_deref();
                let tail = self.output.tail();
                put_frame(tail, FrameKind::Sasl, 0, |out| {
                    put_sasl_init(out, mechanism, &sasl.response(), hostname);
                });
                self.phase = Phase::SaslOutcome;
                Ok(())
            }
            (Phase::SaslOutcome, FromServer::Outcome(0)) => {
                self.output.tail().put_slice(&HEADER_AMQP);
                self.phase = Phase::HeaderAfterSasl;
                Ok(())
            }
            (Phase::SaslOutcome, FromServer::Outcome(1)) => {
                refused("the peer refuses the user name or password".into())
            }
            (Phase::SaslOutcome, FromServer::Outcome(code)) => {
                refused(format!("the peer cannot authenticate at present (SASL outcome {code})"))
            }
            _ => Err(Fault::connection(Condition::ILLEGAL_STATE, "a SASL frame out of its turn")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mechanisms_in_every_form() {
        let names = |encoded: &'static [u8]| {
            symbols(&Bytes::from_static(encoded))
                .map(|found| found.iter().map(|name| name.as_str().to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(names(b"\xa3\x05PLAIN").unwrap(), ["PLAIN"]);
        assert_eq!(names(b"\xe0\x08\x02\xa3\x01A\x03BCD").unwrap(), ["A", "BCD"]);
        let wide = b"\xf0\0\0\0\x0e\0\0\0\x02\xb3\0\0\0\x01A\0\0\0\0";
        assert_eq!(names(wide).unwrap(), ["A", ""]);
        assert_eq!(names(b"\xe0\x02\x00\xa3").unwrap(), [""; 0]);
        assert!(names(b"\xe0\x03\x01\x50\x01").is_err());
        assert!(names(b"\x50\x01").is_err());
    }

    #[test]
    fn a_password_is_never_printed() {
        let sasl = ClientSasl::Plain { user: "u".into(), password: Secret::new("planted".into()) };
        assert!(!format!("{sasl:?}").contains("planted"));
        assert_eq!(&sasl.response()[..], b"\0u\0planted");
    }
}
