//! Owns the end of what is kept of identities that left the scope for good: their twins and their sessions.

use edgehub_storage::Table;

use super::Hub;
use crate::identity::{Identity, ScopeCache, ScopeChange};
use crate::twin::TwinStoreError;

/// Keys of a table that are looked at together.
const PAGE_KEYS: usize = 1_024;

impl Hub {
    /// Deletes what is stored of identities that the scope has removed: their twins, what they reported and the upstream
    /// does not have, and the subscriptions of their sessions. Those that are in scope again keep it, and so does the hub
    /// itself. One identity after the other. What cannot be deleted is logged and stays.
    pub async fn forget_removed(&self, change: &ScopeChange, scope: &ScopeCache) {
        for identity in &change.removed {
            if scope.get(identity).is_none() {
                self.forget(identity).await;
            }
        }
    }

    /// As [`Hub::forget_removed`], for whoever missed changes: everything that is stored is looked at. Nothing is deleted
    /// before the scope is known as a whole, and no module of a leaf device as long as its device is in scope: a
    /// scope does not list those.
    pub async fn forget_out_of_scope(&self, scope: &ScopeCache) {
        for table in [Table::Twins, Table::Sessions] {
            let stored = self.inner.store.keyed(table);
            let mut after = None;
            loop {
                let page = match stored.scan(&[], after.as_deref(), PAGE_KEYS).await {
                    Ok(page) => page,
                    Err(error) => {
                        tracing::error!(code = "EH4035", %error, "What is stored of identities cannot be looked at");
                        break;
                    }
                };
                for (key, _) in &page {
                    // The table of twins holds marks, too, whose keys are no identities.
                    let identity = std::str::from_utf8(key).ok().and_then(|id| Identity::parse(id).ok());
                    if let Some(identity) = identity.filter(|identity| is_gone(scope, identity)) {
                        self.forget(&identity).await;
                    }
                }
                match page.into_iter().last() {
                    Some((last, _)) => after = Some(last),
                    None => break,
                }
            }
        }
    }

    async fn forget(&self, identity: &Identity) {
        if identity == self.inner.control.twins.own_identity() {
            return;
        }
        let twin = self.inner.control.twins.delete(identity).await;
        let sessions = self.inner.store.keyed(Table::Sessions);
        let session = sessions.delete(identity.to_string().as_bytes()).await.map_err(TwinStoreError::from);
        match twin.and(session) {
            Ok(()) => {
                tracing::debug!(client = %identity, "It left the scope; what was stored of it is deleted")
            }
            Err(error) => {
                tracing::warn!(code = "EH4034", client = %identity, %error, "It left the scope; what is stored of it is not deleted");
            }
        }
    }
}

fn is_gone(scope: &ScopeCache, identity: &Identity) -> bool {
    let device_is_there = identity.module_id().is_some() && {
        let device = identity.of_device();
        scope.edge_device() != Some(&device) && scope.get(&device).is_some_and(|device| !device.edge)
    };
    scope.is_out_of_scope(identity) && !device_is_there
}
