//! The AMQP engine and its driver against an independent implementation, in both directions.

use std::time::{Duration, Instant};

use bytes::Bytes;
use edgehub_broker::amqp::*;
use fe2o3_amqp::acceptor::{ConnectionAcceptor, LinkAcceptor, LinkEndpoint, SessionAcceptor};
use fe2o3_amqp::connection::Connection as PeerConnection;
use fe2o3_amqp::sasl_profile::SaslProfile;
use fe2o3_amqp::session::Session;
use fe2o3_amqp::types::messaging::{
    ApplicationProperties, Body as PeerBody, Data, Message as PeerMessage, MessageAnnotations,
    Outcome as PeerOutcome, Properties as PeerProperties,
};
use fe2o3_amqp::types::primitives::{Binary, SimpleValue, Symbol, Value as PeerValue};
use fe2o3_amqp::{Receiver, Sender};
use tokio::io::{DuplexStream, duplex};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(120);

/// A listener that accepts every link but those to `/refused`, settles every delivery with accepted, and sends
/// a copy to the first link on which the peer receives. Ends with the connection; gives what it saw.
async fn echo(stream: DuplexStream) -> Vec<Event> {
    let mut driver = Driver::new(stream, Connection::listener(Options::default(), Instant::now()));
    let mut seen = Vec::new();
    let mut back: Option<LinkId> = None;
    let mut waiting: Vec<(u32, Bytes)> = Vec::new();
    loop {
        while let Some(event) = driver.connection().poll_event() {
            let connection = driver.connection();
            match &event {
                Event::SaslPlain { user, password } => {
                    let good = user == "d1@sas.hub1" && password.expose() == "secret";
                    connection.sasl_outcome(if good { SaslCode::Ok } else { SaslCode::Sys });
                }
                Event::AttachRequested(request) if request.address().is_none_or(|at| at == "/refused") => {
                    let error = Error::new(Condition::UNAUTHORIZED_ACCESS, "not you");
                    assert!(connection.refuse_attach(request.link, error));
                }
                Event::AttachRequested(request) => {
                    if request.attach.role == Role::Receiver {
                        back = Some(request.link);
                    }
                    let answer = AttachAnswer {
                        snd_settle: None,
                        rcv_settle: Some(ReceiverSettle::First),
                        max_message_bytes: 1 << 20,
                        credit: 100,
                        properties: Vec::new(),
                    };
                    assert!(connection.accept_attach(request.link, answer));
                }
                Event::Delivery(delivery) => {
                    connection.settle(delivery.id, Outcome::Accepted);
                    waiting.push((delivery.format, delivery.payload.clone()));
                }
                _ => {}
            }
            if let Some(back) = back {
                while connection.credit(back) > 0 && !waiting.is_empty() {
                    let (format, payload) = waiting.remove(0);
                    let options = SendOptions { format, ..SendOptions::default() };
                    connection.send(back, Payload::from_iter([payload]), options).expect("credit");
                }
            }
            seen.push(event);
        }
        if driver.is_finished() {
            let _ = driver.shutdown().await;
            return seen;
        }
        driver.turn().await;
    }
}

fn rich_message(body: Vec<u8>) -> PeerMessage<Data> {
    PeerMessage::builder()
        .message_annotations(
            MessageAnnotations::builder().insert(Symbol::from("x-opt-a"), PeerValue::Ubyte(7)).build(),
        )
        .properties(
            PeerProperties::builder()
                .message_id("m-1".to_string())
                .correlation_id(5u64)
                .content_type(Symbol::from("application/json"))
                .build(),
        )
        .application_properties(
            ApplicationProperties::builder()
                .insert("k".to_string(), SimpleValue::String("v".into()))
                .insert("n".to_string(), SimpleValue::Int(-5))
                .build(),
        )
        .data(Binary::from(body))
        .build()
}

#[tokio::test]
async fn their_client_our_listener() {
    let (theirs, ours) = duplex(10_000);
    let listener = tokio::spawn(echo(ours));
    let talk = async {
        let mut connection = PeerConnection::builder()
            .container_id("peer")
            .max_frame_size(4_096u32)
            .idle_time_out(60_000u32)
            .open_with_stream(theirs)
            .await
            .expect("open");
        let mut session = Session::begin(&mut connection).await.expect("begin");
        let mut sender =
            Sender::attach(&mut session, "up", "/devices/d1/messages/events").await.expect("attach");
        let mut receiver = Receiver::attach(&mut session, "down", "/devices/d1/x").await.expect("attach");
        for size in [0usize, 10, 4_000, 5_000, 100_000, 260_000] {
            let outcome = sender.send(rich_message(vec![9; size])).await.expect("sent");
            assert!(matches!(outcome, PeerOutcome::Accepted(_)));
            let delivery = receiver.recv::<PeerBody<PeerValue>>().await.expect("received");
            assert_eq!(delivery.delivery_tag().len(), 16);
            let message = delivery.message();
            let properties = message.properties.as_ref().expect("kept");
            assert_eq!(properties.content_type.as_ref().map(Symbol::as_str), Some("application/json"));
            match &message.body {
                PeerBody::Data(sections) => {
                    assert_eq!(sections.iter().map(|data| data.0.len()).sum::<usize>(), size);
                }
                other => panic!("{other:?}"),
            }
            receiver.reject(&delivery, None).await.expect("settled");
        }
        // More than the credit, without waiting for each.
        let mut outcomes = Vec::new();
        for _ in 0..300 {
            outcomes.push(sender.send_batchable("text").await.expect("sent"));
        }
        for outcome in outcomes {
            assert!(matches!(outcome.await.expect("settled"), PeerOutcome::Accepted(_)));
        }
        // The other session is not disturbed by a refused link.
        let mut second = Session::begin(&mut connection).await.expect("begin");
        let refused = Sender::attach(&mut second, "up", "/refused").await.expect_err("refused");
        println!("refused: {refused:?}");
        // The peer detaches a refused link twice, which upsets its own session: go on in another one.
        let mut third = Session::begin(&mut connection).await.expect("begin");
        let again = Sender::attach(&mut third, "up", "/devices/d2/messages/events").await.expect("attach");
        again.close().await.expect("closed");
        third.end().await.expect("ended");
        sender.close().await.expect("closed");
        receiver.close().await.expect("closed");
        let _ = second.end().await;
        session.end().await.expect("ended");
        connection.close().await.expect("closed");
    };
    timeout(PATIENCE, talk).await.expect("in time");
    let seen = timeout(PATIENCE, listener).await.expect("in time").expect("no panic");
    let deliveries: Vec<_> = seen
        .iter()
        .filter_map(|event| match event {
            Event::Delivery(delivery) => Some(delivery),
            _ => None,
        })
        .collect();
    assert_eq!(deliveries.len(), 306);
    let message = Message::parse(&deliveries[1].payload).expect("legal");
    assert_eq!(message.annotation("x-opt-a"), Ok(Some(Value::Ubyte(7))));
    assert_eq!(message.application_property("n"), Ok(Some(Value::Int(-5))));
    let properties = message.properties().expect("legal");
    assert_eq!(properties.correlation_id, Some(MessageId::Ulong(5)));
    assert_eq!(message.body.data().map(|data| data.len()), Some(10));
    let rejected = seen
        .iter()
        .filter(|event| matches!(event, Event::Settled { outcome: Outcome::Rejected(_), .. }))
        .count();
    assert_eq!(rejected, 6);
    assert!(matches!(seen.last(), Some(Event::Closed { error: None, by: By::Peer })));
}

#[tokio::test]
async fn sasl_plain_and_anonymous() {
    for (profile, accepted) in [
        (SaslProfile::Anonymous, true),
        (SaslProfile::Plain { username: "d1@sas.hub1".into(), password: "secret".into() }, true),
        (SaslProfile::Plain { username: "d1@sas.hub1".into(), password: "wrong".into() }, false),
    ] {
        let (theirs, ours) = duplex(10_000);
        let listener = tokio::spawn(echo(ours));
        let open =
            PeerConnection::builder().container_id("peer").sasl_profile(profile).open_with_stream(theirs);
        match timeout(PATIENCE, open).await.expect("in time") {
            Ok(mut connection) => {
                assert!(accepted);
                connection.close().await.expect("closed");
            }
            Err(error) => assert!(!accepted, "{error:?}"),
        }
        timeout(PATIENCE, listener).await.expect("in time").expect("no panic");
    }
}

#[tokio::test]
async fn our_client_their_listener() {
    let (theirs, ours) = duplex(10_000);
    let peer = tokio::spawn(async move {
        let acceptor = ConnectionAcceptor::new("peer");
        let mut connection = acceptor.accept(theirs).await.expect("open");
        let mut session = SessionAcceptor::new().accept(&mut connection).await.expect("begin");
        let mut bodies = Vec::new();
        let LinkEndpoint::Receiver(mut receiver) =
            LinkAcceptor::new().accept(&mut session).await.expect("attach")
        else {
            panic!("the client sends");
        };
        assert_eq!(receiver.name(), "TelemetrySenderLink");
        for _ in 0..100 {
            let delivery = receiver.recv::<PeerBody<PeerValue>>().await.expect("received");
            if let PeerBody::Data(sections) = delivery.body() {
                bodies.push(sections.iter().map(|data| data.0.len()).sum::<usize>());
            }
            receiver.accept(&delivery).await.expect("settled");
        }
        let _ = receiver.recv::<PeerBody<PeerValue>>().await;
        let _ = receiver.close().await;
        let _ = session.on_end().await;
        let _ = connection.on_close().await;
        bodies
    });
    let talk = async move {
        let mut driver = Driver::new(ours, Connection::client(Options::default(), Instant::now()));
        let (mut link, mut settled, mut sent) = (None, 0, 0);
        loop {
            while let Some(event) = driver.connection().poll_event() {
                let connection = driver.connection();
                match event {
                    Event::Opened(_) => {
                        let session = connection.begin().expect("open");
                        let options = AttachOptions {
                            name: "TelemetrySenderLink".into(),
                            role: Role::Sender,
                            source: Terminus::source("d1"),
                            target: Terminus::target("amqps://hub/devices/d1/messages/events"),
                            snd_settle: Some(SenderSettle::Unsettled),
                            rcv_settle: Some(ReceiverSettle::First),
                            max_message_bytes: 0,
                            credit: 0,
                            properties: vec![(
                                "com.microsoft:client-version".into(),
                                Value::String("x".into()),
                            )],
                        };
                        link = connection.attach(session, options);
                    }
                    Event::Settled { outcome, .. } => {
                        assert_eq!(outcome, Outcome::Accepted);
                        settled += 1;
                        if settled == 100 {
                            assert!(connection.detach(link.expect("attached"), None));
                            connection.close(None, Instant::now());
                        }
                    }
                    Event::Closed { error, .. } => assert_eq!(error, None),
                    _ => {}
                }
                if let Some(link) = link {
                    while sent < 100 && connection.credit(link) > 0 {
                        let body = Bytes::from(vec![1u8; sent * 1_000]);
                        let message = MessageEncoder::default().data(body);
                        match connection.send(link, message, SendOptions::default()) {
                            Ok(_) => sent += 1,
                            Err(error) => {
                                println!("{error}");
                                break;
                            }
                        }
                    }
                }
            }
            if driver.is_finished() {
                return settled;
            }
            driver.turn().await;
        }
    };
    assert_eq!(timeout(PATIENCE, talk).await.expect("in time"), 100);
    let bodies = timeout(PATIENCE, peer).await.expect("in time").expect("no panic");
    assert_eq!(bodies, (0..100).map(|n| n * 1_000).collect::<Vec<_>>());
}
