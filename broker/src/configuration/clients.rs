//! Who has to be reported as connected or gone: the newest state of each client, however often it came and went.
//!
//! A twin has room for some hundred clients ([`LISTED_BYTES_MAX`]), a hub for more. Those that come first are listed;
//! when a listed device leaves, one that is still there takes its place.

use std::collections::{BTreeMap, BTreeSet};

use parking_lot::Mutex;
use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use tokio::sync::Notify;

use crate::identity::{HUB_MODULE_ID, Identity};

/// What all listed clients may take up in the reported properties, in bytes; a cloud hub allows 32 KiB for all of them.
pub const LISTED_BYTES_MAX: usize = 24 * 1_024;

/// What the clients of one update may take up, in bytes; it allows 32 KiB for one update as well.
pub const PATCH_CLIENTS_BYTES_MAX: usize = 16 * 1_024;

/// What an entry takes up beside its key: member names, a status and two times.
const ENTRY_BYTES: usize = 160;

/// The clients of a hub as its reported properties show them. Events are taken without waiting; see
/// [`ClientRoll::connected`].
#[derive(Debug)]
pub struct ClientRoll {
    edge_device: Identity,
    roll: Mutex<Roll>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Roll {
    /// Whether somebody reports; else nothing is kept.
    kept: bool,
    /// Connected clients, and listed modules that left.
    present: BTreeMap<Identity, Presence>,
    /// Those that the upstream knows of, or is about to, and what they take up there in bytes.
    listed: BTreeMap<Identity, usize>,
    listed_bytes: usize,
    /// Connected, without room in the list.
    unlisted: BTreeSet<Identity>,
    /// Listed ones whose newest state is still to be told.
    untold: BTreeSet<Identity>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Presence {
    connection: u64,
    connected: bool,
    at: OffsetDateTime,
}

/// States of clients for one update.
#[derive(Debug, Default)]
pub(super) struct Batch {
    states: Vec<(Identity, Option<Presence>)>,
}

impl ClientRoll {
    /// The roll of the hub of this edge device, which is never listed itself. It keeps nothing until somebody reports.
    pub fn new(edge_device: Identity) -> Self {
        Self { edge_device, roll: Mutex::default(), changed: Notify::new() }
    }

    /// A client is connected since `at`, by the connection of this number; newer ones have higher numbers, and their
    /// events count, in whatever order they come.
    pub fn connected(&self, client: &Identity, connection: u64, at: OffsetDateTime) {
        let mut roll = self.roll.lock();
        let newer = roll.present.get(client).is_some_and(|presence| presence.connection > connection);
        if !roll.kept || newer || self.is_own(client) {
            return;
        }
        roll.present.insert(client.clone(), Presence { connection, connected: true, at });
        if roll.enlist(client) {
            roll.unlisted.remove(client);
            roll.untold.insert(client.clone());
            self.changed.notify_one();
        } else {
            roll.unlisted.insert(client.clone());
        }
    }

    /// This connection of a client ended.
    pub fn disconnected(&self, client: &Identity, connection: u64, at: OffsetDateTime) {
        let mut roll = self.roll.lock();
        if roll.present.get(client).is_none_or(|presence| presence.connection > connection) {
            return;
        }
        roll.present.remove(client);
        roll.unlisted.remove(client);
        if roll.listed.contains_key(client) {
            if client.module_id().is_some() {
                roll.present.insert(client.clone(), Presence { connection, connected: false, at });
            }
            roll.untold.insert(client.clone());
            self.changed.notify_one();
        }
    }

    /// Connected clients that are not listed for want of room.
    pub fn unlisted(&self) -> usize {
        self.roll.lock().unlisted.len()
    }

    fn is_own(&self, client: &Identity) -> bool {
        client.module_id() == Some(HUB_MODULE_ID) && client.device_id() == self.edge_device.device_id()
    }

    /// From now on somebody reports.
    pub(super) fn keep(&self) {
        self.roll.lock().kept = true;
    }

    /// Whether there is something to tell.
    pub(super) fn has_untold(&self) -> bool {
        !self.roll.lock().untold.is_empty()
    }

    /// Returns when there may be something new to tell.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// The states for the next update; they count as told unless [`ClientRoll::failed`] takes them back.
    pub(super) fn take(&self) -> Batch {
        let mut roll = self.roll.lock();
        let mut bytes = 0;
        let mut states = Vec::new();
        while let Some(client) = roll.untold.pop_first() {
            bytes += entry_bytes(&client);
            if bytes > PATCH_CLIENTS_BYTES_MAX && !states.is_empty() {
                roll.untold.insert(client);
                break;
            }
            let presence = roll.present.get(&client).copied();
            states.push((client, presence));
        }
        Batch { states }
    }

    /// The upstream has taken the states: who was removed gives its room to others.
    pub(super) fn done(&self, batch: Batch) {
        let mut roll = self.roll.lock();
        for (client, presence) in batch.states {
            // It may have come back meanwhile; then it is to be told again, and keeps its room.
            if presence.is_none() && !roll.present.contains_key(&client) {
                roll.untold.remove(&client);
                let bytes = roll.listed.remove(&client).unwrap_or_default();
                roll.listed_bytes -= bytes;
            }
        }
        while let Some(client) = roll.unlisted.pop_first() {
            if !roll.enlist(&client) {
                roll.unlisted.insert(client);
                break;
            }
            roll.untold.insert(client);
        }
    }

    /// The upstream has not taken the states; what is newest of them is told again.
    pub(super) fn failed(&self, batch: Batch) {
        self.roll.lock().untold.extend(batch.states.into_iter().map(|(client, _)| client));
    }
}

impl Roll {
    /// Whether the client is in the list; it is put there if there is room.
    fn enlist(&mut self, client: &Identity) -> bool {
        if self.listed.contains_key(client) {
            return true;
        }
        let bytes = entry_bytes(client);
        let fits = self.listed_bytes + bytes <= LISTED_BYTES_MAX;
        if fits {
            self.listed_bytes += bytes;
            self.listed.insert(client.clone(), bytes);
        }
        fits
    }
}

impl Batch {
    /// The value of the member `clients` of the update.
    pub(super) fn clients(&self) -> Map<String, Value> {
        let entry = |presence: &Presence| {
            let (status, time) = match presence.connected {
                true => ("Connected", "lastConnectedTimeUtc"),
                false => ("Disconnected", "lastDisconnectedTimeUtc"),
            };
            json!({ "status": status, time: timestamp(presence.at) })
        };
        self.states
            .iter()
            .map(|(client, presence)| (key(client), presence.as_ref().map_or(Value::Null, entry)))
            .collect()
    }
}

fn entry_bytes(client: &Identity) -> usize {
    ENTRY_BYTES + key(client).len()
}

/// The member name of a client: a name in a twin has no dot, dollar sign or blank.
fn key(client: &Identity) -> String {
    client.to_string().replace('.', "%2E").replace('$', "%24").replace(' ', "%20")
}

/// ISO 8601 with seven digits of the second's fraction, in UTC.
fn timestamp(at: OffsetDateTime) -> String {
    let at = at.to_offset(time::UtcOffset::UTC);
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:07}Z",
        at.year(),
        u8::from(at.month()),
        at.day(),
        at.hour(),
        at.minute(),
        at.second(),
        at.nanosecond() / 100
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use time::macros::datetime;

    use super::*;

    const AT: OffsetDateTime = datetime!(2026-08-21 10:57:24.1234567 UTC);

    fn id(text: &str) -> Identity {
        Identity::parse(text).expect(text)
    }

    fn roll() -> ClientRoll {
        let roll = ClientRoll::new(id("edge1"));
        roll.keep();
        roll
    }

    fn comes(roll: &ClientRoll, client: &str) {
        roll.connected(&id(client), 1, AT);
    }

    fn goes(roll: &ClientRoll, client: &str) {
        roll.disconnected(&id(client), 1, AT);
    }

    fn told(roll: &ClientRoll) -> Value {
        let batch = roll.take();
        let clients = batch.clients();
        roll.done(batch);
        Value::Object(clients)
    }

    #[test]
    fn devices_vanish_and_modules_stay_as_disconnected() {
        let roll = roll();
        for client in ["leaf1", "edge1/filter", "edge1/$edgeHub"] {
            comes(&roll, client);
        }
        let connected =
            json!({ "status": "Connected", "lastConnectedTimeUtc": "2026-08-21T10:57:24.1234567Z" });
        assert_eq!(told(&roll), json!({ "leaf1": connected, "edge1/filter": connected }));
        for client in ["leaf1", "edge1/filter", "stranger"] {
            roll.disconnected(&id(client), 1, datetime!(2026-08-21 11:02 UTC));
        }
        let gone =
            json!({ "status": "Disconnected", "lastDisconnectedTimeUtc": "2026-08-21T11:02:00.0000000Z" });
        assert_eq!(told(&roll), json!({ "leaf1": null, "edge1/filter": gone }));
        assert!(!roll.has_untold());
    }

    #[test]
    fn keys_are_encoded() {
        let roll = roll();
        comes(&roll, "a.b$c d/$edgeHub");
        let clients = told(&roll);
        assert_eq!(
            clients.as_object().expect("an object").keys().next().expect("one"),
            "a%2Eb%24c%20d/%24edgeHub"
        );
    }

    #[test]
    fn nothing_is_kept_while_nobody_reports() {
        let roll = ClientRoll::new(id("edge1"));
        comes(&roll, "leaf1");
        goes(&roll, "leaf1");
        assert!(!roll.has_untold());
    }

    #[test]
    fn thousands_of_reconnects_are_one_entry_each() {
        let roll = roll();
        for _ in 0..5_000 {
            comes(&roll, "leaf1");
            goes(&roll, "leaf1");
        }
        comes(&roll, "leaf1");
        let clients = told(&roll);
        assert_eq!(clients.as_object().expect("an object").len(), 1);
        assert_eq!(clients["leaf1"]["status"], "Connected");
        assert!(!roll.has_untold());
    }

    #[test]
    fn the_newest_connection_counts_in_whatever_order_events_come() {
        let roll = roll();
        let leaf = id("leaf1");
        roll.connected(&leaf, 2, AT);
        roll.connected(&leaf, 1, AT);
        roll.disconnected(&leaf, 1, AT);
        assert_eq!(told(&roll)["leaf1"]["status"], "Connected");
        roll.disconnected(&leaf, 2, AT);
        roll.connected(&leaf, 1, AT);
        roll.disconnected(&leaf, 1, AT);
        assert_eq!(told(&roll), json!({ "leaf1": null }));
    }

    #[test]
    fn what_was_not_taken_is_told_again_in_its_newest_state() {
        let roll = roll();
        comes(&roll, "leaf1");
        let batch = roll.take();
        goes(&roll, "leaf1");
        roll.failed(batch);
        assert_eq!(told(&roll), json!({ "leaf1": null }));
        // The entry was taken off upstream while the client came back.
        comes(&roll, "leaf1");
        told(&roll);
        goes(&roll, "leaf1");
        let removing = roll.take();
        comes(&roll, "leaf1");
        roll.done(removing);
        assert_eq!(told(&roll)["leaf1"]["status"], "Connected");
    }

    #[test]
    fn updates_and_the_list_have_their_limits() {
        let roll = roll();
        for number in 0..2_000 {
            comes(&roll, &format!("leaf{number:04}"));
        }
        let mut listed = 0;
        while roll.has_untold() {
            let clients = told(&roll);
            let text = clients.to_string();
            assert!(text.len() <= PATCH_CLIENTS_BYTES_MAX, "{}", text.len());
            listed += clients.as_object().expect("an object").len();
        }
        assert!((100..200).contains(&listed), "{listed}");
        assert_eq!(roll.unlisted(), 2_000 - listed);
        goes(&roll, "leaf0000");
        assert_eq!(told(&roll), json!({ "leaf0000": null }));
        let next = told(&roll);
        assert_eq!(next.as_object().expect("an object").len(), 1, "its room is given to another: {next}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// Whatever happens, the upstream ends with those that are listed in their newest state, and never more.
        #[test]
        fn the_upstream_ends_with_the_newest_states(
            events in prop::collection::vec((0..400_u32, prop::bool::ANY, 0..4_u8), 0..2_000)
        ) {
            let roll = roll();
            let mut upstream: BTreeMap<String, Value> = BTreeMap::new();
            let mut connected: BTreeSet<String> = BTreeSet::new();
            let name = |number: u32| match number % 5 {
                0 => format!("edge1/module{number}"),
                _ => format!("device-with-a-longer-name-{number}"),
            };
            let mut send = |roll: &ClientRoll, succeeds: bool| {
                let batch = roll.take();
                if !succeeds {
                    roll.failed(batch);
                    return;
                }
                for (client, value) in batch.clients() {
                    match value {
                        Value::Null => upstream.remove(&client),
                        value => upstream.insert(client, value),
                    };
                }
                roll.done(batch);
                let bytes: usize = upstream.keys().map(|key| key.len() + ENTRY_BYTES).sum();
                assert!(bytes <= LISTED_BYTES_MAX, "{bytes}");
            };
            for (number, connects, step) in events {
                let client = name(number);
                if connects {
                    comes(&roll, &client);
                    connected.insert(client);
                } else {
                    goes(&roll, &client);
                    connected.remove(&client);
                }
                if step < 2 {
                    send(&roll, step == 0);
                }
            }
            while roll.has_untold() {
                send(&roll, true);
            }
            let shown: BTreeSet<String> = upstream
                .iter()
                .filter(|(_, value)| value["status"] == "Connected")
                .map(|(client, _)| client.clone())
                .collect();
            prop_assert!(shown.is_subset(&connected));
            prop_assert_eq!(connected.len() - shown.len(), roll.unlisted());
            prop_assert!(upstream.keys().all(|client| shown.contains(client) || client.contains('/')));
        }
    }
}
