//! The edgehub route language: which messages go where.
//!
//! A route is a text such as `FROM /messages/modules/press/* WHERE level = 'hot' INTO $upstream`. The language, its traps
//! included, is that of the IoT Edge hub: what runs there runs here, with the same result.
//!
//! ```text
//! text ─lexer─▶ tokens ─parens, grammar─▶ syntax tree ─check─▶ typed tree ─clause, family─▶ table ─plan─▶ decision
//! ```
//!
//! - Routes compile once, each on its own, to an immutable [`RouteTable`]. Errors are [`Diagnostic`]s with line and column.
//! - The routes whose source matches a sender are looked up once per sender and output: [`RouteTable::candidates`], or
//!   [`RouteTable::candidates_for`] with what is the same for all messages of the sender.
//! - All routes of a table are decided together: what they compare one value with is answered by one look-up.
//! - [`RouteTable::decide`] gives a message its targets. It takes no lock and does no I/O; its memory is the caller's
//!   [`Decision`], which is reused. The body is read once per message, for all routes, and only if a condition asks.
//! - [`lint`] finds what compiles but is hardly meant; [`explain`] gives the value of every part of a condition for one
//!   message, with reasons, and who won. [`Diagnostic::render`] and [`Lint::render`] draw the place like a compiler.
//! - Nothing recurses over input: depth and size are bounded before the grammar sees a text (see [`limits`]), trees and
//!   programs are flat lists, and bodies are read by loops.
//!
//! ```
//! use edgehub_routing::{
//!     DEFAULT_PRIORITY, Decision, MessageSource, MessageView, PropertyName, RouteSpec, RouteTable, Text,
//! };
//!
//! /// A message as its owner keeps it; here with one property.
//! struct Message<'m> {
//!     level: &'m str,
//! }
//!
//! impl MessageView for Message<'_> {
//!     fn property(&self, name: &PropertyName) -> Text<'_> {
//!         if name.matches("level") { Text::Text(self.level) } else { Text::Undefined }
//!     }
//!     fn system_property(&self, _: &PropertyName) -> Text<'_> {
//!         Text::Undefined
//!     }
//!     fn body(&self) -> &[u8] {
//!         b"{}"
//!     }
//! }
//!
//! let (priority, time_to_live_secs) = (DEFAULT_PRIORITY, 0);
//! let route = |name, text| RouteSpec { name, text, priority, time_to_live_secs, upstream_target: None };
//! let (table, errors) = RouteTable::compile(
//!     [
//!         route("hot", "FROM /messages/modules/press/* WHERE Level = 'hot' INTO $upstream"),
//!         route("all", "FROM /messages/* INTO BrokeredEndpoint(\"/modules/mix/inputs/in1\")"),
//!         route("bad", "FROM /messages/* WHERE level = 5 INTO $upstream"),
//!     ],
//!     "edge-9",
//! );
//! assert_eq!(errors[0].name, "bad");
//! assert_eq!(errors[0].diagnostics[0].in_route.map(|range| range.column), Some(30));
//!
//! let press = MessageSource::Module { module: "press", output: Some("alarms") };
//! let candidates = table.candidates(&press)?; // kept by the caller for the next message of this sender
//! let mut decision = Decision::new(); // kept by the caller, too
//! let mut endpoints = |level| {
//!     table.decide(&candidates, &Message { level }, &mut decision);
//!     let endpoints = decision.targets.iter().filter_map(|target| table.endpoint(target.endpoint));
//!     endpoints.map(|endpoint| endpoint.id.to_string()).collect::<Vec<_>>()
//! };
//! assert_eq!(endpoints("hot"), ["iothub", "edge-9/mix/in1"]);
//! assert_eq!(endpoints("cold"), ["edge-9/mix/in1"]);
//! # Ok::<(), edgehub_routing::MessageRejected>(())
//! ```

mod bits;
mod body;
mod check;
mod clause;
mod condition;
mod config;
mod diagnostic;
mod evaluate;
mod explain;
mod expression;
mod family;
mod function;
mod lexer;
pub mod limits;
mod lint;
mod message;
mod number;
mod parens;
mod plan;
mod program;
mod render;
mod route;
mod source;
mod suggest;
mod syntax;
mod table;
mod text;
mod value;
mod walker;

pub use condition::{Condition, check_body_path};
pub use config::{
    ConfigCategory, ConfigError, HubConfig, OverflowPolicy, OwnedRouteSpec, PRIORITY_MAX, SchemaVersion,
};
pub use diagnostic::{Category, Diagnostic, Stage, Suggestion, TextRange};
pub use evaluate::Truth;
pub use explain::{
    Evaluation, ExplainedRoute, ExplainedTarget, Explanation, Outcome, Part, PartValue, Reason, explain,
};
pub use lint::{LINTS_OF_ROUTE_MAX, Lint, LintCode, lint};
pub use message::{MessageView, PropertyName, SystemProperty, Text, fold_name};
pub use render::Origin;
pub use route::{Route, Sink, UPSTREAM_ENDPOINT, upstream_target};
pub use source::{MessageRejected, MessageSource, SourcePattern};
pub use table::{
    Candidates, DEFAULT_PRIORITY, Decision, Endpoint, EndpointIndex, RouteError, RouteIndex, RouteSpec,
    RouteTable, Target,
};
