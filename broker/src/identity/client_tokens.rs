//! The tokens of clients outside the scope that the cloud has accepted: what they prove until they expire, and what the links
//! of such a client upstream are opened with.
//!
//! They are kept in memory only. Who came with an accepted token may come again with it while nobody can be asked. Once the
//! upstream refuses an identity that was let in with it, it proves nothing any more.

use std::collections::HashMap;
use std::sync::Arc;

use ahash::{AHashSet, RandomState};
use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use super::name::Identity;
use super::token::{EXPIRY_TOLERANCE_SECS, SasToken};

/// Clients outside the scope whose tokens are kept.
pub const CLIENT_TOKENS_MAX: usize = 4_096;

/// What stands for a token where it is compared: how long that takes tells nothing of the token.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Digest([u8; 32]);

impl Digest {
    pub(super) fn of(token: &str) -> Self {
        Self(Sha256::digest(token).into())
    }
}

/// A token that the cloud has accepted. It prints nothing of itself.
#[derive(Clone)]
pub struct ClientToken {
    text: Arc<str>,
    expires_at_secs: i64,
}

impl ClientToken {
    /// A token that nobody has judged yet. One that cannot be read counts as expired now.
    pub(crate) fn of_client(text: &Arc<str>, now_secs: i64) -> Self {
        let token = SasToken::parse(text, now_secs);
        let expires_at_secs = token.map_or(now_secs, |token| token.expires_at_secs());
        Self { text: text.clone(), expires_at_secs }
    }

    /// The token.
    pub fn text(&self) -> &Arc<str> {
        &self.text
    }

    /// When it expires, in seconds since 1970, without tolerance.
    pub fn expires_at_secs(&self) -> i64 {
        self.expires_at_secs
    }
}

/// The accepted tokens by identity.
///
/// Locks: one mutex, held for single statements in memory.
pub struct ClientTokens {
    kept: Mutex<Kept>,
    /// Grows when a token proves nothing any more before its time.
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct Kept {
    tokens: HashMap<Identity, Entry, RandomState>,
    /// Identities with another token than the upstream has.
    renewed: AHashSet<Identity>,
}

struct Entry {
    token: ClientToken,
    digest: Digest,
    /// The one before: a connection may have been opened with it.
    previous: Option<(Digest, i64)>,
}

impl ClientTokens {
    /// None yet. `changed` is what tells those who look at open connections again.
    pub(super) fn new(changed: watch::Sender<u64>) -> Self {
        Self { kept: Mutex::default(), changed }
    }

    /// Keeps a token that the cloud has accepted, in the place of an older one. False when there are too many.
    pub(super) fn accept(
        &self,
        identity: &Identity,
        text: &Arc<str>,
        expires_at_secs: i64,
        now_secs: i64,
    ) -> bool {
        let mut kept = self.kept.lock();
        if kept.tokens.len() >= CLIENT_TOKENS_MAX && !kept.tokens.contains_key(identity) {
            let Kept { tokens, renewed } = &mut *kept;
            tokens.retain(|_, entry| proves_until(entry.token.expires_at_secs) > now_secs);
            renewed.retain(|identity| tokens.contains_key(identity));
            if kept.tokens.len() >= CLIENT_TOKENS_MAX {
                return false;
            }
        }
        let (digest, token) = (Digest::of(text), ClientToken { text: text.clone(), expires_at_secs });
        let older = kept.tokens.remove(identity);
        let previous = match older {
            Some(entry) if entry.digest == digest => entry.previous,
            Some(entry) => Some((entry.digest, entry.token.expires_at_secs)),
            None => None,
        };
        kept.tokens.insert(identity.clone(), Entry { token, digest, previous });
        kept.renewed.insert(identity.clone());
        true
    }

    /// Until when a token proves its identity, in seconds since 1970; absent when it does not.
    pub(super) fn proves(&self, identity: &Identity, token: &str) -> Option<i64> {
        let digest = Digest::of(token);
        let kept = self.kept.lock();
        let entry = kept.tokens.get(identity)?;
        let current = (entry.digest, entry.token.expires_at_secs);
        let found = [Some(current), entry.previous].into_iter().flatten().find(|(of, _)| *of == digest);
        found.map(|(_, expires_at_secs)| proves_until(expires_at_secs))
    }

    /// The token that links of an identity are opened with; absent when it has none that can still be good.
    pub fn token_of(&self, identity: &Identity, now_secs: i64) -> Option<ClientToken> {
        let kept = self.kept.lock();
        let token = kept.tokens.get(identity).map(|entry| entry.token.clone());
        token.filter(|token| proves_until(token.expires_at_secs) > now_secs)
    }

    /// The upstream does not let an identity in with this token: it proves nothing any more. One that came meanwhile stays.
    pub fn refused(&self, identity: &Identity, token: &str) {
        let digest = Digest::of(token);
        let mut kept = self.kept.lock();
        if kept.tokens.get(identity).is_none_or(|entry| entry.digest != digest) {
            return;
        }
        kept.tokens.remove(identity);
        kept.renewed.remove(identity);
        drop(kept);
        self.changed.send_modify(|count| *count += 1);
    }

    /// Identities whose token is another one since the last call. For the one way up that uses them.
    pub fn take_renewed(&self) -> Vec<Identity> {
        let mut kept = self.kept.lock();
        if kept.renewed.is_empty() { Vec::new() } else { kept.renewed.drain().collect() }
    }
}

/// The first second in which a token proves nothing any more.
fn proves_until(expires_at_secs: i64) -> i64 {
    expires_at_secs.saturating_add(EXPIRY_TOLERANCE_SECS + 1)
}

#[cfg(test)]
mod tests {
    use super::super::scope::tests::id;
    use super::*;

    fn tokens() -> (ClientTokens, watch::Receiver<u64>) {
        let (sender, receiver) = watch::channel(0);
        (ClientTokens::new(sender), receiver)
    }

    fn text(name: &str) -> Arc<str> {
        name.into()
    }

    #[test]
    fn a_token_proves_its_identity_until_it_expires_and_the_one_before_too() {
        let (tokens, _) = tokens();
        let (one, two, three) = (text("one"), text("two"), text("three"));
        assert!(tokens.accept(&id("a"), &one, 1_000, 0));
        assert!(tokens.accept(&id("a"), &two, 2_000, 0));
        assert!(tokens.accept(&id("a"), &two, 2_000, 0), "the same once more");
        assert_eq!(tokens.proves(&id("a"), &one), Some(1_301));
        assert_eq!(tokens.proves(&id("a"), &two), Some(2_301));
        assert_eq!(tokens.proves(&id("b"), &two), None);
        assert!(tokens.accept(&id("a"), &three, 3_000, 0));
        assert_eq!(tokens.proves(&id("a"), &one), None);
        assert_eq!(tokens.token_of(&id("a"), 3_300).unwrap().text(), &three);
        assert!(tokens.token_of(&id("a"), 3_301).is_none());
        assert_eq!(tokens.take_renewed(), [id("a")]);
        assert!(tokens.take_renewed().is_empty());
    }

    #[test]
    fn what_the_upstream_refuses_proves_nothing_but_a_newer_one_stays() {
        let (tokens, changed) = tokens();
        let (one, two) = (text("one"), text("two"));
        tokens.accept(&id("a"), &one, 1_000, 0);
        tokens.accept(&id("a"), &two, 1_000, 0);
        tokens.refused(&id("a"), &one);
        assert!(tokens.proves(&id("a"), &two).is_some() && !changed.has_changed().unwrap());
        tokens.refused(&id("a"), &two);
        assert!(tokens.token_of(&id("a"), 0).is_none() && changed.has_changed().unwrap());
        assert!(tokens.take_renewed().is_empty());
    }

    #[test]
    fn there_is_room_for_a_number_of_clients_and_for_more_once_their_tokens_expired() {
        let (tokens, _) = tokens();
        for number in 0..CLIENT_TOKENS_MAX {
            assert!(tokens.accept(&id(&format!("d{number}")), &text("t"), 1_000, 0));
        }
        assert!(!tokens.accept(&id("late"), &text("t"), 1_000, 0));
        assert!(tokens.accept(&id("d0"), &text("newer"), 2_000, 0), "a newer one of a known client");
        assert!(tokens.accept(&id("late"), &text("t"), 2_000, 1_301));
        assert!(tokens.token_of(&id("d0"), 0).is_some() && tokens.token_of(&id("d1"), 0).is_none());
    }
}
