"""A flood of QoS 0 messages beside a QoS 1 stream.

Fault: as many QoS 0 messages a second as a socket takes, up to 15,000, for 10 s (long: 60 s) on consumer.qos0_topic, beside 1,000 QoS 1
messages a second; once with MongoDB there all the time, once with MongoDB frozen for a third of it.
Proof: how many the flood has sent and the service received; that the frozen process is stopped, and messages were dropped then.
Held: QoS 1: the oracle, and the broker drops nothing; from the broker's acknowledgement to the publisher until the service has the
message, 99 of 100 take less than a second; while MongoDB is frozen they are in the spool within seconds. QoS 0: received = stored + dropped,
each dropped one with its cause; the service's memory stays below 96 MiB. Figure: messages, flood sent, received, stored, dropped, latency,
peak memory, lost (0).
"""

import socket
import struct
import threading
import time

import pytest

from oracle import TESTER, pause, scaled
from processes import wait_until

SECONDS = scaled(10, 60)
PACE = 15_000
MOST = 96 << 20


def packet(kind, body):
    """An MQTT packet with its remaining length as a variable byte integer."""
    length, digits = len(body), b""
    while True:
        length, digit = length >> 7, length & 127
        digits += bytes([digit | (128 if length else 0)])
        if not length:
            return bytes([kind]) + digits + body


def text(value):
    return struct.pack(">H", len(value)) + value.encode()


class Flood:
    """PUBLISHes at QoS 0 through a socket of its own, from a thread: a client library would be too slow. MQTT 3.1.1."""

    def __init__(self, port):
        self.sent = 0
        self._stop = threading.Event()
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.sendall(packet(0x10, text("MQTT") + bytes([4, 0xC2, 0, 0]) + text("flood") + text(TESTER[0]) + text(TESTER[1])))
        assert self._socket.recv(4) == bytes([0x20, 2, 0, 0])
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        begun = time.monotonic()
        while not self._stop.is_set():
            due = int((time.monotonic() - begun) * PACE) - self.sent
            if due < 100:
                time.sleep(0.005)
                continue
            numbers = range(self.sent, self.sent + min(due, 2000))
            self._socket.sendall(b"".join(
                packet(0x30, text(f"flood/{number % 10}") + b'{"number":%d,"what":"a reading that may be lost"}' % number)
                for number in numbers))
            self.sent += len(numbers)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join(30)
        self._socket.sendall(packet(0xE0, b""))
        self._socket.close()


def latencies(it, stream):
    """Seconds from the broker's acknowledgement to the publisher until the service received the message, sorted."""
    received = {document["payload"]["n"]: document["received_at"].timestamp() for document in it.database.messages.find(
        {"topic": {"$regex": "^sensors/device-"}}, {"payload.n": 1, "received_at": 1})}
    return sorted(received[number] - at for number, at in stream.acknowledged.items() if number in received)


@pytest.mark.timeout(scaled(180, 400))
@pytest.mark.parametrize("frozen", [False, True], ids=["present", "frozen"])
def test_a_flood(scene, frozen):
    it = scene(**{"consumer.qos0_topic": "flood/#", "consumer.qos0_buffer": "1MiB"})
    it.running.wait_log("subscribed to flood/# at QoS 0")
    most_unsettled = 0
    with it.stream(pace=1000) as stream, Flood(it.broker.port) as flood:
        stream.wait(1000)
        pause(SECONDS / 3)
        if frozen:
            it.server.sigstop()
            before, begun = it.running.sums()["consumer"], time.monotonic()
            wait_until(lambda: it.running.sums()["consumer"]["spooled"] > before["spooled"], 30, it.state)
            to_spool = time.monotonic() - begun
            pause(max(0.0, SECONDS / 3 - to_spool))
            waiting = len(stream.acknowledged) - (it.running.sums()["consumer"]["received"]
                                                  - it.running.sums()["consumer"]["received_qos0"])
            most_unsettled = max(waiting, 0)
            it.server.sigcont()
        pause(SECONDS / 3)
        acknowledged = stream.finish()
    it.wait_settled()
    it.wait_drained()
    wait_until(lambda: it.running.sums()["consumer"]["in_flight"] == 0, 30, it.state)
    sums = it.running.sums()["consumer"]
    peak, _ = it.running.memory()
    documents = it.database.messages.count_documents({"topic": {"$regex": "^flood/"}})
    took = latencies(it, stream)
    came_late = took[int(len(took) * 0.99)]
    it.conclude(f"qos0_flood, {'frozen' if frozen else 'present'}", acknowledged, faults=1, rate=f"{stream.rate:.0f}/s",
                flood_sent=flood.sent, received=sums["received_qos0"], stored=documents, dropped=sums["dropped_by_cause"],
                latency_99=f"{came_late * 1000:.0f} ms", longest=f"{took[-1] * 1000:.0f} ms", peak=f"{peak / (1 << 20):.1f} MiB",
                **({"spooled_after": f"{to_spool:.1f} s", "not_received_meanwhile": most_unsettled} if frozen else {}))
    assert stream.lost == 0
    assert sums["received_qos0"] == documents + sums["dropped"] and set(sums["dropped_by_cause"]) <= {"overload"}
    assert documents > 1000 and flood.sent > SECONDS * PACE // 4
    assert not frozen or sums["dropped"] > 0 and "consumer.qos0_buffer" in it.running.log
    assert sums["returned"] == 0
    assert came_late < 1
    assert not frozen or to_spool < 3
    assert peak <= MOST


@pytest.mark.timeout(scaled(120, 120))
def test_a_flood_that_comes_first(scene):
    """MongoDB is frozen, and every worker waits for it with QoS 0 messages, when the first QoS 1 message comes."""
    it = scene(**{"consumer.qos0_topic": "flood/#", "consumer.qos0_buffer": "1MiB"})
    it.running.wait_log("subscribed to flood/# at QoS 0")
    it.wait_settled()
    it.server.sigstop()
    with Flood(it.broker.port) as flood:
        wait_until(lambda: it.running.sums()["consumer"]["dropped"] > 0, 20, it.state)
        begun = time.monotonic()
        with it.stream(pace=1000) as stream:
            wait_until(lambda: it.running.sums()["consumer"]["spooled"] > 0, 40, it.state)
            to_spool = time.monotonic() - begun
            acknowledged = stream.finish()
    it.server.sigcont()
    it.wait_settled()
    sums = it.running.sums()["consumer"]
    documents = it.database.messages.count_documents({"topic": {"$regex": "^flood/"}})
    it.conclude("qos0_flood, before QoS 1", acknowledged, faults=1, flood_sent=flood.sent, received=sums["received_qos0"], stored=documents,
                dropped=sums["dropped_by_cause"], returned=sums["returned"], spooled_after=f"{to_spool:.1f} s")
    assert sums["received_qos0"] == documents + sums["dropped"]
    assert to_spool < 3 and sums["returned"] == 0, "QoS 1 waits behind QoS 0"
