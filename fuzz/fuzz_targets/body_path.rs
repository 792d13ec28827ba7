//! A body path and a body, separated by a line end: what the body is read for, strictly, leniently and in all encodings.
#![no_main]

use edgehub_routing::{Condition, MessageView, PropertyName, Text, Truth, check_body_path};
use libfuzzer_sys::fuzz_target;

struct View<'a> {
    body: &'a [u8],
    encoding: &'a str,
}

impl MessageView for View<'_> {
    fn property(&self, _: &PropertyName) -> Text<'_> {
        Text::Undefined
    }

    fn system_property(&self, name: &PropertyName) -> Text<'_> {
        match name.as_str() {
            "contentType" => Text::Text("application/json"),
            "contentEncoding" => Text::Text(self.encoding),
            _ => Text::Undefined,
        }
    }

    fn body(&self) -> &[u8] {
        self.body
    }
}

fuzz_target!(|data: &[u8]| {
    let split = data.iter().position(|byte| *byte == b'\n').unwrap_or(data.len());
    let Ok(path) = std::str::from_utf8(&data[..split]) else { return };
    let body = data.get(split + 1..).unwrap_or_default();
    let accepted = check_body_path(path).is_ok();
    let Ok(condition) = Condition::compile(&format!("{{$body.{path}}} = {{$body.{path}}}")) else { return };
    // What compiles as a single name is a path that is accepted.
    if !path.contains(char::is_whitespace) && !path.contains(['}', '/']) {
        assert!(accepted, "{path}");
    }
    for encoding in ["utf-8", "utf-16", "utf-32"] {
        let view = View { body, encoding };
        // A value equals itself or is undefined.
        assert_ne!(condition.evaluate(&view), Truth::False);
        assert_eq!(condition.evaluate(&view), condition.walk(&view));
    }
});
