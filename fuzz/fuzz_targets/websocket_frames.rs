//! Bytes from a client into the byte stream of a WebSocket: it ends, and gives no more than came in.
#![no_main]

use edgehub_broker::head::websocket::WebSocketBytes;
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const PIPE_BYTES: usize = 1 << 20;

fuzz_target!(|bytes: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (mut near, far) = tokio::io::duplex(PIPE_BYTES);
        // Some came with the upgrade, the rest later.
        let (ahead, rest) = bytes.split_at(bytes.len().min(7));
        let mut stream = WebSocketBytes::accepted(far, ahead.to_vec()).await;
        near.write_all(rest).await.expect("room");
        near.shutdown().await.expect("an open pipe");
        let mut read = Vec::new();
        let _any_end = stream.read_to_end(&mut read).await;
        assert!(read.len() <= bytes.len());
        let _any_end = stream.write_all(b"answer").await;
        let _any_end = stream.shutdown().await;
    });
});
