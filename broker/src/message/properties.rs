//! Properties of a message as spans over one shared buffer, so that a message owns no text of its own.

use std::fmt;

use bytes::Bytes;
use smallvec::SmallVec;

/// Properties held without an allocation; messages with more spill to the heap.
const INLINE_MAX: usize = 8;

/// Most properties of one message. A message with more is malformed.
pub const PROPERTIES_MAX: usize = 1_024;

/// Room for the text of properties that are copied; more grows.
const COPY_ROOM_BYTES: usize = 128;

macro_rules! system_properties {
    ($($(#[$doc:meta])* $variant:ident = $tag:literal, $name:literal;)*) => {
        /// A system property of a message, under the hub's internal name for it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum SystemProperty {
            $($(#[$doc])* $variant = $tag,)*
        }

        impl SystemProperty {
            /// All of them.
            pub const ALL: &'static [SystemProperty] = &[$(SystemProperty::$variant,)*];

            /// The internal name, as conditions spell it behind the `$`.
            pub fn name(self) -> &'static str {
                match self { $(SystemProperty::$variant => $name,)* }
            }

            /// The property with this number in a stored record.
            pub(crate) fn from_tag(tag: u8) -> Option<Self> {
                match tag { $($tag => Some(SystemProperty::$variant),)* _ => None }
            }
        }
    };
}

system_properties! {
    /// The sender's own id of the message.
    MessageId = 1, "messageId";
    /// Correlation id.
    CorrelationId = 2, "cid";
    /// User id.
    UserId = 3, "userId";
    /// Address.
    To = 4, "to";
    /// Absolute expiry time, ISO 8601; passed through.
    AbsoluteExpiryTime = 5, "absolute-expiry-time";
    /// Content type of the body.
    ContentType = 6, "contentType";
    /// Content encoding of the body.
    ContentEncoding = 7, "contentEncoding";
    /// Message schema.
    MessageSchema = 8, "messageSchema";
    /// Creation time, ISO 8601.
    CreationTime = 9, "creationTime";
    /// The output of a module.
    OutputName = 10, "outputName";
    /// Interface id; marks security messages.
    InterfaceId = 11, "iothub-interface-id";
    /// Component name.
    ComponentName = 12, "dt-subject";
    /// Acknowledgement wish.
    Ack = 13, "ack";
    /// Operation.
    Operation = 14, "operation";
    /// Time at which the cloud queued the message.
    EnqueuedTime = 15, "enqueuedTime";
    /// Number of deliveries before this one.
    DeliveryCount = 16, "deliveryCount";
    /// Sequence number given by the cloud.
    SequenceNumber = 17, "sequenceNumber";
    /// Lock token given by the cloud.
    LockToken = 18, "lockToken";
    /// `twinChangeNotification` on messages about a twin.
    MessageType = 19, "messageType";
    /// The device on whose behalf the message was made.
    OriginalSenderDeviceId = 20, "rpSenderDeviceId";
    /// The module on whose behalf the message was made.
    OriginalSenderModuleId = 21, "rpSenderModuleId";
}

/// The value of a property, as conditions tell them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value<'a> {
    /// The message has no such property.
    Absent,
    /// The property is there without a value (`name=` in an MQTT topic).
    Null,
    /// The property's text.
    Text(&'a str),
}

/// The name of one property.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PropertyName<'a> {
    /// A system property.
    System(SystemProperty),
    /// An application property.
    Application(&'a str),
}

macro_rules! property_kinds {
    ($($(#[$doc:meta])* $variant:ident = $tag:literal;)*) => {
        /// The type with which an application property came. Its value is kept as text, which is what conditions and
        /// MQTT clients see; AMQP receivers get the type back.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
        #[repr(u8)]
        pub enum PropertyKind {
            $($(#[$doc])* $variant = $tag,)*
        }

        impl PropertyKind {
            /// All of them.
            pub const ALL: &'static [PropertyKind] = &[$(PropertyKind::$variant,)*];

            /// The kind with this number in a stored record.
            pub(crate) fn from_tag(tag: u8) -> Option<Self> {
                match tag { $($tag => Some(PropertyKind::$variant),)* _ => None }
            }
        }
    };
}

property_kinds! {
    /// Text, as all properties of MQTT clients.
    #[default]
    Text = 0;
    /// No value: the text is empty.
    Null = 1;
    /// `true` or `false`.
    Bool = 2;
    /// An unsigned number of 8 bits.
    Ubyte = 3;
    /// An unsigned number of 16 bits.
    Ushort = 4;
    /// An unsigned number of 32 bits.
    Uint = 5;
    /// An unsigned number of 64 bits.
    Ulong = 6;
    /// A number of 8 bits.
    Byte = 7;
    /// A number of 16 bits.
    Short = 8;
    /// A number of 32 bits.
    Int = 9;
    /// A number of 64 bits.
    Long = 10;
    /// A binary floating-point number of 32 bits.
    Float = 11;
    /// A binary floating-point number of 64 bits.
    Double = 12;
    /// A character.
    Char = 13;
    /// A time in milliseconds, written as ISO 8601 in UTC.
    Timestamp = 14;
    /// A UUID, in lower case.
    Uuid = 15;
    /// Bytes, in Base64.
    Binary = 16;
    /// An AMQP symbol.
    Symbol = 17;
}

/// One property of a message. A value that is null has the empty text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Property<'a> {
    /// Its name.
    pub name: PropertyName<'a>,
    /// Its text; empty for null.
    pub value: &'a str,
    /// Whether conditions see null instead of the text.
    pub null: bool,
    /// The type it came with; always text for system properties.
    pub kind: PropertyKind,
}

#[derive(Clone, Copy)]
struct Span {
    system: Option<SystemProperty>,
    null: bool,
    kind: PropertyKind,
    name_start: u32,
    name_len: u32,
    value_start: u32,
    value_len: u32,
}

/// The properties of a message: spans over one shared, UTF-8 checked buffer.
#[derive(Clone, Default)]
pub struct Properties {
    source: Bytes,
    spans: SmallVec<[Span; INLINE_MAX]>,
}

impl Properties {
    /// No properties.
    pub fn empty() -> Self {
        Self::default()
    }

    /// Copies properties from names and values; for tests, embedders and messages that the hub makes itself.
    pub fn copied_from<'a>(properties: impl IntoIterator<Item = (PropertyName<'a>, &'a str)>) -> Self {
        Self::copied_with_kinds(properties.into_iter().map(|(name, value)| (name, value, PropertyKind::Text)))
    }

    /// The same with the types of application properties.
    pub fn copied_with_kinds<'a>(
        properties: impl IntoIterator<Item = (PropertyName<'a>, &'a str, PropertyKind)>,
    ) -> Self {
        let mut text = String::new();
        let mut spans: SmallVec<[Span; INLINE_MAX]> = SmallVec::new();
        for (name, value, kind) in properties {
            let (system, name) = match name {
                PropertyName::System(property) => (Some(property), ""),
                PropertyName::Application(name) => (None, name),
            };
            text.reserve((name.len() + value.len()).max(COPY_ROOM_BYTES * usize::from(text.is_empty())));
            let name_start = text.len();
            text.push_str(name);
            let value_start = text.len();
            text.push_str(value);
            if text.len() > u32::MAX as usize {
                return Self::default();
            }
            let span = Span {
                system,
                null: false,
                kind: if system.is_some() { PropertyKind::Text } else { kind },
                name_start: name_start as u32,
                name_len: name.len() as u32,
                value_start: value_start as u32,
                value_len: value.len() as u32,
            };
            if !put_span(&mut spans, span, text.as_bytes()) {
                return Self::default();
            }
        }
        Self { source: Bytes::from(text.into_bytes()), spans }
    }

    /// Number of properties.
    pub fn len(&self) -> usize {
        self.spans.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// All properties in the order in which they were sent.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Property<'_>> {
        self.spans.iter().map(|span| self.property(span))
    }

    /// The application properties in the order in which they were sent.
    pub fn application_properties(&self) -> impl Iterator<Item = (&str, &str)> {
        self.spans.iter().filter(|span| span.system.is_none()).map(|span| {
            (self.text(span.name_start, span.name_len), self.text(span.value_start, span.value_len))
        })
    }

    /// The application properties with their types, in the order in which they were sent.
    pub fn typed_properties(&self) -> impl Iterator<Item = (&str, &str, PropertyKind)> {
        self.spans.iter().filter(|span| span.system.is_none()).map(|span| {
            let name = self.text(span.name_start, span.name_len);
            (name, self.text(span.value_start, span.value_len), span.kind)
        })
    }

    /// The value of a system property.
    pub fn system(&self, property: SystemProperty) -> Value<'_> {
        self.spans
            .iter()
            .find(|span| span.system == Some(property))
            .map_or(Value::Absent, |span| self.value(span))
    }

    /// The value of a system property as a slice of the shared buffer; none when absent or null.
    pub fn system_bytes(&self, property: SystemProperty) -> Option<Bytes> {
        let span = self.spans.iter().find(|span| span.system == Some(property) && !span.null)?;
        let start = span.value_start as usize;
        Some(self.source.slice(start..start + span.value_len as usize))
    }

    /// The value of the first application property for whose name `matches` is true.
    pub fn application(&self, matches: impl Fn(&str) -> bool) -> Value<'_> {
        self.spans
            .iter()
            .find(|span| span.system.is_none() && matches(self.text(span.name_start, span.name_len)))
            .map_or(Value::Absent, |span| self.value(span))
    }

    /// The application property that is the `place`th of all properties, counted from 0; none if a system property
    /// stands there.
    pub fn application_at(&self, place: usize) -> Option<(&str, Value<'_>)> {
        let span = self.spans.get(place).filter(|span| span.system.is_none())?;
        Some((self.text(span.name_start, span.name_len), self.value(span)))
    }

    /// Bytes of all names and values.
    pub fn size_bytes(&self) -> usize {
        self.spans
            .iter()
            .map(|span| {
                let name = span.system.map_or(span.name_len as usize, |property| property.name().len());
                name + span.value_len as usize
            })
            .sum()
    }

    fn property(&self, span: &Span) -> Property<'_> {
        let name = match span.system {
            Some(property) => PropertyName::System(property),
            None => PropertyName::Application(self.text(span.name_start, span.name_len)),
        };
        let value = self.text(span.value_start, span.value_len);
        Property { name, value, null: span.null, kind: span.kind }
    }

    fn value(&self, span: &Span) -> Value<'_> {
        if span.null { Value::Null } else { Value::Text(self.text(span.value_start, span.value_len)) }
    }

    fn text(&self, start: u32, len: u32) -> &str {
        let bytes = &self.source[start as usize..(start + len) as usize];
        // The builder admits a buffer only when every span in it is UTF-8, so the fallback is never taken; it
        // stands here because an unchecked conversion would need unsafe code. The check costs a few nanoseconds.
        std::str::from_utf8(bytes).unwrap_or_default()
    }
}

impl PartialEq for Properties {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl fmt::Debug for Properties {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(self.iter().map(|property| {
                let name = match property.name {
                    PropertyName::System(system) => format!("${}", system.name()),
                    PropertyName::Application(name) => name.to_owned(),
                };
                (name, property.value)
            }))
            .finish()
    }
}

/// Why a set of spans is no set of properties.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PropertiesError {
    /// More than [`PROPERTIES_MAX`].
    #[error("more than {PROPERTIES_MAX} properties")]
    TooMany,
    /// A name or value lies outside the buffer or is not UTF-8.
    #[error("a property name or value is not UTF-8 text")]
    NotText,
}

/// Collects spans over a buffer and checks them.
pub struct PropertiesBuilder {
    properties: Properties,
    failed: Option<PropertiesError>,
}

impl PropertiesBuilder {
    /// Starts over a buffer; all ranges count from its start.
    pub fn over(source: Bytes) -> Self {
        Self { properties: Properties { source, spans: SmallVec::new() }, failed: None }
    }

    /// Adds a system property. One of the same kind that was added before is replaced in its place.
    pub fn system(&mut self, property: SystemProperty, value: std::ops::Range<usize>, null: bool) {
        self.push(Some(property), PropertyKind::Text, 0..0, value, null);
    }

    /// Adds an application property. One of the same name that was added before is replaced in its place.
    pub fn application(&mut self, name: std::ops::Range<usize>, value: std::ops::Range<usize>, null: bool) {
        self.push(None, PropertyKind::Text, name, value, null);
    }

    /// Adds an application property with its type, as [`PropertiesBuilder::application`] does.
    pub fn typed(&mut self, name: std::ops::Range<usize>, value: std::ops::Range<usize>, kind: PropertyKind) {
        self.push(None, kind, name, value, false);
    }

    /// The properties.
    ///
    /// # Errors
    /// When there are too many, or a range is out of bounds or not UTF-8.
    pub fn finish(self) -> Result<Properties, PropertiesError> {
        match self.failed {
            None => Ok(self.properties),
            Some(error) => Err(error),
        }
    }

    fn push(
        &mut self,
        system: Option<SystemProperty>,
        kind: PropertyKind,
        name: std::ops::Range<usize>,
        value: std::ops::Range<usize>,
        null: bool,
    ) {
        let properties = &mut self.properties;
        let is_text = |range: &std::ops::Range<usize>| {
            properties.source.get(range.clone()).is_some_and(|bytes| std::str::from_utf8(bytes).is_ok())
        };
        if !is_text(&name) || !is_text(&value) || properties.source.len() > u32::MAX as usize {
            self.failed.get_or_insert(PropertiesError::NotText);
            return;
        }
        let span = Span {
            system,
            null,
            kind,
            name_start: name.start as u32,
            name_len: name.len() as u32,
            value_start: value.start as u32,
            value_len: value.len() as u32,
        };
        if !put_span(&mut properties.spans, span, &properties.source) {
            self.failed.get_or_insert(PropertiesError::TooMany);
        }
    }
}

/// Adds a property over `source`, in the place of an older one of its name; false when there are too many.
fn put_span(spans: &mut SmallVec<[Span; INLINE_MAX]>, span: Span, source: &[u8]) -> bool {
    let name = |span: &Span| &source[span.name_start as usize..(span.name_start + span.name_len) as usize];
    let same = spans
        .iter()
        .position(|old| old.system == span.system && (span.system.is_some() || name(old) == name(&span)));
    match same {
        Some(index) => spans[index] = span,
        None if spans.len() == PROPERTIES_MAX => return false,
        None => spans.push(span),
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_show_text_and_the_last_of_a_name_wins() {
        let mut builder = PropertiesBuilder::over(Bytes::from_static(b"a=1&b=&a=2&json"));
        builder.application(0..1, 2..3, false);
        builder.application(4..5, 6..6, true);
        builder.application(7..8, 9..10, false);
        builder.system(SystemProperty::ContentType, 11..15, false);
        let properties = builder.finish().unwrap();
        assert_eq!(properties.len(), 3);
        assert_eq!(properties.application(|name| name == "a"), Value::Text("2"));
        assert_eq!(properties.application(|name| name == "b"), Value::Null);
        assert_eq!(properties.application(|name| name == "c"), Value::Absent);
        assert_eq!(properties.system(SystemProperty::ContentType), Value::Text("json"));
        assert_eq!(properties.size_bytes(), 2 + 1 + "contentType".len() + 4);
    }

    #[test]
    fn what_is_no_text_is_refused() {
        let mut builder = PropertiesBuilder::over(Bytes::from_static(b"\xff\xfe"));
        builder.application(0..1, 1..2, false);
        assert_eq!(builder.finish().unwrap_err(), PropertiesError::NotText);
        let mut builder = PropertiesBuilder::over(Bytes::from_static(b"ab"));
        builder.application(0..1, 1..9, false);
        assert_eq!(builder.finish().unwrap_err(), PropertiesError::NotText);
    }

    #[test]
    fn too_many_properties_are_refused() {
        let text: String = (0..=PROPERTIES_MAX).map(|index| format!("{index:04}")).collect();
        let mut builder = PropertiesBuilder::over(Bytes::from(text));
        for index in 0..=PROPERTIES_MAX {
            builder.application(index * 4..index * 4 + 4, 0..0, true);
        }
        assert_eq!(builder.finish().unwrap_err(), PropertiesError::TooMany);
    }
}
