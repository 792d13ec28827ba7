//! A condition and a body, separated by a line end: evaluation ends, whatever they are, and the program, the plain walk
//! and the explanation agree.
#![no_main]

use edgehub_routing::{Condition, MessageView, PropertyName, Text};
use libfuzzer_sys::fuzz_target;

struct View<'a> {
    body: &'a [u8],
    encoding: &'a str,
}

impl MessageView for View<'_> {
    fn property(&self, name: &PropertyName) -> Text<'_> {
        if name.matches("level") { Text::Text("hot") } else { Text::Undefined }
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
    let Ok(text) = std::str::from_utf8(&data[..split]) else { return };
    let body = data.get(split + 1..).unwrap_or_default();
    if let Ok(condition) = Condition::compile(text) {
        for encoding in ["utf-8", "utf-16", "utf-32"] {
            let view = View { body, encoding };
            let truth = condition.evaluate(&view);
            assert_eq!(truth, condition.walk(&view));
            let explained = condition.explain(&view);
            assert_eq!(truth, explained.truth);
            assert!(!explained.to_string().is_empty());
        }
    }
});
