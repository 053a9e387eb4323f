"""Many connections in trouble: an outage, fewer of them, sessions left behind, and brokers that refuse a part of it. They behave
as one connection does, and what befalls one does not hold the others up.

What is shared while all goes well is in test_shared.py, what becomes of one session left behind in test_sessions.py.
"""

import json
import re
import struct

import pytest

import clients
import peers
from processes import free_port, wait_until
from stream import CLIENT, Stored
from test_http import request
from test_shared import NO_SHARES, PLAIN, QUICK, publish, recorded, shared, start, wait_all_stored

DROPPED, VERSION = "$SYS/broker/publish/messages/dropped", "$SYS/broker/version"
GRANTED, NOT_AUTHORIZED, NO_SHARED_SUBSCRIPTIONS = 0x01, 0x87, 0x9e
HANG_UP = None


# ---- a broker that refuses what it is told to

def packet(first, body):
    assert len(body) < 128
    return bytes([first, len(body)]) + body


def text(body, at):
    length, = struct.unpack_from(">H", body, at)
    return body[at + 2:at + 2 + length].decode()


def read_packet(stream):
    """The first byte and the body of the next packet; None at the end."""
    first, length, shift, byte = stream.read(1), 0, 0, b"\x80"
    while first and byte and byte[0] & 0x80:
        byte = stream.read(1)
        length |= (byte[0] & 0x7f) << shift if byte else 0
        shift += 7
    return (first[0], stream.read(length)) if first and byte else None


class Refusing(peers.Peer):
    """A broker without messages, MQTT 5: it takes every connection, and answers SUBSCRIBE with the reason that
    `answer(client_id, filter)` returns, or hangs up. Where DROPPED is subscribed it sends a number after each SUBACK: of the
    SUBSCRIBEs that it has answered on this connection.

    said   (client id, "CONNECT", "SUBSCRIBE", "UNSUBSCRIBE" or "PINGREQ", filter or None), in this order
    """

    def __init__(self, answer, session_present=False):
        super().__init__(self._serve)
        self.answer, self.session_present = answer, session_present
        self.said = []

    def count(self, client_id, *what):
        """How often a client whose id begins so has said that."""
        return sum(entry[0].startswith(client_id) and entry[1:len(what) + 1] == what for entry in list(self.said))

    def _serve(self, connection, _ending):
        client_id, reads_dropped, answered = None, False, 0
        with connection.makefile("rb") as stream:
            while (came := read_packet(stream)) and came[0] >> 4 != peers.DISCONNECT:
                kind, body = came[0] >> 4, came[1]
                if kind == peers.CONNECT:
                    client_id = text(body, 11 + body[10])  # behind the properties, which are short
                    self.said.append((client_id, "CONNECT", None))
                    connection.sendall(packet(0x20, bytes([self.session_present, 0, 0])))
                elif kind == peers.SUBSCRIBE:
                    topic_filter = text(body, 3 + body[2])
                    self.said.append((client_id, "SUBSCRIBE", topic_filter))
                    reason = self.answer(client_id, topic_filter)
                    if reason is HANG_UP:
                        return
                    connection.sendall(packet(0x90, body[:2] + bytes([0, reason])))
                    answered += 1
                    reads_dropped |= topic_filter == DROPPED and reason < 0x80
                    if reads_dropped:
                        name = DROPPED.encode()
                        connection.sendall(packet(0x30, struct.pack(">H", len(name)) + name + b"\0%d" % answered))
                elif kind == 10:
                    self.said.append((client_id, "UNSUBSCRIBE", text(body, 3 + body[2])))
                    connection.sendall(packet(0xb0, body[:2] + b"\0\0"))
                elif kind == 12:
                    self.said.append((client_id, "PINGREQ", None))
                    connection.sendall(packet(0xd0, b""))


def refuse(wanted, reason):
    """An answer() that refuses the filter `wanted` with `reason`, and grants the others."""
    return lambda _client_id, topic_filter: reason if topic_filter == wanted else GRANTED


# ---- MongoDB in trouble

def test_handbacks_of_one_outage(service, shared_mosquitto, fresh_mongod):
    """Ten connections, no spool, MongoDB away until each of them has handed back what it held. It is one outage: once MongoDB is
    back everything is stored within seconds, as with one connection, and not after a wait that grew with each of the ten."""
    broker, mongod = shared_mosquitto(), fresh_mongod()
    uri = mongod.uri + "&serverSelectionTimeoutMS=500&socketTimeoutMS=500&connectTimeoutMS=500"
    running = start(service(broker=broker, mongod=mongod, started=False, settings=QUICK | {
        "consumer.connections": 10, "spool.max_size": 0, "mqtt.keepalive": "5s", "mongodb.uri": uri}))
    mongod.kill9()
    publish(broker, 0, 400)
    wait_until(lambda: running.log.count("handed back") >= 10, 20, lambda: f"ten hand back\n{running.tail()}", interval=0.1)
    mongod.start()
    sums = running.wait_stored(400, timeout=12)["consumer"]
    assert sums["returned"] > 0
    assert set(Stored(mongod.client().mqtt2mongo.messages).copies) == set(range(400))


def test_hold_limit_with_a_spool_that_works(service, shared_mosquitto, fresh_mongod):
    """16 connections, one worker, and inserts that take 200 ms, which is no outage: a round that waits too long for its turn goes
    to the spool. Nothing is handed back because of the hold limit, and all is stored."""
    broker, mongod = shared_mosquitto(), fresh_mongod()
    running = start(service(broker=broker, mongod=mongod, started=False, settings=QUICK | {
        "consumer.connections": 16, "consumer.workers": 1, "mqtt.keepalive": "5s"}))
    mongod.fail("alwaysOn", ["insert"], blockConnection=True, blockTimeMS=200)
    publish(broker, 0, 20_000)
    sums = running.wait_stored(20_000, timeout=40)["consumer"]
    assert sums["returned"] == 0
    assert sums["stored"] == 20_000


# ---- sessions left behind

def test_fewer_connections_lose_nothing(service, shared_mosquitto, mongod, database, collection):
    """12 connections become 2, with mosquitto's default queue of 1,000 messages a session, while 16,000 come: the sessions left
    behind are members of the group until they are unsubscribed, which happens to all ten together, before a queue is full."""
    broker = shared_mosquitto(extra=["max_queued_messages 1000"])
    running = start(service(broker=broker, mongod=mongod, database=database, settings=QUICK | {"consumer.connections": 12},
                            started=False))
    running.stop()
    running.settings["consumer.connections"] = 2
    mark = running.mark()
    start(running)
    publish(broker, 0, 16_000, pace=4000)
    assert "being dropped" not in broker.log, re.findall(".*being dropped.*", broker.log)[:12]
    wait_all_stored(collection, set(range(16_000)), running)
    wait_until(lambda: running.log.count("session left behind is empty and ended", mark) == 10, 15, running.tail)
    running.stop()
    assert "being dropped" not in broker.log


@pytest.mark.parametrize("odd", [{"odd-1": ["a/#/b"]}, {"": ["a"]}], ids=["a bad filter", "an empty client id"])
def test_odd_state_holds_nothing_up(service, mosquitto, mongod, database, odd):
    """A session in state.json that cannot be ended, for no library takes its filter or its client id, does not keep the service
    from ending the others."""
    broker = mosquitto()
    running = service(broker=broker, mongod=mongod, database=database, started=False, settings=QUICK)
    running.state.mkdir()
    (running.state / "state.json").write_text(json.dumps({"client_id": CLIENT, "sessions": odd | {"old-1": ["c"]}}))
    clients.create_session(broker.port, "odd-1", "a/b")  # the broker knows it
    running.start()
    running.wait_log("old-1: session left behind is not known to the broker")
    wait_until(lambda: "old-1" not in recorded(running), what="it is forgotten")
    running.wait_log("subscribed to")
    running.stop()


def test_one_connection_that_is_refused(service, mongod, database):
    """The second of two connections may not subscribe: the first one suffices to take up a session left behind."""
    def answer(client_id, _filter):
        return NOT_AUTHORIZED if client_id == "after-2" else GRANTED

    with Refusing(answer) as broker:
        running = service(broker=broker, mongod=mongod, database=database, settings=QUICK | {"mqtt.client_id": "before"})
        running.wait_log("subscribed to")
        running.stop()
        running.settings |= {"mqtt.client_id": "after", "consumer.connections": 2}
        running.start()
        running.wait_log("before-1: session left behind is not known to the broker")
        assert broker.count("after-2", "SUBSCRIBE", shared("after")) >= 1
        running.stop()


# ---- brokers that refuse

def test_the_old_filter_stays_when_the_new_one_is_refused(service, mongod, database):
    """The broker takes no $share, which it says in SUBACK only: as long as the new filter is not granted the old one is not
    unsubscribed, so that the broker goes on to queue for it."""
    def answer(_client_id, topic_filter):
        return NO_SHARED_SUBSCRIPTIONS if topic_filter.startswith("$share/") else GRANTED

    with Refusing(answer, session_present=True) as broker:
        running = service(broker=broker, mongod=mongod, database=database, settings=QUICK)
        running.wait_log(f"subscribed to {PLAIN}")
        running.stop()
        running.settings["consumer.share"] = "g"
        running.start()
        running.wait_log(re.escape(NO_SHARES))
        wait_until(lambda: broker.count(f"{CLIENT}-1", "SUBSCRIBE", shared("g")) >= 3, what="it tries again")
        running.stop()
    assert broker.count(f"{CLIENT}-1", "UNSUBSCRIBE") == 0


def test_check_with_shares_where_sys_hangs_up(service, mongod, database):
    """--check asks for the version last: a broker that hangs up on who asks for $SYS is a good one all the same."""
    with Refusing(refuse(VERSION, HANG_UP)) as broker:
        checking = service(broker=broker, mongod=mongod, database=database, settings=QUICK | {"consumer.share": "g"},
                           args=["--check"])
        checking.finish(sums=False)
    assert [said[1:] for said in broker.said if said[1] == "SUBSCRIBE"] == [("SUBSCRIBE", PLAIN), ("SUBSCRIBE", VERSION)]


def watched(service, broker, mongod, database):
    """A service in a group, whose status can be asked for, and a function that returns what its broker has dropped, or None."""
    port = free_port()
    running = service(broker=broker, mongod=mongod, database=database, settings=QUICK | {
        "consumer.share": "g", "http.listen": f"127.0.0.1:{port}", "mqtt.keepalive": "5s"})
    running.wait_log("subscribed to")
    return running, lambda: request(port, "/status.json").json.get("broker_dropped_messages")


def test_dropped_stays_known_when_the_version_is_refused(service, mongod, database):
    """The broker lets us read how many messages it has dropped and not its version: that number is shown, also what it says after
    it has refused the other."""
    with Refusing(refuse(VERSION, NOT_AUTHORIZED)) as broker:
        running, dropped = watched(service, broker, mongod, database)
        wait_until(lambda: dropped() == 2, what=lambda: f"the number behind the refusal: {dropped()}\n{running.tail()}")
        assert broker.count(f"{CLIENT}-sys", "CONNECT") == 1
        running.stop()
    assert "does not let us read" not in running.log


def test_sys_that_hangs_up_at_the_version(service, mongod, database):
    """The broker hangs up on who asks for its version: it is asked once, and then the connection stays."""
    with Refusing(refuse(VERSION, HANG_UP)) as broker:
        running, dropped = watched(service, broker, mongod, database)
        # A ping comes after five quiet seconds.
        wait_until(lambda: broker.count(f"{CLIENT}-sys", "PINGREQ"), 10,
                   lambda: f"the connection stays; made {broker.count(f'{CLIENT}-sys', 'CONNECT')} times\n{running.tail()}")
        assert dropped() == 1
        running.stop()
    assert broker.count(f"{CLIENT}-sys", "CONNECT") == 2
    assert broker.count(f"{CLIENT}-sys", "SUBSCRIBE", VERSION) == 1


# ---- threads

@pytest.mark.threads
def test_the_first_start_of_both_roles(service, mosquitto, mongod, database):
    """No state file yet, four connections and a publisher: all want the client id while the sessions are being recorded, which
    is work of another thread. ThreadSanitizer sees it, should they read it meanwhile; not at each start, so there are some."""
    broker = mosquitto()
    for _ in range(6):
        running = service(broker=broker, mongod=mongod, database=database, role="both", settings=QUICK | {
            "consumer.connections": 4, "mqtt.client_id": None})
        wait_until(lambda: running.log.count("subscribed to $share/") == 4 or not running.alive, 10, running.tail)
        running.stop()
        assert len(recorded(running)) == 4
