//! Owns how the hub comes to its configuration: which source the settings choose, and what is said while there is none.

use edgehub_broker::configuration::{
    Configuration, ConfigurationOptions, ConfigurationState, ProgramVersion, StartError,
};
use edgehub_broker::hub::Hub;
use edgehub_broker::upstream::{UpstreamState, UpstreamStatus};
use edgehub_routing::{ConfigError, HubConfig};
use edgehub_storage::{Store, Table};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tracing::info;

use crate::exit::Failure;
use crate::manifest::Manifest;
use crate::pages::{Health, Pages};
use crate::settings::{ConfigSource, Settings};

/// Where the hub's configuration comes from; what a manifest says can be read, its routes are not compiled yet.
#[derive(Clone, Debug)]
pub enum Source {
    /// The manifest, for good.
    File(HubConfig),
    /// The hub's own twin; until one is known, the manifest, if there is one.
    Twin(Option<HubConfig>),
}

impl Source {
    /// The source that the settings choose; not chosen, it is the manifest if there is one, else the twin.
    ///
    /// # Errors
    /// The manifest is to be used and is missing, or cannot be.
    pub fn choose(settings: &Settings, manifest: Option<&Manifest>) -> Result<Self, Failure> {
        let refused = |error: ConfigError| Failure::Configuration(error.to_string());
        let config = match manifest {
            None => None,
            Some(manifest) => {
                let config = HubConfig::parse(&manifest.hub_desired).map_err(refused)?;
                config.hub_wide_time_to_live_secs().map_err(refused)?;
                Some(config)
            }
        };
        match (settings.configuration.source, config) {
            (None | Some(ConfigSource::File), Some(config)) => Ok(Self::File(config)),
            (Some(ConfigSource::File), None) => Err(Failure::NoConfiguration),
            (None | Some(ConfigSource::Twin), config) => Ok(Self::Twin(config)),
        }
    }
}

/// Starts to keep the hub configured. What is known without the upstream is in force when it returns.
pub(super) fn start(
    hub: &Hub,
    source: &Source,
    settings: &Settings,
    store: &Store,
    control: &Handle,
) -> Result<Configuration, Failure> {
    let strict = settings.routing.strict;
    let started = match source {
        Source::File(config) => Configuration::from_file(hub, config, strict),
        Source::Twin(first) => {
            let options = ConfigurationOptions {
                strict,
                refresh_period: settings.configuration.refresh_period,
                report_pause: settings.configuration.report_pause,
                version: ProgramVersion {
                    version: env!("CARGO_PKG_VERSION").into(),
                    ..ProgramVersion::default()
                },
            };
            let table = store.keyed(Table::Configuration);
            control.block_on(Configuration::from_twin(
                hub,
                hub.clone(),
                first.as_ref(),
                table,
                &options,
                control,
            ))
        }
    };
    started.map_err(|StartError::Refused(error)| Failure::Configuration(error.to_string()))
}

/// Returns as soon as a configuration is in force; until then the pages say what is waited for.
pub(super) async fn wait(
    mut state: watch::Receiver<ConfigurationState>,
    mut upstream: Option<watch::Receiver<UpstreamStatus>>,
    pages: &Pages,
) {
    let mut said = String::new();
    loop {
        let reason = {
            let state = state.borrow_and_update();
            if state.in_force.is_some() {
                return;
            }
            let upstream = upstream.as_mut().map(watch::Receiver::borrow_and_update);
            missing(&state, upstream.as_deref())
        };
        if reason != said {
            // The pages first: whoever reads the line and asks them finds the same.
            pages.set_health(Health::NoConfiguration(reason.clone()));
            info!("The ports stay closed: {reason}");
            said = reason;
        }
        let upstream_changed = async {
            match &mut upstream {
                Some(upstream) => upstream.changed().await,
                None => std::future::pending().await,
            }
        };
        let changed = tokio::select! {
            changed = state.changed() => changed,
            changed = upstream_changed => changed,
        };
        if changed.is_err() {
            // What is gone is gone with the hub; nothing will come into force.
            return std::future::pending().await;
        }
    }
}

/// Why no configuration is in force, and what helps.
fn missing(state: &ConfigurationState, upstream: Option<&UpstreamStatus>) -> String {
    if let Some(refused) = &state.desired {
        return format!("no configuration is in force; {}; deploy a corrected one", refused.description);
    }
    if let Some(error) = &state.pull_failed {
        return format!("no configuration is stored, and the twin of $edgeHub cannot be read: {error}");
    }
    match upstream {
        Some(UpstreamStatus { state: UpstreamState::Up | UpstreamState::Throttled, .. }) | None => {
            "no configuration is stored; waiting for the twin of $edgeHub".into()
        }
        Some(UpstreamStatus { address, reason, .. }) => format!(
            "no configuration is stored, and the upstream {address} is not connected ({reason}); it is tried again \
             and again, or give a manifest with --manifest FILE"
        ),
    }
}
