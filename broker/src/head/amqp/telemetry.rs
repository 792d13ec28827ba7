//! Messages of clients on their way to the store: gathered per turn, published, answered when they are durable.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use ahash::AHashMap;

use super::convert;
use super::identity::Connected;
use crate::amqp::{Condition, Connection, Delivery, DeliveryId, Error, Outcome, parse_batch};
use crate::backend::{Backend, PublishError};
use crate::identity::Identity;
use crate::message::Message;

/// Telemetry of all identities of a connection.
pub(super) struct Telemetry<B: Backend> {
    gathered: GatheredOfAll,
    /// In the order in which the store was asked, which is the order in which it answers.
    commits: VecDeque<Pending<B>>,
}

/// What one turn brought, by identity.
#[derive(Default)]
struct GatheredOfAll {
    identities: Vec<(Identity, Gathered)>,
    places: AHashMap<Identity, usize>,
}

impl GatheredOfAll {
    fn of(&mut self, identity: &Identity) -> &mut Gathered {
        // What comes in one read is mostly of one.
        let latest = self.identities.len().checked_sub(1);
        let place = match latest.filter(|latest| self.identities[*latest].0 == *identity) {
            Some(latest) => latest,
            None => *self.places.entry(identity.clone()).or_insert_with(|| {
                self.identities.push((identity.clone(), Gathered::default()));
                self.identities.len() - 1
            }),
        };
        &mut self.identities[place].1
    }

    fn drain(&mut self) -> impl Iterator<Item = (Identity, Gathered)> + use<'_> {
        self.places.clear();
        self.identities.drain(..)
    }
}

/// What one turn brought for one identity.
#[derive(Default)]
struct Gathered {
    messages: Vec<Message>,
    deliveries: Vec<DeliveryId>,
}

/// Deliveries whose messages wait for the store.
struct Pending<B: Backend> {
    commit: B::Commit,
    deliveries: Vec<DeliveryId>,
}

impl<B: Backend> Telemetry<B> {
    pub(super) fn new() -> Self {
        Self { gathered: GatheredOfAll::default(), commits: VecDeque::new() }
    }

    /// Takes a transfer: a message or a batch. It waits for [`Telemetry::publish`].
    pub(super) fn received(
        &mut self,
        engine: &mut Connection,
        backend: &B,
        identity: &Identity,
        client: &B::Client,
        delivery: &Delivery,
    ) {
        let of_identity = self.gathered.of(identity);
        let before = of_identity.messages.len();
        let sender = backend.sender(client);
        let taken = parse_batch(delivery.format, &delivery.payload)
            .map_err(|error| Error::new(Condition::DECODE_ERROR, error.to_string()))
            .and_then(|batch| {
                // All are looked at before the first is stored.
                for encoded in &batch {
                    let message = convert::message(encoded, sender.clone())?;
                    backend.check(client, &message).map_err(|error| refusal(&error))?;
                    of_identity.messages.push(message);
                }
                Ok(())
            });
        match taken {
            Ok(()) => of_identity.deliveries.push(delivery.id),
            Err(error) => {
                of_identity.messages.truncate(before);
                tracing::debug!(client = %identity, %error, "A transfer is rejected");
                engine.settle(delivery.id, Outcome::Rejected(Some(error)));
            }
        }
    }

    /// Gives the store what was gathered; waits while it has no room.
    pub(super) async fn publish(
        &mut self,
        engine: &mut Connection,
        backend: &B,
        identities: &mut AHashMap<Identity, Connected<B>>,
    ) {
        for (identity, Gathered { messages, deliveries }) in self.gathered.drain() {
            // All of it was rejected.
            if deliveries.is_empty() {
                continue;
            }
            let Some(connected) = identities.get_mut(&identity) else { continue };
            match backend.publish(&mut connected.client, messages).await {
                Ok(commit) => self.commits.push_back(Pending { commit, deliveries }),
                Err(error) => settle(engine, &deliveries, Err(error)),
            }
        }
    }

    /// Answers what is stored; true when something was.
    pub(super) fn poll_commits(&mut self, engine: &mut Connection, cx: &mut Context<'_>) -> bool {
        let mut answered = false;
        while let Some(first) = self.commits.front_mut()
            && let Poll::Ready(result) = Pin::new(&mut first.commit).poll(cx)
            && let Some(first) = self.commits.pop_front()
        {
            settle(engine, &first.deliveries, result);
            answered = true;
        }
        answered
    }
}

fn settle(engine: &mut Connection, deliveries: &[DeliveryId], result: Result<(), PublishError>) {
    let outcome = match result {
        Ok(()) => Outcome::Accepted,
        Err(error) => Outcome::Rejected(Some(refusal(&error))),
    };
    for delivery in deliveries {
        engine.settle(*delivery, outcome.clone());
    }
}

/// What a sender is told about messages that are not stored.
fn refusal(error: &PublishError) -> Error {
    let condition = match error {
        PublishError::TooLarge { .. } => Condition::MESSAGE_SIZE_EXCEEDED,
        PublishError::Malformed(_) => Condition::INVALID_FIELD,
        PublishError::Full(_) => Condition::of("com.microsoft:device-container-throttled"),
        PublishError::Store(_) => Condition::INTERNAL_ERROR,
    };
    Error::new(condition, error.to_string())
}
