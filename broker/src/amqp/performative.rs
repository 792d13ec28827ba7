//! The frame bodies of AMQP 1.0 §2.7 and §5.3 as types, decoded with tolerance for what clients mix up.

use bytes::{Bytes, BytesMut};
use smallvec::SmallVec;

use super::encode::*;
use super::error::{Condition, Error, WireError};
use super::value::{Fields, Reader, Text, Value};

/// Longest delivery tag, in bytes (AMQP 1.0 §2.8.7).
pub const TAG_MAX_BYTES: usize = 32;
/// Entries of a property map that are kept; the rest is ignored.
const PROPERTIES_MAX: usize = 64;

/// Which end of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Sends messages.
    Sender,
    /// Receives messages.
    Receiver,
}

impl Role {
    /// The other end.
    pub fn other(self) -> Self {
        match self {
            Self::Sender => Self::Receiver,
            Self::Receiver => Self::Sender,
        }
    }

    pub(super) fn is_receiver(self) -> bool {
        self == Self::Receiver
    }

    fn of(receiver: bool) -> Self {
        if receiver { Self::Receiver } else { Self::Sender }
    }
}

/// How a sender settles (AMQP 1.0 §2.8.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SenderSettle {
    /// All deliveries are sent unsettled.
    Unsettled,
    /// All deliveries are sent settled.
    Settled,
    /// The sender chooses for each; also what a missing field means.
    Mixed,
}

/// When a receiver settles (AMQP 1.0 §2.8.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReceiverSettle {
    /// At once.
    First,
    /// After the sender has settled.
    Second,
}

/// What became of a delivery (AMQP 1.0 §3.4).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Processed.
    Accepted,
    /// Invalid; with a reason.
    Rejected(Option<Error>),
    /// Not processed; may be sent again. Also stands for a settlement without an outcome.
    Released,
    /// As released, with changes.
    Modified {
        /// Counts as a failed attempt.
        delivery_failed: bool,
        /// Must not be sent to this receiver again.
        undeliverable_here: bool,
    },
}

/// Symbol-keyed map of open and attach. Keys are accepted as symbol or string.
pub type Properties = Vec<(Text, Value)>;

/// `open`
#[derive(Debug, Clone, PartialEq)]
pub struct Open {
    /// Name of the container.
    pub container_id: Text,
    /// Host the client dialled.
    pub hostname: Option<Text>,
    /// Largest frame the sender of this open takes, in bytes.
    pub max_frame_bytes: u32,
    /// Highest channel.
    pub channel_max: u16,
    /// Idle time-out, in milliseconds.
    pub idle_timeout_millis: Option<u32>,
    /// Properties.
    pub properties: Properties,
}

/// `begin`
#[derive(Debug, Clone, PartialEq)]
pub struct Begin {
    /// The channel of the begin that this one answers.
    pub remote_channel: Option<u16>,
    /// First transfer number.
    pub next_outgoing_id: u32,
    /// Transfer frames that may be sent to the sender of this begin.
    pub incoming_window: u32,
    /// Transfer frames that its sender may send.
    pub outgoing_window: u32,
    /// Highest handle.
    pub handle_max: u32,
}

/// Source or target of a link, as encoded by whoever made it.
#[derive(Clone, PartialEq, Eq)]
pub struct Terminus(pub(super) Bytes);

impl Terminus {
    /// A source with an address.
    pub fn source(address: &str) -> Self {
        Self::with_address(0x28, address)
    }

    /// A target with an address.
    pub fn target(address: &str) -> Self {
        Self::with_address(0x29, address)
    }

    fn with_address(descriptor: u64, address: &str) -> Self {
        let mut out = BytesMut::with_capacity(address.len() + 20);
        let mut list = CompoundWriter::described_list(&mut out, descriptor);
        put_string(list.field(), address);
        list.finish();
        Self(out.freeze())
    }

    /// The address; `None` when it is missing, no text, or the terminus is a transaction coordinator.
    pub fn address(&self) -> Option<Text> {
        let mut reader = Reader::new(&self.0, 0);
        match reader.descriptor() {
            Ok(0x28 | 0x29) => reader.list().ok()?.text().ok()?,
            _ => None,
        }
    }
}

impl std::fmt::Debug for Terminus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Terminus").field(&self.address()).finish()
    }
}

/// `attach`
#[derive(Debug, Clone, PartialEq)]
pub struct Attach {
    /// Name of the link.
    pub name: Text,
    /// Number of the link at the sender of this attach.
    pub handle: u32,
    /// Role of the sender of this attach.
    pub role: Role,
    /// Settlement by the sending end; `None` = field left out (mixed).
    pub snd_settle: Option<SenderSettle>,
    /// Settlement by the receiving end; `None` = field left out (first).
    pub rcv_settle: Option<ReceiverSettle>,
    /// Source.
    pub source: Option<Terminus>,
    /// Target.
    pub target: Option<Terminus>,
    /// First delivery count; mandatory from a sender.
    pub initial_delivery_count: Option<u32>,
    /// Largest message that the sender of this attach takes, in bytes; 0 = no limit.
    pub max_message_bytes: Option<u64>,
    /// Link properties.
    pub properties: Properties,
}

/// `flow`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flow {
    /// Next transfer number expected.
    pub next_incoming_id: Option<u32>,
    /// Transfer frames that may follow.
    pub incoming_window: u32,
    /// Next transfer number to be used.
    pub next_outgoing_id: u32,
    /// Transfer frames that its sender may send.
    pub outgoing_window: u32,
    /// The link, if the flow is about one.
    pub handle: Option<u32>,
    /// Delivery count of the link.
    pub delivery_count: Option<u32>,
    /// Credit of the link, in deliveries.
    pub link_credit: Option<u32>,
    /// Credit that is not used at once is to be given back.
    pub drain: bool,
    /// The receiver is asked for a flow.
    pub echo: bool,
}

/// `transfer`, without the payload
#[derive(Debug, Clone, PartialEq)]
pub struct Transfer {
    /// The link.
    pub handle: u32,
    /// Number of the delivery; first frame only.
    pub delivery_id: Option<u32>,
    /// Tag; first frame only.
    pub tag: Option<DeliveryTag>,
    /// Message format.
    pub message_format: Option<u32>,
    /// Sent settled.
    pub settled: Option<bool>,
    /// More frames of this delivery follow.
    pub more: bool,
    /// Resumes a delivery of an earlier attach.
    pub resume: bool,
    /// The delivery is given up.
    pub aborted: bool,
}

/// A delivery tag: up to 32 bytes.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct DeliveryTag(SmallVec<[u8; 16]>);

impl DeliveryTag {
    /// The 16-byte tag that AMQP clients of IoT hubs read as a GUID.
    pub fn of(bytes: [u8; 16]) -> Self {
        Self(SmallVec::from(bytes))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Debug for DeliveryTag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:02x?}", &self.0[..])
    }
}

/// `disposition`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disposition {
    /// Role of the sender of this disposition.
    pub role: Role,
    /// First delivery.
    pub first: u32,
    /// Last delivery, included.
    pub last: u32,
    /// The sender of this disposition forgets the deliveries.
    pub settled: bool,
    /// Terminal outcome, if the state is one.
    pub outcome: Option<Outcome>,
}

/// `detach`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Detach {
    /// The link.
    pub handle: u32,
    /// The link ends, and not only its attachment.
    pub closed: bool,
    /// Why.
    pub error: Option<Error>,
}

/// The body of an AMQP frame.
#[derive(Debug, Clone, PartialEq)]
pub enum Performative {
    /// `open`
    Open(Open),
    /// `begin`
    Begin(Begin),
    /// `attach`
    Attach(Box<Attach>),
    /// `flow`
    Flow(Flow),
    /// `transfer`, and where in the frame its payload begins
    Transfer(Transfer, usize),
    /// `disposition`
    Disposition(Disposition),
    /// `detach`
    Detach(Detach),
    /// `end`
    End(Option<Error>),
    /// `close`
    Close(Option<Error>),
}

impl Performative {
    /// Decodes the body of `frame` that begins at `pos`.
    pub fn decode(frame: &Bytes, pos: usize) -> Result<Self, WireError> {
        let mut reader = Reader::new(frame, pos);
        let code = reader.descriptor()?;
        let mut fields = reader.list()?;
        let f = &mut fields;
        Ok(match code {
            0x10 => Self::Open(Open {
                container_id: f.text()?.ok_or(WireError::MissingField)?,
                hostname: f.text()?,
                max_frame_bytes: f.u32()?.unwrap_or(u32::MAX),
                channel_max: f.u16()?.unwrap_or(u16::MAX),
                idle_timeout_millis: f.u32()?,
                properties: {
                    skip(f, 4)?;
                    properties(f)?
                },
            }),
            0x11 => Self::Begin(Begin {
                remote_channel: f.u16()?,
                next_outgoing_id: f.u32()?.ok_or(WireError::MissingField)?,
                incoming_window: f.u32()?.ok_or(WireError::MissingField)?,
                outgoing_window: f.u32()?.ok_or(WireError::MissingField)?,
                handle_max: f.u32()?.unwrap_or(u32::MAX),
            }),
            0x12 => Self::Attach(Box::new(Attach {
                name: f.text()?.ok_or(WireError::MissingField)?,
                handle: f.u32()?.ok_or(WireError::MissingField)?,
                role: Role::of(f.bool()?.ok_or(WireError::MissingField)?),
                snd_settle: match f.u8()? {
                    None => None,
                    Some(0) => Some(SenderSettle::Unsettled),
                    Some(1) => Some(SenderSettle::Settled),
                    Some(2) => Some(SenderSettle::Mixed),
                    Some(_) => return Err(WireError::BadValue),
                },
                rcv_settle: match f.u8()? {
                    None => None,
                    Some(0) => Some(ReceiverSettle::First),
                    Some(1) => Some(ReceiverSettle::Second),
                    Some(_) => return Err(WireError::BadValue),
                },
                source: f.encoded()?.map(Terminus),
                target: f.encoded()?.map(Terminus),
                initial_delivery_count: {
                    skip(f, 2)?;
                    f.u32()?
                },
                max_message_bytes: f.u64()?,
                properties: {
                    skip(f, 2)?;
                    properties(f)?
                },
            })),
            0x13 => Self::Flow(Flow {
                next_incoming_id: f.u32()?,
                incoming_window: f.u32()?.ok_or(WireError::MissingField)?,
                next_outgoing_id: f.u32()?.ok_or(WireError::MissingField)?,
                outgoing_window: f.u32()?.ok_or(WireError::MissingField)?,
                handle: f.u32()?,
                delivery_count: f.u32()?,
                link_credit: f.u32()?,
                drain: {
                    skip(f, 1)?;
                    f.bool()?.unwrap_or(false)
                },
                echo: f.bool()?.unwrap_or(false),
            }),
            0x14 => {
                let transfer = Transfer {
                    handle: f.u32()?.ok_or(WireError::MissingField)?,
                    delivery_id: f.u32()?,
                    tag: match f.binary()? {
                        None => None,
                        Some(tag) if tag.len() <= TAG_MAX_BYTES => {
                            Some(DeliveryTag(SmallVec::from_slice(&tag)))
                        }
                        Some(_) => return Err(WireError::BadValue),
                    },
                    message_format: f.u32()?,
                    settled: f.bool()?,
                    more: f.bool()?.unwrap_or(false),
                    resume: {
                        skip(f, 2)?;
                        f.bool()?.unwrap_or(false)
                    },
                    aborted: f.bool()?.unwrap_or(false),
                };
                Self::Transfer(transfer, reader.position())
            }
            0x15 => {
                let role = Role::of(f.bool()?.ok_or(WireError::MissingField)?);
                let first = f.u32()?.ok_or(WireError::MissingField)?;
                Self::Disposition(Disposition {
                    role,
                    first,
                    last: f.u32()?.unwrap_or(first),
                    settled: f.bool()?.unwrap_or(false),
                    outcome: f.present().map_or(Ok(None), outcome)?,
                })
            }
            0x16 => Self::Detach(Detach {
                handle: f.u32()?.ok_or(WireError::MissingField)?,
                closed: f.bool()?.unwrap_or(false),
                error: error(f)?,
            }),
            0x17 => Self::End(error(f)?),
            0x18 => Self::Close(error(f)?),
            _ => return Err(WireError::UnexpectedDescriptor),
        })
    }
}

/// The client's part of SASL: `sasl-init`.
#[derive(Debug)]
pub(super) struct SaslInit {
    pub(super) mechanism: Text,
    pub(super) initial_response: Option<Bytes>,
}

impl SaslInit {
    pub(super) fn decode(frame: &Bytes, pos: usize) -> Result<Self, WireError> {
        let mut reader = Reader::new(frame, pos);
        if reader.descriptor()? != 0x41 {
            return Err(WireError::UnexpectedDescriptor);
        }
        let mut fields = reader.list()?;
        Ok(Self {
            mechanism: fields.text()?.ok_or(WireError::MissingField)?,
            initial_response: fields.binary()?,
        })
    }
}

fn skip(fields: &mut Fields<'_>, count: usize) -> Result<(), WireError> {
    for _ in 0..count {
        fields.encoded()?;
    }
    Ok(())
}

fn properties(fields: &mut Fields<'_>) -> Result<Properties, WireError> {
    let Some(reader) = fields.present() else { return Ok(Vec::new()) };
    let mut map = reader.map()?;
    let mut properties = Vec::new();
    while !map.is_empty() && properties.len() < PROPERTIES_MAX {
        let (key, value) = (map.value()?, map.value()?);
        if let Value::Symbol(key) | Value::String(key) = key {
            properties.push((key, value));
        }
    }
    Ok(properties)
}

fn error(fields: &mut Fields<'_>) -> Result<Option<Error>, WireError> {
    let Some(reader) = fields.present() else { return Ok(None) };
    if reader.descriptor()? != 0x1d {
        return Err(WireError::UnexpectedDescriptor);
    }
    let mut list = reader.list()?;
    let condition = list.text()?.ok_or(WireError::MissingField)?;
    Ok(Some(Error {
        condition: Condition::from(condition.to_string()),
        description: list.text()?.map(|text| text.to_string()),
    }))
}

/// The outcome of a delivery state; `None` for states that are none (`received`, transactional ones).
fn outcome(reader: &mut Reader<'_>) -> Result<Option<Outcome>, WireError> {
    let code = reader.descriptor();
    match code {
        Ok(0x24) => Ok(Some(Outcome::Accepted)),
        Ok(0x25) => Ok(Some(Outcome::Rejected(error(&mut reader.list()?)?))),
        Ok(0x26) => Ok(Some(Outcome::Released)),
        Ok(0x27) => {
            let mut list = reader.list()?;
            Ok(Some(Outcome::Modified {
                delivery_failed: list.bool()?.unwrap_or(false),
                undeliverable_here: list.bool()?.unwrap_or(false),
            }))
        }
        Ok(_) | Err(WireError::UnexpectedDescriptor) => Ok(None),
        Err(error) => Err(error),
    }
}
