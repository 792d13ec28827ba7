//! Message ids and the text forms of AMQP values: what a hub that knows only text makes of them.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};

use super::encode::*;
use super::error::WireError;
use super::value::{Reader, Text, Value};

/// A message or correlation id, with the type it came with (AMQP 1.0 §3.2.11–§3.2.14).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum MessageId {
    /// `string`
    String(Text),
    /// `uuid`, in network order
    Uuid([u8; 16]),
    /// `ulong`
    Ulong(u64),
    /// `binary`
    Binary(Bytes),
}

impl MessageId {
    pub(super) fn of(value: Value) -> Result<Option<Self>, WireError> {
        Ok(Some(match value {
            Value::Null => return Ok(None),
            Value::String(text) | Value::Symbol(text) => Self::String(text),
            Value::Uuid(bytes) => Self::Uuid(bytes),
            Value::Ulong(number) => Self::Ulong(number),
            Value::Binary(bytes) => Self::Binary(bytes),
            _ => return Err(WireError::WrongType),
        }))
    }

    pub(super) fn put(&self, out: &mut BytesMut) {
        match self {
            Self::String(text) => put_string(out, text),
            Self::Uuid(bytes) => put_value(out, &Value::Uuid(*bytes)),
            Self::Ulong(number) => put_ulong(out, *number),
            Self::Binary(bytes) => put_binary(out, bytes),
        }
    }
}

/// The text form: strings as they are, uuids in lower case with dashes, numbers in decimal, binary in Base64.
impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::String(text) => f.write_str(text),
            Self::Uuid(bytes) => write_uuid(f, bytes),
            Self::Ulong(number) => write!(f, "{number}"),
            Self::Binary(bytes) => f.write_str(&STANDARD.encode(bytes)),
        }
    }
}

impl MessageId {
    /// The encoded value, type included: a mark that [`MessageId::from_encoded`] turns back.
    pub fn encoded(&self) -> Bytes {
        let mut out = BytesMut::new();
        self.put(&mut out);
        out.freeze()
    }

    /// The id out of its encoded value.
    ///
    /// # Errors
    /// When the bytes are no encoded id.
    pub fn from_encoded(encoded: &Bytes) -> Result<Self, WireError> {
        Self::of(Reader::new(encoded, 0).value()?)?.ok_or(WireError::MissingField)
    }

    /// The text form, without a copy of what is text.
    pub fn into_text(self) -> Text {
        match self {
            Self::String(text) => text,
            other => other.to_string().into(),
        }
    }

    /// The id for a text: a uuid if it is one, else a string. Clients that parse ids as GUIDs want the first.
    pub fn uuid_or_string(text: &str) -> Self {
        match parse_uuid(text) {
            Some(bytes) => Self::Uuid(bytes),
            None => Self::String(text.into()),
        }
    }

    /// True when both have the same text form: clients answer a text id with a uuid and the reverse.
    pub fn is_same(&self, other: &Self) -> bool {
        self == other || self.to_string().eq_ignore_ascii_case(&other.to_string())
    }
}

/// The text form of an application property: booleans `true`/`false`, numbers in their shortest decimal form, uuids
/// in lower case, timestamps as ISO 8601 with seven decimals in UTC, binary in Base64, null empty. `None` for
/// lists, maps and what else has no text form.
pub fn property_text(value: &Value) -> Option<Text> {
    Some(match value {
        Value::String(text) | Value::Symbol(text) => text.clone(),
        Value::Null => Text::default(),
        Value::Bool(v) => Text::from_static(if *v { "true" } else { "false" }),
        Value::Ubyte(v) => v.to_string().into(),
        Value::Ushort(v) => v.to_string().into(),
        Value::Uint(v) => v.to_string().into(),
        Value::Ulong(v) => v.to_string().into(),
        Value::Byte(v) => v.to_string().into(),
        Value::Short(v) => v.to_string().into(),
        Value::Int(v) => v.to_string().into(),
        Value::Long(v) => v.to_string().into(),
        Value::Float(v) => v.to_string().into(),
        Value::Double(v) => v.to_string().into(),
        Value::Char(v) => v.to_string().into(),
        Value::TimestampMillis(millis) => timestamp_text(*millis)?.into(),
        Value::Uuid(bytes) => MessageId::Uuid(*bytes).to_string().into(),
        Value::Binary(bytes) => STANDARD.encode(bytes).into(),
        Value::Encoded(_) => return None,
    })
}

/// `yyyy-MM-ddTHH:mm:ss.fffffffZ` of a time in milliseconds since 1970; `None` outside the years 0 to 9999.
pub fn timestamp_text(millis: i64) -> Option<String> {
    let time = time::OffsetDateTime::from_unix_timestamp_nanos(i128::from(millis) * 1_000_000).ok()?;
    (0..=9_999).contains(&time.year()).then(|| {
        let (date, clock) = (time.date(), time.time());
        format!(
            "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}0000Z",
            date.year(),
            u8::from(date.month()),
            date.day(),
            clock.hour(),
            clock.minute(),
            clock.second(),
            clock.millisecond()
        )
    })
}

/// The milliseconds since 1970 of an ISO 8601 time with an offset or `Z`; `None` when the text is none.
pub fn parse_timestamp(text: &str) -> Option<i64> {
    let time = time::OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339).ok()?;
    i64::try_from(time.unix_timestamp_nanos().div_euclid(1_000_000)).ok()
}

/// The delivery tag of a lock token that is a GUID: its bytes in .NET order, the first three groups reversed.
/// `None` when the token is no GUID.
pub fn lock_token_tag(token: &str) -> Option<[u8; 16]> {
    parse_uuid(token).map(swap_guid)
}

/// The lock token that a 16-byte delivery tag stands for; the reverse of [`lock_token_tag`].
pub fn tag_lock_token(tag: [u8; 16]) -> String {
    MessageId::Uuid(swap_guid(tag)).to_string()
}

fn swap_guid(mut bytes: [u8; 16]) -> [u8; 16] {
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes
}

/// 32 hexadecimal digits with dashes at the usual places.
fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let text: &[u8; 36] = text.as_bytes().try_into().ok()?;
    let mut bytes = [0; 16];
    let mut at = 0;
    for byte in &mut bytes {
        if matches!(at, 8 | 13 | 18 | 23) {
            if text[at] != b'-' {
                return None;
            }
            at += 1;
        }
        let digit = |at: usize| char::from(text[at]).to_digit(16);
        *byte = (digit(at)? * 16 + digit(at + 1)?) as u8;
        at += 2;
    }
    Some(bytes)
}

fn write_uuid(f: &mut fmt::Formatter<'_>, bytes: &[u8; 16]) -> fmt::Result {
    for (at, byte) in bytes.iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            f.write_str("-")?;
        }
        write!(f, "{byte:02x}")?;
    }
    Ok(())
}
