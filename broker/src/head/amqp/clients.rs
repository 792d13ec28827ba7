//! Who is logged in on a connection: from a link's attach, SASL or a newer token to the login, and to its end.

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::sleep;

use super::connection::Head;
use super::identity::{Connected, Renewal};
use super::logins::{self, Ended, LoggedIn, WaitingLink};
use super::plain;
use crate::amqp::{AttachRequest, Condition, Error, LinkKind, SaslCode, Secret};
use crate::backend::{Backend, CloseReason, Command, Credentials, Login, LoginError, Protocol};
use crate::identity::{HUB_MODULE_ID, Identity};

/// What clients are told when the process stops; they come again.
pub(super) const STOPPING: &str = "Server busy, please retry operation";

impl<S, B> Head<S, B>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
    B: Backend,
{
    /// A link of an identity, which is logged in first, unless it is already.
    pub(super) fn attach(&mut self, identity: Identity, kind: LinkKind, request: AttachRequest) {
        if self.identities.contains_key(&identity) {
            self.with_identity(&identity, |connected, turn| connected.attach(turn, kind, &request));
            return;
        }
        let text = "too many identities or links on one connection; come again or open another";
        match self.logins.join(&identity, (kind, request), self.limits.links_waiting_max) {
            Ok(()) => {}
            Err(((_, request), true)) => self.refuse(request.link, Condition::INTERNAL_ERROR, text),
            Err(((kind, request), false)) => {
                if self.identities.len() + self.logins.len() >= self.limits.identities_max {
                    self.refuse(request.link, Condition::INTERNAL_ERROR, text);
                    return;
                }
                let login = self.login(&identity, &request);
                self.logins.start(&self.backend, &self.limits, login, Some((kind, request)));
            }
        }
    }

    fn login(&self, identity: &Identity, request: &AttachRequest) -> Login {
        let auth_chain = logins::property(request, "com.microsoft:auth-chain");
        let credentials = self.credentials(identity, auth_chain.as_deref());
        let product_info: Option<Arc<str>> = logins::property(request, "com.microsoft:client-version");
        let model_id = logins::property(request, "com.microsoft:model-id");
        Login {
            identity: identity.clone(),
            credentials,
            auth_chain,
            product_info: product_info.unwrap_or_else(|| "".into()),
            model_id: model_id.filter(|id| !id.trim().is_empty()),
            protocol: Protocol::Amqp,
            peer: self.peer.address,
        }
    }

    /// The identity's own token, else that of the hub that acts for it, else the certificate of the connection.
    fn credentials(&self, identity: &Identity, auth_chain: Option<&str>) -> Credentials {
        let own = self.tokens.get(identity);
        match own.or_else(|| self.tokens.get(&actor(auth_chain)?)) {
            Some(token) => Credentials::SasToken(token.clone()),
            None if !self.peer.certificates.is_empty() => {
                Credentials::Certificate(self.peer.certificates.clone())
            }
            None => Credentials::None,
        }
    }

    /// A client shows user name and password in SASL: a login like that of a link, whose links need no token.
    pub(super) fn sasl_plain(&mut self, user: &str, password: &Secret) {
        let host = self.limits.iot_hub_host.as_deref().unwrap_or_default();
        let Some(identity) = plain::identity(user, host) else {
            tracing::info!("SASL PLAIN refused: the user name names no identity of this hub");
            self.driver.connection().sasl_outcome(SaslCode::Sys);
            return;
        };
        let login = Login {
            identity: identity.clone(),
            credentials: Credentials::SasToken(password.expose().into()),
            auth_chain: None,
            product_info: "".into(),
            model_id: None,
            protocol: Protocol::Amqp,
            peer: self.peer.address,
        };
        self.sasl_login = Some(identity);
        self.logins.start(&self.backend, &self.limits, login, None);
    }

    /// A login, or the check of a newer token, has ended.
    pub(super) fn ended(&mut self, ended: Ended<B>) {
        match ended {
            Ended::Login { login, links, result } => self.login_ended(login, &links, result),
            Ended::Renewal { login, number, result } => self.renewal_ended(&login.identity, number, result),
        }
        self.logins.start_due(&self.backend, &self.limits);
        self.start_renewals();
    }

    fn login_ended(&mut self, login: Login, links: &[WaitingLink], result: Result<LoggedIn<B>, LoginError>) {
        let identity = login.identity.clone();
        let of_sasl = self.sasl_login.take_if(|of_sasl| *of_sasl == identity).is_some();
        match result {
            Ok(LoggedIn { client, mailbox }) => {
                tracing::info!(client = %identity, "Client connected (AMQP)");
                self.nobody_until = None;
                self.by_certificate |= matches!(login.credentials, Credentials::Certificate(_));
                if let (true, Credentials::SasToken(token)) = (of_sasl, &login.credentials) {
                    self.tokens.set_of_sasl(identity.clone(), token.clone());
                    self.driver.connection().sasl_outcome(SaslCode::Ok);
                }
                self.login_number += 1;
                self.identities.insert(identity.clone(), Connected::new(login, self.login_number, client));
                self.mailboxes.insert(&identity, mailbox);
                for (kind, request) in links {
                    self.with_identity(&identity, |connected, turn| connected.attach(turn, *kind, request));
                }
                // A token may have come while the login was under way; all links may have gone.
                self.token_changed(&identity);
                if !of_sasl {
                    self.forget_if_unused(&identity);
                }
            }
            Err(error) => {
                let condition = match &error {
                    LoginError::Refused(_) => Condition::UNAUTHORIZED_ACCESS,
                    LoginError::Unavailable(_) => Condition::INTERNAL_ERROR,
                };
                tracing::info!(client = %identity, %error, "Client refused (AMQP)");
                if of_sasl {
                    self.driver.connection().sasl_outcome(SaslCode::Sys);
                }
                for (_, request) in links {
                    self.refuse(request.link, condition.clone(), error.to_string());
                }
            }
        }
    }

    // ---- newer tokens -------------------------------------------------------------------------------------

    /// Other tokens than before were put for these. Whoever is logged in by them must prove itself anew.
    pub(super) fn tokens_changed(&mut self, named: &[Identity]) {
        for identity in named {
            self.token_changed(identity);
            if identity.module_id() == Some(HUB_MODULE_ID) {
                let acted_for = |connected: &&Connected<B>| {
                    actor(connected.login.auth_chain.as_deref()).as_ref() == Some(identity)
                };
                let others = self.identities.values().filter(acted_for);
                let others: Vec<Identity> =
                    others.map(|connected| connected.login.identity.clone()).collect();
                others.iter().for_each(|other| self.token_changed(other));
            }
        }
        self.start_renewals();
    }

    fn token_changed(&mut self, identity: &Identity) {
        let Some(connected) = self.identities.get(identity) else { return };
        let credentials = self.credentials(identity, connected.login.auth_chain.as_deref());
        if credentials == connected.login.credentials {
            return;
        }
        let Some(connected) = self.identities.get_mut(identity) else { return };
        connected.renewal = match connected.renewal {
            Renewal::None => {
                self.renewals_due.push_back(identity.clone());
                Renewal::Due
            }
            Renewal::Due => Renewal::Due,
            Renewal::Running | Renewal::Overtaken => Renewal::Overtaken,
        };
    }

    /// Starts the checks that are due, as far as there is room.
    fn start_renewals(&mut self) {
        while self.logins.running() < self.limits.logins_max
            && let Some(identity) = self.renewals_due.pop_front()
        {
            let Some(connected) = self.identities.get(&identity) else { continue };
            if connected.renewal != Renewal::Due {
                continue;
            }
            let mut login = connected.login.clone();
            login.credentials = self.credentials(&identity, login.auth_chain.as_deref());
            self.logins.renew(
                &self.backend,
                &connected.client,
                &self.limits,
                login.clone(),
                connected.number,
            );
            if let Some(connected) = self.identities.get_mut(&identity) {
                connected.renewal = Renewal::Running;
                connected.login = login;
            }
        }
    }

    fn renewal_ended(&mut self, identity: &Identity, number: u64, result: Result<(), LoginError>) {
        let Some(connected) = self.identities.get_mut(identity).filter(|found| found.number == number) else {
            return;
        };
        if connected.renewal == Renewal::Overtaken {
            self.renewals_due.push_back(identity.clone());
            connected.renewal = Renewal::Due;
        } else {
            connected.renewal = Renewal::None;
        }
        match result {
            Ok(()) => tracing::debug!(client = %identity, "The newer token is good"),
            Err(LoginError::Refused(reason)) => {
                tracing::info!(client = %identity, reason, "The newer token is refused");
                self.drop_identity(identity, &Error::new(Condition::UNAUTHORIZED_ACCESS, reason));
            }
            // The older one stands until it ends.
            Err(LoginError::Unavailable(reason)) => {
                tracing::warn!(code = "EH2011", client = %identity, reason, "The newer token cannot be checked");
            }
        }
    }

    // ---- the end ------------------------------------------------------------------------------------------

    pub(super) fn forget_if_unused(&mut self, identity: &Identity) {
        if self.identities.get(identity).is_some_and(Connected::is_unused) {
            self.identities.remove(identity);
            self.mailboxes.remove(identity);
            tracing::info!(client = %identity, "Client disconnected (AMQP)");
        }
    }

    pub(super) fn command(&mut self, identity: &Identity, command: Option<Command>) {
        match command {
            Some(Command::Close(reason)) => {
                let (condition, text) = match reason {
                    CloseReason::TakenOver => (Condition::STOLEN, "a newer connection took over"),
                    CloseReason::Unauthorized => {
                        (Condition::UNAUTHORIZED_ACCESS, "the credentials are not valid any more")
                    }
                    CloseReason::Stopping => (Condition::DETACH_FORCED, STOPPING),
                    CloseReason::Kicked => (Condition::DETACH_FORCED, "an operator closed the connection"),
                };
                let error = Error::new(condition, text);
                if reason == CloseReason::Stopping {
                    // All end, sessions before links: SDKs answer a lone link with detaches of the others.
                    self.close(error.clone());
                }
                self.drop_identity(identity, &error);
                let alone = self.identities.is_empty() && self.logins.len() == 0;
                if reason == CloseReason::TakenOver && alone {
                    // Nothing else lives here.
                    self.nobody_until = Some(Box::pin(sleep(self.limits.vacant_max)));
                }
            }
            Some(command) => {
                self.with_identity(identity, |connected, turn| connected.command(turn, command));
                self.forget_if_unused(identity);
            }
            None => self.drop_identity(identity, &Condition::INTERNAL_ERROR.into()),
        }
    }

    fn drop_identity(&mut self, identity: &Identity, error: &Error) {
        self.mailboxes.remove(identity);
        self.with_identity(identity, |connected, turn| connected.end(turn, error));
        self.identities.remove(identity);
    }
}

/// The hub that acts for an identity: the last element of the chain.
fn actor(auth_chain: Option<&str>) -> Option<Identity> {
    let device = auth_chain.filter(|chain| chain.contains(';'))?.rsplit(';').next()?;
    Identity::module(device, HUB_MODULE_ID).ok()
}
