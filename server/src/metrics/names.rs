//! Owns the table of the metrics that the hub is known to have.

/// Kind of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows; the name ends in `_total`.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Quantiles, sum and count.
    Summary,
}

impl Kind {
    /// The word for it in the exposition.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Summary => "summary",
        }
    }
}

/// One known metric.
#[derive(Clone, Copy, Debug)]
pub struct KnownMetric {
    /// Name as exposed.
    pub name: &'static str,
    /// Kind.
    pub kind: Kind,
    /// Carries the label `ms_telemetry="True"`: the reference's collector may forward it.
    pub telemetry: bool,
    /// Meaning, for `# HELP`.
    pub help: &'static str,
}

/// Finds a metric by its exposed name.
pub(super) fn find(name: &str) -> Option<&'static KnownMetric> {
    KNOWN.iter().find(|known| known.name == name)
}

/// Whether the reference shows the identity in the label `id` of this metric as a text of its own.
pub(super) fn shows_identity_as_text(name: &str) -> bool {
    matches!(name, "edgehub_client_connect_success_total" | "edgehub_client_disconnect_total")
}

/// An identity as the reference writes it there.
pub(super) fn identity_text(id: &str, iothub: &str) -> String {
    match id.split_once('/') {
        Some((device, module)) => {
            format!("DeviceId: {device}; ModuleId: {module} [IotHubHostName: {iothub}]")
        }
        None => format!("DeviceId: {id} [IotHubHostName: {iothub}]"),
    }
}

/// Every known metric: first those of the reference, then the program's own.
pub fn known() -> &'static [KnownMetric] {
    KNOWN
}

const T: bool = true;
const N: bool = false;

const fn counter(name: &'static str, telemetry: bool, help: &'static str) -> KnownMetric {
    KnownMetric { name, kind: Kind::Counter, telemetry, help }
}
const fn gauge(name: &'static str, telemetry: bool, help: &'static str) -> KnownMetric {
    KnownMetric { name, kind: Kind::Gauge, telemetry, help }
}
const fn summary(name: &'static str, telemetry: bool, help: &'static str) -> KnownMetric {
    KnownMetric { name, kind: Kind::Summary, telemetry, help }
}

const KNOWN: &[KnownMetric] = &[
    counter("edgehub_messages_received_total", T, "Messages accepted for routing"),
    summary("edgehub_message_size_bytes", N, "Size of accepted messages"),
    counter("edgehub_messages_sent_total", T, "Messages sent to modules and upstream"),
    summary("edgehub_message_send_duration_seconds", N, "Time from sending to the answer"),
    summary("edgehub_message_process_duration_seconds", T, "Time from accepting to sending"),
    counter("edgehub_messages_dropped_total", T, "Messages that were not delivered, by reason"),
    counter("edgehub_messages_unack_total", T, "Messages that could not be stored"),
    gauge("edgehub_queue_length", T, "Messages accepted and not yet delivered, discarded or expired"),
    counter("edgehub_gettwin_total", T, "Twins read"),
    summary("edgehub_gettwin_duration_seconds", N, "Time to read a twin"),
    counter("edgehub_reported_properties_total", T, "Updates of reported properties"),
    summary("edgehub_reported_properties_update_duration_seconds", N, "Time to update reported properties"),
    counter("edgehub_direct_methods_total", T, "Direct methods invoked"),
    summary("edgehub_direct_method_duration_seconds", N, "Time to the answer of a direct method"),
    counter("edgehub_offline_count_total", T, "Times that the upstream was lost"),
    summary("edgehub_offline_duration_seconds", T, "Time without upstream"),
    counter("edgehub_operation_retry_total", T, "Operations that were repeated"),
    counter("edgehub_client_connect_failed_total", T, "Clients refused"),
    counter("edgehub_client_connect_success_total", N, "Clients connected"),
    counter("edgehub_client_disconnect_total", N, "Clients disconnected"),
    gauge("edgehub_connected_clients", N, "Clients connected now"),
    // The program's own
    gauge("edgehub_store_size_bytes", N, "Live data in the store, by kind"),
    gauge("edgehub_store_used_bytes", N, "What the store takes up"),
    gauge("edgehub_store_limit_bytes", N, "Limit of the store; 0 without one"),
    gauge("edgehub_store_free_bytes", N, "Free space of the store's file system"),
    summary("edgehub_store_write_duration_seconds", N, "Time of a write to the store, by kind"),
    counter("edgehub_store_errors_total", N, "Operations of the store that failed, by operation"),
    gauge(
        "edgehub_clock_skew_seconds",
        N,
        "By how much the machine's clock is ahead of the store's, which nobody sets",
    ),
    gauge("edgehub_store_full", N, "1 while new messages find no room"),
    counter("edgehub_store_damage_total", N, "Damaged parts of the store found since the start, by kind"),
    gauge("edgehub_oldest_message_age_seconds", N, "Age of the head of a queue"),
    counter("edgehub_ledger_accepted_total", N, "Messages that a queue ever took, restarts included"),
    counter("edgehub_ledger_settled_total", N, "What became of them, by outcome"),
    gauge("edgehub_ledger_gap", N, "What the ledger leaves unexplained; 0 in a sound store"),
    counter("edgehub_messages_dead_lettered_total", N, "Messages moved to the dead letters, by reason"),
    gauge("edgehub_dead_letters", N, "Messages in the dead letters"),
    gauge("edgehub_dead_letters_oldest_age_seconds", N, "Age of the oldest dead letter"),
    gauge("edgehub_upstream_connected", N, "1 while the upstream is connected"),
    gauge("edgehub_upstream_throttled", N, "1 while the upstream asks for a pause"),
    gauge("edgehub_upstream_inflight", N, "Transfers to the upstream not yet settled"),
    gauge("edgehub_upstream_sessions", N, "Identities with a session upstream"),
    gauge("edgehub_upstream_parked", N, "Identities that wait after a failure of their own upstream"),
    counter("edgehub_upstream_failures_total", N, "Connections to the upstream lost or refused, by reason"),
    counter(
        "edgehub_upstream_watchdog_total",
        N,
        "What was started anew for want of progress, by step and reason",
    ),
    counter("edgehub_upstream_refused_total", N, "Calls and messages from the cloud without room, by kind"),
    counter("edgehub_config_applied_total", N, "Configurations received, by status"),
    gauge("edgehub_certificate_expiry_seconds", N, "Time to the expiry of a certificate"),
    counter(
        "edgehub_credentials_ended_total",
        N,
        "Connections closed because their credentials no longer hold",
    ),
    counter(
        "edgehub_websocket_protocol_errors_total",
        N,
        "WebSockets closed for a fault of the client, by reason",
    ),
    counter("edgehub_client_take_overs_total", N, "Connections closed for a newer one of the same identity"),
    gauge("edgehub_scope_cache_identities", N, "Identities known"),
    counter("edgehub_scope_refresh_total", N, "Refreshes of the identities"),
    counter("edgehub_scope_calls_total", N, "Questions of child hubs for identities, by call and result"),
    counter("edgehub_connections_refused_total", N, "Connections closed at once, by listener and reason"),
    counter("edgehub_tls_handshakes_total", N, "TLS handshakes, by result"),
    counter("edgehub_log_warnings_total", N, "Warnings and errors in the log, by code"),
    counter("edgehub_metrics_series_refused_total", N, "Series that found no room"),
    counter(
        "edgehub_mqtt_protocol_errors_total",
        N,
        "MQTT connections that were closed because the client broke the protocol",
    ),
];
