//! Owns the view that the language has of a message: named texts and a body.

mod system;

pub use system::SystemProperty;

use crate::text;

/// The name of a property as a condition spells it. Names match ignoring case: each UTF-16 unit is compared by its
/// simple upper-case mapping, never by a language's rules.
#[derive(Clone, Debug)]
pub struct PropertyName {
    spelled: Box<str>,
    folded: Box<str>,
    /// Then only names in ASCII match, of the same length.
    ascii: bool,
    system: Option<SystemProperty>,
}

impl PropertyName {
    /// The name spelled like this.
    pub fn new(spelled: &str) -> PropertyName {
        PropertyName {
            spelled: spelled.into(),
            folded: text::folded(spelled).into(),
            ascii: spelled.is_ascii(),
            system: SystemProperty::of_name(spelled),
        }
    }

    /// As the condition (or the documentation, for the names that this crate asks for itself) spells it.
    pub fn as_str(&self) -> &str {
        &self.spelled
    }

    /// With case folded away; equal for names that match each other, so fit for a key. See [`fold_name`].
    pub fn folded(&self) -> &str {
        &self.folded
    }

    /// The system property of that name, if it is one that the hub knows: a message that keeps them in fields need not
    /// compare names.
    #[inline]
    pub fn system(&self) -> Option<SystemProperty> {
        self.system
    }

    /// Is `name`, in any case, this name?
    #[inline]
    pub fn matches(&self, name: &str) -> bool {
        self.spelled.eq_ignore_ascii_case(name) || (!self.ascii && text::equal_names(&self.spelled, name))
    }
}

/// Folds the case of a property name away, in the way by which [`PropertyName::folded`] does.
pub fn fold_name(name: &str) -> String {
    text::folded(name)
}

/// What a message says about one property.
///
/// Text from the network is valid UTF-8 and therefore holds no unpaired surrogates; literals in conditions may, and
/// the evaluator takes care of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Text<'a> {
    /// The message has no such property.
    Undefined,
    /// The message has the property, without a value (MQTT: `a=` or `a`).
    Null,
    /// The value.
    Text(&'a str),
}

/// What a condition can ask of a message.
///
/// A message with several properties whose names differ only in case gives the first of them.
pub trait MessageView {
    /// The application property of that name.
    fn property(&self, name: &PropertyName) -> Text<'_>;

    /// The system property of that name, in the spelling of conditions: `connectionDeviceId`, `contentType`, `cid`. See
    /// [`PropertyName::system`].
    fn system_property(&self, name: &PropertyName) -> Text<'_>;

    /// The bytes of the body.
    fn body(&self) -> &[u8];

    /// How many places [`property_at`](MessageView::property_at) can be asked for; none if it cannot be asked at all.
    ///
    /// A table that knows many names then goes through the properties of the message once, instead of asking for each
    /// name. A view that implements one of the two has to implement both.
    fn property_places(&self) -> Option<usize> {
        None
    }

    /// The application property at that place, counted from 0 in the order of the message; none if something else stands
    /// there. To be answered without a search.
    fn property_at(&self, _place: usize) -> Option<(&str, Text<'_>)> {
        None
    }
}
