//! Owns the generator's clients: connect, publish within a window, receive and acknowledge, in batches.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{sleep_until, timeout};
use tokio_rustls::TlsConnector;

use crate::arrivals::Arrivals;
use crate::latency::Histogram;
use crate::wire::{self, Incoming};

/// Bytes at the front of each body: publisher (4), number (8), time of sending in ns (8).
pub const STAMP_BYTES: usize = 20;
/// Bytes that are prepared for one write.
const WRITE_BYTES_MAX: usize = 64 * 1024;
/// Room for one read.
const READ_BYTES: usize = 64 * 1024;
/// Room for what comes during the login; one that stays idle never needs more.
const LOGIN_READ_BYTES: usize = 64;
/// Time for connection, handshake and login together.
pub(crate) const LOGIN_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a client gives up.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The network failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The server broke the protocol.
    #[error(transparent)]
    Malformed(#[from] wire::Malformed),
    /// The server refused the login.
    #[error("the login was refused with CONNACK code {0}")]
    Refused(u8),
    /// The server sent a packet that does not fit.
    #[error("unexpected packet: {0}")]
    Unexpected(String),
    /// The server closed the connection.
    #[error("the server closed the connection")]
    Closed,
    /// The server ended or refused something that is needed, or is no match for it.
    #[error("{0}")]
    Ended(String),
    /// No answer in time.
    #[error("no answer within {} s", LOGIN_TIMEOUT.as_secs())]
    TimedOut,
}

/// Any stream: plain TCP or TLS.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Where the server is and how to speak to it.
#[derive(Clone)]
pub struct Target {
    /// Its address.
    pub address: SocketAddr,
    /// TLS with the server's name; plain TCP without.
    pub tls: Option<(TlsConnector, ServerName<'static>)>,
}

/// What all clients of a run share.
#[derive(Debug)]
pub struct Clock {
    start: Instant,
    /// Everything that moved, for seeing a stall.
    pub progress: AtomicU64,
}

impl Default for Clock {
    fn default() -> Self {
        Self { start: Instant::now(), progress: AtomicU64::new(0) }
    }
}

impl Clock {
    pub(crate) fn now_ns(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// A client that is logged in.
pub struct Client {
    stream: Box<dyn Stream>,
    input: BytesMut,
}

/// What a publisher is to do.
#[derive(Debug, Clone)]
pub struct Publishing {
    /// Its number; stands in every body.
    pub publisher: u32,
    /// Where to; AMQP: the address of the link.
    pub topic: String,
    /// Output of a module that does not stand in `topic`, as in AMQP.
    pub output: Option<&'static str>,
    /// How many messages.
    pub messages: u64,
    /// Body size in bytes, at least [`STAMP_BYTES`].
    pub payload_bytes: usize,
    /// Messages without acknowledgement at most; `None`: QoS 0.
    pub window: Option<u16>,
    /// Messages per second at most.
    pub rate: Option<f64>,
}

/// What a publisher did.
#[derive(Debug, Default)]
pub struct Published {
    /// Messages written.
    pub sent: u64,
    /// Messages acknowledged.
    pub acknowledged: u64,
    /// Acknowledgements out of the order of the messages.
    pub order_breaks: u64,
    /// From writing to acknowledgement.
    pub latency: Histogram,
    /// Why it ended early.
    pub failure: Option<String>,
}

/// What a receiver got.
#[derive(Debug)]
pub struct Received {
    /// Judged arrivals.
    pub arrivals: Arrivals,
    /// From writing at the publisher to reading at the receiver.
    pub latency: Histogram,
    /// Why it ended early.
    pub failure: Option<String>,
}

impl Client {
    /// Connects and logs in; subscribes if a filter is given.
    ///
    /// # Errors
    /// The network, the TLS handshake or the server refuses.
    pub async fn login(
        target: &Target,
        client_id: &str,
        credentials: Option<(&str, &str)>,
        subscription: Option<(&str, u8)>,
    ) -> Result<Self, ClientError> {
        timeout(LOGIN_TIMEOUT, Self::login_unbounded(target, client_id, credentials, subscription))
            .await
            .map_err(|_elapsed| ClientError::TimedOut)?
    }

    async fn login_unbounded(
        target: &Target,
        client_id: &str,
        credentials: Option<(&str, &str)>,
        subscription: Option<(&str, u8)>,
    ) -> Result<Self, ClientError> {
        Self::login_over(connected(target).await?, client_id, credentials, subscription).await
    }

    /// Logs in over a stream that is connected, and subscribes if a filter is given. Has no deadline.
    ///
    /// # Errors
    /// The stream ends or the server refuses.
    pub async fn login_over(
        stream: Box<dyn Stream>,
        client_id: &str,
        credentials: Option<(&str, &str)>,
        subscription: Option<(&str, u8)>,
    ) -> Result<Self, ClientError> {
        let mut client = Self { stream, input: BytesMut::with_capacity(LOGIN_READ_BYTES) };
        let mut out = BytesMut::new();
        wire::connect(&mut out, client_id, credentials);
        client.write(&out).await?;
        match client.next().await? {
            Incoming::ConnAck(0) => {}
            Incoming::ConnAck(code) => return Err(ClientError::Refused(code)),
            other => return Err(ClientError::Unexpected(format!("{other:?}"))),
        }
        if let Some((filter, qos)) = subscription {
            out.clear();
            wire::subscribe(&mut out, filter, qos);
            client.write(&out).await?;
            match client.next().await? {
                Incoming::SubAck => {}
                other => return Err(ClientError::Unexpected(format!("{other:?}"))),
            }
        }
        Ok(client)
    }

    /// Asks whether the server is still there.
    ///
    /// # Errors
    /// It is not, or says something else.
    pub async fn ping(&mut self) -> Result<(), ClientError> {
        let answered = async {
            self.write(&wire::PINGREQ).await?;
            match self.next().await? {
                Incoming::PingResp => Ok(()),
                other => Err(ClientError::Unexpected(format!("{other:?}"))),
            }
        };
        timeout(LOGIN_TIMEOUT, answered).await.map_err(|_elapsed| ClientError::TimedOut)?
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await?;
        self.stream.flush().await
    }

    async fn next(&mut self) -> Result<Incoming, ClientError> {
        loop {
            if let Some(packet) = wire::take(&mut self.input)? {
                return Ok(packet);
            }
            if self.stream.read_buf(&mut self.input).await? == 0 {
                return Err(ClientError::Closed);
            }
        }
    }

    /// Publishes until all is acknowledged (QoS 0: written), or `stop` turns true. The connection stays open
    /// until `stop` turns true.
    pub async fn publish(
        self,
        plan: Publishing,
        clock: Arc<Clock>,
        stop: watch::Receiver<bool>,
    ) -> Published {
        let mut done = Published::default();
        let mut stopped = stop.clone();
        let mut work = Box::pin(self.publish_all(&plan, &clock, &mut done));
        let ended = tokio::select! {
            ended = &mut work => Some(ended),
            () = turned_true(&mut stopped) => None,
        };
        drop(work);
        match ended {
            Some(Ok(kept_open)) => {
                turned_true(&mut stopped).await;
                drop(kept_open);
            }
            Some(Err(error)) => done.failure = Some(error.to_string()),
            None => {}
        }
        done
    }

    async fn publish_all(
        self,
        plan: &Publishing,
        clock: &Clock,
        done: &mut Published,
    ) -> Result<Box<dyn Stream>, ClientError> {
        let Self { stream, mut input } = self;
        input.reserve(READ_BYTES);
        let (mut reader, mut writer) = tokio::io::split(stream);
        let mut out = BytesMut::with_capacity(WRITE_BYTES_MAX + plan.payload_bytes);
        let mut in_flight: VecDeque<(u16, u64)> = VecDeque::new();
        let begin = tokio::time::Instant::now();
        let mut due_at = begin;
        let finished = |done: &Published| match plan.window {
            Some(_) => done.acknowledged == plan.messages,
            None => done.sent == plan.messages,
        };
        while !finished(done) || !out.is_empty() {
            let now = clock.now_ns();
            let due = plan.rate.map_or(plan.messages, |rate| {
                let due = (begin.elapsed().as_secs_f64() * rate) as u64 + 1;
                due_at = begin + Duration::from_secs_f64(due as f64 / rate);
                due.min(plan.messages)
            });
            while done.sent < due
                && out.len() < WRITE_BYTES_MAX
                && plan.window.is_none_or(|window| in_flight.len() < usize::from(window))
            {
                let id = plan.window.map(|_| (done.sent % u64::from(u16::MAX)) as u16 + 1);
                wire::publish(&mut out, &plan.topic, id, plan.payload_bytes, |out| {
                    put_stamp(out, plan.publisher, done.sent, now, plan.payload_bytes);
                });
                in_flight.extend(id.map(|id| (id, now)));
                done.sent += 1;
            }
            let waits_for_its_time = done.sent == due && due < plan.messages;
            tokio::select! {
                read = reader.read_buf(&mut input) => {
                    if read? == 0 {
                        return Err(ClientError::Closed);
                    }
                    acknowledge(&mut input, &mut in_flight, clock, done)?;
                }
                written = writer.write_buf(&mut out), if !out.is_empty() => {
                    written?;
                    if out.is_empty() {
                        writer.flush().await?;
                        if plan.window.is_none() {
                            clock.progress.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
                () = sleep_until(due_at), if waits_for_its_time => {}
            }
        }
        Ok(Box::new(reader.unsplit(writer)))
    }

    /// Receives `wanted` messages and acknowledges them, or until `stop` turns true.
    pub async fn receive(
        self,
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
        mut self,
        arrivals: &mut Arrivals,
        latency: &mut Histogram,
        wanted: u64,
        clock: &Clock,
    ) -> Result<(), ClientError> {
        let mut out = BytesMut::with_capacity(READ_BYTES);
        while arrivals.unique < wanted {
            let now = clock.now_ns();
            let before = arrivals.unique;
            while let Some(packet) = wire::take(&mut self.input)? {
                let Incoming::Publish(id, body) = packet else {
                    return Err(ClientError::Unexpected(format!("{packet:?}")));
                };
                let size = body.len();
                let (publisher, number, sent_ns) = read_stamp(body)
                    .ok_or_else(|| ClientError::Unexpected(format!("a body of {size} bytes")))?;
                arrivals.record(publisher, number);
                latency.record(now.saturating_sub(sent_ns));
                if let Some(id) = id {
                    wire::puback(&mut out, id);
                }
            }
            clock.progress.fetch_add(arrivals.unique - before, Ordering::Relaxed);
            if !out.is_empty() {
                self.write(&out).await?;
                out.clear();
            }
            if arrivals.unique < wanted {
                self.input.reserve(READ_BYTES);
                if self.stream.read_buf(&mut self.input).await? == 0 {
                    return Err(ClientError::Closed);
                }
            }
        }
        Ok(())
    }
}

fn acknowledge(
    input: &mut BytesMut,
    in_flight: &mut VecDeque<(u16, u64)>,
    clock: &Clock,
    done: &mut Published,
) -> Result<(), ClientError> {
    let now = clock.now_ns();
    while let Some(packet) = wire::take(input)? {
        let Incoming::PubAck(id) = packet else {
            return Err(ClientError::Unexpected(format!("{packet:?}")));
        };
        let Some(place) = in_flight.iter().position(|(waiting, _)| *waiting == id) else {
            return Err(ClientError::Unexpected(format!("PUBACK for {id}, which waits for none")));
        };
        if place > 0 {
            done.order_breaks += 1;
        }
        if let Some((_, sent_ns)) = in_flight.remove(place) {
            done.latency.record(now.saturating_sub(sent_ns));
        }
        done.acknowledged += 1;
        clock.progress.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// A stream to the server, with TLS if the target has it.
pub(crate) async fn connected(target: &Target) -> Result<Box<dyn Stream>, ClientError> {
    let tcp = TcpStream::connect(target.address).await?;
    tcp.set_nodelay(true)?;
    Ok(match &target.tls {
        Some((connector, name)) => Box::new(connector.connect(name.clone(), tcp).await?),
        None => Box::new(tcp),
    })
}

/// Appends a body of at least [`STAMP_BYTES`] bytes.
pub(crate) fn put_stamp(out: &mut BytesMut, publisher: u32, number: u64, now_ns: u64, body_bytes: usize) {
    out.put_u32(publisher);
    out.put_u64(number);
    out.put_u64(now_ns);
    out.put_bytes(b'x', body_bytes - STAMP_BYTES);
}

/// Publisher, number and time of sending of a body.
pub(crate) fn read_stamp(mut body: Bytes) -> Option<(u32, u64, u64)> {
    (body.len() >= STAMP_BYTES).then(|| (body.get_u32(), body.get_u64(), body.get_u64()))
}

pub(crate) async fn turned_true(stop: &mut watch::Receiver<bool>) {
    // The sender being gone means stop as well.
    let _gone = stop.wait_for(|stop| *stop).await;
}
