//! The way from the hub to one connection: a bounded channel of commands.
//!
//! A channel holds room for a number of commands from its first moment on, and a hub has as many channels as clients,
//! most of which are told next to nothing. So what lies in it is a pointer to each command.

use std::task::{Context, Poll};

use tokio::sync::mpsc;
use tokio::sync::mpsc::error::{SendError, TryRecvError, TrySendError};

use super::Command;

/// The hub's end, bounded by [`MAILBOX_COMMANDS_MAX`](super::MAILBOX_COMMANDS_MAX). Cheap to clone.
#[derive(Clone, Debug)]
pub struct Mailbox {
    sender: mpsc::Sender<Box<Command>>,
}

/// The connection's end.
#[derive(Debug)]
pub struct CommandReceiver {
    receiver: mpsc::Receiver<Box<Command>>,
}

/// A place in a mailbox.
#[derive(Debug)]
pub struct Place<'a> {
    permit: mpsc::Permit<'a, Box<Command>>,
}

/// The connection takes no more commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the connection has ended")]
pub struct MailboxClosed;

impl Mailbox {
    /// A mailbox for this many commands, and its other end.
    ///
    /// # Panics
    /// When `commands_max` is 0.
    pub fn channel(commands_max: usize) -> (Self, CommandReceiver) {
        let (sender, receiver) = mpsc::channel(commands_max);
        (Self { sender }, CommandReceiver { receiver })
    }

    /// Sends a command; waits while the mailbox is full. Nothing is sent if the future is dropped.
    ///
    /// # Errors
    /// The connection has ended; the command comes back.
    pub async fn send(&self, command: Command) -> Result<(), SendError<Command>> {
        match self.sender.reserve().await {
            Ok(permit) => {
                permit.send(Box::new(command));
                Ok(())
            }
            Err(_) => Err(SendError(command)),
        }
    }

    /// Sends a command if there is room.
    ///
    /// # Errors
    /// The mailbox is full, or the connection has ended; the command comes back.
    pub fn try_send(&self, command: Command) -> Result<(), TrySendError<Command>> {
        match self.sender.try_reserve() {
            Ok(permit) => {
                permit.send(Box::new(command));
                Ok(())
            }
            Err(TrySendError::Full(())) => Err(TrySendError::Full(command)),
            Err(TrySendError::Closed(())) => Err(TrySendError::Closed(command)),
        }
    }

    /// Waits for a place. Cancel safe.
    ///
    /// # Errors
    /// The connection has ended.
    pub async fn reserve(&self) -> Result<Place<'_>, MailboxClosed> {
        let permit = self.sender.reserve().await.map_err(|_| MailboxClosed)?;
        Ok(Place { permit })
    }

    /// Waits for the end of the connection. Cancel safe.
    pub async fn closed(&self) {
        self.sender.closed().await;
    }

    /// Whether both lead to the same connection.
    pub fn is_same(&self, other: &Self) -> bool {
        self.sender.same_channel(&other.sender)
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }
}

impl Place<'_> {
    /// Takes the place.
    pub fn send(self, command: Command) {
        self.permit.send(Box::new(command));
    }
}

impl CommandReceiver {
    /// The next command; none when every [`Mailbox`] is gone. Cancel safe.
    pub async fn recv(&mut self) -> Option<Command> {
        self.receiver.recv().await.map(|command| *command)
    }

    /// The same for a task that polls.
    pub fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Option<Command>> {
        self.receiver.poll_recv(cx).map(|command| command.map(|command| *command))
    }

    /// The next command if there is one.
    ///
    /// # Errors
    /// There is none at present, or there will never be one.
    pub fn try_recv(&mut self) -> Result<Command, TryRecvError> {
        self.receiver.try_recv().map(|command| *command)
    }

    /// Takes no more commands; those that are there can still be received.
    pub fn close(&mut self) {
        self.receiver.close();
    }
}
