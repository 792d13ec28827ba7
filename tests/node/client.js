// One run of the public Node SDK: node client.js TRANSPORT CONNECTION_STRING CA_FILE send|output|receive COUNT MARKER
'use strict';

const fs = require('fs');
const { Client, ModuleClient, Message } = require('azure-iot-device');
const { Mqtt, MqttWs } = require('azure-iot-device-mqtt');

const [transport, connectionString, caFile, verb, count, marker] = process.argv.slice(2);
const kind = connectionString.includes('ModuleId=') ? ModuleClient : Client;
const client = kind.fromConnectionString(connectionString, transport === 'ws' ? MqttWs : Mqtt);
const tell = (...words) => process.stdout.write(words.join(' ') + '\n');

process.on('unhandledRejection', (error) => {
  tell('error', error);
  process.exit(1);
});

async function send() {
  await client.open();
  for (let n = 0; n < Number(count); n++) {
    const message = new Message(JSON.stringify({ n }));
    message.contentType = 'application/json';
    message.contentEncoding = 'utf-8';
    message.messageId = `${marker}-${n}`;
    message.properties.add('marker', marker);
    message.properties.add('naïve key', '50 % / ü & = ?');
    if (verb === 'output') await client.sendOutputEvent('out', message);
    else await client.sendEvent(message);
  }
  tell('sent', count);
  await client.close();
}

// Until it is killed: the SDK says that a message is complete before its acknowledgement is written.
async function receive() {
  client.on('inputMessage', (input, message) => {
    client.complete(message, (error) => {
      if (error) throw error;
      tell('got', input, message.getData().toString());
    });
  });
  await client.open();
  tell('ready');
}

client
  .setOptions({ ca: fs.readFileSync(caFile, 'utf8') })
  .then(verb === 'receive' ? receive : send)
  .catch((error) => {
    tell('error', error.name, error.message);
    process.exit(1);
  });
