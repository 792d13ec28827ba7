//! One MQTT connection: its socket, its buffers, its packet identifiers, and whether its peer still answers.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::{Instant, timeout};

use super::bell::Bell;
use super::packet::{self, PacketId, Received};

/// Bytes of one read at most.
const READ_BYTES: usize = 16_384;

/// Reads of one turn at most; others have theirs then.
const READS_MAX: usize = 8;

/// Payloads of at least this many bytes are written by reference instead of being copied.
const BY_REFERENCE_BYTES_MIN: usize = 4_096;

/// Buffers handed to one vectored write.
const SLICES_MAX: usize = 16;

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
    output: BytesMut,
    /// What is to be written before `output`.
    queue: VecDeque<Bytes>,
    queue_bytes: usize,
    flushed: bool,
    stalled_since: Option<Instant>,
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
            output: BytesMut::new(),
            queue: VecDeque::new(),
            queue_bytes: 0,
            flushed: true,
            stalled_since: None,
            last_id: 0,
            heard_at: now,
            spoke_at: now,
            pinged_at: None,
            ended: None,
        }
    }

    /// Puts a packet out.
    pub(super) fn put(&mut self, encode: impl FnOnce(&mut BytesMut)) {
        encode(&mut self.output);
        self.spoke_at = Instant::now();
        self.waker.wake_by_ref();
    }

    /// Puts a PUBLISH out, of QoS 1 with a packet id. False, and nothing is put out, when it is too large.
    pub(super) fn publish(
        &mut self,
        topic: &str,
        packet_id: Option<PacketId>,
        dup: bool,
        body: &Bytes,
    ) -> bool {
        if !packet::publish_header(&mut self.output, topic, packet_id, dup, body.len()) {
            return false;
        }
        self.put(|out| {
            if body.len() < BY_REFERENCE_BYTES_MIN {
                out.extend_from_slice(body);
            }
        });
        if body.len() >= BY_REFERENCE_BYTES_MIN {
            let before = self.output.split().freeze();
            self.queue_bytes += before.len() + body.len();
            self.queue.extend([before, body.clone()]);
        }
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
        self.queue_bytes + self.output.len()
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
        if self.stalled_since.is_some_and(|since| over(since, Duration::from_secs(STALLED_SECS_MAX))) {
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
        packet::disconnect(&mut self.output);
        let closing = async {
            while let Some(bytes) = self.queue.pop_front() {
                self.stream.write_all(&bytes).await?;
            }
            self.stream.write_all(&self.output).await?;
            self.stream.shutdown().await
        };
        // Whatever fails here fails for a peer that is gone already.
        let _ = timeout(CLOSE_MAX, closing).await;
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        // Through the stack, so that an idle connection holds no buffer.
        let mut scratch = [const { MaybeUninit::<u8>::uninit() }; READ_BYTES];
        let mut scratch = ReadBuf::uninit(&mut scratch);
        let read = std::task::ready!(Pin::new(&mut self.stream).poll_read(cx, &mut scratch));
        match (read, scratch.filled()) {
            (Ok(()), []) => self.end("the upstream closed the connection".into()),
            (Ok(()), filled) => {
                self.heard_at = Instant::now();
                if self.input.is_empty() {
                    self.input = BytesMut::from(filled);
                } else {
                    self.input.extend_from_slice(filled);
                }
            }
            (Err(error), _) => self.end(format!("the connection is lost: {error}")),
        }
        Poll::Ready(())
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) {
        while self.ended.is_none() && self.backlog_bytes() > 0 {
            let stream = Pin::new(&mut self.stream);
            let wrote = if self.queue.is_empty() {
                stream.poll_write(cx, &self.output)
            } else {
                let mut slices = [IoSlice::new(&[]); SLICES_MAX];
                let waiting = self.queue.iter().map(|bytes| &bytes[..]).chain([&self.output[..]]);
                let mut count = 0;
                for (slice, bytes) in slices.iter_mut().zip(waiting) {
                    *slice = IoSlice::new(bytes);
                    count += 1;
                }
                stream.poll_write_vectored(cx, &slices[..count])
            };
            match wrote {
                Poll::Ready(Ok(0)) => self.end("the connection takes no bytes".into()),
                Poll::Ready(Ok(count)) => {
                    self.written(count);
                    (self.flushed, self.stalled_since) = (false, None);
                }
                Poll::Ready(Err(error)) => self.end(format!("the connection is lost: {error}")),
                Poll::Pending => {
                    self.stalled_since.get_or_insert_with(Instant::now);
                    return;
                }
            }
        }
        if !self.flushed && self.ended.is_none() {
            match Pin::new(&mut self.stream).poll_flush(cx) {
                Poll::Ready(Ok(())) => (self.flushed, self.stalled_since) = (true, None),
                Poll::Ready(Err(error)) => self.end(format!("the connection is lost: {error}")),
                Poll::Pending => {
                    self.stalled_since.get_or_insert_with(Instant::now);
                }
            }
        }
        if self.output.is_empty() && self.output.capacity() > READ_BYTES {
            self.output = BytesMut::new();
        }
    }

    fn written(&mut self, mut count: usize) {
        while count > 0 {
            let Some(front) = self.queue.front_mut() else {
                self.output.advance(count);
                return;
            };
            let step = count.min(front.len());
            front.advance(step);
            count -= step;
            self.queue_bytes -= step;
            if front.is_empty() {
                self.queue.pop_front();
            }
        }
    }

    /// Only the first reason counts.
    fn end(&mut self, reason: String) {
        self.ended.get_or_insert(reason);
        self.stalled_since = None;
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
        let large = Bytes::from(vec![7u8; BY_REFERENCE_BYTES_MIN]);
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
