//! Owns the connection threads: each runs a single-threaded runtime and the connections handed to it.
//!
//! One thread accepts; sockets go to the threads in turn, because the kernel's balancing (by hash) leaves
//! threads idle when there are few connections. A connection stays on its thread. A panic in a connection's
//! task ends that connection only.

use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener as StdTcpListener, TcpStream as StdTcpStream};
use std::num::NonZeroUsize;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use edgehub_broker::wake::WakeRelay;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio_rustls::server::TlsStream;
use tracing::{debug, error, warn};

use super::{ListenError, Listener, TlsGate};

/// New connections that wait for one thread, at most.
const MAILBOX_MAX: usize = 256;
/// Connections accepted in one turn, at most; then the other tasks of the thread have theirs.
const ACCEPTS_PER_TURN_MAX: usize = 64;
/// Pause after the system had no room for a new connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Least time between two warnings of one listener.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Tells tasks that the program is stopping.
#[derive(Clone, Debug)]
pub struct Stopping {
    deadline: watch::Receiver<Option<Instant>>,
}

impl Stopping {
    /// Returns as soon as the program is stopping, with the time by which it wants to be done.
    pub async fn wait(&mut self) -> Instant {
        match self.deadline.wait_for(Option::is_some).await {
            Ok(deadline) => deadline.unwrap_or_else(Instant::now),
            // The threads' owner is gone: nothing is left to wait for.
            Err(_) => Instant::now(),
        }
    }

    /// Whether the program is stopping.
    pub fn is_stopping(&self) -> bool {
        self.deadline.borrow().is_some()
    }
}

/// Bounds the open connections of all listeners that share it.
#[derive(Clone, Debug)]
pub struct ConnectionGate {
    open: Arc<Semaphore>,
}

impl ConnectionGate {
    /// A gate for this many open connections.
    pub fn new(open_max: usize) -> Self {
        Self { open: Arc::new(Semaphore::new(open_max.min(Semaphore::MAX_PERMITS))) }
    }
}

/// The threads that own connections.
pub struct ConnectionThreads {
    lanes: Arc<Lanes>,
    deadline: watch::Sender<Option<Instant>>,
    threads: Vec<JoinHandle<()>>,
}

struct Lanes {
    senders: Vec<mpsc::Sender<Task>>,
    next: AtomicUsize,
}

impl Lanes {
    fn next(&self) -> &mpsc::Sender<Task> {
        &self.senders[self.next.fetch_add(1, Ordering::Relaxed) % self.senders.len()]
    }
}

/// A connection as it was accepted.
struct Accepted {
    stream: StdTcpStream,
    peer: SocketAddr,
    at: Instant,
    open: OwnedSemaphorePermit,
    waiting: Option<OwnedSemaphorePermit>,
}

impl ConnectionThreads {
    /// Starts the threads.
    ///
    /// # Errors
    /// The system gives no thread or no event queue.
    pub fn start(count: NonZeroUsize) -> Result<Self, ListenError> {
        let (deadline, stopping) = watch::channel(None);
        let (mut senders, mut threads) = (Vec::new(), Vec::new());
        for number in 0..count.get() {
            let relay = WakeRelay::new();
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = relay.install(&mut runtime).enable_all().build().map_err(ListenError::Thread)?;
            let (sender, mailbox) = mpsc::channel(MAILBOX_MAX);
            let stopping = Stopping { deadline: stopping.clone() };
            let thread = std::thread::Builder::new()
                .name(format!("connections-{number}"))
                .spawn(move || {
                    relay.adopt_thread();
                    runtime.block_on(run(mailbox, stopping, relay));
                })
                .map_err(ListenError::Thread)?;
            senders.push(sender);
            threads.push(thread);
        }
        Ok(Self { lanes: Arc::new(Lanes { senders, next: AtomicUsize::new(0) }), deadline, threads })
    }

    /// A signal for tasks that have to end with the threads.
    pub fn stopping(&self) -> Stopping {
        Stopping { deadline: self.deadline.subscribe() }
    }

    /// Accepts connections and runs `handler` for each, on the thread that owns it. Connections over the
    /// gate's limit are closed at once.
    ///
    /// # Errors
    /// The threads are stopping.
    pub fn serve<H, F>(
        &self,
        listener: Listener,
        gate: &ConnectionGate,
        handler: H,
    ) -> Result<(), ListenError>
    where
        H: Fn(TcpStream, SocketAddr, Instant) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let handler = Arc::new(handler);
        self.accept(listener, gate, None, move |accepted| {
            let handler = Arc::clone(&handler);
            Box::pin(async move {
                let _open = accepted.open;
                match TcpStream::from_std(accepted.stream) {
                    Ok(stream) => handler(stream, accepted.peer, accepted.at).await,
                    Err(error) => debug!(peer = %accepted.peer, %error, "connection lost before it began"),
                }
            })
        })
    }

    /// As [`Self::serve`], with a TLS handshake first. Its deadline counts from accepting; while as many
    /// connections wait for their handshake as the gate allows, no further ones are accepted.
    ///
    /// # Errors
    /// The threads are stopping.
    pub fn serve_tls<H, F>(
        &self,
        listener: Listener,
        gate: &ConnectionGate,
        tls: Arc<TlsGate>,
        handler: H,
    ) -> Result<(), ListenError>
    where
        H: Fn(TlsStream<TcpStream>, SocketAddr, Instant) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let handler = Arc::new(handler);
        let waiting = tls.waiting();
        self.accept(listener, gate, Some(waiting), move |accepted| {
            let (handler, tls) = (Arc::clone(&handler), Arc::clone(&tls));
            Box::pin(async move {
                let _open = accepted.open;
                let stream = match TcpStream::from_std(accepted.stream) {
                    Ok(stream) => tls.handshake(stream, accepted.at).await,
                    Err(error) => Err(error.into()),
                };
                drop(accepted.waiting);
                match stream {
                    Ok(stream) => handler(stream, accepted.peer, accepted.at).await,
                    Err(error) => debug!(peer = %accepted.peer, %error, "TLS handshake failed"),
                }
            })
        })
    }

    /// Runs a task on one of the threads.
    ///
    /// # Errors
    /// The threads are stopping or overloaded.
    pub fn spawn(
        &self,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), ListenError> {
        self.lanes.next().try_send(Box::pin(task)).map_err(|_| ListenError::Stopping(name))
    }

    /// Stops: no connection is accepted any more, tasks are told, and what has not ended after `timeout` is
    /// cut off. Blocks until all threads have ended; not to be called from one of them.
    pub fn stop(self, timeout: Duration) {
        self.deadline.send_replace(Some(Instant::now() + timeout));
        for thread in self.threads {
            if thread.join().is_err() {
                error!(code = "EH1301", "a connection thread has panicked");
            }
        }
    }

    fn accept(
        &self,
        listener: Listener,
        gate: &ConnectionGate,
        waiting: Option<Arc<Semaphore>>,
        make: impl Fn(Accepted) -> Task + Send + Sync + 'static,
    ) -> Result<(), ListenError> {
        let name = listener.name();
        let acceptor = Acceptor {
            name,
            lanes: Arc::clone(&self.lanes),
            open: Arc::clone(&gate.open),
            waiting,
            refused: metrics::counter!("edgehub_connections_refused_total", "listener" => name,
                "reason" => "client_limit"),
            warned_at: None,
        };
        let stopping = self.stopping();
        let task = Box::pin(acceptor.run(listener.into_socket(), stopping, make));
        self.lanes.senders[0].try_send(task).map_err(|_| ListenError::Stopping(name))
    }
}

/// The main task of a thread.
async fn run(mut mailbox: mpsc::Receiver<Task>, mut stopping: Stopping, relay: WakeRelay) {
    let mut tasks = JoinSet::new();
    let deadline = loop {
        tokio::select! {
            deadline = stopping.wait() => break deadline,
            Some(task) = mailbox.recv() => {
                tasks.spawn(relay.wrap(task));
            }
            Some(ended) = tasks.join_next() => report(ended),
        }
    };
    // What is still in the mailbox has never begun; dropping it closes the sockets.
    drop(mailbox);
    let drained = async {
        while let Some(ended) = tasks.join_next().await {
            report(ended);
        }
    };
    if tokio::time::timeout_at(deadline.into(), drained).await.is_err() {
        warn!(code = "EH1302", connections = tasks.len(), "connections did not end in time and are cut off");
    }
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        error!(code = "EH1303", %error, "a connection ended by a panic; please report this as a defect");
    }
}

struct Acceptor {
    name: &'static str,
    lanes: Arc<Lanes>,
    open: Arc<Semaphore>,
    waiting: Option<Arc<Semaphore>>,
    refused: metrics::Counter,
    warned_at: Option<Instant>,
}

impl Acceptor {
    async fn run(
        mut self,
        socket: StdTcpListener,
        mut stopping: Stopping,
        make: impl Fn(Accepted) -> Task + Send + Sync,
    ) {
        let socket = match TcpListener::from_std(socket) {
            Ok(socket) => socket,
            Err(error) => {
                error!(code = "EH1304", listener = self.name, %error, "listener cannot be watched");
                return;
            }
        };
        tokio::select! {
            _deadline = stopping.wait() => {}
            () = self.accept_all(&socket, make) => {}
        }
    }

    async fn accept_all(&mut self, socket: &TcpListener, make: impl Fn(Accepted) -> Task + Send + Sync) {
        for turn in 1usize.. {
            let waiting = match &self.waiting {
                Some(waiting) => match Arc::clone(waiting).acquire_owned().await {
                    Ok(permit) => Some(permit),
                    Err(_closed) => return,
                },
                None => None,
            };
            let (stream, peer) = match accept_one(socket).await {
                Ok(accepted) => accepted,
                Err(error) => {
                    self.pause_after(&error).await;
                    continue;
                }
            };
            let Ok(open) = Arc::clone(&self.open).try_acquire_owned() else {
                self.refused.increment(1);
                self.warn_at_times("the limit of open connections is reached; raise MaxConnectedClients");
                continue;
            };
            let task = make(Accepted { stream, peer, at: Instant::now(), open, waiting });
            if self.lanes.next().send(task).await.is_err() {
                return;
            }
            if turn.is_multiple_of(ACCEPTS_PER_TURN_MAX) {
                tokio::task::yield_now().await;
            }
        }
    }

    /// Out of file descriptors or memory: give connections time to end. Everything else concerns only the
    /// connection that was about to be accepted.
    async fn pause_after(&mut self, error: &io::Error) {
        const ENFILE: i32 = 23;
        const EMFILE: i32 = 24;
        const ENOMEM: i32 = 12;
        const ENOBUFS: i32 = 105;
        if let Some(ENFILE | EMFILE | ENOMEM | ENOBUFS) = error.raw_os_error() {
            self.warn_at_times("the system has no room for more connections; raise the limit of open files");
            tokio::time::sleep(ACCEPT_PAUSE).await;
        } else {
            debug!(listener = self.name, %error, "a connection was lost before it was accepted");
        }
    }

    fn warn_at_times(&mut self, text: &'static str) {
        if self.warned_at.is_none_or(|warned_at| warned_at.elapsed() >= WARNING_INTERVAL) {
            self.warned_at = Some(Instant::now());
            warn!(code = "EH1305", listener = self.name, "{text}");
        }
    }
}

/// Accepts one connection and takes it out of this thread's event queue: it will live on another thread.
async fn accept_one(socket: &TcpListener) -> io::Result<(StdTcpStream, SocketAddr)> {
    let (stream, peer) = socket.accept().await?;
    stream.set_nodelay(true)?;
    Ok((stream.into_std()?, peer))
}
