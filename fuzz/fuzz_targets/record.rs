//! A stored message; what can be read is written back the same.
#![no_main]

use bytes::Bytes;
use edgehub_broker::message::{Message, SenderCache};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let record = Bytes::copy_from_slice(data);
    if let Ok(message) = Message::from_record(&record, &mut SenderCache::default()) {
        let again = Message::from_record(&message.to_record(), &mut SenderCache::default());
        assert_eq!(again.expect("what was written is read").properties, message.properties);
    }
});
