//! Owns who is believed to be who: the scope, how it is kept fresh and stored, and who decides on logins.

use std::sync::Arc;

use bytes::Bytes;
use edgehub_broker::hub::{Authenticator, Hub};
use edgehub_broker::identity::{
    ClientTokens, CloudAuthenticator, Hosts, Identity, RefreshOptions, ScopeCache, ScopeClient,
    ScopeClientOptions, ScopeRefresher, TokenSource,
};
use edgehub_broker::upstream::{UpstreamOptions, UpstreamProver, UpstreamState, UpstreamStatus};
use edgehub_storage::KeyedState;
use tokio::sync::watch;
use tracing::{error, warn};

use super::trust::client_trust;
use crate::exit::Failure;
use crate::run::Prepared;
use crate::settings::{self, AuthenticationMode, Settings};

/// Key of the identity cache's snapshot in the store.
const SCOPE_KEY: &[u8] = b"scope";

/// What keeps the scope fresh, and judges by it.
pub(super) fn refresher(
    prepared: &Prepared,
    edge_device: &Identity,
    scope: &Arc<ScopeCache>,
    tls: Arc<rustls::ClientConfig>,
    tokens: Arc<TokenSource>,
) -> Result<Arc<ScopeRefresher<ScopeClient>>, Failure> {
    let settings = &prepared.settings;
    let mut client = ScopeClientOptions::new(settings.upstream.host.as_str(), edge_device, tls, tokens);
    client.port = settings.upstream.https_port;
    client.nested = settings.scope.nested;
    client.proxy = settings.upstream.proxy.clone();
    let own_host = settings.hub.own_host.as_ref().map(settings::HostName::as_str);
    let hosts = Hosts::new(std::iter::once(settings.hub.iothub_host.as_str()).chain(own_host));
    let options = RefreshOptions {
        period: settings.scope.refresh_interval,
        delay: settings.scope.refresh_delay,
        ..RefreshOptions::default()
    };
    let refresher = ScopeRefresher::new(scope.clone(), ScopeClient::new(client), hosts, options);
    Ok(Arc::new(refresher.with_client_trust(client_trust(prepared.bundle.clone()))))
}

/// Who decides on logins, as far as the upstream can be asked.
pub(super) fn authentication_mode(settings: &Settings) -> AuthenticationMode {
    let mode = settings.scope.mode;
    if settings.upstream.broker.is_some() && mode != AuthenticationMode::Scope {
        warn!(
            code = "EH3013",
            ?mode,
            "Messages go up to a broker that knows no clients; AuthenticationMode is Scope"
        );
        return AuthenticationMode::Scope;
    }
    mode
}

/// Who decides on logins: `tokens` are there unless it is the scope alone.
pub(super) fn authenticator(
    refresher: &Arc<ScopeRefresher<ScopeClient>>,
    tokens: Option<Arc<ClientTokens>>,
    mode: AuthenticationMode,
    upstream: &UpstreamOptions,
) -> Arc<dyn Authenticator> {
    let refresher = refresher.clone();
    let Some(tokens) = tokens else { return refresher };
    let prover = Arc::new(UpstreamProver::new(upstream.clone()));
    // For the question, and for those whose turn comes before.
    let limit = upstream.operation_timeout * 2;
    match mode {
        AuthenticationMode::Scope => refresher,
        AuthenticationMode::CloudAndScope => {
            Arc::new(CloudAuthenticator::after_scope(refresher, tokens, prover, limit))
        }
        AuthenticationMode::Cloud => {
            Arc::new(CloudAuthenticator::cloud_only(refresher, tokens, prover, limit))
        }
    }
}

/// Fills the cache from the store; how many identities it had.
pub(super) async fn restore_scope(scope: &ScopeCache, state: &KeyedState) -> usize {
    match state.get(SCOPE_KEY).await {
        Ok(Some(snapshot)) => match scope.restore(&snapshot) {
            Ok(_) => scope.len(),
            Err(error) => {
                warn!(code = "EH3008", %error, "The stored identities cannot be used; the upstream is asked for them");
                0
            }
        },
        Ok(None) => 0,
        Err(error) => {
            warn!(code = "EH3009", %error, "The stored identities cannot be read; the upstream is asked for them");
            0
        }
    }
}

/// Asks for everything whenever the upstream comes back: much can have changed meanwhile.
pub(super) async fn refresh_on_contact(
    refresher: Arc<ScopeRefresher<ScopeClient>>,
    mut upstream: watch::Receiver<UpstreamStatus>,
) {
    let up = |status: &UpstreamStatus| matches!(status.state, UpstreamState::Up | UpstreamState::Throttled);
    while upstream.wait_for(up).await.is_ok() {
        refresher.want_full();
        if upstream.wait_for(|status| !up(status)).await.is_err() {
            return;
        }
    }
}

/// Who does what changes of the scope ask for.
pub(super) struct ScopeFollower {
    pub(super) hub: Hub,
    pub(super) refresher: Arc<ScopeRefresher<ScopeClient>>,
    pub(super) mode: AuthenticationMode,
}

impl ScopeFollower {
    /// Stores the cache whenever it changed, so that clients are known after a restart without the upstream. What is kept of
    /// identities that are gone is deleted before: if the process ends in between, they are found to be gone once more.
    pub(super) async fn follow(self, state: KeyedState) {
        use tokio::sync::broadcast::error::RecvError;
        let mut changes = self.refresher.changes();
        loop {
            match changes.recv().await {
                Ok(change) => self.hub.forget_removed(&change, self.refresher.cache()).await,
                Err(RecvError::Lagged(_)) if self.mode == AuthenticationMode::Scope => {
                    self.hub.forget_out_of_scope(self.refresher.cache()).await;
                }
                // Who is not in the scope may be a client of the cloud, which is not known after a restart.
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return,
            }
            let snapshot = Bytes::from(self.refresher.cache().snapshot());
            if let Err(error) = state.put(SCOPE_KEY, snapshot).await {
                error!(code = "EH3010", %error, "The identities in scope cannot be stored");
            }
        }
    }
}
