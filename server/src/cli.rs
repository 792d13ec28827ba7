//! Owns the command line.

mod operate;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use edgehub_broker::upstream::plain::AddressTemplate;

pub use operate::{
    ClientsCommand, DeadLettersCommand, Format, LedgerOptions, LettersOptions, OperateOptions, PageOptions,
    QueuesCommand, StatusOptions, TapCommandOptions,
};

use crate::demo::DemoOptions;
use crate::store::StoreCommand;

/// The command line. Without a subcommand the hub runs, as a container starts it.
#[derive(Debug, Parser)]
#[command(name = "edgehub", version, about, args_conflicts_with_subcommands = true)]
pub struct CommandLine {
    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Options of `run`, for a command line without subcommand.
    #[command(flatten)]
    pub run: RunOptions,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Runs the hub (also without a subcommand)
    Run(RunOptions),
    /// Runs the local stand-in for the cloud hub, or manages its identities
    Cloud(Box<CloudOptions>),
    /// Shows the hub at work: cloud, hub and modules on this machine, an outage, a kill, and the account of it all
    Demo(DemoOptions),
    /// Says what a hub with these settings would stumble over; exit code 0 for nothing, 1 for warnings, 2 for errors
    Check(CheckOptions),
    /// Shows the settings, their schema and their reference; needs no running hub
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Makes certificates
    #[command(subcommand)]
    Certificate(CertificateCommand),
    /// Checks routes, explains what they do with a message, tests them against vectors; needs no running hub
    #[command(subcommand)]
    Route(RouteCommand),
    /// Shows a running hub on one screen; exit code 1 when it is not ready
    Status(StatusOptions),
    /// Shows who is connected to a running hub, and closes connections
    #[command(subcommand)]
    Clients(ClientsCommand),
    /// Shows messages as a running hub accepts them: a bounded sample, nothing is changed
    Tap(TapCommandOptions),
    /// Shows the account of a running hub; exit code 1 when it does not add up
    Ledger(LedgerOptions),
    /// Looks into the queues of a running hub
    #[command(subcommand)]
    Queues(QueuesCommand),
    /// Looks into the dead letters of a running hub, puts them back or drops them
    #[command(subcommand)]
    Dlq(DeadLettersCommand),
    /// Looks at the store of a stopped hub, checks it, repairs it, exports it
    #[command(subcommand)]
    Store(StoreCommand),
}

/// Options of `edgehub cloud`.
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct CloudOptions {
    /// What to do instead of serving.
    #[command(subcommand)]
    pub command: Option<CloudCommand>,
    /// Folder of the identity registry and the telemetry log
    #[arg(long, value_name = "DIR", required = true)]
    pub data_dir: Option<PathBuf>,
    /// Name that hubs and devices call the cloud hub by; part of every token
    #[arg(long, value_name = "NAME", default_value = "localhost")]
    pub host_name: String,
    /// PEM file of the server certificate and its chain
    #[arg(long, value_name = "FILE", required = true)]
    pub certificate: Option<PathBuf>,
    /// PEM file of the certificate's private key
    #[arg(long, value_name = "FILE", required = true)]
    pub private_key: Option<PathBuf>,
    /// Address of the AMQP endpoint
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:5671")]
    pub amqp_listen: SocketAddr,
    /// Address of the HTTPS endpoint
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:443")]
    pub https_listen: SocketAddr,
    /// Address of an MQTT endpoint for devices that connect to the cloud directly; none without it
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub mqtt_listen: Option<SocketAddr>,
    /// Least severe level that is logged: verbose, debug, info, warning, error or fatal
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log_level: String,
}

/// Subcommands of `edgehub cloud`.
#[derive(Debug, Subcommand)]
pub enum CloudCommand {
    /// Manages identities
    #[command(subcommand)]
    Identity(IdentityCommand),
    /// Prints the connection string of services, or of an identity; the key of services is made when there is none
    ConnectionString(ConnectionStringOptions),
    /// Reads and changes twins, also beside a running stand-in
    #[command(subcommand)]
    Twin(TwinCommand),
    /// Runs a local stand-in for the security daemon: the workload API on a Unix socket, for the modules of one device
    Workload(WorkloadOptions),
}

/// Options of `edgehub cloud connection-string`.
#[derive(Args, Debug)]
pub struct ConnectionStringOptions {
    /// Folder of the identity registry
    #[arg(long, value_name = "DIR")]
    pub data_dir: PathBuf,
    /// Name of the cloud hub, as `edgehub cloud --host-name` gets it
    #[arg(long, value_name = "NAME", default_value = "localhost")]
    pub host_name: String,
    /// The device; without one the string is that of services
    #[arg(long, value_name = "ID")]
    pub device_id: Option<String>,
    /// The module on the device
    #[arg(long, value_name = "ID", requires = "device_id")]
    pub module_id: Option<String>,
}

/// Subcommands of `edgehub cloud twin`.
#[derive(Debug, Subcommand)]
pub enum TwinCommand {
    /// Prints a twin
    Get(TwinOptions),
    /// Merges a document into tags and desired properties: {"tags":{..},"properties":{"desired":{..}}}; null deletes
    Patch(ChangeTwinOptions),
    /// Replaces the tags and the desired properties that a document names
    Replace(ChangeTwinOptions),
}

/// Which twin.
#[derive(Args, Debug)]
pub struct TwinOptions {
    /// Folder of the identity registry
    #[arg(long, value_name = "DIR")]
    pub data_dir: PathBuf,
    /// The device
    #[arg(long, value_name = "ID")]
    pub device_id: String,
    /// The module on the device, such as $edgeHub
    #[arg(long, value_name = "ID")]
    pub module_id: Option<String>,
}

/// Options of `edgehub cloud twin patch` and `replace`.
#[derive(Args, Debug)]
pub struct ChangeTwinOptions {
    /// Which twin.
    #[command(flatten)]
    pub twin: TwinOptions,
    /// File with the document; `-` reads the standard input
    #[arg(value_name = "FILE")]
    pub document: PathBuf,
}

/// Options of `edgehub cloud workload`.
#[derive(Args, Debug)]
pub struct WorkloadOptions {
    /// Unix socket to listen on
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Folder of the identity registry; the authority that issues certificates is kept in it as well
    #[arg(long, value_name = "DIR")]
    pub data_dir: PathBuf,
    /// Name of the cloud hub, as `edgehub cloud --host-name` gets it
    #[arg(long, value_name = "NAME", default_value = "localhost")]
    pub host_name: String,
    /// The edge device whose modules are served
    #[arg(long, value_name = "ID")]
    pub device_id: String,
    /// PEM file that is passed on with the trust bundle (may be repeated)
    #[arg(long, value_name = "FILE")]
    pub trust_file: Vec<PathBuf>,
    /// Seconds that a server certificate is valid
    #[arg(long, value_name = "SECONDS", default_value_t = 90 * 86_400, value_parser = clap::value_parser!(u64).range(1..=315_360_000))]
    pub certificate_life_secs: u64,
    /// Least severe level that is logged: verbose, debug, info, warning, error or fatal
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log_level: String,
}

/// Subcommands of `edgehub cloud identity`.
#[derive(Debug, Subcommand)]
pub enum IdentityCommand {
    /// Creates a device or a module with new keys and prints its connection string
    Create(CreateIdentityOptions),
}

/// Options of `edgehub cloud identity create`.
#[derive(Args, Debug)]
pub struct CreateIdentityOptions {
    /// Folder of the identity registry
    #[arg(long, value_name = "DIR")]
    pub data_dir: PathBuf,
    /// Name of the cloud hub, as `edgehub cloud --host-name` gets it
    #[arg(long, value_name = "NAME", default_value = "localhost")]
    pub host_name: String,
    /// The device
    #[arg(long, value_name = "ID")]
    pub device_id: String,
    /// The module, to create one on an existing device
    #[arg(long, value_name = "ID", conflicts_with_all = ["edge_enabled", "parent"])]
    pub module_id: Option<String>,
    /// Makes it an edge device, with a hub module of its own
    #[arg(long)]
    pub edge_enabled: bool,
    /// The edge device that is its parent
    #[arg(long, value_name = "ID")]
    pub parent: Option<String>,
    /// The device proves itself by a certificate with this thumbprint (SHA-1 or SHA-256, hex); give it twice for two
    #[arg(long, value_name = "HEX", conflicts_with_all = ["module_id", "edge_enabled"])]
    pub x509_thumbprint: Vec<String>,
    /// The device proves itself by a certificate that a trusted authority issued for its id
    #[arg(long, conflicts_with_all = ["module_id", "edge_enabled", "x509_thumbprint"])]
    pub x509_authority: bool,
}

/// Options of `edgehub run`.
#[derive(Args, Clone, Debug, Default)]
pub struct RunOptions {
    /// Takes the hub's configuration (routes, time to live) from a deployment manifest
    #[arg(long, value_name = "FILE")]
    pub manifest: Option<PathBuf>,
    /// Where settings come from.
    #[command(flatten)]
    pub settings: SettingsOptions,
}

/// Options of every subcommand that reads settings.
#[derive(Args, Clone, Debug, Default)]
pub struct SettingsOptions {
    /// Reads settings from a TOML file; environment variables override it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Overrides one setting, for example --set listen.mqtt_port=8884 (may be repeated)
    #[arg(long = "set", value_name = "NAME=VALUE", value_parser = parse_assignment)]
    pub set: Vec<(String, String)>,
    /// Least severe level that is logged: verbose, debug, info, warning, error or fatal
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<String>,
}

/// Options of `edgehub check`.
#[derive(Args, Clone, Debug)]
pub struct CheckOptions {
    /// As the hub gets them.
    #[command(flatten)]
    pub run: RunOptions,
    /// Seconds that each step over the network may take
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=300))]
    pub timeout_secs: u16,
    /// Form of the report
    #[arg(long, value_enum, default_value_t = ReportFormat::Text)]
    pub format: ReportFormat,
}

/// Subcommands of `edgehub config`.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Shows each setting with its value and where it comes from; secrets are masked
    Show {
        /// Where settings come from.
        #[command(flatten)]
        settings: SettingsOptions,
        /// Leaves out what is a default
        #[arg(long)]
        given: bool,
        /// Form of the report
        #[arg(long, value_enum, default_value_t = ReportFormat::Text)]
        format: ReportFormat,
    },
    /// Prints the JSON schema of the settings file
    Schema,
    /// Prints the reference of the settings as Markdown tables
    Reference,
}

/// Subcommands of `edgehub certificate`.
#[derive(Debug, Subcommand)]
pub enum CertificateCommand {
    /// Makes a throw-away root and a server certificate for trying out
    CreateDemo(CreateDemoOptions),
}

/// Options of `edgehub certificate create-demo`.
#[derive(Args, Debug)]
pub struct CreateDemoOptions {
    /// Folder for root.pem, server.pem and server.key
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// DNS name or IP address of the hub (may be repeated)
    #[arg(long = "name", value_name = "NAME", default_values_t = ["localhost".to_owned(), "127.0.0.1".to_owned()])]
    pub names: Vec<String>,
}

/// Subcommands of `edgehub route`.
#[derive(Debug, Subcommand)]
pub enum RouteCommand {
    /// Compiles routes and reports their errors and lints; exit code 1 if there is an error
    Check(RouteCheckOptions),
    /// Shows what routes do with one message: the value of every part of each condition, and who won
    Explain(RouteExplainOptions),
    /// Runs files of routing vectors; exit code 1 if one fails
    Test(RouteTestOptions),
}

/// How a report is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReportFormat {
    /// For people.
    Text,
    /// For programs, with a stable schema.
    Json,
}

/// Options of `edgehub route check`.
#[derive(Args, Debug)]
pub struct RouteCheckOptions {
    /// Deployment manifest, desired properties of $edgeHub, JSON object of routes, or text with one route per line; - for standard input
    #[arg(value_name = "FILE", required = true)]
    pub files: Vec<String>,
    /// Form of the report
    #[arg(long, value_enum, default_value_t = ReportFormat::Text)]
    pub format: ReportFormat,
    /// Makes lints errors
    #[arg(long)]
    pub strict: bool,
}

/// Options of `edgehub route explain`.
#[derive(Args, Debug)]
pub struct RouteExplainOptions {
    /// A route: FROM … or NAME: FROM … (may be repeated)
    #[arg(long = "route", value_name = "ROUTE", required_unless_present = "file")]
    pub routes: Vec<String>,
    /// Takes the routes from a file as `edgehub route check` reads it
    #[arg(long, value_name = "FILE", conflicts_with = "routes")]
    pub file: Option<String>,
    /// JSON file of the message, in the form of the routing vectors; - for standard input
    #[arg(long, value_name = "FILE")]
    pub message: String,
    /// Id of the edge device, for the ids of endpoints
    #[arg(long, value_name = "ID", default_value = "edge")]
    pub edge_device_id: String,
    /// An address of its own at the upstream, as upstream.targets has it: ROUTE=ADDRESS (may be repeated)
    #[arg(long = "target", value_name = "ROUTE=ADDRESS", value_parser = route_target)]
    pub targets: Vec<(String, String)>,
    /// Form of the report
    #[arg(long, value_enum, default_value_t = ReportFormat::Text)]
    pub format: ReportFormat,
}

/// The name of a route and its target.
fn route_target(text: &str) -> Result<(String, String), String> {
    let (route, target) = text.split_once('=').ok_or("expected ROUTE=ADDRESS")?;
    let address: AddressTemplate = target.parse().map_err(|error| format!("{error}"))?;
    Ok((route.to_owned(), address.to_string()))
}

/// Options of `edgehub route test`.
#[derive(Args, Debug)]
pub struct RouteTestOptions {
    /// JSON file of vectors (may be repeated); - for standard input
    #[arg(value_name = "FILE", required = true)]
    pub files: Vec<String>,
}

impl SettingsOptions {
    /// The flags as the settings take them: spelling, name, value.
    pub fn flags(&self) -> Vec<(String, String, String)> {
        let set = self.set.iter().map(|(name, text)| ("--set".to_owned(), name.clone(), text.clone()));
        let level = self
            .log_level
            .iter()
            .map(|level| ("--log-level".to_owned(), "RuntimeLogLevel".to_owned(), level.clone()));
        set.chain(level).collect()
    }
}

fn parse_assignment(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.trim().is_empty() => Ok((name.trim().to_owned(), value.to_owned())),
        // The text may hold a secret and is not repeated here.
        _ => Err("expected NAME=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_definition_is_consistent() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn run_is_the_default() {
        let bare = CommandLine::try_parse_from(["edgehub", "--config", "c", "--set", "a=b=c"]).unwrap();
        assert!(bare.command.is_none());
        assert_eq!(bare.run.settings.config, Some(PathBuf::from("c")));
        assert_eq!(bare.run.settings.flags(), [("--set".into(), "a".into(), "b=c".into())]);
        let run = CommandLine::try_parse_from(["edgehub", "run", "--manifest", "m"]).unwrap();
        let Some(Command::Run(options)) = run.command else { panic!("{run:?}") };
        assert_eq!(options.manifest, Some(PathBuf::from("m")));
        assert!(CommandLine::try_parse_from(["edgehub", "--set", "a"]).is_err());
    }

    #[test]
    fn dead_letters_are_named_in_one_way() {
        let parse = |line: &str| CommandLine::try_parse_from(line.split(' '));
        for line in
            ["edgehub dlq redrive 1 2", "edgehub dlq drop --all", "edgehub dlq drop --queue q --apply"]
        {
            assert!(parse(line).is_ok(), "{line}");
        }
        for line in [
            "edgehub dlq drop",
            "edgehub dlq drop --apply",
            "edgehub dlq drop 1 --all",
            "edgehub dlq drop --queue q --all",
            "edgehub dlq redrive x",
            "edgehub dlq show",
            "edgehub queues purge",
            "edgehub queues show q --limit 0",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
