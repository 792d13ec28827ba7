// A raw AMQP client (rhea): node raw.js VERB, one JSON object with its arguments on the standard input.
// What it tells are JSON lines on the standard output; it ends by itself.
'use strict';

const fs = require('fs');
const rhea = require('rhea');

const args = JSON.parse(fs.readFileSync(0, 'utf8'));
// Errors of the peer have a condition in place of a stack.
const told = (error) => String(error && (error.stack || `${error.condition} ${error.description}`));
const tell = (what) => process.stdout.write(JSON.stringify(what) + '\n');
const container = rhea.create_container({ id: 'raw' });

process.on('unhandledRejection', (error) => {
  tell({ failure: told(error) });
  process.exit(1);
});

// The next event of that name at an endpoint; its error event fails.
function event(endpoint, name, failure) {
  return new Promise((resolve, reject) => {
    endpoint.once(name, resolve);
    if (failure) endpoint.once(failure, () => reject(new Error(`${failure}: ${endpoint.error}`)));
  });
}

// Without a way of SASL the connection begins with the plain header.
function sasl() {
  if (args.sasl === 'PLAIN') return { username: args.identity.user, password: args.identity.token };
  return args.sasl === 'ANONYMOUS' ? { username: 'anybody' } : {};
}

async function connect(options) {
  const connection = container.connect({
    host: args.host, port: args.port, transport: 'tls', ca: fs.readFileSync(args.ca), reconnect: false, ...sasl(), ...options,
  });
  await event(connection, 'connection_open', 'connection_error');
  return connection;
}

// Puts all tokens of `identities` on one pair of links; fails unless each is taken. Whom SASL has shown to the hub needs none.
async function putTokens(connection, identities) {
  if (args.sasl === 'PLAIN') return 0;
  const answers = connection.open_receiver({ source: '$cbs', credit_window: 100 });
  const requests = connection.open_sender({ target: '$cbs' });
  await Promise.all([event(answers, 'receiver_open', 'receiver_error'), event(requests, 'sender_open', 'sender_error')]);
  const taken = new Set();
  let next = 0;
  await new Promise((resolve, reject) => {
    const put = () => {
      while (requests.sendable() && next < identities.length) {
        const { audience, token } = identities[next];
        requests.send({
          message_id: `put-${next++}`, to: '$cbs', reply_to: 'cbs', body: token,
          application_properties: { operation: 'put-token', type: 'servicebus.windows.net:sastoken', name: audience },
        });
      }
    };
    answers.on('message', ({ message }) => {
      if (message.application_properties['status-code'] !== 200) reject(new Error(JSON.stringify(message)));
      taken.add(message.correlation_id);
      if (taken.size === identities.length) resolve();
    });
    requests.on('sendable', put);
    put();
  });
  return taken.size;
}

// Sends numbered messages as far as credit goes; ends when the last is answered. Gives the numbers by outcome.
async function sendAll(sender, count, make) {
  const numbers = new Map();
  const ends = { accepted: 0, rejected: 0, released: 0, modified: 0 };
  let next = 0;
  let ended = 0;
  await new Promise((resolve, reject) => {
    const send = () => {
      while (sender.sendable() && next < count) {
        numbers.set(sender.send(make(next)).id, next);
        next++;
      }
    };
    for (const outcome of Object.keys(ends)) {
      sender.on(outcome, () => {
        ends[outcome]++;
        if (++ended === count) resolve();
      });
    }
    sender.on('sender_error', () => reject(sender.error));
    sender.on('sendable', send);
    send();
  });
  return ends;
}

const data = (text) => rhea.message.data_section(Buffer.from(text));
const numbered = (marker) => (n) => ({ body: data(String(n)), application_properties: { marker } });

const verbs = {
  // Many small messages on one link.
  async pipeline({ identity, marker, count, frame }) {
    const connection = await connect(frame ? { max_frame_size: frame } : {});
    await putTokens(connection, [identity]);
    const sender = connection.open_sender({ target: identity.events });
    await event(sender, 'sender_open', 'sender_error');
    tell({ ends: await sendAll(sender, count, numbered(marker)) });
    connection.close();
  },

  // All messages in one transfer, in the message format of batches: each is a data section.
  async batch({ identity, marker, count }) {
    const connection = await connect({});
    await putTokens(connection, [identity]);
    const sender = connection.open_sender({ target: identity.events });
    await event(sender, 'sendable', 'sender_error');
    const messages = Array.from({ length: count }, (_, n) => rhea.message.encode(numbered(marker)(n)));
    const accepted = event(sender, 'accepted', 'rejected');
    sender.send(rhea.message.encode({ body: rhea.message.data_sections(messages) }), undefined, 0x80013700);
    await accepted;
    tell({ ends: { accepted: 1 } });
    connection.close();
  },

  // Each identity has a session and a link of its own, and sends one message.
  async identities({ identities, marker }) {
    const connection = await connect({ channel_max: 0xffff });
    tell({ put: await putTokens(connection, identities) });
    const outcomes = await Promise.all(identities.map(async ({ events, name }) => {
      const session = connection.create_session();
      session.begin();
      const sender = session.open_sender({ target: events });
      await event(sender, 'sender_open', 'sender_error');
      const { accepted } = await sendAll(sender, 1, () => ({ body: data(name), application_properties: { marker } }));
      return accepted;
    }));
    tell({ accepted: outcomes.reduce((sum, accepted) => sum + accepted, 0) });
    connection.close();
  },

  // Frames of 512 bytes both ways: a module sends large messages to its own input.
  async frames({ identity, receiver, marker, sizes }) {
    const connection = await connect({ max_frame_size: 512 });
    tell({ frame: connection.remote.open.max_frame_size });
    await putTokens(connection, [identity, receiver]);
    const input = connection.open_receiver({ source: receiver.inputs, credit_window: 10 });
    await event(input, 'receiver_open', 'receiver_error');
    const bodies = [];
    const all = new Promise((resolve) => {
      input.on('message', ({ message }) => {
        bodies.push(message.body.content.toString());
        if (bodies.length === sizes.length) resolve();
      });
    });
    const sender = connection.open_sender({ target: identity.events });
    await event(sender, 'sender_open', 'sender_error');
    const make = (n) => ({ body: data(String(n).repeat(sizes[n])), application_properties: { marker, filler: 'f'.repeat(600) } });
    tell({ ends: await sendAll(sender, sizes.length, make) });
    await all;
    tell({ same: bodies.every((body, n) => body === String(n).repeat(sizes[n])) });
    connection.close();
  },

  // A receiver with credit 1 at a time, that settles late, then drains.
  async credit({ identity, receiver, marker, count }) {
    const connection = await connect({});
    await putTokens(connection, [identity, receiver]);
    const input = connection.open_receiver({ source: receiver.inputs, credit_window: 0, autoaccept: false });
    await event(input, 'receiver_open', 'receiver_error');
    const sender = connection.open_sender({ target: identity.events });
    await event(sender, 'sender_open', 'sender_error');
    tell({ ends: await sendAll(sender, count, numbered(marker)) });
    const bodies = [];
    let unsettled;
    for (let n = 0; n < count; n++) {
      input.add_credit(1);
      const { message, delivery } = await event(input, 'message');
      bodies.push(Number(message.body.content.toString()));
      // The one before is settled only now: one is always under way.
      if (unsettled) unsettled.accept();
      unsettled = delivery;
    }
    // More would have been too much: nothing came without credit.
    tell({ bodies, credit: input.credit });
    const drained = event(input, 'receiver_drained');
    input.drain = true;
    input.add_credit(5);
    await drained;
    tell({ drained: input.credit });
    input.drain = false;
    unsettled.accept();
    // After the drain, credit works as before.
    const again = event(input, 'message');
    input.add_credit(1);
    await sendAll(sender, 1, numbered(`${marker}-again`));
    const { message, delivery } = await again;
    delivery.accept();
    tell({ again: message.application_properties.marker });
    connection.close();
    await event(connection, 'connection_close');
  },

  // The client asks for a heartbeat; a silent link lives on, longer than the time-out.
  async heartbeat({ identity, marker, idle, beats }) {
    const connection = await connect({ idle_time_out: idle });
    await putTokens(connection, [identity]);
    const sender = connection.open_sender({ target: identity.events });
    await event(sender, 'sender_open', 'sender_error');
    // Reads below TLS: what arrives on a silent connection are heartbeats.
    let heard = 0;
    await new Promise((resolve, reject) => {
      connection.on('disconnected', () => reject(new Error('the connection ended')));
      connection.socket.on('data', (bytes) => {
        if (bytes.length % 8 === 0 && bytes.readUInt32BE(0) === 8) heard += bytes.length / 8;
        if (heard >= beats) resolve();
      });
    });
    tell({ heard });
    connection.removeAllListeners('disconnected');
    tell({ ends: await sendAll(sender, 1, numbered(marker)) });
    connection.close();
  },

  // A link that the hub does not let its identity have.
  async refused({ identity }) {
    const connection = await connect({});
    await putTokens(connection, [identity]);
    const sender = connection.open_sender({ target: identity.events });
    await event(sender, 'sender_error');
    tell({ condition: sender.error.condition });
    connection.close();
  },
};

verbs[args.verb](args).catch((error) => {
  tell({ failure: told(error) });
  process.exit(1);
});
