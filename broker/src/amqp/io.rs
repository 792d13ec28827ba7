//! The driver: moves bytes between one transport and one [`Connection`], with a heartbeat and a write deadline.
//!
//! ```no_run
//! # use edgehub_broker::amqp::{Connection, Driver, Options};
//! # async fn example(stream: tokio::net::TcpStream) -> std::io::Result<()> {
//! let mut driver = Driver::new(stream, Connection::listener(Options::default(), std::time::Instant::now()));
//! loop {
//!     while let Some(event) = driver.connection().poll_event() {
//!         // answer with commands on driver.connection()
//!     }
//!     if driver.is_finished() {
//!         return driver.shutdown().await;
//!     }
//!     driver.turn().await; // cancel safe: may be one arm of a select
//! }
//! # }
//! ```

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::task::yield_now;
use tokio::time::{Instant as TokioInstant, Sleep, sleep_until, timeout};

use super::connection::Connection;

/// Bytes that one turn reads at most, roughly; more waits for the next turn.
const READ_TURN_MAX_BYTES: usize = 65_536;
/// A read buffer with less room than this is replaced.
const READ_MIN_BYTES: usize = 16_384;
/// A peer that takes no byte for this long is given up.
const WRITE_DEADLINE_SECS: u64 = 30;
/// Time for the last bytes and the end of the stream.
const SHUTDOWN_SECS: u64 = 5;

thread_local! {
    /// Buffer for connections without an incomplete frame: all connections of a thread share it, so an idle
    /// one holds nothing.
    static SCRATCH: RefCell<BytesMut> = RefCell::new(BytesMut::new());
}

/// One connection and its transport.
#[derive(Debug)]
pub struct Driver<S> {
    stream: S,
    connection: Connection,
    /// The beginning of a frame.
    input: BytesMut,
    timer: Option<Pin<Box<Sleep>>>,
    /// Since when the transport takes nothing although there is output.
    stalled_since: Option<Instant>,
    /// Bytes were given to the transport that it may still hold back.
    unflushed: bool,
    /// The last turn ended at its limit of bytes: others of the thread come first.
    gives_way: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Driver<S> {
    /// Drives `connection` over `stream`.
    pub fn new(stream: S, connection: Connection) -> Self {
        Self {
            stream,
            connection,
            input: BytesMut::new(),
            timer: None,
            stalled_since: None,
            unflushed: false,
            gives_way: false,
        }
    }

    /// The engine, for events and commands.
    pub fn connection(&mut self) -> &mut Connection {
        &mut self.connection
    }

    /// The transport.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    /// True when the connection is over; call [`shutdown`](Self::shutdown) next.
    pub fn is_finished(&self) -> bool {
        self.connection.is_finished()
    }

    /// Writes what is due and waits for bytes or for time; returns when there may be events, or when all
    /// output is written. A lost transport ends the connection ([`super::Event::Closed`]). Cancel safe.
    pub async fn turn(&mut self) {
        poll_fn(|cx| self.poll_turn(cx)).await;
    }

    /// The same for owners that poll.
    pub fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.connection.is_finished() {
            return Poll::Ready(());
        }
        if std::mem::take(&mut self.gives_way) {
            // Woken only after the runtime has looked at the sockets of the others; a plain wake-up would come before that.
            return pin!(yield_now()).poll(cx);
        }
        let wrote = match self.poll_write(cx) {
            Ok(wrote) => wrote,
            Err(error) => return self.lost(&error),
        };
        let read = match self.poll_read(cx) {
            Ok(read) => read,
            Err(error) => return self.lost(&error),
        };
        // Also beside bytes: a peer that never stops sending must not keep a deadline from being seen.
        let due = self.poll_time(cx);
        if read || wrote || due { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Writes the rest, ends the stream in order, and waits a little for the peer's end.
    pub async fn shutdown(mut self) -> io::Result<()> {
        let limit = Duration::from_secs(SHUTDOWN_SECS);
        let end = async {
            while !self.connection.output().is_empty() {
                self.stream.write_buf(self.connection.output()).await?;
            }
            self.stream.flush().await?;
            self.stream.shutdown().await?;
            // Bytes of the peer that nobody reads would turn the end into a reset.
            let mut rest = [0u8; 1_024];
            while self.stream.read(&mut rest).await? > 0 {}
            Ok(())
        };
        match timeout(limit, end).await {
            Ok(result) => result,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    /// True when output was waiting and is all written now, which may be news for the owner's queues.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        let mut wrote = false;
        while !self.connection.output().is_empty() {
            let result = pin!(self.stream.write_buf(self.connection.output())).poll(cx);
            match result {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(_)) => {
                    self.connection.written(now());
                    self.stalled_since = None;
                    self.unflushed = true;
                    wrote = true;
                }
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => {
                    self.stalled_since.get_or_insert_with(now);
                    break;
                }
            }
        }
        if self.unflushed {
            match Pin::new(&mut self.stream).poll_flush(cx) {
                Poll::Ready(result) => {
                    result?;
                    self.unflushed = false;
                    if self.connection.output_len() == 0 {
                        self.stalled_since = None;
                    }
                }
                Poll::Pending => {
                    self.stalled_since.get_or_insert_with(now);
                }
            }
        }
        Ok(wrote && self.connection.output_len() == 0)
    }

    /// True when bytes arrived or the stream ended.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        if !self.connection.wants_input() {
            return Ok(false);
        }
        let mut bytes = 0;
        if !self.input.is_empty() {
            // Frames that waited while reading had stopped.
            let before = self.input.len();
            self.connection.receive(&mut self.input, now());
            bytes += before - self.input.len();
        }
        while bytes < READ_TURN_MAX_BYTES && self.connection.wants_input() {
            let read = match self.input.is_empty() {
                true => SCRATCH.with_borrow_mut(|scratch| {
                    if scratch.capacity() - scratch.len() < READ_MIN_BYTES {
                        *scratch = BytesMut::with_capacity(READ_TURN_MAX_BYTES);
                    }
                    let read = poll_read_buf(&mut self.stream, scratch, cx);
                    self.input = scratch.split();
                    read
                }),
                false => {
                    self.input.reserve(READ_MIN_BYTES);
                    poll_read_buf(&mut self.stream, &mut self.input, cx)
                }
            };
            match read {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Poll::Ready(Ok(read)) => {
                    bytes += read;
                    self.connection.receive(&mut self.input, now());
                }
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => break,
            }
        }
        if self.input.is_empty() {
            self.input = BytesMut::new();
        } else if bytes > 0 && self.connection.wants_input() {
            // The beginning of a frame must not keep the shared buffer.
            self.input = BytesMut::from(&self.input[..]);
        }
        self.gives_way = bytes >= READ_TURN_MAX_BYTES;
        Ok(bytes > 0)
    }

    /// True when the engine's time came.
    fn poll_time(&mut self, cx: &mut Context<'_>) -> bool {
        let stall_limit = Duration::from_secs(WRITE_DEADLINE_SECS);
        loop {
            let stall = self.stalled_since.map(|since| since + stall_limit);
            let Some(deadline) = self.connection.next_deadline().into_iter().chain(stall).min() else {
                return false;
            };
            let timer = match &mut self.timer {
                // A timer that rings early is cheaper than one that is set anew at every turn.
                Some(timer) if timer.deadline().into_std() <= deadline => timer,
                slot => slot.insert(Box::pin(sleep_until(TokioInstant::from_std(deadline)))),
            };
            if timer.as_mut().poll(cx).is_pending() {
                return false;
            }
            self.timer = None;
            let now = now();
            if stall.is_some_and(|stall| now >= stall) {
                self.connection.transport_lost("the peer takes no bytes");
                return true;
            }
            if now >= deadline {
                self.connection.tick(now);
                return true;
            }
        }
    }

    fn lost(&mut self, error: &io::Error) -> Poll<()> {
        self.connection.transport_lost(&error.to_string());
        Poll::Ready(())
    }
}

fn poll_read_buf<S: AsyncRead + Unpin>(
    stream: &mut S,
    buffer: &mut BytesMut,
    cx: &mut Context<'_>,
) -> Poll<io::Result<usize>> {
    Poll::Ready(ready!(pin!(stream.read_buf(buffer)).poll(cx)))
}

/// The time of the runtime, which tests may stop.
fn now() -> Instant {
    TokioInstant::now().into_std()
}
