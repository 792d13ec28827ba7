//! Owns one run: everybody logs in, messages flow or nothing does, and what is measured becomes a report.

use std::collections::HashMap;
use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use edgehub_benches::amqp::{Access, AmqpClient, Node};
use edgehub_benches::arrivals::Arrivals;
use edgehub_benches::client::{Client, Clock, Published, Publishing, Received, Target};
use edgehub_benches::identity::Identity;
use edgehub_benches::latency::Histogram;
use edgehub_benches::process::{Usage, usage};
use edgehub_benches::scenario::{Hears, Party, Plan, Scenario};
use edgehub_benches::site::Site;
use edgehub_broker::amqp::Role;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::options::{Options, Protocol};
use crate::report::{IdleReport, Report};

/// Logins that are under way at the same time.
const LOGINS_AT_ONCE: usize = 64;
/// Pause between looks at the progress.
const WATCH: Duration = Duration::from_millis(20);
/// Failures of idle connections that are printed.
const FAILURES_MAX: usize = 10;

/// Who serves a run.
pub(crate) struct Server<'a> {
    /// What it is called in the report.
    pub(crate) name: &'static str,
    pub(crate) target: Target,
    /// How AMQP connections show who they are.
    pub(crate) access: Access,
    /// Whom it knows; nobody for a broker without authentication.
    pub(crate) identities: Vec<Identity>,
    /// Whose processor time is measured.
    pub(crate) pid: Option<u32>,
    /// The site, if it is a hub that was started for this.
    pub(crate) site: Option<&'a Site>,
}

/// A connection that is logged in.
enum Connected {
    Mqtt(Client),
    Amqp(Box<AmqpClient>),
}

impl Connected {
    /// Sends what the plans of its publishers say; over MQTT there is one.
    async fn publish(
        self,
        plans: Vec<Publishing>,
        clock: Arc<Clock>,
        stop: watch::Receiver<bool>,
    ) -> Published {
        match self {
            Self::Mqtt(client) => {
                let plan = plans.into_iter().next().expect("an MQTT connection is made for one publisher");
                client.publish(plan, clock, stop).await
            }
            Self::Amqp(client) => client.publish(plans, clock, stop).await,
        }
    }

    async fn receive(
        self,
        arrivals: Arrivals,
        wanted: u64,
        clock: Arc<Clock>,
        stop: watch::Receiver<bool>,
    ) -> Received {
        match self {
            Self::Mqtt(client) => client.receive(arrivals, wanted, clock, stop).await,
            Self::Amqp(client) => client.receive(arrivals, wanted, clock, stop).await,
        }
    }
}

/// Connects all parties, a bounded number at the same time, in their order; `per_connection` of them share one.
async fn connect_all(
    options: &Options,
    server: &Server<'_>,
    parties: &[Party],
    role: Role,
    per_connection: usize,
) -> Result<Vec<Connected>, Box<dyn Error>> {
    match options.protocol {
        Protocol::Mqtt => {
            let subscribe_qos = (role == Role::Receiver).then_some(options.qos);
            let clients = login_all(server, parties, subscribe_qos).await?;
            Ok(clients.into_iter().map(Connected::Mqtt).collect())
        }
        Protocol::Amqp => {
            let mut nodes = Vec::with_capacity(parties.len());
            for party in parties {
                let identity = server.identities.iter().find(|identity| party.is(identity));
                if identity.is_none() && matches!(server.access, Access::Tokens(_)) {
                    return Err(no_identity(party).into());
                }
                let token = identity.map(|identity| (identity.audience(), identity.token()));
                nodes.push(Node { address: party.topic.clone(), token });
            }
            let connections: Vec<_> = nodes.chunks(per_connection).map(<[Node]>::to_vec).collect();
            let gate = Arc::new(Semaphore::new(LOGINS_AT_ONCE));
            let mut logins = JoinSet::new();
            for (number, nodes) in connections.into_iter().enumerate() {
                let (target, access, gate) =
                    (server.target.clone(), server.access.clone(), Arc::clone(&gate));
                logins.spawn(async move {
                    let _permit = gate.acquire().await;
                    (number, AmqpClient::login(&target, &access, &nodes, role).await)
                });
            }
            let mut clients: Vec<_> = (0..logins.len()).map(|_| None).collect();
            while let Some(done) = logins.join_next().await {
                let (number, client) = done?;
                clients[number] = Some(Connected::Amqp(Box::new(client?)));
            }
            Ok(clients.into_iter().flatten().collect())
        }
    }
}

fn no_identity(party: &Party) -> String {
    format!("no connection string for {} {}", party.device, party.module.as_deref().unwrap_or(""))
}

/// Logs all parties in over MQTT, a bounded number at the same time, in their order.
async fn login_all(
    server: &Server<'_>,
    parties: &[Party],
    subscribe_qos: Option<u8>,
) -> Result<Vec<Client>, Box<dyn Error>> {
    let identities = &server.identities;
    let by_name: HashMap<_, _> = identities
        .iter()
        .map(|identity| ((&*identity.device, identity.module.as_deref()), identity))
        .collect();
    let gate = Arc::new(Semaphore::new(LOGINS_AT_ONCE));
    let mut logins = JoinSet::new();
    for (number, party) in parties.iter().enumerate() {
        let identity = by_name.get(&(&*party.device, party.module.as_deref()));
        if identity.is_none() && !identities.is_empty() {
            return Err(no_identity(party).into());
        }
        let (client_id, credentials) = match identity {
            Some(identity) => (identity.client_id(), Some((identity.user_name(), identity.token()))),
            None => (format!("{}-{}", party.device, party.module.as_deref().unwrap_or("d")), None),
        };
        let (target, gate, filter) = (server.target.clone(), Arc::clone(&gate), party.topic.clone());
        logins.spawn(async move {
            let _permit = gate.acquire().await;
            let credentials = credentials.as_ref().map(|(user, password)| (&**user, &**password));
            let subscription = subscribe_qos.map(|qos| (&*filter, qos));
            (number, Client::login(&target, &client_id, credentials, subscription).await)
        });
    }
    let mut clients: Vec<Option<Client>> = parties.iter().map(|_| None).collect();
    while let Some(done) = logins.join_next().await {
        let (number, client) = done?;
        clients[number] = Some(client.map_err(|error| format!("{}: {error}", parties[number].device))?);
    }
    Ok(clients.into_iter().flatten().collect())
}

/// Sends the messages of a plan and waits until all are received.
pub(crate) async fn drive(
    options: &Options,
    plan: &Plan,
    server: &Server<'_>,
) -> Result<Report, Box<dyn Error>> {
    let (site, pid) = (server.site, server.pid);
    let begin = Instant::now();
    let shared = usize::from(options.per_connection);
    let receivers = connect_all(options, server, &plan.receivers, Role::Receiver, 1).await?;
    let publishers = connect_all(options, server, &plan.publishers, Role::Sender, shared).await?;
    let connections = (receivers.len() + publishers.len()) as f64;
    let connections_per_sec = connections / begin.elapsed().as_secs_f64();

    let each = options.messages / plan.publishers.len() as u64;
    let all = each * plan.publishers.len() as u64;
    let wanted_each = if plan.hears == Hears::All { all } else { each };
    let (stop, stopped) = watch::channel(false);
    let clock = Arc::new(Clock::default());
    let (begin, usage_before, own_before) = (Instant::now(), measured(pid)?, usage(std::process::id())?);
    let mut receiving = JoinSet::new();
    for client in receivers {
        let arrivals = Arrivals::new(plan.publishers.len(), each);
        receiving.spawn(client.receive(arrivals, wanted_each, Arc::clone(&clock), stopped.clone()));
    }
    let mut publishing = JoinSet::new();
    let mut plans = Vec::with_capacity(plan.publishers.len());
    for (number, party) in plan.publishers.iter().enumerate() {
        plans.push(Publishing {
            publisher: u32::try_from(number)?,
            topic: party.topic.clone(),
            output: party.output,
            messages: each,
            payload_bytes: options.payload_bytes,
            window: (options.qos == 1).then_some(options.window),
            rate: options.rate.map(|rate| rate / plan.publishers.len() as f64),
        });
    }
    for (client, plans) in publishers.into_iter().zip(plans.chunks(shared)) {
        publishing.spawn(client.publish(plans.to_vec(), Arc::clone(&clock), stopped.clone()));
    }

    // Publishers keep their connections until told to stop, so the receivers say when all is done; without
    // receivers the acknowledgements do, and upstream the hub's own ledger.
    let (mut got, mut latency) = (Vec::new(), Histogram::default());
    let mut failures = Vec::new();
    let (mut last, mut last_at) = (0, Instant::now());
    let expected_progress = if plan.receivers.is_empty() { all } else { u64::MAX };
    let mut upstream_left = None;
    loop {
        tokio::select! {
            Some(done) = receiving.join_next() => {
                let done = done?;
                latency.merge(&done.latency);
                failures.extend(done.failure);
                got.push(done.arrivals);
                if receiving.is_empty() {
                    break;
                }
            }
            Some(done) = publishing.join_next() => {
                let done = done?;
                return Err(format!("a publisher ended early: {}", done.failure.unwrap_or_default()).into());
            }
            () = tokio::time::sleep(WATCH) => {}
        }
        let progress = clock.progress.load(Ordering::Relaxed);
        if progress >= expected_progress {
            match (options.scenario, site) {
                (Scenario::Upstream, Some(site)) => {
                    let left = site.queued()?;
                    if left == 0 {
                        upstream_left = Some(0);
                        break;
                    }
                    if upstream_left != Some(left) {
                        (upstream_left, last_at) = (Some(left), Instant::now());
                    }
                }
                _ => break,
            }
        }
        if progress != last {
            (last, last_at) = (progress, Instant::now());
        }
        if last_at.elapsed() > Duration::from_secs(options.stall_secs) {
            failures.push(format!("no progress for {} s", options.stall_secs));
            break;
        }
    }
    let elapsed = begin.elapsed();
    let (usage_after, own_after) = (measured(pid)?, usage(std::process::id())?);
    stop.send_replace(true);
    while let Some(done) = receiving.join_next().await {
        let done = done?;
        latency.merge(&done.latency);
        failures.extend(done.failure);
        got.push(done.arrivals);
    }
    let (mut sent, mut acknowledged, mut order_breaks, mut acknowledge_latency) =
        (0, 0, 0, Histogram::default());
    while let Some(done) = publishing.join_next().await {
        let done = done?;
        sent += done.sent;
        acknowledged += done.acknowledged;
        order_breaks += done.order_breaks;
        acknowledge_latency.merge(&done.latency);
        failures.extend(done.failure);
    }

    let received: u64 = got.iter().map(|arrivals| arrivals.unique).sum();
    let lost = match (options.scenario, plan.receivers.is_empty()) {
        (Scenario::Upstream, _) => upstream_left.unwrap_or(0).unsigned_abs(),
        (_, true) => 0,
        (_, false) => wanted_each * plan.receivers.len() as u64 - received,
    };
    let handled = if plan.receivers.is_empty() { acknowledged.max(sent) - lost } else { received };
    let per_message = |cpu: Duration| cpu.as_secs_f64() * 1e6 / handled.max(1) as f64;
    let server_cpu = usage_before.zip(usage_after).map(|(before, after)| after.cpu - before.cpu);
    Ok(Report {
        server: server.name,
        scenario: format!("{:?}", options.scenario),
        protocol: format!("{:?}", options.protocol),
        publishers: plan.publishers.len(),
        publishers_per_connection: options.per_connection,
        receivers: plan.receivers.len(),
        payload_bytes: options.payload_bytes,
        qos: options.qos,
        window: (options.qos == 1).then_some(options.window),
        tls: options.tls,
        durability: site.map(|_| options.durability.clone()),
        connections_per_sec,
        sent,
        acknowledged,
        received: handled,
        seconds: elapsed.as_secs_f64(),
        messages_per_sec: handled as f64 / elapsed.as_secs_f64(),
        server_cpu_us_per_message: server_cpu.map(per_message),
        server_cpu_cores: server_cpu.map(|cpu| cpu.as_secs_f64() / elapsed.as_secs_f64()),
        server_resident_bytes: usage_after.map(|usage| usage.resident_bytes),
        generator_cpu_us_per_message: per_message(own_after.cpu - own_before.cpu),
        publish_to_receive: latency.percentiles(),
        publish_to_acknowledge: acknowledge_latency.percentiles(),
        lost,
        duplicates: got.iter().map(|arrivals| arrivals.duplicates).sum(),
        order_breaks: order_breaks
            + got.iter().map(|arrivals| arrivals.order_breaks + arrivals.foreign).sum::<u64>(),
        ledger_gap: site.map(Site::gap).transpose()?,
        failures,
    })
}

/// Opens a connection for every publisher of a plan, sees that all of them live, and looks what they take.
pub(crate) async fn idle(
    options: &Options,
    plan: &Plan,
    server: &Server<'_>,
) -> Result<IdleReport, Box<dyn Error>> {
    let before = measured(server.pid)?;
    let begin = Instant::now();
    let clients = login_all(server, &plan.publishers, None).await?;
    let elapsed = begin.elapsed();
    let after = measured(server.pid)?;
    let connections = clients.len();
    let mut failures = Vec::new();
    let mut open = Vec::with_capacity(connections);
    for mut client in clients {
        match client.ping().await {
            Ok(()) => open.push(client),
            Err(error) => failures.push(error.to_string()),
        }
    }
    // Looked at while all are open.
    let settled = measured(server.pid)?;
    failures.truncate(FAILURES_MAX);
    let per_connection = |value: f64| value / connections.max(1) as f64;
    let cpu = before.zip(after).map(|(before, after)| (after.cpu - before.cpu).as_secs_f64() * 1e6);
    let grown = before
        .zip(settled)
        .map(|(before, settled)| settled.resident_bytes as f64 - before.resident_bytes as f64);
    Ok(IdleReport {
        server: server.name,
        scenario: "Idle",
        tls: options.tls,
        connections,
        connections_per_sec: connections as f64 / elapsed.as_secs_f64(),
        server_cpu_us_per_connection: cpu.map(per_connection),
        server_resident_bytes_before: before.map(|usage| usage.resident_bytes),
        server_resident_bytes: settled.map(|usage| usage.resident_bytes),
        server_resident_bytes_per_connection: grown.map(per_connection),
        lost: connections - open.len(),
        failures,
    })
}

fn measured(server: Option<u32>) -> std::io::Result<Option<Usage>> {
    server.map(usage).transpose()
}
