//! The limits of one AMQP connection, and what its server is told about the site.

use std::sync::Arc;
use std::time::Duration;

/// Limits of one connection. Those of the engine below are in [`crate::amqp::Options`].
#[derive(Debug, Clone)]
pub struct AmqpLimits {
    /// From accepting the socket to the client's open.
    pub open_max: Duration,
    /// From accepting the socket to the first login: a connection on which nobody has logged in by then is closed.
    pub first_login_max: Duration,
    /// From the take-over of a connection's last identity to its end. Clients that hear of it answer what is open and
    /// close by themselves; one that is closed at once waits for answers to its own detaches.
    pub vacant_max: Duration,
    /// A login that takes longer is refused for now.
    pub login_max: Duration,
    /// Identities that share the connection.
    pub identities_max: usize,
    /// Logins, and checks of renewed tokens, under way at a time; more wait for their turn.
    pub logins_max: usize,
    /// Links of one identity that may wait for its login.
    pub links_waiting_max: usize,
    /// Links of the connection, whatever they are for.
    pub links_max: u32,
    /// Tokens that are kept.
    pub tokens_max: usize,
    /// Bytes of the tokens that are kept: whoever puts them is not known yet.
    pub token_bytes_max: usize,
    /// Twin requests of one identity that wait for their answers; more are answered with status 429.
    pub twin_requests_max: usize,
    /// Twin answers and notifications, and method calls, that wait for credit of one link.
    pub replies_waiting_max: usize,
    /// Bytes of these.
    pub reply_bytes_max: usize,
    /// Messages that wait for credit of one identity; more go back to where they came from.
    pub deliveries_waiting_max: usize,
    /// Bytes of these.
    pub deliveries_waiting_bytes_max: usize,
    /// Host name of the IoT hub. User names of SASL PLAIN name its first label; without it PLAIN is refused.
    pub iot_hub_host: Option<Arc<str>>,
}

impl Default for AmqpLimits {
    fn default() -> Self {
        Self {
            open_max: Duration::from_secs(60),
            first_login_max: Duration::from_secs(180),
            vacant_max: Duration::from_secs(10),
            login_max: Duration::from_secs(60),
            identities_max: 2_000,
            logins_max: 256,
            links_waiting_max: 16,
            links_max: 32_768,
            tokens_max: 4_096,
            token_bytes_max: 2 << 20,
            twin_requests_max: 64,
            replies_waiting_max: 128,
            reply_bytes_max: 1 << 20,
            deliveries_waiting_max: 1_024,
            deliveries_waiting_bytes_max: 16 << 20,
            iot_hub_host: None,
        }
    }
}
