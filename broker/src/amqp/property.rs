//! Application properties between AMQP values and the text that the hub keeps of them, type and all.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::BytesMut;

use super::encode::{put_null, put_string, put_symbol, put_value};
use super::text::{MessageId, parse_timestamp};
use super::value::Value;
use crate::message::PropertyKind;

/// The type of a value; `None` for lists, maps and what else has no text form.
pub(crate) fn kind_of(value: &Value) -> Option<PropertyKind> {
    Some(match value {
        Value::Null => PropertyKind::Null,
        Value::Bool(_) => PropertyKind::Bool,
        Value::Ubyte(_) => PropertyKind::Ubyte,
        Value::Ushort(_) => PropertyKind::Ushort,
        Value::Uint(_) => PropertyKind::Uint,
        Value::Ulong(_) => PropertyKind::Ulong,
        Value::Byte(_) => PropertyKind::Byte,
        Value::Short(_) => PropertyKind::Short,
        Value::Int(_) => PropertyKind::Int,
        Value::Long(_) => PropertyKind::Long,
        Value::Float(_) => PropertyKind::Float,
        Value::Double(_) => PropertyKind::Double,
        Value::Char(_) => PropertyKind::Char,
        Value::TimestampMillis(_) => PropertyKind::Timestamp,
        Value::Uuid(_) => PropertyKind::Uuid,
        Value::Binary(_) => PropertyKind::Binary,
        Value::String(_) => PropertyKind::Text,
        Value::Symbol(_) => PropertyKind::Symbol,
        Value::Encoded(_) => return None,
    })
}

/// Appends a property in its type; as text if that is not what its text says.
pub(crate) fn put_property(out: &mut BytesMut, (text, kind): (&str, PropertyKind)) {
    let value = match kind {
        PropertyKind::Text => return put_string(out, text),
        PropertyKind::Symbol => return put_symbol(out, text),
        PropertyKind::Null => return put_null(out),
        PropertyKind::Bool => text.parse().ok().map(Value::Bool),
        PropertyKind::Ubyte => text.parse().ok().map(Value::Ubyte),
        PropertyKind::Ushort => text.parse().ok().map(Value::Ushort),
        PropertyKind::Uint => text.parse().ok().map(Value::Uint),
        PropertyKind::Ulong => text.parse().ok().map(Value::Ulong),
        PropertyKind::Byte => text.parse().ok().map(Value::Byte),
        PropertyKind::Short => text.parse().ok().map(Value::Short),
        PropertyKind::Int => text.parse().ok().map(Value::Int),
        PropertyKind::Long => text.parse().ok().map(Value::Long),
        PropertyKind::Float => text.parse().ok().map(Value::Float),
        PropertyKind::Double => text.parse().ok().map(Value::Double),
        PropertyKind::Char => text.parse().ok().map(Value::Char),
        PropertyKind::Timestamp => parse_timestamp(text).map(Value::TimestampMillis),
        PropertyKind::Uuid => match MessageId::uuid_or_string(text) {
            MessageId::Uuid(bytes) => Some(Value::Uuid(bytes)),
            _ => None,
        },
        PropertyKind::Binary => STANDARD.decode(text).ok().map(|bytes| Value::Binary(bytes.into())),
    };
    match value {
        Some(value) => put_value(out, &value),
        None => put_string(out, text),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::amqp::property_text;
    use crate::amqp::value::Reader;

    fn there_and_back(value: &Value) -> Value {
        let (text, kind) = (property_text(value).unwrap(), kind_of(value).unwrap());
        let mut out = BytesMut::new();
        put_property(&mut out, (&text, kind));
        Reader::new(&out.freeze(), 0).value().unwrap()
    }

    proptest! {
        #[test]
        fn values_keep_their_type(
            number in any::<i64>(),
            float in any::<f64>().prop_filter("a number equal to itself", |float| !float.is_nan()),
            character in any::<char>(),
            millis in 0i64..253_402_300_799_999,
            bytes in proptest::collection::vec(any::<u8>(), 0..40),
            uuid in any::<[u8; 16]>(),
            text in ".{0,20}",
        ) {
            for value in [
                Value::Null, Value::Bool(number % 2 == 0), Value::Ubyte(number as u8), Value::Ushort(number as u16),
                Value::Uint(number as u32), Value::Ulong(number as u64), Value::Byte(number as i8),
                Value::Short(number as i16), Value::Int(number as i32), Value::Long(number),
                Value::Float(float as f32), Value::Double(float), Value::Char(character),
                Value::TimestampMillis(millis), Value::Uuid(uuid), Value::Binary(Bytes::from(bytes)),
                Value::String(text.as_str().into()), Value::Symbol(text.as_str().into()),
            ] {
                prop_assert_eq!(there_and_back(&value), value);
            }
        }
    }

    #[test]
    fn a_text_that_is_not_of_its_type_stays_text() {
        for kind in PropertyKind::ALL {
            let mut out = BytesMut::new();
            put_property(&mut out, ("no such value", *kind));
            let value = Reader::new(&out.freeze(), 0).value().unwrap();
            let expected = match kind {
                PropertyKind::Null => Value::Null,
                PropertyKind::Symbol => Value::Symbol("no such value".into()),
                _ => Value::String("no such value".into()),
            };
            assert_eq!(value, expected);
        }
    }
}
