"""MQTT to MongoDB as fast as Python does it: a thread inserts what has gathered while it inserted what was before.

    python_batched.py PORT CLIENT FILTER RECEIVE_MAXIMUM URI DATABASE COLLECTION
"""

import json
import queue
import signal
import sys
import threading
from datetime import UTC, datetime

import paho.mqtt.client as mqtt
import pymongo
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

LARGEST_BATCH = 5000

port, client_id, topic_filter, receive_maximum, uri, database, collection = sys.argv[1:]
messages = pymongo.MongoClient(uri)[database][collection]
waiting = queue.SimpleQueue()


def store():
    ending = False
    while not ending:
        batch = [waiting.get()]
        while len(batch) < LARGEST_BATCH and not waiting.empty():
            batch.append(waiting.get())
        ending = batch[-1] is None
        documents = [document for document in batch if document is not None]
        if documents:
            messages.insert_many(documents, ordered=False)


def on_connect(client, userdata, flags, reason_code, properties):
    client.subscribe(topic_filter, qos=1)


def on_message(client, userdata, message):
    waiting.put({
        "topic": message.topic, "payload": json.loads(message.payload), "received_at": datetime.now(UTC),
        "qos": message.qos, "retain": message.retain, "dup": message.dup})


storing = threading.Thread(target=store)
storing.start()
client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=client_id, protocol=mqtt.MQTTv5)
client.on_connect = on_connect
client.on_message = on_message
session = Properties(PacketTypes.CONNECT)
session.SessionExpiryInterval = 3600
session.ReceiveMaximum = int(receive_maximum)
client.connect("127.0.0.1", int(port), clean_start=False, properties=session)
signal.signal(signal.SIGTERM, lambda *_: client.disconnect())
client.loop_forever()
waiting.put(None)
storing.join()
