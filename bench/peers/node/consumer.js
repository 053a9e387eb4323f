// MQTT to MongoDB as Node.js does it well: what arrives while an insertMany is running is the next one, up to 1000.
//
//     node consumer.js PORT CLIENT FILTER RECEIVE_MAXIMUM URI DATABASE COLLECTION default|durable
import mqtt from 'mqtt';
import { MongoClient } from 'mongodb';

const LARGEST_BATCH = 1000;
const [port, clientId, filter, receiveMaximum, uri, database, collection, concern] = process.argv.slice(2);
const options = { ordered: false, ...(concern === 'durable' && { writeConcern: { w: 'majority', j: true } }) };

const mongo = await new MongoClient(uri).connect();
const messages = mongo.db(database).collection(collection);
let waiting = [];
let storing = null;

async function store() {
  while (waiting.length > 0) {
    const batch = waiting.slice(0, LARGEST_BATCH);
    waiting = waiting.slice(LARGEST_BATCH);
    await messages.insertMany(batch, options);
  }
  storing = null;
}

const client = mqtt.connect(`mqtt://127.0.0.1:${port}`, {
  clientId, protocolVersion: 5, clean: false, resubscribe: false,
  properties: { sessionExpiryInterval: 3600, receiveMaximum: Number(receiveMaximum) },
});
client.on('connect', () => client.subscribe(filter, { qos: 1 }));
client.on('message', (topic, payload, packet) => {
  waiting.push({
    topic, payload: JSON.parse(payload), received_at: new Date(), qos: packet.qos, retain: packet.retain, dup: packet.dup,
  });
  storing ??= store();
});

process.on('SIGTERM', async () => {
  await client.endAsync();
  await storing;
  await mongo.close();
});
