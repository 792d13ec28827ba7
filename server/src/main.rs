//! The edgehub program.

use std::process::ExitCode;

use clap::Parser as _;
use edgehub::certificate::authority;
use edgehub::cli::{CertificateCommand, Command, CommandLine, CreateDemoOptions};
use edgehub::exit::Failure;

fn main() -> ExitCode {
    match command_line().and_then(execute) {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("edgehub: {failure}");
            failure.exit_code()
        }
    }
}

fn execute(line: Option<CommandLine>) -> Result<ExitCode, Failure> {
    let Some(line) = line else { return Ok(ExitCode::SUCCESS) };
    match line.command {
        None => edgehub::run::run(&line.run)?,
        Some(Command::Run(options)) => edgehub::run::run(&options)?,
        Some(Command::Cloud(options)) => edgehub::cloud::execute(&options)?,
        Some(Command::Demo(options)) => return Ok(edgehub::demo::run(&options)),
        Some(Command::Config(command)) => edgehub::settings::command::execute(&command)?,
        Some(Command::Route(command)) => return edgehub::route::execute(&command),
        Some(Command::Ledger(options)) => return edgehub::admin::command::ledger(&options),
        Some(Command::Queues(command)) => return edgehub::admin::command::queues(&command),
        Some(Command::Dlq(command)) => return edgehub::admin::command::dead_letters(&command),
        Some(Command::Store(command)) => return edgehub::store::execute(&command),
        Some(Command::Certificate(CertificateCommand::CreateDemo(options))) => create_demo(&options)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The command line, or nothing when it only asked for a text that has been printed.
fn command_line() -> Result<Option<CommandLine>, Failure> {
    CommandLine::try_parse().map(Some).or_else(|error| {
        if error.use_stderr() {
            let text = error.to_string();
            // The first paragraph says what is wrong; what is missing stands in lines of its own there.
            let lines: Vec<&str> = text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
            let what = lines.join(" ");
            return Err(Failure::CommandLine(format!(
                "{}; see edgehub --help",
                what.trim_start_matches("error: ")
            )));
        }
        error.print().map_err(|source| Failure::System { what: "standard output", source })?;
        Ok(None)
    })
}

fn create_demo(options: &CreateDemoOptions) -> Result<(), Failure> {
    let files = authority::write_demo(&options.out, &options.names)?;
    println!("EdgeHubDevServerCertificateFile={}", files.certificate.display());
    println!("EdgeHubDevServerPrivateKeyFile={}", files.private_key.display());
    println!("EdgeHubDevTrustBundleFile={}", files.root.display());
    Ok(())
}
