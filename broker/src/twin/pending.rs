//! Owns reported properties that wait for the upstream: any number of patches as two.

use serde_json::Value;

use super::json::{self, Nulls, Object};

/// Patches of reported properties in the order in which they were made, put together.
///
/// A merge patch cannot say "an object, whatever was there before", so one patch cannot stand for `{"a":1}` and then
/// `{"a":{"b":1}}`: members that the upstream still has under `a` would stay. Such names are deleted first, by a patch of
/// their own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pending {
    /// Nothing but nulls: names that become objects anew.
    wiped: Object,
    /// All changes.
    patch: Object,
}

impl Pending {
    /// Out of its two patches, as [`Pending::updates`] gave them.
    pub(super) fn from_parts(wiped: Object, patch: Object) -> Self {
        Self { wiped, patch }
    }

    /// Its two patches; the first is empty as a rule.
    pub(super) fn parts(&self) -> (&Object, &Object) {
        (&self.wiped, &self.patch)
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.patch.is_empty()
    }

    /// Adds a patch that was made later.
    pub fn add(&mut self, patch: &Object) {
        add(&mut self.wiped, &mut self.patch, patch);
    }

    /// Carries it out on reported properties.
    pub fn apply_to(&self, reported: &mut Object) {
        self.updates().for_each(|update| json::merge(reported, update, Nulls::Delete));
    }

    /// What is to be sent, in order: one patch as a rule, two when a value became an object.
    pub fn updates(&self) -> impl Iterator<Item = &Object> {
        [&self.wiped, &self.patch].into_iter().filter(|update| !update.is_empty())
    }
}

fn add(wiped: &mut Object, base: &mut Object, patch: &Object) {
    for (name, value) in patch {
        match (base.get_mut(name), value) {
            (Some(Value::Object(members)), Value::Object(changes)) => {
                let mut below = match wiped.remove(name) {
                    // Nothing is left under it that could be wiped.
                    Some(Value::Null) => {
                        wiped.insert(name.clone(), Value::Null);
                        Object::new()
                    }
                    Some(Value::Object(below)) => below,
                    Some(_) | None => Object::new(),
                };
                add(&mut below, members, changes);
                if !below.is_empty() && !wiped.contains_key(name) {
                    wiped.insert(name.clone(), Value::Object(below));
                }
            }
            (Some(_), Value::Object(_)) => {
                wiped.insert(name.clone(), Value::Null);
                base.insert(name.clone(), value.clone());
            }
            (_, value) => {
                base.insert(name.clone(), value.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn object(value: Value) -> Object {
        match value {
            Value::Object(object) => object,
            other => panic!("{other} is no object"),
        }
    }

    fn pending(patches: impl IntoIterator<Item = Value>) -> Vec<Value> {
        let mut pending = Pending::default();
        patches.into_iter().for_each(|patch| pending.add(&object(patch)));
        pending.updates().cloned().map(Value::Object).collect()
    }

    #[test]
    fn patches_become_one_and_deletions_stay_in_it() {
        assert!(pending([json!({})]).is_empty());
        assert_eq!(pending([json!({ "a": 1 }), json!({ "a": null })]), [json!({ "a": null })]);
        assert_eq!(
            pending([json!({ "a": { "b": 1 } }), json!({ "a": { "c": null }, "d": [1] })]),
            [json!({ "a": { "b": 1, "c": null }, "d": [1] })]
        );
    }

    #[test]
    fn what_becomes_an_object_is_wiped_first() {
        assert_eq!(
            pending([json!({ "a": { "x": null } }), json!({ "a": { "x": { "y": 1 } } })]),
            [json!({ "a": { "x": null } }), json!({ "a": { "x": { "y": 1 } } })]
        );
        assert_eq!(
            pending([json!({ "a": 1 }), json!({ "a": { "b": 1 } }), json!({ "a": { "b": { "c": 1 } } })]),
            [json!({ "a": null }), json!({ "a": { "b": { "c": 1 } } })]
        );
    }

    fn patch() -> impl Strategy<Value = Object> {
        let leaf = prop_oneof![Just(Value::Null), (0..2_i64).prop_map(Value::from)];
        let value = leaf.prop_recursive(3, 12, 3, |inner| members(inner).prop_map(Value::Object));
        members(value)
    }

    fn members(value: impl Strategy<Value = Value>) -> impl Strategy<Value = Object> {
        prop::collection::btree_map("[a-c]", value, 0..3).prop_map(|members| members.into_iter().collect())
    }

    proptest! {
        #[test]
        fn together_they_do_what_they_do_one_by_one(
            upstream in patch(),
            patches in prop::collection::vec(patch(), 0..5),
        ) {
            let mut base = Object::new();
            json::merge(&mut base, &upstream, Nulls::Delete);
            let mut one_by_one = base.clone();
            let mut pending = Pending::default();
            for patch in &patches {
                json::merge(&mut one_by_one, patch, Nulls::Delete);
                pending.add(patch);
            }
            let mut together = base;
            pending.apply_to(&mut together);
            prop_assert_eq!(together, one_by_one);
        }
    }
}
