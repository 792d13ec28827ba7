//! A user name, or the property bag of a topic; what is read can be written and read again.
#![no_main]

use bytes::Bytes;
use edgehub_broker::head::mqtt::{bag, username::UserName};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let _ = UserName::parse(text);
    let source = Bytes::copy_from_slice(text.as_bytes());
    if let Ok(properties) = bag::read(&source, 0..source.len(), &[]) {
        let mut out = Vec::new();
        bag::write(&mut out, None, &properties);
        let written = Bytes::from(out);
        assert!(written.is_empty() || bag::read(&written, 0..written.len(), &[]).is_ok());
    }
});
