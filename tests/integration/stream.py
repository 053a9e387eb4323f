"""An independent publisher that goes on while things break and knows what the broker took, and what of it is in MongoDB.

    Stream      publishes numbered messages from a thread (paho), and lists those that the broker acknowledged
    Stored      what is in MongoDB, checked against what was published
    figures()   prints what a test held, on one line (pytest -rP)
    seeded()    random moments that MQTT2MONGO_TEST_SEED repeats, as far as the machine allows
"""

import json
import os
import random
import threading
import time

import clients
from processes import TIME_FACTOR, wait_until

CLIENT = "under-test"
SESSION = f"{CLIENT}-1"
END = "sensors/end"
NO_MATCHING_SUBSCRIBERS = 0x10  # MQTT 5 §3.4.2.1


def topic_of(number):
    return f"sensors/device-{number % 7}/readings"


def content_of(number):
    return {"n": number, "text": f"Prüfung {number}", "values": [number, number / 8, None, True]}


def payload_of(number):
    """Its JSON; every 100th message is none, and a dead letter."""
    return b"no JSON %d" % number if number % 100 == 50 else json.dumps(content_of(number)).encode()


def figures(**held):
    print("  ".join(f"{name} {value}" for name, value in held.items()))


class Stream:
    """Publishes numbered messages (QoS 1) at a steady pace from a thread until finish(). When the connection goes it makes another
    one; what was not acknowledged by then is sent no second time.

    acknowledged  {number: time.time() when the broker's PUBACK was read}
    unheard       those of which the PUBACK said that nobody is subscribed to them (MQTT 5)
    sent          how many were published
    lost          how many connections were lost

    payload_of    makes a number's bytes; window: how many are under way at a time; connection: as clients.connected() has it
    """

    def __init__(self, port, pace, *, payload_of=lambda number: json.dumps(content_of(number)), window=1000, **connection):
        self.acknowledged, self.unheard, self.sent, self.lost = {}, set(), 0, 0
        self._port, self._pace, self._window, self._connection = port, pace, window, connection
        self._payload_of = payload_of
        self._stop, self._error = threading.Event(), None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join(30 * TIME_FACTOR)

    def _run(self):
        try:
            while not self._stop.is_set():
                try:
                    with clients.connected(self._port, setup=self._set_up, **self._connection) as client:
                        self._publish(client)
                except (OSError, AssertionError):  # the broker is away
                    time.sleep(0.02)
        except BaseException as error:  # handed to finish()
            self._error = error

    def _set_up(self, client):
        client.max_inflight_messages_set(self._window)
        client.max_queued_messages_set(0)

    def _publish(self, client):
        under_way = {}

        def on_publish(_client, _data, message_id, reason, _properties):
            number = under_way.pop(message_id)
            if not reason.is_failure:
                self.acknowledged[number] = time.time()
            if reason.value == NO_MATCHING_SUBSCRIBERS:
                self.unheard.add(number)

        client.on_publish = on_publish
        begun, before = time.monotonic(), self.sent
        while under_way or not self._stop.is_set():
            due = 0 if self._stop.is_set() else (time.monotonic() - begun) * self._pace
            while self.sent - before < due and len(under_way) < self._window:
                number = self.sent
                info = client.publish(topic_of(number), self._payload_of(number), qos=1)
                self.sent += 1
                under_way[info.mid] = number
            if client.loop(timeout=0.001) != 0:
                self.lost += 1
                return

    def wait(self, count, timeout=60):
        """Wait until `count` messages are acknowledged."""
        wait_until(lambda: self._error or len(self.acknowledged) >= count, timeout,
                   lambda: f"{count} messages acknowledged, {len(self.acknowledged)} are")
        assert self._error is None, self._error

    def finish(self):
        """Stop, once everything under way is acknowledged; the numbers of what the broker took."""
        self._stop.set()
        wait_until(lambda: not self._thread.is_alive(), 30, "the publisher is done")
        assert self._error is None, self._error
        return set(self.acknowledged)

    @property
    def rate(self):
        """Acknowledged messages a second, from the first to the last."""
        times = self.acknowledged.values()
        return len(times) / max(max(times) - min(times), 0.001)


class Stored:
    """What is in MongoDB, checked against what was published: `copies` {number: [documents, the earliest received first]}."""

    def __init__(self, collection):
        self.copies = {}
        for document in collection.find({"topic": {"$regex": "^sensors/device-"}}).sort("received_at", 1):
            number = document["payload"]["n"]
            assert document["payload"] == content_of(number), document
            assert document["topic"] == topic_of(number) and document["qos"] == 1 and document["retain"] is False, document
            self.copies.setdefault(number, []).append(document)
        self.documents = sum(map(len, self.copies.values()))
        self.twice = self.documents - len(self.copies)

    def missing(self, acknowledged):
        return acknowledged - self.copies.keys()


def seeded():
    seed = int(os.environ.get("MQTT2MONGO_TEST_SEED") or random.SystemRandom().randrange(1_000_000))
    print(f"MQTT2MONGO_TEST_SEED={seed}")
    return random.Random(seed)
