//! Queries over twins: `SELECT * FROM devices[.modules] [WHERE path = literal [AND ..]]`, in pages.

use bytes::Bytes;
use edgehub_broker::identity::Identity;
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde::Deserialize;
use serde_json::Value;

use super::fault::Fault;
use super::rest::{Answer, Call, Service, parse};
use super::twin::to_json;

/// Twins of one page, also when none or more are asked for.
const PAGE_MAX: usize = 1_000;

/// Longest query.
const QUERY_BYTES_MAX: usize = 4_096;

/// Conditions of one query.
const CONDITIONS_MAX: usize = 16;

#[derive(Debug, Deserialize)]
struct QueryIn {
    query: String,
}

#[derive(Debug, PartialEq)]
struct Query {
    modules: bool,
    conditions: Vec<Condition>,
}

/// The value at a path is a literal, or is not.
#[derive(Debug, PartialEq)]
struct Condition {
    path: Vec<String>,
    equal: bool,
    literal: Value,
}

pub(super) async fn run(service: Service<'_>, call: &Call<'_>, body: &Bytes) -> Result<Answer, Fault> {
    let QueryIn { query } = parse(body)?;
    let query = Query::parse(&query)?;
    let size = match call.page_size.map(str::parse::<usize>) {
        Some(Ok(size @ 1..=PAGE_MAX)) => size,
        Some(Ok(_)) | None => PAGE_MAX,
        Some(Err(_)) => return Err(Fault::invalid("x-ms-max-item-count is no number")),
    };
    let after = match call.continuation.filter(|text| !text.is_empty()) {
        None => None,
        Some(text) => {
            let text = percent_decode_str(text).decode_utf8().map_err(Fault::invalid)?;
            Some(Identity::parse(&text)?)
        }
    };
    let mut page: Vec<Value> = Vec::new();
    let mut last: Option<String> = None;
    let all = service.registry.list();
    let candidates = all
        .iter()
        .filter(|entry| entry.identity.module_id().is_some() == query.modules)
        .filter(|entry| after.as_ref().is_none_or(|after| entry.identity > *after));
    for entry in candidates {
        // An identity that was removed meanwhile is not there any more.
        let Ok(twin) = service.backend.twin_of(&entry.identity).await else { continue };
        let twin = to_json(service, entry, &twin);
        if !query.conditions.iter().all(|condition| condition.holds(&twin)) {
            continue;
        }
        if page.len() == size {
            let answer = Answer::ok(&Value::Array(page)).with("x-ms-item-type", "Twin");
            return Ok(match last {
                // A header holds no name as it is.
                Some(last) => {
                    answer.with("x-ms-continuation", utf8_percent_encode(&last, NON_ALPHANUMERIC).to_string())
                }
                None => answer,
            });
        }
        last = Some(entry.identity.to_string());
        page.push(twin);
    }
    Ok(Answer::ok(&Value::Array(page)).with("x-ms-item-type", "Twin"))
}

impl Condition {
    fn holds(&self, twin: &Value) -> bool {
        let found = self.path.iter().try_fold(twin, |value, name| value.get(name));
        (found == Some(&self.literal)) == self.equal
    }
}

impl Query {
    fn parse(text: &str) -> Result<Self, Fault> {
        const FORM: &str = "only SELECT * FROM devices or devices.modules is served, with conditions path = literal or path != literal joined by AND";
        let unreadable = || Fault::new(400, "ArgumentInvalid", FORM);
        if text.len() > QUERY_BYTES_MAX {
            return Err(Fault::invalid("the query is longer than 4096 bytes"));
        }
        let words = words(text).ok_or_else(unreadable)?;
        let is = |word: &str, expected: &str| word.eq_ignore_ascii_case(expected);
        let (modules, mut rest) = match &words[..] {
            [select, star, from, source, rest @ ..]
                if is(select, "SELECT") && star == "*" && is(from, "FROM") =>
            {
                let modules = is(source, "devices.modules");
                if !modules && !is(source, "devices") {
                    return Err(unreadable());
                }
                (modules, rest)
            }
            _ => return Err(unreadable()),
        };
        let mut conditions = Vec::new();
        let mut joint = "WHERE";
        while let [word, path, operator, literal, others @ ..] = rest {
            if !is(word, joint) || conditions.len() == CONDITIONS_MAX {
                return Err(unreadable());
            }
            let equal = match operator.as_str() {
                "=" => true,
                "!=" | "<>" => false,
                _ => return Err(unreadable()),
            };
            let literal = match literal.strip_prefix('\'').and_then(|text| text.strip_suffix('\'')) {
                Some(text) => Value::from(text.replace("''", "'")),
                None => match literal.to_ascii_lowercase().as_str() {
                    "true" => true.into(),
                    "false" => false.into(),
                    "null" => Value::Null,
                    number => number
                        .parse::<i64>()
                        .map(Value::from)
                        .or_else(|_| number.parse::<f64>().map(Value::from))
                        .map_err(|_| unreadable())?,
                },
            };
            conditions.push(Condition { path: path.split('.').map(str::to_owned).collect(), equal, literal });
            (rest, joint) = (others, "AND");
        }
        if rest.is_empty() { Ok(Self { modules, conditions }) } else { Err(unreadable()) }
    }
}

/// Words, operators, and texts with their quotes.
fn words(text: &str) -> Option<Vec<String>> {
    let mut words = Vec::new();
    let mut rest = text.trim();
    while let Some(first) = rest.chars().next() {
        let len = match first {
            '\'' => {
                let mut end = 1;
                loop {
                    end += rest[end..].find('\'')? + 1;
                    // Two quotes are one within the text.
                    if !rest[end..].starts_with('\'') {
                        break end;
                    }
                    end += 1;
                }
            }
            '=' | '*' => 1,
            '!' | '<' => rest.get(..2)?.len(),
            _ => rest.find(|c: char| c.is_whitespace() || "=!<*'".contains(c)).unwrap_or(rest.len()),
        };
        words.push(rest[..len].to_owned());
        rest = rest[len..].trim_start();
    }
    Some(words)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn queries_are_read() {
        let twin = json!({"deviceId": "it's", "tags": {"site": {"floor": 2}, "on": true}});
        for (text, holds) in [
            ("SELECT * FROM devices", true),
            ("select * from devices where deviceId = 'it''s'", true),
            ("SELECT * FROM devices WHERE deviceId='it''s' AND tags.site.floor=2 AND tags.on = true", true),
            ("SELECT * FROM devices WHERE tags.site.floor != 2", false),
            ("SELECT * FROM devices WHERE tags.none <> 'x'", true),
            ("SELECT * FROM devices WHERE tags.on = 'true'", false),
        ] {
            let query = Query::parse(text).unwrap();
            assert!(!query.modules);
            assert_eq!(query.conditions.iter().all(|condition| condition.holds(&twin)), holds, "{text}");
        }
        assert!(Query::parse("SELECT * FROM devices.modules").unwrap().modules);
        for text in [
            "",
            "SELECT deviceId FROM devices",
            "SELECT * FROM jobs",
            "SELECT * FROM devices WHERE",
            "SELECT * FROM devices WHERE a = 'x",
            "SELECT * FROM devices WHERE a > 1",
            "SELECT * FROM devices WHERE a = 1 OR b = 2",
            "SELECT * FROM devices WHERE a = b",
            "SELECT * FROM devices !",
            "SELECT * FROM devices WHERE a <\u{e9} 1",
        ] {
            assert_eq!(Query::parse(text).unwrap_err().status, 400, "{text}");
        }
    }
}
