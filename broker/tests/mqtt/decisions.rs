//! What a CONNECT is answered, row by row, and which ends publish the will.

use std::time::Duration;

use bytes::Bytes;
use edgehub_broker::backend::{CloseReason, Command, LoginError};
use edgehub_broker::head::anteroom::Anteroom;
use edgehub_broker::head::mqtt::{ConnectionEnd, MqttLimits, refuse};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::mock::{self, Mock, State, connect_with, packet, publish, subscribe};

/// A CONNECT of these parts; a part that is absent is left out with its flag.
fn connect(level: u8, client_id: &str, user_name: Option<&str>, password: Option<&str>) -> Vec<u8> {
    let mut body = b"\x00\x04MQTT".to_vec();
    body.extend([
        level,
        0x02 | u8::from(user_name.is_some()) << 7 | u8::from(password.is_some()) << 6,
        0,
        60,
    ]);
    for text in [Some(client_id), user_name, password].into_iter().flatten() {
        body.extend((text.len() as u16).to_be_bytes());
        body.extend(text.as_bytes());
    }
    packet(0x10, &body)
}

#[tokio::test]
async fn the_decision_table() {
    const USER: Option<&str> = Some("h/d1/?api-version=1");
    const TOKEN: Option<&str> = Some("token");
    const CHAIN: Option<&str> = Some("h/d1/?api-version=1&auth-chain=d2%3Bchild");
    let nothing = |_: &mut State| {};
    let refusing = |state: &mut State| state.refuse = Some(LoginError::Refused("bad token".into()));
    let full = |state: &mut State| state.refuse = Some(LoginError::Unavailable("too many clients".into()));
    type Prepare<'a> = &'a dyn Fn(&mut State);
    type Row<'a> = (u8, Vec<u8>, bool, bool, Prepare<'a>, u8, bool);
    // Row of the table, CONNECT, whether a certificate is shown and taken, the backend, the code, whether it was asked.
    let rows: [Row<'_>; 18] = [
        (1, connect(3, "d1", USER, TOKEN), false, true, &nothing, 1, false),
        (1, connect(5, "", None, None), false, true, &nothing, 1, false),
        (2, connect(4, "d1", None, None), false, true, &nothing, 3, false),
        (2, connect(4, "d1", Some(" "), TOKEN), false, true, &nothing, 3, false),
        (2, connect(4, "", USER, TOKEN), false, true, &nothing, 3, false),
        (3, connect(4, "d1", Some("h/d1"), TOKEN), false, true, &nothing, 3, false),
        // A name that does not parse comes before every question of credentials.
        (3, connect(4, "d1", Some("h/d1/?x=1"), None), true, false, &nothing, 3, false),
        (4, connect(4, "d1", USER, None), true, false, &nothing, 5, false),
        (4, connect(4, "d1", USER, Some("")), true, false, &nothing, 5, false),
        (5, connect(4, "d1", USER, None), false, true, &nothing, 5, false),
        (6, connect(4, "D1", USER, TOKEN), false, true, &nothing, 5, false),
        (6, connect(4, "d1/m", USER, TOKEN), false, true, &nothing, 5, false),
        (7, connect(4, "d1", USER, TOKEN), false, true, &refusing, 5, true),
        (7, connect(4, "d1/m", Some("h/d1/m/?api-version=1"), None), true, true, &nothing, 5, false),
        (8, connect(4, "d1", CHAIN, TOKEN), false, true, &nothing, 5, false),
        (9, connect(4, "d1", USER, TOKEN), false, true, &full, 3, true),
        (11, connect(4, "d1", USER, None), true, true, &nothing, 0, true),
        (11, connect(4, "d1", USER, TOKEN), true, false, &nothing, 0, true),
    ];
    for (row, bytes, shows, takes, prepare, code, asked) in rows {
        let mock = Mock::default();
        prepare(&mut mock.state.lock());
        let certificates = if shows { vec![Bytes::from_static(b"der")] } else { Vec::new() };
        let limits = MqttLimits { certificate_authentication: takes, ..MqttLimits::default() };
        let mut wire = mock.open_with(4_096, certificates, limits);
        wire.send(&bytes).await;
        wire.expect(&[0x20, 2, 0, code]).await;
        assert_eq!(mock.state.lock().logins.len(), usize::from(asked), "row {row}");
        if code != 0 {
            let (rest, end) = wire.ended().await;
            assert!(rest.is_empty() && matches!(end, ConnectionEnd::Refused(_)), "row {row}: {end:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_login_that_does_not_end_is_unavailable() {
    let mock = Mock::default();
    let (_never, held) = oneshot::channel();
    mock.state.lock().hold_login = Some(held);
    let mut wire = mock.open();
    let start = Instant::now();
    // What is pipelined behind it is not handled.
    wire.send(
        &[connect_with("d1", "h/d1/?api-version=1", false, 60, None), subscribe(1, &[("x", 1)])].concat(),
    )
    .await;
    let (sent, end) = wire.ended().await;
    assert_eq!(sent, [0x20, 2, 0, 3]);
    assert!(matches!(end, ConnectionEnd::Refused(_)));
    assert_eq!(start.elapsed().as_secs(), MqttLimits::default().login_max.as_secs());
}

#[tokio::test(start_paused = true)]
async fn input_before_the_login_is_bounded_in_bytes_and_time() {
    let mock = Mock::default();
    let (_never, held) = oneshot::channel();
    mock.state.lock().hold_login = Some(held);
    let mut wire = mock.open_with(1_024, Vec::new(), MqttLimits::default());
    wire.send(&connect_with("d1", "h/d1/?api-version=1", false, 60, None)).await;
    let chunk = publish("devices/d1/messages/events/", 0, &[0; 10_000]);
    let mut taken = 0;
    while tokio::time::timeout(Duration::from_secs(1), wire.stream.write_all(&chunk)).await.is_ok() {
        taken += chunk.len();
        assert!(taken < 400_000, "nothing bounds what is read ahead");
    }
    assert!(taken > 200_000, "{taken}");
    // A CONNECT that comes in drops has as long as one that does not come.
    let mock = Mock::default();
    let mut wire = mock.open();
    let start = Instant::now();
    for byte in connect_with("d1", "h/d1/?api-version=1", false, 60, None) {
        if wire.stream.write_all(&[byte]).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
    assert_eq!(wire.ended().await, (Vec::new(), ConnectionEnd::ConnectTimeout));
    assert!((60..70).contains(&start.elapsed().as_secs()));
}

#[tokio::test(start_paused = true)]
async fn which_ends_publish_the_will() {
    let will = Some(("devices/d1/messages/events/", "gone"));
    for (what, published) in [
        ("disconnect", 0),
        ("stopping", 0),
        ("lost", 1),
        ("silent", 1),
        ("broken protocol", 1),
        ("taken over", 1),
        ("unauthorized", 1),
    ] {
        let mock = Mock::default();
        let mut wire = mock.open();
        wire.send(&connect_with("d1", "h/d1/?api-version=1", true, 10, will)).await;
        wire.expect(&[0x20, 2, 0, 0]).await;
        match what {
            "disconnect" => wire.send(&[0xe0, 0]).await,
            "lost" => wire.stream.shutdown().await.unwrap(),
            "broken protocol" => wire.send(&[0xff, 0]).await,
            "taken over" => mock.command("d1", Command::Close(CloseReason::TakenOver)).await,
            "unauthorized" => mock.command("d1", Command::Close(CloseReason::Unauthorized)).await,
            "stopping" => mock.command("d1", Command::Close(CloseReason::Stopping)).await,
            _ => {}
        }
        let (_, end) = wire.ended().await;
        assert_eq!(mock.state.lock().published.len(), published, "{what}: {end:?}");
    }
}

#[tokio::test]
async fn who_may_be_nobody_is_refused_whatever_the_password() {
    for (bytes, answer) in [
        (connect(4, "d1", Some("h/d1/?api-version=1"), Some("token")), &[0x20, 2, 0, 5][..]),
        (connect(5, "d1", None, None), &[0x20, 2, 0, 1]),
        (publish("x", 1, b""), &[]),
    ] {
        let (mut near, far) = tokio::io::duplex(1_024);
        let peer = edgehub_broker::head::mqtt::Peer {
            address: None,
            certificates: Vec::new(),
            accepted_at: Instant::now(),
        };
        let refusing =
            tokio::spawn(async move { refuse(far, &MqttLimits::default(), &peer, "for a test").await });
        near.write_all(&bytes).await.unwrap();
        let mut sent = Vec::new();
        near.read_to_end(&mut sent).await.unwrap();
        assert_eq!(sent, answer);
        drop(near);
        refusing.await.unwrap();
    }
}

#[tokio::test]
async fn who_waits_longest_without_connect_makes_room_for_others() {
    let mock = Mock::default();
    let limits = MqttLimits { anteroom: Anteroom::new(2), ..MqttLimits::default() };
    let open = || mock.open_with(1_024, Vec::new(), limits.clone());
    let first = open();
    // It has begun to speak, which is not enough.
    let mut second = open();
    second.send(&mock::connect("d1", true, 60)[..20]).await;
    let mut third = open();
    assert_eq!(first.ended().await, (Vec::new(), ConnectionEnd::Crowded));
    third.send(&mock::connect("d2", true, 60)).await;
    third.expect(&[0x20, 2, 0, 0]).await;
    // Those that are logged in take no place.
    let _fourth = open();
    second.send(&mock::connect("d1", true, 60)[20..]).await;
    second.expect(&[0x20, 2, 0, 0]).await;
}
