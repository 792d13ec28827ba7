// One run of the public Node service SDK: node service.js TRANSPORT CONNECTION_STRING VERB ARGUMENT…
// The authority that signed the server's certificate is in NODE_EXTRA_CA_CERTS.
'use strict';

const { Client, Registry } = require('azure-iothub');
const { Message } = require('azure-iot-common');
const { Amqp } = require('azure-iothub/dist/amqp');
const { AmqpWs } = require('azure-iothub/dist/amqp_ws');

const [transport, connectionString, verb, ...values] = process.argv.slice(2);
const registry = Registry.fromConnectionString(connectionString);
const client = Client.fromConnectionString(connectionString, transport === 'ws' ? AmqpWs : Amqp);
const tell = (...words) => process.stdout.write(words.join(' ') + '\n');

const verbs = {
  // Identities and twins, end to end.
  async registry(device) {
    await registry.create({ deviceId: device });
    await registry.addModule({ deviceId: device, moduleId: 'part' });
    const refused = await registry.create({ deviceId: device }).catch((error) => error.name);
    tell('again', refused);
    const { responseBody: twin } = await registry.getTwin(device);
    const patch = { tags: { site: 's1' }, properties: { desired: { level: 3 } } };
    const { responseBody: changed } = await registry.updateTwin(device, patch, twin.etag);
    tell('twin', changed.tags.site, changed.properties.desired.level, changed.properties.desired.$version);
    tell('stale', await registry.updateTwin(device, patch, twin.etag).catch((error) => error.constructor.name));
    const query = registry.createQuery(`SELECT * FROM devices WHERE tags.site = 's1'`, 1);
    const { result } = await query.nextAsTwin();
    tell('query', result.map((twin) => twin.deviceId).join(','), query.hasMoreResults);
    const { responseBody: modules } = await registry.getModulesOnDevice(device);
    tell('modules', modules.map((module) => module.moduleId).join(','));
    const { responseBody: statistics } = await registry.getRegistryStatistics();
    tell('counted', statistics.totalDeviceCount > 0);
    await registry.delete(device);
    tell('gone', await registry.get(device).catch((error) => error.constructor.name));
  },

  async method(device, name, payload) {
    const parameters = { methodName: name, payload: JSON.parse(payload), responseTimeoutInSeconds: 30, connectTimeoutInSeconds: 30 };
    const { result } = await client.invokeDeviceMethod(device, parameters);
    tell('method', result.status, JSON.stringify(result.payload));
  },

  // A message with feedback; ends when the feedback is there.
  async send(device, body, id, livesMillis) {
    await client.open();
    const { result: receiver } = await client.getFeedbackReceiver();
    const feedback = new Promise((resolve) => {
      receiver.on('message', (message) => {
        receiver.complete(message, () => resolve(JSON.parse(message.getData().toString())));
      });
    });
    const message = new Message(body);
    message.messageId = id;
    message.ack = 'full';
    if (livesMillis) message.expiryTimeUtc = Date.now() + Number(livesMillis);
    message.properties.add('marker', 'm 1');
    await client.send(device, message);
    tell('sent', id);
    for (const record of await feedback) tell('feedback', record.originalMessageId, record.statusCode, record.deviceId);
    await client.close();
  },

  async refused(device) {
    await client.open();
    tell('refused', await client.send(device, new Message('x')).then(() => 'sent', (error) => error.constructor.name));
    await client.close();
  },
};

client.setRetryPolicy && client.setRetryPolicy(new (require('azure-iot-common').NoRetry)());
verbs[verb](...values)
  .then(() => process.exit(0))
  .catch((error) => {
    tell('error', error.name, error.message, error.responseBody || '');
    process.exit(1);
  });
