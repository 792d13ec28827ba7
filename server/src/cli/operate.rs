//! Owns the command line of the verbs that ask a running hub.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::parse_assignment;

/// Options of every verb that asks a running hub.
#[derive(Args, Clone, Debug)]
pub struct OperateOptions {
    /// Unix socket of the hub; not given, it is found in the settings as the hub finds it
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// The settings file that the hub has; environment variables override it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Overrides one setting, for example --set StorageFolder=/var/lib/edgehub (may be repeated)
    #[arg(long = "set", value_name = "NAME=VALUE", value_parser = parse_assignment)]
    pub set: Vec<(String, String)>,
    /// How the answer is printed
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
}

impl OperateOptions {
    /// The flags as the settings take them: spelling, name, value.
    pub fn flags(&self) -> Vec<(String, String, String)> {
        self.set.iter().map(|(name, text)| ("--set".to_owned(), name.clone(), text.clone())).collect()
    }
}

/// How an answer is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Tables for people
    Text,
    /// The hub's own answer, for programs
    Json,
}

/// Options of `edgehub ledger`.
#[derive(Args, Clone, Debug)]
pub struct LedgerOptions {
    /// Where the hub is, and how its answer is printed.
    #[command(flatten)]
    pub operate: OperateOptions,
}

/// Options of `edgehub status`.
#[derive(Args, Clone, Debug)]
pub struct StatusOptions {
    /// Where the hub is, and how its answer is printed.
    #[command(flatten)]
    pub operate: OperateOptions,
}

/// Subcommands of `edgehub clients`.
#[derive(Clone, Debug, Subcommand)]
pub enum ClientsCommand {
    /// Lists the clients that are connected
    List {
        /// Where the hub is, and how its answer is printed.
        #[command(flatten)]
        operate: OperateOptions,
    },
    /// Shows one of them
    Show {
        /// device or device/module
        #[arg(value_name = "ID")]
        id: String,
        /// Where the hub is, and how its answer is printed.
        #[command(flatten)]
        operate: OperateOptions,
    },
    /// Closes the connection of a client, which may come again; says what it would do, and does it with --apply
    Kick {
        /// device or device/module
        #[arg(value_name = "ID")]
        id: String,
        /// Do it
        #[arg(long)]
        apply: bool,
        /// Where the hub is, and how its answer is printed.
        #[command(flatten)]
        operate: OperateOptions,
    },
}

/// Options of `edgehub tap`.
#[derive(Args, Clone, Debug)]
pub struct TapCommandOptions {
    /// Only messages that meet this condition, as behind WHERE of a route
    #[arg(long = "where", value_name = "CONDITION")]
    pub condition: Option<String>,
    /// Only messages of this source, as behind FROM of a route; not given: /messages/*
    #[arg(long, value_name = "SOURCE")]
    pub from: Option<String>,
    /// Ends after so many messages
    #[arg(long, value_name = "COUNT", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub limit: u32,
    /// Ends after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=280))]
    pub seconds: u32,
    /// Shows bodies as well
    #[arg(long)]
    pub bodies: bool,
    /// Where the hub is, and how its answer is printed.
    #[command(flatten)]
    pub operate: OperateOptions,
}

/// Subcommands of `edgehub queues`.
#[derive(Clone, Debug, Subcommand)]
pub enum QueuesCommand {
    /// Lists all queues, detached ones included
    List {
        /// Where the hub is, and how its answer is printed.
        #[command(flatten)]
        operate: OperateOptions,
    },
    /// Shows a queue and what waits in it, the oldest first
    Show {
        /// Name of the queue
        #[arg(value_name = "NAME")]
        name: String,
        /// Which part of it.
        #[command(flatten)]
        page: PageOptions,
        /// Where the hub is, and how its answer is printed.
        #[command(flatten)]
        operate: OperateOptions,
    },
    /// Drops what waits in a queue, counted as purged; says what it would do, and does it with --apply
    Purge {
        /// Name of the queue
        #[arg(value_name = "NAME")]
        name: String,
        /// Only messages before this offset
        #[arg(long, value_name = "OFFSET")]
        before: Option<u64>,
        /// Do it
        #[arg(long)]
        apply: bool,
        /// Where the hub is, and how its answer is printed.
        #[command(flatten)]
        operate: OperateOptions,
    },
    /// Puts all dead letters of a queue back into it; says what it would do, and does it with --apply
    Redrive {
        /// Name of the queue
        #[arg(value_name = "NAME")]
        name: String,
        /// Do it
        #[arg(long)]
        apply: bool,
        /// Where the hub is, and how its answer is printed.
        #[command(flatten)]
        operate: OperateOptions,
    },
}

/// Subcommands of `edgehub dlq`.
#[derive(Clone, Debug, Subcommand)]
pub enum DeadLettersCommand {
    /// Lists dead letters, the oldest first
    List {
        /// Only those of this queue
        #[arg(long, value_name = "NAME")]
        queue: Option<String>,
        /// Which part of them.
        #[command(flatten)]
        page: PageOptions,
        /// Where the hub is, and how its answer is printed.
        #[command(flatten)]
        operate: OperateOptions,
    },
    /// Shows one dead letter
    Show {
        /// Its id
        #[arg(value_name = "ID")]
        id: u64,
        /// Shows its body as well
        #[arg(long)]
        bodies: bool,
        /// Where the hub is, and how its answer is printed.
        #[command(flatten)]
        operate: OperateOptions,
    },
    /// Puts dead letters back into their queues; says what it would do, and does it with --apply
    Redrive {
        /// Which ones, and whether it is done.
        #[command(flatten)]
        letters: LettersOptions,
        /// Where the hub is, and how its answer is printed.
        #[command(flatten)]
        operate: OperateOptions,
    },
    /// Drops dead letters for good; says what it would do, and does it with --apply
    Drop {
        /// Which ones, and whether it is done.
        #[command(flatten)]
        letters: LettersOptions,
        /// Where the hub is, and how its answer is printed.
        #[command(flatten)]
        operate: OperateOptions,
    },
}

/// A part of a list.
#[derive(Args, Clone, Debug)]
pub struct PageOptions {
    /// Begins with this offset, or with this id of a dead letter
    #[arg(long, value_name = "NUMBER")]
    pub from: Option<u64>,
    /// Shows so many at most
    #[arg(long, value_name = "COUNT", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub limit: u16,
    /// Shows bodies as well
    #[arg(long)]
    pub bodies: bool,
}

/// Some dead letters.
#[derive(Args, Clone, Debug)]
#[command(group = clap::ArgGroup::new("letters").required(true).args(["ids", "queue", "all"]))]
pub struct LettersOptions {
    /// Their ids, as `edgehub dlq list` shows them
    #[arg(value_name = "ID")]
    pub ids: Vec<u64>,
    /// All of this queue
    #[arg(long, value_name = "NAME")]
    pub queue: Option<String>,
    /// All
    #[arg(long)]
    pub all: bool,
    /// Do it
    #[arg(long)]
    pub apply: bool,
}
