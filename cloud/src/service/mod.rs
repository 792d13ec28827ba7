//! What the stand-in offers to services, as the cloud hub does: identities, twins, methods, cloud-to-device messages.
//!
//! | room | owns |
//! | --- | --- |
//! | `access` | who may call: tokens of the policy |
//! | `rest` | the calls over HTTPS: paths, verbs, headers |
//! | `amqp`, `message` | connections over AMQP: cloud-to-device messages in, feedback out |
//! | `identity`, `twin`, `method`, `query`, `deployment` | what the calls mean, and their JSON |
//! | `fault` | errors in the cloud hub's form |

mod access;
pub(crate) mod amqp;
mod deployment;
mod fault;
mod identity;
mod message;
mod method;
mod query;
pub(crate) mod rest;
mod twin;
