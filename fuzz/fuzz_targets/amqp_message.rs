//! An encoded AMQP message, single and as a batch.
#![no_main]

use bytes::Bytes;
use edgehub_broker::amqp::{MESSAGE_FORMAT_BATCH, PutToken, parse_batch};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let payload = Bytes::copy_from_slice(data);
    for format in [0, MESSAGE_FORMAT_BATCH] {
        for message in parse_batch(format, &payload).unwrap_or_default() {
            let _ = message.properties();
            let _ = message.annotations().map(|entries| entries.count());
            let _ = message.application_properties().map(|entries| entries.count());
            let _ = message.body.data();
            let _ = PutToken::decode(&message);
        }
    }
});
