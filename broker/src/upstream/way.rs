//! The seam between the supervisor and what carries identities up: one AMQP connection for all, or an MQTT connection for
//! each.

use std::net::SocketAddr;
use std::sync::Arc;

use edgehub_storage::Store;
use tokio::time::Instant;

use super::UpstreamOptions;
use super::control::Request;
use super::dial::Dialled;
use super::failure::Failure;
use super::lanes::{LaneId, Lanes};
use super::mqtt::Connections;
use super::plain::UpstreamKind;
use super::progress::Progress;
use super::uplink::Uplink;
use super::work::Work;
use crate::delivery::Losses;
use crate::dial::UpstreamStream;

/// A way up, from the first stream on.
pub(super) enum Way {
    /// One connection.
    Amqp(Box<Uplink<UpstreamStream>>),
    /// A connection per identity.
    Mqtt(Box<Connections>),
}

macro_rules! both {
    ($way:expr, $carrier:ident => $do:expr) => {
        match $way {
            Way::Amqp($carrier) => $do,
            Way::Mqtt($carrier) => $do,
        }
    };
}

impl Way {
    pub(super) fn new(
        dialled: Dialled,
        avoid: Option<SocketAddr>,
        options: UpstreamOptions,
        store: Store,
        losses: Arc<Losses>,
        work: &mut Work,
    ) -> Self {
        match options.kind {
            UpstreamKind::MqttHub => {
                Way::Mqtt(Box::new(Connections::new(dialled, avoid, options, store, losses, work)))
            }
            UpstreamKind::Hub | UpstreamKind::Amqp(_) => {
                Way::Amqp(Box::new(Uplink::new(dialled.stream, options, store, losses)))
            }
        }
    }

    /// What it has come to so far.
    pub(super) fn progress(&self) -> &Progress {
        both!(self, carrier => carrier.progress())
    }

    /// The same, for what is told once.
    pub(super) fn progress_mut(&mut self) -> &mut Progress {
        both!(self, carrier => carrier.progress_mut())
    }

    /// Identities that have a session or connection, or are getting one.
    pub(super) fn sessions(&self) -> usize {
        both!(self, carrier => carrier.sessions())
    }

    /// Writes and reads once. With `wait` it returns when something happened, otherwise at once. Cancel safe.
    pub(super) async fn turn(&mut self, wait: bool) {
        both!(self, carrier => carrier.turn(wait).await);
    }

    /// Closes what is open in order.
    pub(super) async fn close(self, work: &Work) {
        both!(self, carrier => carrier.close(work).await);
    }

    /// Sends what the hub has answered by now.
    pub(super) fn take_answered(&mut self, work: &Work) {
        both!(self, carrier => carrier.take_answered(work));
    }

    /// Works through what arrived.
    pub(super) fn handle_events(&mut self, work: &mut Work) -> Result<(), Failure> {
        both!(self, carrier => carrier.handle_events(work))
    }

    /// Looks at deadlines, and at the age of the tokens.
    pub(super) fn look(&mut self, work: &mut Work, now: Instant) -> Result<(), Failure> {
        both!(self, carrier => carrier.look(work, now))
    }

    /// The way is up: asks for what all identities want.
    pub(super) fn arrange_all(&mut self, work: &mut Work) {
        for lane in work.wants.all() {
            both!(self, carrier => carrier.arrange(lane, work));
        }
    }

    /// The pause of these identities is over.
    pub(super) fn resume(&mut self, lanes: Vec<LaneId>, work: &mut Work) {
        both!(self, carrier => carrier.resume(lanes, work));
    }

    /// A lane may have something to send.
    pub(super) fn ready(&mut self, lane: LaneId, lanes: &Lanes) {
        both!(self, carrier => carrier.ready(lane, lanes));
    }

    /// Sends what may be sent.
    pub(super) fn send(&mut self, work: &mut Work) {
        both!(self, carrier => carrier.send(work));
    }

    /// Begins the logins whose turn it is.
    pub(super) fn log_in(&mut self, work: &mut Work) -> Result<(), Failure> {
        match self {
            Way::Amqp(uplink) => uplink.put_tokens(&work.lanes),
            Way::Mqtt(connections) => {
                connections.connect(work);
                Ok(())
            }
        }
    }

    /// Takes a request of the hub.
    pub(super) fn request(&mut self, request: Request, work: &mut Work) {
        both!(self, carrier => carrier.request(request, work));
    }
}
