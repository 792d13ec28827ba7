//! Owns one route: its source, its condition's text and its sink.

use std::sync::Arc;

use crate::diagnostic::{Category, Diagnostic, Fault, Span, Stage};
use crate::source::pattern_path;
use crate::suggest::nearest;
use crate::syntax::{RouteSyntax, SinkSyntax, parse_route};
use crate::text::equal_names;

/// The endpoint id of the upstream.
pub const UPSTREAM_ENDPOINT: &str = "iothub";

/// Where a route sends its messages.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Sink {
    /// The cloud or the parent hub; at another broker, the address that all routes without one of their own have.
    Upstream,
    /// An address of its own at the upstream. No text of a route names it: see
    /// [`RouteSpec::upstream_target`](crate::RouteSpec::upstream_target).
    UpstreamTarget(Arc<str>),
    /// An input of a module on this hub.
    ModuleInput {
        /// Module id, case kept.
        module: Arc<str>,
        /// Input name, case kept.
        input: Arc<str>,
    },
}

impl Sink {
    /// The id under which the endpoint's queues are known: `iothub`, `iothub[address]` for an address of its own there,
    /// or `{edgeDeviceId}/{module}/{input}`.
    pub fn endpoint_id(&self, edge_device_id: &str) -> String {
        match self {
            Sink::Upstream => UPSTREAM_ENDPOINT.to_owned(),
            Sink::UpstreamTarget(address) => format!("{UPSTREAM_ENDPOINT}[{address}]"),
            Sink::ModuleInput { module, input } => format!("{edge_device_id}/{module}/{input}"),
        }
    }

    /// The sink of a route that has this target at the upstream; module inputs stay what they are.
    pub(crate) fn at(self, upstream_target: Option<&str>) -> Sink {
        match (self, upstream_target) {
            (Sink::Upstream, Some(address)) => Sink::UpstreamTarget(address.into()),
            (sink, _) => sink,
        }
    }
}

/// The address in the endpoint id of a [`Sink::UpstreamTarget`]; none for any other endpoint. No edge device of a cloud
/// hub has brackets in its name.
pub fn upstream_target(endpoint_id: &str) -> Option<&str> {
    let address = endpoint_id.strip_prefix(UPSTREAM_ENDPOINT)?.strip_prefix('[')?.strip_suffix(']')?;
    (!address.is_empty()).then_some(address)
}

/// A route that parses and names a sink; its condition is not compiled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The path of the source pattern, for example `/messages/modules/press/`.
    pub source: String,
    /// The text of the condition, from its first to its last token; `true` if there is none.
    pub condition: String,
    /// Where to.
    pub sink: Sink,
}

impl Route {
    /// Parses the text of a route, without its condition's types.
    ///
    /// # Errors
    /// The first error of stage parse or sink.
    pub fn parse(text: &str) -> Result<Route, Diagnostic> {
        let locate = |fault: Fault| fault.locate(text, Span { start: 0, end: 0 });
        let syntax = parse_route(text).map_err(locate)?;
        let sink = resolve_sink(text, &syntax).map_err(locate)?;
        let condition = match &syntax.condition {
            Some((span, _)) => span.of(text),
            None => "true",
        };
        Ok(Route { source: pattern_path(&syntax.pattern), condition: condition.to_owned(), sink })
    }
}

/// The sink that a parsed route names.
pub(crate) fn resolve_sink(text: &str, route: &RouteSyntax) -> Result<Sink, Fault> {
    let slice = |span: Span| span.of(text);
    let refuse = |message: String, hint: &str| {
        Fault::new(Category::Sink, Stage::Sink, route.sink_span, message).with_hint(hint)
    };
    const SINKS: &str = "sinks are $upstream and BrokeredEndpoint(\"/modules/name/inputs/name\")";
    match route.sink {
        SinkSyntax::System(name) if equal_names(slice(name), "$upstream") => Ok(Sink::Upstream),
        SinkSyntax::Function(name, address) if equal_names(slice(name), "BrokeredEndpoint") => {
            let address = slice(address).trim();
            module_input(address).ok_or_else(|| {
                refuse(
                    format!("{address:?} is not the address of a module's input"),
                    "write /modules/name/inputs/name",
                )
            })
        }
        SinkSyntax::System(name) | SinkSyntax::Function(name, _) => {
            let fault = refuse(format!("there is no sink {:?}", slice(name)), SINKS);
            let known = match route.sink {
                SinkSyntax::System(_) => "$upstream",
                SinkSyntax::Function(..) => "BrokeredEndpoint",
            };
            Err(match nearest(slice(name), [known]) {
                Some(known) => fault.with_guess(name, known),
                None => fault,
            })
        }
    }
}

fn module_input(address: &str) -> Option<Sink> {
    let address = address.strip_prefix('/').unwrap_or(address);
    let address = address.strip_suffix('/').unwrap_or(address);
    let mut parts = address.split('/');
    let (_, module, _, input) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    match parts.next() {
        None => Some(Sink::ModuleInput { module: module.into(), input: input.into() }),
        Some(_) => None,
    }
}
