//! Bytes into a live connection, before its login and after it, with a backend in memory. The first byte of the input
//! says which, as what kind of client, and where the rest is cut in two. Whoever subscribes to something is sent some
//! of it: messages, changed desired properties, a call.
#![no_main]

mod memory;

use edgehub_broker::head::mqtt::{MqttLimits, Peer, serve};
use libfuzzer_sys::fuzz_target;
use memory::Memory;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

const PIPE_BYTES: usize = 1 << 22;

fn connect(client_id: &str) -> Vec<u8> {
    let mut packet = b"\x10\x00\x00\x04MQTT\x04\xc0\x00\x3c".to_vec();
    for text in [client_id, &format!("h/{client_id}/?api-version=1"), "token"] {
        packet.extend((text.len() as u16).to_be_bytes());
        packet.extend(text.as_bytes());
    }
    packet[1] = (packet.len() - 2) as u8;
    packet
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&choice, bytes)) = bytes.split_first() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (mut near, far) = tokio::io::duplex(PIPE_BYTES);
        let peer = Peer { address: None, certificates: Vec::new(), accepted_at: Instant::now() };
        let serving = tokio::spawn(serve(far, Memory, MqttLimits::default(), peer, std::future::pending()));
        let client_id = if choice & 2 == 0 { "e/m" } else { "e" };
        if choice & 1 == 1 {
            near.write_all(&connect(client_id)).await.expect("room");
            let mut connack = [0; 4];
            near.read_exact(&mut connack).await.expect("an answer");
            assert_eq!(connack, [0x20, 2, 0, 0]);
        }
        let (first, second) = bytes.split_at(bytes.len() * usize::from(choice >> 2) / 64);
        for part in [first, second] {
            // The hub may have closed after the first part.
            let _any_end = near.write_all(part).await;
            tokio::task::yield_now().await;
        }
        let _any_end = near.shutdown().await;
        let mut answers = Vec::new();
        near.read_to_end(&mut answers).await.expect("an end");
        // No packet is answered by more than some bytes and one delivery; a request id comes back with its answer.
        assert!(answers.len() <= 1_024 + 200 * bytes.len());
        drop(near);
        serving.await.expect("no panic");
    });
});
