//! Bytes that wait until a stream takes them.
//!
//! What is short gathers in one buffer; large payloads wait by reference, and all goes out in one write as far as the
//! stream takes it.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::time::Instant;

use super::READ_BYTES;

/// Payloads of at least this many bytes are written by reference instead of being copied.
const BY_REFERENCE_BYTES_MIN: usize = 4_096;
/// Buffers handed to one vectored write.
const SLICES_MAX: usize = 16;
/// A larger buffer is given back when all is written.
const KEPT_BYTES_MAX: usize = READ_BYTES;

/// What is to be written on one connection, in order.
#[derive(Debug)]
pub(crate) struct Outlet {
    /// The end of it, to which packets are appended.
    pub(crate) buffer: BytesMut,
    /// What is to be written before `buffer`.
    queue: VecDeque<Bytes>,
    queue_bytes: usize,
    written_total: u64,
    flushed: bool,
    stalled_since: Option<Instant>,
}

impl Outlet {
    /// Nothing waits.
    pub(crate) fn new() -> Self {
        Self {
            buffer: BytesMut::new(),
            queue: VecDeque::new(),
            queue_bytes: 0,
            written_total: 0,
            flushed: true,
            stalled_since: None,
        }
    }

    /// Bytes that wait to be written.
    pub(crate) fn backlog_bytes(&self) -> usize {
        self.queue_bytes + self.buffer.len()
    }

    /// Position behind the last byte that was put out.
    pub(crate) fn end_position(&self) -> u64 {
        self.written_total + self.backlog_bytes() as u64
    }

    /// Position behind the last byte that the stream took.
    pub(crate) fn written_position(&self) -> u64 {
        self.written_total
    }

    /// Since when the stream has taken nothing although there was something to take.
    pub(crate) fn stalled_since(&self) -> Option<Instant> {
        self.stalled_since
    }

    /// Appends a payload.
    pub(crate) fn put_payload(&mut self, payload: &Bytes) {
        if payload.len() < BY_REFERENCE_BYTES_MIN {
            self.buffer.extend_from_slice(payload);
        } else {
            let before = self.buffer.split().freeze();
            self.queue_bytes += before.len() + payload.len();
            self.queue.extend([before, payload.clone()]);
        }
    }

    /// Writes until nothing is left or the stream takes no more, which wakes the caller when it does again.
    ///
    /// # Errors
    /// The stream failed, or takes no bytes any more.
    pub(crate) fn poll_write<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> io::Result<()> {
        while self.backlog_bytes() > 0 {
            match self.poll_write_once(stream, cx) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(count)) => {
                    self.written(count);
                    (self.flushed, self.stalled_since) = (false, None);
                }
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => {
                    self.stalled_since.get_or_insert_with(Instant::now);
                    return Ok(());
                }
            }
        }
        if !self.flushed {
            match Pin::new(stream).poll_flush(cx) {
                Poll::Ready(Ok(())) => (self.flushed, self.stalled_since) = (true, None),
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => {
                    self.stalled_since.get_or_insert_with(Instant::now);
                }
            }
        }
        if self.buffer.is_empty() && self.buffer.capacity() > KEPT_BYTES_MAX {
            self.buffer = BytesMut::new();
        }
        Ok(())
    }

    /// Writes all that is left.
    ///
    /// # Errors
    /// The stream failed.
    pub(crate) async fn write_rest<S: AsyncWrite + Unpin>(&mut self, stream: &mut S) -> io::Result<()> {
        while let Some(bytes) = self.queue.pop_front() {
            stream.write_all(&bytes).await?;
        }
        stream.write_all(&self.buffer).await
    }

    fn poll_write_once<S: AsyncWrite + Unpin>(
        &self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let stream = Pin::new(stream);
        if self.queue.is_empty() {
            return stream.poll_write(cx, &self.buffer);
        }
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let waiting = self.queue.iter().map(|bytes| &bytes[..]).chain([&self.buffer[..]]);
        let mut count = 0;
        for (slice, bytes) in slices.iter_mut().zip(waiting) {
            *slice = IoSlice::new(bytes);
            count += 1;
        }
        stream.poll_write_vectored(cx, &slices[..count])
    }

    fn written(&mut self, mut count: usize) {
        self.written_total += count as u64;
        while count > 0 {
            let Some(front) = self.queue.front_mut() else {
                self.buffer.advance(count);
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
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, duplex};

    use super::*;

    proptest! {
        #[test]
        fn whatever_waits_leaves_in_order_through_any_socket(
            sizes in proptest::collection::vec(0usize..3 * BY_REFERENCE_BYTES_MIN, 0..40),
            socket_bytes in 1usize..20_000,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let (mut near, mut far) = duplex(socket_bytes);
                let (mut outlet, mut expected) = (Outlet::new(), Vec::new());
                for (number, size) in sizes.iter().enumerate() {
                    let payload = Bytes::from(vec![number as u8; *size]);
                    // A header may be missing: the outlet does not know of packets.
                    if number % 3 > 0 {
                        outlet.buffer.extend_from_slice(b"header");
                        expected.extend_from_slice(b"header");
                    }
                    outlet.put_payload(&payload);
                    expected.extend_from_slice(&payload);
                }
                prop_assert_eq!(outlet.end_position(), expected.len() as u64);
                let mut arrived = vec![0; expected.len()];
                let written = std::future::poll_fn(|cx| {
                    outlet.poll_write(&mut near, cx).unwrap();
                    if outlet.backlog_bytes() == 0 { Poll::Ready(()) } else { Poll::Pending }
                });
                tokio::join!(written, async { far.read_exact(&mut arrived).await.unwrap() });
                prop_assert!(arrived == expected);
                prop_assert_eq!(outlet.written_position(), outlet.end_position());
                prop_assert!(outlet.stalled_since().is_none());
                Ok(())
            })?;
        }
    }
}
