//! The protocol vectors of the MQTT head.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use edgehub_broker::backend::{CallId, Feature, HeadDrop};
use edgehub_broker::head::mqtt::ConnectionEnd;
use edgehub_broker::head::mqtt::frame::Frame;
use edgehub_broker::head::mqtt::packet::{self, Packet, Text};
use edgehub_broker::head::mqtt::session::feature;
use edgehub_broker::head::mqtt::topic::{self, Inbound, TopicError};
use edgehub_broker::head::mqtt::username::UserName;
use edgehub_broker::identity::Identity;
use edgehub_broker::message::{Message, Origin, Properties, PropertyName, Sender, SystemProperty};
use serde_json::Value;

use crate::mock::{Mock, connect_with};

fn vectors(name: &str) -> Vec<Value> {
    let path = format!("{}/tests/vectors/protocol/{name}.json", env!("CARGO_MANIFEST_DIR"));
    let file: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    file["vectors"].as_array().unwrap().clone()
}

fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

fn identity(of: &Value) -> Identity {
    match of["moduleId"].as_str() {
        None => Identity::device(of["deviceId"].as_str().unwrap()).unwrap(),
        Some(module) => Identity::module(of["deviceId"].as_str().unwrap(), module).unwrap(),
    }
}

#[tokio::test]
async fn codec() {
    for vector in vectors("mqtt_codec") {
        let (id, out) = (vector["id"].as_str().unwrap(), &vector["out"]);
        let bytes = hex(vector["in"]["bytes"].as_str().unwrap());
        if out["need"] == "more" {
            assert_eq!(Frame::take(&mut BytesMut::from(&bytes[..])), Ok(None), "{id}");
            continue;
        }
        if out["packet"].is_string() {
            let frame = Frame::take(&mut BytesMut::from(&bytes[..])).unwrap().unwrap();
            match packet::decode(frame).unwrap() {
                Packet::Connect(connect) => {
                    assert_eq!(connect.client_id.as_str(), out["clientId"], "{id}");
                    assert_eq!(connect.user_name.unwrap().as_str(), out["username"], "{id}");
                    assert_eq!(
                        connect.password.as_deref(),
                        out["password"].as_str().map(str::as_bytes),
                        "{id}"
                    );
                    assert_eq!(connect.clean_session, out["cleanSession"], "{id}");
                    assert_eq!(connect.keep_alive_secs, out["keepAlive"], "{id}");
                }
                Packet::Publish(publish) => {
                    assert_eq!(publish.topic.as_str(), out["topic"], "{id}");
                    assert_eq!(publish.payload, hex(out["payload"].as_str().unwrap()), "{id}");
                    assert_eq!(publish.dup, out["dup"], "{id}");
                    assert_eq!(publish.retain, out["retain"], "{id}");
                    assert_eq!(publish.packet_id.unwrap().get(), out["packetId"], "{id}");
                }
                other => panic!("{id}: {other:?}"),
            }
            continue;
        }
        let mock = Mock::default();
        let mut wire = match vector["in"]["state"].as_str().unwrap() {
            "new" => mock.open(),
            _ => mock.connected("d1").await,
        };
        wire.send(&bytes).await;
        let expected = hex(out["send"].as_str().unwrap());
        if out["close"] == true {
            let (sent, end) = wire.ended().await;
            assert_eq!(sent, expected, "{id}");
            if let Some(graceful) = out["graceful"].as_bool() {
                assert_eq!(end == ConnectionEnd::Disconnected, graceful, "{id}");
            }
        } else {
            wire.expect(&expected).await;
        }
    }
}

#[tokio::test]
async fn connect() {
    for vector in vectors("mqtt_connect") {
        let (id, input) = (vector["id"].as_str().unwrap(), &vector["in"]);
        let (client_id, user_name) =
            (input["clientId"].as_str().unwrap(), input["username"].as_str().unwrap());
        let mock = Mock::default();
        let mut wire = mock.open();
        wire.send(&connect_with(client_id, user_name, true, 0, None)).await;
        let code = vector["out"]["connack"].as_u64().unwrap_or(0) as u8;
        wire.expect(&[0x20, 2, 0, code]).await;
        let expected = &vector["out"]["identity"];
        if code > 0 {
            assert!(wire.ended().await.0.is_empty(), "{id}");
            assert!(mock.state.lock().logins.is_empty(), "{id}");
            continue;
        }
        let parsed = UserName::parse(user_name).unwrap();
        assert_eq!(parsed.auth_chain.as_deref(), expected["authChain"].as_str(), "{id}");
        let login = mock.state.lock().logins[0].clone();
        assert_eq!(login.identity, identity(expected), "{id}");
        assert_eq!(&*login.product_info, expected["deviceClientType"], "{id}");
        assert_eq!(login.model_id.as_deref(), expected["modelId"].as_str(), "{id}");
        let actor = login.auth_chain.as_deref().and_then(|chain| chain.rsplit(';').next());
        let actor = actor.map(|device| format!("{device}/$edgeHub"));
        assert_eq!(actor.as_deref(), expected["actor"].as_str(), "{id}");
    }
}

#[tokio::test]
async fn filters() {
    for vector in vectors("mqtt_filters") {
        let (id, input, out) = (vector["id"].as_str().unwrap(), &vector["in"], &vector["out"]);
        let identity = identity(input);
        let filter = input["filter"].as_str().unwrap();
        let mut wire = Mock::default().connected(&identity.to_string()).await;
        wire.send(&crate::mock::subscribe(7, &[(filter, input["qos"].as_u64().unwrap() as u8)])).await;
        if out["close"] == true {
            assert!(wire.ended().await.0.is_empty(), "{id}");
            continue;
        }
        wire.expect(&[0x90, 3, 0, 7, out["granted"].as_u64().unwrap() as u8]).await;
        let expected = match out["feature"].as_str().unwrap() {
            "c2d" => Some(Feature::CloudToDevice),
            "inputs" => Some(Feature::ModuleInputs),
            "methods" => Some(Feature::Methods),
            "desired" => Some(Feature::DesiredProperties),
            "twinResponses" => Some(Feature::TwinResponses),
            _ => None,
        };
        assert_eq!(feature(&identity, filter), expected, "{id}");
    }
}

#[test]
fn topics_in() {
    for vector in vectors("mqtt_topics_in") {
        let (id, out) = (vector["id"].as_str().unwrap(), &vector["out"]);
        let identity = identity(&vector["in"]);
        let topic = vector["in"]["topic"].as_str().unwrap();
        if out["reason"] == "badTopic" {
            let mut body = (topic.len() as u16).to_be_bytes().to_vec();
            body.extend(topic.as_bytes());
            let frame = Frame { first_byte: 0x30, body: body.into() };
            assert_eq!(packet::decode(frame), Err(packet::DecodeError::Topic), "{id}");
            continue;
        }
        let topic = Text::new(Bytes::copy_from_slice(topic.as_bytes())).unwrap();
        let inbound = topic::read(&identity, &topic, &[]);
        match out["kind"].as_str().unwrap() {
            "telemetry" => {
                let Inbound::Telemetry(properties) = inbound else { panic!("{id}: {inbound:?}") };
                let (mut system, mut application) = (BTreeMap::new(), BTreeMap::new());
                for property in properties.iter() {
                    match property.name {
                        PropertyName::System(name) => system.insert(name.name(), property.value),
                        PropertyName::Application(name) => application.insert(name, property.value),
                    };
                }
                assert_eq!(serde_json::to_value(system).unwrap(), out["system"], "{id}");
                assert_eq!(serde_json::to_value(application).unwrap(), out["properties"], "{id}");
                assert_eq!(identity.to_string(), out["sender"], "{id}");
            }
            "twinGet" => {
                assert_eq!(inbound, Inbound::TwinGet { request_id: out["rid"].as_str().unwrap() }, "{id}");
            }
            "twinPatch" => {
                assert_eq!(inbound, Inbound::TwinPatch { request_id: out["rid"].as_str() }, "{id}");
            }
            "methodResponse" => {
                let status = out["status"].as_i64().unwrap() as i32;
                let request_id = out["rid"].as_str().unwrap();
                assert_eq!(inbound, Inbound::MethodResponse { status, request_id }, "{id}");
            }
            "drop" => {
                let reason = match out["reason"].as_str().unwrap() {
                    "badProperties" => HeadDrop::BadProperties,
                    _ => HeadDrop::BadTopic,
                };
                assert_eq!(inbound, Inbound::Drop(reason), "{id}");
            }
            _ => {
                let error = match out["reason"].as_str().unwrap() {
                    "senderMismatch" => TopicError::SenderMismatch,
                    "badTwin" => TopicError::Twin,
                    other => panic!("{id}: {other}"),
                };
                assert_eq!(inbound, Inbound::Close(error), "{id}");
            }
        }
    }
}

#[test]
fn topics_out() {
    for vector in vectors("mqtt_topics_out") {
        let (id, input, out) = (vector["id"].as_str().unwrap(), &vector["in"], &vector["out"]);
        let text = |of: &Value, name: &str| of[name].as_str().map(str::to_owned);
        let system = &input["system"];
        let properties = |of: &Value| {
            let pairs = |map: &Value| -> Vec<(String, String)> {
                let map = map.as_object().cloned().unwrap_or_default();
                map.into_iter().map(|(name, value)| (name, value.as_str().unwrap().to_owned())).collect()
            };
            let (system, application) = (pairs(&of["system"]), pairs(&of["properties"]));
            let known = |name: &str| SystemProperty::ALL.iter().find(|known| known.name() == name).copied();
            let application =
                application.iter().map(|(name, value)| (PropertyName::Application(name), &**value));
            let system = system.iter().filter_map(|(name, value)| {
                known(name).map(|property| (PropertyName::System(property), value.as_str()))
            });
            Properties::copied_from(application.chain(system))
        };
        let mut written = Vec::new();
        let start = match input["kind"].as_str().unwrap() {
            "twinResponse" => {
                let status = input["status"].as_u64().unwrap() as u16;
                let topic = topic::twin_response(status, input["rid"].as_str().unwrap(), None);
                assert_eq!(topic, out["topic"], "{id}");
                continue;
            }
            "input" => {
                let device = text(system, "connectionDeviceId").unwrap();
                let sender = match text(system, "connectionModuleId") {
                    None => Identity::device(&device).unwrap(),
                    Some(module) => Identity::module(&device, &module).unwrap(),
                };
                let sender = Arc::new(Sender { identity: sender, origin: Origin::Internal, model_id: None });
                let message = Message::new(sender, properties(input), Bytes::new());
                let input_name = input["inputName"].as_str().unwrap();
                topic::write_input(&mut written, &identity(input), input_name, &message);
                let base = out["base"].as_str().unwrap();
                assert!(written.starts_with(base.as_bytes()), "{id}");
                base.len()
            }
            "c2d" => {
                let identity = identity(input);
                let sender = Sender { identity: identity.clone(), origin: Origin::Internal, model_id: None };
                let message = Message::new(Arc::new(sender), properties(input), Bytes::new());
                topic::write_device_bound(&mut written, identity.device_id(), &message);
                let base = out["base"].as_str().unwrap();
                assert!(written.starts_with(base.as_bytes()), "{id}");
                base.len()
            }
            "desired" => {
                assert_eq!(topic::desired(input["version"].as_u64().unwrap()), out["topic"], "{id}");
                continue;
            }
            "methodCall" => {
                let call: CallId = input["correlationId"].as_str().unwrap().parse().unwrap();
                let topic = topic::method_call(input["name"].as_str().unwrap(), call).unwrap();
                assert_eq!(topic, out["topic"], "{id}");
                continue;
            }
            other => panic!("{id}: {other}"),
        };
        let written = String::from_utf8(written[start..].to_vec()).unwrap();
        let mut parts: Vec<&str> = written.split('&').collect();
        let strings = |list: &Value| -> Vec<String> {
            list.as_array().unwrap().iter().map(|part| part.as_str().unwrap().to_owned()).collect()
        };
        let (expected_system, expected_user) = (strings(&out["system"]), strings(&out["user"]));
        let (system, user) = parts.split_at_mut(expected_system.len());
        system.sort_unstable();
        user.sort_unstable();
        assert_eq!(system, expected_system, "{id}");
        assert_eq!(user, expected_user, "{id}");
    }
}
