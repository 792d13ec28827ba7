//! An upstream made with an independent AMQP implementation.

use std::sync::Arc;

use edgehub_broker::amqp::{MESSAGE_FORMAT_BATCH, Message as Encoded};
use fe2o3_amqp::acceptor::{
    ConnectionAcceptor, LinkAcceptor, LinkEndpoint, ListenerSessionHandle, SessionAcceptor,
};
use fe2o3_amqp::types::messaging::annotations::AnnotationKey;
use fe2o3_amqp::types::messaging::{
    ApplicationProperties, Body, Message, MessageAnnotations, MessageId, Outcome, Properties,
};
use fe2o3_amqp::types::primitives::{SimpleValue, Value};
use fe2o3_amqp::{Receiver, Sender};
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

/// Accepts every token and every message; notes numbers with the address of their link.
#[derive(Clone, Default)]
pub(crate) struct Foreign {
    pub(crate) accepted: Arc<Mutex<Vec<(String, u32)>>>,
    pub(crate) batches: Arc<Mutex<usize>>,
    /// Twin requests and answers of methods.
    pub(crate) control: Arc<Mutex<Vec<String>>>,
    /// Messages to devices that were accepted.
    pub(crate) settled: Arc<Mutex<usize>>,
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

    /// Serves the links of one identity.
    async fn receive(self, mut session: ListenerSessionHandle) {
        let links = LinkAcceptor::new();
        let mut answers = None;
        while let Ok(link) = links.accept(&mut session).await {
            match link {
                LinkEndpoint::Receiver(receiver) => {
                    let target = receiver.target().as_ref().and_then(|target| target.address.clone());
                    let address = target.unwrap();
                    match address.rsplit('/').next() {
                        Some("events") => drop(tokio::spawn(self.clone().take_messages(receiver, address))),
                        Some("twin") => {
                            // The answer link comes first.
                            let sender = answers.take().expect("a link for answers");
                            tokio::spawn(self.clone().serve_twin(receiver, sender));
                        }
                        Some("deviceBound") => drop(tokio::spawn(self.clone().take_answers(receiver))),
                        _ => panic!("{address}"),
                    }
                }
                LinkEndpoint::Sender(sender) => {
                    let source = sender.source().as_ref().and_then(|source| source.address.clone());
                    let address = source.unwrap();
                    if address.ends_with("/twin") {
                        answers = Some(sender);
                    } else if address.ends_with("/methods/deviceBound") {
                        tokio::spawn(call(sender));
                    } else if address.ends_with("/messages/deviceBound") {
                        tokio::spawn(self.clone().send_message(sender));
                    }
                }
            }
        }
    }

    async fn serve_twin(self, mut requests: Receiver, mut answers: Sender) {
        while let Ok(delivery) = requests.recv::<Body<Value>>().await {
            let request = delivery.message();
            let annotations = request.message_annotations.as_ref().unwrap();
            let operation = match annotations.0.get(&"operation" as &dyn AnnotationKey) {
                Some(Value::String(operation)) => operation.clone(),
                other => panic!("{other:?}"),
            };
            self.control.lock().push(operation.clone());
            let id = request.properties.as_ref().and_then(|properties| properties.correlation_id.clone());
            let (status, body) = match operation.as_str() {
                "GET" => (200, r#"{"desired":{},"reported":{}}"#),
                "PATCH" => (204, ""),
                _ => (200, ""),
            };
            let answer = Message::builder()
                .message_annotations(
                    MessageAnnotations::builder().insert("status", status).insert("version", 5i64).build(),
                )
                .properties(Properties::builder().correlation_id(id.unwrap()).build())
                .data(body.as_bytes().to_vec())
                .build();
            let _ = requests.accept(&delivery).await;
            if answers.send(answer).await.is_err() {
                return;
            }
        }
    }

    async fn take_answers(self, mut receiver: Receiver) {
        while let Ok(delivery) = receiver.recv::<Body<Value>>().await {
            let answer = delivery.message();
            let properties = answer.application_properties.as_ref().unwrap();
            let Some(SimpleValue::Int(status)) = properties.0.get("IoThub-status") else { panic!("status") };
            let id = answer.properties.as_ref().and_then(|properties| properties.correlation_id.clone());
            assert!(matches!(id, Some(MessageId::Uuid(_))), "the id keeps its type");
            let Body::Data(sections) = &answer.body else { panic!("data") };
            let body: Vec<u8> = sections.iter().flat_map(|section| section.0.to_vec()).collect();
            self.control.lock().push(format!("answer {status} {}", String::from_utf8(body).unwrap()));
        }
    }

    async fn send_message(self, mut sender: Sender) {
        let message = Message::builder().data(b"from afar".to_vec()).build();
        if matches!(sender.send(message).await, Ok(Outcome::Accepted(_))) {
            *self.settled.lock() += 1;
        }
        std::future::pending::<()>().await;
    }

    async fn take_messages(self, mut receiver: Receiver, address: String) {
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

/// Calls a method once, with an id that is a uuid.
async fn call(mut sender: Sender) {
    let id = MessageId::Uuid([9; 16].into());
    let call = Message::builder()
        .properties(Properties::builder().correlation_id(id).build())
        .application_properties(
            ApplicationProperties::builder().insert("IoThub-methodname", "foreign").build(),
        )
        .data(b"1".to_vec())
        .build();
    let _ = sender.send(call).await;
    std::future::pending::<()>().await;
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
