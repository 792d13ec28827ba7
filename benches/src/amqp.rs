//! Owns the generator's clients over AMQP 1.0: a connection for one identity or many, sending within a window,
//! receiving, and settling in batches.
//!
//! The engine is the hub's own, as a client: what it costs here is the generator's processor time, which is told apart.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use edgehub_broker::amqp::{
    AttachOptions, CbsResponse, ClientSasl, Connection, DeliveryId, Driver, Event, LinkId, Message,
    MessageEncoder, MessageId, Options, Outcome, Payload, PutToken, ReceiverSettle, Role, Secret, SendError,
    SendOptions, SenderSettle, Terminus,
};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use crate::arrivals::Arrivals;
use crate::client::{
    ClientError, Clock, LOGIN_TIMEOUT, Published, Publishing, Received, Stream, Target, connected, put_stamp,
    read_stamp, turned_true,
};
use crate::latency::Histogram;

/// Credit that a receiver keeps its sender at.
const RECEIVER_CREDIT: u32 = 1_000;
/// Credit for answers to tokens.
const TOKEN_CREDIT: u32 = 100;
/// Bodies are cut from blocks of this size.
const BODY_BLOCK_BYTES: usize = 64 * 1024;
/// Seconds from 1970 that no token of a run reaches, as its request tells.
const TOKEN_END_MILLIS: i64 = 4_102_444_800_000;

/// How a connection shows who it is.
#[derive(Debug, Clone)]
pub enum Access {
    /// Anonymous, then a token for each identity over `$cbs` of this host.
    Tokens(String),
    /// User and password by SASL.
    Plain {
        /// The user.
        user: &'static str,
        /// The password.
        password: &'static str,
    },
}

/// What one link is for.
#[derive(Debug, Clone)]
pub struct Node {
    /// Address of the node.
    pub address: String,
    /// Audience and token of the identity.
    pub token: Option<(String, String)>,
}

/// A connection that is logged in, with one session and link per node, in their order.
pub struct AmqpClient {
    driver: Driver<Box<dyn Stream>>,
    links: Vec<LinkId>,
}

impl AmqpClient {
    /// Connects, logs all identities of the nodes in, and attaches a link to each node.
    ///
    /// # Errors
    /// The network, the TLS handshake or the server refuses.
    pub async fn login(
        target: &Target,
        access: &Access,
        nodes: &[Node],
        role: Role,
    ) -> Result<Self, ClientError> {
        let login = async {
            let stream = connected(target).await?;
            Self::login_over(stream, access, nodes, role).await
        };
        timeout(LOGIN_TIMEOUT, login).await.map_err(|_elapsed| ClientError::TimedOut)?
    }

    /// Logs in over a stream that is connected. Has no deadline.
    ///
    /// # Errors
    /// The stream ends or the server refuses.
    pub async fn login_over(
        stream: Box<dyn Stream>,
        access: &Access,
        nodes: &[Node],
        role: Role,
    ) -> Result<Self, ClientError> {
        let sasl = match access {
            Access::Tokens(_) => ClientSasl::Anonymous,
            Access::Plain { user, password } => {
                ClientSasl::Plain { user: (*user).into(), password: Secret::new((*password).into()) }
            }
        };
        let hostname = match access {
            Access::Tokens(host) => Some(host.as_str().into()),
            Access::Plain { .. } => None,
        };
        let options =
            Options { container_id: "load".into(), hostname, sasl: Some(sasl), ..Options::default() };
        let engine = Connection::client(options, std::time::Instant::now());
        let mut client = Self { driver: Driver::new(stream, engine), links: Vec::new() };
        while !matches!(client.next().await?, Event::Opened(_)) {}
        if let Access::Tokens(host) = access {
            client.put_tokens(host, nodes).await?;
        }
        client.attach(nodes, role).await?;
        Ok(client)
    }

    /// The next event; the end of anything that was asked for is an error.
    async fn next(&mut self) -> Result<Event, ClientError> {
        loop {
            match self.driver.connection().poll_event() {
                Some(event) => return lasting(event),
                None => self.driver.turn().await,
            }
        }
    }

    async fn put_tokens(&mut self, host: &str, nodes: &[Node]) -> Result<(), ClientError> {
        let engine = self.driver.connection();
        let session = engine.begin().ok_or(ClientError::Closed)?;
        let node = format!("amqps://{host}/$cbs");
        let link = |name: &str, role, source: &str, target: &str| AttachOptions {
            name: name.into(),
            role,
            source: Terminus::source(source),
            target: Terminus::target(target),
            snd_settle: None,
            rcv_settle: None,
            max_message_bytes: 0,
            credit: TOKEN_CREDIT,
            properties: Vec::new(),
        };
        let answers = engine.attach(session, link("answers", Role::Receiver, &node, "load"));
        let requests = engine.attach(session, link("requests", Role::Sender, "load", &node));
        let (Some(answers), Some(requests)) = (answers, requests) else { return Err(ClientError::Closed) };
        let tokens: Vec<_> = nodes.iter().filter_map(|node| node.token.as_ref()).collect();
        let (mut attached, mut asked, mut answered) = (false, 0, 0);
        loop {
            let engine = self.driver.connection();
            // An answer whose link is not there yet would be lost.
            while attached
                && engine.credit(requests) > 0
                && let Some((audience, token)) = tokens.get(asked)
            {
                let id = MessageId::String(asked.to_string().into());
                let request = PutToken::encode(id, audience, token, TOKEN_END_MILLIS);
                let options = SendOptions { settled: true, ..SendOptions::default() };
                engine.send(requests, request, options).map_err(refused)?;
                asked += 1;
            }
            if attached && answered == tokens.len() {
                return Ok(());
            }
            match self.next().await? {
                Event::Attached { link, .. } if link == answers => attached = true,
                Event::Delivery(delivery) if delivery.link == answers => {
                    self.driver.connection().settle(delivery.id, Outcome::Accepted);
                    let answer =
                        Message::parse(&delivery.payload).and_then(|answer| CbsResponse::decode(&answer));
                    let answer = answer.map_err(|error| ClientError::Ended(error.to_string()))?;
                    if !answer.is_ok() {
                        let text = answer.description.as_str();
                        return Err(ClientError::Ended(format!("a token is refused: {text}")));
                    }
                    answered += 1;
                }
                _ => {}
            }
        }
    }

    async fn attach(&mut self, nodes: &[Node], role: Role) -> Result<(), ClientError> {
        for (number, node) in nodes.iter().enumerate() {
            let engine = self.driver.connection();
            let session = engine.begin().ok_or(ClientError::Closed)?;
            let (source, target) = match role {
                Role::Sender => ("load", node.address.as_str()),
                Role::Receiver => (node.address.as_str(), "load"),
            };
            let options = AttachOptions {
                name: format!("link-{number}").into(),
                role,
                source: Terminus::source(source),
                target: Terminus::target(target),
                snd_settle: Some(SenderSettle::Mixed),
                rcv_settle: Some(ReceiverSettle::First),
                max_message_bytes: 0,
                credit: RECEIVER_CREDIT,
                properties: Vec::new(),
            };
            self.links.push(engine.attach(session, options).ok_or(ClientError::Closed)?);
        }
        let mut missing = nodes.len();
        while missing > 0 {
            match self.next().await? {
                Event::Attached { link, .. } if self.links.contains(&link) => missing -= 1,
                _ => {}
            }
        }
        Ok(())
    }

    /// Sends on each link what its plan says until all is settled (QoS 0: written), or `stop` turns true. The
    /// connection stays open until `stop` turns true.
    pub async fn publish(
        mut self,
        plans: Vec<Publishing>,
        clock: Arc<Clock>,
        stop: watch::Receiver<bool>,
    ) -> Published {
        let mut done = Published::default();
        let mut stopped = stop.clone();
        let ended = tokio::select! {
            ended = self.publish_all(plans, &clock, &mut done) => Some(ended),
            () = turned_true(&mut stopped) => None,
        };
        match ended {
            Some(Ok(())) => turned_true(&mut stopped).await,
            Some(Err(error)) => done.failure = Some(error.to_string()),
            None => {}
        }
        done
    }

    async fn publish_all(
        &mut self,
        plans: Vec<Publishing>,
        clock: &Clock,
        done: &mut Published,
    ) -> Result<(), ClientError> {
        let mut senders: Vec<Sender> =
            plans.into_iter().zip(&self.links).map(|(plan, link)| Sender::new(plan, *link)).collect();
        let by_link: HashMap<LinkId, usize> = self.links.iter().copied().zip(0..).collect();
        let mut unfinished = senders.len();
        let begin = Instant::now();
        while unfinished > 0 || !self.driver.connection().output().is_empty() {
            let now = clock.now_ns();
            let engine = self.driver.connection();
            while let Some(event) = engine.poll_event() {
                if let Event::Settled { link, delivery, outcome } = lasting(event)? {
                    let Some(sender) = by_link.get(&link).and_then(|at| senders.get_mut(*at)) else {
                        continue;
                    };
                    sender.settled(delivery, &outcome, now, clock, done)?;
                    unfinished -= usize::from(sender.is_finished());
                }
            }
            let (mut due_at, mut waits_for_its_time) = (begin + Duration::from_secs(3_600), false);
            for sender in &mut senders {
                let was_finished = sender.is_finished();
                let next = sender.send(engine, now, begin, done)?;
                due_at = due_at.min(next.unwrap_or(due_at));
                waits_for_its_time |= next.is_some();
                if sender.plan.window.is_none() {
                    unfinished -= usize::from(!was_finished && sender.is_finished());
                    clock.progress.fetch_add(1, Ordering::Relaxed);
                }
            }
            if unfinished == 0 && engine.output().is_empty() {
                break;
            }
            tokio::select! {
                () = self.driver.turn() => {}
                () = sleep_until(due_at), if waits_for_its_time => {}
            }
        }
        Ok(())
    }

    /// Receives `wanted` messages and accepts them, or until `stop` turns true.
    pub async fn receive(
        mut self,
        mut arrivals: Arrivals,
        wanted: u64,
        clock: Arc<Clock>,
        mut stop: watch::Receiver<bool>,
    ) -> Received {
        let mut latency = Histogram::default();
        let failure = {
            let work = self.receive_all(&mut arrivals, &mut latency, wanted, &clock);
            tokio::select! {
                ended = work => ended.err().map(|error| error.to_string()),
                () = turned_true(&mut stop) => None,
            }
        };
        Received { arrivals, latency, failure }
    }

    async fn receive_all(
        &mut self,
        arrivals: &mut Arrivals,
        latency: &mut Histogram,
        wanted: u64,
        clock: &Clock,
    ) -> Result<(), ClientError> {
        while arrivals.unique < wanted || !self.driver.connection().output().is_empty() {
            let now = clock.now_ns();
            let before = arrivals.unique;
            let engine = self.driver.connection();
            while let Some(event) = engine.poll_event() {
                if let Event::Delivery(delivery) = lasting(event)? {
                    let message = Message::parse(&delivery.payload);
                    let body = message.ok().and_then(|message| message.body.data());
                    let stamp = body.and_then(read_stamp);
                    let (publisher, number, sent_ns) =
                        stamp.ok_or_else(|| ClientError::Unexpected("a body of another form".to_owned()))?;
                    arrivals.record(publisher, number);
                    latency.record(now.saturating_sub(sent_ns));
                    engine.settle(delivery.id, Outcome::Accepted);
                }
            }
            clock.progress.fetch_add(arrivals.unique - before, Ordering::Relaxed);
            if arrivals.unique < wanted || !engine.output().is_empty() {
                self.driver.turn().await;
            }
        }
        Ok(())
    }
}

/// One link on its way through its plan.
struct Sender {
    plan: Publishing,
    link: LinkId,
    head: Bytes,
    block: BytesMut,
    sent: u64,
    acknowledged: u64,
    in_flight: VecDeque<(DeliveryId, u64)>,
}

impl Sender {
    fn new(plan: Publishing, link: LinkId) -> Self {
        let mut encoder = MessageEncoder::with_capacity(64);
        encoder.application_strings(plan.output.map(|output| ("iothub-outputname", output)));
        // The sections in front of a body are the same for all that have its length.
        let mut pieces = encoder.data(Bytes::from(vec![0; plan.payload_bytes]));
        let head = pieces.swap_remove(0);
        Self {
            plan,
            link,
            head,
            block: BytesMut::new(),
            sent: 0,
            acknowledged: 0,
            in_flight: VecDeque::new(),
        }
    }

    fn is_finished(&self) -> bool {
        match self.plan.window {
            Some(_) => self.acknowledged == self.plan.messages,
            None => self.sent == self.plan.messages,
        }
    }

    /// Sends as far as window, credit and rate go; when the next message is due, if only its time is waited for.
    fn send(
        &mut self,
        engine: &mut Connection,
        now: u64,
        begin: Instant,
        done: &mut Published,
    ) -> Result<Option<Instant>, ClientError> {
        let plan = &self.plan;
        let mut due_at = None;
        let due = plan.rate.map_or(plan.messages, |rate| {
            let due = (begin.elapsed().as_secs_f64() * rate) as u64 + 1;
            due_at = Some(begin + Duration::from_secs_f64(due as f64 / rate));
            due.min(plan.messages)
        });
        let options = SendOptions { settled: plan.window.is_none(), ..SendOptions::default() };
        while self.sent < due && plan.window.is_none_or(|window| self.in_flight.len() < usize::from(window)) {
            // Nothing is made for a link that would not take it.
            if engine.credit(self.link) == 0 {
                break;
            }
            if self.block.capacity() < plan.payload_bytes {
                self.block = BytesMut::with_capacity(BODY_BLOCK_BYTES.max(plan.payload_bytes));
            }
            put_stamp(&mut self.block, plan.publisher, self.sent, now, plan.payload_bytes);
            let payload = Payload::from_iter([self.head.clone(), self.block.split().freeze()]);
            match engine.send(self.link, payload, options) {
                Ok(delivery) => {
                    self.in_flight.extend(plan.window.map(|_| (delivery, now)));
                    self.sent += 1;
                    done.sent += 1;
                }
                Err(
                    SendError::NoCredit
                    | SendError::NoWindow
                    | SendError::Backlog
                    | SendError::TooManyUnsettled,
                ) => break,
                Err(error @ (SendError::NotAttached | SendError::TooLarge { .. })) => {
                    return Err(refused(error));
                }
            }
        }
        Ok(due_at.filter(|_| self.sent == due && due < plan.messages))
    }

    fn settled(
        &mut self,
        delivery: DeliveryId,
        outcome: &Outcome,
        now: u64,
        clock: &Clock,
        done: &mut Published,
    ) -> Result<(), ClientError> {
        if *outcome != Outcome::Accepted {
            return Err(ClientError::Ended(format!("a message is settled as {outcome:?}")));
        }
        let Some(place) = self.in_flight.iter().position(|(waiting, _)| *waiting == delivery) else {
            return Err(ClientError::Unexpected("a disposition of nothing that was sent".to_owned()));
        };
        if place > 0 {
            done.order_breaks += 1;
        }
        if let Some((_, sent_ns)) = self.in_flight.remove(place) {
            done.latency.record(now.saturating_sub(sent_ns));
        }
        self.acknowledged += 1;
        done.acknowledged += 1;
        clock.progress.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// An event that ends nothing.
fn lasting(event: Event) -> Result<Event, ClientError> {
    let (what, error) = match event {
        Event::Closed { error, .. } => ("the connection", error),
        Event::SessionEnded { error, .. } => ("a session", error),
        Event::Detached { error, .. } => ("a link", error),
        Event::AttachRefused { error, .. } => ("a link was refused and", error),
        other => return Ok(other),
    };
    let why = error.map_or_else(|| "without a reason".to_owned(), |error| error.to_string());
    Err(ClientError::Ended(format!("{what} ended: {why}")))
}

fn refused(error: SendError) -> ClientError {
    ClientError::Ended(error.to_string())
}
