//! Routes, one in each line, and after a blank line the body of a message: lints and explanation end, and the explanation
//! agrees with the table.
#![no_main]

use edgehub_routing::{
    Decision, MessageSource, MessageView, Outcome, PropertyName, RouteSpec, RouteTable, Text, explain, lint,
};
use libfuzzer_sys::fuzz_target;

struct View<'a>(&'a str);

impl MessageView for View<'_> {
    fn property(&self, name: &PropertyName) -> Text<'_> {
        if name.matches("level") { Text::Text("hot") } else { Text::Undefined }
    }

    fn system_property(&self, name: &PropertyName) -> Text<'_> {
        match name.as_str() {
            "contentType" => Text::Text("application/json"),
            "contentEncoding" => Text::Text("utf-8"),
            "connectionModuleId" => Text::Text("press"),
            _ => Text::Undefined,
        }
    }

    fn body(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

fuzz_target!(|text: &str| {
    let (routes, body) = text.split_once("\n\n").unwrap_or((text, "{}"));
    let names: Vec<String> = (0..routes.lines().count()).map(|number| number.to_string()).collect();
    let specs = || {
        names.iter().zip(routes.lines()).enumerate().map(|(number, (name, text))| RouteSpec {
            name,
            text,
            priority: number as u32 % 3,
            time_to_live_secs: number as u32 % 2,
            upstream_target: None,
        })
    };
    lint(specs());
    let source = MessageSource::Module { module: "press", output: None };
    let explanation = explain(specs(), "edge1", &source, &View(body)).expect("the source is not blank");
    let (table, _) = RouteTable::compile(specs(), "edge1");
    let mut decision = Decision::new();
    table.decide(&table.candidates(&source).expect("the source is not blank"), &View(body), &mut decision);
    assert_eq!(explanation.targets.len(), decision.targets.len());
    let winners = explanation.routes.iter().filter(|route| route.outcome == Outcome::Won).count();
    assert_eq!(winners, decision.targets.len());
});
