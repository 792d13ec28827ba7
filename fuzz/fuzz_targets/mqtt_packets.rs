//! Bytes of a client, as the head reads them: packet after packet until one is refused or incomplete.
#![no_main]

use bytes::BytesMut;
use edgehub_broker::head::mqtt::{frame::Frame, packet};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut buffer = BytesMut::from(data);
    while let Ok(Some(frame)) = Frame::take(&mut buffer) {
        if packet::decode(frame).is_err() {
            return;
        }
    }
});
