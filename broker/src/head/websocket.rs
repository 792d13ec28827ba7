//! The byte stream inside a WebSocket (RFC 6455): binary messages in, binary messages out, borders without meaning.
//!
//! The frames are tungstenite's. What is decided here: text is refused, nothing but answers to the client's control
//! frames is sent unasked (no pings: one SDK fails on them), every buffer has a bound, and the close handshake is
//! completed before the socket is shut down.
//!
//! The upgrade itself is HTTP and belongs to whoever listens, for whom [`accept_key`] is its one computation, or to
//! [`crate::dial`], for the hub's own WebSockets.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use futures_util::{Sink, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::ProtocolError;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message};

/// Largest message that a client may send, its fragments together, in bytes: two MQTT packets of the largest size.
pub const MESSAGE_BYTES_MAX: usize = 524_288;

/// Largest message that is sent, in bytes.
const SENT_MESSAGE_BYTES_MAX: usize = 65_536;
/// Bytes of sent messages that gather until they are written together.
const GATHER_BYTES: usize = 16_384;
/// Buffer that is read into; kept for the life of the connection.
const READ_BUFFER_BYTES: usize = 4_096;

/// `Sec-WebSocket-Accept` for a `Sec-WebSocket-Key` (RFC 6455 §4.2.2).
pub fn accept_key(key: &[u8]) -> String {
    derive_accept_key(key)
}

/// What every WebSocket of the hub is bounded by, at either end.
pub(crate) fn web_socket_config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER_BYTES)
        .write_buffer_size(GATHER_BYTES)
        .max_write_buffer_size(GATHER_BYTES + 2 * SENT_MESSAGE_BYTES_MAX)
        .max_message_size(Some(MESSAGE_BYTES_MAX))
        .max_frame_size(Some(MESSAGE_BYTES_MAX))
}

/// One end of a WebSocket, as a stream of bytes.
///
/// Whatever the other end breaks ends the stream: it is told the close code of RFC 6455 §7.4.1, and reads find the end.
pub struct WebSocketBytes<S> {
    socket: WebSocketStream<S>,
    /// What is left of the last message.
    unread: Bytes,
    /// Nothing is read any more.
    ended: bool,
    /// A close frame is on its way.
    closing: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> WebSocketBytes<S> {
    /// A WebSocket whose upgrade is done; `read_ahead` are the bytes that came behind the request.
    pub async fn accepted(stream: S, read_ahead: Vec<u8>) -> Self {
        let config = Some(web_socket_config());
        Self::over(WebSocketStream::from_partially_read(stream, read_ahead, Role::Server, config).await)
    }

    /// A WebSocket that this end has asked for, with [`web_socket_config`].
    pub(crate) fn requested(socket: WebSocketStream<S>) -> Self {
        Self::over(socket)
    }

    fn over(socket: WebSocketStream<S>) -> Self {
        Self { socket, unread: Bytes::new(), ended: false, closing: false }
    }

    /// The next bytes of the other end's; none at the end.
    fn poll_bytes(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.unread.is_empty() && !self.ended {
            match ready!(Pin::new(&mut self.socket).poll_next(cx)) {
                Some(Ok(Message::Binary(bytes))) => self.unread = bytes,
                // Pongs are queued by the library; a close frame is answered by the next call.
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Close(_) | Message::Frame(_))) => {}
                Some(Ok(Message::Text(_))) => {
                    self.fail(cx, "text", CloseCode::Unsupported, "only binary messages are understood");
                }
                Some(Err(error)) => match violation(&error) {
                    Some((reason, code)) => self.fail(cx, reason, code, ""),
                    None => match error {
                        Error::Io(error) => return Poll::Ready(Err(error)),
                        _ => self.ended = true,
                    },
                },
                None => {
                    // Both close frames are there; the connection below ends (RFC 6455 §7.1.1).
                    let closed = ready!(Pin::new(self.socket.get_mut()).poll_shutdown(cx));
                    self.ended = true;
                    closed?;
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    fn fail(&mut self, cx: &mut Context<'_>, reason: &'static str, code: CloseCode, text: &'static str) {
        metrics::counter!("edgehub_websocket_protocol_errors_total", "reason" => reason).increment(1);
        self.ended = true;
        self.send_close(code, text);
        // What the socket does not take now is written by the shutdown.
        let _ = Pin::new(&mut self.socket).poll_flush(cx);
    }

    fn send_close(&mut self, code: CloseCode, text: &'static str) {
        if !self.closing {
            self.closing = true;
            let frame = CloseFrame { code, reason: text.into() };
            // Fails when the client closed first; then there is nothing to tell.
            let _ = Pin::new(&mut self.socket).start_send(Message::Close(Some(frame)));
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if slices.iter().all(|slice| slice.is_empty()) {
            return Poll::Ready(Ok(0));
        }
        // Ready as long as the socket took what was gathered: at most one message waits beyond that.
        ready!(Pin::new(&mut self.socket).poll_ready(cx)).map_err(io_error)?;
        let count = slices.iter().map(|slice| slice.len()).sum::<usize>().min(SENT_MESSAGE_BYTES_MAX);
        let mut message = BytesMut::with_capacity(count);
        for slice in slices {
            let room = count - message.len();
            message.extend_from_slice(&slice[..slice.len().min(room)]);
        }
        Pin::new(&mut self.socket).start_send(Message::Binary(message.freeze())).map_err(io_error)?;
        Poll::Ready(Ok(count))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for WebSocketBytes<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_bytes(cx))?;
        let count = this.unread.len().min(buffer.remaining());
        buffer.put_slice(&this.unread[..count]);
        this.unread.advance(count);
        if this.unread.is_empty() {
            // Even an empty slice would keep its message alive.
            this.unread = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for WebSocketBytes<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().poll_send(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_send(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_flush(cx).map_err(io_error)
    }

    /// Sends the close frame. The socket itself is shut down when the client's is there, or with nothing to read.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.send_close(CloseCode::Normal, "");
        match ready!(Pin::new(&mut this.socket).poll_flush(cx)) {
            Ok(()) | Err(Error::AlreadyClosed | Error::ConnectionClosed) => {}
            Err(error) => return Poll::Ready(Err(io_error(error))),
        }
        if this.ended { Pin::new(this.socket.get_mut()).poll_shutdown(cx) } else { Poll::Ready(Ok(())) }
    }
}

/// What the client did wrong and the code that it is told; nothing when the connection just ended.
fn violation(error: &Error) -> Option<(&'static str, CloseCode)> {
    match error {
        Error::Capacity(_) => Some(("too_large", CloseCode::Size)),
        Error::Utf8(_) => Some(("utf8", CloseCode::Invalid)),
        Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => None,
        Error::Protocol(_) => Some(("frame", CloseCode::Protocol)),
        _ => None,
    }
}

fn io_error(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        Error::ConnectionClosed | Error::AlreadyClosed => io::ErrorKind::NotConnected.into(),
        // Sending after a close frame: the client ended the stream.
        Error::Protocol(_) => io::ErrorKind::BrokenPipe.into(),
        other => io::Error::other(other),
    }
}
