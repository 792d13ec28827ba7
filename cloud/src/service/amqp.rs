//! A service's AMQP connection: its tokens, cloud-to-device messages in, feedback out.
//!
//! Devices and services come to one port; a connection is a service's once it puts a token of the policy, and the head
//! hands it over then. Links:
//!
//! | address | service | what |
//! | --- | --- | --- |
//! | `$cbs` | both ways | tokens |
//! | `/messages/devicebound` | sends | a message whose `to` is `/devices/{id}/messages/devicebound` |
//! | `/messages/serviceBound/feedback` | receives | records of what became of messages, as JSON |

use std::collections::{HashMap, HashSet, VecDeque};
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use edgehub_broker::amqp::{
    AttachAnswer, AttachRequest, By, CbsResponse, Condition, Connection, Delivery, DeliveryId, Driver, Error,
    Event, LinkId, LinkKind, Message as Encoded, MessageEncoder, MessageId, MessageProperties, Outcome,
    PutToken, ReceiverSettle, Role, SendError, SendOptions, SenderSettle, SessionId, Text,
};
use edgehub_broker::head::amqp::{AmqpLimits, HandedOver, serve_or_hand_over};
use edgehub_broker::head::mqtt::Peer;
use edgehub_broker::identity::{EXPIRY_TOLERANCE_SECS, unix_now_secs};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, sleep, sleep_until};

use super::access::{self, policy};
use super::fault::Fault;
use super::message;
use crate::backend::CloudBackend;
use crate::cloud_to_device::Feedback;
use crate::registry::Registry;

/// Messages that a service may have on the way.
const CREDIT: u32 = 100;

/// Largest message that is taken from a service.
const TRANSFER_BYTES_MAX: u64 = 256 * 1_024;

/// Links of one connection, those for tokens included.
const LINKS_MAX: usize = 64;

/// Answers to put-token requests that wait for a link.
const ANSWERS_MAX: usize = 16;

/// Records in one feedback message.
const RECORDS_MAX: usize = 64;

/// How often it is looked for messages that have expired, while somebody takes feedback.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

const FEEDBACK_TYPE: &str = "application/vnd.microsoft.iothub.feedback.json";

/// Serves a connection to its end, of a device or hub, or of a service.
pub(crate) async fn serve_connection<S>(
    stream: S,
    registry: Arc<Registry>,
    backend: CloudBackend,
    peer: Peer,
    shutdown: impl Future<Output = ()> + Send,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let mut shutdown = pin!(shutdown);
    let limits = AmqpLimits::default();
    let clients = backend.clone();
    let is_service_token = |token: &str| policy(token).is_some();
    let handed_over =
        serve_or_hand_over(stream, clients, limits, peer, is_service_token, shutdown.as_mut()).await;
    if let Some(connection) = handed_over {
        serve(connection, registry, backend, shutdown).await;
    }
}

/// Serves a service's connection to its end; it begins with the request that it was handed over for.
async fn serve<S>(
    handed_over: HandedOver<S>,
    registry: Arc<Registry>,
    backend: CloudBackend,
    shutdown: impl Future<Output = ()> + Send,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let HandedOver { driver, request, answer_links } = handed_over;
    let mut service = Service {
        driver,
        registry,
        backend,
        expires: None,
        answer_links,
        answers: VecDeque::new(),
        token_links: HashSet::from([request.link]),
        message_links: HashSet::new(),
        feedback_links: HashMap::new(),
        under_way: HashMap::new(),
    };
    service.received(&request);
    let reason = service.run(pin!(shutdown)).await;
    tracing::debug!(reason, "a service's connection ended");
    let left = std::mem::take(&mut service.under_way);
    for (_, records) in left.into_values() {
        service.backend.messages().feedback().put_back(records);
    }
    // Whatever the peer has not read by then is lost to it.
    let _ = service.driver.shutdown().await;
}

struct Service<S> {
    driver: Driver<S>,
    registry: Arc<Registry>,
    backend: CloudBackend,
    /// When the last good token ends, tolerance included; none before there is one.
    expires: Option<Instant>,
    answer_links: Vec<LinkId>,
    /// Answers to put-token requests that wait for a link.
    answers: VecDeque<(SessionId, CbsResponse)>,
    token_links: HashSet<LinkId>,
    message_links: HashSet<LinkId>,
    /// Links that take feedback, and whether one may be sent now.
    feedback_links: HashMap<LinkId, bool>,
    /// Feedback that was sent and is not settled.
    under_way: HashMap<DeliveryId, (LinkId, Vec<Feedback>)>,
}

impl<S> Service<S>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    async fn run(&mut self, mut shutdown: Pin<&mut (impl Future<Output = ()> + Send)>) -> String {
        loop {
            while let Some(event) = self.driver.connection().poll_event() {
                if let Some(reason) = self.handle(event) {
                    return reason;
                }
            }
            self.send_feedback();
            if self.driver.is_finished() {
                return "closed".into();
            }
            let takes_feedback = self.feedback_links.values().any(|ready| *ready);
            let expires = self.expires;
            let expired = async {
                match expires {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.driver.turn() => {}
                () = self.backend.messages().feedback().arrived(), if takes_feedback => {}
                () = sleep(SWEEP_EVERY), if takes_feedback => self.backend.messages().sweep(),
                () = expired => {
                    self.expires = None;
                    self.close(Error::new(Condition::UNAUTHORIZED_ACCESS, "the token has expired"));
                }
                () = shutdown.as_mut() => {
                    self.close(Error::new(Condition::CONNECTION_FORCED, "the stand-in is stopping"));
                    return "the stand-in is stopping".into();
                }
            }
        }
    }

    /// A text when the connection is over.
    fn handle(&mut self, event: Event) -> Option<String> {
        match event {
            Event::AttachRequested(request) => self.attach_requested(&request),
            Event::Delivery(delivery) => self.received(&delivery),
            Event::Settled { delivery, outcome, .. } => self.settled(delivery, &outcome),
            Event::Detached { link, .. } => self.link_gone(|other| other == link),
            Event::SessionEnded { session, .. } => self.link_gone(|link| link.session() == session),
            Event::CreditChanged { link, .. } => {
                if let Some(ready) = self.feedback_links.get_mut(&link) {
                    *ready = true;
                }
                self.send_answers();
            }
            Event::WindowOpened { .. } | Event::OutputDrained => {
                self.feedback_links.values_mut().for_each(|ready| *ready = true);
                self.send_answers();
            }
            Event::Closed { error, by } => {
                return Some(match (error, by) {
                    (Some(error), _) => error.to_string(),
                    (None, By::Peer) => "closed by the service".into(),
                    (None, By::Engine) => "closed".into(),
                });
            }
            // SASL is over, and only the service attaches links.
            Event::SaslPlain { .. }
            | Event::Opened(_)
            | Event::SessionBegun { .. }
            | Event::Attached { .. }
            | Event::AttachRefused { .. } => {}
        }
        None
    }

    fn close(&mut self, error: Error) {
        self.driver.connection().close(Some(error), std::time::Instant::now());
    }

    // ---- links --------------------------------------------------------------------------------------------

    fn attach_requested(&mut self, request: &AttachRequest) {
        let address = request.address();
        let path = address.as_ref().map_or("", |address| path(address.as_str()));
        let is = |expected: &str| path.eq_ignore_ascii_case(expected);
        let links = self.token_links.len() + self.message_links.len() + self.feedback_links.len();
        let refusal = if links + self.answer_links.len() >= LINKS_MAX {
            Error::new(Condition::RESOURCE_LIMIT_EXCEEDED, "too many links on one connection")
        } else if is("$cbs") {
            self.attach_tokens(request);
            return;
        } else if self.expires.is_none() {
            Error::new(Condition::UNAUTHORIZED_ACCESS, "put a token of the policy first")
        } else if is("messages/devicebound") && request.attach.role == Role::Sender {
            if self.accept(request, request.attach.snd_settle, ReceiverSettle::First) {
                self.message_links.insert(request.link);
            }
            return;
        } else if is("messages/servicebound/feedback") && request.attach.role == Role::Receiver {
            let settle = request.attach.rcv_settle.unwrap_or(ReceiverSettle::First);
            if self.accept(request, None, settle) {
                self.feedback_links.insert(request.link, true);
            }
            return;
        } else {
            Error::new(Condition::NOT_FOUND, "the address names nothing that services are served with")
        };
        self.driver.connection().refuse_attach(request.link, refusal);
    }

    fn attach_tokens(&mut self, request: &AttachRequest) {
        let (snd_settle, rcv_settle) = LinkKind::Cbs.settle_modes(&request.attach);
        if !self.accept(request, snd_settle, rcv_settle.unwrap_or(ReceiverSettle::First)) {
            return;
        }
        match request.attach.role {
            Role::Sender => {
                self.token_links.insert(request.link);
            }
            Role::Receiver => {
                self.answer_links.push(request.link);
                self.send_answers();
            }
        }
    }

    fn accept(
        &mut self,
        request: &AttachRequest,
        snd_settle: Option<SenderSettle>,
        rcv_settle: ReceiverSettle,
    ) -> bool {
        let answer = AttachAnswer {
            snd_settle,
            rcv_settle: Some(rcv_settle),
            max_message_bytes: TRANSFER_BYTES_MAX,
            credit: CREDIT,
            properties: Vec::new(),
        };
        self.driver.connection().accept_attach(request.link, answer)
    }

    fn link_gone(&mut self, gone: impl Fn(LinkId) -> bool) {
        self.token_links.retain(|link| !gone(*link));
        self.message_links.retain(|link| !gone(*link));
        self.answer_links.retain(|link| !gone(*link));
        self.feedback_links.retain(|link, _| !gone(*link));
        let left: Vec<DeliveryId> =
            self.under_way.iter().filter(|(_, (link, _))| gone(*link)).map(|(id, _)| *id).collect();
        for delivery in left {
            if let Some((_, records)) = self.under_way.remove(&delivery) {
                self.backend.messages().feedback().put_back(records);
            }
        }
    }

    // ---- what the service sends ---------------------------------------------------------------------------

    fn received(&mut self, delivery: &Delivery) {
        if self.token_links.contains(&delivery.link) {
            self.driver.connection().settle(delivery.id, Outcome::Accepted);
            self.token(delivery);
        } else if self.message_links.contains(&delivery.link) {
            let outcome = match self.message(delivery) {
                Ok(()) => Outcome::Accepted,
                Err(error) => {
                    tracing::debug!(%error, "a cloud-to-device message is rejected");
                    Outcome::Rejected(Some(error))
                }
            };
            self.driver.connection().settle(delivery.id, outcome);
        }
    }

    fn token(&mut self, delivery: &Delivery) {
        let (correlation_id, taken) = match Encoded::parse(&delivery.payload) {
            Ok(message) => {
                let (id, request) = PutToken::decode(&message);
                let taken = request
                    .map_err(Fault::invalid)
                    .and_then(|request| access::authorize(&self.registry, Some(request.token.expose())));
                (id, taken)
            }
            Err(error) => (None, Err(Fault::invalid(error))),
        };
        let (status_code, description) = match taken {
            Ok(expires_at_secs) => {
                let left = expires_at_secs.saturating_add(EXPIRY_TOLERANCE_SECS) - unix_now_secs();
                // A time far beyond any connection's end.
                let left = u64::try_from(left).unwrap_or(0).min(10 * 365 * 24 * 3_600);
                self.expires = Some(Instant::now() + Duration::from_secs(left));
                (200, "OK".to_owned())
            }
            Err(fault) => (i32::from(fault.status), fault.message),
        };
        // A service that takes no answers gets none.
        if self.answers.len() < ANSWERS_MAX {
            let description = Text::from(description);
            let answer = CbsResponse { correlation_id, status_code, description };
            self.answers.push_back((delivery.link.session(), answer));
        }
        self.send_answers();
    }

    /// On the link of the request's session, else on the newest.
    fn send_answers(&mut self) {
        while let Some((session, answer)) = self.answers.front() {
            let same = self.answer_links.iter().rev().find(|link| link.session() == *session);
            let Some(link) = same.or(self.answer_links.last()).copied() else { return };
            let options = SendOptions { settled: true, ..SendOptions::default() };
            match self.driver.connection().send(link, answer.encode(), options) {
                Ok(_) | Err(SendError::TooLarge { .. } | SendError::NotAttached) => self.answers.pop_front(),
                Err(
                    SendError::NoCredit
                    | SendError::NoWindow
                    | SendError::Backlog
                    | SendError::TooManyUnsettled,
                ) => return,
            };
        }
    }

    fn message(&mut self, delivery: &Delivery) -> Result<(), Error> {
        let (device, message) = message::read(delivery)?;
        self.backend.send(&device, message).map_err(|error| {
            let fault = Fault::from(error);
            let condition = match fault.status {
                404 => Condition::NOT_FOUND,
                403 | 503 => Condition::RESOURCE_LIMIT_EXCEEDED,
                413 => Condition::MESSAGE_SIZE_EXCEEDED,
                400 => Condition::INVALID_FIELD,
                _ => Condition::INTERNAL_ERROR,
            };
            Error::new(condition, fault.message)
        })
    }

    // ---- feedback -----------------------------------------------------------------------------------------

    fn send_feedback(&mut self) {
        let feedback = self.backend.messages().feedback();
        for (link, ready) in &mut self.feedback_links {
            while *ready {
                let records = feedback.take(RECORDS_MAX);
                if records.is_empty() {
                    return;
                }
                match send(self.driver.connection(), *link, &records) {
                    Ok(delivery) => {
                        self.under_way.insert(delivery, (*link, records));
                    }
                    Err(_) => {
                        *ready = false;
                        feedback.put_back(records);
                    }
                }
            }
        }
    }

    fn settled(&mut self, delivery: DeliveryId, outcome: &Outcome) {
        let Some((_, records)) = self.under_way.remove(&delivery) else { return };
        match outcome {
            Outcome::Accepted | Outcome::Rejected(_) => {}
            _ => self.backend.messages().feedback().put_back(records),
        }
    }
}

fn send(engine: &mut Connection, link: LinkId, records: &[Feedback]) -> Result<DeliveryId, SendError> {
    let id = uuid::Builder::from_random_bytes(fastrand::u128(..).to_ne_bytes()).into_uuid();
    let properties = MessageProperties {
        message_id: Some(MessageId::String(id.to_string().into())),
        content_type: Some(Text::from_static(FEEDBACK_TYPE)),
        content_encoding: Some(Text::from_static("utf-8")),
        ..MessageProperties::default()
    };
    let mut encoder = MessageEncoder::with_capacity(256);
    encoder.properties(&properties);
    let options = SendOptions { tag: Some(*id.as_bytes()), ..SendOptions::default() };
    engine.send(link, encoder.data(Feedback::to_json(records).into()), options)
}

/// The path of an address, absolute or not, without its first slash.
fn path(address: &str) -> &str {
    let path = match address.split_once("://") {
        Some((_, rest)) => rest.split_once('/').map_or("", |(_, path)| path),
        None => address.strip_prefix('/').unwrap_or(address),
    };
    path.split(['?', '#']).next().unwrap_or_default()
}
