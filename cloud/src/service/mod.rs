//! What the stand-in offers to services, as the cloud hub does: identities, twins, methods, cloud-to-device messages.
//!
//! | room | owns |
//! | --- | --- |
//! | `access` | who may call: tokens of the policy |
//! | `rest` | the calls over HTTPS: paths, verbs, headers |
//! | `identity`, `twin`, `method`, `query`, `deployment` | what the calls mean, and their JSON |
//! | `fault` | errors in the cloud hub's form |

mod access;
mod deployment;
mod fault;
mod identity;
mod method;
mod query;
pub(crate) mod rest;
mod twin;
