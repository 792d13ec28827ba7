//! One identity that is logged in on a connection: its links, and what goes over them.

use smallvec::SmallVec;

use super::deliveries::Deliverer;
use super::methods;
use super::outbox::{Outbox, Overflow};
use super::turn::{Purpose, Turn};
use super::twin::Twin;
use crate::amqp::{
    AttachAnswer, AttachRequest, Condition, Connection, Delivery, DeliveryId, Error, LinkId, LinkKind,
    Outcome, Text,
};
use crate::backend::{Backend, Command, Feature, Login};

/// Credit of links on which clients send.
const CREDIT: u32 = 1_000;

/// Largest transfer that is announced, in bytes.
const TRANSFER_BYTES_MAX: u64 = 1_048_576;

/// The link property that tells which two links make a pair.
const PAIR_PROPERTY: &str = "com.microsoft:channel-correlation-id";

/// An identity that is logged in, and its links: one of each function.
pub(super) struct Connected<B: Backend> {
    pub(super) client: B::Client,
    /// What it last came with. Its identity is that of the links.
    pub(super) login: Login,
    /// Tells this login of the identity from others on the connection.
    pub(super) number: u64,
    pub(super) renewal: Renewal,
    links: SmallVec<[Held; 4]>,
    twin: Twin,
    calls: Outbox,
    deliverer: Deliverer,
}

/// Where the check of a newer token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Renewal {
    /// There is no newer token.
    None,
    /// It is in line.
    Due,
    /// It is under way.
    Running,
    /// It is under way, and there is a token that is newer still.
    Overtaken,
}

/// A link of the identity.
struct Held {
    kind: LinkKind,
    link: LinkId,
    /// What it has in common with the other link of its pair; may be empty.
    pair: Text,
}

impl<B: Backend> Connected<B> {
    pub(super) fn new(login: Login, number: u64, client: B::Client) -> Self {
        Self {
            client,
            login,
            number,
            renewal: Renewal::None,
            links: SmallVec::new(),
            twin: Twin::default(),
            calls: Outbox::default(),
            deliverer: Deliverer::default(),
        }
    }

    /// No link is left.
    pub(super) fn is_unused(&self) -> bool {
        self.links.is_empty()
    }

    /// Accepts a link. It takes the place of an older one of its function; and when it opens a new pair, the other link
    /// of the older pair ends: a client that builds one of the two anew builds both.
    pub(super) fn attach(&mut self, turn: &mut Turn<'_, B>, kind: LinkKind, request: &AttachRequest) {
        if !accept(turn.engine, request, kind) {
            return;
        }
        let (link, pair) = (request.link, pair_of(request));
        turn.links.insert(link, Purpose::Of(self.login.identity.clone(), kind));
        if let Some(older) = self.links.iter().position(|held| held.kind == kind) {
            let older = self.links.swap_remove(older);
            turn.detach(older.link, None);
        }
        let opposite = self.links.iter().find(|held| Some(held.kind) == opposite(kind) && held.pair != pair);
        if let Some(link) = opposite.map(|held| held.link) {
            self.end_link(turn, link, None);
        }
        self.links.push(Held { kind, link, pair });
        self.begin(turn, kind, link);
    }

    /// A link is gone, and with it what it was for.
    pub(super) fn link_gone(&mut self, turn: &mut Turn<'_, B>, link: LinkId) {
        if let Some(at) = self.links.iter().position(|held| held.link == link) {
            let held = self.links.swap_remove(at);
            self.finish(turn, held.kind);
        }
    }

    /// Takes a message on a link on which the client sends; telemetry is not for here.
    pub(super) fn received(&mut self, turn: &mut Turn<'_, B>, kind: LinkKind, delivery: &Delivery) {
        match kind {
            LinkKind::TwinRequests => {
                let taken = self.twin.request(turn, &mut self.client, delivery);
                self.check(turn, LinkKind::TwinAnswers, taken);
            }
            LinkKind::MethodResponses => methods::answered(turn, &mut self.client, delivery),
            LinkKind::Cbs
            | LinkKind::Telemetry
            | LinkKind::Inputs
            | LinkKind::CloudToDevice
            | LinkKind::MethodCalls
            | LinkKind::TwinAnswers => {}
        }
    }

    /// Does what the backend asks for. The end of the connection is not for here.
    pub(super) fn command(&mut self, turn: &mut Turn<'_, B>, command: Command) {
        match command {
            Command::Deliver(deliveries) => self.deliverer.deliver(turn, deliveries),
            Command::TwinAnswer(answer) => {
                let taken = self.twin.answer(turn, answer);
                self.check(turn, LinkKind::TwinAnswers, taken);
            }
            Command::Desired(patch) => {
                let taken = self.twin.desired(turn, patch);
                self.check(turn, LinkKind::TwinAnswers, taken);
            }
            Command::Invoke(call) => {
                let taken = methods::call(&mut self.calls, turn, call);
                self.check(turn, LinkKind::MethodCalls, taken);
            }
            Command::Close(_) => {}
        }
    }

    /// A delivery of ours was settled.
    pub(super) fn settled(&mut self, turn: &mut Turn<'_, B>, delivery: DeliveryId, outcome: &Outcome) {
        self.deliverer.settled(turn, delivery, outcome);
    }

    /// There is room on a link on which we send.
    pub(super) fn resume(&mut self, turn: &mut Turn<'_, B>, kind: LinkKind) {
        match kind {
            LinkKind::Inputs | LinkKind::CloudToDevice => self.deliverer.resume(turn),
            LinkKind::MethodCalls => self.calls.resume(turn),
            LinkKind::TwinAnswers => self.twin.answers.resume(turn),
            LinkKind::Cbs | LinkKind::Telemetry | LinkKind::MethodResponses | LinkKind::TwinRequests => {}
        }
    }

    /// Ends all links; the identity is to be dropped next.
    pub(super) fn end(&mut self, turn: &mut Turn<'_, B>, error: &Error) {
        self.deliverer.detach(turn);
        for held in self.links.drain(..) {
            turn.detach(held.link, Some(error.clone()));
        }
    }

    fn begin(&mut self, turn: &mut Turn<'_, B>, kind: LinkKind, link: LinkId) {
        match kind {
            LinkKind::Inputs => self.deliverer.attach(turn, link),
            // A module has no cloud-to-device messages; its link is there and stays silent.
            LinkKind::CloudToDevice if self.login.identity.module_id().is_none() => {
                self.deliverer.attach(turn, link);
            }
            LinkKind::MethodCalls => self.calls.attach(turn, link),
            LinkKind::TwinAnswers => self.twin.answers.attach(turn, link),
            LinkKind::CloudToDevice
            | LinkKind::Cbs
            | LinkKind::Telemetry
            | LinkKind::MethodResponses
            | LinkKind::TwinRequests => {}
        }
        self.subscribe(turn, kind, true);
    }

    fn finish(&mut self, turn: &mut Turn<'_, B>, kind: LinkKind) {
        self.subscribe(turn, kind, false);
        match kind {
            LinkKind::Inputs => self.deliverer.detach(turn),
            LinkKind::CloudToDevice if self.login.identity.module_id().is_none() => {
                self.deliverer.detach(turn)
            }
            LinkKind::MethodCalls => self.calls.detach(),
            LinkKind::TwinAnswers => self.twin.answers.detach(),
            LinkKind::CloudToDevice
            | LinkKind::Cbs
            | LinkKind::Telemetry
            | LinkKind::MethodResponses
            | LinkKind::TwinRequests => {}
        }
    }

    fn subscribe(&mut self, turn: &mut Turn<'_, B>, kind: LinkKind, on: bool) {
        let module = self.login.identity.module_id().is_some();
        let features: &[Feature] = match kind {
            LinkKind::Inputs => &[Feature::ModuleInputs],
            LinkKind::CloudToDevice if !module => &[Feature::CloudToDevice],
            LinkKind::MethodCalls => &[Feature::Methods],
            LinkKind::TwinAnswers => &[Feature::TwinResponses, Feature::DesiredProperties],
            LinkKind::CloudToDevice
            | LinkKind::Cbs
            | LinkKind::Telemetry
            | LinkKind::MethodResponses
            | LinkKind::TwinRequests => &[],
        };
        for feature in features {
            turn.backend.subscribe(&mut self.client, *feature, on);
        }
    }

    fn end_link(&mut self, turn: &mut Turn<'_, B>, link: LinkId, error: Option<Error>) {
        turn.detach(link, error);
        self.link_gone(turn, link);
    }

    /// A client that does not take what it asked for loses the link: it attaches again and asks anew.
    fn check(&mut self, turn: &mut Turn<'_, B>, kind: LinkKind, taken: Result<(), Overflow>) {
        if taken.is_ok() {
            return;
        }
        tracing::debug!(client = %self.login.identity, ?kind, "The client takes too little of what it asked for");
        if let Some(link) = self.links.iter().find(|held| held.kind == kind).map(|held| held.link) {
            let error = Error::new(Condition::RESOURCE_LIMIT_EXCEEDED, "the link got no credit for too long");
            self.end_link(turn, link, Some(error));
        }
    }
}

/// Answers the attach of a link; false when it is gone.
pub(super) fn accept(engine: &mut Connection, request: &AttachRequest, kind: LinkKind) -> bool {
    let asked = &request.attach;
    let (snd_settle, rcv_settle) = kind.settle_modes(asked);
    let max_message_bytes = match asked.max_message_bytes {
        Some(size) if (1..=TRANSFER_BYTES_MAX).contains(&size) => size,
        Some(_) | None => TRANSFER_BYTES_MAX,
    };
    let answer =
        AttachAnswer { snd_settle, rcv_settle, max_message_bytes, credit: CREDIT, properties: Vec::new() };
    engine.accept_attach(request.link, answer)
}

/// The other function of a pair.
fn opposite(kind: LinkKind) -> Option<LinkKind> {
    match kind {
        LinkKind::MethodCalls => Some(LinkKind::MethodResponses),
        LinkKind::MethodResponses => Some(LinkKind::MethodCalls),
        LinkKind::TwinRequests => Some(LinkKind::TwinAnswers),
        LinkKind::TwinAnswers => Some(LinkKind::TwinRequests),
        LinkKind::Cbs | LinkKind::Telemetry | LinkKind::Inputs | LinkKind::CloudToDevice => None,
    }
}

/// The significant part of a link's correlation: what stands behind the first colon.
fn pair_of(request: &AttachRequest) -> Text {
    let found = request.attach.properties.iter().find(|(key, _)| key.as_str() == PAIR_PROPERTY);
    let text = found.and_then(|(_, value)| value.as_text());
    text.and_then(|text| text.split_once(':')).map(|(_, pair)| pair.into()).unwrap_or_default()
}
