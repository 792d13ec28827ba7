//! Owns the MQTT 3.1.1 connection of a simulated module: what a well-behaved SDK does, and no more.
//!
//! One session (clean session 0) for the whole life of the client, quality of service 1, a window of
//! unacknowledged messages. When the connection is lost it comes back by itself, and what was not acknowledged is
//! sent again, in order, before anything new (MQTT 3.1.1 §4.4).

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::BytesMut;
use mqttbytes::QoS;
use mqttbytes::v4::{
    self, Connect, ConnectReturnCode, Packet, PubAck, Publish, Subscribe, SubscribeReasonCode,
};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::connection_string::ConnectionString;

/// Messages without an acknowledgement, at most.
const WINDOW_MAX: usize = 64;
/// Messages received and not yet taken by the module, at most.
const RECEIVED_MAX: usize = 1024;
/// Largest packet that is read.
const PACKET_BYTES_MAX: usize = 512 * 1024;
const KEEP_ALIVE_SECS: u16 = 30;
const PING_INTERVAL: Duration = Duration::from_secs(5);
const SILENCE_MAX: Duration = Duration::from_secs(15);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(1);
const TOKEN_LIFE_SECS: u64 = 3_600;

/// Where and as whom to connect.
#[derive(Clone)]
pub(super) struct Options {
    /// Address of the hub.
    pub(super) address: SocketAddr,
    /// The name that its certificate must have.
    pub(super) server_name: ServerName<'static>,
    /// TLS that trusts it.
    pub(super) tls: Arc<rustls::ClientConfig>,
    /// The identity and its key.
    pub(super) identity: ConnectionString,
    /// Topic filters to subscribe to.
    pub(super) filters: Vec<String>,
}

/// The state of the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Link {
    /// Not connected; why.
    Down(String),
    /// Connected for the n-th time, counted from 1.
    Up(u64),
}

/// Called once when the hub has acknowledged the message.
pub(super) type OnAcknowledged = Box<dyn FnOnce() + Send>;

/// Takes messages to publish.
#[derive(Clone)]
pub(super) struct Publisher {
    publications: mpsc::Sender<(Publish, OnAcknowledged)>,
}

impl Publisher {
    /// Puts a message in line; waits while the window is full. `false`: the client has ended.
    pub(super) async fn publish(&self, topic: String, body: Vec<u8>, done: OnAcknowledged) -> bool {
        self.publications.send((Publish::new(topic, QoS::AtLeastOnce, body), done)).await.is_ok()
    }
}

/// A received message.
pub(super) struct Delivery {
    /// Its topic with the properties.
    pub(super) topic: String,
    /// Its body.
    pub(super) body: bytes::Bytes,
    /// To be given back when the module is done with it.
    pub(super) receipt: Receipt,
}

/// Names a received message on the connection that it came by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Receipt {
    connection: u64,
    packet_id: u16,
}

/// Gives received messages and takes their acknowledgements.
pub(super) struct Inbox {
    deliveries: mpsc::Receiver<Delivery>,
    receipts: mpsc::Sender<Receipt>,
}

impl Inbox {
    /// The next message; `None` when the client has ended. May be cancelled.
    pub(super) async fn receive(&mut self) -> Option<Delivery> {
        self.deliveries.recv().await
    }

    /// Acknowledges a message; without effect when its connection is gone, for then it comes again.
    pub(super) async fn acknowledge(&self, receipt: Receipt) -> bool {
        self.receipts.send(receipt).await.is_ok()
    }
}

/// A running client; ends when dropped.
pub(super) struct Client {
    task: JoinHandle<()>,
    link: watch::Receiver<Link>,
}

impl Client {
    /// Starts a client; it connects by itself.
    pub(super) fn start(options: Options) -> (Self, Publisher, Inbox) {
        let (publications, to_publish) = mpsc::channel(1);
        let (deliver, deliveries) = mpsc::channel(RECEIVED_MAX);
        let (receipts, to_acknowledge) = mpsc::channel(RECEIVED_MAX);
        let (link_sender, link) = watch::channel(Link::Down("not connected yet".into()));
        let session = Session {
            options,
            to_publish,
            to_acknowledge,
            deliver,
            unacknowledged: VecDeque::new(),
            last_packet_id: 0,
            connection: 0,
            link: link_sender,
        };
        let task = tokio::spawn(session.run());
        (Self { task, link }, Publisher { publications }, Inbox { deliveries, receipts })
    }

    /// The state of the connection.
    pub(super) fn link(&self) -> Link {
        self.link.borrow().clone()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Session {
    options: Options,
    to_publish: mpsc::Receiver<(Publish, OnAcknowledged)>,
    to_acknowledge: mpsc::Receiver<Receipt>,
    deliver: mpsc::Sender<Delivery>,
    unacknowledged: VecDeque<(Publish, OnAcknowledged)>,
    last_packet_id: u16,
    connection: u64,
    link: watch::Sender<Link>,
}

type Stream = TlsStream<TcpStream>;

impl Session {
    async fn run(mut self) {
        let mut pause = PAUSE_MIN;
        loop {
            let connected = timeout(CONNECT_TIMEOUT, Self::connect(&self.options)).await;
            let fault = match connected.unwrap_or_else(|_| Err("no answer in time".into())) {
                Ok((stream, inbound, session_present)) => {
                    pause = PAUSE_MIN;
                    self.connection += 1;
                    self.link.send_replace(Link::Up(self.connection));
                    self.converse(stream, inbound, session_present).await
                }
                Err(fault) => fault,
            };
            self.link.send_replace(Link::Down(fault));
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    async fn connect(options: &Options) -> Result<(Stream, BytesMut, bool), String> {
        let text = |error: std::io::Error| error.to_string();
        let tcp = TcpStream::connect(options.address).await.map_err(text)?;
        tcp.set_nodelay(true).map_err(text)?;
        let connector = TlsConnector::from(options.tls.clone());
        let mut stream = connector.connect(options.server_name.clone(), tcp).await.map_err(text)?;
        let identity = &options.identity;
        let now_secs =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let mut connect = Connect::new(identity.client_id());
        connect.clean_session = false;
        connect.keep_alive = KEEP_ALIVE_SECS;
        connect.set_login(identity.user_name(), identity.token(now_secs + TOKEN_LIFE_SECS));
        let mut out = BytesMut::new();
        connect.write(&mut out).map_err(|error| format!("CONNECT cannot be written: {error:?}"))?;
        stream.write_all(&out).await.map_err(text)?;
        stream.flush().await.map_err(text)?;
        let mut inbound = BytesMut::new();
        loop {
            match next_packet(&mut inbound)? {
                Some(Packet::ConnAck(answer)) if answer.code == ConnectReturnCode::Success => {
                    return Ok((stream, inbound, answer.session_present));
                }
                Some(Packet::ConnAck(answer)) => return Err(format!("the hub refused: {:?}", answer.code)),
                Some(_) => return Err("the hub's first packet is not CONNACK".into()),
                None => read_more(&mut stream, &mut inbound).await?,
            }
        }
    }

    /// Sends and receives until the connection is lost; returns why.
    async fn converse(&mut self, mut stream: Stream, mut inbound: BytesMut, session_present: bool) -> String {
        match self.converse_until_lost(&mut stream, &mut inbound, session_present).await {
            Ok(never) => match never {},
            Err(fault) => fault,
        }
    }

    async fn converse_until_lost(
        &mut self,
        stream: &mut Stream,
        inbound: &mut BytesMut,
        session_present: bool,
    ) -> Result<std::convert::Infallible, String> {
        let mut out = BytesMut::new();
        if !session_present {
            for filter in self.options.filters.clone() {
                let mut subscribe = Subscribe::new(filter, QoS::AtLeastOnce);
                subscribe.pkid = self.next_packet_id();
                subscribe.write(&mut out).map_err(unwritable)?;
            }
        }
        for (publish, _) in &self.unacknowledged {
            publish.write(&mut out).map_err(unwritable)?;
        }
        let mut heard = Instant::now();
        let mut ping = tokio::time::interval(PING_INTERVAL);
        loop {
            while let Some(packet) = next_packet(inbound)? {
                self.take(packet, &mut out)?;
            }
            if !out.is_empty() {
                let write = async {
                    stream.write_all(&out).await?;
                    stream.flush().await
                };
                match timeout(WRITE_TIMEOUT, write).await {
                    Ok(written) => written.map_err(|error| error.to_string())?,
                    Err(_) => return Err("the hub does not read".into()),
                }
                out.clear();
            }
            tokio::select! {
                read = read_more(stream, inbound) => { read?; heard = Instant::now(); }
                Some(publication) = self.to_publish.recv(), if self.unacknowledged.len() < WINDOW_MAX => {
                    self.send(publication, &mut out)?;
                }
                Some(receipt) = self.to_acknowledge.recv() => {
                    if receipt.connection == self.connection {
                        PubAck::new(receipt.packet_id).write(&mut out).map_err(unwritable)?;
                    }
                }
                _ = ping.tick() => {
                    if heard.elapsed() > SILENCE_MAX {
                        return Err(format!("nothing heard for {} s", SILENCE_MAX.as_secs()));
                    }
                    out.extend_from_slice(&[0xC0, 0]); // PINGREQ, MQTT 3.1.1 §3.12
                }
            }
        }
    }

    fn send(&mut self, publication: (Publish, OnAcknowledged), out: &mut BytesMut) -> Result<(), String> {
        let (mut publish, done) = publication;
        publish.pkid = self.next_packet_id();
        publish.write(out).map_err(unwritable)?;
        publish.dup = true; // should it have to be sent once more
        self.unacknowledged.push_back((publish, done));
        Ok(())
    }

    fn take(&mut self, packet: Packet, out: &mut BytesMut) -> Result<(), String> {
        match packet {
            Packet::PubAck(answer) => {
                let of_id = |(publish, _): &(Publish, OnAcknowledged)| publish.pkid == answer.pkid;
                if let Some((_, done)) =
                    self.unacknowledged.iter().position(of_id).and_then(|at| self.unacknowledged.remove(at))
                {
                    done();
                }
                Ok(())
            }
            Packet::Publish(publish) => {
                let receipt = Receipt { connection: self.connection, packet_id: publish.pkid };
                if publish.qos == QoS::AtMostOnce {
                    return Err("the hub delivers with quality of service 0".into());
                }
                let delivery = Delivery { topic: publish.topic, body: publish.payload, receipt };
                self.deliver
                    .try_send(delivery)
                    .map_err(|_| format!("more than {RECEIVED_MAX} messages wait for the module"))
            }
            Packet::SubAck(answer) => {
                match answer.return_codes.iter().all(|code| matches!(code, SubscribeReasonCode::Success(_))) {
                    true => Ok(()),
                    false => Err("the hub refused a subscription".into()),
                }
            }
            Packet::PingResp => Ok(()),
            Packet::PingReq => {
                out.extend_from_slice(&[0xD0, 0]);
                Ok(())
            }
            other => Err(format!("unexpected packet: {other:?}")),
        }
    }

    /// A packet id that no unacknowledged message has (MQTT 3.1.1 §2.3.1).
    fn next_packet_id(&mut self) -> u16 {
        loop {
            self.last_packet_id = self.last_packet_id.checked_add(1).unwrap_or(1);
            if !self.unacknowledged.iter().any(|(publish, _)| publish.pkid == self.last_packet_id) {
                return self.last_packet_id;
            }
        }
    }
}

fn unwritable(error: mqttbytes::Error) -> String {
    format!("a packet cannot be written: {error:?}")
}

fn next_packet(inbound: &mut BytesMut) -> Result<Option<Packet>, String> {
    match v4::read(inbound, PACKET_BYTES_MAX) {
        Ok(packet) => Ok(Some(packet)),
        Err(mqttbytes::Error::InsufficientBytes(_)) => Ok(None),
        Err(error) => Err(format!("a packet cannot be read: {error:?}")),
    }
}

/// May be cancelled: what was read is in the buffer.
async fn read_more(stream: &mut Stream, inbound: &mut BytesMut) -> Result<(), String> {
    match stream.read_buf(inbound).await {
        Ok(0) => Err("the hub closed the connection".into()),
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use mqttbytes::v4::{ConnAck, SubAck};
    use rustls::pki_types::pem::PemObject as _;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    use tokio::net::TcpListener;
    use tokio_rustls::{TlsAcceptor, server};

    use super::*;
    use crate::certificate::authority::Authority;

    type Peer = (server::TlsStream<TcpStream>, BytesMut);

    struct Hub {
        listener: TcpListener,
        acceptor: TlsAcceptor,
    }

    impl Hub {
        async fn start() -> (Self, Options) {
            let authority = Authority::new("test").unwrap();
            let issued = authority.issue_server(&["localhost".to_owned()]).unwrap();
            let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let chain = CertificateDer::pem_slice_iter(issued.chain_pem.as_bytes());
            let config = rustls::ServerConfig::builder_with_provider(provider.clone())
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_no_client_auth()
                .with_single_cert(
                    chain.collect::<Result<_, _>>().unwrap(),
                    PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes()).unwrap(),
                )
                .unwrap();
            let mut roots = rustls::RootCertStore::empty();
            roots.add(CertificateDer::from_pem_slice(authority.root_pem().as_bytes()).unwrap()).unwrap();
            let tls = rustls::ClientConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_root_certificates(roots)
                .with_no_client_auth();
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            let text = "HostName=h;DeviceId=d;ModuleId=m;SharedAccessKey=c2VjcmV0";
            let options = Options {
                address: listener.local_addr().unwrap(),
                server_name: ServerName::try_from("localhost").unwrap(),
                tls: Arc::new(tls),
                identity: ConnectionString::parse(text).unwrap(),
                filters: vec!["devices/d/modules/m/inputs/#".into()],
            };
            (Self { listener, acceptor: TlsAcceptor::from(Arc::new(config)) }, options)
        }

        async fn accept(&self, session_present: bool) -> Peer {
            let (tcp, _) = self.listener.accept().await.unwrap();
            let mut peer = (self.acceptor.accept(tcp).await.unwrap(), BytesMut::new());
            let Packet::Connect(connect) = receive(&mut peer).await else { panic!("no CONNECT") };
            assert_eq!((connect.client_id.as_str(), connect.clean_session), ("d/m", false));
            let mut out = BytesMut::new();
            ConnAck::new(ConnectReturnCode::Success, session_present).write(&mut out).unwrap();
            send(&mut peer, &out).await;
            peer
        }
    }

    async fn receive(peer: &mut Peer) -> Packet {
        loop {
            match next_packet(&mut peer.1).unwrap() {
                Some(Packet::PingReq) => {}
                Some(packet) => return packet,
                None => assert!(peer.0.read_buf(&mut peer.1).await.unwrap() > 0, "closed"),
            }
        }
    }

    async fn send(peer: &mut Peer, bytes: &[u8]) {
        peer.0.write_all(bytes).await.unwrap();
        peer.0.flush().await.unwrap();
    }

    async fn published(peer: &mut Peer) -> Publish {
        match receive(peer).await {
            Packet::Publish(publish) => publish,
            other => panic!("no PUBLISH: {other:?}"),
        }
    }

    #[tokio::test]
    async fn what_was_not_acknowledged_comes_again_in_order_on_the_next_connection() {
        let (hub, options) = Hub::start().await;
        let (_client, publisher, mut inbox) = Client::start(options);
        let (done, mut acknowledged) = mpsc::unbounded_channel();
        let publish = async |number: u32| {
            let done = done.clone();
            let note: OnAcknowledged = Box::new(move || done.send(number).unwrap());
            assert!(publisher.publish(format!("t/{number}"), vec![], note).await);
        };

        let mut peer = hub.accept(false).await;
        let Packet::Subscribe(subscribe) = receive(&mut peer).await else { panic!("no SUBSCRIBE") };
        let mut out = BytesMut::new();
        let granted = SubscribeReasonCode::Success(QoS::AtLeastOnce);
        SubAck::new(subscribe.pkid, vec![granted]).write(&mut out).unwrap();
        let mut input = Publish::new("devices/d/modules/m/inputs/i/", QoS::AtLeastOnce, "x");
        input.pkid = 9;
        input.write(&mut out).unwrap();
        send(&mut peer, &out).await;
        let stale = inbox.receive().await.unwrap().receipt;
        for number in 0..3 {
            publish(number).await;
        }
        let first = published(&mut peer).await;
        assert_eq!(
            (published(&mut peer).await.topic, published(&mut peer).await.topic),
            ("t/1".into(), "t/2".into())
        );
        let mut out = BytesMut::new();
        PubAck::new(first.pkid).write(&mut out).unwrap();
        send(&mut peer, &out).await;
        assert_eq!(acknowledged.recv().await, Some(0));
        drop(peer);

        let mut peer = hub.accept(true).await;
        for topic in ["t/1", "t/2"] {
            let again = published(&mut peer).await;
            assert_eq!((again.topic.as_str(), again.dup), (topic, true));
        }
        // A receipt of the lost connection acknowledges nothing on this one.
        inbox.acknowledge(stale).await;
        publish(3).await;
        let new = published(&mut peer).await;
        assert_eq!((new.topic.as_str(), new.dup), ("t/3", false));
        let mut out = BytesMut::new();
        input.write(&mut out).unwrap();
        send(&mut peer, &out).await;
        let receipt = inbox.receive().await.unwrap().receipt;
        inbox.acknowledge(receipt).await;
        assert_eq!(receive(&mut peer).await, Packet::PubAck(PubAck::new(9)));
    }
}
