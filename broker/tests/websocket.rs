//! The byte stream inside a WebSocket, against a client of the same library and against raw frames.

// The lint spares test functions only; everything here is test code.
#![allow(clippy::unwrap_used)]

use edgehub_broker::head::websocket::{MESSAGE_BYTES_MAX, WebSocketBytes, accept_key};
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::Role;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Bytes, Message};

const MASK: [u8; 4] = [1, 2, 3, 4];

async fn server(pipe_bytes: usize) -> (DuplexStream, WebSocketBytes<DuplexStream>) {
    let (near, far) = tokio::io::duplex(pipe_bytes);
    (near, WebSocketBytes::accepted(far, Vec::new()).await)
}

async fn pair() -> (WebSocketStream<DuplexStream>, WebSocketBytes<DuplexStream>) {
    let (near, server) = server(65_536).await;
    (WebSocketStream::from_raw_socket(near, Role::Client, None).await, server)
}

/// A frame as a client sends it.
fn frame(first_byte: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = vec![first_byte];
    match payload.len() {
        len @ 0..=125 => out.push(0x80 | len as u8),
        len @ 126..=65_535 => {
            out.push(0x80 | 126);
            out.extend((len as u16).to_be_bytes());
        }
        len => {
            out.push(0x80 | 127);
            out.extend((len as u64).to_be_bytes());
        }
    }
    out.extend(MASK);
    out.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    out
}

async fn read(server: &mut WebSocketBytes<DuplexStream>, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    server.read_exact(&mut bytes).await.unwrap();
    bytes
}

#[test]
fn the_answer_to_a_key_is_that_of_the_standard() {
    assert_eq!(accept_key(b"dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
}

#[tokio::test]
async fn borders_of_messages_have_no_meaning() {
    let (mut client, mut server) = pair().await;
    for part in [&b"one"[..], b"", b"two", b"three"] {
        client.send(Message::Binary(Bytes::copy_from_slice(part))).await.unwrap();
    }
    assert_eq!(read(&mut server, 11).await, b"onetwothree");
    // A message larger than the reader's buffer comes in pieces.
    client.send(Message::Binary(Bytes::from(vec![7; 10_000]))).await.unwrap();
    assert_eq!(read(&mut server, 3).await, [7; 3]);
    assert_eq!(read(&mut server, 9_997).await, [7; 9_997]);
    server.write_all(b"back").await.unwrap();
    server.flush().await.unwrap();
    assert_eq!(client.next().await.unwrap().unwrap(), Message::Binary(Bytes::from_static(b"back")));
}

#[tokio::test]
async fn fragments_join_with_control_frames_between_them() {
    let (mut raw, mut server) = server(65_536).await;
    let frames = [frame(0x02, b"ab"), frame(0x89, b"hi"), frame(0x00, b"cd"), frame(0x80, b"ef")].concat();
    for byte in frames {
        raw.write_all(&[byte]).await.unwrap();
    }
    assert_eq!(read(&mut server, 6).await, b"abcdef");
    let mut pong = [0; 4];
    raw.read_exact(&mut pong).await.unwrap();
    assert_eq!(&pong, b"\x8a\x02hi", "a ping is answered; the server sends none");
}

#[tokio::test]
async fn what_came_behind_the_request_is_read_first() {
    let (near, far) = tokio::io::duplex(1_024);
    let mut server = WebSocketBytes::accepted(far, frame(0x82, b"early")).await;
    let mut near = near;
    near.write_all(&frame(0x82, b"late")).await.unwrap();
    assert_eq!(read(&mut server, 9).await, b"earlylate");
}

#[tokio::test]
async fn violations_end_the_stream_with_their_code() {
    let large = |first: u8| frame(first, &vec![0; MESSAGE_BYTES_MAX / 2 + 1]);
    for (name, bytes, code) in [
        ("text", frame(0x81, b"text"), CloseCode::Unsupported),
        ("no utf-8", frame(0x81, b"\xff"), CloseCode::Invalid),
        ("no mask", vec![0x82, 1, b'x'], CloseCode::Protocol),
        ("reserved bit", frame(0xc2, b"x"), CloseCode::Protocol),
        ("reserved opcode", frame(0x83, b"x"), CloseCode::Protocol),
        ("continuation of nothing", frame(0x80, b"x"), CloseCode::Protocol),
        ("new message in a message", [frame(0x02, b"x"), frame(0x82, b"y")].concat(), CloseCode::Protocol),
        ("ping in fragments", frame(0x09, b"x"), CloseCode::Protocol),
        ("long ping", frame(0x89, &[0; 126]), CloseCode::Protocol),
        ("long message", [large(0x02), large(0x80)].concat(), CloseCode::Size),
        // Only the head of the frame is there: it is not waited for.
        ("long frame", frame(0x82, &vec![0; MESSAGE_BYTES_MAX + 1])[..20].to_vec(), CloseCode::Size),
        (
            "endless frame",
            b"\x82\xff\x7f\xff\xff\xff\xff\xff\xff\xff\x01\x02\x03\x04".to_vec(),
            CloseCode::Size,
        ),
    ] {
        let (mut raw, mut server) = server(2 * MESSAGE_BYTES_MAX).await;
        raw.write_all(&bytes).await.unwrap();
        let mut rest = Vec::new();
        server.read_to_end(&mut rest).await.unwrap();
        server.shutdown().await.unwrap();
        let mut answer = Vec::new();
        raw.read_to_end(&mut answer).await.unwrap();
        assert_eq!((answer[0], &answer[2..4]), (0x88, &u16::from(code).to_be_bytes()[..]), "{name}");
    }
}

#[tokio::test]
async fn the_close_handshake_from_the_client() {
    let (mut raw, mut server) = server(1_024).await;
    raw.write_all(&[frame(0x82, b"last"), frame(0x88, &1_000u16.to_be_bytes())].concat()).await.unwrap();
    let mut rest = Vec::new();
    server.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"last");
    assert!(server.write_all(b"too late").await.is_err());
    // The server ends the connection by itself.
    let mut answer = Vec::new();
    raw.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"\x88\x02\x03\xe8");
}

#[tokio::test]
async fn the_close_handshake_from_the_server() {
    let (mut raw, mut server) = server(1_024).await;
    server.write_all(b"last").await.unwrap();
    server.shutdown().await.unwrap();
    let mut sent = [0; 10];
    raw.read_exact(&mut sent).await.unwrap();
    assert_eq!(&sent, b"\x82\x04last\x88\x02\x03\xe8");
    raw.write_all(&[frame(0x82, b"still"), frame(0x88, &1_000u16.to_be_bytes())].concat()).await.unwrap();
    let mut rest = Vec::new();
    server.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"still");
    assert_eq!(raw.read(&mut sent).await.unwrap(), 0, "the server has shut the socket down");
}

#[tokio::test]
async fn a_lost_connection_is_an_end() {
    let (raw, mut server) = server(1_024).await;
    drop(raw);
    let mut rest = Vec::new();
    server.read_to_end(&mut rest).await.unwrap();
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_the_writer_back() {
    let (mut raw, mut server) = server(1_024).await;
    let mut taken = 0;
    let chunk = [5; 10_000];
    while let Ok(count) =
        tokio::time::timeout(std::time::Duration::from_millis(200), server.write(&chunk)).await
    {
        taken += count.unwrap();
        assert!(taken < 200_000, "nothing bounds what waits");
    }
    let reading = tokio::spawn(async move {
        let mut all = Vec::new();
        raw.read_to_end(&mut all).await.unwrap();
        all
    });
    server.flush().await.unwrap();
    server.shutdown().await.unwrap();
    drop(server);
    let all = reading.await.unwrap();
    assert_eq!(all.iter().filter(|byte| **byte == 5).count(), taken);
}
