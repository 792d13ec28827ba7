//! One MQTT connection: its socket, its buffers, its packet identifiers, and whether its peer still answers.

use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout};

use super::bell::Bell;
use super::packet::{self, PacketId, Received};
use crate::mqtt::{Outlet, poll_read_once};

/// Reads of one turn at most; others have theirs then.
const READS_MAX: usize = 8;

/// Nothing more is published while this many bytes wait to be written.
pub(super) const BACKLOG_BYTES_MAX: usize = 262_144;

/// A peer that takes no bytes for this long is lost.
const STALLED_SECS_MAX: u64 = 30;

/// How long an ending connection may take to send its last bytes.
const CLOSE_MAX: Duration = Duration::from_secs(2);

/// A connection; dropping it cuts it.
pub(super) struct Connection<S> {
    stream: S,
    waker: Waker,
    input: BytesMut,
    outlet: Outlet,
    last_id: u16,
    heard_at: Instant,
    spoke_at: Instant,
    /// When PINGREQ was sent that is not answered.
    pinged_at: Option<Instant>,
    ended: Option<String>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// A connection on which nothing was said yet; its bell rings when it is to be polled, at once for the first time.
    pub(super) fn new(stream: S, bell: &Arc<Bell>) -> Self {
        let (waker, now) = (bell.waker(), Instant::now());
        waker.wake_by_ref();
        Self {
            stream,
            waker,
            input: BytesMut::new(),
            outlet: Outlet::new(),
            last_id: 0,
            heard_at: now,
            spoke_at: now,
            pinged_at: None,
            ended: None,
        }
    }

    /// Puts a packet out.
    pub(super) fn put(&mut self, encode: impl FnOnce(&mut BytesMut)) {
        encode(&mut self.outlet.buffer);
        self.spoke();
    }

    /// Puts a PUBLISH out, of QoS 1 with a packet id. False, and nothing is put out, when it is too large.
    pub(super) fn publish(
        &mut self,
        topic: &str,
        packet_id: Option<PacketId>,
        dup: bool,
        body: &Bytes,
    ) -> bool {
        if !packet::publish_header(&mut self.outlet.buffer, topic, packet_id, dup, body.len()) {
            return false;
        }
        self.outlet.put_payload(body);
        self.spoke();
        true
    }

    /// A packet identifier that is not in use.
    pub(super) fn packet_id(&mut self, in_use: impl Fn(PacketId) -> bool) -> PacketId {
        loop {
            self.last_id = self.last_id.checked_add(1).unwrap_or(1);
            if let Some(id) = PacketId::new(self.last_id).filter(|id| !in_use(*id)) {
                return id;
            }
        }
    }

    /// Asks the peer whether it is there, unless it is being asked.
    pub(super) fn ping(&mut self, now: Instant) {
        if self.pinged_at.is_none() {
            self.pinged_at = Some(now);
            self.put(packet::ping);
        }
    }

    /// Bytes that wait to be written.
    pub(super) fn backlog_bytes(&self) -> usize {
        self.outlet.backlog_bytes()
    }

    /// When the peer last said anything.
    pub(super) fn heard_at(&self) -> Instant {
        self.heard_at
    }

    /// Reads and writes as far as it goes; the bell rings when it goes further.
    pub(super) fn poll(&mut self) {
        let waker = self.waker.clone();
        let mut cx = Context::from_waker(&waker);
        let mut reads = 0;
        while self.ended.is_none() && self.poll_read(&mut cx).is_ready() {
            reads += 1;
            if reads == READS_MAX {
                waker.wake_by_ref();
                break;
            }
        }
        self.poll_write(&mut cx);
    }

    /// The next packet that has arrived whole.
    pub(super) fn next(&mut self) -> Option<Received> {
        match packet::take(&mut self.input) {
            Ok(Some(received)) => {
                if received == Received::PingResp {
                    self.pinged_at = None;
                }
                Some(received)
            }
            Ok(None) => None,
            Err(error) => {
                self.input.clear();
                self.end(format!("the upstream breaks the protocol: {error}"));
                None
            }
        }
    }

    /// Why the connection is over, once all is read that came before.
    pub(super) fn take_end(&mut self) -> Option<String> {
        self.ended.take()
    }

    /// Looks at deadlines: asks the peer after half the idle time-out of silence at either end, and tells why it is
    /// lost when it says nothing within `limit`, or takes no bytes.
    pub(super) fn look(&mut self, now: Instant, idle_timeout: Duration, limit: Duration) -> Option<String> {
        let (half, over) = (idle_timeout / 2, |since: Instant, limit| now.duration_since(since) > limit);
        if self.outlet.stalled_since().is_some_and(|since| over(since, Duration::from_secs(STALLED_SECS_MAX)))
        {
            return Some(format!("the upstream takes no bytes for {STALLED_SECS_MAX} s"));
        }
        let limit = limit.min(half);
        if self.pinged_at.is_some_and(|since| over(since, limit)) && over(self.heard_at, limit) {
            return Some(format!("nothing is heard of the upstream, not even within {limit:?} of a ping"));
        }
        if over(self.heard_at, half) || over(self.spoke_at, half) {
            self.ping(now);
        }
        None
    }

    /// Says good-bye, and gives the peer a moment to hear it.
    pub(super) async fn close(mut self) {
        packet::disconnect(&mut self.outlet.buffer);
        let closing = async {
            self.outlet.write_rest(&mut self.stream).await?;
            self.stream.shutdown().await
        };
        // Whatever fails here fails for a peer that is gone already.
        let _ = timeout(CLOSE_MAX, closing).await;
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match ready!(poll_read_once(&mut self.stream, &mut self.input, cx)) {
            Ok(0) => self.end("the upstream closed the connection".into()),
            Ok(_) => self.heard_at = Instant::now(),
            Err(error) => self.end(format!("the connection is lost: {error}")),
        }
        Poll::Ready(())
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) {
        if self.ended.is_none()
            && let Err(error) = self.outlet.poll_write(&mut self.stream, cx)
        {
            self.end(format!("the connection is lost: {error}"));
        }
    }

    /// There is something to write.
    fn spoke(&mut self) {
        self.spoke_at = Instant::now();
        self.waker.wake_by_ref();
    }

    /// Only the first reason counts.
    fn end(&mut self, reason: String) {
        self.ended.get_or_insert(reason);
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, DuplexStream, duplex};

    use super::*;
    use crate::upstream::lanes::LaneId;
    use crate::upstream::mqtt::bell::Bells;

    fn pair(bytes: usize) -> (Bells, Connection<DuplexStream>, DuplexStream) {
        let bells = Bells::default();
        let (near, far) = duplex(bytes);
        let connection = Connection::new(near, &bells.bell(LaneId::new(0)));
        (bells, connection, far)
    }

    /// Polls when the bell rings, until something has arrived or is over.
    async fn rung(bells: &Bells, connection: &mut Connection<DuplexStream>) {
        std::future::poll_fn(|cx| bells.poll_rung(cx)).await;
        connection.poll();
    }

    #[tokio::test]
    async fn packets_that_came_before_the_end_are_read_first() {
        let (bells, mut connection, mut far) = pair(64);
        far.write_all(&[0x20, 2, 0, 0, 0x40, 2, 0, 1, 0x40]).await.unwrap();
        drop(far);
        rung(&bells, &mut connection).await;
        assert!(matches!(connection.next(), Some(Received::ConnAck(_))));
        assert!(matches!(connection.next(), Some(Received::PubAck(_))));
        assert_eq!(connection.next(), None);
        assert!(connection.take_end().unwrap().contains("closed"));
    }

    #[tokio::test]
    async fn large_and_small_payloads_leave_in_order_through_a_narrow_socket() {
        let (bells, mut connection, mut far) = pair(1_000);
        let large = Bytes::from(vec![7u8; 5_000]);
        let mut expected = BytesMut::new();
        for (number, body) in [large.clone(), Bytes::from_static(b"small"), large].into_iter().enumerate() {
            let id = PacketId::new(number as u16 + 1);
            assert!(connection.publish("t", id, false, &body));
            packet::publish_header(&mut expected, "t", id, false, body.len());
            expected.extend_from_slice(&body);
        }
        assert_eq!(connection.backlog_bytes(), expected.len());
        let mut arrived = vec![0; expected.len()];
        tokio::join!(far.read_exact(&mut arrived), async {
            while connection.backlog_bytes() > 0 {
                rung(&bells, &mut connection).await;
            }
        })
        .0
        .unwrap();
        assert!(arrived == expected);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_peer_is_asked_and_then_lost() {
        let (bells, mut connection, mut far) = pair(64);
        let (idle, limit) = (Duration::from_secs(60), Duration::from_secs(20));
        assert_eq!(connection.look(Instant::now(), idle, limit), None);
        tokio::time::advance(Duration::from_secs(31)).await;
        assert_eq!(connection.look(Instant::now(), idle, limit), None);
        rung(&bells, &mut connection).await;
        let mut asked = [0; 2];
        far.read_exact(&mut asked).await.unwrap();
        assert_eq!(asked, [0xc0, 0]);
        far.write_all(&[0xd0, 0]).await.unwrap();
        rung(&bells, &mut connection).await;
        assert_eq!(connection.next(), Some(Received::PingResp));
        tokio::time::advance(Duration::from_secs(31)).await;
        assert_eq!(connection.look(Instant::now(), idle, limit), None, "it answered");
        tokio::time::advance(Duration::from_secs(19)).await;
        assert_eq!(connection.look(Instant::now(), idle, limit), None);
        tokio::time::advance(Duration::from_secs(2)).await;
        assert!(connection.look(Instant::now(), idle, limit).is_some());
    }

    #[tokio::test]
    async fn identifiers_come_round_and_are_never_used_twice_at_a_time() {
        let (_bells, mut connection, _far) = pair(64);
        let held = connection.packet_id(|_| false);
        let next = (0..65_534).map(|_| connection.packet_id(|id| id == held)).last();
        assert_eq!(next.map(PacketId::get), Some(65_535));
        assert_eq!(connection.packet_id(|id| id == held).get(), held.get() + 1);
    }
}
