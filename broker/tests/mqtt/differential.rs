//! What our decoder accepts, an independent one accepts with equal fields.

use bytes::BytesMut;
use edgehub_broker::head::mqtt::frame::{Frame, PACKET_BYTES_MAX};
use edgehub_broker::head::mqtt::packet::{self, Packet, QoS, Text};
use mqttbytes::v4;
use proptest::prelude::*;

use crate::mock;

fn a_packet() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        ("[a-z/]{0,12}", any::<bool>(), any::<u16>(), proptest::option::of(("[a-z]{1,5}", ".{0,9}")))
            .prop_map(|(id, clean, secs, will)| {
                let will = will.as_ref().map(|(topic, payload)| (topic.as_str(), payload.as_str()));
                mock::connect_with(&id, "u", clean, secs, will)
            }),
        ("[a-zé/$]{1,20}", any::<u16>(), proptest::collection::vec(any::<u8>(), 0..40))
            .prop_map(|(topic, id, payload)| mock::publish(&topic, id, &payload)),
        ("[a-z/]{1,9}/(\\+|#)", any::<u16>(), 0..4u8)
            .prop_map(|(filter, id, qos)| mock::subscribe(id, &[(&filter, qos), ("a", 1)])),
        any::<u16>().prop_map(|id| mock::packet(0x40, &id.to_be_bytes())),
        any::<u16>().prop_map(|id| mock::packet(0xa2, &[&id.to_be_bytes()[..], b"\x00\x01a"].concat())),
        Just(vec![0xc0, 0]),
        Just(vec![0xe0, 0]),
    ]
}

fn qos(of: mqttbytes::QoS) -> QoS {
    match of {
        mqttbytes::QoS::AtMostOnce => QoS::AtMostOnce,
        mqttbytes::QoS::AtLeastOnce | mqttbytes::QoS::ExactlyOnce => QoS::AtLeastOnce,
    }
}

fn compare(bytes: &[u8]) -> Result<bool, TestCaseError> {
    let mut buffer = BytesMut::from(bytes);
    let Ok(Some(frame)) = Frame::take(&mut buffer) else { return Ok(false) };
    let Ok(ours) = packet::decode(frame) else { return Ok(false) };
    if let Packet::Connect(connect) = &ours
        && connect.password.as_ref().is_some_and(|password| std::str::from_utf8(password).is_err())
    {
        // A password may be binary; the other decoder wants text.
        return Ok(false);
    }
    let mut theirs_buffer = BytesMut::from(bytes);
    let theirs = v4::read(&mut theirs_buffer, PACKET_BYTES_MAX);
    prop_assert!(theirs.is_ok(), "{ours:?} {theirs:?}");
    prop_assert_eq!(&theirs_buffer, &buffer);
    match (ours, theirs.unwrap()) {
        (Packet::Connect(ours), v4::Packet::Connect(theirs)) => {
            prop_assert_eq!(ours.client_id.as_str(), theirs.client_id);
            prop_assert_eq!(ours.clean_session, theirs.clean_session);
            prop_assert_eq!(ours.keep_alive_secs, theirs.keep_alive);
            let (user, password) =
                theirs.login.map(|login| (login.username, login.password)).unwrap_or_default();
            prop_assert_eq!(ours.user_name.as_ref().map(Text::as_str).unwrap_or_default(), user);
            prop_assert_eq!(ours.password.unwrap_or_default(), password);
            prop_assert_eq!(ours.will.is_some(), theirs.last_will.is_some());
            if let (Some(ours), Some(theirs)) = (ours.will, theirs.last_will) {
                prop_assert_eq!(ours.topic.as_str(), theirs.topic);
                prop_assert_eq!(ours.payload, theirs.message);
                prop_assert_eq!((ours.qos, ours.retain), (qos(theirs.qos), theirs.retain));
            }
        }
        (Packet::Publish(ours), v4::Packet::Publish(theirs)) => {
            prop_assert_eq!(ours.topic.as_str(), theirs.topic);
            prop_assert_eq!(ours.payload, theirs.payload);
            prop_assert_eq!(ours.packet_id.map_or(0, |id| id.get()), theirs.pkid);
            prop_assert_eq!((ours.dup, ours.retain), (theirs.dup, theirs.retain));
        }
        (Packet::PubAck(ours), v4::Packet::PubAck(theirs)) => prop_assert_eq!(ours.get(), theirs.pkid),
        (Packet::Subscribe { packet_id, filters }, v4::Packet::Subscribe(theirs)) => {
            prop_assert_eq!(packet_id.get(), theirs.pkid);
            let ours: Vec<_> = filters.iter().map(|(filter, qos)| (filter.as_str(), *qos)).collect();
            let theirs: Vec<_> = theirs.filters.iter().map(|one| (one.path.as_str(), qos(one.qos))).collect();
            prop_assert_eq!(ours, theirs);
        }
        (Packet::Unsubscribe { packet_id, filters }, v4::Packet::Unsubscribe(theirs)) => {
            prop_assert_eq!(packet_id.get(), theirs.pkid);
            prop_assert_eq!(filters.iter().map(Text::as_str).collect::<Vec<_>>(), theirs.topics);
        }
        (Packet::PingReq, v4::Packet::PingReq) | (Packet::Disconnect, v4::Packet::Disconnect) => {}
        (ours, theirs) => prop_assert!(false, "{:?} {:?}", ours, theirs),
    }
    Ok(true)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    #[test]
    fn packets_and_their_mutations(
        packet in a_packet(),
        mutations in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..3),
    ) {
        let mut packet = packet;
        for (index, byte) in mutations {
            let at = index.index(packet.len());
            packet[at] = byte;
        }
        compare(&packet)?;
    }

    #[test]
    fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
        compare(&bytes)?;
    }
}
