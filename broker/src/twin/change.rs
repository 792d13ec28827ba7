//! Owns the message by which routes hear of changed reported properties.

use std::sync::Arc;

use bytes::Bytes;
use edgehub_storage::StoreTime;
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

use crate::identity::Identity;
use crate::message::{Message, Properties, PropertyName, Sender, SystemProperty};

/// What the message is, in its type and its schema.
const KIND: &str = "twinChangeNotification";

/// ISO 8601 in UTC with the seven digits of the field's round-trip form.
const ROUND_TRIP: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:7]Z");

/// The message about a patch of a client's reported properties. The hub sends it; modules see the client as its sender.
pub(crate) fn change_message(sender: Arc<Sender>, client: &Identity, at: StoreTime, patch: Bytes) -> Message {
    let enqueued = OffsetDateTime::from_unix_timestamp_nanos(i128::from(at.as_millis()) * 1_000_000)
        .ok()
        .and_then(|at| at.format(ROUND_TRIP).ok());
    let own = [
        (SystemProperty::OriginalSenderDeviceId, Some(client.device_id())),
        (SystemProperty::OriginalSenderModuleId, client.module_id()),
        (SystemProperty::MessageType, Some(KIND)),
        (SystemProperty::MessageSchema, Some(KIND)),
        (SystemProperty::EnqueuedTime, enqueued.as_deref()),
    ];
    let own = own.into_iter().filter_map(|(name, value)| Some((PropertyName::System(name), value?)));
    Message::new(sender, Properties::copied_from(own), patch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Origin, Value};

    #[test]
    fn the_message_names_hub_and_client() {
        let id = |text| Identity::parse(text).unwrap();
        let sender =
            Arc::new(Sender { identity: id("edge1/$edgeHub"), origin: Origin::Internal, model_id: None });
        let at = StoreTime::from_millis(1_800_000_000_123);
        let message = change_message(sender.clone(), &id("edge1/filter"), at, "{}".into());
        assert_eq!((&message.sender, &message.body[..]), (&sender, &b"{}"[..]));
        for (name, value) in [
            (SystemProperty::OriginalSenderDeviceId, "edge1"),
            (SystemProperty::OriginalSenderModuleId, "filter"),
            (SystemProperty::MessageType, KIND),
            (SystemProperty::MessageSchema, KIND),
            (SystemProperty::EnqueuedTime, "2027-01-15T08:00:00.1230000Z"),
        ] {
            assert_eq!(message.properties.system(name), Value::Text(value), "{name:?}");
        }
        let of_device = change_message(sender, &id("leaf"), at, "{}".into());
        assert_eq!(of_device.properties.system(SystemProperty::OriginalSenderModuleId), Value::Absent);
    }
}
