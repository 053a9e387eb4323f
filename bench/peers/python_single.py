"""MQTT to MongoDB as most scripts do it: paho-mqtt, and an insert_one for each message.

    python_single.py PORT CLIENT FILTER RECEIVE_MAXIMUM URI DATABASE COLLECTION
"""

import json
import signal
import sys
from datetime import UTC, datetime

import paho.mqtt.client as mqtt
import pymongo
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

port, client_id, topic_filter, receive_maximum, uri, database, collection = sys.argv[1:]
messages = pymongo.MongoClient(uri)[database][collection]


def on_connect(client, userdata, flags, reason_code, properties):
    client.subscribe(topic_filter, qos=1)


def on_message(client, userdata, message):
    messages.insert_one({
        "topic": message.topic, "payload": json.loads(message.payload), "received_at": datetime.now(UTC),
        "qos": message.qos, "retain": message.retain, "dup": message.dup})


client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=client_id, protocol=mqtt.MQTTv5)
client.on_connect = on_connect
client.on_message = on_message
session = Properties(PacketTypes.CONNECT)
session.SessionExpiryInterval = 3600
session.ReceiveMaximum = int(receive_maximum)
client.connect("127.0.0.1", int(port), clean_start=False, properties=session)
signal.signal(signal.SIGTERM, lambda *_: client.disconnect())
client.loop_forever()
