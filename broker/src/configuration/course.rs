//! The order in which configurations come: stored, from a file, from the twin; and what comes of each.

use std::sync::Arc;
use std::time::Duration;

use edgehub_routing::HubConfig;
use edgehub_storage::KeyedState;
use serde::Serialize;
use serde_json::Value;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::document::{self, Status};
use super::report::{ProgramVersion, Reporter};
use super::{OwnTwin, stored};
use crate::delivery::{Backoff, BackoffOptions};
use crate::hub::{Applied, ApplyError, Hub};

/// Key of what is in force, in the table of the configuration.
const IN_FORCE_KEY: &[u8] = b"in-force";

/// Pauses after a pull that failed although the upstream can be reached.
const PULL_RETRY: BackoffOptions =
    BackoffOptions { first: Duration::from_secs(1), max: Duration::from_secs(60) };

/// How configurations are treated.
#[derive(Debug, Clone)]
pub struct ConfigurationOptions {
    /// Whether routes with lints are refused.
    pub strict: bool,
    /// Between two reads of the whole twin (`ConfigRefreshFrequencySecs`, 3600 s).
    pub refresh_period: Duration,
    /// Least time between two reports of clients (`ReportedPropertiesSyncFrequencySecs`, 5 s).
    pub report_pause: Duration,
    /// What is reported of the program.
    pub version: ProgramVersion,
}

/// Where the configuration in force comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// A file.
    File,
    /// The store: it was in force before the restart.
    Store,
    /// The hub's own twin.
    Twin,
}

/// A configuration that is in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct InForce {
    /// Where it comes from.
    pub origin: Origin,
    /// The routes, by name.
    pub routes: Vec<String>,
    /// Configurations that came into force since the start, this one included.
    pub count: u64,
}

/// How it stands with the configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ConfigurationState {
    /// What is in force; absent until something is.
    pub in_force: Option<InForce>,
    /// What came of the twin's desired properties; absent until there are some, and without a twin.
    pub desired: Option<Status>,
    /// Why the twin could not be read last time; absent when it could.
    pub pull_failed: Option<String>,
}

/// Why there is nothing to start with.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The file's configuration is refused.
    #[error(transparent)]
    Refused(#[from] ApplyError),
}

/// What keeps a hub configured. Dropping it ends that; what is in force stays.
#[derive(Debug)]
pub struct Configuration {
    state: watch::Receiver<ConfigurationState>,
    _tasks: JoinSet<()>,
}

impl Configuration {
    /// The configuration of a file, for good. No twin is read, and nothing is reported.
    ///
    /// # Errors
    /// When it cannot be put in force.
    pub fn from_file(hub: &Hub, config: &HubConfig, strict: bool) -> Result<Self, StartError> {
        let mut course = Course::new(hub.clone(), strict);
        course.apply(config, Origin::File)?;
        Ok(Self { state: course.state.subscribe(), _tasks: JoinSet::new() })
    }

    /// The configuration of the hub's own twin: at once what was in force before the restart, or else `first`; from
    /// then on the twin's desired properties as they come. Its tasks run on `runtime`.
    ///
    /// # Errors
    /// When `first` is needed and cannot be put in force.
    pub async fn from_twin<T: OwnTwin>(
        hub: &Hub,
        twin: T,
        first: Option<&HubConfig>,
        store: KeyedState,
        options: &ConfigurationOptions,
        runtime: &Handle,
    ) -> Result<Self, StartError> {
        let mut course = Course::new(hub.clone(), options.strict);
        course.restore(&store).await;
        if let Some(first) = first.filter(|_| !course.in_force()) {
            course.apply(first, Origin::File)?;
        }
        let twin = Arc::new(twin);
        let state = course.state.subscribe();
        let mut tasks = JoinSet::new();
        let reporter = Reporter::new(
            twin.clone(),
            hub.client_roll().clone(),
            options.version.clone(),
            course.status.subscribe(),
            options.report_pause,
        );
        tasks.spawn_on(reporter.run(), runtime);
        tasks.spawn_on(pull(twin.clone(), options.refresh_period, course.state.clone()), runtime);
        tasks.spawn_on(course.follow(twin, store), runtime);
        Ok(Self { state, _tasks: tasks })
    }

    /// How it stands.
    pub fn state(&self) -> watch::Receiver<ConfigurationState> {
        self.state.clone()
    }

    /// Returns as soon as a configuration is in force.
    pub async fn in_force(&self) {
        let mut state = self.state();
        if state.wait_for(|state| state.in_force.is_some()).await.is_err() {
            // Its tasks have been aborted: nothing will come into force.
            std::future::pending().await
        }
    }
}

struct Course {
    hub: Hub,
    strict: bool,
    state: watch::Sender<ConfigurationState>,
    status: watch::Sender<Option<Status>>,
    /// The twin's configuration that was applied last, and what came of it.
    last: Option<(HubConfig, Status)>,
}

impl Course {
    fn new(hub: Hub, strict: bool) -> Self {
        let (state, status) = (watch::Sender::default(), watch::Sender::default());
        Self { hub, strict, state, status, last: None }
    }

    fn in_force(&self) -> bool {
        self.state.borrow().in_force.is_some()
    }

    /// Puts in force what was before the restart.
    async fn restore(&mut self, store: &KeyedState) {
        let bytes = match store.get(IN_FORCE_KEY).await {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return,
            Err(error) => {
                tracing::error!(code = "EH4027", %error, "The stored configuration cannot be read; the upstream is asked for it");
                return;
            }
        };
        let applied = stored::decode(&bytes)
            .and_then(|config| self.apply(&config, Origin::Store).map_err(|error| error.to_string()));
        if let Err(error) = applied {
            tracing::error!(
                code = "EH4028",
                error,
                "The stored configuration cannot be used; the upstream is asked for it"
            );
        }
    }

    /// Follows the twin until it is gone.
    async fn follow<T: OwnTwin>(mut self, twin: Arc<T>, store: KeyedState) {
        let mut desired = twin.desired();
        loop {
            let newest = desired.borrow_and_update().clone();
            if let Some(newest) = newest {
                self.take(&Value::Object(newest.properties.clone()), &store).await;
            }
            if desired.changed().await.is_err() {
                return;
            }
        }
    }

    /// Takes desired properties; what is in force stays where they are bad.
    async fn take(&mut self, desired: &Value, store: &KeyedState) {
        let version = document::version(desired);
        let status = match document::read(desired) {
            Err(refusal) => Status::of_refusal(version, &refusal),
            Ok(config) => match &self.last {
                Some((last, status)) if *last == config => {
                    Status { desired_version: version, ..status.clone() }
                }
                _ => match self.apply(&config, Origin::Twin) {
                    Err(error) => Status::of_error(version, &error),
                    Ok(applied) => {
                        let status = Status::of_applied(version, &applied);
                        self.last = Some((config.clone(), status.clone()));
                        let bytes = stored::encode(&applied.in_force, &config);
                        if let Err(error) = store.put(IN_FORCE_KEY, bytes).await {
                            tracing::error!(code = "EH4029", %error, "The configuration in force cannot be stored");
                        }
                        status
                    }
                },
            },
        };
        metrics::counter!("edgehub_config_applied_total", "status" => status.code.to_string()).increment(1);
        if status.code != 200 && self.state.borrow().desired.as_ref() != Some(&status) {
            let Status { desired_version, description, .. } = &status;
            tracing::error!(code = "EH4030", version = desired_version, "{description}");
        }
        self.state.send_modify(|state| state.desired = Some(status.clone()));
        self.status.send_replace(Some(status));
    }

    fn apply(&mut self, config: &HubConfig, origin: Origin) -> Result<Applied, ApplyError> {
        let applied = match self.strict {
            true => self.hub.apply(&config.clone().with_lints_as_errors())?,
            false => self.hub.apply(config)?,
        };
        tracing::info!(routes = applied.routes.join(", "), "Routes in force");
        if let Some(bytes) = self.hub.store().space().max_bytes {
            tracing::info!(bytes, "The store is limited");
        }
        for error in &applied.malformed {
            tracing::error!(code = "EH4004", "{error}; the other routes run");
        }
        for error in &applied.rejected {
            tracing::error!(code = "EH4005", "{error}; the other routes run");
        }
        self.state.send_modify(|state| {
            let count = state.in_force.as_ref().map_or(1, |before| before.count + 1);
            state.in_force = Some(InForce { origin, routes: applied.routes.clone(), count });
        });
        Ok(applied)
    }
}

/// Reads the twin at the start, then once per period; after a failure sooner.
async fn pull<T: OwnTwin>(twin: Arc<T>, period: Duration, state: watch::Sender<ConfigurationState>) {
    let mut backoff = Backoff::with(PULL_RETRY);
    loop {
        twin.reachable().await;
        let failed = twin.pull().await.err().map(|error| error.to_string());
        let pause = match &failed {
            None => {
                backoff = Backoff::with(PULL_RETRY);
                period
            }
            Some(error) => {
                tracing::warn!(
                    code = "EH4031",
                    error,
                    "The twin of the hub cannot be read; its configuration stays"
                );
                backoff.fail()
            }
        };
        state.send_modify(|state| state.pull_failed = failed);
        sleep(pause).await;
    }
}
