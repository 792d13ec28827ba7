//! An upstream made with an independent AMQP implementation.

use std::sync::Arc;

use edgehub_broker::amqp::{MESSAGE_FORMAT_BATCH, Message as Encoded};
use fe2o3_amqp::acceptor::{
    ConnectionAcceptor, LinkAcceptor, LinkEndpoint, ListenerSessionHandle, SessionAcceptor,
};
use fe2o3_amqp::types::messaging::{ApplicationProperties, Body, Message, Properties};
use fe2o3_amqp::types::primitives::Value;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

/// Accepts every token and every message; notes numbers with the address of their link.
#[derive(Clone, Default)]
pub(crate) struct Foreign {
    pub(crate) accepted: Arc<Mutex<Vec<(String, u32)>>>,
    pub(crate) batches: Arc<Mutex<usize>>,
}

impl Foreign {
    pub(crate) async fn serve(self, stream: TlsStream<TcpStream>) {
        let mut connection = ConnectionAcceptor::new("foreign").accept(stream).await.unwrap();
        let sessions = SessionAcceptor::new();
        let tokens = sessions.accept(&mut connection).await.unwrap();
        let answering = tokio::spawn(answer_tokens(tokens));
        while let Ok(session) = sessions.accept(&mut connection).await {
            tokio::spawn(self.clone().receive(session));
        }
        answering.abort();
    }

    async fn receive(self, mut session: ListenerSessionHandle) {
        let Ok(LinkEndpoint::Receiver(mut receiver)) = LinkAcceptor::new().accept(&mut session).await else {
            panic!("a link on which the hub sends");
        };
        let address = receiver.target().as_ref().and_then(|target| target.address.clone()).unwrap();
        while let Ok(delivery) = receiver.recv::<Body<Value>>().await {
            let Body::Data(sections) = delivery.body() else { panic!("data") };
            let batch = *delivery.message_format() == Some(MESSAGE_FORMAT_BATCH);
            *self.batches.lock() += usize::from(batch);
            for section in sections {
                let bytes = bytes::Bytes::copy_from_slice(&section.0);
                let body = match batch {
                    true => Encoded::parse(&bytes).unwrap().body.data().unwrap(),
                    false => bytes,
                };
                let number = std::str::from_utf8(&body).unwrap().parse().unwrap();
                self.accepted.lock().push((address.clone(), number));
            }
            if receiver.accept(&delivery).await.is_err() {
                return;
            }
        }
    }

    /// The numbers of a module.
    pub(crate) fn numbers(&self, module: &str) -> Vec<u32> {
        let accepted = self.accepted.lock();
        let own = accepted.iter().filter(|(address, _)| {
            *address == format!("amqps://localhost/devices/edge1/modules/{module}/messages/events")
        });
        own.map(|(_, number)| *number).collect()
    }
}

async fn answer_tokens(mut session: ListenerSessionHandle) {
    let links = LinkAcceptor::new();
    let (mut requests, mut answers) = (None, None);
    while requests.is_none() || answers.is_none() {
        match links.accept(&mut session).await.unwrap() {
            LinkEndpoint::Receiver(link) => requests = Some(link),
            LinkEndpoint::Sender(link) => answers = Some(link),
        }
    }
    let (Some(mut requests), Some(mut answers)) = (requests, answers) else { return };
    while let Ok(delivery) = requests.recv::<Body<Value>>().await {
        let request = delivery.message();
        assert!(matches!(&request.body, Body::Value(token) if matches!(&token.0, Value::String(_))));
        let id = request.properties.as_ref().and_then(|properties| properties.message_id.clone()).unwrap();
        let answer = Message::builder()
            .properties(Properties::builder().correlation_id(id).build())
            .application_properties(
                ApplicationProperties::builder()
                    .insert("status-code", 202)
                    .insert("status-description", "Accepted")
                    .build(),
            )
            .value("")
            .build();
        if answers.send(answer).await.is_err() {
            return;
        }
    }
}
