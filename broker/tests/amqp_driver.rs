//! The AMQP driver over streams that stop, end, never end or come in pieces; the clock is the test's.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use edgehub_broker::amqp::*;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf, duplex};
use tokio::net::UnixStream;
use tokio::time::Instant;

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

/// Runs until the connection is over.
async fn run_listener(stream: tokio::io::DuplexStream) -> (Vec<Event>, Duration) {
    let started = Instant::now();
    let mut driver = Driver::new(stream, Connection::listener(Options::default(), now()));
    let mut events = Vec::new();
    loop {
        while let Some(event) = driver.connection().poll_event() {
            if let Event::AttachRequested(request) = &event {
                let answer = AttachAnswer {
                    snd_settle: None,
                    rcv_settle: None,
                    max_message_bytes: 1 << 20,
                    credit: 10,
                    properties: Vec::new(),
                };
                assert!(driver.connection().accept_attach(request.link, answer));
                if request.attach.role == Role::Receiver {
                    driver.connection().set_credit(request.link, 0);
                }
            }
            if let Event::CreditChanged { link, .. } = event {
                let big = Payload::from_iter([Bytes::from(vec![0; 1 << 20])]);
                let _ = driver.connection().send(link, big, SendOptions::default());
            }
            events.push(event);
        }
        if driver.is_finished() {
            let _ = driver.shutdown().await;
            return (events, started.elapsed());
        }
        driver.turn().await;
    }
}

fn client_bytes(steps: impl FnOnce(&mut Connection, SessionId)) -> Vec<u8> {
    // A client that is ahead of its listener: the listener's part is made here, too.
    let mut client = Connection::client(Options::default(), now());
    let mut listener = Connection::listener(Options::default(), now());
    let mut said = Vec::new();
    let mut exchange = |client: &mut Connection| {
        for _ in 0..4 {
            let mut up = bytes::BytesMut::new();
            bytes::BufMut::put(&mut up, &mut *client.output());
            said.extend_from_slice(&up);
            listener.receive(&mut up, now());
            let mut down = bytes::BytesMut::new();
            bytes::BufMut::put(&mut down, &mut *listener.output());
            client.receive(&mut down, now());
        }
    };
    exchange(&mut client);
    let session = client.begin().expect("open");
    exchange(&mut client);
    steps(&mut client, session);
    exchange(&mut client);
    said
}

#[tokio::test(start_paused = true)]
async fn silent_peers_are_kept_alive_then_given_up() {
    let (mut peer, ours) = duplex(64 * 1024);
    let task = tokio::spawn(run_listener(ours));
    peer.write_all(&client_bytes(|_, _| {})).await.expect("room");
    let started = Instant::now();
    let mut all = Vec::new();
    peer.read_to_end(&mut all).await.expect("orderly end");
    let elapsed = started.elapsed();
    drop(peer);
    let (events, _) = task.await.expect("no panic");
    assert!((Duration::from_secs(240)..Duration::from_secs(241)).contains(&elapsed), "{elapsed:?}");
    // The client announced 240 s: one heartbeat at 210 s, then the close.
    let heartbeat = [0, 0, 0, 8, 2, 0, 0, 0];
    assert_eq!(all.windows(8).filter(|window| *window == heartbeat).count(), 1);
    assert!(all.windows(22).any(|window| window == b"amqp:connection:forced"));
    assert!(matches!(events.last(), Some(Event::Closed { by: By::Engine, .. })));
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_does_not_read_is_given_up() {
    let (mut peer, ours) = duplex(4_096);
    let task = tokio::spawn(run_listener(ours));
    let bytes = client_bytes(|client, session| {
        let options = AttachOptions {
            name: "l".into(),
            role: Role::Receiver,
            source: Terminus::source("x"),
            target: Terminus::target("y"),
            snd_settle: None,
            rcv_settle: None,
            max_message_bytes: 0,
            credit: 5,
            properties: Vec::new(),
        };
        client.attach(session, options).expect("room");
    });
    peer.write_all(&bytes).await.expect("room");
    // The credit, by hand: the listener of client_bytes never accepted the link.
    let flow: &[u8] = &[
        0, 0, 0, 29, 2, 0, 0, 0, 0x00, 0x53, 0x13, 0xc0, 16, 7, 0x52, 1, 0x70, 0, 0, 19, 136, 0x52, 1, 0x52,
        200, 0x43, 0x43, 0x52, 5,
    ];
    peer.write_all(flow).await.expect("room");
    let (events, elapsed) = task.await.expect("no panic");
    assert!((Duration::from_secs(30)..Duration::from_secs(60)).contains(&elapsed), "{elapsed:?}");
    match events.last() {
        Some(Event::Closed { error: Some(error), by: By::Engine }) => {
            assert!(error.to_string().contains("takes no bytes"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    drop(peer);
}

#[tokio::test]
async fn bytes_in_pieces_and_a_sudden_end() {
    let (mut peer, ours) = duplex(7);
    let task = tokio::spawn(run_listener(ours));
    let bytes = client_bytes(|client, session| {
        client.end(session, None);
    });
    let (mut from, mut to) = tokio::io::split(peer);
    let reader = tokio::spawn(async move {
        let mut buffer = [0; 5];
        while from.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
        from
    });
    to.write_all(&bytes).await.expect("taken");
    to.shutdown().await.expect("taken");
    let (events, _) = task.await.expect("no panic");
    peer = reader.await.expect("no panic").unsplit(to);
    drop(peer);
    let kinds: Vec<_> = events.iter().map(|event| format!("{event:?}")).collect();
    assert!(kinds[0].starts_with("Opened"), "{kinds:?}");
    assert!(kinds[1].starts_with("SessionBegun") && kinds[2].starts_with("SessionEnded"), "{kinds:?}");
    assert!(matches!(events.last(), Some(Event::Closed { error: Some(_), by: By::Engine })));
}

/// A peer that always has more to say: its open, then empty frames, until it has filled a number of reads.
struct Talkative {
    bytes: Bytes,
    reads: usize,
}

impl AsyncRead for Talkative {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        while buf.remaining() > 0 && self.reads > 0 {
            if self.bytes.is_empty() {
                self.bytes = Bytes::from([0, 0, 0, 8, 2, 0, 0, 0].repeat(1_024));
            }
            let count = self.bytes.len().min(buf.remaining());
            buf.put_slice(&self.bytes.split_to(count));
        }
        self.reads = self.reads.saturating_sub(1);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Talkative {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_never_stops_talking_holds_up_no_deadline() {
    let talkative = Talkative { bytes: Bytes::from(client_bytes(|_, _| {})), reads: usize::MAX };
    let mut driver = Driver::new(talkative, Connection::listener(Options::default(), now()));
    driver.turn().await;
    while driver.connection().poll_event().is_some() {}
    // The peer talks on in the place of its own close.
    driver.connection().close(None, now());
    for second in 0.. {
        if driver.is_finished() {
            break;
        }
        assert!(second < 60, "the wait for the close of the peer has an end");
        tokio::time::advance(Duration::from_secs(1)).await;
        driver.turn().await;
    }
}

#[tokio::test]
async fn a_peer_that_never_stops_talking_gives_way_to_other_sockets_of_its_thread() {
    const ROUNDS: usize = 50;
    let talkative = Talkative { bytes: Bytes::from(client_bytes(|_, _| {})), reads: 5_000 };
    let mut driver = Driver::new(talkative, Connection::listener(Options::default(), now()));
    let turns = Arc::new(AtomicUsize::new(0));
    let counted = turns.clone();
    let talking = tokio::spawn(async move {
        while !driver.is_finished() {
            while driver.connection().poll_event().is_some() {}
            driver.turn().await;
            counted.fetch_add(1, Ordering::Relaxed);
        }
    });
    let (mut near, mut far) = UnixStream::pair().unwrap();
    let before = turns.load(Ordering::Relaxed);
    for _ in 0..ROUNDS {
        near.write_all(b"x").await.unwrap();
        // More room than there are bytes: the next round waits for the runtime to look at the socket again.
        let mut buffer = [0; 8];
        assert_eq!(far.read(&mut buffer).await.unwrap(), 1);
    }
    let took = turns.load(Ordering::Relaxed) - before;
    assert!(!talking.is_finished() && took < 10 * ROUNDS, "{took} turns for {ROUNDS} rounds");
    talking.abort();
}
