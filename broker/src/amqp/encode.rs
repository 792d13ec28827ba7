//! Writing AMQP values: the shortest encoding of each, and lists and maps whose size is filled in afterwards.

use bytes::{BufMut, BytesMut};

use super::value::Value;

/// Appends `null`.
pub fn put_null(out: &mut BytesMut) {
    out.put_u8(0x40);
}

/// Appends a boolean.
pub fn put_bool(out: &mut BytesMut, value: bool) {
    out.put_u8(if value { 0x41 } else { 0x42 });
}

/// Appends a `uint`.
pub fn put_uint(out: &mut BytesMut, value: u32) {
    match value {
        0 => out.put_u8(0x43),
        1..=0xff => out.put_slice(&[0x52, value as u8]),
        _ => {
            out.put_u8(0x70);
            out.put_u32(value);
        }
    }
}

/// Appends a `ulong`.
pub fn put_ulong(out: &mut BytesMut, value: u64) {
    match value {
        0 => out.put_u8(0x44),
        1..=0xff => out.put_slice(&[0x53, value as u8]),
        _ => {
            out.put_u8(0x80);
            out.put_u64(value);
        }
    }
}

/// Appends an `int`.
pub fn put_int(out: &mut BytesMut, value: i32) {
    match i8::try_from(value) {
        Ok(small) => {
            out.put_u8(0x54);
            out.put_i8(small);
        }
        Err(_) => {
            out.put_u8(0x71);
            out.put_i32(value);
        }
    }
}

/// Appends a `long`.
pub fn put_long(out: &mut BytesMut, value: i64) {
    match i8::try_from(value) {
        Ok(small) => {
            out.put_u8(0x55);
            out.put_i8(small);
        }
        Err(_) => {
            out.put_u8(0x81);
            out.put_i64(value);
        }
    }
}

/// Appends a `string`.
pub fn put_string(out: &mut BytesMut, value: &str) {
    put_variable(out, 0xa1, 0xb1, value.as_bytes());
}

/// Appends a `symbol`.
pub fn put_symbol(out: &mut BytesMut, value: &str) {
    put_variable(out, 0xa3, 0xb3, value.as_bytes());
}

/// Appends a `binary`.
pub fn put_binary(out: &mut BytesMut, value: &[u8]) {
    put_variable(out, 0xa0, 0xb0, value);
}

/// Appends constructor and length of a `binary` whose bytes the caller sends behind it.
pub fn put_binary_header(out: &mut BytesMut, len: usize) {
    put_variable_header(out, 0xa0, 0xb0, len);
}

/// Appends a descriptor with a numeric code.
pub fn put_descriptor(out: &mut BytesMut, code: u64) {
    out.put_u8(0x00);
    put_ulong(out, code);
}

/// Appends any value.
pub fn put_value(out: &mut BytesMut, value: &Value) {
    match value {
        Value::Null => put_null(out),
        Value::Bool(v) => put_bool(out, *v),
        Value::Ubyte(v) => out.put_slice(&[0x50, *v]),
        Value::Ushort(v) => {
            out.put_u8(0x60);
            out.put_u16(*v);
        }
        Value::Uint(v) => put_uint(out, *v),
        Value::Ulong(v) => put_ulong(out, *v),
        Value::Byte(v) => {
            out.put_u8(0x51);
            out.put_i8(*v);
        }
        Value::Short(v) => {
            out.put_u8(0x61);
            out.put_i16(*v);
        }
        Value::Int(v) => put_int(out, *v),
        Value::Long(v) => put_long(out, *v),
        Value::Float(v) => {
            out.put_u8(0x72);
            out.put_f32(*v);
        }
        Value::Double(v) => {
            out.put_u8(0x82);
            out.put_f64(*v);
        }
        Value::Char(v) => {
            out.put_u8(0x73);
            out.put_u32(u32::from(*v));
        }
        Value::TimestampMillis(v) => {
            out.put_u8(0x83);
            out.put_i64(*v);
        }
        Value::Uuid(v) => {
            out.put_u8(0x98);
            out.put_slice(v);
        }
        Value::Binary(v) => put_binary(out, v),
        Value::String(v) => put_string(out, v),
        Value::Symbol(v) => put_symbol(out, v),
        Value::Encoded(v) => out.put_slice(v),
    }
}

fn put_variable(out: &mut BytesMut, short: u8, long: u8, value: &[u8]) {
    put_variable_header(out, short, long, value.len());
    out.put_slice(value);
}

fn put_variable_header(out: &mut BytesMut, short: u8, long: u8, len: usize) {
    match u8::try_from(len) {
        Ok(len) => out.put_slice(&[short, len]),
        Err(_) => {
            out.put_u8(long);
            // Everything that is sent is bounded by a message size far below 4 GiB.
            out.put_u32(u32::try_from(len).unwrap_or(u32::MAX));
        }
    }
}

/// A list or map under construction. Trailing nulls are left out, size and count are patched by
/// [`CompoundWriter::finish`].
#[derive(Debug)]
pub struct CompoundWriter<'a> {
    out: &'a mut BytesMut,
    start: usize,
    count: u32,
    nulls: u32,
}

impl<'a> CompoundWriter<'a> {
    /// Starts a list with a descriptor.
    pub fn described_list(out: &'a mut BytesMut, descriptor: u64) -> Self {
        put_descriptor(out, descriptor);
        Self::start(out, 0xd0)
    }

    /// Starts a map with a descriptor.
    pub fn described_map(out: &'a mut BytesMut, descriptor: u64) -> Self {
        put_descriptor(out, descriptor);
        Self::start(out, 0xd1)
    }

    /// Starts a map.
    pub fn map(out: &'a mut BytesMut) -> Self {
        Self::start(out, 0xd1)
    }

    fn start(out: &'a mut BytesMut, code: u8) -> Self {
        out.put_slice(&[code, 0, 0, 0, 0, 0, 0, 0, 0]);
        let start = out.len();
        Self { out, start, count: 0, nulls: 0 }
    }

    /// Leaves the next field null.
    pub fn null(&mut self) -> &mut Self {
        self.nulls += 1;
        self
    }

    /// Place for exactly one value.
    pub fn field(&mut self) -> &mut BytesMut {
        for _ in 0..self.nulls {
            put_null(self.out);
        }
        self.count += 1 + self.nulls;
        self.nulls = 0;
        self.out
    }

    /// One value if there is one, else null.
    pub fn optional<T>(&mut self, value: Option<T>, put: impl FnOnce(&mut BytesMut, T)) -> &mut Self {
        match value {
            Some(value) => put(self.field(), value),
            None => self.nulls += 1,
        }
        self
    }

    /// One entry of a map.
    pub fn entry(&mut self, put_key: impl FnOnce(&mut BytesMut), put: impl FnOnce(&mut BytesMut)) {
        put_key(self.field());
        put(self.field());
    }

    /// Writes size and count.
    pub fn finish(self) {
        let size = self.out.len() - self.start + 4;
        let size = u32::try_from(size).unwrap_or(u32::MAX);
        let header = self.start - 8;
        self.out[header..header + 4].copy_from_slice(&size.to_be_bytes());
        self.out[header + 4..header + 8].copy_from_slice(&self.count.to_be_bytes());
    }
}
