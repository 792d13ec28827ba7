//! The way up: one AMQP 1.0 connection with a session and its links per identity, or an MQTT connection per identity, and
//! the supervisor that keeps it alive. Each further target of another broker is a way of its own.
//!
//! One task owns all of it, so nothing is locked and nothing is handed over: it reads the queues of the upstream
//! endpoint, sorts what it read into lanes (one per sender), sends what the links' credit allows, and settles what
//! the upstream answers.
//!
//! ```text
//!             queues ─▶ QueueReader ─▶ Lanes ─▶ Uplink (AMQP engine, tokens, links) ─▶ TLS
//!                ▲                       │  ▲                   │
//!                └────── settle ─────────┘  └──── outcomes ─────┘
//! ```
//!
//! | room | owns |
//! | --- | --- |
//! | `supervisor` | the states connecting, up, throttled, backing off; the list of all deadlines |
//! | `dial` | name look-up, the addresses in turn, TCP and TLS |
//! | `way` | the seam between the supervisor and both ways: `uplink` and `mqtt` |
//! | `mqtt` | a connection per identity over MQTT |
//! | `progress` | what a way up has come to: up, delivered, throttled |
//! | `uplink` | one connection over AMQP: what arrives, and what does not |
//! | `remote` | one identity on it: its session and links |
//! | `watchdog` | who gets nowhere, and how far up to start anew |
//! | `failure` | why a connection failed, in stable names |
//! | `tokens` | the links on which tokens are put, and when |
//! | `proof` | whether the upstream lets an identity in with a token of its own |
//! | `verdict` | what answers and conditions of the upstream mean |
//! | `lanes`, `lane` | order, window and parking per sender |
//! | `turns` | whose turn it is to send |
//! | `convert` | messages and links as the upstream reads them |
//! | `fates` | messages that leave the lanes: settled and counted |
//! | `work` | what outlives a connection |
//! | `wants`, `outbox` | what identities want of the upstream, and what the hub is to hear |
//! | `twins`, `answers` | requests that wait for the upstream, and answers that it waits for |
//! | [`plain`] | another AMQP broker in the place of a hub |
//! | [`targets`] | several addresses there: which route has which, and the way to each |
//! | [`control`] | what the rest of the hub asks of the upstream for an identity, and hears from it |
//! | `status`, `tell` | what is shown of it, and said of its identities |

mod answers;
pub mod control;
mod convert;
mod dial;
mod failure;
mod fates;
mod lane;
mod lanes;
mod mqtt;
mod outbox;
pub mod plain;
mod progress;
mod proof;
mod remote;
mod status;
mod supervisor;
pub mod targets;
mod tell;
mod tokens;
mod turns;
mod twins;
mod uplink;
mod verdict;
mod wants;
mod watchdog;
mod way;
mod work;

use std::sync::Arc;
use std::time::Duration;

use edgehub_storage::{Queue, QueueId, Store};
use tokio::sync::watch;

use crate::delivery::{BackoffOptions, Losses};
use crate::dial::Transport;
use crate::identity::{ClientToken, ClientTokens, Identity, ScopeCache, TokenSource};

use control::ControlPeer;
pub use failure::UpstreamCause;
pub use plain::UpstreamKind;
pub use proof::UpstreamProver;
pub use status::{UpstreamState, UpstreamStatus};
use targets::Target;
pub use watchdog::WatchdogStep;

/// How the upstream is reached.
#[derive(Clone)]
pub struct UpstreamOptions {
    /// What is up there.
    pub kind: UpstreamKind,
    /// The target that this way leads to, if it is none but the one of all routes; see [`UpstreamOptions::way_to`].
    pub target: Option<Target>,
    /// Host that is dialled: the parent, else the cloud hub. Also the TLS server name and the host of addresses.
    pub host: String,
    /// Port that is dialled: 5671 as a rule, 8883 for MQTT, 443 for WebSockets.
    pub port: u16,
    /// What carries AMQP or MQTT.
    pub transport: Transport,
    /// Host of the cloud hub, in the names of tokens.
    pub hub_host: String,
    /// The hub's own identity, `{edge device}/$edgeHub`.
    pub identity: Identity,
    /// Trust and versions of TLS.
    pub tls: Arc<rustls::ClientConfig>,
    /// Makes the hub's own tokens.
    pub tokens: Arc<TokenSource>,
    /// Auth chains of senders.
    pub scope: Arc<ScopeCache>,
    /// What senders outside the scope come with, where there may be such.
    pub client_tokens: Option<Arc<ClientTokens>>,
    /// Messages in one transfer at most.
    pub batch_max: usize,
    /// How long an operation may take: connecting, a token, a link, the answer to a transfer.
    pub operation_timeout: Duration,
    /// The idle time-out that is announced.
    pub idle_timeout: Duration,
    /// Pauses before the next connection, and before a sender whose messages were not taken tries again.
    pub backoff: BackoffOptions,
    /// The part of the messages that less urgent queues are guaranteed, in percent; at most
    /// [`LOWER_SHARE_PERCENT_MAX`](crate::delivery::LOWER_SHARE_PERCENT_MAX).
    pub lower_share_percent: u8,
    /// Whether messages of senders that are known to have left the scope go to the dead letters. Otherwise they wait
    /// until their time to live ends, or their sender comes back; and always, where there are `client_tokens`.
    pub gives_up_out_of_scope: bool,
    /// Product and version, announced on links.
    pub product_info: String,
}

impl UpstreamOptions {
    /// The token of its own that an identity is let in with, because it is not in the scope; without one, it comes on its
    /// behalf, with the hub's.
    fn own_token(&self, identity: &Identity) -> Option<ClientToken> {
        let tokens = self.client_tokens.as_deref()?;
        match self.scope.chain(identity) {
            Some(_) => None,
            None => tokens.token_of(identity, self.tokens.now_secs()),
        }
    }

    /// Whether nothing can be tried for an identity: it is not in the scope, and has no good token of its own.
    fn is_stranger(&self, identity: &Identity) -> bool {
        let has_chain = || self.scope.chain(identity).is_some();
        self.client_tokens.is_some() && !has_chain() && self.own_token(identity).is_none()
    }

    /// Whether what waits for an identity is given up. Who is outside the scope may come with another token.
    fn gives_up(&self, identity: &Identity) -> bool {
        let is_known_to_be_gone = || self.client_tokens.is_none() && self.scope.is_out_of_scope(identity);
        self.gives_up_out_of_scope && is_known_to_be_gone()
    }

    /// Identities whose token of their own is another one since the last call.
    fn take_renewed(&self) -> Vec<Identity> {
        self.client_tokens.as_deref().map(ClientTokens::take_renewed).unwrap_or_default()
    }

    /// The upstream does not let an identity in. If it came with a token of its own, that proves nothing any more.
    fn refused(&self, identity: &Identity, token: Option<&ClientToken>) {
        if let (Some(tokens), Some(token)) = (&self.client_tokens, token) {
            tokens.refused(identity, token.text());
        }
    }
}

/// Why nothing is tried for an identity that is a stranger.
const STRANGER: &str = "it is not in the scope of this hub, and has not come with a good token of its own";

/// The hold on a running supervisor.
pub struct Handle {
    queues: watch::Sender<Option<Vec<(u32, Queue)>>>,
    status: watch::Receiver<UpstreamStatus>,
    stop: watch::Sender<bool>,
}

impl Handle {
    /// The queues of the upstream endpoint, the most urgent first. Before the first call nothing is sent.
    pub fn serve(&self, queues: Vec<(u32, Queue)>) {
        self.queues.send_if_modified(|current| {
            let ids = |queues: &[(u32, Queue)]| -> Vec<QueueId> {
                queues.iter().map(|(_, queue)| queue.id()).collect()
            };
            let changed = current.as_ref().is_none_or(|current| ids(current) != ids(&queues));
            if changed {
                *current = Some(queues);
            }
            changed
        });
    }

    /// The state of the way up, now and later.
    pub fn status(&self) -> watch::Receiver<UpstreamStatus> {
        self.status.clone()
    }

    /// Closes the connection in order, within the limit.
    pub async fn stop(&self, limit: Duration) {
        self.stop.send_replace(true);
        let _ = tokio::time::timeout(limit, self.stop.closed()).await;
    }
}

/// Starts the supervisor on a runtime. `control` is the other end of what the hub asks for and hears, and is served
/// whether there is a connection or not; without one, somebody else serves it.
pub fn start(
    options: UpstreamOptions,
    control: Option<ControlPeer>,
    store: Store,
    losses: Arc<Losses>,
    runtime: &tokio::runtime::Handle,
) -> Handle {
    let control = control.unwrap_or_else(|| control::channel(options.operation_timeout).2);
    let (queues, queues_receiver) = watch::channel(None);
    let (stop, stop_receiver) = watch::channel(false);
    let supervisor =
        supervisor::Supervisor::new(options, store, losses, control, queues_receiver, stop_receiver);
    let status = supervisor.status();
    runtime.spawn(supervisor.run());
    Handle { queues, status, stop }
}
