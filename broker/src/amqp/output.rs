//! The bytes that wait to be written: small things in one growing buffer, large payloads as slices between.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes, BytesMut};

/// Payload pieces from this size on are queued as slices; smaller ones are copied, which is cheaper than one
/// more element of a vectored write.
const COPY_BELOW_BYTES: usize = 1_024;
/// A written buffer is passed on if it holds at least this.
const SPARE_MIN_BYTES: usize = 512;
/// A written buffer is passed on if it holds at most this.
const SPARE_MAX_BYTES: usize = 262_144;

thread_local! {
    /// A buffer whose bytes are all written. The connections of a thread use it in turns: a busy one does not grow a new
    /// one for each write, and an idle one holds nothing.
    static SPARE: RefCell<BytesMut> = RefCell::new(BytesMut::new());
}

/// Frames in the order in which they are to be written. It is a [`Buf`], so `write_buf` of tokio and
/// [`Buf::chunks_vectored`] with `write_vectored` both drain it.
#[derive(Debug, Default)]
pub struct Output {
    chunks: VecDeque<Bytes>,
    chunk_bytes: usize,
    tail: BytesMut,
}

impl Output {
    /// Bytes that wait.
    pub fn len(&self) -> usize {
        self.chunk_bytes + self.tail.len()
    }

    /// True when nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The buffer at the end, for frame headers and performatives.
    pub(super) fn tail(&mut self) -> &mut BytesMut {
        if self.tail.capacity() == 0 {
            self.tail = SPARE.take();
        }
        &mut self.tail
    }

    /// Appends payload bytes without copying large ones.
    pub(super) fn put_payload(&mut self, payload: Bytes) {
        if payload.len() < COPY_BELOW_BYTES {
            self.tail.extend_from_slice(&payload);
            return;
        }
        if !self.tail.is_empty() {
            let front = self.tail.split().freeze();
            self.chunk_bytes += front.len();
            self.chunks.push_back(front);
        }
        self.chunk_bytes += payload.len();
        self.chunks.push_back(payload);
    }

    /// All is written.
    fn pass_on(&mut self) {
        let mut tail = std::mem::take(&mut self.tail);
        // One byte more than there is behind what was written brings all of the buffer back.
        let _ = tail.try_reclaim(tail.capacity() + 1);
        if (SPARE_MIN_BYTES..=SPARE_MAX_BYTES).contains(&tail.capacity()) {
            SPARE.set(tail);
        }
        if self.chunks.capacity() > 64 {
            self.chunks = VecDeque::new();
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

impl Buf for Output {
    fn remaining(&self) -> usize {
        self.len()
    }

    fn chunk(&self) -> &[u8] {
        self.chunks.front().map_or(&self.tail[..], |chunk| &chunk[..])
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let tail = std::iter::once(&self.tail[..]).filter(|tail| !tail.is_empty());
        let mut used = 0;
        for (slot, chunk) in slices.iter_mut().zip(self.chunks.iter().map(|chunk| &chunk[..]).chain(tail)) {
            *slot = IoSlice::new(chunk);
            used += 1;
        }
        used
    }

    fn advance(&mut self, mut count: usize) {
        assert!(count <= self.len(), "cannot advance behind the end");
        while let Some(front) = self.chunks.front_mut() {
            if count < front.len() {
                front.advance(count);
                self.chunk_bytes -= count;
                return;
            }
            count -= front.len();
            self.chunk_bytes -= front.len();
            self.chunks.pop_front();
        }
        self.tail.advance(count);
        if self.tail.is_empty() {
            self.pass_on();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_payloads_are_not_copied_and_order_is_kept() {
        let mut output = Output::default();
        let large = Bytes::from(vec![7u8; 4096]);
        output.tail().extend_from_slice(b"head");
        output.put_payload(large.clone());
        output.tail().extend_from_slice(b"next");
        output.put_payload(Bytes::from_static(b"small"));
        assert_eq!(output.len(), 4 + 4096 + 4 + 5);
        let mut slices = [IoSlice::new(&[]); 8];
        assert_eq!(output.chunks_vectored(&mut slices), 3);
        assert_eq!(slices[1].as_ptr(), large.as_ptr());
        let mut expected = b"head".to_vec();
        expected.extend_from_slice(&large);
        expected.extend_from_slice(b"nextsmall");
        let mut written = Vec::new();
        while output.has_remaining() {
            let n = output.chunk().len().min(1000);
            written.extend_from_slice(&output.chunk()[..n]);
            output.advance(n);
        }
        assert_eq!(written, expected);
        assert!(output.is_empty());
    }

    #[test]
    fn what_is_written_leaves_its_buffer_to_the_next_connection() {
        let write = |output: &mut Output, bytes: usize| {
            output.tail().extend_from_slice(&vec![7; bytes]);
            let place = output.tail().as_ptr();
            while output.has_remaining() {
                output.advance(output.chunk().len().min(1000));
            }
            assert_eq!(output.tail.capacity(), 0, "an idle connection holds nothing");
            place
        };
        let (mut first, mut second) = (Output::default(), Output::default());
        let place = write(&mut first, 20_000);
        assert_eq!(write(&mut second, 20_000), place);
        assert_eq!(write(&mut first, 100), place);
        // One of an exceptional size is not kept for it.
        write(&mut first, SPARE_MAX_BYTES + 1);
        assert_eq!(SPARE.take().capacity(), 0);
    }
}
