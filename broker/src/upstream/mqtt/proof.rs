//! The question whether the upstream lets an identity in with a token of its own: CONNECT and its answer.

use std::sync::Arc;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::packet::{self, ConnectAnswer, Received};
use super::topic;
use crate::identity::{Identity, ProofError};
use crate::upstream::UpstreamOptions;
use crate::upstream::proof::unavailable;

/// Bytes of one read at most; the answer has four.
const READ_BYTES: usize = 256;

/// How long the connection may be silent, in seconds; it ends at once.
const KEEP_ALIVE_SECS: u16 = 60;

/// Asks on a new connection. It has no deadline of its own.
pub(in crate::upstream) async fn prove<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    options: &UpstreamOptions,
    identity: &Identity,
    token: &Arc<str>,
) -> Result<(), ProofError> {
    let user_name = topic::user_name(&options.hub_host, identity, &options.product_info, None, None);
    let mut out = BytesMut::new();
    packet::connect(&mut out, &identity.to_string(), &user_name, token, KEEP_ALIVE_SECS);
    let lost = |error: std::io::Error| unavailable(&format!("the connection is lost: {error}"));
    stream.write_all(&out).await.map_err(lost)?;
    stream.flush().await.map_err(lost)?;
    let mut input = BytesMut::with_capacity(READ_BYTES);
    let received = loop {
        match packet::take(&mut input) {
            Ok(Some(received)) => break received,
            Ok(None) => {}
            Err(error) => return Err(unavailable(&format!("the upstream breaks the protocol: {error}"))),
        }
        if input.len() >= READ_BYTES {
            return Err(unavailable(
                "the upstream breaks the protocol: a long packet in the place of CONNACK",
            ));
        }
        if stream.read_buf(&mut input).await.map_err(lost)? == 0 {
            return Err(unavailable("the upstream closed the connection"));
        }
    };
    let answer = match received {
        Received::ConnAck(ConnectAnswer::Accepted) => Ok(()),
        Received::ConnAck(ConnectAnswer::Refused(code)) => {
            Err(ProofError::Refused(format!("CONNACK {code}")))
        }
        Received::ConnAck(ConnectAnswer::Unavailable) => {
            Err(unavailable("the upstream asks to come again later: CONNACK 3"))
        }
        Received::ConnAck(ConnectAnswer::Unexpected(code)) => {
            Err(unavailable(&format!("the upstream takes no connection: CONNACK {code}")))
        }
        received => Err(unavailable(&format!("the upstream breaks the protocol: {received:?}"))),
    };
    if answer.is_ok() {
        out.clear();
        packet::disconnect(&mut out);
        // Who has answered may be gone; there is nothing left to say then.
        let _ = stream.write_all(&out).await;
    }
    let _ = stream.shutdown().await;
    answer
}
