//! AMQP values as slices of the receive buffer, and the reader that takes them out of checked bytes.

use std::fmt;
use std::ops::Deref;

use bytes::Bytes;

use super::error::WireError;
use super::wire::{check_value, compound_header, walked_end};

/// UTF-8 text that is a slice of the buffer it arrived in.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Text(Bytes);

impl Text {
    /// Takes bytes that must be UTF-8.
    pub fn new(bytes: Bytes) -> Result<Self, WireError> {
        match std::str::from_utf8(&bytes) {
            Ok(_) => Ok(Self(bytes)),
            Err(_) => Err(WireError::BadValue),
        }
    }

    /// A text of the program, without allocation.
    pub fn from_static(text: &'static str) -> Self {
        Self(Bytes::from_static(text.as_bytes()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("checked text") // every constructor checks UTF-8, and Bytes never change
    }

    /// A copy that does not keep the receive buffer alive, for texts that are kept long.
    pub fn detached(&self) -> Self {
        Self(Bytes::copy_from_slice(&self.0))
    }

    /// The bytes of the text; no copy.
    pub fn into_bytes(self) -> Bytes {
        self.0
    }

    /// The bytes of the text.
    pub fn as_bytes(&self) -> &Bytes {
        &self.0
    }
}

impl From<String> for Text {
    fn from(text: String) -> Self {
        Self(Bytes::from(text))
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self(Bytes::copy_from_slice(text.as_bytes()))
    }
}

impl Deref for Text {
    type Target = str;

    fn deref(&self) -> &str {
        self.as_str()
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl PartialEq<str> for Text {
    fn eq(&self, other: &str) -> bool {
        &self.0[..] == other.as_bytes()
    }
}

impl PartialEq<&str> for Text {
    fn eq(&self, other: &&str) -> bool {
        &self.0[..] == other.as_bytes()
    }
}

/// One AMQP value (AMQP 1.0 §1.6). Variable-width values are slices, never copies.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// `null`
    Null,
    /// `boolean`
    Bool(bool),
    /// `ubyte`
    Ubyte(u8),
    /// `ushort`
    Ushort(u16),
    /// `uint`
    Uint(u32),
    /// `ulong`
    Ulong(u64),
    /// `byte`
    Byte(i8),
    /// `short`
    Short(i16),
    /// `int`
    Int(i32),
    /// `long`
    Long(i64),
    /// `float`
    Float(f32),
    /// `double`
    Double(f64),
    /// `char`
    Char(char),
    /// `timestamp`, milliseconds since 1970 (UTC)
    TimestampMillis(i64),
    /// `uuid`, in network order
    Uuid([u8; 16]),
    /// `binary`
    Binary(Bytes),
    /// `string`
    String(Text),
    /// `symbol`
    Symbol(Text),
    /// Lists, maps, arrays, decimals and described values: the complete encoding, checked, not decoded.
    Encoded(Bytes),
}

impl Value {
    /// Text of a string or a symbol.
    pub fn as_text(&self) -> Option<&Text> {
        match self {
            Self::String(text) | Self::Symbol(text) => Some(text),
            _ => None,
        }
    }

    /// Any of the integer types, if it fits.
    pub fn as_i64(&self) -> Option<i64> {
        match *self {
            Self::Ubyte(v) => Some(v.into()),
            Self::Ushort(v) => Some(v.into()),
            Self::Uint(v) => Some(v.into()),
            Self::Ulong(v) => i64::try_from(v).ok(),
            Self::Byte(v) => Some(v.into()),
            Self::Short(v) => Some(v.into()),
            Self::Int(v) => Some(v.into()),
            Self::Long(v) => Some(v),
            _ => None,
        }
    }
}

/// Reads values one after the other out of bytes of a peer. Each value is checked by
/// [`check_value`] before it is touched.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    bytes: &'a Bytes,
    pos: usize,
    end: usize,
    /// The bytes were walked as part of what is around them.
    walked: bool,
}

impl<'a> Reader<'a> {
    /// Reads from `pos` up to the end of `bytes`.
    pub fn new(bytes: &'a Bytes, pos: usize) -> Self {
        Self { bytes, pos, end: bytes.len(), walked: false }
    }

    /// Reads one value that [`check_value`] has passed before.
    pub(super) fn walked(bytes: &'a Bytes) -> Self {
        Self { bytes, pos: 0, end: bytes.len(), walked: true }
    }

    /// End of the value at the reader's place.
    fn value_end(&self) -> Result<usize, WireError> {
        let bytes = &self.bytes[..self.end];
        if self.walked { walked_end(bytes, self.pos) } else { check_value(bytes, self.pos) }
    }

    /// Position behind what was read.
    pub fn position(&self) -> usize {
        self.pos
    }

    /// Steps over one value and gives its encoding.
    pub fn skip(&mut self) -> Result<Bytes, WireError> {
        let end = self.value_end()?;
        let encoded = self.bytes.slice(self.pos..end);
        self.pos = end;
        Ok(encoded)
    }

    /// The next value.
    pub fn value(&mut self) -> Result<Value, WireError> {
        let start = self.pos;
        let end = self.value_end()?;
        self.pos = end;
        let b = &self.bytes[start..end];
        let code = b[0];
        Ok(match code {
            0x40 => Value::Null,
            0x41 => Value::Bool(true),
            0x42 => Value::Bool(false),
            0x56 => match b[1] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                _ => return Err(WireError::BadValue),
            },
            0x50 => Value::Ubyte(b[1]),
            0x60 => Value::Ushort(u16::from_be_bytes(fixed(b)?)),
            0x43 => Value::Uint(0),
            0x52 => Value::Uint(b[1].into()),
            0x70 => Value::Uint(u32::from_be_bytes(fixed(b)?)),
            0x44 => Value::Ulong(0),
            0x53 => Value::Ulong(b[1].into()),
            0x80 => Value::Ulong(u64::from_be_bytes(fixed(b)?)),
            0x51 => Value::Byte(i8::from_be_bytes(fixed(b)?)),
            0x61 => Value::Short(i16::from_be_bytes(fixed(b)?)),
            0x54 => Value::Int(i8::from_be_bytes(fixed(b)?).into()),
            0x71 => Value::Int(i32::from_be_bytes(fixed(b)?)),
            0x55 => Value::Long(i8::from_be_bytes(fixed(b)?).into()),
            0x81 => Value::Long(i64::from_be_bytes(fixed(b)?)),
            0x72 => Value::Float(f32::from_be_bytes(fixed(b)?)),
            0x82 => Value::Double(f64::from_be_bytes(fixed(b)?)),
            0x73 => Value::Char(char::from_u32(u32::from_be_bytes(fixed(b)?)).ok_or(WireError::BadValue)?),
            0x83 => Value::TimestampMillis(i64::from_be_bytes(fixed(b)?)),
            0x98 => Value::Uuid(fixed(b)?),
            0xa0 => Value::Binary(self.bytes.slice(start + 2..end)),
            0xb0 => Value::Binary(self.bytes.slice(start + 5..end)),
            0xa1 => Value::String(Text::new(self.bytes.slice(start + 2..end))?),
            0xb1 => Value::String(Text::new(self.bytes.slice(start + 5..end))?),
            0xa3 => Value::Symbol(Text::new(self.bytes.slice(start + 2..end))?),
            0xb3 => Value::Symbol(Text::new(self.bytes.slice(start + 5..end))?),
            _ => Value::Encoded(self.bytes.slice(start..end)),
        })
    }

    /// The next value, which must be a string or a symbol: without the detour over a value.
    fn text(&mut self) -> Result<Text, WireError> {
        let bytes = &self.bytes[..self.end];
        let (start, size) = match bytes.get(self.pos..) {
            Some([0xa1 | 0xa3, size, ..]) => (self.pos + 2, usize::from(*size)),
            Some([0xb1 | 0xb3, a, b, c, d, ..]) => {
                (self.pos + 5, u32::from_be_bytes([*a, *b, *c, *d]) as usize)
            }
            _ => return Err(WireError::WrongType),
        };
        let end = start.saturating_add(size);
        if end > bytes.len() {
            return Err(WireError::Truncated);
        }
        self.pos = end;
        Text::new(self.bytes.slice(start..end))
    }

    /// Whether a string or a symbol is next.
    fn is_at_text(&self) -> bool {
        matches!(self.bytes.get(self.pos), Some(0xa1 | 0xa3 | 0xb1 | 0xb3))
    }

    /// The descriptor of a described value; numeric forms and the symbols of the message sections.
    /// The reader then stands at the value.
    pub fn descriptor(&mut self) -> Result<u64, WireError> {
        if self.bytes[..self.end].get(self.pos) != Some(&0x00) {
            return Err(WireError::WrongType);
        }
        self.pos += 1;
        match self.value()? {
            Value::Ulong(code) => Ok(code),
            Value::Symbol(name) => symbolic_descriptor(&name).ok_or(WireError::UnexpectedDescriptor),
            _ => Err(WireError::UnexpectedDescriptor),
        }
    }

    /// Enters a list: a reader for its elements.
    pub fn list(&mut self) -> Result<Fields<'a>, WireError> {
        self.compound(0x45, 0xc0, 0xd0)
    }

    /// Enters a map: a reader for its keys and values in turn.
    pub fn map(&mut self) -> Result<Fields<'a>, WireError> {
        self.compound(0x100, 0xc1, 0xd1)
    }

    fn compound(&mut self, empty: u16, short: u8, long: u8) -> Result<Fields<'a>, WireError> {
        let start = self.pos;
        let end = self.value_end()?;
        self.pos = end;
        let code = self.bytes[start];
        if u16::from(code) == empty {
            return Ok(Fields { reader: Reader { bytes: self.bytes, pos: end, end, walked: true }, left: 0 });
        }
        if code != short && code != long {
            return Err(WireError::WrongType);
        }
        let (_, count, content) = compound_header(self.bytes, start + 1, code == short)?;
        Ok(Fields { reader: Reader { bytes: self.bytes, pos: content, end, walked: true }, left: count })
    }
}

/// The elements of a list or map. Missing trailing fields of a list read as null.
#[derive(Debug, Clone)]
pub struct Fields<'a> {
    reader: Reader<'a>,
    left: u32,
}

impl<'a> Fields<'a> {
    /// Elements that are left.
    pub fn len(&self) -> usize {
        self.left as usize
    }

    /// True when no element is left.
    pub fn is_empty(&self) -> bool {
        self.left == 0
    }

    /// The reader at the next element; `None` when it is null or there is none.
    pub fn present(&mut self) -> Option<&mut Reader<'a>> {
        if self.left == 0 {
            return None;
        }
        self.left -= 1;
        if self.reader.bytes.get(self.reader.pos) == Some(&0x40) {
            self.reader.pos += 1;
            return None;
        }
        Some(&mut self.reader)
    }

    /// The next element, null when there is none.
    pub fn value(&mut self) -> Result<Value, WireError> {
        match self.present() {
            Some(reader) => reader.value(),
            None => Ok(Value::Null),
        }
    }

    /// The encoding of the next element; `None` when null.
    pub fn encoded(&mut self) -> Result<Option<Bytes>, WireError> {
        self.present().map(Reader::skip).transpose()
    }

    /// A boolean field.
    pub fn bool(&mut self) -> Result<Option<bool>, WireError> {
        let Some(reader) = self.present() else { return Ok(None) };
        // The two short forms, of which transfers are full, without the detour over a value.
        let flag = match reader.bytes.get(reader.pos) {
            Some(0x41) => true,
            Some(0x42) => false,
            _ => {
                return match reader.value()? {
                    Value::Bool(flag) => Ok(Some(flag)),
                    _ => Err(WireError::WrongType),
                };
            }
        };
        reader.pos += 1;
        Ok(Some(flag))
    }

    /// A `ubyte` field.
    pub fn u8(&mut self) -> Result<Option<u8>, WireError> {
        match self.value()? {
            Value::Null => Ok(None),
            Value::Ubyte(v) => Ok(Some(v)),
            _ => Err(WireError::WrongType),
        }
    }

    /// A `ushort` field.
    pub fn u16(&mut self) -> Result<Option<u16>, WireError> {
        match self.value()? {
            Value::Null => Ok(None),
            Value::Ushort(v) => Ok(Some(v)),
            _ => Err(WireError::WrongType),
        }
    }

    /// A `uint` field.
    pub fn u32(&mut self) -> Result<Option<u32>, WireError> {
        let Some(reader) = self.present() else { return Ok(None) };
        let (number, width) = match reader.bytes.get(reader.pos..reader.end) {
            Some([0x43, ..]) => (0, 1),
            Some([0x52, number, ..]) => (u32::from(*number), 2),
            Some([0x70, a, b, c, d, ..]) => (u32::from_be_bytes([*a, *b, *c, *d]), 5),
            _ => return Err(WireError::WrongType),
        };
        reader.pos += width;
        Ok(Some(number))
    }

    /// A `ulong` field.
    pub fn u64(&mut self) -> Result<Option<u64>, WireError> {
        match self.value()? {
            Value::Null => Ok(None),
            Value::Ulong(v) => Ok(Some(v)),
            _ => Err(WireError::WrongType),
        }
    }

    /// A `timestamp` field, milliseconds since 1970.
    pub fn timestamp_millis(&mut self) -> Result<Option<i64>, WireError> {
        match self.value()? {
            Value::Null => Ok(None),
            Value::TimestampMillis(v) => Ok(Some(v)),
            _ => Err(WireError::WrongType),
        }
    }

    /// A `binary` field.
    pub fn binary(&mut self) -> Result<Option<Bytes>, WireError> {
        match self.value()? {
            Value::Null => Ok(None),
            Value::Binary(v) => Ok(Some(v)),
            _ => Err(WireError::WrongType),
        }
    }

    /// A `string` or `symbol` field. Peers mix the two up, and both are text.
    pub fn text(&mut self) -> Result<Option<Text>, WireError> {
        self.present().map(Reader::text).transpose()
    }

    /// The key of the next entry of a map; `None` when it is no text, or there is none.
    pub(super) fn key(&mut self) -> Result<Option<Text>, WireError> {
        match self.present() {
            Some(reader) if reader.is_at_text() => reader.text().map(Some),
            Some(reader) => reader.value().map(|_| None),
            None => Ok(None),
        }
    }
}

fn fixed<const N: usize>(encoded: &[u8]) -> Result<[u8; N], WireError> {
    encoded.get(1..).and_then(|rest| rest.first_chunk::<N>()).copied().ok_or(WireError::Truncated)
}

fn symbolic_descriptor(name: &str) -> Option<u64> {
    Some(match name {
        "amqp:open:list" => 0x10,
        "amqp:begin:list" => 0x11,
        "amqp:attach:list" => 0x12,
        "amqp:flow:list" => 0x13,
        "amqp:transfer:list" => 0x14,
        "amqp:disposition:list" => 0x15,
        "amqp:detach:list" => 0x16,
        "amqp:end:list" => 0x17,
        "amqp:close:list" => 0x18,
        "amqp:error:list" => 0x1d,
        "amqp:received:list" => 0x23,
        "amqp:accepted:list" => 0x24,
        "amqp:rejected:list" => 0x25,
        "amqp:released:list" => 0x26,
        "amqp:modified:list" => 0x27,
        "amqp:source:list" => 0x28,
        "amqp:target:list" => 0x29,
        "amqp:sasl-mechanisms:list" => 0x40,
        "amqp:sasl-init:list" => 0x41,
        "amqp:sasl-outcome:list" => 0x44,
        "amqp:header:list" => 0x70,
        "amqp:delivery-annotations:map" => 0x71,
        "amqp:message-annotations:map" => 0x72,
        "amqp:properties:list" => 0x73,
        "amqp:application-properties:map" => 0x74,
        "amqp:data:binary" => 0x75,
        "amqp:amqp-sequence:list" => 0x76,
        "amqp:amqp-value:*" => 0x77,
        "amqp:footer:map" => 0x78,
        _ => return None,
    })
}
