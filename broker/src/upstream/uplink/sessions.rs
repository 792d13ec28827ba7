//! The session and links of each identity: asked for when they are needed, ended when they failed or nobody wants them.

use std::time::Duration;

use edgehub_storage::DeadLetterReason;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use super::super::STRANGER;
use super::super::control::ControlError;
use super::super::convert;
use super::super::failure::Failure;
use super::super::lanes::{LaneId, Lanes};
use super::super::plain::UpstreamKind;
use super::super::remote::{Kinds, Notifying, Phase, Remote, needed};
use super::super::tell;
use super::super::tokens::Holder;
use super::super::twins::Ask;
use super::super::verdict::{control_error, ended, is_throttling};
use super::super::work::Work;
use super::Uplink;
use crate::amqp::{AttachOptions, Error, LinkId, LinkKind, SessionId};
use crate::identity::Identity;

const TWIN_KINDS: [LinkKind; 2] = [LinkKind::TwinAnswers, LinkKind::TwinRequests];

impl<S: AsyncRead + AsyncWrite + Unpin> Uplink<S> {
    /// A lane may have something to send.
    pub(in super::super) fn ready(&mut self, lane: LaneId, lanes: &Lanes) {
        let Some(rank) = lanes.rank(lane) else { return };
        self.remotes.entry(lane).or_insert_with(|| Remote::new(lanes.sender(lane)));
        self.turns.add(lane, rank);
    }

    /// The pause of these identities is over.
    pub(in super::super) fn resume(&mut self, lanes: Vec<LaneId>, work: &mut Work) {
        for lane in lanes {
            if let Some(remote) = self.remotes.get_mut(&lane) {
                remote.refused.clear();
                if remote.notifying == Notifying::Refused {
                    remote.notifying = Notifying::No;
                }
            }
            self.arrange(lane, work);
        }
    }

    /// Brings the links of an identity in line with what it wants and asks.
    pub(in super::super) fn arrange(&mut self, lane: LaneId, work: &mut Work) {
        if !self.progress.is_up() {
            return;
        }
        let kinds = self.needed(lane, work);
        match self.remotes.get(&lane).map(|remote| remote.phase) {
            None if kinds.is_empty() => {}
            None => {
                self.remotes.insert(lane, Remote::new(work.identity(lane)));
                self.open(lane, work);
            }
            Some(Phase::New) => {
                if !kinds.is_empty() {
                    self.open(lane, work);
                }
            }
            Some(Phase::Token | Phase::Session) => {}
            Some(Phase::Ready) => {
                let (wanted, asks) = (work.wants.of(lane), self.twins.has(lane));
                let excess = self.remotes.get(&lane).map(|remote| remote.excess(wanted, asks));
                excess.unwrap_or_default().into_iter().for_each(|kind| self.close_link(lane, kind));
                let lacking = self.remotes.get_mut(&lane).and_then(|remote| remote.lacking_since.take());
                let sends = work.lanes.rank(lane).is_some().then_some(LinkKind::Telemetry);
                for kind in sends.into_iter().chain(kinds) {
                    self.attach(lane, kind, work);
                }
                if let Some(remote) = self.remotes.get_mut(&lane) {
                    remote.lacking_since = remote.lacking_since.map(|since| lacking.unwrap_or(since));
                }
                self.check_links(lane, work);
            }
        }
    }

    /// The links that the control plane of an identity needs now.
    fn needed(&self, lane: LaneId, work: &Work) -> Kinds {
        if work.wants.parked(lane).is_some() {
            return Kinds::new();
        }
        let mut kinds = needed(work.identity(lane), work.wants.of(lane), self.twins.has(lane));
        if let Some(remote) = self.remotes.get(&lane) {
            kinds.retain(|kind| !remote.refused.contains(kind));
        }
        kinds
    }

    /// Whether nobody wants anything of an identity, or asks or sends anything.
    pub(super) fn is_unused(&self, lane: LaneId, work: &Work) -> bool {
        work.lanes.is_idle(lane) && work.wants.of(lane).is_nothing() && !self.twins.has(lane)
    }

    /// Asks for the session of an identity, unless it is known to have left the scope.
    pub(super) fn open(&mut self, lane: LaneId, work: &mut Work) {
        let identity = work.identity(lane);
        if self.options.gives_up(identity) {
            self.leave_scope(lane, work);
        } else if !self.options.is_hub() {
            self.begin(lane, work);
        } else if self.options.is_stranger(identity) {
            let error = ControlError::Unauthorized(STRANGER.into());
            self.fail_remote(lane, STRANGER, Some(error), work);
        } else if let Some(remote) = self.remotes.get_mut(&lane) {
            remote.phase = Phase::Token;
            remote.own = self.options.own_token(identity);
            self.tokens.want(Holder::Lane(lane));
        }
    }

    /// An identity came with a newer token of its own: it takes the place of the older one, and what failed is tried again.
    pub(super) fn renew_own(&mut self, identity: &Identity, work: &mut Work) {
        let Some(lane) = work.lanes.find(identity) else { return };
        let now = Instant::now();
        work.lanes.end_pause(lane, now);
        work.wants.end_pause(lane, now);
        let Some(remote) = self.remotes.get_mut(&lane).filter(|remote| remote.own.is_some()) else { return };
        if let Some(own) = self.options.own_token(identity) {
            remote.own = Some(own);
            if remote.phase != Phase::New {
                self.tokens.want(Holder::Lane(lane));
            }
        }
    }

    /// What waits for an identity that has left the scope goes to the dead letters.
    fn leave_scope(&mut self, lane: LaneId, work: &mut Work) {
        let text = "its sender is no longer in the scope of this hub";
        let messages = work.lanes.discard_all(lane, Instant::now());
        self.give_up(lane, &messages, DeadLetterReason::OutOfScope, text, work);
        let error = ControlError::Unauthorized("it is no longer in the scope of this hub".into());
        work.fail_control(lane, Some(error), &mut self.twins);
        self.drop_remote(lane);
    }

    pub(super) fn begin(&mut self, lane: LaneId, work: &mut Work) {
        let Some(session) = self.driver.connection().begin() else {
            // Room for the next attempt: whoever was silent longest can come back when it has something to say.
            let unused = self.remotes.iter().filter(|(other, _)| self.is_unused(**other, work));
            let silent = unused.min_by_key(|(_, remote)| remote.since).map(|(other, _)| *other);
            silent.into_iter().for_each(|other| self.drop_remote(other));
            self.fail_remote(lane, "the upstream allows no more sessions", None, work);
            return;
        };
        self.by_session.insert(session, lane);
        if let Some(remote) = self.remotes.get_mut(&lane) {
            remote.session = Some(session);
            remote.phase = Phase::Session;
            remote.since = Instant::now();
            self.opening.insert(lane);
        }
    }

    pub(super) fn session_begun(&mut self, session: SessionId, work: &mut Work) {
        let Some(lane) = self.by_session.get(&session).copied() else { return };
        let Some(remote) = self.remotes.get_mut(&lane) else { return };
        remote.phase = Phase::Ready;
        remote.since = Instant::now();
        self.arrange(lane, work);
    }

    /// Asks for a link of an identity, unless it is there.
    pub(super) fn attach(&mut self, lane: LaneId, kind: LinkKind, work: &mut Work) {
        let Some(remote) = self.remotes.get(&lane) else { return };
        let (Some(session), None) = (remote.session, remote.link(kind)) else { return };
        let identity = work.identity(lane);
        if let UpstreamKind::Amqp(plain) = &self.options.kind {
            let options = plain.link(identity);
            return self.attach_as(lane, kind, session, options);
        }
        let chain = self.options.scope.chain_text(identity).filter(|_| remote.own.is_none());
        if chain.is_none() && remote.own.is_none() {
            if self.options.gives_up(identity) {
                self.leave_scope(lane, work);
            } else {
                let text = "it is not in the scope of this hub at present";
                let error = ControlError::Unauthorized(text.into());
                self.fail_remote(lane, text, Some(error), work);
            }
            return;
        }
        let first = work.lanes.next_chunk(lane).next();
        let model = first.and_then(|queued| queued.message.sender.model_id.clone());
        let (chain, model) = (chain.as_deref(), model.as_deref());
        let options = convert::link(kind, identity, chain, model, remote.channel, &self.options);
        self.attach_as(lane, kind, session, options);
    }

    fn attach_as(&mut self, lane: LaneId, kind: LinkKind, session: SessionId, options: AttachOptions) {
        let link = self.driver.connection().attach(session, options);
        let Some(remote) = self.remotes.get_mut(&lane) else { return };
        match link {
            Some(link) => {
                remote.add(kind, link);
                self.by_link.insert(link, (lane, kind));
            }
            // Its name is in use until the upstream has answered the detach, or there is no room for links.
            None => {
                remote.lacking_since.get_or_insert_with(Instant::now);
            }
        }
    }

    pub(super) fn attached(&mut self, link: LinkId, work: &mut Work) {
        self.tokens.attached(link);
        let Some((lane, _)) = self.by_link.get(&link).copied() else { return };
        let Some(remote) = self.remotes.get_mut(&lane) else { return };
        let Some(kind) = remote.set_attached(link) else { return };
        remote.since = Instant::now();
        tracing::debug!(identity = %work.identity(lane), ?kind, "An upstream link is attached");
        if kind == LinkKind::Telemetry {
            self.ready(lane, &work.lanes);
        }
        self.check_links(lane, work);
    }

    /// Asks for notifications once the twin links are there, and tells the hub once all is in place.
    pub(super) fn check_links(&mut self, lane: LaneId, work: &mut Work) {
        let wanted = work.wants.of(lane);
        let kinds = self.needed(lane, work);
        let Some(remote) = self.remotes.get_mut(&lane) else { return };
        // What was refused, or is not wanted any more, is not waited for.
        if remote.phase == Phase::Ready && remote.links().iter().all(|link| link.attached) {
            self.opening.remove(&lane);
        }
        let twin_attached = TWIN_KINDS.iter().all(|kind| remote.attached(*kind).is_some());
        if wanted.desired && twin_attached && remote.notifying == Notifying::No {
            remote.notifying = Notifying::Asked;
            self.twins.take(lane, Ask::Notify, Instant::now());
        }
        let notifying = match remote.notifying {
            Notifying::No => !wanted.desired || !kinds.contains(&LinkKind::TwinRequests),
            Notifying::Asked => !wanted.desired,
            Notifying::Yes | Notifying::Refused => true,
        };
        let attached = kinds.iter().all(|kind| remote.attached(*kind).is_some());
        let parked = work.wants.parked(lane).is_some();
        if attached && notifying && !parked && !wanted.is_nothing() && !remote.linked {
            remote.linked = true;
            if remote.refused.is_empty() && remote.notifying != Notifying::Refused {
                work.wants.succeeded(lane);
            }
            work.outbox.linked(work.lanes.sender(lane));
        }
        self.flush(lane);
    }

    /// The upstream does not give a link. That is the identity's fate if it says so, else that of what the link is for.
    pub(super) fn link_refused(
        &mut self,
        link: LinkId,
        error: Option<&Error>,
        work: &mut Work,
    ) -> Result<(), Failure> {
        let Some((lane, kind)) = self.by_link.get(&link).copied() else {
            return self.link_lost(link, error, work);
        };
        let of_identity = control_error(error) != ControlError::Offline;
        if of_identity || kind == LinkKind::Telemetry {
            return self.link_lost(link, error, work);
        }
        tell::not_served(work.identity(lane), kind, &ended("the link", error));
        let kinds: &[LinkKind] = match kind {
            LinkKind::MethodCalls | LinkKind::MethodResponses => {
                &[LinkKind::MethodCalls, LinkKind::MethodResponses]
            }
            LinkKind::TwinAnswers | LinkKind::TwinRequests => {
                self.twins.fail(lane, &ControlError::Unsupported);
                &TWIN_KINDS
            }
            _ => &[LinkKind::CloudToDevice],
        };
        let linked = self.remotes.get(&lane).is_some_and(|remote| remote.linked);
        kinds.iter().for_each(|kind| self.close_link(lane, *kind));
        if let Some(remote) = self.remotes.get_mut(&lane) {
            // What is in place besides is still in place.
            remote.linked = linked;
            remote.refused.extend(kinds.iter().copied());
        }
        work.wants.park(lane, None, Instant::now());
        self.check_links(lane, work);
        Ok(())
    }

    /// The upstream ended a link: the session of its identity is made anew.
    pub(super) fn link_lost(
        &mut self,
        link: LinkId,
        error: Option<&Error>,
        work: &mut Work,
    ) -> Result<(), Failure> {
        self.tokens.link_lost(link, error)?;
        if let Some((lane, _)) = self.by_link.get(&link).copied() {
            self.lost(lane, "the link", error, work);
        }
        Ok(())
    }

    pub(super) fn session_lost(&mut self, session: SessionId, error: Option<&Error>, work: &mut Work) {
        if let Some(lane) = self.by_session.get(&session).copied() {
            self.lost(lane, "the session", error, work);
        }
    }

    fn lost(&mut self, lane: LaneId, what: &str, error: Option<&Error>, work: &mut Work) {
        let reason = ended(what, error);
        let pause = self.fail_remote(lane, &reason, Some(control_error(error)), work);
        if error.is_some_and(|error| is_throttling(error.condition.as_str())) {
            self.throttled_for(reason, pause);
        }
    }

    /// The session of an identity failed: all that it holds waits for the end of a pause, and no other identity does.
    pub(super) fn fail_remote(
        &mut self,
        lane: LaneId,
        reason: &str,
        error: Option<ControlError>,
        work: &mut Work,
    ) -> Duration {
        let pause = match work.lanes.is_idle(lane) {
            true => Duration::ZERO,
            false => work.lanes.park(lane, Instant::now()),
        };
        let identity = work.identity(lane);
        tell::failed(identity, self.to(), reason, pause);
        if let Some(ControlError::Unauthorized(_)) = &error {
            let remote = self.remotes.get(&lane);
            self.options.refused(identity, remote.and_then(|remote| remote.own.as_ref()));
        }
        work.fail_control(lane, error, &mut self.twins);
        self.drop_remote(lane);
        pause
    }

    /// Ends a link of an identity. What was asked on it and not answered has failed.
    pub(super) fn close_link(&mut self, lane: LaneId, kind: LinkKind) {
        let Some(link) = self.remotes.get_mut(&lane).and_then(|remote| remote.remove(kind)) else { return };
        self.by_link.remove(&link);
        self.driver.connection().detach(link, None);
    }

    /// Forgets the far end of an identity. Its turns and tokens that wait find nothing and pass.
    pub(super) fn drop_remote(&mut self, lane: LaneId) {
        let Some(remote) = self.remotes.remove(&lane) else { return };
        self.opening.remove(&lane);
        self.blocked.remove(&lane);
        self.answers.forget(lane);
        for link in remote.links() {
            self.by_link.remove(&link.id);
        }
        if let Some(session) = remote.session {
            self.by_session.remove(&session);
            self.driver.connection().end(session, None);
        }
    }
}
