//! The socket of one connection with its buffers: bytes in, bytes out, nothing of their meaning.
//!
//! Reads go through the stack into buffers of exactly the size that arrived, so an idle connection holds no buffer
//! and a kept slice never pins more than one read. Output gathers until the socket takes it; large payloads are
//! written by reference.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::Instant;

use super::frame::FixedHeader;

/// Bytes of one read at most, unless a larger packet is being read.
const READ_BYTES: usize = 16_384;
/// Payloads of at least this many bytes are written by reference instead of being copied.
const BY_REFERENCE_BYTES_MIN: usize = 4_096;
/// Buffers handed to one vectored write.
const SLICES_MAX: usize = 16;
/// How long an ending connection may take to send its last bytes and to see the peer's end.
const CLOSE_MAX: Duration = Duration::from_secs(2);
/// Bytes that are read and thrown away while closing, so that the peer sees an orderly end instead of a reset.
const CLOSE_DRAIN_BYTES_MAX: usize = 262_144;

pub(super) struct Wire<S> {
    stream: S,
    /// What was read and not yet decoded.
    pub(super) input: BytesMut,
    /// What is to be written, behind `queue`.
    pub(super) output: BytesMut,
    queue: VecDeque<Bytes>,
    queue_bytes: usize,
    written_total: u64,
    flushed: bool,
    stalled_since: Option<Instant>,
    peer_closed: bool,
    broken: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    pub(super) fn new(stream: S) -> Self {
        Self {
            stream,
            input: BytesMut::new(),
            output: BytesMut::new(),
            queue: VecDeque::new(),
            queue_bytes: 0,
            written_total: 0,
            flushed: true,
            stalled_since: None,
            peer_closed: false,
            broken: false,
        }
    }

    /// The peer sends no more.
    pub(super) fn peer_closed(&self) -> bool {
        self.peer_closed
    }

    /// The socket failed.
    pub(super) fn broken(&self) -> bool {
        self.broken
    }

    /// Bytes that wait to be written.
    pub(super) fn backlog_bytes(&self) -> usize {
        self.queue_bytes + self.output.len()
    }

    /// Position behind the last byte that was put out.
    pub(super) fn end_position(&self) -> u64 {
        self.written_total + self.backlog_bytes() as u64
    }

    /// Position behind the last byte that the socket took.
    pub(super) fn written_position(&self) -> u64 {
        self.written_total
    }

    /// Since when the socket has taken nothing although there was something to take.
    pub(super) fn stalled_since(&self) -> Option<Instant> {
        self.stalled_since
    }

    pub(super) fn put_payload(&mut self, payload: &Bytes) {
        if payload.len() < BY_REFERENCE_BYTES_MIN {
            self.output.extend_from_slice(payload);
        } else {
            let before = self.output.split().freeze();
            self.queue_bytes += before.len() + payload.len();
            self.queue.extend([before, payload.clone()]);
        }
    }

    /// Reads once into `input`. Ready also when the peer closed or the socket failed.
    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.peer_closed || self.broken {
            return Poll::Ready(());
        }
        let missing = match FixedHeader::read(&self.input) {
            Ok(Some(header)) => header.total_bytes.saturating_sub(self.input.len()),
            _ => 0,
        };
        let read = if missing > READ_BYTES {
            // Grown by doubling, so that a stated length alone costs nothing.
            self.input.reserve(missing.min(self.input.len().max(READ_BYTES)));
            ready!(pin!(self.stream.read_buf(&mut self.input)).poll(cx))
        } else {
            let mut scratch = [const { MaybeUninit::<u8>::uninit() }; READ_BYTES];
            let mut scratch = ReadBuf::uninit(&mut scratch);
            let read = ready!(Pin::new(&mut self.stream).poll_read(cx, &mut scratch));
            let filled = scratch.filled();
            if self.input.is_empty() {
                self.input = BytesMut::from(filled);
            } else {
                self.input.extend_from_slice(filled);
            }
            read.map(|()| filled.len())
        };
        match read {
            Ok(0) => self.peer_closed = true,
            Ok(_) => {}
            Err(_) => self.fail(),
        }
        Poll::Ready(())
    }

    /// Writes until nothing is left or the socket takes no more.
    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>) {
        while !self.broken && self.backlog_bytes() > 0 {
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
                Poll::Ready(Ok(0) | Err(_)) => self.fail(),
                Poll::Ready(Ok(count)) => {
                    self.written(count);
                    self.flushed = false;
                    self.stalled_since = None;
                }
                Poll::Pending => {
                    self.stalled_since.get_or_insert_with(Instant::now);
                    return;
                }
            }
        }
        if !self.flushed && !self.broken {
            match Pin::new(&mut self.stream).poll_flush(cx) {
                Poll::Ready(Ok(())) => {
                    self.flushed = true;
                    self.stalled_since = None;
                }
                Poll::Ready(Err(_)) => self.fail(),
                Poll::Pending => {
                    self.stalled_since.get_or_insert_with(Instant::now);
                }
            }
        }
        if self.output.is_empty() && self.output.capacity() > READ_BYTES {
            self.output = BytesMut::new();
        }
    }

    /// Writes what is left when `flush`, ends the stream in order, and waits a moment for the peer's end.
    pub(super) async fn close(mut self, flush: bool) {
        let broken = self.broken;
        let closing = async {
            if flush {
                // A peer that takes no more bytes shall still see an orderly end.
                let _ = self.write_rest().await;
            }
            self.stream.shutdown().await?;
            let mut scratch = [0u8; 1_024];
            let mut drained = 0;
            while !self.peer_closed && drained < CLOSE_DRAIN_BYTES_MAX {
                match self.stream.read(&mut scratch).await? {
                    0 => break,
                    count => drained += count,
                }
            }
            std::io::Result::Ok(())
        };
        if !broken {
            // Whatever fails here fails for a peer that is gone already.
            let _ = tokio::time::timeout(CLOSE_MAX, closing).await;
        }
    }

    async fn write_rest(&mut self) -> std::io::Result<()> {
        while let Some(bytes) = self.queue.pop_front() {
            self.stream.write_all(&bytes).await?;
        }
        self.stream.write_all(&self.output).await
    }

    fn written(&mut self, mut count: usize) {
        self.written_total += count as u64;
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
        while self.queue.front().is_some_and(Bytes::is_empty) {
            self.queue.pop_front();
        }
    }

    fn fail(&mut self) {
        self.broken = true;
        self.stalled_since = None;
    }
}
