//! Owns the link between hub and cloud: a TCP proxy that can be cut and restored.
//!
//! The listener stays bound while the link is cut, so that nobody else can take its port; new connections are then
//! reset at once.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// A running proxy; ends when dropped.
pub(super) struct Proxy {
    task: JoinHandle<()>,
}

impl Proxy {
    /// Starts a proxy to the target that is cut while `cut` holds true.
    pub(super) async fn start(
        near: SocketAddr,
        far: SocketAddr,
        cut: watch::Receiver<bool>,
    ) -> io::Result<Self> {
        Ok(Self::on(TcpListener::bind(near).await?, far, cut))
    }

    fn on(listener: TcpListener, far: SocketAddr, cut: watch::Receiver<bool>) -> Self {
        Self { task: tokio::spawn(run(listener, far, cut)) }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(listener: TcpListener, target: SocketAddr, mut cut: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            changed = cut.changed() => {
                if changed.is_err() {
                    return;
                }
                if *cut.borrow_and_update() {
                    connections.shutdown().await;
                }
            }
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) if *cut.borrow() => reset(&stream),
                Ok((stream, _)) => { connections.spawn(carry(stream, target)); }
                // Out of descriptors, or the peer is gone already: try again.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn carry(mut near: TcpStream, target: SocketAddr) {
    let Ok(mut far) = TcpStream::connect(target).await else { return reset(&near) };
    // The end of a connection, however it comes, ends its other half; there is nobody to tell why.
    let _ = near.set_nodelay(true).and(far.set_nodelay(true));
    let _ = copy_bidirectional(&mut near, &mut far).await;
}

fn reset(stream: &TcpStream) {
    // Without it the close is an orderly one: the peer notices that too.
    let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn echoes(port: u16) -> bool {
        let Ok(mut stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await else { return false };
        let mut answer = [0];
        stream.write_all(b"x").await.is_ok() && stream.read_exact(&mut answer).await.is_ok()
    }

    #[tokio::test]
    async fn a_cut_ends_connections_and_refuses_new_ones_until_it_is_restored() {
        let target = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = target.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = target.accept().await {
                tokio::spawn(async move {
                    let (mut reader, mut writer) = stream.split();
                    tokio::io::copy(&mut reader, &mut writer).await
                });
            }
        });
        let (cut, is_cut) = watch::channel(false);
        let near = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = near.local_addr().unwrap().port();
        let _proxy = Proxy::on(near, address, is_cut);
        let mut open = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
        let mut byte = [0];
        open.write_all(b"x").await.unwrap();
        open.read_exact(&mut byte).await.unwrap();
        cut.send_replace(true);
        assert!(!matches!(open.read(&mut byte).await, Ok(1..)), "the open connection must end");
        assert!(!echoes(port).await, "a new connection must fail");
        cut.send_replace(false);
        while !echoes(port).await {}
    }
}
