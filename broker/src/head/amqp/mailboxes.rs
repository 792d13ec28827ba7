//! The mailboxes of all identities of a connection. One is looked into only when it rang, so a connection with
//! thousands of identities costs no more per turn than one with a single identity.

use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use ahash::AHashMap;
use parking_lot::Mutex;

use crate::backend::{Command, CommandReceiver};
use crate::identity::Identity;

/// Mailboxes by identity.
#[derive(Default)]
pub(super) struct Mailboxes {
    slots: AHashMap<Identity, Slot>,
    rung: Arc<Rung>,
}

struct Slot {
    mailbox: CommandReceiver,
    waker: Waker,
}

/// Who has to be looked at, and the task that looks.
#[derive(Default)]
struct Rung {
    identities: Mutex<Vec<Identity>>,
    task: Mutex<Option<Waker>>,
}

struct Bell {
    identity: Identity,
    rung: Arc<Rung>,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rung.identities.lock().push(self.identity.clone());
        let task = self.rung.task.lock().clone();
        if let Some(task) = task {
            task.wake();
        }
    }
}

impl Mailboxes {
    /// Adds a mailbox; one that the identity had before is dropped.
    pub(super) fn insert(&mut self, identity: &Identity, mailbox: CommandReceiver) {
        let bell = Arc::new(Bell { identity: identity.clone(), rung: self.rung.clone() });
        self.slots.insert(identity.clone(), Slot { mailbox, waker: bell.clone().into() });
        // The first look registers the bell.
        bell.wake();
    }

    /// Drops a mailbox with what is in it.
    pub(super) fn remove(&mut self, identity: &Identity) {
        self.slots.remove(identity);
    }

    /// The next command of any identity; no command when its mailbox was closed.
    pub(super) fn poll_command(&mut self, cx: &mut Context<'_>) -> Poll<(Identity, Option<Command>)> {
        {
            let mut task = self.rung.task.lock();
            if task.as_ref().is_none_or(|task| !task.will_wake(cx.waker())) {
                *task = Some(cx.waker().clone());
            }
        }
        // Taken as a whole: a mailbox that rings again at once has its turn with the next poll.
        let mut rung = std::mem::take(&mut *self.rung.identities.lock());
        while let Some(identity) = rung.pop() {
            let Some(slot) = self.slots.get_mut(&identity) else { continue };
            let mut of_slot = Context::from_waker(&slot.waker);
            if let Poll::Ready(command) = slot.mailbox.poll_recv(&mut of_slot) {
                // There may be more in it.
                rung.push(identity.clone());
                self.rung.identities.lock().append(&mut rung);
                return Poll::Ready((identity, command));
            }
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;
    use crate::backend::{CloseReason, Mailbox};

    #[tokio::test]
    async fn commands_of_many_arrive_and_the_silent_are_not_looked_at() {
        let mut mailboxes = Mailboxes::default();
        let mut senders = Vec::new();
        for number in 0..2_000 {
            let (sender, mailbox) = Mailbox::channel(4);
            let identity = Identity::device(&format!("d{number}")).unwrap();
            mailboxes.insert(&identity, mailbox);
            senders.push((identity, sender));
        }
        let first = poll_fn(|cx| Poll::Ready(mailboxes.poll_command(cx).is_pending())).await;
        assert!(first);
        // A mailbox whose first look was cut short by the runtime's budget rings again by itself.
        let until_silent = async {
            while !mailboxes.rung.identities.lock().is_empty() {
                tokio::task::yield_now().await;
                poll_fn(|cx| Poll::Ready(mailboxes.poll_command(cx).is_pending())).await;
            }
        };
        until_silent.await;
        let (identity, sender) = &senders[1_234];
        for _ in 0..3 {
            sender.send(Command::Close(CloseReason::TakenOver)).await.unwrap();
        }
        assert_eq!(mailboxes.rung.identities.lock().len(), 1, "only the one that rang");
        for _ in 0..3 {
            let (from, command) = poll_fn(|cx| mailboxes.poll_command(cx)).await;
            assert_eq!(from, *identity);
            assert!(matches!(command, Some(Command::Close(CloseReason::TakenOver))));
        }
        let (gone, sender) = senders.swap_remove(7);
        drop(sender);
        let (from, command) = poll_fn(|cx| mailboxes.poll_command(cx)).await;
        assert_eq!((from, command.is_none()), (gone.clone(), true));
        mailboxes.remove(&gone);
        assert!(poll_fn(|cx| Poll::Ready(mailboxes.poll_command(cx).is_pending())).await);
    }
}
