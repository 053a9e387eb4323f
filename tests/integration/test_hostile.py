"""What no real server does: peers that stay silent, hang up, send garbage or nothing at all. The service says what is wrong,
keeps trying with backoff, never stalls its loop, ends when told to, and works once there is a real server.

And the one order that everything stands on: PUBACK after mongod's answer, seen from outside.
"""

import re
import signal
import struct
import subprocess
import time

import pytest

import clients
import peers
from processes import TIME_FACTOR, wait_until
from service import GATE_OPEN_BUILD

CONNECT_TIMEOUT = 1
SHUTDOWN_TIMEOUT = 2
UNSTOPPABLE = 2  # what a worker that hangs in the resolver or the driver gets on top
ALONE = {"mqtt.watch_broker": "false"}  # no other connection than those that are looked at
IMPATIENT = ALONE | {"mqtt.connect_timeout": f"{CONNECT_TIMEOUT}s", "mqtt.reconnect.min": "200ms", "mqtt.reconnect.max": "2s",
             "shutdown_timeout": f"{SHUTDOWN_TIMEOUT}s"}
CONNACK = b"\x20\x03\x00\x00\x00"  # MQTT 5: accepted, no properties


def _complaints(process):
    return [record["message"] for record in process.records if record["level"] in ("warn", "error")]


def _assert_says(process, pattern, begun, within):
    """One clear line, in time, and not again and again."""
    process.wait_log(pattern, within + 1)
    late = time.monotonic() - begun
    assert late < (within + 0.8) * TIME_FACTOR, f"said only after {late:.1f} s"
    return late


def _assert_smooth(process):
    longest = process.sums()["loop"]["longest_iteration_ms"]
    print(f"longest loop iteration {longest:.1f} ms", end=" ")
    assert longest < 100 * TIME_FACTOR


def _assert_stops(process):
    """SIGTERM in the midst of it."""
    begun = time.monotonic()
    process.stop(timeout=SHUTDOWN_TIMEOUT + UNSTOPPABLE + 0.5)
    print(f"stopped in {time.monotonic() - begun:.2f} s")


def _assert_consumes(process, broker, count=10):
    process.wait_log("subscribed to", 15, after=process.mark_of_start)
    before = process.sums()["consumer"]["stored"]
    assert len(clients.publish(broker.plain_port, count)) == count
    process.wait_stored(before + count)


def _start(process):
    process.mark_of_start = process.mark()
    process.begun = time.monotonic()
    return process.start()


def _real_broker(mosquitto, port, **options):
    broker = mosquitto(started=False, **options)
    broker.port = port
    return broker.start()


# ---- the broker's place


def _assert_weathers(process, peer, pattern, mosquitto, *, within=CONNECT_TIMEOUT, lines=1, attempts=None, **broker):
    """The whole of it: says it, keeps trying, does not stall, stops; started again it finds the real broker."""
    _start(process)
    late = _assert_says(process, pattern, process.begun, within)
    if attempts is not None:
        wait_until(lambda: attempts() >= 3, 12, lambda: f"a third attempt, {attempts()} so far")
    print(f"\nsaid after {late:.2f} s;", end=" ")
    _assert_smooth(process)
    said = _complaints(process)
    assert [line for line in said if re.search(pattern, line)], said
    assert lines is None or len(said) <= lines, said
    _assert_stops(process)

    _start(process)
    process.wait_log(pattern, within + 2, after=process.mark_of_start)
    peer.stop()
    real = _real_broker(mosquitto, peer.port, **broker)
    _assert_consumes(process, real)
    process.stop()


@pytest.fixture
def consumer(service, mongod, database):
    """A function that makes an impatient consumer, not started, for a broker on `port`."""
    def make(port, **settings):
        return service(started=False, mongod=mongod, database=database,
                       settings={"mqtt.host": "127.0.0.1", "mqtt.port": port, **IMPATIENT, **settings})

    return make


def test_a_broker_that_packets_do_not_reach(consumer, mosquitto):
    with peers.BlackHole() as hole:
        _assert_weathers(consumer(hole.port), hole, "cannot connect: no answer within mqtt.connect_timeout", mosquitto)


NO_CONNACK = "sent no CONNACK within mqtt.connect_timeout"
HUNG_UP = "hung up|reset by peer|connection was lost"
NOT_MQTT = "protocol error"
PLAIN = {
    "silent": (peers.stay_silent, NO_CONNACK),
    "drip": (peers.answer(*peers.one_byte_each(CONNACK), every=1), NO_CONNACK),
    "drip, and more": (peers.answer(*peers.one_byte_each(b"\x20\xff\xff\x7f" + bytes(20)), every=0.3), NO_CONNACK),
    "hang up": (peers.hang_up, HUNG_UP),
    "hang up after CONNECT": (peers.answer(close=True), HUNG_UP),
    "hang up within CONNACK": (peers.answer(CONNACK[:3], close=True), HUNG_UP),
    "reset": (peers.reset, HUNG_UP),
    "another protocol": (peers.answer(b"HTTP/1.1 400 Bad Request\r\n\r\n", close=True), f"{HUNG_UP}|{NOT_MQTT}"),
    "zeros": (peers.answer(bytes(1000)), NOT_MQTT),
    "oversized CONNACK": (peers.answer(b"\x20\xff\xff\xff\xff\x01" + bytes(100)), NOT_MQTT),
    "empty CONNACK": (peers.answer(b"\x20\x00"), NOT_MQTT),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_a_broker_that_misbehaves(consumer, mosquitto, kind):
    behave, pattern = PLAIN[kind]
    with peers.Peer(behave) as peer:
        # A probe and a connection each time.
        _assert_weathers(consumer(peer.port), peer, pattern, mosquitto, attempts=lambda: len(peer.accepted) // 2)


# What comes after a CONNACK. A connection that was up is news each time, so there is a line for each attempt.
AFTER_CONNACK = {
    "garbage": bytes(range(0xf0, 0x100)) * 10,
    "oversized length": b"\x30\xff\xff\xff\xff\x01" + bytes(100),
    "PUBLISH whose topic is too long": b"\x32\x06\xff\xff\x00\x01\x00\x00",
    "PUBLISH of QoS 3": b"\x36\x07\x00\x01a\x00\x01\x00x",
    "hang up": None,
}


@pytest.mark.parametrize("kind", AFTER_CONNACK)
def test_a_broker_that_misbehaves_after_connack(consumer, mosquitto, kind):
    data = AFTER_CONNACK[kind]
    with peers.Peer(peers.answer(CONNACK + (data or b""), close=data is None)) as peer:
        _assert_weathers(consumer(peer.port), peer, NOT_MQTT if data else HUNG_UP, mosquitto, lines=None,
                         attempts=lambda: len(peer.accepted) // 2)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_broker_that_hangs_up_over_connect(consumer, protocol):
    """As those do that know only MQTT 3.1.1: the line says what else to try, unless it is that already."""
    with peers.Peer(peers.answer(close=True)) as peer:
        process = _start(consumer(peer.port, **{"mqtt.protocol": protocol}))
        said = process.wait_log("the broker hung up before it answered.*").group()
        assert ("try mqtt.protocol 3.1.1" in said) == (protocol == "5")
        _assert_stops(process)


@pytest.mark.parametrize("protocol, holding", [("5", False), ("3.1.1", False), ("3.1.1", True)])
def test_another_client_with_the_same_id(consumer, mosquitto, fresh_mongod, protocol, holding):
    """Whether it reads at that moment or holds messages: the line names the client id."""
    broker, mongod = mosquitto(), fresh_mongod()
    process = _start(consumer(broker.port, **{"mqtt.client_id": "same", "mqtt.protocol": protocol, "mongodb.uri": mongod.uri,
                                              "spool.max_size": 0}))
    process.wait_log("subscribed to")
    if holding:
        mongod.sigstop()
        assert clients.publish(broker.port, 3)
        wait_until(lambda: process.sums()["consumer"]["in_flight"] >= 1, 10, process.tail)  # the others may not have been read
    with clients.connected(broker.port, client_id="same-1", protocol=5 if protocol == "5" else 4):
        said = process.wait_log('"level":"warn","room":"mqtt","message":"(.*)"').group(1)
    assert "client id" in said
    mongod.sigcont()
    _assert_stops(process)


def test_a_property_that_does_not_exist(consumer):
    """libmosquitto 2.0.11 fails an assertion of its own; nothing can be done but to say so as everything is said. Later ones do not."""
    with peers.Peer(peers.answer(b"\x20\x05\x00\x00\x02\x7d\x00")) as peer:
        running = consumer(peer.port).start()
        wait_until(lambda: not running.alive or _complaints(running), 10, "it says something, or ends")
        assert not [record for record in running.records if record["level"] == "?"], running.log
        if not running.alive:
            assert running.popen.returncode == -signal.SIGABRT and "assertion failed: mosq" in _complaints(running)[-1]


def test_backoff_grows(consumer):
    """Attempts after 0.2, 0.4, 0.8, 1.6, 2, 2 … s, or down to half of it, although each connection was up for a moment."""
    with peers.Peer(peers.answer(CONNACK, close=True)) as peer:
        process = _start(consumer(peer.port))
        time.sleep(6)
        attempts = len(peer.accepted) // 2
        gaps = [later - earlier for earlier, later in zip(peer.accepted, peer.accepted[2:], strict=False)][::2]
        print(f"{attempts} attempts, gaps {[round(gap, 2) for gap in gaps]}")
        assert 5 <= attempts <= 11
        assert all(gap > 0.09 for gap in gaps)
        assert max(gaps) > 0.8
        assert max(gaps) < 2.5 * TIME_FACTOR
        _assert_stops(process)


def test_a_packet_that_never_ends(consumer):
    """256 MiB announced, then a byte now and then: no memory for it, and the keepalive ends it."""
    with peers.Peer(peers.answer(CONNACK + b"\x30\xff\xff\xff\x7f", *([b"\x00"] * 100), every=0.2)) as peer:
        process = _start(consumer(peer.port, **{"mqtt.keepalive": "5s"}))
        process.wait_log("connected to")
        process.wait_log("consumer: 127.0.0.1:[0-9]+: .*(?i:keepalive|ping)", 15)
        peak = process.rss_peak() >> 20
        print(f"\npeak {peak} MiB;", end=" ")
        assert peak < 200
        _assert_smooth(process)
        _assert_stops(process)


# ---- TLS


TLS = {
    "silent": (peers.stay_silent, "TLS handshake did not finish within mqtt.connect_timeout"),
    "hang up": (peers.answer(close=True), "hung up during the TLS handshake|does not speak TLS"),
    "hang up within ServerHello": (peers.answer(b"\x16\x03\x03\x00\x7a\x02\x00\x00\x76" + bytes(20), close=True),
                                   "hung up during the TLS handshake|does not speak TLS"),
    "reset": (peers.reset, "hung up during the TLS handshake|does not speak TLS|reset by peer"),
    "garbage": (peers.answer(bytes(range(0x80, 0xc0)) * 4), "TLS failed: .*does not speak TLS"),
    "MQTT": (peers.answer(CONNACK), "TLS failed: "),
    "drip": (peers.answer(*peers.one_byte_each(b"\x16\x03\x03\x00\x7a\x02\x00\x00\x76" + bytes(20)), every=0.3),
             "TLS handshake did not finish within mqtt.connect_timeout"),
}


@pytest.mark.parametrize("kind", TLS)
def test_a_tls_broker_that_misbehaves(consumer, mosquitto, certificates, kind):
    behave, pattern = TLS[kind]
    settings = {"mqtt.tls.enabled": "true", "mqtt.tls.ca": certificates.ca.cert}
    with peers.Peer(behave) as peer:
        # A reset comes sooner or later in the handshake, which makes two texts.
        _assert_weathers(consumer(peer.port, **settings), peer, pattern, mosquitto, tls=certificates,
                         attempts=lambda: len(peer.accepted) // 2, lines=None if kind == "reset" else 1)


# ---- the resolver's place


def _namespace():
    """The command that gives a process mounts of its own, or None."""
    for command in (["unshare", "--mount"], ["unshare", "-rm"]):
        try:
            if subprocess.run([*command, "mount", "--bind", "/etc/hosts", "/etc/resolv.conf"], capture_output=True,
                              timeout=10, check=False).returncode == 0:
                return command
        except OSError:
            pass
    return None


@pytest.fixture
def resolver():
    try:
        server = peers.Resolver()
    except PermissionError:
        pytest.skip("port 53 is root's")
    with server:
        yield server


@pytest.fixture
def with_resolver(directory, resolver):
    """A function that has a Service run with that resolver and nothing else: no /etc/hosts."""
    command = _namespace()
    if command is None:
        pytest.skip("needs root, or user namespaces")
    files = directory("etc")
    (files / "nsswitch.conf").write_text("hosts: dns\n")

    def wrap(process, options=""):
        (files / "resolv.conf").write_text(f"nameserver {resolver.address}\n{options}\n")
        script = 'for name in resolv.conf nsswitch.conf; do mount --bind "$0/$name" /etc/$name || exit 1; done; exec "$@"'
        plain = process.argv
        process.argv = lambda: [*command, "sh", "-c", script, files, *plain()]
        return process

    return wrap


RESOLVER = "name resolution did not answer within mqtt.connect_timeout"


def test_a_silent_resolver(consumer, mosquitto, resolver, with_resolver):
    """It says so, tries again, and finds the broker once the resolver answers."""
    broker = mosquitto()
    process = consumer(broker.port, **{"mqtt.host": "broker.test"})
    with_resolver(process, "options timeout:1 attempts:2")  # 2 s a look-up, longer than the connect timeout
    _start(process)
    late = _assert_says(process, RESOLVER, process.begun, CONNECT_TIMEOUT)
    # Two questions (A and AAAA), each twice, make an attempt.
    wait_until(lambda: resolver.queries > 4, 15, lambda: f"a second attempt, {resolver.queries} queries so far")
    print(f"\nsaid after {late:.2f} s, {resolver.queries} queries;", end=" ")
    _assert_smooth(process)
    assert len(_complaints(process)) == 1, _complaints(process)
    resolver.answers = True
    _assert_consumes(process, broker)
    _assert_stops(process)


def test_sigterm_while_the_resolver_is_silent(consumer, mosquitto, with_resolver):
    process = consumer(mosquitto().port, **{"mqtt.host": "broker.test"})
    with_resolver(process)  # the resolver's defaults: 10 s a look-up, which nothing can stop
    _start(process)
    process.wait_log(RESOLVER)
    _assert_smooth(process)
    _assert_stops(process)


def test_sigterm_while_the_name_of_mongodb_is_not_resolved(consumer, mosquitto, with_resolver):
    process = consumer(mosquitto().port, **{"mongodb.uri": "mongodb://mongodb.test/?serverSelectionTimeoutMS=1000"})
    with_resolver(process)
    _start(process)
    process.wait_log("MongoDB does not answer", 5)
    _assert_smooth(process)
    _assert_stops(process)


# ---- MongoDB's place


@pytest.mark.parametrize("kind", ["silent", "black hole"])
def test_a_mongodb_that_does_not_answer(consumer, mosquitto, mongod, collection, kind):
    broker = mosquitto()
    with peers.BlackHole() if kind == "black hole" else peers.Peer(peers.stay_silent) as peer:
        uri = f"mongodb://127.0.0.1:{peer.port}/?directConnection=true&serverSelectionTimeoutMS=1000&connectTimeoutMS=1000"
        process = consumer(broker.port, **{"mongodb.uri": uri, "mqtt.keepalive": "10s", "spool.max_size": 0})
        _start(process)
        late = _assert_says(process, "MongoDB does not answer: ", process.begun, 2)
        # Taken, held, handed back past the hold limit of 3 s, not before.
        process.wait_log("subscribed to")
        assert len(clients.publish(broker.port, 10)) == 10
        published = time.monotonic()
        process.wait_log("handed back to the broker", 8)
        held = time.monotonic() - published
        print(f"\nsaid after {late:.2f} s; held {held:.1f} s;", end=" ")
        assert 2.5 < held < 6 * TIME_FACTOR
        _assert_smooth(process)
        assert 1 <= process.sums()["consumer"]["returned"] <= 10  # the others have not been read
        _assert_stops(process)
        _start(process)
        process.wait_log("MongoDB does not answer: ", 5, after=process.mark_of_start)
    recorder = peers.Recorder()
    recorder.add("mongodb", mongod.port, port=peer.port)
    with recorder:
        process.wait_stored(10)
        assert collection.count_documents({}) == 10
        process.stop()


# ---- the order


BACKLOG, LIVE = 2000, 1000


@pytest.fixture
def recorded(service, mosquitto, mongod, database, request):
    """A function that makes a Service, not started, whose every byte to and from broker and mongod is recorded:
    (process, broker, recorder, proxy of the broker, proxy of mongod)."""
    running = []

    def make(*, gather=None, delay=0.0, build=None, settings=None):
        broker = mosquitto()
        recorder = peers.Recorder()
        to_broker = recorder.add("mqtt", broker.port, gather=gather)
        to_mongod = recorder.add("mongodb", mongod.port, delay=delay)
        running.append(recorder.start())
        process = service(started=False, database=database, build=build, settings={
            "mqtt.host": "127.0.0.1", "mqtt.port": to_broker.port, "mqtt.client_id": "recorded", **IMPATIENT,
            "mongodb.uri": f"mongodb://127.0.0.1:{to_mongod.port}/?directConnection=true", "mongodb.database": database,
            **(settings or {})})
        return process, broker, recorder, to_broker, to_mongod

    yield make
    for recorder in running:
        recorder.stop()


def _first_piece(recorder):
    """The types of the packets that came with the first piece of the broker on the service's connection."""
    connection = peers.wait_for_connection(recorder, "mqtt")
    packets = list(peers.mqtt_packets(recorder.stream("mqtt", connection, "server")))
    return [packet.type for packet in packets if packet.last == packets[0].first]


def _consume_recorded(recorded, collection, build=None):
    """A backlog whose CONNACK and first PUBLISHes come in one piece, then live messages; every hundredth is no JSON. What mongod
    answers reaches the service 5 ms late, so that nothing overtakes it unseen. Returns the recorder and all payloads."""
    process, broker, recorder, _, _ = recorded(gather=20000, delay=0.005, build=build, settings={"consumer.batch.count": 500})
    clients.create_session(broker.port, "recorded-1", "sensors/#")
    payloads = [b'{"n": %d, "text": "%s"}' % (n, b"x" * (n % 50)) if n % 100 else b"no JSON %d" % n
                for n in range(BACKLOG + LIVE)]
    assert len(clients.publish(broker.port, payloads[:BACKLOG])) == BACKLOG
    _start(process)
    join = clients.publisher_thread(broker.port, payloads[BACKLOG:], pace=1000)
    assert len(join()) == LIVE
    wait_until(lambda: collection.count_documents({}) + collection.database.dead_letter.count_documents({}) >= len(payloads), 30,
               "all stored")
    sums = process.stop()
    types = _first_piece(recorder)
    print(f"\nfirst piece: CONNACK and {types.count(peers.PUBLISH)} PUBLISH; {sums['consumer']['batches']} batches; loop "
          f"{sums['loop']['longest_iteration_ms']:.1f} ms;", end=" ")
    assert types[0] == peers.CONNACK
    assert types.count(peers.PUBLISH) > 100
    return recorder, payloads


def test_every_puback_stands_behind_the_answer_of_mongod(recorded, collection):
    recorder, payloads = _consume_recorded(recorded, collection)
    judged = peers.acknowledgements(recorder)
    print(f"{len(judged.proper)} PUBACKs behind, {len(judged.early)} before the answer")
    assert judged.early == []
    assert sorted(judged.proper) == sorted(payloads)


def test_without_the_gate_pubacks_come_too_early(recorded, collection):
    """That the test above can fail."""
    recorder, payloads = _consume_recorded(recorded, collection, build=GATE_OPEN_BUILD)
    judged = peers.acknowledgements(recorder)
    print(f"{len(judged.proper)} PUBACKs behind, {len(judged.early)} before the answer")
    assert len(judged.early) > len(payloads) // 2


# ---- the hold limit


def _held_messages(recorder, connection):
    """The PUBLISHes of a connection, by id, without those that were acknowledged."""
    held = {}
    for packet in peers.mqtt_packets(recorder.stream("mqtt", connection, "server")):
        if packet.type == peers.PUBLISH:
            message = peers.parse_publish(packet)
            held[message.id] = message
    for packet in peers.mqtt_packets(recorder.stream("mqtt", connection, "service")):
        if packet.type == peers.PUBACK:
            held.pop(peers.puback_id(packet), None)
    return held


@pytest.mark.parametrize("ending", ["thaw", "cut"])
def test_past_the_hold_limit_the_connection_is_given_up(recorded, collection, ending):
    """mongod freezes for longer than half the keepalive less 2 s: the connection closes without PUBACK and without DISCONNECT, and
    what was held comes again."""
    process, broker, recorder, _, to_mongod = recorded(settings={"mqtt.keepalive": "10s", "spool.max_size": 0})
    _start(process)
    process.wait_log("subscribed to")
    assert len(clients.publish(broker.port, [b'{"before": %d}' % n for n in range(20)])) == 20
    process.wait_stored(20)
    connection = peers.wait_for_connection(recorder, "mqtt")

    to_mongod.freeze()
    payloads = [b'{"held": %d}' % n for n in range(50)]
    published = time.monotonic()
    assert len(clients.publish(broker.port, payloads)) == 50
    wait_until(lambda: recorder.ended("mqtt", connection) is not None, 10, "the connection is closed")
    held_for = time.monotonic() - published
    _assert_smooth(process)
    held = _held_messages(recorder, connection)
    said = list(peers.mqtt_packets(recorder.stream("mqtt", connection, "service")))
    assert sorted(message.payload for message in held.values()) == sorted(payloads)
    assert said[-1].type != peers.DISCONNECT and sum(packet.type == peers.PUBACK for packet in said) == 20
    assert 2.8 < held_for < 4 * TIME_FACTOR

    # Not taken up again before MongoDB answers.
    time.sleep(1)
    in_flight = process.sums()["consumer"]["in_flight"]  # the others have not been read
    assert 1 <= in_flight <= 50
    assert recorder.connections("mqtt")[-1] == connection
    if ending == "cut":
        to_mongod.cut()
    to_mongod.thaw()
    later = peers.wait_for_connection(recorder, "mqtt", after=connection, timeout=20)
    wait_until(lambda: not _held_messages(recorder, later) and len(_acknowledged(recorder, later)) >= 50, 20, "all acknowledged")
    came_again = [peers.parse_publish(packet) for packet in peers.mqtt_packets(recorder.stream("mqtt", later, "server"))
                  if packet.type == peers.PUBLISH]
    assert sorted(message.payload for message in came_again) == sorted(payloads)
    assert all(message.dup for message in came_again)
    judged = peers.acknowledgements(recorder)
    assert judged.early == []
    sums = process.stop()
    print(f"held for {held_for:.1f} s; {sums['consumer']}")
    assert sorted(document["payload"]["held"] for document in collection.aggregate([
        {"$match": {"payload.held": {"$exists": True}}}, {"$group": {"_id": "$payload.held", "payload": {"$first": "$payload"}}}])
    ) == list(range(50))
    assert sums["consumer"]["redelivered"] == 50
    assert sums["consumer"]["returned"] == (in_flight if ending == "cut" else 0)


def _acknowledged(recorder, connection):
    return [packet for packet in peers.mqtt_packets(recorder.stream("mqtt", connection, "service"))
            if packet.type == peers.PUBACK]


# ---- a broker that sends again on a live connection


class _Resending(peers.Peer):
    """A broker as some are (MQTT 5 §4.4 forbids it): what stays unacknowledged it sends again, with DUP, on the same connection.
    publish() sends from the test; `acknowledged` lists the ids of the PUBACKs."""

    def __init__(self):
        super().__init__(self._serve)
        self.acknowledged, self._connection = [], None

    def publish(self, identifier, number, dup=False):
        topic, payload = b"sensors/a", b'{"n": %d}' % number
        body = struct.pack(">H", len(topic)) + topic + struct.pack(">H", identifier) + b"\0" + payload
        self._connection.sendall(bytes([0x3a if dup else 0x32, len(body)]) + body)

    def _serve(self, connection, _ending):
        with connection.makefile("rb") as stream:
            while first := stream.read(1):
                body = stream.read(stream.read(1)[0])  # all are short: one byte of length
                if first[0] >> 4 == peers.CONNECT:
                    connection.sendall(CONNACK)
                elif first[0] >> 4 == peers.SUBSCRIBE:
                    connection.sendall(b"\x90\x04" + body[:2] + b"\0\x01")
                    self._connection = connection
                elif first[0] >> 4 == peers.PUBACK:
                    self.acknowledged.append(int.from_bytes(body[:2], "big"))

    def wait(self, count):
        wait_until(lambda: len(self.acknowledged) >= count, 15, lambda: f"{count} PUBACKs, {self.acknowledged} came")


def test_what_is_sent_again_on_a_live_connection_says_dup(service, fresh_mongod):
    """Such a broker, while an insert takes 2 s: the second copy is stored with dup, and what comes after both without."""
    mongod = fresh_mongod()
    with _Resending() as broker:
        running = service(broker=broker, mongod=mongod, settings=ALONE | {"spool.max_size": 0, "mqtt.client_id": "c"})
        running.wait_log("subscribed to")
        for number in range(5):  # rounds without DUP: nothing is expected to come again
            broker.publish(1, number)
            broker.wait(number + 1)
        mongod.fail({"times": 1}, ["insert"], blockConnection=True, blockTimeMS=2000, appName="mqtt2mongo")
        broker.publish(1, 5)
        wait_until(lambda: running.sums()["consumer"]["in_flight"] == 1, what="it is being stored")
        time.sleep(1.2)
        broker.publish(1, 5, dup=True)
        broker.wait(7)
        broker.publish(1, 6)
        broker.wait(8)
        sums = running.stop()
    stored = [(document["payload"]["n"], document["dup"])
              for document in mongod.client().mqtt2mongo.messages.find().sort("received_at", 1)]
    assert stored == [*((number, False) for number in range(6)), (5, True), (6, False)]
    assert sums["consumer"]["redelivered"] == 1


# ---- a broker that answers a part while another one ends


class _Late(peers.Peer):
    """A broker that answers the consumer's SUBSCRIBE only when the publisher disconnects, and then so often that the consumer has
    answers to read in every turn of the loop in which the publisher comes to its end."""

    ANSWERS = 20_000

    def __init__(self):
        super().__init__(self._serve)
        self.subscribed = None  # (connection, SUBACK) of the consumer

    def _serve(self, connection, _ending):
        with connection.makefile("rb") as stream:
            publishes = False
            while first := stream.read(1):
                body = stream.read(stream.read(1)[0])  # all are short: one byte of length
                if first[0] >> 4 == peers.CONNECT:
                    publishes = body.endswith(b"-pub")
                    connection.sendall(CONNACK)
                elif first[0] >> 4 == peers.SUBSCRIBE:
                    self.subscribed = connection, b"\x90\x04" + body[:2] + b"\0\x01"
                elif first[0] >> 4 == peers.DISCONNECT:
                    break
        if publishes:
            consumer, answer = self.subscribed
            consumer.sendall(answer * self.ANSWERS)
        # Peer hangs up


def test_stopping_while_the_consumer_is_being_subscribed(service, mongod, database):
    """What the consumer hears while the publisher stops must not reach the publisher any more: parts of it are gone by then."""
    with _Late() as broker:
        running = service(started=False, broker=broker, mongod=mongod, database=database, role="both", settings=IMPATIENT)
        for _ in range(3):
            broker.subscribed = None
            mark = running.mark()
            running.start()
            running.wait_log("publisher: connected to", after=mark)
            wait_until(lambda: broker.subscribed, what=lambda: f"the consumer subscribes\n{running.tail()}")
            running.stop()
            assert "subscribed to" in running.log[mark:], "the answers came too late"


# ---- a stall over TLS


def test_a_tls_connection_comes_back_after_a_stall(mosquitto, service, certificates):
    """The network swallows what a busy publisher sends over TLS until no more goes out, and the ping goes unanswered. The library
    remembers that TLS wanted to write; the next connection must send its CONNECT all the same."""
    broker = mosquitto(tls=certificates)
    recorder = peers.Recorder()
    proxy = recorder.add("mqtt", broker.port)
    with recorder:
        process = service(role="publisher", settings={
            "mqtt.host": "127.0.0.1", "mqtt.port": proxy.port, "mqtt.tls.enabled": "true", "mqtt.tls.ca": certificates.ca.cert,
            "mqtt.keepalive": "5s", "mqtt.connect_timeout": "3s", "mqtt.reconnect.max": "1s", "publisher.qos": 0,
            "publisher.rate": "20000/s"})
        process.wait_log("connected to")
        wait_until(lambda: process.sums()["publisher"]["acked"] > 1000, 10, "it publishes")
        proxy.freeze()
        process.wait_log("did not answer a ping", 30)
        mark = process.mark()
        proxy.thaw()
        process.wait_log("connected to", 15, after=mark)
        acked = process.sums()["publisher"]["acked"]
        wait_until(lambda: process.sums()["publisher"]["acked"] > acked + 1000, 10, "it publishes again")
        process.stop()
