//! An address of an AMQP link: what is read comes back when it is written.
#![no_main]

use edgehub_broker::amqp::{LinkAddress, Role};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    for role in [Role::Sender, Role::Receiver] {
        if let Ok(address) = LinkAddress::parse(text, role) {
            assert_eq!(LinkAddress::parse(&address.to_uri("hub.example"), role), Ok(address));
        }
    }
});
