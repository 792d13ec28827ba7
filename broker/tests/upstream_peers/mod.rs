//! What stands in for the upstream: the hub's own AMQP head over TLS, and a peer that misbehaves on request.

#![allow(dead_code)] // each test program uses a part of it

pub(crate) mod broker;
pub(crate) mod cloud;
pub(crate) mod faults;
pub(crate) mod foreign;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use edgehub_broker::amqp::{
    AttachAnswer, CbsResponse, Condition, Connection, Driver, Error, Event, LinkAddress, LinkId, LinkKind,
    Message, Options, Outcome, PutToken, Role, SendOptions, parse_batch,
};
use edgehub_broker::head::amqp::{AmqpLimits, serve};
use edgehub_broker::head::mqtt::{self, MqttLimits, Peer};
use parking_lot::Mutex;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::PrivateKeyDer;
use socket2::{Domain, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::recording::Recording;

/// Configurations of a server for `localhost` and of a client that trusts its authority.
pub(crate) fn tls() -> (Arc<rustls::ServerConfig>, Arc<rustls::ClientConfig>) {
    tls_for(&["localhost"])
}

/// The same for these names.
pub(crate) fn tls_for(names: &[&str]) -> (Arc<rustls::ServerConfig>, Arc<rustls::ClientConfig>) {
    let mut authority = CertificateParams::new(Vec::<String>::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let root = authority.self_signed(&key).unwrap();
    let issuer = Issuer::new(authority, key);
    let key = KeyPair::generate().unwrap();
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &issuer).unwrap();
    let server = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        )
        .unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(root.der().clone()).unwrap();
    let client = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    (Arc::new(server), Arc::new(client))
}

/// A port that is given to nobody else as long as this process lives, also while no server listens there: a socket that
/// is bound and does not listen keeps it. Whoever asks for it by its number may bind it as well, and connections to it
/// are refused until somebody does.
fn reserved_port() -> u16 {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
    let port = socket.local_addr().unwrap().as_socket().unwrap().port();
    std::mem::forget(socket);
    port
}

/// A server on a port of its own; dropping it closes the port and cuts all connections.
pub(crate) struct Server {
    pub(crate) port: u16,
    accepting: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Server {
    /// Serves each connection with `serve`; a port of 0 is any.
    pub(crate) async fn start<F>(
        port: u16,
        tls: Arc<rustls::ServerConfig>,
        serve: impl Fn(TlsStream<TcpStream>) -> F + Send + 'static,
    ) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let port = if port == 0 { reserved_port() } else { port };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.unwrap();
        let acceptor = TlsAcceptor::from(tls);
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                if let Ok(stream) = acceptor.accept(stream).await {
                    connections.spawn(serve(stream));
                }
            }
        });
        Self { port, accepting }
    }

    /// The hub's own AMQP head.
    pub(crate) async fn head(port: u16, tls: Arc<rustls::ServerConfig>, recording: Recording) -> Self {
        Self::start(port, tls, move |stream| {
            let recording = recording.clone();
            let peer =
                Peer { address: None, certificates: Vec::new(), accepted_at: tokio::time::Instant::now() };
            serve(stream, recording, AmqpLimits::default(), peer, std::future::pending())
        })
        .await
    }

    /// The hub's own MQTT head.
    pub(crate) async fn mqtt_head(port: u16, tls: Arc<rustls::ServerConfig>, recording: Recording) -> Self {
        Self::start(port, tls, move |stream| {
            let recording = recording.clone();
            let peer =
                Peer { address: None, certificates: Vec::new(), accepted_at: tokio::time::Instant::now() };
            async move {
                let stop = std::future::pending();
                let _ = mqtt::serve(stream, recording, MqttLimits::default(), peer, stop).await;
            }
        })
        .await
    }

    /// Closes the port and cuts all connections; returns when that has happened.
    pub(crate) async fn stop(mut self) -> u16 {
        self.accepting.abort();
        let _ = (&mut self.accepting).await;
        self.port
    }
}

/// How a peer behaves. May change while it runs.
#[derive(Clone)]
pub(crate) struct Manners {
    /// Status of the answers to tokens; no answer without one.
    pub(crate) token_status: Option<i32>,
    /// Credit of the link on which tokens come.
    pub(crate) token_credit: u32,
    /// Credit of the links of a device or module whose name begins with `slow`.
    pub(crate) slow_credit: u32,
    /// The answer to a transfer with these numbers in its messages.
    pub(crate) outcome: fn(&[u32]) -> Outcome,
    /// Transfers that arrive together are answered two at a time, the second first.
    pub(crate) swapped: bool,
    /// Attach requests of links of a device or module whose name begins with `slow` are answered.
    pub(crate) slow_attaches: bool,
    /// What becomes of a link on which a transfer comes.
    pub(crate) transfers: Transfers,
}

/// What a transfer does to its link.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transfers {
    /// It is answered.
    Answered,
    /// It is never answered.
    Ignored,
    /// The link is detached with this condition.
    Detach(&'static str),
    /// The session is ended with this condition.
    End(&'static str),
    /// The connection is closed with this condition.
    Close(&'static str),
}

impl Default for Manners {
    fn default() -> Self {
        Self {
            token_status: Some(200),
            token_credit: 100,
            slow_credit: 100,
            outcome: |_| Outcome::Accepted,
            swapped: false,
            slow_attaches: true,
            transfers: Transfers::Answered,
        }
    }
}

/// A peer that speaks AMQP as its manners say.
#[derive(Clone, Default)]
pub(crate) struct Scripted {
    pub(crate) manners: Arc<Mutex<Manners>>,
    /// Numbers of accepted messages, in order, with the name of the sender's address.
    pub(crate) accepted: Arc<Mutex<Vec<(String, u32)>>>,
    pub(crate) tokens_seen: Arc<Mutex<usize>>,
    /// Addresses of the links that were asked for.
    pub(crate) links: Arc<Mutex<Vec<String>>>,
}

impl Scripted {
    pub(crate) async fn serve(self, stream: TlsStream<TcpStream>) {
        let mut driver = Driver::new(stream, Connection::listener(Options::default(), Instant::now()));
        let mut answers: Option<LinkId> = None;
        let mut senders: Vec<(LinkId, String)> = Vec::new();
        let mut held = None;
        while !driver.is_finished() {
            while let Some(event) = driver.connection().poll_event() {
                let manners = self.manners.lock().clone();
                let engine = driver.connection();
                match event {
                    Event::AttachRequested(request) => {
                        let address = request.address().unwrap_or_default().to_string();
                        let parsed = LinkAddress::parse(&address, request.attach.role).unwrap();
                        let tokens = parsed.kind() == LinkKind::Cbs;
                        if !tokens && parsed.kind() != LinkKind::Telemetry {
                            let error = Error::from(Condition::NOT_IMPLEMENTED);
                            assert!(engine.refuse_attach(request.link, error));
                            continue;
                        }
                        let slow = address.contains("/slow");
                        self.links.lock().push(address.clone());
                        let credit = match (tokens, slow) {
                            (true, _) => manners.token_credit,
                            (false, true) => manners.slow_credit,
                            (false, false) => 100,
                        };
                        if slow && !manners.slow_attaches {
                            continue;
                        }
                        let answer = AttachAnswer {
                            snd_settle: None,
                            rcv_settle: None,
                            max_message_bytes: 1 << 20,
                            credit,
                            properties: Vec::new(),
                        };
                        assert!(engine.accept_attach(request.link, answer));
                        match request.attach.role {
                            Role::Receiver => answers = Some(request.link),
                            Role::Sender if !tokens => senders.push((request.link, address)),
                            Role::Sender => {}
                        }
                    }
                    Event::Delivery(delivery) => {
                        let sender = senders.iter().find(|(link, _)| *link == delivery.link);
                        let Some((_, sender)) = sender else {
                            engine.settle(delivery.id, Outcome::Accepted);
                            *self.tokens_seen.lock() += 1;
                            let (correlation_id, request) =
                                PutToken::decode(&Message::parse(&delivery.payload).unwrap());
                            request.unwrap();
                            if let (Some(link), Some(status_code)) = (answers, manners.token_status) {
                                let answer = CbsResponse {
                                    correlation_id,
                                    status_code,
                                    description: "as told".into(),
                                };
                                engine.send(link, answer.encode(), SendOptions::default()).unwrap();
                            }
                            continue;
                        };
                        let error = |condition| Some(Error::from(Condition::of(condition)));
                        match manners.transfers {
                            Transfers::Answered => {}
                            Transfers::Ignored => continue,
                            Transfers::Detach(condition) => {
                                engine.detach(delivery.link, error(condition));
                                continue;
                            }
                            Transfers::End(condition) => {
                                engine.end(delivery.link.session(), error(condition));
                                continue;
                            }
                            Transfers::Close(condition) => {
                                engine.close(error(condition), Instant::now());
                                continue;
                            }
                        }
                        let batch = parse_batch(delivery.format, &delivery.payload).unwrap();
                        let numbers: Vec<u32> = batch
                            .iter()
                            .map(|one| String::from_utf8(one.body.data().unwrap().to_vec()).unwrap())
                            .map(|text| text.parse().unwrap())
                            .collect();
                        let outcome = (manners.outcome)(&numbers);
                        if outcome == Outcome::Accepted {
                            let accepted = numbers.into_iter().map(|number| (sender.clone(), number));
                            self.accepted.lock().extend(accepted);
                        }
                        match (manners.swapped, held.take()) {
                            (true, None) => held = Some((delivery.id, outcome)),
                            (_, before) => {
                                engine.settle(delivery.id, outcome);
                                if let Some((id, outcome)) = before {
                                    engine.settle(id, outcome);
                                }
                            }
                        }
                    }
                    Event::Closed { .. } => return,
                    _ => {}
                }
            }
            if let Some((id, outcome)) = held.take() {
                driver.connection().settle(id, outcome);
            }
            driver.turn().await;
        }
    }

    /// How often a module's links were asked for.
    pub(crate) fn links_seen(&self, module: &str) -> usize {
        let path = format!("/modules/{module}/");
        self.links.lock().iter().filter(|address| address.contains(&path)).count()
    }

    /// The numbers of a sender that were accepted.
    pub(crate) fn numbers(&self, sender: &str) -> Vec<u32> {
        let accepted = self.accepted.lock();
        let own = accepted.iter().filter(|(from, _)| from.contains(&format!("/modules/{sender}/")));
        own.map(|(_, number)| *number).collect()
    }
}

/// The answer by which a receiver asks for a pause.
pub(crate) fn busy(_: &[u32]) -> Outcome {
    Outcome::Rejected(Some(Error::new(Condition::of("com.microsoft:server-busy"), "later")))
}

/// A port that takes connections and never says a word.
pub(crate) async fn silent() -> (u16, JoinHandle<()>) {
    let port = reserved_port();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.unwrap();
    let task = tokio::spawn(async move {
        let mut streams = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            streams.push(stream);
        }
    });
    (port, task)
}

/// Long enough for a loaded machine, short enough for tests of what never comes.
pub(crate) const SHORT: Duration = Duration::from_secs(2);
