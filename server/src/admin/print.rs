//! Owns the tables and sentences that answers become for people.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use edgehub_routing::DEFAULT_PRIORITY;

use super::answer::{
    Account, DeadLetterAnswer, DeadLettersAnswer, LedgerAnswer, LettersAnswer, MessagesAnswer, PurgeAnswer,
    QueueAnswer, QueueState, QueuesAnswer,
};
use super::shown::{ReadMessage, ShownBody, ShownMessage};
use super::table::{Side, Table, bytes, printable, shortened, span};
use super::tap::TapLine;

/// Characters of the properties that a row shows; JSON has all.
const PROPERTIES_SHOWN_MAX: usize = 60;
/// Characters of a body that are shown; JSON has all.
const BODY_SHOWN_MAX: usize = 4_000;

const NOT_APPLIED: &str = "Nothing was changed; --apply does it.\n";

/// `edgehub ledger`.
pub fn ledger(answer: &LedgerAnswer) -> String {
    let reasons: BTreeSet<&str> = answer.total.dropped.keys().map(String::as_str).collect();
    let mut columns = vec![("QUEUE".to_owned(), Side::Left)];
    let mut number = |name: String| columns.push((name, Side::Right));
    ["ACCEPTED", "DELIVERED", "EXPIRED"].into_iter().for_each(|name| number(name.into()));
    if reasons.is_empty() {
        number("DROPPED".into());
    }
    reasons.iter().for_each(|reason| number(format!("DROPPED:{reason}")));
    ["DEAD-LETTERED", "QUEUED", "GAP"].into_iter().for_each(|name| number(name.into()));
    let mut table = Table::new(columns);
    let total = ("total", &answer.total);
    for (name, account) in answer.queues.iter().map(|row| (row.queue.as_str(), &row.ledger)).chain([total]) {
        let mut row = vec![name.to_owned()];
        row.extend([account.accepted, account.delivered, account.expired].map(|count| count.to_string()));
        if reasons.is_empty() {
            row.push("0".into());
        }
        row.extend(reasons.iter().map(|reason| account.dropped.get(*reason).unwrap_or(&0).to_string()));
        row.extend([account.dead_lettered.to_string(), account.queued.to_string(), account.gap.to_string()]);
        table.row(row);
    }
    let mut out = lines(&table);
    let letters = &answer.dead_letters;
    let _ = writeln!(
        out,
        "\naccepted = delivered + expired + dropped + dead-lettered + queued + gap\ndead letters: {}",
        letters_account(letters)
    );
    let _ = writeln!(out, "unrouted: {}", answer.unrouted);
    let verdict = match (answer.is_balanced(), answer.gap) {
        (true, _) => "the ledger adds up: nothing is unaccounted for".to_owned(),
        (false, 0) => {
            "THE LEDGER DOES NOT ADD UP: see the column GAP; keep a copy of the store, and report it".into()
        }
        (false, gap) => {
            format!(
                "THE LEDGER DOES NOT ADD UP: the gap of the whole store is {gap}; keep a copy of it, and report it"
            )
        }
    };
    let _ = writeln!(out, "{verdict}");
    out
}

fn letters_account(letters: &Account) -> String {
    let dropped: Vec<String> =
        letters.dropped.iter().map(|(reason, count)| format!(" + {count} dropped ({reason})")).collect();
    let gap = if letters.gap == 0 { String::new() } else { format!(" + gap {}", letters.gap) };
    format!(
        "{} moved there = {} put back{} + {} there{gap}",
        letters.accepted,
        letters.delivered,
        dropped.concat(),
        letters.queued
    )
}

/// `edgehub queues list`.
pub fn queues(answer: &QueuesAnswer) -> String {
    if answer.queues.is_empty() {
        return "There are no queues yet: a route makes them.\n".into();
    }
    let mut table = Table::new([
        ("QUEUE", Side::Left),
        ("ENDPOINT", Side::Left),
        ("PRIORITY", Side::Right),
        ("STATE", Side::Left),
        ("QUEUED", Side::Right),
        ("OLDEST", Side::Right),
    ]);
    for queue in &answer.queues {
        table.row([
            queue.queue.clone(),
            queue.endpoint.clone(),
            priority(queue.priority),
            state(queue.state).into(),
            queue.queued.to_string(),
            queue.oldest_age_ms.map_or("-".into(), span),
        ]);
    }
    lines(&table)
}

/// `edgehub queues show`.
pub fn queue(queue: &QueueAnswer, page: &MessagesAnswer) -> String {
    let mut out = String::new();
    let oldest = queue.oldest_age_ms.map(|age| format!(", the oldest for {}", span(age))).unwrap_or_default();
    let _ = writeln!(out, "queue     {}", printable(&queue.queue));
    let _ = writeln!(out, "endpoint  {}", printable(&queue.endpoint));
    let _ = writeln!(out, "priority  {}", priority(queue.priority));
    let _ = writeln!(out, "state     {}", state(queue.state));
    let _ = writeln!(out, "queued    {}{oldest}", queue.queued);
    let _ = writeln!(
        out,
        "offsets   from {} (all before is finished) to {} (the next)",
        queue.checkpoint, queue.tail
    );
    if page.messages.is_empty() {
        return out;
    }
    let mut table = Table::new(
        [("OFFSET", Side::Right), ("AGE", Side::Right), ("TIME LEFT", Side::Right)]
            .into_iter()
            .chain(MESSAGE),
    );
    for queued in &page.messages {
        let left = queued.time_left_ms.map_or("-".into(), span);
        table.row(
            [queued.offset.to_string(), span(queued.age_ms), left]
                .into_iter()
                .chain(message(&queued.message)),
        );
    }
    out.push('\n');
    let bodies = page.messages.iter().map(|queued| body(&queued.message));
    interleave(&mut out, &table, bodies);
    if let Some(next) = page.next {
        let _ = writeln!(out, "There are more: --from {next} shows them.");
    }
    out
}

/// `edgehub queues purge`.
pub fn purged(answer: &PurgeAnswer) -> String {
    let what = format!(
        "{} of {} before offset {}",
        messages(answer.messages),
        printable(&answer.queue),
        answer.before
    );
    if answer.applied {
        format!("Dropped {what}; the ledger counts them as purged.\n")
    } else {
        format!("Would drop {what}.\nNothing was changed; --before {} --apply drops them.\n", answer.before)
    }
}

/// `edgehub dlq list`.
pub fn dead_letters(answer: &DeadLettersAnswer) -> String {
    if answer.dead_letters.is_empty() {
        return "There are no dead letters.\n".into();
    }
    let own = [
        ("ID", Side::Right),
        ("QUEUE", Side::Left),
        ("REASON", Side::Left),
        ("ATTEMPTS", Side::Right),
        ("AGE", Side::Right),
    ];
    let mut table = Table::new(own.into_iter().chain(MESSAGE));
    for letter in &answer.dead_letters {
        let own = [
            letter.id.to_string(),
            letter.queue.clone(),
            letter.reason.clone(),
            letter.attempts.to_string(),
            span(letter.age_ms),
        ];
        table.row(own.into_iter().chain(message(&letter.message)));
    }
    let mut out = String::new();
    interleave(&mut out, &table, answer.dead_letters.iter().map(|letter| body(&letter.message)));
    if let Some(next) = answer.next {
        let _ = writeln!(out, "There are more: --from {next} shows them.");
    }
    out
}

/// `edgehub dlq show`.
pub fn dead_letter(letter: &DeadLetterAnswer) -> String {
    let mut out = String::new();
    let mut line = |name: &str, text: &str| {
        let _ = writeln!(out, "{name:<17} {}", printable(text));
    };
    line("id", &letter.id.to_string());
    line("queue", &letter.queue);
    line("offset", &letter.offset.to_string());
    line("reason", &letter.reason);
    line("attempts", &letter.attempts.to_string());
    line("accepted at", &letter.accepted_at);
    line("dead-lettered at", &format!("{} ({} ago)", letter.dead_lettered_at, span(letter.age_ms)));
    match &letter.message {
        ShownMessage::Read(read) => {
            line("message id", &read.id);
            line("sender", &read.sender);
            line("output", read.output.as_deref().unwrap_or("-"));
            line("size", &format!("{}, {} of body", bytes(read.size_bytes), bytes(read.body_bytes)));
            for (name, value) in &read.system {
                line("system property", &format!("{name} = {}", value.as_deref().unwrap_or("null")));
            }
            for property in &read.properties {
                line(
                    "property",
                    &format!("{} = {}", property.name, property.value.as_deref().unwrap_or("null")),
                );
            }
        }
        ShownMessage::Unreadable { unreadable, stored_bytes } => {
            line("unreadable", &format!("{unreadable} ({} stored)", bytes(*stored_bytes)));
        }
    }
    if let Some(body) = body(&letter.message) {
        line("body", &body);
    }
    out
}

/// One line of `edgehub tap`.
pub fn tapped(line: &TapLine) -> String {
    match line {
        TapLine::Message(tapped) => {
            let [sender, output, size, kind, properties] = message(&tapped.message);
            let to =
                if tapped.endpoints.is_empty() { "no route".into() } else { tapped.endpoints.join(", ") };
            let text = format!("{} {sender} {output} {size} {kind} {properties} -> {to}", tapped.at);
            let body = body(&tapped.message).map(|body| format!("    {}\n", printable(&body)));
            format!("{}\n{}", printable(&text), body.unwrap_or_default())
        }
        TapLine::End(end) => {
            let left_out = match end.left_out {
                0 => String::new(),
                count => format!(", {count} of them came too fast to be shown"),
            };
            format!("{} met the condition{left_out}.\n", messages(end.matched))
        }
    }
}

/// `edgehub dlq redrive` and `edgehub queues redrive`.
pub fn redriven(answer: &LettersAnswer) -> String {
    letters_done(answer, "Put back", "Would put back", "into")
}

/// `edgehub dlq drop`.
pub fn dropped(answer: &LettersAnswer) -> String {
    letters_done(answer, "Dropped", "Would drop", "of")
}

fn letters_done(answer: &LettersAnswer, done: &str, would: &str, relation: &str) -> String {
    let verb = if answer.applied { done } else { would };
    let mut out = String::new();
    for (queue, count) in &answer.queues {
        let noun = if *count == 1 { "dead letter" } else { "dead letters" };
        let _ = writeln!(out, "{verb} {count} {noun} {relation} {}.", printable(queue));
    }
    if !answer.missing.is_empty() {
        let ids: Vec<String> = answer.missing.iter().map(u64::to_string).collect();
        let _ = writeln!(out, "Not there: {}.", ids.join(", "));
    }
    if answer.total() == 0 {
        let _ = writeln!(out, "There is no such dead letter.");
    } else if !answer.applied {
        out.push_str(NOT_APPLIED);
    }
    out
}

/// Columns of every list of messages.
const MESSAGE: [(&str, Side); 5] = [
    ("SENDER", Side::Left),
    ("OUTPUT", Side::Left),
    ("SIZE", Side::Right),
    ("CONTENT TYPE", Side::Left),
    ("PROPERTIES", Side::Left),
];

fn message(message: &ShownMessage) -> [String; 5] {
    match message {
        ShownMessage::Read(read) => [
            read.sender.clone(),
            read.output.clone().unwrap_or_else(|| "-".into()),
            bytes(read.size_bytes),
            read.content_type().unwrap_or("-").to_owned(),
            shortened(&properties(read), PROPERTIES_SHOWN_MAX),
        ],
        ShownMessage::Unreadable { unreadable, stored_bytes } => {
            ["-".into(), "-".into(), bytes(*stored_bytes), "-".into(), format!("unreadable: {unreadable}")]
        }
    }
}

fn properties(message: &ReadMessage) -> String {
    let pair = |name: &str, value: &Option<String>| match value {
        Some(value) => format!("{name}={value}"),
        None => name.to_owned(),
    };
    let shown: Vec<_> =
        message.properties.iter().map(|property| pair(&property.name, &property.value)).collect();
    if shown.is_empty() { "-".into() } else { shown.join(" ") }
}

fn body(message: &ShownMessage) -> Option<String> {
    let ShownMessage::Read(read) = message else { return None };
    Some(match read.body.as_ref()? {
        ShownBody::Text(text) => shortened(text, BODY_SHOWN_MAX),
        ShownBody::Base64(text) => format!("base64 {}", shortened(text, BODY_SHOWN_MAX)),
    })
}

/// The lines of a table, each row followed by its body.
fn interleave(out: &mut String, table: &Table, bodies: impl Iterator<Item = Option<String>>) {
    let lines = table.lines();
    let mut rows = lines.iter();
    if let Some(header) = rows.next() {
        let _ = writeln!(out, "{header}");
    }
    for (line, body) in rows.zip(bodies) {
        let _ = writeln!(out, "{line}");
        if let Some(body) = body {
            let _ = writeln!(out, "    {}", printable(&body));
        }
    }
}

fn lines(table: &Table) -> String {
    let mut out = table.lines().join("\n");
    out.push('\n');
    out
}

fn messages(count: u64) -> String {
    if count == 1 { "1 message".into() } else { format!("{count} messages") }
}

fn priority(number: u32) -> String {
    if number == DEFAULT_PRIORITY { "default".into() } else { number.to_string() }
}

fn state(state: QueueState) -> &'static str {
    match state {
        QueueState::Attached => "attached",
        QueueState::Detached => "detached",
    }
}
