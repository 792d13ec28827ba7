//! Another broker, made with an independent AMQP implementation: addresses at which it takes messages, or does not.

use std::collections::HashMap;
use std::sync::Arc;

use fe2o3_amqp::Receiver;
use fe2o3_amqp::acceptor::{
    ConnectionAcceptor, LinkAcceptor, LinkEndpoint, ListenerSessionHandle, SaslAnonymousMechanism,
    SessionAcceptor,
};
use fe2o3_amqp::types::definitions::{AmqpError, Error};
use fe2o3_amqp::types::messaging::Body;
use fe2o3_amqp::types::primitives::Value;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

/// What becomes of a message at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Takes {
    /// It is accepted.
    Accepted,
    /// It is released, as a full queue does.
    Released,
    /// Its link is closed with an error, as for a queue that was deleted.
    Closed,
    /// The whole connection is cut.
    Cut,
    /// Nothing, ever.
    Ignored,
}

/// Keeps the messages of each address.
#[derive(Clone, Default)]
pub(crate) struct ForeignBroker {
    /// Address, sender and number of each accepted message.
    accepted: Arc<Mutex<Vec<(String, String, u32)>>>,
    takes: Arc<Mutex<HashMap<String, Takes>>>,
    /// Connections that were opened.
    pub(crate) connections: Arc<Mutex<usize>>,
}

impl ForeignBroker {
    /// From now on.
    pub(crate) fn set(&self, address: &str, takes: Takes) {
        self.takes.lock().insert(address.to_owned(), takes);
    }

    /// The numbers of a sender at an address.
    pub(crate) fn numbers(&self, address: &str, sender: &str) -> Vec<u32> {
        let accepted = self.accepted.lock();
        let own = accepted.iter().filter(|(at, from, _)| at == address && from == sender);
        own.map(|(.., number)| *number).collect()
    }

    pub(crate) async fn serve(self, stream: TlsStream<TcpStream>) {
        *self.connections.lock() += 1;
        let acceptor = ConnectionAcceptor::builder()
            .container_id("broker")
            .sasl_acceptor(SaslAnonymousMechanism::new())
            .build();
        let Ok(mut connection) = acceptor.accept(stream).await else { return };
        let sessions = SessionAcceptor::new();
        let (cut, mut cuts) = tokio::sync::mpsc::channel(1);
        loop {
            tokio::select! {
                session = sessions.accept(&mut connection) => match session {
                    Ok(session) => drop(tokio::spawn(self.clone().receive(session, cut.clone()))),
                    Err(_) => return,
                },
                _ = cuts.recv() => {
                    let error = Error::new(AmqpError::InternalError, Some("a queue is full".into()), None);
                    let _ = connection.close_with_error(error).await;
                    return;
                }
            }
        }
    }

    async fn receive(self, mut session: ListenerSessionHandle, cut: tokio::sync::mpsc::Sender<()>) {
        let links = LinkAcceptor::new();
        while let Ok(LinkEndpoint::Receiver(link)) = links.accept(&mut session).await {
            tokio::spawn(self.clone().take(link, cut.clone()));
        }
    }

    async fn take(self, mut link: Receiver, cut: tokio::sync::mpsc::Sender<()>) {
        let address = link.target().as_ref().and_then(|target| target.address.clone()).unwrap();
        let sender = link.source().as_ref().and_then(|source| source.address.clone()).unwrap();
        while let Ok(delivery) = link.recv::<Body<Value>>().await {
            let Body::Data(sections) = delivery.body() else { panic!("data") };
            let body: Vec<u8> = sections.iter().flat_map(|section| section.0.to_vec()).collect();
            let number = String::from_utf8(body).unwrap().parse().unwrap();
            let takes = self.takes.lock().get(&address).copied().unwrap_or(Takes::Accepted);
            let answered = match takes {
                Takes::Accepted => {
                    self.accepted.lock().push((address.clone(), sender.clone(), number));
                    link.accept(&delivery).await
                }
                Takes::Released => link.release(&delivery).await,
                Takes::Closed => {
                    let text = Some("the queue was deleted".into());
                    let _ = link.close_with_error(Error::new(AmqpError::ResourceDeleted, text, None)).await;
                    return;
                }
                Takes::Cut => {
                    let _ = cut.send(()).await;
                    return;
                }
                Takes::Ignored => Ok(()),
            };
            if answered.is_err() {
                return;
            }
        }
    }
}
