//! The last will of a client, published when its connection ends without DISCONNECT.

use std::sync::Arc;

use tracing::warn;

use super::DROPPED;
use crate::backend::{Backend, PublishError};
use crate::head::mqtt::packet::{QoS, Will};
use crate::head::mqtt::topic::{self, Inbound};
use crate::message::{Message, Sender};

/// Publishes the will as if the client had sent it; a will that is no message of the client's is dropped.
pub(super) async fn publish_will<B: Backend>(
    backend: &B,
    client: &mut B::Client,
    sender: &Arc<Sender>,
    will: Will,
) {
    const WILL: (&str, &str) = ("MessageType", "Will");
    const RETAIN: (&str, &str) = ("mqtt-retain", "true");
    let added: &[_] = if will.retain { &[WILL, RETAIN] } else { &[WILL] };
    let published = match topic::read(&sender.identity, &will.topic, added) {
        Inbound::Telemetry(properties) => {
            let message = Message::new(sender.clone(), properties, will.payload);
            match backend.check(client, &message) {
                Ok(()) => match backend.publish(client, vec![message]).await {
                    Ok(commit) if will.qos == QoS::AtLeastOnce => commit.await,
                    Ok(_) => Ok(()),
                    Err(error) => Err(error),
                },
                Err(error) => Err(error),
            }
        }
        _ => Err(PublishError::Malformed("its topic is no telemetry topic of the client")),
    };
    if let Err(error) = published
        && let Some(suppressed) = DROPPED.admit()
    {
        warn!(code = "EH2003", suppressed, "client {}: its will was dropped: {error}", sender.identity);
    }
}
