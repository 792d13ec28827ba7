//! What the vectors do not say about tables: endpoints, ties, stale candidates, bad routes among good ones.

use edgehub_routing::{
    Candidates, Category, ConfigCategory, DEFAULT_PRIORITY, Decision, HubConfig, MessageRejected,
    MessageSource, MessageView, PropertyName, RouteSpec, RouteTable, Sink, Text, upstream_target,
};
use serde_json::json;

struct Zone(&'static str);

impl MessageView for Zone {
    fn property(&self, name: &PropertyName) -> Text<'_> {
        if name.matches("zone") { Text::Text(self.0) } else { Text::Undefined }
    }

    fn system_property(&self, _: &PropertyName) -> Text<'_> {
        Text::Undefined
    }

    fn body(&self) -> &[u8] {
        &[]
    }
}

fn spec(name: &'static str, text: &'static str, priority: u32) -> RouteSpec<'static> {
    RouteSpec { name, text, priority, time_to_live_secs: 0, upstream_target: None }
}

#[test]
fn tables_are_shared_and_decisions_move_between_threads() {
    fn shared<T: Send + Sync + 'static>() {}
    fn moved<T: Send + 'static>() {}
    shared::<RouteTable>();
    shared::<Candidates>();
    moved::<Decision>();
}

#[test]
fn endpoints_are_listed_once_with_their_priorities() {
    let (table, errors) = RouteTable::compile(
        [
            spec("a", "FROM /* INTO $upstream", DEFAULT_PRIORITY),
            spec("b", "FROM /* INTO $UPSTREAM", 3),
            spec("c", "FROM /* INTO BrokeredEndpoint('/modules/m/inputs/i')", 1),
            spec("d", "FROM /messages INTO $upstream", 3),
        ],
        "edge",
    );
    assert!(errors.is_empty());
    let found: Vec<_> =
        table.endpoints().iter().map(|endpoint| (&*endpoint.id, &endpoint.priorities[..])).collect();
    assert_eq!(found, [("iothub", &[3, DEFAULT_PRIORITY][..]), ("edge/m/i", &[1][..])]);
    assert_eq!(table.endpoints()[0].sink, Sink::Upstream);
}

#[test]
fn a_message_goes_once_to_each_target_of_the_upstream() {
    let to = |name, target, priority| RouteSpec {
        upstream_target: target,
        ..spec(name, "FROM /messages/* INTO $upstream", priority)
    };
    let input = "FROM /messages/* INTO BrokeredEndpoint('/modules/m/inputs/i')";
    let (table, errors) = RouteTable::compile(
        [
            to("a", Some("/queue/alarms"), 5),
            to("b", None, DEFAULT_PRIORITY),
            to("c", Some("/queue/alarms"), 3),
            to("d", Some("/exchange/plant/{deviceId}"), DEFAULT_PRIORITY),
            to("e", None, 7),
            // Only what leads to the upstream has a target there.
            RouteSpec { upstream_target: Some("/queue/alarms"), ..spec("f", input, 0) },
        ],
        "edge",
    );
    assert!(errors.is_empty());
    let mut decision = Decision::new();
    let candidates = table.candidates(&MessageSource::Device).expect("a device has a path");
    table.decide(&candidates, &Zone("x"), &mut decision);
    let found: Vec<_> = decision
        .targets
        .iter()
        .map(|target| (&*table.endpoint(target.endpoint).expect("listed").id, target.priority))
        .collect();
    assert_eq!(
        found,
        [
            ("iothub[/queue/alarms]", 3),
            ("iothub", 7),
            ("iothub[/exchange/plant/{deviceId}]", DEFAULT_PRIORITY),
            ("edge/m/i", 0),
        ]
    );
    let targets: Vec<_> = found.iter().map(|(id, _)| upstream_target(id)).collect();
    assert_eq!(targets, [Some("/queue/alarms"), None, Some("/exchange/plant/{deviceId}"), None]);
    assert_eq!(upstream_target("iothub[]"), None);
}

#[test]
fn bad_routes_do_not_hurt_good_ones() {
    let (table, errors) = RouteTable::compile(
        [
            spec("parse", "FROM nowhere INTO $upstream", 0),
            spec("good", "FROM /* INTO $upstream", 0),
            spec(
                "types",
                "FROM /*\nWHERE a = 5 AND nofn(1)\nINTO BrokeredEndpoint('/modules/m/inputs/i')",
                0,
            ),
        ],
        "edge",
    );
    assert_eq!((table.len(), table.endpoints().len()), (1, 1), "a bad route brings no endpoint");
    assert_eq!(errors.iter().map(|error| &*error.name).collect::<Vec<_>>(), ["parse", "types"]);
    let [operand, function, ..] = &errors[1].diagnostics[..] else { panic!("{:?}", errors[1]) };
    assert_eq!((operand.category, function.category), (Category::Operand, Category::UnknownFunction));
    let place = |range: Option<edgehub_routing::TextRange>| range.map(|range| (range.line, range.column));
    assert_eq!(place(operand.in_condition), Some((1, 3)));
    assert_eq!(place(operand.in_route), Some((2, 9)));
    let text = errors[1].to_string();
    assert!(text.contains("\"types\"") && text.contains("operand at line 2 column 9"), "{text}");
}

#[test]
fn ties_go_to_the_name_that_sorts_first_by_units() {
    // By UTF-8 bytes U+E000 would sort before U+1F600, by units it sorts behind.
    for (winner, loser) in [("a", "b"), ("A", "a"), ("\u{1F600}", "\u{E000}")] {
        for names in [[winner, loser], [loser, winner]] {
            let (table, _) =
                RouteTable::compile(names.map(|name| spec(name, "FROM /* INTO $upstream", 5)), "edge");
            let candidates = table.candidates(&MessageSource::Device).expect("a device has a path");
            let mut decision = Decision::new();
            table.decide(&candidates, &Zone("n"), &mut decision);
            let [target] = decision.targets[..] else { panic!("{decision:?}") };
            assert_eq!(table.route_name(target.route), Some(winner));
        }
    }
}

#[test]
fn undefined_conditions_are_counted_unless_the_endpoint_is_settled() {
    let (table, _) = RouteTable::compile(
        [
            spec("a", "FROM /* WHERE nope = 'x' INTO $upstream", 1),
            spec("b", "FROM /* WHERE zone = 'n' INTO $upstream", 2),
            spec("c", "FROM /* WHERE nope = 'x' INTO $upstream", 3),
        ],
        "edge",
    );
    let candidates = table.candidates(&MessageSource::Device).expect("a device has a path");
    let mut decision = Decision::new();
    for (zone, targets, undefined) in [("n", 1, 1), ("s", 0, 2), ("n", 1, 1)] {
        table.decide(&candidates, &Zone(zone), &mut decision);
        assert_eq!((decision.targets.len(), decision.undefined), (targets, undefined), "{zone}");
    }
}

#[test]
fn candidates_of_another_table_are_looked_up_again() {
    let compile = |text| RouteTable::compile([spec("r", text, 0)], "edge").0;
    let (old, new) = (compile("FROM /messages/modules/m INTO $upstream"), compile("FROM /* INTO $upstream"));
    assert_ne!(old.generation(), new.generation());
    let candidates = old.candidates(&MessageSource::Device).expect("a device has a path");
    let mut decision = Decision::new();
    old.decide(&candidates, &Zone("n"), &mut decision);
    assert!(decision.targets.is_empty() && candidates.is_empty());
    new.decide(&candidates, &Zone("n"), &mut decision);
    assert_eq!(decision.targets.len(), 1);
    let blank = MessageSource::Module { module: "", output: None };
    assert_eq!(new.candidates(&blank).err(), Some(MessageRejected::BlankModule));
}

#[test]
fn configurations_keep_their_good_routes() {
    let config = HubConfig::parse(&json!({
        "schemaVersion": 1.1,
        "routes": { "a": "FROM /* INTO $upstream", "b": 5, "c": { "route": "FROM /*", "priority": 11 } },
        "storeAndForwardConfiguration": { "storeLimits": { "maxSizeBytes": 1_048_576 } },
    }))
    .expect("readable");
    assert_eq!(config.routes.iter().map(|route| &*route.name).collect::<Vec<_>>(), ["a"]);
    let rejected: Vec<_> =
        config.rejected.iter().map(|error| (error.route.as_deref(), error.category)).collect();
    assert_eq!(
        rejected,
        [(Some("b"), ConfigCategory::RouteShape), (Some("c"), ConfigCategory::PriorityRange)],
        "each names its route"
    );
    assert_eq!(config.store_limit_bytes, Some(1_048_576));
    let missing = config.hub_wide_time_to_live_secs().err().map(|error| error.category);
    assert_eq!(missing, Some(ConfigCategory::TimeToLiveMissing));
}

#[test]
fn all_that_is_wrong_with_a_configuration_is_found_at_once() {
    let document = json!({
        "schemaVersion": "2",
        "routes": { "a": { "route": "FROM /* INTO $upstream", "priority": 10 }, "b": "FROM /* INTO $upstream" },
        "storeAndForwardConfiguration": {},
    });
    let (config, errors) = HubConfig::inspect(&document);
    let categories: Vec<_> = errors.iter().map(|error| error.category).collect();
    assert_eq!(
        categories,
        [ConfigCategory::SchemaVersion, ConfigCategory::TimeToLiveMissing, ConfigCategory::PriorityRange]
    );
    assert_eq!(config.routes.len(), 1);
    assert_eq!(HubConfig::parse(&document).expect_err("refused").category, ConfigCategory::SchemaVersion);
    let categories: Vec<_> = HubConfig::inspect(&json!({})).1.iter().map(|error| error.category).collect();
    assert_eq!(
        categories,
        [ConfigCategory::SchemaVersion, ConfigCategory::RoutesMissing, ConfigCategory::StoreAndForward]
    );
}

#[test]
fn lints_can_be_errors() {
    let document = json!({
        "schemaVersion": "1.1",
        "routes": { "late": "FROM /* INTO $upstream WHERE a", "up": "FROM /* INTO $upstream" },
        "storeAndForwardConfiguration": { "timeToLiveSecs": 1 },
    });
    let config = HubConfig::parse(&document).expect("accepted");
    assert_eq!(config.routes.len(), 2);
    let strict = config.with_lints_as_errors();
    let names: Vec<_> = strict.routes.iter().map(|route| route.name.as_str()).collect();
    assert_eq!(names, ["up"]);
    assert_eq!(strict.rejected[0].category, ConfigCategory::RouteLint);
    assert_eq!(strict.rejected[0].route.as_deref(), Some("late"));
}
