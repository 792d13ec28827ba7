//! Bytes from a stream into a buffer of exactly the size that arrived.

use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::BytesMut;
use tokio::io::{AsyncRead, ReadBuf};

/// Bytes of one read at most.
pub(crate) const READ_BYTES: usize = 16_384;

/// Reads once behind what `input` holds; 0 bytes are the end of the stream. The read goes through the stack, so an idle
/// connection holds no buffer, and a slice that is kept never pins more than one read.
pub(crate) fn poll_read_once<S: AsyncRead + Unpin>(
    stream: &mut S,
    input: &mut BytesMut,
    cx: &mut Context<'_>,
) -> Poll<io::Result<usize>> {
    let mut scratch = [const { MaybeUninit::<u8>::uninit() }; READ_BYTES];
    let mut scratch = ReadBuf::uninit(&mut scratch);
    let read = ready!(Pin::new(stream).poll_read(cx, &mut scratch));
    let filled = scratch.filled();
    if input.is_empty() {
        *input = BytesMut::from(filled);
    } else {
        input.extend_from_slice(filled);
    }
    Poll::Ready(read.map(|()| filled.len()))
}
