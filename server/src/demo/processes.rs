//! Owns the child processes: cloud stand-in and hub, both this very program, with their logs in files.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::process::{Child, Command};

use super::error::DemoError;

/// Environment variables that children inherit; none of the hub's settings may come from outside.
const INHERITED: [&str; 6] = ["PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "RUST_BACKTRACE", "TZ"];
const COMMAND_TIMEOUT: Duration = Duration::from_secs(20);
/// Bytes of a log's end that are shown.
const TAIL_BYTES_MAX: usize = 64 * 1024;

/// Starts this program again with other arguments.
pub(super) struct Program {
    executable: PathBuf,
    folder: PathBuf,
}

/// A child; killed when dropped.
pub(super) struct Running {
    name: &'static str,
    child: Child,
}

impl Program {
    /// This program, with logs in the folder.
    pub(super) fn current(folder: &Path) -> Result<Self, DemoError> {
        let executable =
            std::env::current_exe().map_err(DemoError::io("finding the file of this program"))?;
        Ok(Self { executable, folder: folder.to_owned() })
    }

    fn command(&self, arguments: &[OsString], environment: &[(&str, OsString)]) -> Command {
        let mut command = Command::new(&self.executable);
        let inherited = INHERITED.iter().filter_map(|name| Some((*name, std::env::var_os(name)?)));
        // A group of its own: Ctrl-C reaches this program alone, which then ends its children.
        command.args(arguments).env_clear().envs(inherited).process_group(0).kill_on_drop(true);
        command.envs(environment.iter().map(|(name, value)| (name, value))).stdin(Stdio::null());
        command
    }

    /// Starts a child; what it prints goes to its log.
    pub(super) fn start(
        &self,
        name: &'static str,
        arguments: &[OsString],
        environment: &[(&str, OsString)],
    ) -> Result<Running, DemoError> {
        let path = self.log_file(name);
        let log: File = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(DemoError::io(format!("opening {}", path.display())))?;
        let second = log.try_clone().map_err(DemoError::io(format!("opening {}", path.display())))?;
        let mut command = self.command(arguments, environment);
        let child = command
            .stdout(log)
            .stderr(second)
            .spawn()
            .map_err(DemoError::io(format!("starting the {name} ({})", self.executable.display())))?;
        Ok(Running { name, child })
    }

    /// Runs a command to its end and returns what it printed.
    pub(super) async fn output(&self, arguments: &[OsString]) -> Result<String, DemoError> {
        let shown: Vec<_> = arguments.iter().map(|argument| argument.to_string_lossy()).collect();
        let shown = format!("edgehub {}", shown.join(" "));
        let output = tokio::time::timeout(COMMAND_TIMEOUT, self.command(arguments, &[]).output())
            .await
            .map_err(|_| DemoError::Deadline {
                awaited: format!("`{shown}`"),
                limit_secs: COMMAND_TIMEOUT.as_secs(),
                last: "it did not end".into(),
            })?
            .map_err(DemoError::io(format!("running `{shown}`")))?;
        if !output.status.success() {
            let output_text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(DemoError::Command { command: shown, status: output.status, output: output_text });
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The log of a child.
    pub(super) fn log_file(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.log"))
    }

    /// The last lines of a child's log, at most `lines_max`.
    pub(super) fn log_tail(&self, name: &str, lines_max: usize) -> Vec<String> {
        let bytes = std::fs::read(self.log_file(name)).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(TAIL_BYTES_MAX)..]);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(lines_max)..].iter().map(|line| (*line).to_owned()).collect()
    }
}

impl Running {
    /// Kills the child (SIGKILL) and waits for its end.
    pub(super) async fn kill(&mut self) -> Result<(), DemoError> {
        self.child.kill().await.map_err(DemoError::io(format!("killing the {}", self.name)))
    }

    /// An error when the child has ended without being told to.
    pub(super) fn check(&mut self) -> Result<(), DemoError> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(self.ended(status)),
            Err(source) => Err(DemoError::Io { what: format!("looking after the {}", self.name), source }),
        }
    }

    fn ended(&self, status: ExitStatus) -> DemoError {
        DemoError::Ended { name: self.name, status }
    }
}
