//! The stored form of a message: one contiguous run of bytes, written once and read back as slices.
//!
//! ```text
//! version      u8      1
//! origin       u8      0 internal, 1 downstream
//! id           16      the hub's own message id
//! device       varint length, UTF-8
//! module       varint length + 1 (0: a device), UTF-8
//! model id     varint length + 1 (0: none), UTF-8
//! count        varint  number of properties
//! property     u8      0 application property, 0x40 and more: its type, else the number of the system property;
//!                      0x80 set: null
//!              varint length, UTF-8   name, application properties only
//!              varint length, UTF-8   value
//! body         the rest
//! ```

use std::sync::Arc;

use ahash::AHashMap;
use bytes::{BufMut, Bytes, BytesMut};
use uuid::Uuid;

use super::properties::{PROPERTIES_MAX, PropertiesBuilder, PropertyKind, PropertyName, SystemProperty};
use super::{Message, Origin, Sender};
use crate::identity::Identity;

const VERSION: u8 = 1;
const NULL: u8 = 0x80;
/// With the number of a type: an application property that is no text.
const TYPED: u8 = 0x40;

/// Most senders that a [`SenderCache`] keeps; beyond it starts anew.
const SENDERS_MAX: usize = 4_096;

/// Why bytes from the store are no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Written by a newer release.
    #[error("the record has the unknown version {0}; it was written by a newer release")]
    Version(u8),
    /// Truncated or damaged.
    #[error("the record is damaged: {0}")]
    Damaged(&'static str),
}

/// Senders that were seen in records, so that messages of one sender share it.
#[derive(Default)]
pub struct SenderCache {
    senders: AHashMap<Bytes, Arc<Sender>>,
}

impl Message {
    /// Writes the stored form; one allocation of exactly its size.
    pub fn to_record(&self) -> Bytes {
        let sender = &self.sender;
        let module = sender.identity.module_id();
        let model = sender.model_id.as_deref();
        let mut size = 2 + 16;
        size += text_size(sender.identity.device_id());
        size += optional_size(module) + optional_size(model);
        size += varint_size(self.properties.len());
        for property in self.properties.iter() {
            size += 1 + text_size(property.value);
            if let PropertyName::Application(name) = property.name {
                size += text_size(name);
            }
        }
        let mut out = BytesMut::with_capacity(size + self.body.len());
        out.put_u8(VERSION);
        out.put_u8(match sender.origin {
            Origin::Internal => 0,
            Origin::Downstream => 1,
        });
        out.put_slice(self.id.as_bytes());
        put_text(&mut out, sender.identity.device_id());
        put_optional(&mut out, module);
        put_optional(&mut out, model);
        put_varint(&mut out, self.properties.len());
        for property in self.properties.iter() {
            let null = if property.null { NULL } else { 0 };
            match property.name {
                PropertyName::System(system) => out.put_u8(system as u8 | null),
                PropertyName::Application(name) => {
                    let typed =
                        if property.kind == PropertyKind::Text { 0 } else { TYPED | property.kind as u8 };
                    out.put_u8(typed | null);
                    put_text(&mut out, name);
                }
            }
            put_text(&mut out, property.value);
        }
        out.put_slice(&self.body);
        out.freeze()
    }

    /// Reads the stored form; body and properties are slices of `record`.
    ///
    /// # Errors
    /// When the record was written by a newer release, or is damaged.
    pub fn from_record(record: &Bytes, senders: &mut SenderCache) -> Result<Self, RecordError> {
        let mut reader = Reader { bytes: record, at: 0 };
        let version = reader.byte()?;
        if version != VERSION {
            return Err(RecordError::Version(version));
        }
        let origin = match reader.byte()? {
            0 => Origin::Internal,
            1 => Origin::Downstream,
            _ => return Err(RecordError::Damaged("unknown origin")),
        };
        let id = reader.take(16)?;
        let id = Uuid::from_slice(&record[id]).map_err(|_| RecordError::Damaged("message id"))?;
        let names_start = reader.at;
        let device = reader.text()?;
        let module = reader.optional()?;
        let model = reader.optional()?;
        let key = record.slice(names_start..reader.at);
        let known = senders.senders.get(&key).filter(|sender| sender.origin == origin).cloned();
        let sender = match known {
            Some(sender) => sender,
            None => {
                let identity = match module {
                    None => Identity::device(device),
                    Some(module) => Identity::module(device, module),
                }
                .map_err(|_| RecordError::Damaged("sender"))?;
                let sender = Arc::new(Sender { identity, origin, model_id: model.map(Arc::from) });
                if senders.senders.len() >= SENDERS_MAX {
                    senders.senders.clear();
                }
                // The key is copied: a slice would keep this whole record alive.
                senders.senders.insert(Bytes::copy_from_slice(&key), sender.clone());
                sender
            }
        };
        let count = reader.varint()?;
        if count > PROPERTIES_MAX {
            return Err(RecordError::Damaged("too many properties"));
        }
        let mut builder = PropertiesBuilder::over(record.clone());
        for _ in 0..count {
            let tag = reader.byte()?;
            let null = tag & NULL != 0;
            match tag & !NULL {
                0 => {
                    let name = reader.text_range()?;
                    let value = reader.text_range()?;
                    builder.application(name, value, null);
                }
                tag @ TYPED..NULL => {
                    let kind = PropertyKind::from_tag(tag & !TYPED);
                    let kind = kind.ok_or(RecordError::Damaged("unknown type of a property"))?;
                    let name = reader.text_range()?;
                    let value = reader.text_range()?;
                    builder.typed(name, value, kind);
                }
                tag => {
                    let property =
                        SystemProperty::from_tag(tag).ok_or(RecordError::Damaged("unknown property"))?;
                    let value = reader.text_range()?;
                    builder.system(property, value, null);
                }
            }
        }
        let properties = builder.finish().map_err(|_| RecordError::Damaged("property text"))?;
        Ok(Message { sender, id, properties, body: record.slice(reader.at..), expires_at: None })
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn byte(&mut self) -> Result<u8, RecordError> {
        let byte = *self.bytes.get(self.at).ok_or(RecordError::Damaged("truncated"))?;
        self.at += 1;
        Ok(byte)
    }

    fn take(&mut self, len: usize) -> Result<std::ops::Range<usize>, RecordError> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or(RecordError::Damaged("truncated"))?;
        let range = self.at..end;
        self.at = end;
        Ok(range)
    }

    fn varint(&mut self) -> Result<usize, RecordError> {
        let mut value = 0usize;
        for shift in [0, 7, 14, 21] {
            let byte = self.byte()?;
            value |= usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(RecordError::Damaged("length"))
    }

    fn text_range(&mut self) -> Result<std::ops::Range<usize>, RecordError> {
        let len = self.varint()?;
        self.take(len)
    }

    fn text(&mut self) -> Result<&'a str, RecordError> {
        let range = self.text_range()?;
        std::str::from_utf8(&self.bytes[range]).map_err(|_| RecordError::Damaged("text"))
    }

    fn optional(&mut self) -> Result<Option<&'a str>, RecordError> {
        let Some(len) = self.varint()?.checked_sub(1) else { return Ok(None) };
        let range = self.take(len)?;
        std::str::from_utf8(&self.bytes[range]).map(Some).map_err(|_| RecordError::Damaged("text"))
    }
}

/// Lengths are below 2^28: a message cannot be larger than a packet or transfer that carried it.
fn put_varint(out: &mut BytesMut, mut value: usize) {
    while value >= 0x80 {
        out.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

fn varint_size(value: usize) -> usize {
    match value {
        0..0x80 => 1,
        0x80..0x4000 => 2,
        0x4000..0x20_0000 => 3,
        _ => 4,
    }
}

fn text_size(text: &str) -> usize {
    varint_size(text.len()) + text.len()
}

fn put_text(out: &mut BytesMut, text: &str) {
    put_varint(out, text.len());
    out.put_slice(text.as_bytes());
}

fn optional_size(text: Option<&str>) -> usize {
    text.map_or(1, |text| varint_size(text.len() + 1) + text.len())
}

fn put_optional(out: &mut BytesMut, text: Option<&str>) {
    match text {
        None => out.put_u8(0),
        Some(text) => {
            put_varint(out, text.len() + 1);
            out.put_slice(text.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Properties;
    use proptest::prelude::*;

    fn message(properties: Properties, body: &[u8]) -> Message {
        let sender = Sender {
            identity: Identity::parse("edge1/filter").unwrap(),
            origin: Origin::Internal,
            model_id: Some("dtmi:x;1".into()),
        };
        Message::new(Arc::new(sender), properties, Bytes::copy_from_slice(body))
    }

    proptest! {
        #[test]
        fn records_round_trip(
            names in proptest::collection::btree_map(".{0,40}", ".{0,200}", 0..12),
            kind in 0..PropertyKind::ALL.len(),
            content_type in proptest::option::of(".{0,30}"),
            body in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let kinds = PropertyKind::ALL.iter().cycle().skip(kind);
            let application = names
                .iter()
                .zip(kinds)
                .map(|((name, value), kind)| (PropertyName::Application(name), value.as_str(), *kind));
            let system = content_type.iter().map(|value| {
                (PropertyName::System(SystemProperty::ContentType), value.as_str(), PropertyKind::Text)
            });
            let before = message(Properties::copied_with_kinds(application.chain(system)), &body);
            let record = before.to_record();
            prop_assert_eq!(record.len(), before.to_record().len());
            let after = Message::from_record(&record, &mut SenderCache::default()).unwrap();
            prop_assert_eq!(&after.properties, &before.properties);
            prop_assert_eq!(&after.sender, &before.sender);
            prop_assert_eq!(after.id, before.id);
            prop_assert_eq!(&after.body, &before.body);
            prop_assert_eq!(after.size_bytes(), before.size_bytes());
        }

        #[test]
        fn damaged_records_are_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() { *first = VERSION; }
            let _ = Message::from_record(&Bytes::from(bytes), &mut SenderCache::default());
        }
    }

    #[test]
    fn a_record_is_allocated_once_at_its_size() {
        let message = message(Properties::copied_from([(PropertyName::Application("a"), "b")]), b"body");
        let record = message.to_record();
        let truncated = record.slice(..record.len() - 5);
        assert!(matches!(
            Message::from_record(&truncated, &mut SenderCache::default()),
            Err(RecordError::Damaged("truncated"))
        ));
        assert_eq!(
            Message::from_record(&Bytes::from_static(&[9]), &mut SenderCache::default()).unwrap_err(),
            RecordError::Version(9)
        );
    }
}
