//! Owns the answers of the stand-in: paths, keys out of the registry, certificates out of its authority.

use std::path::PathBuf;
use std::time::Duration;

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use edgehub_broker::identity::{Identity, SymmetricKey};
use edgehub_cloud::Registry;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tracing::info;

use crate::certificate::authority::Authority;

/// Longest request body, bytes.
const BODY_BYTES_MAX: usize = 2 * 1024 * 1024;
/// Time to send a request body.
const BODY_TIMEOUT: Duration = Duration::from_secs(15);
/// What a module's key is used for beside signing; the one must not undo the other.
const ENCRYPTION_PURPOSE: &[u8] = b"edgehub workload stand-in, encryption";
/// The name that every server certificate has beside the one asked for, as the daemon's have it.
const FURTHER_NAME: &str = "edgehub";

/// What the stand-in answers from.
pub(super) struct Daemon {
    pub(super) registry: Registry,
    pub(super) authority: Authority,
    pub(super) device_id: String,
    /// PEM files that are passed on with the trust bundle.
    pub(super) trust_files: Vec<PathBuf>,
    pub(super) certificate_life: Duration,
}

/// Why a request has no good answer.
struct Refused(StatusCode, String);

/// A call for a module.
enum Call {
    Sign,
    Encrypt,
    Decrypt,
    ServerCertificate,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SignRequest {
    #[serde(rename = "algo")]
    algorithm: Option<String>,
    data: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct EncryptRequest {
    plaintext: String,
    initialization_vector: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct DecryptRequest {
    ciphertext: String,
    initialization_vector: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct CertificateRequest {
    common_name: String,
}

impl Daemon {
    /// The answer to a request; a refusal has the daemon's form.
    pub(super) async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let (status, body) = match self.route(request).await {
            Ok((status, body)) => (status, body),
            Err(Refused(status, message)) => (status, json!({ "message": message })),
        };
        let mut response = Response::new(Full::new(Bytes::from(body.to_string())));
        *response.status_mut() = status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    }

    async fn route(&self, request: Request<Incoming>) -> Result<(StatusCode, Value), Refused> {
        let versioned = request.uri().query().unwrap_or_default().split('&');
        if !versioned.into_iter().any(|pair| pair.starts_with("api-version=")) {
            return Err(Refused(StatusCode::BAD_REQUEST, "api-version is missing".into()));
        }
        let path = request.uri().path().to_owned();
        let segments: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        let (module, call) = match segments[..] {
            ["trust-bundle"] => {
                only(&Method::GET, request.method())?;
                return Ok((StatusCode::OK, json!({ "certificate": self.trust_bundle()? })));
            }
            ["modules", module, "genid", _, "sign"] => (module, Call::Sign),
            ["modules", module, "genid", _, "encrypt"] => (module, Call::Encrypt),
            ["modules", module, "genid", _, "decrypt"] => (module, Call::Decrypt),
            ["modules", module, "genid", _, "certificate", "server"] => (module, Call::ServerCertificate),
            _ => return Err(Refused(StatusCode::NOT_FOUND, format!("there is nothing at {path}"))),
        };
        only(&Method::POST, request.method())?;
        let module = percent_decode_str(module)
            .decode_utf8()
            .map_err(|_| Refused(StatusCode::BAD_REQUEST, "the module's name is not UTF-8".into()))?;
        let key = self.key(&module)?;
        let reading = Limited::new(request.into_body(), BODY_BYTES_MAX).collect();
        let body = tokio::time::timeout(BODY_TIMEOUT, reading)
            .await
            .map_err(|_| Refused(StatusCode::REQUEST_TIMEOUT, "the body did not come in time".into()))?
            .map_err(|_| Refused(StatusCode::PAYLOAD_TOO_LARGE, "the body is too long".into()))?
            .to_bytes();
        match call {
            Call::Sign => sign(&key, &body),
            Call::Encrypt => encrypt(&key, &body),
            Call::Decrypt => decrypt(&key, &body),
            Call::ServerCertificate => {
                info!(%module, "A server certificate is issued");
                self.server_certificate(&body)
            }
        }
    }

    /// The module's key. Another process may have created the module meanwhile.
    fn key(&self, module: &str) -> Result<SymmetricKey, Refused> {
        let unknown = |reason: String| Refused(StatusCode::NOT_FOUND, reason);
        self.registry
            .reload()
            .map_err(|error| Refused(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
        let identity =
            Identity::module(&self.device_id, module).map_err(|error| unknown(error.to_string()))?;
        let entry = self.registry.cache().get(&identity);
        let key = entry.as_ref().and_then(|entry| entry.keys().next());
        key.cloned()
            .ok_or_else(|| unknown(format!("module {identity} is not in the registry, or has no key")))
    }

    fn trust_bundle(&self) -> Result<String, Refused> {
        let mut bundle = self.authority.root_pem();
        for file in &self.trust_files {
            let text = std::fs::read_to_string(file).map_err(|error| {
                let reason = format!("{} cannot be read: {error}", file.display());
                Refused(StatusCode::INTERNAL_SERVER_ERROR, reason)
            })?;
            bundle.push_str(&text);
        }
        Ok(bundle)
    }

    fn server_certificate(&self, body: &[u8]) -> Result<(StatusCode, Value), Refused> {
        let CertificateRequest { common_name } = parsed(body)?;
        let names = [common_name, FURTHER_NAME.to_owned()];
        let issued = self
            .authority
            .issue_server_for(&names, self.certificate_life)
            .map_err(|error| Refused(StatusCode::BAD_REQUEST, error.to_string()))?;
        let expiration = (OffsetDateTime::now_utc() + self.certificate_life).format(&Rfc3339);
        Ok((
            StatusCode::CREATED,
            json!({
                "privateKey": { "type": "key", "ref": null, "bytes": issued.key_pem },
                "certificate": issued.chain_pem,
                "expiration": expiration.unwrap_or_default(),
            }),
        ))
    }
}

fn only(expected: &Method, found: &Method) -> Result<(), Refused> {
    if expected == found {
        return Ok(());
    }
    Err(Refused(StatusCode::METHOD_NOT_ALLOWED, format!("only {expected} is allowed")))
}

fn parsed<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, Refused> {
    serde_json::from_slice(body).map_err(|error| Refused(StatusCode::BAD_REQUEST, error.to_string()))
}

fn decoded(text: &str) -> Result<Vec<u8>, Refused> {
    BASE64.decode(text).map_err(|_| Refused(StatusCode::BAD_REQUEST, "a value is not base64".into()))
}

fn sign(key: &SymmetricKey, body: &[u8]) -> Result<(StatusCode, Value), Refused> {
    let SignRequest { algorithm, data } = parsed(body)?;
    if algorithm.is_some_and(|algorithm| !algorithm.eq_ignore_ascii_case("HMACSHA256")) {
        return Err(Refused(StatusCode::BAD_REQUEST, "algo must be HMACSHA256".into()));
    }
    Ok((StatusCode::OK, json!({ "digest": BASE64.encode(key.sign(&[&decoded(&data)?])) })))
}

/// A nonce, then the sealed text. The vector is authenticated, so that another one opens nothing.
fn encrypt(key: &SymmetricKey, body: &[u8]) -> Result<(StatusCode, Value), Refused> {
    let EncryptRequest { plaintext, initialization_vector } = parsed(body)?;
    let (mut text, vector) = (decoded(&plaintext)?, decoded(&initialization_vector)?);
    let nonce = sealing_key(key)?
        .seal_in_place_append_tag(Aad::from(vector), &mut text)
        .map_err(|_| Refused(StatusCode::INTERNAL_SERVER_ERROR, "the text cannot be encrypted".into()))?;
    let mut sealed = nonce.as_ref().to_vec();
    sealed.append(&mut text);
    Ok((StatusCode::OK, json!({ "ciphertext": BASE64.encode(sealed) })))
}

fn decrypt(key: &SymmetricKey, body: &[u8]) -> Result<(StatusCode, Value), Refused> {
    let DecryptRequest { ciphertext, initialization_vector } = parsed(body)?;
    let (sealed, vector) = (decoded(&ciphertext)?, decoded(&initialization_vector)?);
    let foreign = || Refused(StatusCode::BAD_REQUEST, "it was not encrypted with this key and vector".into());
    let (nonce, text) = sealed.split_at_checked(NONCE_LEN).ok_or_else(foreign)?;
    let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| foreign())?;
    let mut text = text.to_vec();
    let plain =
        sealing_key(key)?.open_in_place(nonce, Aad::from(vector), &mut text).map_err(|_| foreign())?;
    Ok((StatusCode::OK, json!({ "plaintext": BASE64.encode(plain) })))
}

fn sealing_key(key: &SymmetricKey) -> Result<RandomizedNonceKey, Refused> {
    RandomizedNonceKey::new(&AES_256_GCM, &key.sign(&[ENCRYPTION_PURPOSE]))
        .map_err(|_| Refused(StatusCode::INTERNAL_SERVER_ERROR, "the key cannot be used".into()))
}
