//! The protocol vectors for link addresses, put-token requests and message values.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use edgehub_broker::amqp::*;
use edgehub_broker::identity::SasToken;
use serde_json::Value as Json;

fn vectors(text: &str) -> Vec<Json> {
    let file: Json = serde_json::from_str(text).expect("vector file is JSON");
    file["vectors"].as_array().expect("has vectors").clone()
}

fn text(json: &Json) -> String {
    json.as_str().unwrap_or_else(|| panic!("{json} is no text")).to_owned()
}

/// A typed AMQP value of a vector.
fn amqp(json: &Json) -> Value {
    let value = &json["value"];
    match json["type"].as_str().expect("typed") {
        "null" => Value::Null,
        "boolean" => Value::Bool(value.as_bool().expect("boolean")),
        "ubyte" => Value::Ubyte(value.as_u64().expect("number") as u8),
        "int" => Value::Int(value.as_i64().expect("number") as i32),
        "uint" => Value::Uint(value.as_u64().expect("number") as u32),
        "long" => Value::Long(value.as_i64().expect("number")),
        "ulong" => Value::Ulong(value.as_u64().expect("number")),
        "double" => Value::Double(value.as_f64().expect("number")),
        "timestamp" => Value::TimestampMillis(value.as_i64().expect("number")),
        "uuid" => match MessageId::uuid_or_string(&text(value)) {
            MessageId::Uuid(bytes) => Value::Uuid(bytes),
            other => panic!("{other}"),
        },
        "binary" => Value::Binary(STANDARD.decode(text(value)).expect("Base64").into()),
        "string" => Value::String(text(value).into()),
        "symbol" => Value::Symbol(text(value).into()),
        other => panic!("type {other}"),
    }
}

fn message_id(json: &Json) -> Option<MessageId> {
    match amqp(json) {
        Value::Null => None,
        Value::String(text) => Some(MessageId::String(text)),
        Value::Uuid(bytes) => Some(MessageId::Uuid(bytes)),
        Value::Ulong(number) => Some(MessageId::Ulong(number)),
        Value::Binary(bytes) => Some(MessageId::Binary(bytes)),
        other => panic!("{other:?} is no id"),
    }
}

fn entries(map: &Json) -> Vec<(String, Value)> {
    map.as_object().expect("map").iter().map(|(key, value)| (key.clone(), amqp(value))).collect()
}

fn parse(payload: Payload) -> Message {
    Message::parse(&Bytes::from(payload.concat())).expect("legal")
}

#[test]
fn link_addresses() {
    for vector in vectors(include_str!("vectors/amqp_links.json")) {
        let (id, input, output) = (text(&vector["id"]), &vector["in"], &vector["out"]);
        let role = if input["clientRole"] == "sender" { Role::Sender } else { Role::Receiver };
        let result = LinkAddress::parse(&text(&input["address"]), role);
        if let Some(condition) = output["error"].as_str() {
            assert_eq!(condition, Condition::NOT_ALLOWED.as_str());
            assert!(result.is_err(), "{id}: {result:?}");
            continue;
        }
        let address = result.unwrap_or_else(|error| panic!("{id}: {error}"));
        let kind = match address.kind() {
            LinkKind::Cbs => "cbs",
            LinkKind::Telemetry => "telemetry",
            LinkKind::Inputs => "inputs",
            LinkKind::CloudToDevice => "c2d",
            LinkKind::MethodCalls => "methodCalls",
            LinkKind::MethodResponses => "methodResponses",
            LinkKind::TwinRequests => "twinRequests",
            LinkKind::TwinAnswers => "twinAnswers",
        };
        assert_eq!(kind, output["kind"], "{id}");
        let ids = match &address {
            LinkAddress::Cbs => (None, None),
            LinkAddress::Node { device_id, module_id, .. } => {
                (Some(device_id.as_str()), module_id.as_deref())
            }
        };
        assert_eq!(ids, (output["deviceId"].as_str(), output["moduleId"].as_str()), "{id}");

        for asked in [None, Some(SenderSettle::Settled), Some(SenderSettle::Unsettled)] {
            let attach = Attach {
                name: "l".into(),
                handle: 0,
                role,
                snd_settle: asked,
                rcv_settle: None,
                source: None,
                target: None,
                initial_delivery_count: None,
                max_message_bytes: None,
                properties: Vec::new(),
            };
            let expected_sender = match text(&output["hubSndSettle"]).as_str() {
                "peer" => asked,
                "settled" => Some(SenderSettle::Settled),
                "unsettled" => None,
                other => panic!("{other}"),
            };
            let expected_receiver = match text(&output["hubRcvSettle"]).as_str() {
                "first" => ReceiverSettle::First,
                "second" => ReceiverSettle::Second,
                other => panic!("{other}"),
            };
            assert_eq!(
                address.kind().settle_modes(&attach),
                (expected_sender, Some(expected_receiver)),
                "{id}"
            );
        }
        // What the address names can be dialled again.
        assert_eq!(LinkAddress::parse(&address.to_uri("gw1"), role), Ok(address), "{id}");
    }
}

#[test]
fn put_token_requests() {
    for vector in vectors(include_str!("vectors/amqp_cbs.json")) {
        let (id, input, output) = (text(&vector["id"]), &vector["in"], &vector["out"]);
        let application = entries(&input["application"]);
        let mut encoder = MessageEncoder::default();
        encoder
            .properties(&MessageProperties {
                message_id: message_id(&input["messageId"]),
                ..Default::default()
            })
            .application_values(application.iter().map(|(key, value)| (key.as_str(), value.clone())));
        let (correlation_id, request) = PutToken::decode(&parse(encoder.value(&amqp(&input["body"]))));
        assert_eq!(correlation_id, message_id(&output["correlationId"]), "{id}");
        // The token's own faults (expiry, audience) are found by whoever parses tokens.
        let malformed_request = ("AC-008"..="AC-014").contains(&id.as_str());
        let token = request.as_ref().ok().map(|request| request.token.expose().to_owned());
        match request {
            Ok(request) => {
                assert!(!malformed_request, "{id}");
                assert_eq!(request.token.expose(), input["body"]["value"], "{id}");
                assert_eq!(&*request.name, "hub1.example.net/devices/d1");
            }
            Err(error) => {
                assert!(malformed_request, "{id}: {error}");
                assert_eq!(output["statusCode"]["value"], 400);
            }
        }
        let status_code = output["statusCode"]["value"].as_i64().expect("number") as i32;
        if let Some(token) = token {
            let now_secs = input["now"].as_i64().expect("number");
            let named = SasToken::parse(&token, now_secs).map(|token| token.identities()).unwrap_or_default();
            let named: Vec<String> = named.iter().map(ToString::to_string).collect();
            match output["identity"].as_str() {
                Some(identity) => assert!(named.iter().any(|name| name == identity), "{id}: {named:?}"),
                None => assert!(named.is_empty(), "{id}: {named:?}"),
            }
            assert_eq!(status_code, if named.is_empty() { 400 } else { 200 }, "{id}");
        }
        let response = CbsResponse { correlation_id, status_code, description: "OK".into() };
        let message = parse(response.encode());
        assert_eq!(message.application_property("status-code"), Ok(Some(Value::Int(status_code))), "{id}");
        assert_eq!(CbsResponse::decode(&message).as_ref(), Ok(&response), "{id}");
    }
    let ours = parse(PutToken::encode(MessageId::Ulong(1), "hub/devices/d", "token", 1_700_000_000_000));
    let (id, request) = PutToken::decode(&ours);
    assert_eq!((id, request.expect("legal").token.expose()), (Some(MessageId::Ulong(1)), "token"));
}

#[test]
fn message_values() {
    for vector in vectors(include_str!("vectors/amqp_messages_in.json")) {
        let (id, message, output) = (text(&vector["id"]), &vector["in"]["message"], &vector["out"]);
        let properties = &message["properties"];
        let field = |name: &str| properties.get(name).map(amqp).unwrap_or(Value::Null);
        let field_text = |name: &str| field(name).as_text().cloned();
        let (annotations, application) = (entries(&message["annotations"]), entries(&message["application"]));
        let mut encoder = MessageEncoder::default();
        encoder
            .annotations(annotations.iter().map(|(key, value)| (key.as_str(), value.clone())))
            .properties(&MessageProperties {
                message_id: properties.get("message-id").and_then(message_id),
                correlation_id: properties.get("correlation-id").and_then(message_id),
                to: field_text("to"),
                user_id: match field("user-id") {
                    Value::Binary(bytes) => Some(bytes),
                    _ => None,
                },
                content_type: field_text("content-type"),
                content_encoding: field_text("content-encoding"),
                absolute_expiry_time_millis: match field("absolute-expiry-time") {
                    Value::TimestampMillis(millis) => Some(millis),
                    _ => None,
                },
                ..Default::default()
            })
            .application_values(application.iter().map(|(key, value)| (key.as_str(), value.clone())));
        let mut payload = encoder.no_body().concat();
        for data in message["data"].as_array().expect("sections") {
            let data = STANDARD.decode(text(data)).expect("Base64");
            payload.extend(MessageEncoder::default().data(data.into()).concat());
        }
        let parsed = Message::parse(&payload.into()).expect("legal");
        let body = STANDARD.decode(text(&output["body"])).expect("Base64");
        assert_eq!(parsed.body.data().as_deref(), Some(&body[..]), "{id}");

        // Values come back with their types …
        for (key, value) in annotations {
            assert_eq!(parsed.annotation(&key), Ok(Some(value)), "{id}");
        }
        for (key, value) in application {
            let found = parsed.application_property(&key).expect("legal").expect("kept");
            assert_eq!(found, value, "{id}");
            // … and have the text form that the hub keeps.
            if let Some(expected) = output["properties"].get(&key) {
                assert_eq!(property_text(&found).as_deref(), expected.as_str(), "{id} {key}");
            }
        }
        let read = parsed.properties().expect("legal");
        let system = &output["system"];
        let non_empty = |id: Option<MessageId>| id.map(|id| id.to_string()).filter(|text| !text.is_empty());
        assert_eq!(non_empty(read.message_id).as_deref(), system["messageId"].as_str(), "{id}");
        assert_eq!(non_empty(read.correlation_id).as_deref(), system["cid"].as_str(), "{id}");
        assert_eq!(read.content_type.as_deref(), system["contentType"].as_str(), "{id}");
        let expiry = read.absolute_expiry_time_millis.and_then(timestamp_text);
        assert_eq!(expiry.as_deref(), system["absolute-expiry-time"].as_str(), "{id}");
        let user = read.user_id.map(|bytes| String::from_utf8(bytes.to_vec()).expect("UTF-8"));
        assert_eq!(user.as_deref(), system["userId"].as_str(), "{id}");
    }
}

#[test]
fn delivery_tags_of_lock_tokens() {
    for vector in vectors(include_str!("vectors/amqp_messages_out.json")) {
        let Some(hex) = vector["out"]["deliveryTag"]["hex"].as_str() else { continue };
        let token = text(&vector["in"]["system"]["lockToken"]);
        let tag = lock_token_tag(&token).expect("GUID");
        assert_eq!(tag.map(|byte| format!("{byte:02x}")).concat(), hex);
        assert_eq!(tag_lock_token(tag), token);
    }
    assert_eq!(lock_token_tag("t"), None);
    let uuid = MessageId::uuid_or_string("6F9619FF-8B86-D011-B42D-00C04FC964FF");
    assert!(uuid.is_same(&MessageId::String("6f9619ff-8b86-d011-b42d-00c04fc964ff".into())));
}
