//! The MQTT session: the subscriptions of one identity, what they switch on, and their stored form.
//!
//! ```text
//! version  u8      1
//! count    u16     number of subscriptions
//! each     u8      granted QoS
//!          u16     length, UTF-8   filter
//! ```
//!
//! Numbers are big-endian. No message is ever queued in a session.

use bytes::{BufMut, Bytes, BytesMut};

use super::filter;
use super::packet::QoS;
use crate::backend::Feature;
use crate::identity::Identity;

/// Most subscriptions of one session.
pub const SUBSCRIPTIONS_MAX: usize = 1_000;
/// Largest stored form of a session in bytes.
pub const SESSION_BYTES_MAX: usize = 262_144;

const VERSION: u8 = 1;
const FEATURES: [Feature; 5] = [
    Feature::ModuleInputs,
    Feature::CloudToDevice,
    Feature::Methods,
    Feature::DesiredProperties,
    Feature::TwinResponses,
];

/// The session cannot hold more subscriptions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("more than {SUBSCRIPTIONS_MAX} subscriptions or {SESSION_BYTES_MAX} bytes of filters")]
pub struct SessionFull;

/// Bytes from the store are no session of this release.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the stored session is damaged or was written by a newer release")]
pub struct SessionDamaged;

/// The subscriptions of an identity.
#[derive(Debug, Clone, Default)]
pub struct Session {
    subscriptions: Vec<Subscription>,
    bytes: usize,
}

/// The features that subscriptions switch on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FeatureSet {
    on: [bool; FEATURES.len()],
}

#[derive(Debug, Clone)]
struct Subscription {
    filter: Box<str>,
    granted: QoS,
    feature: Option<Feature>,
}

impl Session {
    /// Adds a well-formed filter, or replaces its QoS.
    ///
    /// # Errors
    /// When the session is full.
    pub fn subscribe(&mut self, identity: &Identity, filter: &str, granted: QoS) -> Result<(), SessionFull> {
        if let Some(known) = self.subscriptions.iter_mut().find(|known| &*known.filter == filter) {
            known.granted = granted;
            return Ok(());
        }
        let bytes = self.bytes + 3 + filter.len();
        if self.subscriptions.len() == SUBSCRIPTIONS_MAX || 3 + bytes > SESSION_BYTES_MAX {
            return Err(SessionFull);
        }
        self.bytes = bytes;
        let feature = feature(identity, filter);
        self.subscriptions.push(Subscription { filter: filter.into(), granted, feature });
        Ok(())
    }

    /// Removes a filter; one that is not there is no error.
    pub fn unsubscribe(&mut self, filter: &str) {
        if let Some(index) = self.subscriptions.iter().position(|known| &*known.filter == filter) {
            self.subscriptions.remove(index);
            self.bytes -= 3 + filter.len();
        }
    }

    /// The QoS at which a topic is sent to the client: the best that a matching filter was granted.
    pub fn granted(&self, topic: &str) -> Option<QoS> {
        self.subscriptions
            .iter()
            .filter(|known| filter::matches(&known.filter, topic))
            .map(|known| known.granted)
            .max()
    }

    /// What the subscriptions switch on. A feature is on as long as one of its filters is there.
    pub fn features(&self) -> FeatureSet {
        let on =
            FEATURES.map(|feature| self.subscriptions.iter().any(|known| known.feature == Some(feature)));
        FeatureSet { on }
    }

    /// Number of subscriptions.
    pub fn len(&self) -> usize {
        self.subscriptions.len()
    }

    /// Whether there is no subscription.
    pub fn is_empty(&self) -> bool {
        self.subscriptions.is_empty()
    }

    /// Writes the stored form.
    pub fn to_bytes(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(3 + self.bytes);
        out.put_u8(VERSION);
        out.put_u16(self.subscriptions.len() as u16);
        for known in &self.subscriptions {
            out.put_u8(known.granted as u8);
            out.put_u16(known.filter.len() as u16);
            out.put_slice(known.filter.as_bytes());
        }
        out.freeze()
    }

    /// Reads the stored form of the identity's session.
    ///
    /// # Errors
    /// When the bytes are damaged or written by a newer release.
    pub fn from_bytes(identity: &Identity, bytes: &[u8]) -> Result<Self, SessionDamaged> {
        let (&[version, high, low], mut rest) = bytes.split_first_chunk::<3>().ok_or(SessionDamaged)?;
        if version != VERSION {
            return Err(SessionDamaged);
        }
        let mut session = Session::default();
        for _ in 0..u16::from_be_bytes([high, low]) {
            let (&[granted, high, low], behind) = rest.split_first_chunk::<3>().ok_or(SessionDamaged)?;
            let len = usize::from(u16::from_be_bytes([high, low]));
            let (text, behind) = behind.split_at_checked(len).ok_or(SessionDamaged)?;
            let granted = match granted {
                0 => QoS::AtMostOnce,
                1 => QoS::AtLeastOnce,
                _ => return Err(SessionDamaged),
            };
            let text = std::str::from_utf8(text).map_err(|_| SessionDamaged)?;
            if !filter::is_valid(text) {
                return Err(SessionDamaged);
            }
            session.subscribe(identity, text, granted).map_err(|_| SessionDamaged)?;
            rest = behind;
        }
        if rest.is_empty() { Ok(session) } else { Err(SessionDamaged) }
    }
}

impl FeatureSet {
    /// What must be switched to come from `before` to this set.
    pub fn changes_since(self, before: FeatureSet) -> impl Iterator<Item = (Feature, bool)> {
        FEATURES
            .into_iter()
            .zip(self.on.into_iter().zip(before.on))
            .filter(|(_, (now, before))| now != before)
            .map(|(feature, (now, _))| (feature, now))
    }

    /// Whether a feature is on.
    pub fn has(self, feature: Feature) -> bool {
        FEATURES.into_iter().zip(self.on).any(|(known, on)| known == feature && on)
    }
}

/// The feature that a filter of an identity switches on; ids in it must be those of the identity.
pub fn feature(identity: &Identity, filter: &str) -> Option<Feature> {
    if filter.starts_with("$iothub/methods/POST/") {
        return Some(Feature::Methods);
    }
    if filter.starts_with("$iothub/twin/PATCH/properties/desired/") {
        return Some(Feature::DesiredProperties);
    }
    if filter == "$iothub/twin/res/#" {
        return Some(Feature::TwinResponses);
    }
    let rest = filter.strip_prefix("devices/")?.strip_prefix(identity.device_id())?;
    match identity.module_id() {
        None => (rest == "/messages/devicebound/#").then_some(Feature::CloudToDevice),
        Some(module) => {
            let rest = rest.strip_prefix("/modules/")?.strip_prefix(module)?;
            (rest.starts_with('/') && rest.ends_with("/#")).then_some(Feature::ModuleInputs)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn module() -> Identity {
        Identity::module("d", "m").unwrap()
    }

    #[test]
    fn a_feature_stays_while_one_of_its_filters_remains() {
        let mut session = Session::default();
        let before = session.features();
        for filter in ["devices/d/modules/m/#", "devices/d/modules/m/inputs/#", "other"] {
            session.subscribe(&module(), filter, QoS::AtLeastOnce).unwrap();
        }
        let both = session.features();
        assert_eq!(both.changes_since(before).collect::<Vec<_>>(), [(Feature::ModuleInputs, true)]);
        session.unsubscribe("devices/d/modules/m/#");
        assert_eq!(session.features(), both);
        session.unsubscribe("devices/d/modules/m/inputs/#");
        assert_eq!(
            session.features().changes_since(both).collect::<Vec<_>>(),
            [(Feature::ModuleInputs, false)]
        );
    }

    #[test]
    fn the_best_of_the_matching_filters_grants() {
        let mut session = Session::default();
        session.subscribe(&module(), "a/#", QoS::AtMostOnce).unwrap();
        assert_eq!(session.granted("a/b"), Some(QoS::AtMostOnce));
        session.subscribe(&module(), "a/b", QoS::AtLeastOnce).unwrap();
        assert_eq!(session.granted("a/b"), Some(QoS::AtLeastOnce));
        session.subscribe(&module(), "a/b", QoS::AtMostOnce).unwrap();
        assert_eq!(session.granted("a/b"), Some(QoS::AtMostOnce));
        assert_eq!(session.granted("b"), None);
        assert_eq!(session.len(), 2);
    }

    #[test]
    fn a_session_is_bounded() {
        let mut session = Session::default();
        for index in 0..SUBSCRIPTIONS_MAX {
            session.subscribe(&module(), &format!("f{index}"), QoS::AtMostOnce).unwrap();
        }
        assert_eq!(session.subscribe(&module(), "more", QoS::AtMostOnce), Err(SessionFull));
        let mut session = Session::default();
        let long = |index: u8| format!("{index:03}{}", "x".repeat(65_000));
        for index in 0..4 {
            session.subscribe(&module(), &long(index), QoS::AtMostOnce).unwrap();
        }
        assert_eq!(session.subscribe(&module(), &long(4), QoS::AtMostOnce), Err(SessionFull));
        assert!(session.to_bytes().len() <= SESSION_BYTES_MAX);
    }

    proptest! {
        #[test]
        fn the_stored_form_round_trips(filters in proptest::collection::vec("[a-z/]{1,20}", 0..20)) {
            let mut session = Session::default();
            for (index, filter) in filters.iter().enumerate() {
                let qos = if index % 2 == 0 { QoS::AtMostOnce } else { QoS::AtLeastOnce };
                session.subscribe(&module(), filter, qos).unwrap();
            }
            let bytes = session.to_bytes();
            let again = Session::from_bytes(&module(), &bytes).unwrap();
            prop_assert_eq!(again.to_bytes(), bytes.clone());
            prop_assert!(bytes.is_empty() || Session::from_bytes(&module(), &bytes[..bytes.len() - 1]).is_err());
        }

        #[test]
        fn damaged_bytes_are_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = Session::from_bytes(&module(), &bytes);
        }
    }
}
