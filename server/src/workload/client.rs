//! Owns the calls of the workload API: what is asked, how long each may take, and when it is asked again.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use edgehub_broker::identity::{HUB_MODULE_ID, SIGNATURE_BYTES, SignError, Signer, Signing};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use rustls::pki_types::CertificateDer;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::transport;
use crate::certificate::certificates_of_pem;
use crate::settings::WorkloadSettings;

/// Attempts after the first that failed.
const RETRIES_MAX: u32 = 3;
/// Pause before the first of them; doubled for each further one.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause.
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(3);
/// Limit of one attempt of a call that only computes.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);
/// Limit of one attempt to get a certificate: the daemon may ask a server far away for it.
const CERTIFICATE_TIMEOUT: Duration = Duration::from_secs(300);
/// Days that a certificate is asked for; the daemon decides by itself.
const CERTIFICATE_DAYS: i64 = 90;
/// Longest text of the daemon's that is repeated, characters.
const MESSAGE_CHARS_MAX: usize = 200;

/// What may stand in a path segment as it is (RFC 3986 §3.3, as far as ids use it).
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// Why a call gives nothing. No variant holds a key or what was signed.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    /// The daemon does not answer.
    #[error(
        "the workload API at {uri} gives no answer to {call}: {reason}; check that the security daemon runs and that \
         its socket is mounted"
    )]
    Unreachable {
        /// Where it was asked.
        uri: String,
        /// What was asked.
        call: &'static str,
        /// Why there is no answer.
        reason: String,
    },
    /// The daemon refuses.
    #[error(
        "the workload API refuses {call} with {status}: {message}; check the module's identity and the daemon's log"
    )]
    Refused {
        /// What was asked.
        call: &'static str,
        /// Status of the answer.
        status: u16,
        /// The daemon's text.
        message: String,
    },
    /// The answer cannot be used.
    #[error("the workload API answers {call} with something that cannot be used: {reason}")]
    Answer {
        /// What was asked.
        call: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

/// A server certificate as the daemon issued it. `Debug` does not show the key.
pub struct IssuedCertificate {
    /// PEM: the certificate, then its issuers.
    pub chain_pem: String,
    /// PEM: its private key.
    pub key_pem: String,
}

impl fmt::Debug for IssuedCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IssuedCertificate").field("chain_pem", &self.chain_pem).finish_non_exhaustive()
    }
}

/// Asks the security daemon on behalf of the module `$edgeHub`. Every call has a connection of its own.
#[derive(Clone, Debug)]
pub struct WorkloadClient {
    settings: Arc<WorkloadSettings>,
    retry_pause: Duration,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct CertificateRequest<'a> {
    common_name: &'a str,
    expiration: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct CertificateAnswer {
    private_key: PrivateKey,
    certificate: String,
}

#[derive(Deserialize)]
struct PrivateKey {
    bytes: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct SignRequest<'a> {
    key_id: &'a str,
    algo: &'a str,
    data: String,
}

#[derive(Deserialize)]
struct SignAnswer {
    digest: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct EncryptRequest {
    plaintext: String,
    initialization_vector: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct DecryptRequest {
    ciphertext: String,
    initialization_vector: String,
}

#[derive(Deserialize)]
struct Ciphertext {
    ciphertext: String,
}

#[derive(Deserialize)]
struct Plaintext {
    plaintext: String,
}

#[derive(Deserialize)]
struct TrustBundle {
    certificate: String,
}

#[derive(Deserialize)]
struct Message {
    message: String,
}

/// What becomes of an attempt.
enum Outcome {
    Done(Bytes),
    Again(WorkloadError),
    Failed(WorkloadError),
}

impl WorkloadClient {
    /// A client; it connects when it asks.
    pub fn new(settings: WorkloadSettings) -> Self {
        Self { settings: Arc::new(settings), retry_pause: RETRY_PAUSE }
    }

    /// The same with another pause before the first retry.
    #[must_use]
    pub fn with_retry_pause(self, retry_pause: Duration) -> Self {
        Self { retry_pause, ..self }
    }

    /// Where it asks.
    pub fn settings(&self) -> &WorkloadSettings {
        &self.settings
    }

    /// A new server certificate for this name.
    ///
    /// # Errors
    /// The daemon does not answer, refuses, or answers without certificate or key.
    pub async fn server_certificate(&self, common_name: &str) -> Result<IssuedCertificate, WorkloadError> {
        const CALL: &str = "certificate/server";
        let expires_at = OffsetDateTime::now_utc() + time::Duration::days(CERTIFICATE_DAYS);
        let expiration = expires_at.format(&Rfc3339).map_err(|error| unusable(CALL, &error))?;
        let body = CertificateRequest { common_name, expiration };
        let answer: CertificateAnswer = self.module_call(CALL, &body, CERTIFICATE_TIMEOUT).await?;
        match answer.private_key.bytes {
            Some(key_pem) => Ok(IssuedCertificate { chain_pem: answer.certificate, key_pem }),
            None => Err(unusable(CALL, &"the private key is not in it")),
        }
    }

    /// The certificates that everything on this device trusts.
    ///
    /// # Errors
    /// The daemon does not answer, refuses, or answers without a certificate.
    pub async fn trust_bundle(&self) -> Result<Vec<CertificateDer<'static>>, WorkloadError> {
        const CALL: &str = "trust-bundle";
        let bundle: TrustBundle = self.call(CALL, "/trust-bundle", None, ATTEMPT_TIMEOUT).await?;
        certificates_of_pem(bundle.certificate.as_bytes()).map_err(|reason| unusable(CALL, &reason))
    }

    /// HMAC-SHA-256 of the data with the module's key.
    ///
    /// # Errors
    /// The daemon does not answer, refuses, or answers with something else than a signature.
    pub async fn sign(&self, data: &[u8]) -> Result<[u8; SIGNATURE_BYTES], WorkloadError> {
        const CALL: &str = "sign";
        let body = SignRequest { key_id: "primary", algo: "HMACSHA256", data: BASE64.encode(data) };
        let answer: SignAnswer = self.module_call(CALL, &body, ATTEMPT_TIMEOUT).await?;
        let digest = decoded(CALL, &answer.digest)?;
        let found_bytes = digest.len();
        digest.try_into().map_err(|_| {
            unusable(CALL, &format!("the signature has {found_bytes} bytes, not {SIGNATURE_BYTES}"))
        })
    }

    /// Encrypts with the module's key. The vector must be another for every text.
    ///
    /// # Errors
    /// The daemon does not answer or refuses.
    pub async fn encrypt(&self, plaintext: &[u8], vector: &[u8]) -> Result<Vec<u8>, WorkloadError> {
        const CALL: &str = "encrypt";
        let body = EncryptRequest {
            plaintext: BASE64.encode(plaintext),
            initialization_vector: BASE64.encode(vector),
        };
        let answer: Ciphertext = self.module_call(CALL, &body, ATTEMPT_TIMEOUT).await?;
        decoded(CALL, &answer.ciphertext)
    }

    /// Decrypts what [`Self::encrypt`] gave for the same vector.
    ///
    /// # Errors
    /// The daemon does not answer, or refuses because the text is not from this module's key.
    pub async fn decrypt(&self, ciphertext: &[u8], vector: &[u8]) -> Result<Vec<u8>, WorkloadError> {
        const CALL: &str = "decrypt";
        let body = DecryptRequest {
            ciphertext: BASE64.encode(ciphertext),
            initialization_vector: BASE64.encode(vector),
        };
        let answer: Plaintext = self.module_call(CALL, &body, ATTEMPT_TIMEOUT).await?;
        decoded(CALL, &answer.plaintext)
    }

    async fn module_call<T: DeserializeOwned>(
        &self,
        call: &'static str,
        body: &impl Serialize,
        limit: Duration,
    ) -> Result<T, WorkloadError> {
        let module = utf8_percent_encode(HUB_MODULE_ID, SEGMENT);
        let generation = utf8_percent_encode(&self.settings.generation_id, SEGMENT);
        let body = serde_json::to_vec(body).map_err(|error| unusable(call, &error))?;
        self.call(call, &format!("/modules/{module}/genid/{generation}/{call}"), Some(body.into()), limit)
            .await
    }

    /// One call with its retries: only for what may be better the next time.
    async fn call<T: DeserializeOwned>(
        &self,
        call: &'static str,
        path: &str,
        body: Option<Bytes>,
        limit: Duration,
    ) -> Result<T, WorkloadError> {
        let path = format!("{path}?api-version={}", self.settings.api_version);
        let mut attempt = 0;
        loop {
            match self.attempt(call, &path, body.clone(), limit).await {
                Outcome::Done(answer) => {
                    count(call, "succeeded");
                    // The texts of the parser name what was expected, not what was found.
                    return serde_json::from_slice(&answer).map_err(|error| {
                        let reason = format!("line {}, column {}", error.line(), error.column());
                        unusable(call, &format!("not the JSON that was expected, at {reason}"))
                    });
                }
                Outcome::Again(error) if attempt < RETRIES_MAX => {
                    debug!(%error, attempt, "The workload API is asked again");
                    let pause = self.retry_pause.saturating_mul(1 << attempt).min(RETRY_PAUSE_MAX);
                    sleep(pause.mul_f64(1.0 + fastrand::f64() / 10.0)).await;
                    attempt += 1;
                }
                Outcome::Again(error) | Outcome::Failed(error) => {
                    count(call, "failed");
                    return Err(error);
                }
            }
        }
    }

    async fn attempt(&self, call: &'static str, path: &str, body: Option<Bytes>, limit: Duration) -> Outcome {
        let sending = transport::send(&self.settings.uri, path, body);
        let answered = timeout(limit, sending)
            .await
            .unwrap_or_else(|_| Err(format!("it took longer than {} s", limit.as_secs())));
        match answered {
            Ok((status, answer)) if status.is_success() => Outcome::Done(answer),
            Ok((status, answer)) => {
                let message = serde_json::from_slice(&answer)
                    .map_or_else(|_| "no reason is given".to_owned(), |Message { message }| shown(&message));
                let error = WorkloadError::Refused { call, status: status.as_u16(), message };
                if status.is_server_error() { Outcome::Again(error) } else { Outcome::Failed(error) }
            }
            Err(reason) => {
                let uri = self.settings.uri.to_string();
                Outcome::Again(WorkloadError::Unreachable { uri, call, reason })
            }
        }
    }
}

impl Signer for WorkloadClient {
    fn sign<'a>(&'a self, data: &'a [u8]) -> Signing<'a> {
        Box::pin(async move {
            WorkloadClient::sign(self, data).await.map_err(|error| SignError::Failed(error.to_string()))
        })
    }
}

fn count(call: &'static str, result: &'static str) {
    metrics::counter!("edgehub_workload_calls_total", "call" => call, "result" => result).increment(1);
}

fn unusable(call: &'static str, reason: &dyn fmt::Display) -> WorkloadError {
    WorkloadError::Answer { call, reason: reason.to_string() }
}

fn decoded(call: &'static str, text: &str) -> Result<Vec<u8>, WorkloadError> {
    BASE64.decode(text).map_err(|_| unusable(call, &"it is not base64"))
}

/// A text of the daemon's in one line of bounded length.
fn shown(text: &str) -> String {
    text.chars()
        .map(|character| if character.is_control() { ' ' } else { character })
        .take(MESSAGE_CHARS_MAX)
        .collect()
}
