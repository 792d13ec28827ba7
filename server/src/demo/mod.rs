//! Owns `edgehub demo`: cloud, hub and two modules on this machine, an outage, a kill, and the account of it all.
//!
//! The script is `Show::play`; each step has a deadline. The exit code is 0 only if nothing that was acknowledged
//! is missing, order held, and the hub's own ledger agrees.

mod board;
mod client;
mod connection_string;
mod error;
mod filter;
mod http;
mod observe;
mod processes;
mod proxy;
mod report;
mod screen;
mod sensor;
mod site;
mod stay;
mod tally;

use std::future::Future;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

use board::{Board, Route};
use client::{Client, Link, Options};
use connection_string::ConnectionString;
pub use error::DemoError;
use observe::HubView;
use processes::Running;
use proxy::Proxy;
use report::Outcome;
use screen::Screen;
use site::{CLOUD_NAME, HUB_NAME, Site};

const NORMAL: Duration = Duration::from_secs(8);
const OUTAGE: Duration = Duration::from_secs(10);
const AFTER_DRAIN: Duration = Duration::from_secs(5);
const AFTER_KILL: Duration = Duration::from_secs(4);
const START_TIMEOUT: Duration = Duration::from_secs(30);
const DRAIN_TIMEOUT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);
const MESSAGES_PER_SECOND: u32 = 150;
/// With `--stay`: enough to see something, little enough to be left alone.
const MESSAGES_PER_SECOND_STAY: u32 = 10;
const LOG_LINES_SHOWN_MAX: usize = 15;
const EXIT_INTERRUPTED: u8 = 130;

/// Options of `edgehub demo`.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct DemoOptions {
    /// Keeps running until Ctrl-C and shows how to connect clients of your own
    #[arg(long)]
    pub stay: bool,
}

/// Runs the demonstration: 0 when it proved what it claims, 1 when not, 130 when interrupted.
pub fn run(options: &DemoOptions) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("edgehub demo: the runtime cannot be started: {error}");
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(demonstrate(options.stay))
}

async fn demonstrate(stay: bool) -> ExitCode {
    println!(
        "edgehub demo: cloud stand-in, hub and two simulated modules on this machine, real TLS sockets."
    );
    println!(
        "The routes are those of module-composition-example.json; its time to live is {} s here instead of 10, \
         for an outage of {} s would expire messages.",
        site::TIME_TO_LIVE_SECS,
        OUTAGE.as_secs()
    );
    let site = match unless_interrupted(Site::prepare(stay)).await {
        Ok(site) => site,
        Err(error) => {
            eprintln!("edgehub demo: {error}");
            return exit_code(&error);
        }
    };
    match played(&site, stay).await {
        Ok(true) if !stay => ExitCode::SUCCESS,
        Ok(good) => {
            println!("Files and logs are kept in {}", site.keep().display());
            if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error @ DemoError::Interrupted) => {
            eprintln!("edgehub demo: {error}");
            exit_code(&error)
        }
        Err(error) => {
            for name in ["cloud", "hub"] {
                for line in site.program.log_tail(name, LOG_LINES_SHOWN_MAX) {
                    eprintln!("{name}: {line}");
                }
            }
            eprintln!("edgehub demo: {error}");
            eprintln!("Files and logs are kept in {}", site.keep().display());
            exit_code(&error)
        }
    }
}

fn exit_code(error: &DemoError) -> ExitCode {
    match error {
        DemoError::Interrupted => ExitCode::from(EXIT_INTERRUPTED),
        _ => ExitCode::FAILURE,
    }
}

async fn played(site: &Site, stay: bool) -> Result<bool, DemoError> {
    let mut show = unless_interrupted(Show::start(site)).await?;
    if stay {
        show.screen.text(&stay::instructions(site));
        show.screen.phase("running until Ctrl-C");
        let endless = async { show.watch(Duration::MAX).await };
        match unless_interrupted(endless).await {
            Err(DemoError::Interrupted) => {}
            other => other?,
        }
        return unless_interrupted(show.finish()).await;
    }
    unless_interrupted(show.play()).await
}

/// Runs a step; Ctrl-C and its like end it, and with it everything that it owns.
async fn unless_interrupted<T>(step: impl Future<Output = Result<T, DemoError>>) -> Result<T, DemoError> {
    let listen = |kind| signal(kind).map_err(DemoError::io("listening for signals"));
    let (mut interrupt, mut terminate, mut hang_up) =
        (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?, listen(SignalKind::hangup())?);
    tokio::select! {
        result = step => result,
        _ = interrupt.recv() => Err(DemoError::Interrupted),
        _ = terminate.recv() => Err(DemoError::Interrupted),
        _ = hang_up.recv() => Err(DemoError::Interrupted),
    }
}

/// Everything that runs.
struct Show<'a> {
    site: &'a Site,
    screen: Screen,
    board: Board,
    cloud: Running,
    hub: Running,
    view: watch::Receiver<HubView>,
    cut: watch::Sender<bool>,
    stop_sensor: watch::Sender<bool>,
    clients: Vec<(&'static str, Client)>,
    drain: Option<(f64, u64)>,
    _proxies: [Proxy; 2],
    _tasks: JoinSet<()>,
}

impl<'a> Show<'a> {
    /// Starts cloud, links, hub and modules, and waits for the first message at the cloud.
    async fn start(site: &'a Site) -> Result<Show<'a>, DemoError> {
        let board = Board::default();
        let (view_sender, view) = watch::channel(HubView::default());
        let (cut, is_cut) = watch::channel(false);
        let (stop_sensor, _) = watch::channel(false);
        let mut tasks = JoinSet::new();
        let ports = site.ports;
        let cloud = site.program.start("cloud", &site.cloud_arguments(), &[])?;
        let link = async |near: std::net::SocketAddr, far| {
            let started = Proxy::start(near, far, is_cut.clone()).await;
            started.map_err(DemoError::io(format!("opening the link on {near}")))
        };
        let proxies = [
            link(ports.link_amqp, ports.cloud_amqp).await?,
            link(ports.link_https, ports.cloud_https).await?,
        ];
        let (fault_sender, cloud_fault) = watch::channel("not asked yet".to_owned());
        tasks.spawn(observe::follow_cloud(
            ports.cloud_https,
            CLOUD_NAME,
            site.tls.clone(),
            board.clone(),
            fault_sender,
        ));
        tasks.spawn(observe::watch_hub(ports.hub_pages, view_sender));
        let hub = site.program.start("hub", &site.hub_arguments(), &site.hub_environment())?;
        let screen = Screen::new(board.clone(), view.clone());
        let mut show = Show {
            site,
            screen,
            board,
            cloud,
            hub,
            view,
            cut,
            stop_sensor,
            clients: Vec::new(),
            drain: None,
            _proxies: proxies,
            _tasks: tasks,
        };
        show.until("the cloud stand-in's telemetry log", START_TIMEOUT, |_| {
            let fault = cloud_fault.borrow().clone();
            if fault.is_empty() { Ok(()) } else { Err(fault) }
        })
        .await?;
        show.until_healthy().await?;
        show.start_modules()?;
        show.until("the first message at the cloud", START_TIMEOUT, |show| {
            match show.board.lock().end_to_end.totals().seen {
                0 => Err(show.client_faults()),
                _ => Ok(()),
            }
        })
        .await?;
        show.screen.event("cloud, hub, sensor and filter are running; the first message reached the cloud");
        Ok(show)
    }

    /// The script.
    async fn play(&mut self) -> Result<bool, DemoError> {
        self.screen.phase("normal");
        self.watch(NORMAL).await?;
        self.outage().await?;
        self.screen.phase("normal");
        self.watch(AFTER_DRAIN).await?;
        self.kill_hub().await?;
        self.watch(AFTER_KILL).await?;
        self.finish().await
    }

    /// Cuts the way up, restores it, and measures how long what was held back takes to arrive.
    async fn outage(&mut self) -> Result<(), DemoError> {
        self.cut.send_replace(true);
        self.screen.event(&format!("the upstream is cut for {} s; messages are kept", OUTAGE.as_secs()));
        self.screen.phase("upstream cut");
        self.watch(OUTAGE).await?;
        let (last, held) = {
            let mut accounts = self.board.lock();
            let route = accounts.route(Route::FilterToCloud);
            let last = route.highest_acknowledged().unwrap_or(0);
            (last, route.missing_up_to(last))
        };
        self.cut.send_replace(false);
        self.screen.event(&format!("the upstream is back; {held} messages wait for it"));
        self.screen.phase("draining");
        let took = self
            .until("the messages that the outage held back", DRAIN_TIMEOUT, |show| {
                match show.board.lock().route(Route::FilterToCloud).missing_up_to(last) {
                    0 => Ok(()),
                    left => Err(format!("{left} of {held} have not arrived")),
                }
            })
            .await?;
        self.drain = Some((took.as_secs_f64(), held));
        self.screen.event(&format!("drained: {held} messages in {:.1} s", took.as_secs_f64()));
        Ok(())
    }

    /// Kills the hub while messages flow and starts it again at once.
    async fn kill_hub(&mut self) -> Result<(), DemoError> {
        self.hub.kill().await?;
        self.screen.event("the hub was killed (SIGKILL) and is started again");
        self.screen.phase("hub killed");
        let before = self.board.lock().route(Route::FilterToCloud).totals().seen;
        let site = self.site;
        self.hub = site.program.start("hub", &site.hub_arguments(), &site.hub_environment())?;
        let started = Instant::now();
        self.until_healthy().await?;
        self.until("messages at the cloud after the restart", START_TIMEOUT, |show| {
            match show.board.lock().route(Route::FilterToCloud).totals().seen > before {
                true => Ok(()),
                false => Err(show.client_faults()),
            }
        })
        .await?;
        let secs = started.elapsed().as_secs_f64();
        self.screen.event(&format!("the hub is back: messages reach the cloud again after {secs:.1} s"));
        self.screen.phase("normal");
        Ok(())
    }

    /// Stops the sensor, waits until all queues are empty, and prints table and verdict.
    async fn finish(&mut self) -> Result<bool, DemoError> {
        self.stop_sensor.send_replace(true);
        self.screen.event("the sensor stopped");
        self.screen.phase("draining");
        let drained = self.until("empty queues at the end", DRAIN_TIMEOUT, Self::drained).await;
        self.screen.clear();
        match drained {
            // The table says what is left.
            Err(DemoError::Deadline { last, .. }) => println!("Not drained: {last}"),
            other => drop(other?),
        }
        let outcome = self.outcome();
        self.screen.text(&outcome.table());
        let faults = outcome.faults();
        if faults.is_empty() {
            println!("PASS: nothing acknowledged is missing, order held, and the hub's ledger agrees.");
        } else {
            let missing = self.board.lock().end_to_end.first_missing(10);
            faults.iter().for_each(|fault| println!("FAIL: {fault}"));
            if !missing.is_empty() {
                println!("      first missing sequence numbers: {missing:?}");
            }
        }
        Ok(faults.is_empty())
    }

    fn drained(&self) -> Result<(), String> {
        let view = self.view.borrow();
        if !view.fault.is_empty() {
            return Err(format!("the hub's status page: {}", view.fault));
        }
        for route in Route::ALL {
            let (totals, ledger) = (self.board.lock().route(route).totals(), view.status.ledger(route));
            let settled = ledger.queued == 0 && (totals.seen..=totals.arrivals).contains(&ledger.delivered);
            let own = self.board.lock().others > 0 && ledger.queued == 0;
            if totals.unacknowledged() > 0 || totals.missing > 0 || !(settled || own) {
                let (name, unacknowledged) = (route.name(), totals.unacknowledged());
                let (missing, queued) = (totals.missing, ledger.queued);
                return Err(format!(
                    "{name}: {unacknowledged} unacknowledged, {missing} missing, {queued} queued"
                ));
            }
        }
        Ok(())
    }

    fn outcome(&self) -> Outcome {
        let view = self.view.borrow();
        let mut accounts = self.board.lock();
        Outcome {
            totals: Route::ALL.map(|route| accounts.route(route).totals()),
            ledgers: Route::ALL.map(|route| view.status.ledger(route)),
            end_to_end: accounts.end_to_end.totals(),
            gap: view.status.gap,
            unreadable: accounts.unreadable,
            others: accounts.others,
            drain: self.drain,
        }
    }

    fn start_modules(&mut self) -> Result<(), DemoError> {
        let site = self.site;
        let server_name =
            ServerName::try_from(HUB_NAME).map_err(|error| rustls::Error::General(error.to_string()))?;
        let options = |identity: &ConnectionString, filters| Options {
            address: site.ports.hub_mqtt,
            server_name: server_name.clone(),
            tls: site.tls.clone(),
            identity: identity.clone(),
            filters,
        };
        let (client, publisher, inbox) =
            Client::start(options(&site.filter, vec![site.filter.inputs_filter()]));
        self._tasks.spawn(filter::run(site.filter.clone(), publisher, inbox, self.board.clone()));
        self.clients.push(("filtermodule", client));
        let (client, publisher, _) = Client::start(options(&site.sensor, Vec::new()));
        let rate = if site.own.is_some() { MESSAGES_PER_SECOND_STAY } else { MESSAGES_PER_SECOND };
        let (stop, board) = (self.stop_sensor.subscribe(), self.board.clone());
        self._tasks.spawn(sensor::run(site.sensor.clone(), publisher, board, rate, stop));
        self.clients.push(("tempSensor", client));
        Ok(())
    }

    fn client_faults(&self) -> String {
        let state = |(name, client): &(&str, Client)| match client.link() {
            Link::Up(count) => format!("{name}: connected (for the {count}. time)"),
            Link::Down(fault) => format!("{name}: {fault}"),
        };
        self.clients.iter().map(state).collect::<Vec<_>>().join("; ")
    }

    async fn until_healthy(&mut self) -> Result<(), DemoError> {
        let started = Instant::now();
        loop {
            self.tick().await?;
            match http::ready(self.site.ports.hub_pages, "/healthz").await {
                Ok(()) => return Ok(()),
                Err(last) if started.elapsed() > START_TIMEOUT => {
                    let (awaited, limit_secs) = ("the hub to be healthy".into(), START_TIMEOUT.as_secs());
                    return Err(DemoError::Deadline { awaited, limit_secs, last });
                }
                Err(_) => {}
            }
        }
    }

    /// Waits until the condition holds and returns how long that took; the condition says what is lacking.
    async fn until(
        &mut self,
        awaited: &str,
        limit: Duration,
        mut condition: impl FnMut(&Self) -> Result<(), String>,
    ) -> Result<Duration, DemoError> {
        let started = Instant::now();
        loop {
            match condition(self) {
                Ok(()) => return Ok(started.elapsed()),
                Err(last) if started.elapsed() > limit => {
                    let (awaited, limit_secs) = (awaited.to_owned(), limit.as_secs());
                    return Err(DemoError::Deadline { awaited, limit_secs, last });
                }
                Err(_) => self.tick().await?,
            }
        }
    }

    /// Lets everything run for this time.
    async fn watch(&mut self, time: Duration) -> Result<(), DemoError> {
        let started = Instant::now();
        while started.elapsed() < time {
            self.tick().await?;
        }
        Ok(())
    }

    async fn tick(&mut self) -> Result<(), DemoError> {
        self.cloud.check()?;
        self.hub.check()?;
        self.screen.refresh();
        sleep(POLL).await;
        Ok(())
    }
}
