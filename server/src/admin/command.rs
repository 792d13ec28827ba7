//! Owns the operator's verbs on the command line: find the hub, ask it, print its answer, choose the exit code.

use std::process::ExitCode;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::answer::{
    DeadLettersAnswer, LedgerAnswer, LettersAnswer, MessagesAnswer, PurgeAnswer, QueueAnswer, QueuesAnswer,
};
use super::client::{AdminClient, AdminError};
use super::print;
use super::request::{Letters, Page, Purge, Request, Select};
use crate::cli::{
    DeadLettersCommand, Format, LedgerOptions, LettersOptions, OperateOptions, PageOptions, QueuesCommand,
};
use crate::exit::Failure;
use crate::settings::AdminSocket;
use crate::{output, run};

/// `edgehub ledger`: exit code 1 when an account does not add up.
///
/// # Errors
/// Why the hub cannot be asked.
pub fn ledger(options: &LedgerOptions) -> Result<ExitCode, Failure> {
    let asked = Asked::new(&options.operate)?;
    let answer: LedgerAnswer = asked.hub(&Request::Ledger)?;
    asked.print(&answer, print::ledger)?;
    Ok(if answer.is_balanced() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// `edgehub queues`.
///
/// # Errors
/// Why the hub cannot be asked, or does not do it.
pub fn queues(command: &QueuesCommand) -> Result<ExitCode, Failure> {
    match command {
        QueuesCommand::List { operate } => {
            let asked = Asked::new(operate)?;
            asked.print(&asked.hub::<QueuesAnswer>(&Request::Queues)?, print::queues)?;
        }
        QueuesCommand::Show { name, page, operate } => {
            let asked = Asked::new(operate)?;
            let queue: QueueAnswer = asked.hub(&Request::Queue { name: name.clone() })?;
            let messages: MessagesAnswer =
                asked.hub(&Request::Messages { queue: name.clone(), page: page.into() })?;
            asked.print(&QueueShown { queue, messages }, |shown| {
                print::queue(&shown.queue, &shown.messages)
            })?;
        }
        QueuesCommand::Purge { name, before, apply, operate } => {
            let asked = Asked::new(operate)?;
            let order = Purge { before: *before, apply: *apply };
            let answer: PurgeAnswer = asked.hub(&Request::Purge { queue: name.clone(), order })?;
            asked.print(&answer, print::purged)?;
        }
        QueuesCommand::Redrive { name, apply, operate } => {
            let asked = Asked::new(operate)?;
            let select = Select::Queue { name: name.clone(), from: 0, below: None };
            asked.letters(select, *apply, Request::Redrive, print::redriven)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// `edgehub dlq`.
///
/// # Errors
/// Why the hub cannot be asked, or does not do it.
pub fn dead_letters(command: &DeadLettersCommand) -> Result<ExitCode, Failure> {
    match command {
        DeadLettersCommand::List { queue, page, operate } => {
            let asked = Asked::new(operate)?;
            let request = Request::DeadLetters { queue: queue.clone(), page: page.into() };
            asked.print(&asked.hub::<DeadLettersAnswer>(&request)?, print::dead_letters)?;
        }
        DeadLettersCommand::Show { id, bodies, operate } => {
            let asked = Asked::new(operate)?;
            asked
                .print(&asked.hub(&Request::DeadLetter { id: *id, bodies: *bodies })?, print::dead_letter)?;
        }
        DeadLettersCommand::Redrive { letters, operate } => {
            let asked = Asked::new(operate)?;
            asked.letters(letters.into(), letters.apply, Request::Redrive, print::redriven)?;
        }
        DeadLettersCommand::Drop { letters, operate } => {
            let asked = Asked::new(operate)?;
            asked.letters(letters.into(), letters.apply, Request::Drop, print::dropped)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What `edgehub queues show` prints.
#[derive(Serialize)]
struct QueueShown {
    queue: QueueAnswer,
    messages: MessagesAnswer,
}

/// A hub that can be asked, and how its answers are printed.
struct Asked {
    client: AdminClient,
    format: Format,
    runtime: tokio::runtime::Runtime,
}

impl Asked {
    fn new(options: &OperateOptions) -> Result<Self, Failure> {
        let path = match &options.socket {
            Some(path) => path.clone(),
            None => match AdminSocket::load(run::sources(options.config.as_deref(), options.flags()))? {
                AdminSocket::Given(path) | AdminSocket::Default(path) => path,
                AdminSocket::Off => return Err(AdminError::SwitchedOff.into()),
            },
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| Failure::System { what: "the command cannot be started", source })?;
        Ok(Self { client: AdminClient::new(path), format: options.format, runtime })
    }

    fn hub<T: DeserializeOwned>(&self, request: &Request) -> Result<T, Failure> {
        Ok(self.runtime.block_on(self.client.ask(request))?)
    }

    /// Does something with dead letters in as many requests as it takes, and prints what was done, also when the
    /// hub stops half-way.
    fn letters(
        &self,
        mut select: Select,
        apply: bool,
        request: fn(Letters) -> Request,
        text: fn(&LettersAnswer) -> String,
    ) -> Result<(), Failure> {
        let mut whole = LettersAnswer { applied: apply, ..LettersAnswer::default() };
        loop {
            let part = self.hub::<LettersAnswer>(&request(Letters { select: select.clone(), apply }));
            if part.is_err() && whole.total() > 0 {
                self.print(&whole, text)?;
            }
            whole.add(part?);
            match (whole.next.take(), &mut select) {
                (Some(next), Select::Queue { from, below, .. } | Select::All { from, below }) => {
                    (*from, *below) = (next, whole.below);
                }
                (None, _) | (Some(_), Select::Ids(_)) => return self.print(&whole, text),
            }
        }
    }

    fn print<T: Serialize>(&self, answer: &T, text: impl Fn(&T) -> String) -> Result<(), Failure> {
        match self.format {
            Format::Text => output::text(&text(answer)),
            Format::Json => output::json(answer),
        }
    }
}

impl From<&PageOptions> for Page {
    fn from(options: &PageOptions) -> Self {
        Self { from: options.from, limit: options.limit, bodies: options.bodies }
    }
}

impl From<&LettersOptions> for Select {
    fn from(options: &LettersOptions) -> Self {
        match (&options.queue, options.all) {
            (Some(name), _) => Self::Queue { name: name.clone(), from: 0, below: None },
            (None, true) => Self::All { from: 0, below: None },
            (None, false) => Self::Ids(options.ids.clone()),
        }
    }
}
