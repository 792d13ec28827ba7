//! A peer with a control plane: it serves twins, calls methods and sends cloud-to-device messages, as it is told.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use edgehub_broker::amqp::{
    Attach, AttachAnswer, AttachRequest, CbsResponse, Condition, Connection, Delivery, Driver, Error, Event,
    LinkAddress, LinkId, LinkKind, Message, MessageEncoder, MessageId, MessageProperties, Options, Outcome,
    PutToken, Role, SendOptions, Value,
};
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio_rustls::server::TlsStream;

/// Something that the cloud does on its own.
pub(crate) enum Push {
    /// Desired properties of an identity change.
    Desired(&'static str, &'static str),
    /// A method of an identity is called, with an id.
    Call(&'static str, MessageId, &'static str, &'static str),
    /// A message for a device; the tag names it.
    ToDevice(&'static str, [u8; 16], &'static str),
    /// The links of an identity of a kind are detached.
    Detach(&'static str, LinkKind),
    /// The session of an identity is ended.
    End(&'static str),
}

/// A twin request: identity, operation, resource, correlation id, body.
pub(crate) type Asked = (String, String, Option<String>, String, Bytes);

#[derive(Default)]
pub(crate) struct State {
    pub(crate) attaches: Vec<(String, LinkKind, Attach)>,
    pub(crate) asked: Vec<Asked>,
    /// Answers of methods: identity, correlation id, status, body.
    pub(crate) answered: Vec<(String, MessageId, Value, Bytes)>,
    /// What became of messages to devices.
    pub(crate) outcomes: Vec<(String, Outcome)>,
    pub(crate) tokens: usize,
    pub(crate) sessions: usize,
    // What it is told to do:
    /// Links that are refused, by identity and kind.
    pub(crate) refuses: HashMap<(String, LinkKind), Error>,
    /// Status of the answers to twin requests of an identity; 0 is no answer.
    pub(crate) twin_status: HashMap<String, i32>,
    /// Status of the answers to tokens.
    pub(crate) token_status: HashMap<String, i32>,
    /// Requests that make it end the session they came on, once each.
    pub(crate) drops: usize,
    pushes: VecDeque<Push>,
}

/// The peer. Clones share their state.
#[derive(Clone, Default)]
pub(crate) struct Cloud {
    pub(crate) state: Arc<Mutex<State>>,
    wake: Arc<Notify>,
}

/// The links of one connection.
type Links = Vec<(String, LinkKind, LinkId)>;

impl Cloud {
    /// Does something on the connection that is open.
    pub(crate) fn push(&self, push: Push) {
        self.state.lock().pushes.push_back(push);
        self.wake.notify_one();
    }

    /// Operations that an identity asked for.
    pub(crate) fn operations(&self, identity: &str) -> Vec<String> {
        let state = self.state.lock();
        state.asked.iter().filter(|asked| asked.0 == identity).map(|asked| asked.1.clone()).collect()
    }

    /// How often links of a kind were asked for.
    pub(crate) fn attached(&self, identity: &str, kind: LinkKind) -> usize {
        let state = self.state.lock();
        state.attaches.iter().filter(|attach| attach.0 == identity && attach.1 == kind).count()
    }

    pub(crate) async fn serve(self, stream: TlsStream<TcpStream>) {
        let mut driver = Driver::new(stream, Connection::listener(Options::default(), Instant::now()));
        let mut links = Links::new();
        let mut sent: Vec<(edgehub_broker::amqp::DeliveryId, String)> = Vec::new();
        while !driver.is_finished() {
            while let Some(event) = driver.connection().poll_event() {
                let engine = driver.connection();
                match event {
                    Event::AttachRequested(request) => self.attach(request, engine, &mut links),
                    Event::Delivery(delivery) => self.delivered(&delivery, engine, &mut links),
                    Event::Settled { delivery, outcome, .. } => {
                        let of = sent.iter().find(|(id, _)| *id == delivery);
                        if let Some((_, identity)) = of {
                            self.state.lock().outcomes.push((identity.clone(), outcome));
                        }
                    }
                    Event::Detached { link, .. } => links.retain(|(_, _, id)| *id != link),
                    Event::SessionEnded { session, .. } => links.retain(|(_, _, id)| id.session() != session),
                    Event::SessionBegun { .. } => self.state.lock().sessions += 1,
                    Event::Closed { .. } => return,
                    _ => {}
                }
            }
            let pushes = std::mem::take(&mut self.state.lock().pushes);
            for push in pushes {
                if let Some(push) = apply(push, driver.connection(), &mut links, &mut sent) {
                    // Its link is not there yet.
                    self.state.lock().pushes.push_back(push);
                }
            }
            tokio::select! {
                () = driver.turn() => {}
                () = self.wake.notified() => {}
            }
        }
    }

    fn attach(&self, request: AttachRequest, engine: &mut Connection, links: &mut Links) {
        let address = LinkAddress::parse(&request.address().unwrap(), request.attach.role).unwrap();
        let (kind, identity) = (address.kind(), name(&address));
        let mut state = self.state.lock();
        state.attaches.push((identity.clone(), kind, (*request.attach).clone()));
        if let Some(error) = state.refuses.get(&(identity.clone(), kind)) {
            assert!(engine.refuse_attach(request.link, error.clone()));
            return;
        }
        let (snd_settle, rcv_settle) = kind.settle_modes(&request.attach);
        let answer = AttachAnswer {
            snd_settle,
            rcv_settle,
            max_message_bytes: 1 << 20,
            credit: 50,
            properties: Vec::new(),
        };
        assert!(engine.accept_attach(request.link, answer));
        let kind = match (kind, request.attach.role) {
            // Answers to tokens go the other way than tokens.
            (LinkKind::Cbs, Role::Receiver) => LinkKind::Inputs,
            (kind, _) => kind,
        };
        links.push((identity, kind, request.link));
    }

    fn delivered(&self, delivery: &Delivery, engine: &mut Connection, links: &mut Links) {
        let of = links.iter().find(|(_, _, id)| *id == delivery.link).cloned();
        let Some((identity, kind, _)) = &of else { return };
        engine.settle(delivery.id, Outcome::Accepted);
        let message = Message::parse(&delivery.payload).unwrap();
        let mut state = self.state.lock();
        match kind {
            LinkKind::Cbs => {
                state.tokens += 1;
                let (correlation_id, request) = PutToken::decode(&message);
                let name = request.unwrap().name;
                let status = state.token_status.iter().find(|(suffix, _)| name.ends_with(suffix.as_str()));
                let status_code = status.map_or(200, |(_, status)| *status);
                let answer = CbsResponse { correlation_id, status_code, description: "as told".into() };
                let answers = links.iter().find(|(_, kind, _)| *kind == LinkKind::Inputs).unwrap().2;
                engine.send(answers, answer.encode(), SendOptions::default()).unwrap();
            }
            LinkKind::TwinRequests => {
                let text = |name| {
                    message.annotation(name).unwrap().and_then(|value| Some(value.as_text()?.to_string()))
                };
                let correlation = message.properties().unwrap().correlation_id.unwrap();
                let operation = text("operation").unwrap();
                let body = message.body.data().unwrap();
                let asked =
                    (identity.clone(), operation.clone(), text("resource"), correlation.to_string(), body);
                state.asked.push(asked);
                if state.drops > 0 {
                    state.drops -= 1;
                    engine.end(delivery.link.session(), Some(Error::from(Condition::INTERNAL_ERROR)));
                    links.retain(|(_, _, id)| id.session() != delivery.link.session());
                    return;
                }
                let ok = if operation == "PATCH" { 204 } else { 200 };
                let status = state.twin_status.get(identity).copied().unwrap_or(ok);
                let answers =
                    links.iter().find(|(of, kind, _)| of == identity && *kind == LinkKind::TwinAnswers);
                if status == 0 {
                    return;
                }
                let mut encoder = MessageEncoder::default();
                let version = (operation == "PATCH").then_some(("version", Value::Long(7)));
                encoder.annotations([("status", Value::Int(status))].into_iter().chain(version));
                encoder.properties(&MessageProperties {
                    correlation_id: Some(correlation),
                    ..MessageProperties::default()
                });
                let body = match (status, operation.as_str()) {
                    (200, "GET") => r#"{"desired":{"$version":1},"reported":{"$version":1}}"#,
                    (200..300, _) => "",
                    _ => r#"{"message":"no"}"#,
                };
                let payload = encoder.data(Bytes::from_static(body.as_bytes()));
                engine.send(answers.unwrap().2, payload, SendOptions::default()).unwrap();
            }
            LinkKind::MethodResponses => {
                let correlation = message.properties().unwrap().correlation_id.unwrap();
                let status = message.application_property("IoThub-status").unwrap().unwrap();
                let body = message.body.data().unwrap();
                state.answered.push((identity.clone(), correlation, status, body));
            }
            _ => {}
        }
    }
}

/// Does what can be done; gives back what needs a link that is not there.
fn apply(
    push: Push,
    engine: &mut Connection,
    links: &mut Links,
    sent: &mut Vec<(edgehub_broker::amqp::DeliveryId, String)>,
) -> Option<Push> {
    let find = |identity: &str, kind| {
        links.iter().find(|(of, is, id)| of == identity && *is == kind && engine.credit(*id) > 0).map(|l| l.2)
    };
    match push {
        Push::Desired(identity, patch) => {
            let Some(link) = find(identity, LinkKind::TwinAnswers) else { return Some(push) };
            let payload = MessageEncoder::default().data(Bytes::from_static(patch.as_bytes()));
            engine.send(link, payload, SendOptions::default()).unwrap();
        }
        Push::Call(identity, ref correlation, name, payload) => {
            let Some(link) = find(identity, LinkKind::MethodCalls) else { return Some(push) };
            let mut encoder = MessageEncoder::default();
            encoder
                .properties(&MessageProperties {
                    correlation_id: Some(correlation.clone()),
                    ..MessageProperties::default()
                })
                .application_strings([("IoThub-methodname", name)]);
            let payload = encoder.data(Bytes::from_static(payload.as_bytes()));
            engine.send(link, payload, SendOptions::default()).unwrap();
        }
        Push::ToDevice(identity, tag, body) => {
            let Some(link) = find(identity, LinkKind::CloudToDevice) else { return Some(push) };
            let mut encoder = MessageEncoder::default();
            encoder.annotations([("x-opt-sequence-number", Value::Ulong(9))]);
            encoder.properties(&MessageProperties {
                message_id: Some(MessageId::String("c2d-1".into())),
                ..MessageProperties::default()
            });
            encoder.application_strings([("level", "hot")]);
            let payload = encoder.data(Bytes::from_static(body.as_bytes()));
            let options = SendOptions { tag: Some(tag), ..SendOptions::default() };
            sent.push((engine.send(link, payload, options).unwrap(), identity.to_owned()));
        }
        Push::Detach(identity, kind) => {
            let Some(link) = links.iter().find(|(of, is, _)| of == identity && *is == kind).map(|l| l.2)
            else {
                return Some(push);
            };
            engine.detach(link, Some(Error::from(Condition::DETACH_FORCED)));
            links.retain(|(_, _, id)| *id != link);
        }
        Push::End(identity) => {
            let Some(link) = links.iter().find(|(of, _, _)| of == identity).map(|l| l.2) else {
                return Some(push);
            };
            engine.end(link.session(), None);
            links.retain(|(_, _, id)| id.session() != link.session());
        }
    }
    None
}

fn name(address: &LinkAddress) -> String {
    match address {
        LinkAddress::Cbs => "$cbs".into(),
        LinkAddress::Node { device_id, module_id: None, .. } => device_id.clone(),
        LinkAddress::Node { device_id, module_id: Some(module), .. } => format!("{device_id}/{module}"),
    }
}
