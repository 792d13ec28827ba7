//! Owns the verbs `clients`: who is connected, and sending one away.

use std::fmt::Write as _;

use edgehub_broker::backend::Protocol;
use edgehub_broker::hub::{Client, Hub};
use edgehub_broker::identity::Identity;
use hyper::StatusCode;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::answer::Refusal;
use super::status::shown;
use super::table::{Side, Table, printable};

/// `GET /v1/clients`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientsAnswer {
    /// Open connections, by identity.
    pub clients: Vec<ClientAnswer>,
    /// So many may be open.
    pub max: u64,
}

/// `GET /v1/clients/{id}`, and a member of `GET /v1/clients`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientAnswer {
    /// `device` or `device/module`.
    pub id: String,
    /// Tells one connection of an identity from the next.
    pub connection: u64,
    /// `mqtt` or `amqp`.
    pub protocol: String,
    /// Address and port that it comes from.
    pub peer: Option<String>,
    /// Product and version of its SDK, as it says.
    pub product: String,
    /// When it logged in.
    pub since: String,
    /// When its credentials end; `null` when only a change can end them.
    pub credentials_until: Option<String>,
    /// Whether it takes the messages for the inputs of its module.
    pub takes_inputs: bool,
}

/// `POST /v1/clients/{id}/kick`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KickAnswer {
    /// Whose connection.
    pub id: String,
    /// Whether it was closed.
    pub applied: bool,
}

/// Whether it is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kick {
    /// Do it; else only say what would be done.
    #[serde(default)]
    pub apply: bool,
}

/// Every open connection.
pub(super) fn list(hub: &Hub) -> ClientsAnswer {
    let clients = hub.clients().iter().map(ClientAnswer::new).collect();
    ClientsAnswer { clients, max: hub.clients_max() as u64 }
}

/// The open connection of an identity.
pub(super) fn show(hub: &Hub, id: &str) -> Result<ClientAnswer, Refusal> {
    hub.client(&identity(id)?).map(|client| ClientAnswer::new(&client)).ok_or_else(away)
}

/// Closes the open connection of an identity, if told to.
pub(super) fn kick(hub: &Hub, id: &str, kick: Kick) -> Result<KickAnswer, Refusal> {
    let identity = identity(id)?;
    let there = if kick.apply { hub.kick(&identity) } else { hub.client(&identity).is_some() };
    if !there {
        return Err(away());
    }
    if kick.apply {
        tracing::info!(client = %identity, "An operator closes the connection of a client");
    }
    Ok(KickAnswer { id: identity.to_string(), applied: kick.apply })
}

fn identity(id: &str) -> Result<Identity, Refusal> {
    Identity::parse(id).map_err(|error| {
        Refusal::new(StatusCode::BAD_REQUEST, format!("this is no id (device or device/module): {error}"))
    })
}

fn away() -> Refusal {
    Refusal::new(
        StatusCode::NOT_FOUND,
        "no client of this id is connected; `edgehub clients list` shows all that are",
    )
}

impl ClientAnswer {
    fn new(client: &Client) -> Self {
        let at = |secs: i64| OffsetDateTime::from_unix_timestamp(secs).map(shown).ok();
        Self {
            id: client.identity.to_string(),
            connection: client.connection,
            protocol: match client.protocol {
                Protocol::Mqtt => "mqtt".into(),
                Protocol::Amqp => "amqp".into(),
            },
            peer: client.peer.map(|peer| peer.to_string()),
            product: client.product_info.clone(),
            since: i64::try_from(client.since_unix_secs).ok().and_then(at).unwrap_or_default(),
            credentials_until: client.credentials_until_unix_secs.and_then(at),
            takes_inputs: client.takes_inputs,
        }
    }

    /// `edgehub clients show`.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let mut line = |name: &str, text: &str| {
            let _infallible = writeln!(out, "{name:<18} {}", printable(text));
        };
        line("id", &self.id);
        line("protocol", &self.protocol);
        line("from", self.peer.as_deref().unwrap_or("-"));
        line("product", if self.product.is_empty() { "-" } else { &self.product });
        line("connected since", &self.since);
        line("credentials until", self.credentials_until.as_deref().unwrap_or("they are changed"));
        line("takes inputs", if self.takes_inputs { "yes" } else { "no" });
        out
    }
}

impl ClientsAnswer {
    /// `edgehub clients list`.
    pub fn text(&self) -> String {
        if self.clients.is_empty() {
            return "No client is connected.\n".into();
        }
        let mut table = Table::new([
            ("ID", Side::Left),
            ("PROTOCOL", Side::Left),
            ("FROM", Side::Left),
            ("SINCE", Side::Left),
            ("INPUTS", Side::Left),
            ("PRODUCT", Side::Left),
        ]);
        for client in &self.clients {
            table.row([
                client.id.clone(),
                client.protocol.clone(),
                client.peer.clone().unwrap_or("-".into()),
                client.since.clone(),
                if client.takes_inputs { "yes".into() } else { "-".into() },
                client.product.clone(),
            ]);
        }
        format!("{}\n{} of at most {} clients\n", table.lines().join("\n"), self.clients.len(), self.max)
    }
}

impl KickAnswer {
    /// `edgehub clients kick`.
    pub fn text(&self) -> String {
        let id = printable(&self.id);
        if self.applied {
            format!("Closed the connection of {id}; it may come again.\n")
        } else {
            format!("Would close the connection of {id}.\nNothing was changed; --apply does it.\n")
        }
    }
}
