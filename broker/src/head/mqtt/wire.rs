//! The socket of one connection with its buffers: bytes in, bytes out, nothing of their meaning.
//!
//! An idle connection holds no buffer, and a kept slice never pins more than one read, unless that of a large packet.

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::Instant;

use super::frame::FixedHeader;
use crate::mqtt::{Outlet, READ_BYTES, poll_read_once};

/// How long an ending connection may take to send its last bytes and to see the peer's end.
const CLOSE_MAX: Duration = Duration::from_secs(2);
/// Bytes that are read and thrown away while closing, so that the peer sees an orderly end instead of a reset.
const CLOSE_DRAIN_BYTES_MAX: usize = 262_144;

pub(super) struct Wire<S> {
    stream: S,
    /// What was read and not yet decoded.
    pub(super) input: BytesMut,
    /// What is to be written.
    pub(super) outlet: Outlet,
    peer_closed: bool,
    broken: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    pub(super) fn new(stream: S) -> Self {
        Self { stream, input: BytesMut::new(), outlet: Outlet::new(), peer_closed: false, broken: false }
    }

    /// The peer sends no more.
    pub(super) fn peer_closed(&self) -> bool {
        self.peer_closed
    }

    /// The socket failed.
    pub(super) fn broken(&self) -> bool {
        self.broken
    }

    /// Since when the socket has taken nothing although there was something to take; a broken one takes no more.
    pub(super) fn stalled_since(&self) -> Option<Instant> {
        self.outlet.stalled_since().filter(|_| !self.broken)
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
            ready!(poll_read_once(&mut self.stream, &mut self.input, cx))
        };
        match read {
            Ok(0) => self.peer_closed = true,
            Ok(_) => {}
            Err(_) => self.broken = true,
        }
        Poll::Ready(())
    }

    /// Writes until nothing is left or the socket takes no more.
    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>) {
        if !self.broken && self.outlet.poll_write(&mut self.stream, cx).is_err() {
            self.broken = true;
        }
    }

    /// Writes what is left when `flush`, ends the stream in order, and waits a moment for the peer's end.
    pub(super) async fn close(mut self, flush: bool) {
        let broken = self.broken;
        let closing = async {
            if flush {
                // A peer that takes no more bytes shall still see an orderly end.
                let _ = self.outlet.write_rest(&mut self.stream).await;
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
}
