//! A SAS token.
#![no_main]

use edgehub_broker::identity::{Hosts, Identity, SasToken};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(token) = SasToken::parse(text, 1_700_000_000) {
        let identity = Identity::parse("edge1/module").expect("a legal name");
        let _ = token.check_audience(&Hosts::new(["hub.example"]), &identity);
        token.identities();
    }
});
