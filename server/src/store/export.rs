//! Owns the form in which entries leave a stopped store: one JSON object per line.

use std::io::{BufWriter, Write as _};
use std::process::ExitCode;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use edgehub_broker::message::{Message, PropertyName, SenderCache};
use edgehub_storage::{Entry, StoreError, StoreReader, Ttl};
use serde_json::{Map, Value, json};

use super::{ExportOptions, folder};
use crate::exit::Failure;

/// Why an export ended early.
enum Ended {
    Store(StoreError),
    /// Nobody reads standard output any more.
    Unread,
    Output(std::io::Error),
}

impl From<StoreError> for Ended {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

pub(super) fn run(options: &ExportOptions) -> Result<ExitCode, Failure> {
    let reader = StoreReader::open(&folder(&options.folder)?)?;
    let mut out = BufWriter::new(std::io::stdout().lock());
    let mut senders = SenderCache::default();
    let exported = reader.export(options.queue.as_deref(), &mut |queue, entry| {
        let line = line(queue, &entry, &mut senders);
        writeln!(out, "{line}").map_err(|error| match error.kind() {
            std::io::ErrorKind::BrokenPipe => Ended::Unread,
            _ => Ended::Output(error),
        })
    });
    let flushed = out.flush();
    match (exported, flushed) {
        (Err(Ended::Store(error)), _) => Err(error.into()),
        (Err(Ended::Unread), _) => Ok(ExitCode::SUCCESS),
        (Err(Ended::Output(source)), _) => Err(Failure::System { what: "standard output", source }),
        (Ok(_), Err(source)) if source.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::System { what: "standard output", source })
        }
        (Ok(0), _) => Ok(ExitCode::SUCCESS),
        (Ok(unreadable), _) => {
            eprintln!(
                "{unreadable} entries or stretches of entries cannot be read; see edgehub store verify"
            );
            Ok(ExitCode::FAILURE)
        }
    }
}

fn line(queue: &str, entry: &Entry, senders: &mut SenderCache) -> Value {
    let ttl_millis = match entry.ttl {
        Ttl::Infinite => Value::Null,
        Ttl::Millis(millis) => millis.into(),
    };
    let mut line = json!({
        "queue": queue,
        "offset": entry.offset.get(),
        "accepted_at_unix_millis": entry.accepted_at.as_millis(),
        "ttl_millis": ttl_millis,
        "bytes": BASE64.encode(&entry.bytes),
    });
    if let (Ok(message), Some(members)) = (Message::from_record(&entry.bytes, senders), line.as_object_mut())
    {
        members.insert("message".to_owned(), message_json(&message));
    }
    line
}

fn message_json(message: &Message) -> Value {
    let (mut system, mut application) = (Map::new(), Map::new());
    for property in message.properties.iter() {
        let value = if property.null { Value::Null } else { property.value.into() };
        match property.name {
            PropertyName::System(name) => system.insert(name.name().to_owned(), value),
            PropertyName::Application(name) => application.insert(name.to_owned(), value),
        };
    }
    let mut content = json!({
        "sender": message.sender.identity.to_string(),
        "origin": message.sender.origin.as_str(),
        "id": message.id.to_string(),
        "system_properties": system,
        "application_properties": application,
        "body": BASE64.encode(&message.body),
    });
    if let (Ok(text), Some(members)) = (std::str::from_utf8(&message.body), content.as_object_mut()) {
        members.insert("body_text".to_owned(), text.into());
    }
    content
}
