// The public Node SDK: node control.js TRANSPORT CONNECTION_STRING CA_FILE; tells what its twin and its methods bring.
'use strict';

const fs = require('fs');
const { Client, ModuleClient } = require('azure-iot-device');
const { Mqtt, MqttWs } = require('azure-iot-device-mqtt');

const [transport, connectionString, caFile] = process.argv.slice(2);
const kind = connectionString.includes('ModuleId=') ? ModuleClient : Client;
const client = kind.fromConnectionString(connectionString, transport === 'ws' ? MqttWs : Mqtt);
const tell = (...words) => process.stdout.write(words.join(' ') + '\n');
const fail = (error) => {
  tell('error', error);
  process.exit(1);
};

process.on('unhandledRejection', fail);
process.on('uncaughtException', fail);

async function run() {
  await client.setOptions({ ca: fs.readFileSync(caFile, 'utf8') });
  await client.open();
  const answer = (request, response) => {
    response.send(202, { got: request.payload }, (error) => error && fail(error));
  };
  if (client.onDeviceMethod) client.onDeviceMethod('reboot', answer);
  else client.onMethod('reboot', answer);
  const twin = await client.getTwin();
  twin.on('properties.desired', (change) => tell('desired', JSON.stringify(change.level ?? null)));
  twin.properties.reported.update({ node: transport }, (error) => (error ? fail(error) : tell('reported')));
  tell('ready');
}

run();
