//! Owns the TLS handshake of accepted connections: its deadline and how many run at a time.

use std::future::{Future as _, poll_fn};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use rustls::ServerConfig;
use rustls::server::Acceptor;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout_at;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

/// Handshakes computed at a time, per thread. Signing takes up to half a millisecond; a storm of new
/// connections must let those that are there have their turns.
const COMPUTING_PER_THREAD: usize = 2;

/// Why a handshake did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeFault {
    /// The deadline has passed.
    #[error("the handshake did not end in time")]
    TimedOut,
    /// The peer left or does not speak TLS as we do.
    #[error(transparent)]
    Failed(#[from] io::Error),
}

/// Lets connections through the TLS handshake.
pub struct TlsGate {
    config: Arc<ServerConfig>,
    computing: Semaphore,
    waiting: Arc<Semaphore>,
    timeout: Duration,
    succeeded: metrics::Counter,
    failed: metrics::Counter,
    timed_out: metrics::Counter,
}

impl TlsGate {
    /// A gate. `threads` is the number of connection threads, `timeout` the time from accepting to the end of
    /// the handshake, `waiting_max` bounds the connections whose handshake has not ended.
    pub fn new(config: Arc<ServerConfig>, threads: usize, timeout: Duration, waiting_max: usize) -> Self {
        let counter = |result| metrics::counter!("edgehub_tls_handshakes_total", "result" => result);
        Self {
            config,
            computing: Semaphore::new(COMPUTING_PER_THREAD * threads.max(1)),
            waiting: Arc::new(Semaphore::new(waiting_max.clamp(1, Semaphore::MAX_PERMITS))),
            timeout,
            succeeded: counter("succeeded"),
            failed: counter("failed"),
            timed_out: counter("timed_out"),
        }
    }

    /// Performs the handshake of a connection that was accepted at `accepted_at`.
    ///
    /// # Errors
    /// The peer is too slow, leaves, or offers nothing that we accept.
    pub async fn handshake(
        &self,
        stream: TcpStream,
        accepted_at: Instant,
    ) -> Result<TlsStream<TcpStream>, HandshakeFault> {
        let deadline = (accepted_at + self.timeout).into();
        match timeout_at(deadline, self.unlimited_handshake(stream)).await {
            Ok(Ok(stream)) => {
                self.succeeded.increment(1);
                Ok(stream)
            }
            Ok(Err(error)) => {
                self.failed.increment(1);
                Err(error.into())
            }
            Err(_elapsed) => {
                self.timed_out.increment(1);
                Err(HandshakeFault::TimedOut)
            }
        }
    }

    pub(super) fn waiting(&self) -> Arc<Semaphore> {
        Arc::clone(&self.waiting)
    }

    async fn unlimited_handshake(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        // The peer's first message is awaited before a permit is taken, and the permit is given back as soon
        // as our answer is computed: a silent peer holds none.
        let hello = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
        let mut accept = pin!(hello.into_stream(Arc::clone(&self.config)));
        let answered = {
            let _permit = self.computing.acquire().await.map_err(io::Error::other)?;
            poll_fn(|context| Poll::Ready(accept.as_mut().poll(context))).await
        };
        match answered {
            Poll::Ready(result) => result,
            Poll::Pending => accept.await,
        }
    }
}
