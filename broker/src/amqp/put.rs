//! Writing the frame bodies of AMQP 1.0 §2.7 and §5.3.

use bytes::{BufMut, BytesMut};

use super::encode::*;
use super::error::Error;
use super::performative::*;

/// Appends `sasl-mechanisms`.
pub(super) fn put_sasl_mechanisms(out: &mut BytesMut, mechanisms: &[&str]) {
    let mut list = CompoundWriter::described_list(out, 0x40);
    let array = list.field();
    let size = 2 + mechanisms.iter().map(|name| name.len() + 1).sum::<usize>();
    array.put_slice(&[0xe0, size as u8, mechanisms.len() as u8, 0xa3]);
    for name in mechanisms {
        array.put_u8(name.len() as u8);
        array.put_slice(name.as_bytes());
    }
    list.finish();
}

/// Appends `sasl-init`.
pub(super) fn put_sasl_init(out: &mut BytesMut, mechanism: &str, response: &[u8], hostname: Option<&str>) {
    let mut list = CompoundWriter::described_list(out, 0x41);
    put_symbol(list.field(), mechanism);
    put_binary(list.field(), response);
    list.optional(hostname, put_string);
    list.finish();
}

/// Appends `sasl-outcome`.
pub(super) fn put_sasl_outcome(out: &mut BytesMut, code: u8) {
    let mut list = CompoundWriter::described_list(out, 0x44);
    list.field().put_slice(&[0x50, code]);
    list.finish();
}

pub(super) fn put_open(out: &mut BytesMut, open: &Open) {
    let mut list = CompoundWriter::described_list(out, 0x10);
    put_string(list.field(), &open.container_id);
    list.optional(open.hostname.as_deref(), put_string);
    put_uint(list.field(), open.max_frame_bytes);
    put_ushort(list.field(), open.channel_max);
    list.optional(open.idle_timeout_millis, put_uint);
    list.null().null().null().null();
    put_properties(&mut list, &open.properties);
    list.finish();
}

pub(super) fn put_begin(out: &mut BytesMut, begin: &Begin) {
    let mut list = CompoundWriter::described_list(out, 0x11);
    list.optional(begin.remote_channel, put_ushort);
    put_uint(list.field(), begin.next_outgoing_id);
    put_uint(list.field(), begin.incoming_window);
    put_uint(list.field(), begin.outgoing_window);
    put_uint(list.field(), begin.handle_max);
    list.finish();
}

pub(super) fn put_attach(out: &mut BytesMut, attach: &Attach) {
    let mut list = CompoundWriter::described_list(out, 0x12);
    put_string(list.field(), &attach.name);
    put_uint(list.field(), attach.handle);
    put_bool(list.field(), attach.role.is_receiver());
    list.optional(attach.snd_settle, |out, mode| {
        out.put_slice(&[
            0x50,
            match mode {
                SenderSettle::Unsettled => 0,
                SenderSettle::Settled => 1,
                SenderSettle::Mixed => 2,
            },
        ]);
    });
    list.optional(attach.rcv_settle, |out, mode| {
        out.put_slice(&[
            0x50,
            match mode {
                ReceiverSettle::First => 0,
                ReceiverSettle::Second => 1,
            },
        ]);
    });
    list.optional(attach.source.as_ref(), |out, source| out.put_slice(&source.0));
    list.optional(attach.target.as_ref(), |out, target| out.put_slice(&target.0));
    list.null().null();
    list.optional(attach.initial_delivery_count, put_uint);
    list.optional(attach.max_message_bytes, put_ulong);
    list.null().null();
    put_properties(&mut list, &attach.properties);
    list.finish();
}

pub(super) fn put_flow(out: &mut BytesMut, flow: &Flow) {
    let mut list = CompoundWriter::described_list(out, 0x13);
    list.optional(flow.next_incoming_id, put_uint);
    put_uint(list.field(), flow.incoming_window);
    put_uint(list.field(), flow.next_outgoing_id);
    put_uint(list.field(), flow.outgoing_window);
    list.optional(flow.handle, put_uint);
    list.optional(flow.delivery_count, put_uint);
    list.optional(flow.link_credit, put_uint);
    list.null();
    list.optional(flow.drain.then_some(true), put_bool);
    list.optional(flow.echo.then_some(true), put_bool);
    list.finish();
}

/// What the first frame of a delivery says.
#[derive(Debug, Clone)]
pub(super) struct TransferHead {
    pub(super) delivery_id: u32,
    pub(super) tag: [u8; 16],
    pub(super) message_format: u32,
    pub(super) settled: bool,
}

/// Room for a transfer of ours: descriptor and list, three numbers, a tag of 16 bytes, two flags.
const TRANSFER_BYTES_MAX: usize = 6 + 3 * 5 + 18 + 2;

/// Appends a transfer whose last byte is the `more` flag, set to false; see [`set_more`].
pub(super) fn put_transfer(out: &mut BytesMut, handle: u32, head: Option<&TransferHead>) {
    // Every message has one, and its fields are few bytes each: they are put together first, and appended at once.
    let mut room = [0_u8; TRANSFER_BYTES_MAX];
    room[..6].copy_from_slice(&[0x00, 0x53, 0x14, 0xc0, 0, 6]);
    let mut fields = &mut room[6..];
    put_uint_into(&mut fields, handle);
    match head {
        Some(head) => {
            put_uint_into(&mut fields, head.delivery_id);
            fields.put_slice(&[0xa0, head.tag.len() as u8]);
            fields.put_slice(&head.tag);
            put_uint_into(&mut fields, head.message_format);
            fields.put_u8(if head.settled { 0x41 } else { 0x42 });
        }
        None => fields.put_slice(&[0x40; 4]),
    }
    fields.put_u8(0x42);
    let used = TRANSFER_BYTES_MAX - fields.len();
    room[4] = (used - 5) as u8;
    out.put_slice(&room[..used]);
}

fn put_uint_into(out: &mut &mut [u8], value: u32) {
    match value {
        0 => out.put_u8(0x43),
        1..=0xff => out.put_slice(&[0x52, value as u8]),
        _ => {
            out.put_u8(0x70);
            out.put_u32(value);
        }
    }
}

/// Sets the `more` flag of the transfer that [`put_transfer`] has just appended.
pub(super) fn set_more(out: &mut BytesMut) {
    if let Some(last) = out.last_mut() {
        *last = 0x41;
    }
}

pub(super) fn put_disposition(
    out: &mut BytesMut,
    role: Role,
    first: u32,
    last: u32,
    settled: bool,
    outcome: &Outcome,
) {
    let mut list = CompoundWriter::described_list(out, 0x15);
    put_bool(list.field(), role.is_receiver());
    put_uint(list.field(), first);
    put_uint(list.field(), last);
    put_bool(list.field(), settled);
    put_outcome(list.field(), outcome);
    list.finish();
}

pub(super) fn put_detach(out: &mut BytesMut, detach: &Detach) {
    let mut list = CompoundWriter::described_list(out, 0x16);
    put_uint(list.field(), detach.handle);
    put_bool(list.field(), detach.closed);
    list.optional(detach.error.as_ref(), put_error);
    list.finish();
}

pub(super) fn put_end(out: &mut BytesMut, error: Option<&Error>) {
    put_closing(out, 0x17, error);
}

pub(super) fn put_close(out: &mut BytesMut, error: Option<&Error>) {
    put_closing(out, 0x18, error);
}

fn put_closing(out: &mut BytesMut, descriptor: u64, error: Option<&Error>) {
    let mut list = CompoundWriter::described_list(out, descriptor);
    list.optional(error, put_error);
    list.finish();
}

fn put_ushort(out: &mut BytesMut, value: u16) {
    out.put_u8(0x60);
    out.put_u16(value);
}

fn put_error(out: &mut BytesMut, error: &Error) {
    let mut list = CompoundWriter::described_list(out, 0x1d);
    put_symbol(list.field(), error.condition.as_str());
    list.optional(error.description.as_deref(), put_string);
    list.finish();
}

fn put_outcome(out: &mut BytesMut, outcome: &Outcome) {
    match outcome {
        Outcome::Accepted => out.put_slice(&[0x00, 0x53, 0x24, 0x45]),
        Outcome::Released => out.put_slice(&[0x00, 0x53, 0x26, 0x45]),
        Outcome::Rejected(error) => {
            let mut list = CompoundWriter::described_list(out, 0x25);
            list.optional(error.as_ref(), put_error);
            list.finish();
        }
        Outcome::Modified { delivery_failed, undeliverable_here } => {
            let mut list = CompoundWriter::described_list(out, 0x27);
            put_bool(list.field(), *delivery_failed);
            put_bool(list.field(), *undeliverable_here);
            list.finish();
        }
    }
}

fn put_properties(list: &mut CompoundWriter<'_>, properties: &Properties) {
    if properties.is_empty() {
        list.null();
        return;
    }
    let mut map = CompoundWriter::map(list.field());
    for (key, value) in properties {
        put_symbol(map.field(), key);
        put_value(map.field(), value);
    }
    map.finish();
}
