"""What every fault test sets up, and what it holds in the end.

    scaled(short, long)   the figure for this run: MQTT2MONGO_FAULTS=long makes it the long one
    pause(seconds)        for how long a fault lasts
    Scene                 broker, MongoDB and service, with credentials; conclude() is the oracle

The oracle: each message that the broker has acknowledged to the independent publisher is in MongoDB, in the dead letters or in
the spool, with the bytes it had; then the spool is emptied, 20 fresh messages arrive, the service stops with sums that add up
and leaves nothing at the broker; no secret is in its log or its command line. What the broker itself has dropped, by its own
count, is told apart.
"""

import base64
import itertools
import json
import os
import re
import subprocess
import time
from pathlib import Path

import clients
from processes import wait_until
from stream import CLIENT, SESSION, Stream, content_of, payload_of, topic_of

LONG = os.environ.get("MQTT2MONGO_FAULTS", "short") == "long"
SERVICE, TESTER = ("service", "hush-mqtt-4711"), ("tester", "hush-test-4712")
MONGO_SECRET = "hush-mongo-4713"
SECRETS = (SERVICE[1], MONGO_SECRET)
AS_TESTER = {"username": TESTER[0], "password": TESTER[1]}
SUBSCRIBED = "subscribed to sensors/#"  # with the default consumer.topic
FRESH = "sensors/fresh"


def scaled(short, long):
    return long if LONG else short


def pause(seconds):
    """For as long as a fault lasts, or until the next one comes; never to wait for something to happen."""
    time.sleep(seconds)


def number_of(payload):
    """Of the bytes that payload_of() made, however many spaces are behind them."""
    return int(payload.split()[2]) if payload.startswith(b"no JSON ") else json.loads(payload)["n"]


class Kept:
    """Where the messages are: `copies` {number: how many}, over `places` (MongoDB, dead letters, spool). Each that is found is
    compared with what was published."""

    def __init__(self, scene, payload_of=payload_of):
        self.copies, self.payload_of = {}, payload_of
        for line in scene.export():  # before MongoDB: what leaves the spool meanwhile is there
            self._take(line["topic"], base64.b64decode(line["payload"]["$binary"]["base64"]))
        self.spooled = sum(self.copies.values())
        if scene.server.alive:
            for document in scene.database.messages.find(batch_size=10000):
                self._take(document["topic"], document["payload"])
            for letter in scene.database.dead_letter.find():
                self._take(letter["topic"], bytes(letter["payload"]))
        self.twice = sum(self.copies.values()) - len(self.copies)

    def _take(self, topic, payload):
        if not topic.startswith("sensors/device-"):  # a test's own, which it looks at itself
            return
        if isinstance(payload, bytes):
            number = number_of(payload)
            assert payload == self.payload_of(number), payload
        else:
            number = payload["n"]
            assert payload == json.loads(self.payload_of(number)), payload
        assert topic == topic_of(number)
        self.copies[number] = self.copies.get(number, 0) + 1

    def missing(self, acknowledged):
        return acknowledged - self.copies.keys()


class Scene:
    """broker     a Mosquitto with users
    server     a Mongod or ReplicaSet with auth, or None
    running    the Service
    published  the numbers of what publish() has published and the broker acknowledged
    """

    def __init__(self, service, broker, server, *, env=None, build=None, start=True, **settings):
        self.broker, self.server = broker, server
        self._start = start
        self.running = service(broker=broker, mongod=server, env=env, build=build, started=False, settings={
            "mqtt.client_id": CLIENT, "mqtt.username": SERVICE[0], "mqtt.password": SERVICE[1], "mqtt.reconnect.min": "100ms",
            "mqtt.reconnect.max": "500ms"} | settings)
        self.published, self._next, self._ends = set(), 0, itertools.count(1)
        self.payload_of = payload_of
        self._database = None
        # All the time: the broker forgets a count that has not changed for a minute.
        self._counter = clients.Subscriber(broker.plain_port, "$SYS/broker/publish/messages/dropped", **AS_TESTER)
    def start(self):
        """Start the service (again), and wait until it has subscribed: from then on nothing that is published escapes."""
        mark = self.running.mark()
        self.running.start()
        filter_ = self.running.settings.get("consumer.topic", "sensors/#")
        self.running.wait_log(re.escape(f"subscribed to {filter_} at QoS 1"), timeout=30, after=mark)
        return self

    def __enter__(self):
        self._counter.__enter__()
        return self.start() if self._start else self

    def __exit__(self, *_):
        self._counter.__exit__()

    @property
    def database(self):
        if self._database is None:
            self._database = self.server.client(serverSelectionTimeoutMS=30000).mqtt2mongo
        return self._database

    # ---- publishing

    def stream(self, pace, window=500):
        return Stream(self.broker.plain_port, pace, payload_of=self.payload_of, window=window, **AS_TESTER)

    def publish(self, count, **options):
        """The next `count` numbers, in one go; not beside a stream. The broker acknowledges them all."""
        first, self._next = self._next, self._next + count
        taken = clients.publish(self.broker.plain_port, [self.payload_of(first + index) for index in range(count)],
                                lambda index: topic_of(first + index), **AS_TESTER, **options)
        assert len(taken) == count
        self.published |= set(range(first, first + count))

    def dropped(self):
        """How many messages the broker has dropped, by its own count; the most in one of its lives."""
        pause(1.5)  # it counts once a second
        return max(int(message.payload) for message in self._counter.wait(1))

    def unread(self):
        """How many bytes the kernel holds that the service has not read from the broker."""
        waiting = 0
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, _, remote, _, queues, *_ = line.split()
            if int(remote.partition(":")[2], 16) == self.broker.port:
                waiting += int(queues.partition(":")[2], 16)
        return waiting

    # ---- the spool, as an operator sees it

    def _ask(self, flag):
        # Its own flags, but for the secrets: they would be in this process's command line.
        settings = {key: value for key, value in self.running.settings.items() if key not in ("mqtt.password", "mongodb.uri")}
        argv = [self.running.program, *itertools.chain(*(
            ("--" + key.replace(".", "-").replace("_", "-"), str(value)) for key, value in settings.items())), flag]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60, env=self.running.environment | {
            "LD_PRELOAD": ""})
        assert done.returncode == 0, f"{flag}: exit status {done.returncode}: {done.stderr}"
        return [json.loads(line) for line in done.stdout.splitlines() if line.strip()]

    def spool(self):
        """How many messages are in the spool."""
        return self._ask("--spool-status")[0]["spool"]["messages"]

    def export(self):
        return self._ask("--spool-export")

    def wait_spooled(self, count, timeout=30):
        wait_until(lambda: self.spool() >= count, timeout, lambda: f"{count} in the spool: {self.state()}", interval=0.1)

    def wait_drained(self, timeout=60):
        wait_until(lambda: self.spool() == 0, timeout, lambda: f"the spool is empty: {self.state()}", interval=0.1)

    def state(self):
        sums = self.running.sums() if self.running.alive else f"ended: {self.running.popen.returncode}"
        return f"{self.spool()} in the spool, {sums}\n{self.running.tail()}"

    def wait_settled(self, timeout=60):
        """Wait until the service has nothing in flight and the broker nothing more for it: a last message shows it."""
        end = f"end {next(self._ends)}"
        assert clients.publish(self.broker.plain_port, [json.dumps(end)], "sensors/end", **AS_TESTER)
        wait_until(lambda: self._arrived(end), timeout, lambda: f"the last message arrives: {self.state()}", interval=0.2)
        wait_until(lambda: self.running.sums()["consumer"]["in_flight"] == 0, timeout, self.state)

    def _arrived(self, end):
        if self.server.alive and self.database.messages.find_one({"topic": "sensors/end", "payload": end}):
            return True
        return any(base64.b64decode(line["payload"]["$binary"]["base64"]) == json.dumps(end).encode() for line in self.export())

    # ---- the oracle

    def conclude(self, name, acknowledged=frozenset(), *, faults, drops=0, may_miss=frozenset(), **further):
        """Hold what is said above. acknowledged: a finished stream's; what publish() has published is added.

        faults    how many there were, for the figures, as `further` is
        drops     how many messages the broker may have dropped at most; None: any number
        may_miss  what is no loss of the service's, as the test has to show
        Returns the last life's sums and where the messages are (Kept)."""
        acknowledged = set(acknowledged) | self.published
        self.wait_settled(timeout=120)
        kept = Kept(self, self.payload_of)
        missing = kept.missing(acknowledged)
        assert not missing - may_miss, f"{len(missing)} are nowhere, such as {sorted(missing)[:5]}\n{self.running.tail()}"
        self.wait_drained(timeout=120)
        self._fresh_messages_arrive()
        dropped = self.dropped()
        self._no_secret_shows()
        sums = self.running.stop(timeout=30)["consumer"]
        kept = Kept(self, self.payload_of)
        missing = kept.missing(acknowledged)
        left = clients.take_session(self.broker.plain_port, SESSION, **AS_TESTER)
        held = {"messages": len(acknowledged), "faults": faults, "lost": len(missing - may_miss), "duplicates": kept.twice,
                "dropped_by_broker": dropped, **further}
        print(f"held {name}: " + "  ".join(f"{key} {value}" for key, value in held.items()))
        assert not missing - may_miss, f"{len(missing)} messages are lost, such as {sorted(missing)[:5]}"
        assert not left, f"{len(left)} messages still wait at the broker"
        assert drops is None or dropped <= drops, f"the broker dropped {dropped} messages"
        assert kept.spooled == 0 and sums["in_flight"] == 0
        return sums, kept

    def _fresh_messages_arrive(self):
        fresh = [json.dumps(f"fresh {number}") for number in range(20)]
        assert len(clients.publish(self.broker.plain_port, fresh, FRESH, **AS_TESTER)) == 20
        wait_until(lambda: self.database.messages.count_documents({"topic": FRESH}) >= 20, 30,
                   lambda: f"20 fresh messages arrive: {self.state()}")

    def _no_secret_shows(self):
        shown = self.running.log + self.running.stdout.read_text() + Path(f"/proc/{self.running.pid}/cmdline").read_text()
        assert SERVICE[0] in shown, "the command line is not what was looked at"
        for secret in SECRETS:
            assert secret not in shown, f"a secret shows: {secret}"
