//! Owns what can be asked of a running hub: the typed requests and their HTTP form.

use hyper::{Method, StatusCode};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde::{Deserialize, Serialize};

use super::answer::Refusal;
use super::clients::Kick;
use super::tap::{TAP_MESSAGES_MAX, TAP_SECS_MAX, TapOrder};
use super::{IDS_MAX, PAGE_MESSAGES_MAX};

/// What is written as it is in a path segment or a query value (RFC 3986 §2.3, unreserved); queue names hold slashes.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Longest path and query, in bytes.
const TARGET_BYTES_MAX: usize = 8 * 1024;

/// One request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// The whole hub on one screen: `GET /v1/status`.
    Status,
    /// Who is connected: `GET /v1/clients`.
    Clients,
    /// One of them: `GET /v1/clients/{id}`.
    Client {
        /// `device` or `device/module`.
        id: String,
    },
    /// Closes a connection: `POST /v1/clients/{id}/kick`.
    Kick {
        /// `device` or `device/module`.
        id: String,
        /// Whether it is done.
        order: Kick,
    },
    /// Messages as they are accepted, line by line: `GET /v1/tap`.
    Tap(TapOrder),
    /// The account of every queue and of the whole: `GET /v1/ledger`.
    Ledger,
    /// All queues: `GET /v1/queues`.
    Queues,
    /// One queue: `GET /v1/queues/{name}`.
    Queue {
        /// Its name.
        name: String,
    },
    /// What waits in a queue, the oldest first: `GET /v1/queues/{name}/messages`.
    Messages {
        /// The queue's name.
        queue: String,
        /// Which part of it.
        page: Page,
    },
    /// Drops what waits in a queue: `POST /v1/queues/{name}/purge`.
    Purge {
        /// The queue's name.
        queue: String,
        /// How much of it.
        order: Purge,
    },
    /// Dead letters, the oldest first: `GET /v1/dead-letters`.
    DeadLetters {
        /// Only those of this queue.
        queue: Option<String>,
        /// Which part of them; `from` is an id.
        page: Page,
    },
    /// One dead letter: `GET /v1/dead-letters/{id}`.
    DeadLetter {
        /// Its id.
        id: u64,
        /// Whether its body is shown.
        bodies: bool,
    },
    /// Puts dead letters back into their queues: `POST /v1/dead-letters/redrive`.
    Redrive(Letters),
    /// Drops dead letters: `POST /v1/dead-letters/drop`.
    Drop(Letters),
}

/// A part of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Begins with this offset or id; with the oldest, when not given.
    pub from: Option<u64>,
    /// So many at most, 1 to [`PAGE_MESSAGES_MAX`].
    pub limit: u16,
    /// Whether bodies are shown.
    pub bodies: bool,
}

/// How much of a queue is purged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Purge {
    /// Only offsets below this one; all that wait now, when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<u64>,
    /// Do it; else only say what would be done.
    #[serde(default)]
    pub apply: bool,
}

/// Some dead letters, and whether something is done with them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Letters {
    /// Which ones.
    pub select: Select,
    /// Do it; else only say what would be done.
    #[serde(default)]
    pub apply: bool,
}

/// Which dead letters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Select {
    /// These, at most [`IDS_MAX`].
    Ids(Vec<u64>),
    /// All of this queue, the oldest first, as many as one request takes; the answer says where to go on.
    Queue {
        /// Its name.
        name: String,
        /// Only ids from this one on.
        #[serde(default)]
        from: u64,
        /// Only ids below this one; those that are there now, when not given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        below: Option<u64>,
    },
    /// All, the oldest first, as many as one request takes; the answer says where to go on.
    All {
        /// Only ids from this one on.
        #[serde(default)]
        from: u64,
        /// Only ids below this one; those that are there now, when not given. What is put back and refused again
        /// gets a new id, and must not be met again on the way through all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        below: Option<u64>,
    },
}

impl Default for Page {
    fn default() -> Self {
        Self { from: None, limit: 20, bodies: false }
    }
}

impl Request {
    /// The method of the request.
    pub fn method(&self) -> Method {
        match self {
            Self::Status
            | Self::Clients
            | Self::Client { .. }
            | Self::Tap(_)
            | Self::Ledger
            | Self::Queues
            | Self::Queue { .. }
            | Self::Messages { .. }
            | Self::DeadLetters { .. }
            | Self::DeadLetter { .. } => Method::GET,
            Self::Kick { .. } | Self::Purge { .. } | Self::Redrive(_) | Self::Drop(_) => Method::POST,
        }
    }

    /// Path and query of the request.
    pub fn target(&self) -> String {
        let encoded = |text: &str| utf8_percent_encode(text, RESERVED).to_string();
        match self {
            Self::Status => "/v1/status".into(),
            Self::Clients => "/v1/clients".into(),
            Self::Client { id } => format!("/v1/clients/{}", encoded(id)),
            Self::Kick { id, .. } => format!("/v1/clients/{}/kick", encoded(id)),
            Self::Tap(order) => {
                let given = |name: &str, text: &Option<String>| {
                    text.as_ref().map(|text| format!("{name}={}&", encoded(text))).unwrap_or_default()
                };
                format!(
                    "/v1/tap?{}{}limit={}&seconds={}&bodies={}",
                    given("where", &order.condition),
                    given("from", &order.from),
                    order.limit,
                    order.seconds,
                    order.bodies
                )
            }
            Self::Ledger => "/v1/ledger".into(),
            Self::Queues => "/v1/queues".into(),
            Self::Queue { name } => format!("/v1/queues/{}", encoded(name)),
            Self::Messages { queue, page } => {
                format!("/v1/queues/{}/messages?{}", encoded(queue), page.query())
            }
            Self::Purge { queue, .. } => format!("/v1/queues/{}/purge", encoded(queue)),
            Self::DeadLetters { queue, page } => {
                let of = queue.as_deref().map(|name| format!("queue={}&", encoded(name)));
                format!("/v1/dead-letters?{}{}", of.unwrap_or_default(), page.query())
            }
            Self::DeadLetter { id, bodies } => format!("/v1/dead-letters/{id}?bodies={bodies}"),
            Self::Redrive(_) => "/v1/dead-letters/redrive".into(),
            Self::Drop(_) => "/v1/dead-letters/drop".into(),
        }
    }

    /// The body of the request; nothing for a GET.
    pub fn body(&self) -> Option<serde_json::Value> {
        let body = match self {
            Self::Kick { order, .. } => serde_json::to_value(order),
            Self::Purge { order, .. } => serde_json::to_value(order),
            Self::Redrive(letters) | Self::Drop(letters) => serde_json::to_value(letters),
            Self::Status
            | Self::Clients
            | Self::Client { .. }
            | Self::Tap(_)
            | Self::Ledger
            | Self::Queues
            | Self::Queue { .. }
            | Self::Messages { .. }
            | Self::DeadLetters { .. }
            | Self::DeadLetter { .. } => return None,
        };
        // Plain data with text keys; it cannot fail to be JSON.
        body.ok()
    }

    /// Reads a request. `target` is path and query as they came, `body` the whole body.
    ///
    /// # Errors
    /// What it is instead, as the answer to give.
    pub fn parse(method: &Method, target: &str, body: &[u8]) -> Result<Self, Refusal> {
        if target.len() > TARGET_BYTES_MAX {
            return Err(Refusal::new(StatusCode::URI_TOO_LONG, "the path is too long"));
        }
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let mut segments = path.split('/').skip(1).map(decoded);
        let mut next = || segments.next().transpose();
        let parts = (next()?, next()?, next()?, next()?, next()?);
        let (version, resource, name, verb, rest) =
            (parts.0.as_deref(), parts.1.as_deref(), parts.2, parts.3.as_deref(), parts.4);
        if version != Some("v1") || rest.is_some() {
            return Err(unknown_path());
        }
        let mut query = Query::parse(query)?;
        let request = match (resource, name, verb) {
            (Some("status"), None, None) => get(method, Self::Status),
            (Some("clients"), None, None) => get(method, Self::Clients),
            (Some("clients"), Some(id), None) => get(method, Self::Client { id }),
            (Some("clients"), Some(id), Some("kick")) => {
                post(method, body).map(|order| Self::Kick { id, order })
            }
            (Some("tap"), None, None) => get(method, Self::Tap(query.tap()?)),
            (Some("ledger"), None, None) => get(method, Self::Ledger),
            (Some("queues"), None, None) => get(method, Self::Queues),
            (Some("queues"), Some(name), None) => get(method, Self::Queue { name }),
            (Some("queues"), Some(queue), Some("messages")) => {
                get(method, Self::Messages { queue, page: query.page()? })
            }
            (Some("queues"), Some(queue), Some("purge")) => {
                post(method, body).map(|order| Self::Purge { queue, order })
            }
            (Some("dead-letters"), None, None) => {
                get(method, Self::DeadLetters { queue: query.take("queue"), page: query.page()? })
            }
            (Some("dead-letters"), Some(name), None) => match name.as_str() {
                "redrive" => post(method, body).map(Self::Redrive),
                "drop" => post(method, body).map(Self::Drop),
                id => {
                    let id = id.parse().map_err(|_| unknown_path())?;
                    get(method, Self::DeadLetter { id, bodies: query.flag("bodies")? })
                }
            },
            _ => Err(unknown_path()),
        }?;
        if let Self::Redrive(Letters { select: Select::Ids(ids), .. })
        | Self::Drop(Letters { select: Select::Ids(ids), .. }) = &request
            && ids.len() > IDS_MAX
        {
            let text = format!("a request names at most {IDS_MAX} ids");
            return Err(Refusal::new(StatusCode::BAD_REQUEST, text));
        }
        query.finish()?;
        Ok(request)
    }
}

impl Page {
    fn query(&self) -> String {
        let from = self.from.map(|from| format!("from={from}&")).unwrap_or_default();
        format!("{from}limit={}&bodies={}", self.limit, self.bodies)
    }
}

fn unknown_path() -> Refusal {
    Refusal::new(
        StatusCode::NOT_FOUND,
        "there is no such path; this hub knows /v1/status, /v1/clients, /v1/tap, /v1/ledger, /v1/queues and /v1/dead-letters",
    )
}

fn get(method: &Method, request: Request) -> Result<Request, Refusal> {
    match *method {
        Method::GET => Ok(request),
        _ => Err(Refusal::method("GET")),
    }
}

fn post<T: serde::de::DeserializeOwned>(method: &Method, body: &[u8]) -> Result<T, Refusal> {
    if *method != Method::POST {
        return Err(Refusal::method("POST"));
    }
    serde_json::from_slice(body).map_err(|error| {
        Refusal::new(StatusCode::BAD_REQUEST, format!("the body is not what this path takes: {error}"))
    })
}

fn decoded(text: &str) -> Result<String, Refusal> {
    let text = percent_decode_str(text).decode_utf8();
    text.map(String::from).map_err(|_| Refusal::new(StatusCode::BAD_REQUEST, "the path is not UTF-8 text"))
}

/// The parameters of a query. One that nothing takes is refused: a misspelled filter must not mean "all".
struct Query(Vec<(String, String)>);

impl Query {
    fn parse(text: &str) -> Result<Self, Refusal> {
        let parts = text.split('&').filter(|part| !part.is_empty());
        let pair = |part: &str| {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            Ok((decoded(name)?, decoded(value)?))
        };
        parts.map(pair).collect::<Result<_, Refusal>>().map(Self)
    }

    fn take(&mut self, name: &str) -> Option<String> {
        let index = self.0.iter().position(|(known, _)| known == name)?;
        Some(self.0.swap_remove(index).1)
    }

    fn number<T: std::str::FromStr>(&mut self, name: &str) -> Result<Option<T>, Refusal> {
        let Some(text) = self.take(name) else { return Ok(None) };
        let number = text.parse().map_err(|_| {
            Refusal::new(StatusCode::BAD_REQUEST, format!("the parameter {name} is not a number in range"))
        })?;
        Ok(Some(number))
    }

    fn flag(&mut self, name: &str) -> Result<bool, Refusal> {
        match self.take(name).as_deref() {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(_) => {
                let text = format!("the parameter {name} is neither true nor false");
                Err(Refusal::new(StatusCode::BAD_REQUEST, text))
            }
        }
    }

    fn page(&mut self) -> Result<Page, Refusal> {
        let limit = self.number("limit")?.unwrap_or(Page::default().limit);
        if !(1..=PAGE_MESSAGES_MAX).contains(&limit) {
            let text = format!("the parameter limit must be 1 to {PAGE_MESSAGES_MAX}");
            return Err(Refusal::new(StatusCode::BAD_REQUEST, text));
        }
        Ok(Page { from: self.number("from")?, limit, bodies: self.flag("bodies")? })
    }

    fn tap(&mut self) -> Result<TapOrder, Refusal> {
        let default = TapOrder::default();
        let order = TapOrder {
            condition: self.take("where"),
            from: self.take("from"),
            limit: self.number("limit")?.unwrap_or(default.limit),
            seconds: self.number("seconds")?.unwrap_or(default.seconds),
            bodies: self.flag("bodies")?,
        };
        if !(1..=TAP_MESSAGES_MAX).contains(&order.limit) || !(1..=TAP_SECS_MAX).contains(&order.seconds) {
            let text = format!("limit must be 1 to {TAP_MESSAGES_MAX}, seconds 1 to {TAP_SECS_MAX}");
            return Err(Refusal::new(StatusCode::BAD_REQUEST, text));
        }
        Ok(order)
    }

    fn finish(self) -> Result<(), Refusal> {
        match self.0.first() {
            None => Ok(()),
            Some(_) => {
                let text = "a query parameter is unknown or given twice; this path may take from, limit, bodies, queue, \
                            where, seconds";
                Err(Refusal::new(StatusCode::BAD_REQUEST, text))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pages() -> impl Strategy<Value = Page> {
        (any::<Option<u64>>(), 1..=PAGE_MESSAGES_MAX, any::<bool>()).prop_map(|(from, limit, bodies)| Page {
            from,
            limit,
            bodies,
        })
    }

    fn letters() -> impl Strategy<Value = Letters> {
        let select =
            prop_oneof![
                proptest::collection::vec(any::<u64>(), 0..20).prop_map(Select::Ids),
                (".{1,30}", any::<u64>(), any::<Option<u64>>())
                    .prop_map(|(name, from, below)| Select::Queue { name, from, below }),
                any::<(u64, Option<u64>)>().prop_map(|(from, below)| Select::All { from, below }),
            ];
        (select, any::<bool>()).prop_map(|(select, apply)| Letters { select, apply })
    }

    fn taps() -> impl Strategy<Value = TapOrder> {
        let texts = (proptest::option::of(".{0,30}"), proptest::option::of(".{0,30}"));
        (texts, 1..=TAP_MESSAGES_MAX, 1..=TAP_SECS_MAX, any::<bool>()).prop_map(
            |((condition, from), limit, seconds, bodies)| TapOrder {
                condition,
                from,
                limit,
                seconds,
                bodies,
            },
        )
    }

    fn requests() -> impl Strategy<Value = Request> {
        let purge = (any::<Option<u64>>(), any::<bool>()).prop_map(|(before, apply)| Purge { before, apply });
        prop_oneof![
            Just(Request::Status),
            Just(Request::Clients),
            ".{1,30}".prop_map(|id| Request::Client { id }),
            (".{1,30}", any::<bool>()).prop_map(|(id, apply)| Request::Kick { id, order: Kick { apply } }),
            taps().prop_map(Request::Tap),
            Just(Request::Ledger),
            Just(Request::Queues),
            ".{1,30}".prop_map(|name| Request::Queue { name }),
            (".{1,30}", pages()).prop_map(|(queue, page)| Request::Messages { queue, page }),
            (".{1,30}", purge).prop_map(|(queue, order)| Request::Purge { queue, order }),
            (proptest::option::of(".{0,30}"), pages())
                .prop_map(|(queue, page)| Request::DeadLetters { queue, page }),
            (any::<u64>(), any::<bool>()).prop_map(|(id, bodies)| Request::DeadLetter { id, bodies }),
            letters().prop_map(Request::Redrive),
            letters().prop_map(Request::Drop),
        ]
    }

    proptest! {
        #[test]
        fn what_the_client_writes_the_hub_reads(request in requests()) {
            let body = request.body().map(|body| body.to_string()).unwrap_or_default();
            let target = request.target();
            prop_assert!(target.parse::<hyper::Uri>().is_ok(), "{target}");
            let read = Request::parse(&request.method(), &target, body.as_bytes());
            prop_assert_eq!(read.unwrap(), request);
        }

        #[test]
        fn nothing_that_is_sent_makes_a_panic(target in ".{0,80}", body in ".{0,80}") {
            let _ = Request::parse(&Method::GET, &format!("/v1/queues/{target}"), body.as_bytes());
            let _ = Request::parse(&Method::POST, &format!("/v1/dead-letters/{target}"), body.as_bytes());
        }
    }

    #[test]
    fn what_is_not_meant_is_refused() {
        for (method, target, body, status, part) in [
            ("GET", "/", "", 404, "no such path"),
            ("GET", "/v2/ledger", "", 404, "no such path"),
            ("GET", "/v1/ledger/x", "", 404, "no such path"),
            ("GET", "/v1/queues/a/messages/x/y", "", 404, "no such path"),
            ("GET", "/v1/dead-letters/-1", "", 404, "no such path"),
            ("POST", "/v1/ledger", "", 405, "GET"),
            ("DELETE", "/v1/queues/a", "", 405, "GET"),
            ("GET", "/v1/queues/a/purge", "", 405, "POST"),
            ("GET", "/v1/queues/%ff", "", 400, "UTF-8"),
            ("GET", "/v1/tap?limit=0", "", 400, "1 to 10000"),
            ("GET", "/v1/tap?seconds=281", "", 400, "1 to 280"),
            ("GET", "/v1/clients/a/kick", "", 405, "POST"),
            ("POST", "/v1/clients/a/kick", r#"{"aply":true}"#, 400, "not what this path takes"),
            ("GET", "/v1/queues/a/messages?limit=0", "", 400, "1 to 1000"),
            ("GET", "/v1/queues/a/messages?limit=1001", "", 400, "1 to 1000"),
            ("GET", "/v1/queues/a/messages?bodies=yes", "", 400, "true nor false"),
            ("GET", "/v1/dead-letters?qeue=a", "", 400, "unknown"),
            ("GET", "/v1/queues?limit=1", "", 400, "unknown"),
            ("POST", "/v1/queues/a/purge", "", 400, "not what this path takes"),
            ("POST", "/v1/queues/a/purge", r#"{"aply":true}"#, 400, "not what this path takes"),
            ("POST", "/v1/dead-letters/drop", r#"{"apply":true}"#, 400, "not what this path takes"),
            (
                "POST",
                "/v1/dead-letters/drop",
                r#"{"select":{"all":{"form":1}}}"#,
                400,
                "not what this path takes",
            ),
        ] {
            let method = Method::from_bytes(method.as_bytes()).unwrap();
            let refusal = Request::parse(&method, target, body.as_bytes()).unwrap_err();
            assert_eq!(refusal.status.as_u16(), status, "{method} {target} {body}: {}", refusal.text);
            assert!(refusal.text.contains(part), "{method} {target} {body}: {}", refusal.text);
        }
        let ids = (0..=IDS_MAX).map(|id| id.to_string()).collect::<Vec<_>>().join(",");
        let body = format!(r#"{{"select":{{"ids":[{ids}]}}}}"#);
        assert!(Request::parse(&Method::POST, "/v1/dead-letters/drop", body.as_bytes()).is_err());
    }

    #[test]
    fn without_apply_nothing_is_done() {
        let purge = Request::parse(&Method::POST, "/v1/queues/a/purge", b"{}").unwrap();
        assert_eq!(purge, Request::Purge { queue: "a".into(), order: Purge { before: None, apply: false } });
        let body = br#"{"select":{"all":{}}}"#;
        let drop = Request::parse(&Method::POST, "/v1/dead-letters/drop", body).unwrap();
        assert_eq!(
            drop,
            Request::Drop(Letters { select: Select::All { from: 0, below: None }, apply: false })
        );
    }
}
