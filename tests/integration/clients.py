"""MQTT clients of the tests, made with paho: never our own code, which is what is tested.

Every function takes the port of a broker on 127.0.0.1. Further keyword arguments are those of connected():
username, password, tls (a Certificates), protocol (5 or 4, which is 3.1.1).
"""

import contextlib
import itertools
import threading
import time

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from processes import TIME_FACTOR, wait_until

_numbers = itertools.count(1)


def _new(client_id, protocol, username, password, tls, clean_start):
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id=client_id or f"test-{next(_numbers)}",
                         protocol=paho.MQTTv5 if protocol == 5 else paho.MQTTv311,
                         **({} if protocol == 5 else {"clean_session": clean_start}))
    if username is not None:
        client.username_pw_set(username, password)
    if tls is not None:
        client.tls_set(ca_certs=str(tls.ca.cert), certfile=str(tls.client.cert), keyfile=str(tls.client.key))
    return client


@contextlib.contextmanager
def connected(port, *, client_id=None, username=None, password=None, tls=None, protocol=5, clean_start=True, session_expiry=0,
              receive_maximum=None, setup=None, keepalive=60, connect_timeout=10):
    """A connected paho client that is driven by hand (client.loop()); DISCONNECTs at the end.
    setup(client) runs before the connect. session_expiry in seconds, MQTT 5."""
    client = _new(client_id, protocol, username, password, tls, clean_start)
    answer = []
    client.on_connect = lambda _client, _data, _flags, reason, _properties: answer.append(reason)
    if setup:
        setup(client)
    if protocol == 5:
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = session_expiry
        if receive_maximum:
            properties.ReceiveMaximum = receive_maximum
        client.connect("127.0.0.1", port, keepalive, clean_start=clean_start, properties=properties)
    else:
        client.connect("127.0.0.1", port, keepalive)
    _drive(client, lambda: answer, connect_timeout, "CONNACK")
    assert not answer[0].is_failure, f"the broker refused the connection: {answer[0]}"
    try:
        yield client
    finally:
        client.disconnect()
        client.loop(timeout=0.01)


def _drive(client, condition, timeout, what):
    deadline = time.monotonic() + timeout * TIME_FACTOR
    while not condition():
        code = client.loop(timeout=0.05)
        assert code == paho.MQTT_ERR_SUCCESS or condition(), f"connection lost before {what}: {paho.error_string(code)}"
        assert time.monotonic() < deadline, f"no {what}"


def publish(port, payloads, topic="sensors/test", *, qos=1, retain=False, window=500, timeout=60, pace=None, **connection):
    """Publish each of `payloads` (bytes or text; or a number: that many of '{"n": 0}', '{"n": 1}' …) and return the list of those
    payloads that the broker acknowledged (QoS 0: those that were sent), in the order of the acknowledgements.

    topic   text, or a function from the payload's index to a topic
    window  how many are under way at a time
    pace    messages per second; None: as fast as it goes
    Returns early with what it has when the connection is lost: it never publishes a payload twice.
    """
    if isinstance(payloads, int):
        payloads = [b'{"n": %d}' % n for n in range(payloads)]
    topic_of = topic if callable(topic) else lambda _index: topic
    under_way, acknowledged = {}, []

    def on_publish(_client, _data, message_id, reason, _properties):
        payload = under_way.pop(message_id, None)  # None: QoS 0, counted when it was sent
        if payload is not None and not reason.is_failure:
            acknowledged.append(payload)

    def setup(client):
        client.max_inflight_messages_set(window)
        client.max_queued_messages_set(0)

    with connected(port, setup=setup, **connection) as client:
        client.on_publish = on_publish
        begun = time.monotonic()
        deadline = begun + timeout * TIME_FACTOR
        waiting = iter(enumerate(payloads))
        sent, more = 0, True
        while more or under_way or client.want_write():  # the last: of QoS 0, what paho still has to write
            while more and len(under_way) < window and (not pace or sent < (time.monotonic() - begun) * pace):
                index, payload = next(waiting, (None, None))
                if index is None:
                    more = False
                    break
                info = client.publish(topic_of(index), payload, qos=qos, retain=retain)
                if info.rc != paho.MQTT_ERR_SUCCESS:
                    return acknowledged
                if qos == 0:
                    acknowledged.append(payload)
                else:
                    under_way[info.mid] = payload
                sent += 1
            if client.loop(timeout=0.01 if pace else 0.05) != paho.MQTT_ERR_SUCCESS:
                return acknowledged
            assert time.monotonic() < deadline, f"only {len(acknowledged)} of {sent} messages were acknowledged in time"
    return acknowledged


def publisher_thread(*arguments, **keywords):
    """publish() in a thread of its own; returns a function that waits for it and returns its result."""
    result = []

    def run():
        try:
            result.append((publish(*arguments, **keywords), None))
        except BaseException as error:  # handed to who waits
            result.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def join(timeout=60):
        wait_until(lambda: result, timeout, "the publisher is done")
        acknowledged, error = result[0]
        if error:
            raise error
        return acknowledged

    return join


def create_session(port, client_id, topic_filter, *, qos=1, session_expiry=3600, **connection):
    """Make a persistent session with a subscription and leave it: from now on the broker queues for it (a backlog)."""
    with connected(port, client_id=client_id, clean_start=False, session_expiry=session_expiry, **connection) as client:
        granted = []
        client.on_subscribe = lambda _client, _data, _mid, reasons, _properties: granted.extend(reasons)
        client.subscribe(topic_filter, qos=qos)
        _drive(client, lambda: granted, 10, "SUBACK")
        assert not granted[0].is_failure, f"the broker refused the subscription: {granted[0]}"


def take_session(port, client_id, *, quiet=0.5, **connection):
    """What the broker holds for a session: resume it, take and acknowledge all until nothing came for `quiet` seconds, end it.
    Returns paho messages (topic, payload, qos, retain, dup)."""
    messages = []

    def setup(client):
        client.on_message = lambda _client, _data, message: messages.append(message)

    # Expiry 0 with clean start off: the session is resumed now and ends with the connection.
    with connected(port, client_id=client_id, clean_start=False, receive_maximum=65535, setup=setup, **connection) as client:
        last, count = time.monotonic(), 0
        while time.monotonic() - last < quiet * TIME_FACTOR:
            assert client.loop(timeout=0.05) == paho.MQTT_ERR_SUCCESS, "connection lost"
            if len(messages) > count:
                last, count = time.monotonic(), len(messages)
    return messages


class Subscriber:
    """Collects messages in a thread until its with-block ends: `messages` (topic, payload, qos, retain, dup, properties).
    Subscribed when the with-block begins."""

    def __init__(self, port, topic_filter="#", *, qos=1, username=None, password=None, tls=None, protocol=5):
        self.messages = []
        self._port, self._filter, self._qos = port, topic_filter, qos
        self._client = _new(None, protocol, username, password, tls, True)
        self._subscribed = threading.Event()

    def __enter__(self):
        client = self._client
        options = {"options": SubscribeOptions(qos=self._qos)} if client.protocol == paho.MQTTv5 else {"qos": self._qos}
        client.on_connect = lambda *_: client.subscribe(self._filter, **options)
        client.on_subscribe = lambda *_: self._subscribed.set()
        client.on_message = lambda _client, _data, message: self.messages.append(message)
        client.connect("127.0.0.1", self._port)
        client.loop_start()
        assert self._subscribed.wait(10 * TIME_FACTOR), "no SUBACK"
        return self

    def wait(self, count, timeout=10):
        """Wait until at least `count` messages came; all that came."""
        wait_until(lambda: len(self.messages) >= count, timeout, lambda: f"{count} messages, {len(self.messages)} came")
        return list(self.messages)

    def __exit__(self, *_):
        self._client.disconnect()
        self._client.loop_stop()
