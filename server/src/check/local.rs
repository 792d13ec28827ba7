//! Owns the checks of this machine: certificates, store, disk, routes.

use std::path::Path;

use edgehub_routing::{HubConfig, OwnedRouteSpec, RouteTable, lint};
use edgehub_storage::{OpenError, StoreReader};
use rustls::client::verify_server_name;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::ParsedCertificate;
use time::OffsetDateTime;

use super::{Checked, Verdict};
use crate::admin::table::bytes;
use crate::certificate::{ServerCertificate, load_certificates};
use crate::manifest::Manifest;
use crate::pages::condition::ConditionCode;
use crate::pages::watch;
use crate::settings::{Settings, StoreKind};

/// Less free space than this many floors is worth a warning.
const FLOORS_WARNING: u64 = 4;

/// The server certificate: readable, with its key, for the name of the hub, and in time.
pub(super) fn certificates(settings: &Settings) -> Checked {
    const CHECK: &str = "certificates";
    let Some(files) = &settings.certificates else {
        return Checked::new(CHECK, Verdict::Skipped, "no TLS listener is on");
    };
    let error = |text: String| Checked::new(CHECK, Verdict::Error, text);
    let certificate = match ServerCertificate::load(files) {
        Ok(certificate) => certificate,
        Err(fault) => return error(fault.to_string()),
    };
    if let Some(bundle) = &files.trust_bundle
        && let Err(fault) = load_certificates("trust bundle", bundle)
    {
        return error(fault.to_string());
    }
    if let Some(host) = &settings.hub.own_host {
        let chain = match load_certificates("server certificate", &files.certificate) {
            Ok(chain) => chain,
            Err(fault) => return error(fault.to_string()),
        };
        if let Err(text) = covers(&chain, host.as_str()) {
            return error(text);
        }
    }
    in_time(&certificate)
}

/// Whether a server certificate is in time, and for how long.
pub(super) fn in_time(certificate: &ServerCertificate) -> Checked {
    const CHECK: &str = "certificates";
    let Some(validity) = certificate.validity() else {
        return Checked::new(
            CHECK,
            Verdict::Warning,
            "the validity of the server certificate cannot be read",
        );
    };
    match watch::of_certificate(&validity, OffsetDateTime::now_utc()) {
        None => Checked::new(CHECK, Verdict::Ok, format!("valid until {}", validity.not_after)),
        Some(condition) if condition.code == ConditionCode::CertificateInvalid => {
            Checked::new(CHECK, Verdict::Error, condition.hint)
        }
        Some(condition) => Checked::new(CHECK, Verdict::Warning, condition.hint),
    }
}

/// Whether a server certificate, leaf first, is for the name under which clients reach the hub.
pub(super) fn covers(chain: &[CertificateDer<'static>], host: &str) -> Result<(), String> {
    let Some(first) = chain.first() else { return Ok(()) };
    let parsed = ParsedCertificate::try_from(first)
        .map_err(|fault| format!("the server certificate cannot be read: {fault}"))?;
    let name = ServerName::try_from(host)
        .map_err(|_| format!("EdgeDeviceHostName {host} is no name that a certificate can have"))?;
    verify_server_name(&parsed, &name).map_err(|_| {
        format!(
            "the server certificate is not for {host}, which EdgeDeviceHostName says clients use; renew it with that name"
        )
    })
}

/// The storage folder: there or to be made, writable, its store readable.
pub(super) fn store(settings: &Settings) -> Checked {
    const CHECK: &str = "store";
    let StoreKind::Persistent { folder, durability } = &settings.store.kind else {
        let text = "messages are kept in memory only and are lost when the process ends";
        return Checked::new(CHECK, Verdict::Warning, text);
    };
    let there = nearest(folder);
    if let Err(fault) = tempfile::tempfile_in(there) {
        let text = format!(
            "{} cannot be written: {fault}; give this user the rights to it, or set StorageFolder",
            there.display()
        );
        return Checked::new(CHECK, Verdict::Error, text);
    }
    match StoreReader::open(folder) {
        Ok(reader) => match reader.stat() {
            Ok(stat) => {
                let queued = stat.ledger.queues().queued();
                let text = format!("{}, {queued} messages queued, {durability:?}", stat.path.display());
                if stat.suspect || !stat.set_aside.is_empty() {
                    let text = format!("{text}; damage was found: `edgehub store verify` names it");
                    return Checked::new(CHECK, Verdict::Warning, text);
                }
                Checked::new(CHECK, Verdict::Ok, text)
            }
            Err(fault) => Checked::new(CHECK, Verdict::Error, fault.to_string()),
        },
        Err(OpenError::Locked { path }) => {
            Checked::new(CHECK, Verdict::Ok, format!("{} is in use by a running hub", path.display()))
        }
        Err(OpenError::NotFound { .. }) => {
            Checked::new(CHECK, Verdict::Ok, format!("it will be made in {}", folder.display()))
        }
        Err(fault) => Checked::new(CHECK, Verdict::Error, fault.to_string()),
    }
}

/// The free space of the storage folder's file system, beside the floor that stays free.
pub(super) fn disk(settings: &Settings) -> Checked {
    const CHECK: &str = "disk";
    let StoreKind::Persistent { folder, .. } = &settings.store.kind else {
        return Checked::new(CHECK, Verdict::Skipped, "messages are kept in memory");
    };
    let there = nearest(folder);
    let system = match rustix::fs::statvfs(there) {
        Ok(system) => system,
        Err(fault) => {
            let text = format!("the file system of {} cannot be asked: {fault}", there.display());
            return Checked::new(CHECK, Verdict::Error, text);
        }
    };
    let free = system.f_bavail.saturating_mul(system.f_frsize);
    let floor = settings.store.free_floor_bytes.min(system.f_blocks.saturating_mul(system.f_frsize) / 16);
    let text = format!("{} free; {} stay free", bytes(free), bytes(floor));
    if free <= floor {
        let text = format!("{text}: new messages are refused; free space, or lower store.free_floor_bytes");
        return Checked::new(CHECK, Verdict::Error, text);
    }
    let verdict = if free < floor.saturating_mul(FLOORS_WARNING) { Verdict::Warning } else { Verdict::Ok };
    Checked::new(CHECK, verdict, text)
}

/// The path, or the nearest one above it that exists.
fn nearest(folder: &Path) -> &Path {
    folder.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"))
}

/// The manifest: readable, every route compiles, nothing in it is hardly meant.
pub(super) fn routes(manifest: Option<&Path>) -> Checked {
    const CHECK: &str = "routes";
    let Some(path) = manifest else {
        return Checked::new(CHECK, Verdict::Skipped, "give the manifest with --manifest to have it checked");
    };
    let read = match Manifest::read(path) {
        Ok(read) => read,
        Err(fault) => return Checked::new(CHECK, Verdict::Error, fault.to_string()),
    };
    let (config, faults) = HubConfig::inspect(&read.hub_desired);
    let specs = || config.routes.iter().map(OwnedRouteSpec::as_spec);
    let (table, errors) = RouteTable::compile(specs(), "edge");
    let faults: Vec<String> = faults
        .iter()
        .map(ToString::to_string)
        .chain(errors.iter().map(|error| format!("route {} does not compile", error.name)))
        .collect();
    if !faults.is_empty() {
        let text =
            format!("{}; `edgehub route check {}` shows the places", faults.join("; "), path.display());
        return Checked::new(CHECK, Verdict::Error, text);
    }
    let (lints, warnings) = (lint(specs()).len(), read.warnings.len());
    if lints + warnings > 0 {
        let text = format!(
            "{} compile; {lints} may not mean what they say, {warnings} warnings of the manifest: `edgehub route check {}`",
            table.len(),
            path.display()
        );
        return Checked::new(CHECK, Verdict::Warning, text);
    }
    Checked::new(CHECK, Verdict::Ok, format!("{} compile", table.len()))
}
