//! The rules of the section `mqttBroker`: it has no effect, but one that breaks them refuses the document, as before.

use serde_json::Value;

/// Statements, bridges, rules, identities and so on that are looked at in one list; longer ones are refused.
const LIST_MAX: usize = 4_096;
/// Faults of one section that are listed.
const FAULTS_MAX: usize = 20;

const OPERATIONS: [&str; 3] = ["mqtt:publish", "mqtt:subscribe", "mqtt:connect"];
const VARIABLES: [&str; 5] = [
    "{{iot:identity}}",
    "{{iot:device_id}}",
    "{{iot:module_id}}",
    "{{mqtt:client_id}}",
    "{{iot:this_device_id}}",
];
const DIRECTIONS: [&str; 3] = ["in", "out", "both"];

/// Checks the section; the error lists all faults of its first faulty part.
pub(super) fn check(section: &Value) -> Result<(), String> {
    if !section.is_object() {
        return Err("mqttBroker must be an object".into());
    }
    let parts = [
        ("Error validating authorization policy: ", "authorizations", statement as Check),
        ("Error validating bridge configuration: ", "bridges", bridge as Check),
    ];
    let mut sections = Vec::new();
    for (prefix, name, check) in parts {
        let mut faults = Faults::default();
        faults.each(section.get(name), name, check);
        if !faults.texts.is_empty() {
            sections.push(format!("{prefix}{}", faults.texts.join(", ")));
        }
    }
    if sections.is_empty() { Ok(()) } else { Err(sections.join("; ")) }
}

type Check = fn(&mut Faults, &Value, &str);

#[derive(Default)]
struct Faults {
    texts: Vec<String>,
}

impl Faults {
    fn add(&mut self, place: &str, text: &str) {
        if self.texts.len() < FAULTS_MAX {
            self.texts.push(format!("{place}: {text}"));
        }
    }

    /// Checks the members of a list; one that is missing or null has none.
    fn each(&mut self, list: Option<&Value>, place: &str, check: Check) {
        match list {
            None | Some(Value::Null) => {}
            Some(Value::Array(members)) if members.len() <= LIST_MAX => {
                for (index, member) in members.iter().enumerate() {
                    check(self, member, &format!("{place}[{index}]"));
                }
            }
            Some(Value::Array(_)) => self.add(place, "the list is too long"),
            Some(_) => self.add(place, "it must be a list"),
        }
    }

    /// The texts of a list that must not be empty.
    fn texts<'v>(&mut self, list: Option<&'v Value>, place: &str, if_empty: &str) -> Vec<&'v str> {
        let members = list.and_then(Value::as_array).filter(|members| members.len() <= LIST_MAX);
        let texts: Vec<&str> =
            members.into_iter().flatten().map(|member| member.as_str().unwrap_or_default()).collect();
        if texts.is_empty() {
            self.add(place, if_empty);
        }
        texts
    }

    fn variables(&mut self, text: &str, place: &str) {
        let mut rest = text;
        while let Some(start) = rest.find("{{") {
            let variable = &rest[start..];
            let Some(end) = variable.find("}}") else { return };
            if !VARIABLES.contains(&&variable[..end + 2]) {
                self.add(place, &format!("Invalid variable name: {}", &variable[..end + 2]));
            }
            rest = &variable[end + 2..];
        }
    }
}

fn statement(faults: &mut Faults, statement: &Value, place: &str) {
    let identities = faults.texts(statement.get("identities"), place, "Identities list must not be empty");
    for identity in identities {
        if identity.trim().is_empty() {
            faults.add(place, "Identity name is invalid");
        }
        faults.variables(identity, place);
    }
    for list in ["allow", "deny"] {
        faults.each(statement.get(list), &format!("{place}.{list}"), rule);
    }
}

fn rule(faults: &mut Faults, rule: &Value, place: &str) {
    let operations = faults.texts(rule.get("operations"), place, "Operations list must not be empty");
    for operation in &operations {
        if !OPERATIONS.contains(operation) {
            faults.add(place, &format!("Unknown mqtt operation: {operation}"));
        }
    }
    let connect_only = operations == ["mqtt:connect"];
    let named = rule.get("resources").and_then(Value::as_array).is_some_and(|list| !list.is_empty());
    if connect_only && !named {
        return;
    }
    for resource in faults.texts(rule.get("resources"), place, "Resources list must not be empty") {
        if !is_filter(resource) {
            faults.add(place, &format!("Resource (topic filter) is invalid: {resource}"));
        }
        faults.variables(resource, place);
    }
}

fn bridge(faults: &mut Faults, bridge: &Value, place: &str) {
    let endpoint = bridge.get("endpoint").and_then(Value::as_str).unwrap_or_default();
    if endpoint.trim().is_empty() {
        faults.add(place, "Endpoint must not be empty");
    }
    let settings = bridge.get("settings");
    let none = settings.and_then(Value::as_array).is_none_or(Vec::is_empty);
    if none && !endpoint.eq_ignore_ascii_case("$upstream") {
        faults.add(place, "Settings list must not be empty");
    }
    faults.each(settings, &format!("{place}.settings"), setting);
}

fn setting(faults: &mut Faults, setting: &Value, place: &str) {
    let text = |name: &str| match setting.get(name) {
        None | Some(Value::Null) => Some(""),
        Some(value) => value.as_str(),
    };
    if !text("direction").is_some_and(|direction| DIRECTIONS.contains(&direction)) {
        faults.add(place, "Direction must be in, out or both");
    }
    if !text("topic").is_some_and(|topic| topic.is_empty() || is_filter(topic)) {
        faults.add(place, "Topic is invalid");
    }
    for prefix in ["inPrefix", "outPrefix"] {
        if text(prefix).is_none_or(|text| text.contains(['+', '#'])) {
            faults.add(place, &format!("{prefix} must not contain wildcards (+, #)"));
        }
    }
}

/// Whether a text is an MQTT topic filter: `+` alone in its level, `#` alone in the last one (MQTT 3.1.1 §4.7.1).
fn is_filter(text: &str) -> bool {
    let last = text.split('/').count();
    !text.is_empty()
        && text.split('/').enumerate().all(|(index, level)| match level {
            "+" => true,
            "#" => index + 1 == last,
            _ => !level.contains(['+', '#']),
        })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn policy(statement: &Value) -> Result<(), String> {
        check(&json!({ "authorizations": [statement] }))
    }

    #[test]
    fn a_policy_by_the_rules_passes() {
        let rules = json!([
            { "operations": ["mqtt:connect"] },
            { "operations": ["mqtt:publish", "mqtt:subscribe"], "resources": ["a/+/{{iot:device_id}}/#"] },
        ]);
        assert_eq!(policy(&json!({ "identities": ["{{iot:identity}}"], "allow": rules })), Ok(()));
        assert_eq!(check(&json!({})), Ok(()));
        assert_eq!(check(&json!({ "authorizations": null, "bridges": [] })), Ok(()));
    }

    #[test]
    fn every_rule_of_a_policy_is_checked() {
        let allow = |rule: Value| json!({ "identities": ["a"], "allow": [rule] });
        let publish =
            |resources: Value| allow(json!({ "operations": ["mqtt:publish"], "resources": resources }));
        for (statement, text) in [
            (json!({}), "Identities list must not be empty"),
            (json!({ "identities": [""] }), "Identity name is invalid"),
            (json!({ "identities": [5] }), "Identity name is invalid"),
            (json!({ "identities": ["{{iot:nobody}}"] }), "Invalid variable name"),
            (allow(json!({ "operations": [] })), "Operations list must not be empty"),
            (json!({ "identities": ["a"], "deny": [{}] }), "deny[0]: Operations list must not be empty"),
            (allow(json!({ "operations": ["mqtt:fly"], "resources": ["a"] })), "Unknown mqtt operation"),
            (publish(json!([])), "Resources list must not be empty"),
            (publish(json!(["a/b+"])), "Resource (topic filter) is invalid"),
            (publish(json!(["a/#/b"])), "Resource (topic filter) is invalid"),
            (publish(json!([""])), "Resource (topic filter) is invalid"),
            (publish(json!(["{{x}}"])), "Invalid variable name: {{x}}"),
            (json!({ "identities": ["a"], "allow": 5 }), "it must be a list"),
        ] {
            let fault = policy(&statement).expect_err(text);
            assert!(fault.starts_with("Error validating authorization policy: authorizations[0]"), "{fault}");
            assert!(fault.contains(text), "{fault} lacks {text}");
        }
        assert_eq!(check(&json!(5)), Err("mqttBroker must be an object".into()));
    }

    #[test]
    fn every_rule_of_a_bridge_is_checked() {
        let bridge = |endpoint: &str, settings: Value| {
            check(&json!({ "bridges": [{ "endpoint": endpoint, "settings": settings }] }))
        };
        let good = json!([{ "direction": "both", "topic": "a/#", "inPrefix": "x/", "outPrefix": "" }]);
        assert_eq!(bridge("other:8883", good), Ok(()));
        assert_eq!(bridge("$UpStream", json!([])), Ok(()));
        let setting = |setting: Value| json!([setting]);
        for (endpoint, settings, text) in [
            (" ", json!([{ "direction": "in" }]), "Endpoint must not be empty"),
            ("other", json!([]), "Settings list must not be empty"),
            ("other", setting(json!({})), "Direction must be in, out or both"),
            ("other", setting(json!({ "direction": "in", "topic": "a/b#" })), "Topic is invalid"),
            ("other", setting(json!({ "direction": "in", "inPrefix": "a/+" })), "inPrefix must not contain"),
            ("$upstream", setting(json!({ "direction": "out", "outPrefix": "#" })), "outPrefix must not"),
        ] {
            let fault = bridge(endpoint, settings).expect_err(text);
            assert!(fault.starts_with("Error validating bridge configuration: bridges[0]"), "{fault}");
            assert!(fault.contains(text), "{fault} lacks {text}");
        }
    }

    #[test]
    fn all_faults_of_both_parts_are_told_but_not_without_end() {
        let fault = check(&json!({
            "authorizations": [{}, {}],
            "bridges": (0..100).map(|_| json!({})).collect::<Vec<_>>(),
        }))
        .expect_err("faults");
        assert!(fault.contains("authorizations[0]: ") && fault.contains("authorizations[1]: "), "{fault}");
        assert!(fault.contains("bridges[9]: ") && !fault.contains("bridges[10]: "), "{fault}");
    }
}
