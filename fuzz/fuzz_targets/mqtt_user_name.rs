//! Any text as the user name of a CONNECT.
#![no_main]

use edgehub_broker::head::mqtt::username::UserName;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(user_name) = UserName::parse(text) {
        // Whoever it names can be named again.
        let identity = &user_name.identity;
        let again =
            UserName::parse(&format!("h/{identity}/?api-version=1")).expect("an id that was accepted");
        assert_eq!(again.identity, *identity);
        let _ = user_name.on_behalf_of();
    }
});
