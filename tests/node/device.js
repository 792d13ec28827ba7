// A device or module of the public Node SDK that does what it is told: node device.js TRANSPORT CONNECTION_STRING CA_FILE
// Commands are JSON lines on the standard input, {"id", "do", …}; answers and events are JSON lines on the standard output.
'use strict';

const fs = require('fs');
const readline = require('readline');
const { Client, ModuleClient, Message } = require('azure-iot-device');
const { NoRetry } = require('azure-iot-common');
const { Mqtt } = require('azure-iot-device-mqtt');
const { Amqp, AmqpWs } = require('azure-iot-device-amqp');

const TRANSPORTS = { mqtt: Mqtt, amqp: Amqp, 'amqp-ws': AmqpWs };
const [transport, connectionString, caFile] = process.argv.slice(2);
const kind = connectionString.includes('ModuleId=') ? ModuleClient : Client;
const client = kind.fromConnectionString(connectionString, TRANSPORTS[transport]);
const tell = (what) => process.stdout.write(JSON.stringify(what) + '\n');

let twin;
let verdicts = []; // what becomes of the next messages of the cloud; "complete" when it is empty

const commands = {
  async open() {
    await client.setOptions({ ca: fs.readFileSync(caFile, 'utf8') });
    await client.open();
  },
  async noRetry() {
    client.setRetryPolicy(new NoRetry());
  },
  async send({ body, properties, messageId, output }) {
    const message = new Message(body);
    message.contentType = 'application/json';
    message.contentEncoding = 'utf-8';
    message.messageId = messageId;
    for (const [key, value] of Object.entries(properties || {})) message.properties.add(key, value);
    if (output) await client.sendOutputEvent(output, message);
    else await client.sendEvent(message);
  },
  // Many at once: the SDK writes them without waiting. Gives the numbers of those that were acknowledged.
  async sendMany({ marker, count }) {
    const sent = [];
    for (let n = 0; n < count; n++) {
      const message = new Message(String(n));
      message.properties.add('marker', marker);
      sent.push(client.sendEvent(message));
    }
    const ends = await Promise.allSettled(sent);
    return [...ends.keys()].filter((n) => ends[n].status === 'fulfilled');
  },
  async inputs() {
    client.on('inputMessage', (input, message) => {
      client.complete(message, (error) => {
        tell({ event: 'input', input, body: message.getData().toString(), properties: list(message), error: text(error) });
      });
    });
  },
  async messages({ then }) {
    verdicts = then || [];
    client.on('message', (message) => {
      const verdict = verdicts.shift() || 'complete';
      const body = message.getData().toString();
      tell({ event: 'message', body, messageId: message.messageId, properties: list(message), verdict });
      client[verdict](message, (error) => tell({ event: 'settled', body, verdict, error: text(error) }));
    });
  },
  async twin() {
    twin = await client.getTwin();
    twin.on('properties.desired', (change) => tell({ event: 'desired', change }));
    return { desired: twin.properties.desired, reported: twin.properties.reported };
  },
  async read() {
    await twin.get();
    return { desired: twin.properties.desired, reported: twin.properties.reported };
  },
  async report({ patch }) {
    await new Promise((resolve, reject) => {
      twin.properties.reported.update(patch, (error) => (error ? reject(error) : resolve()));
    });
  },
  async methods({ name }) {
    const answer = (request, response) => {
      response.send(202, { got: request.payload }, (error) => tell({ event: 'answered', error: text(error) }));
    };
    if (client.onDeviceMethod) client.onDeviceMethod(name, answer);
    else client.onMethod(name, answer);
  },
  async close() {
    await client.close();
  },
};

function text(error) {
  return error ? `${error.name}: ${error.message}` : null;
}

function list(message) {
  const properties = {};
  for (let n = 0; n < message.properties.count(); n++) {
    const { key, value } = message.properties.getItem(n);
    properties[key] = value;
  }
  return properties;
}

const fail = (error) => tell({ event: 'failure', error: String(error && error.stack) });
process.on('unhandledRejection', fail);
process.on('uncaughtException', fail);
client.on('error', (error) => tell({ event: 'error', error: text(error) }));
client.on('disconnect', (error) => tell({ event: 'disconnect', error: text(error) }));

readline.createInterface({ input: process.stdin }).on('line', (line) => {
  const command = JSON.parse(line);
  commands[command.do](command).then(
    (result) => tell({ done: command.id, result: result === undefined ? null : result }),
    (error) => tell({ done: command.id, error: text(error) }),
  );
});
process.stdin.on('end', () => process.exit(0));
