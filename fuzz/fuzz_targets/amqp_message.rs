//! An encoded AMQP message, single and as a batch, also as a request with a token and as the answer to one.
#![no_main]

use bytes::Bytes;
use edgehub_broker::amqp::{BATCH_MESSAGES_MAX, CbsResponse, MESSAGE_FORMAT_BATCH, PutToken, parse_batch};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let payload = Bytes::copy_from_slice(data);
    for format in [0, MESSAGE_FORMAT_BATCH] {
        let messages = parse_batch(format, &payload).unwrap_or_default();
        assert!(messages.len() <= BATCH_MESSAGES_MAX);
        for message in messages {
            let _ = message.properties();
            let _ = message.annotations().map(|entries| entries.count());
            let _ = message.application_properties().map(|entries| entries.count());
            let _ = message.body.data();
            let _ = PutToken::decode(&message);
            let _ = CbsResponse::decode(&message);
        }
    }
});
