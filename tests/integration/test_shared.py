"""Several connections, several machines: consumer.connections and consumer.share, shared subscriptions (MQTT 5 §4.8.2).

Against a mosquitto from 2.0.12 on, which scripts/setup.sh finds or fetches, unless a test says otherwise. Where messages are
published between two lives of the service, each session of the group keeps its share of them. Tests that break something print
their figures (pytest -rP).
"""

import json
import re
import signal
import time

import pytest

import clients
import peers
from processes import TIME_FACTOR, free_port, wait_until
from service import BUILD, GATE_OPEN_BUILD
from servers import SHARES
from stream import CLIENT, END, Stored, Stream, content_of, figures, seeded, topic_of
from test_cli import run

QUICK = {"mqtt.client_id": CLIENT, "mqtt.reconnect.min": "100ms", "mqtt.reconnect.max": "500ms"}
PLAIN = "sensors/#"


def shared(group, topic=PLAIN):
    return f"$share/{group}/{topic}"


def filter_of(running):
    """The filter that its settings make."""
    settings = running.settings
    several = settings.get("consumer.connections", 1) > 1
    group = settings.get("consumer.share") or (settings["mqtt.client_id"] if several else None)
    return shared(group) if group else PLAIN


def session_names(running):
    settings = running.settings
    return [f"{settings['mqtt.client_id']}-{number}" for number in range(1, settings.get("consumer.connections", 1) + 1)]


def recorded(running):
    """The sessions of its state file and their filters."""
    return json.loads((running.state / "state.json").read_text())["sessions"]


def start(running):
    """Start it (again), and wait until each of its connections has subscribed."""
    mark = running.mark()
    running.start()
    line = f"subscribed to {filter_of(running)} at QoS 1"
    names = session_names(running)
    wait_until(lambda: running.log.count(line, mark) >= len(names), 20, lambda: f"{len(names)} times: {line}\n{running.tail()}")
    return running


def wait_settled_sessions(running, timeout=60):
    """Wait until its state file has its sessions with their one filter, and nothing that was left behind."""
    expected = {name: [filter_of(running)] for name in session_names(running)}
    wait_until(lambda: recorded(running) == expected, timeout, lambda: f"{expected}, but {recorded(running)}\n{running.tail()}",
               interval=0.1)


def publish(broker, first, count, pace=None):
    payloads = [json.dumps(content_of(number)) for number in range(first, first + count)]
    assert len(clients.publish(broker.port, payloads, lambda index: topic_of(first + index), pace=pace)) == count


def known(port, client_id, **connection):
    """Does the broker have a session of this name?"""
    present = []

    def note(client):
        inner = client.on_connect

        def on_connect(client, data, flags, *rest):
            present.append(flags.session_present)
            inner(client, data, flags, *rest)

        client.on_connect = on_connect

    with clients.connected(port, client_id=client_id, clean_start=False, setup=note, **connection):
        return present[0]


def left_at(broker, names):
    """The numbers of what the broker still holds for these sessions, which are ended."""
    return [json.loads(message.payload)["n"] for name in names for message in clients.take_session(broker.port, name, quiet=0.3)
            if message.topic != END]


def once_each(collection, numbers):
    stored = Stored(collection)
    assert set(stored.copies) == set(numbers), f"missing: {sorted(set(numbers) - set(stored.copies))[:5]}"
    assert stored.twice == 0, f"{stored.twice} are stored twice"


def wait_all_stored(collection, numbers, *running, timeout=30):
    """Wait until each of these is in MongoDB, once or more."""
    wait_until(lambda: not Stored(collection).missing(numbers), timeout,
               lambda: f"{len(Stored(collection).missing(numbers))} of {len(numbers)} are missing\n" + "\n".join(
                   each.tail() for each in running), interval=0.2)


def taken_by(broker):
    """How many messages the broker has sent to each client, which it says with log_type all."""
    taken = {}
    for name in re.findall(r"Sending PUBLISH to (\S+) \(d\d, q1", broker.log):
        taken[name] = taken.get(name, 0) + 1
    return taken


@pytest.fixture
def several(service, mongod, database):
    """A function that makes a service with so many connections and starts it: several(broker, 4)."""
    def make(broker, connections, *, server=None, build=None, **settings):
        settings = QUICK | {"consumer.connections": connections} | settings
        running = service(broker=broker, mongod=server or mongod, database="mqtt2mongo" if server else database, settings=settings,
                          build=build, started=False)
        return start(running)

    return make


# ---- one service

@pytest.mark.threads
def test_four_connections(several, shared_mosquitto, collection):
    """20,000 messages: each is stored once, each of the four sessions took some, the sums are exact, and after a clean stop the
    broker has nothing left."""
    broker = shared_mosquitto(extra=["log_type all"])
    running = several(broker, 4)
    assert recorded(running) == {f"{CLIENT}-{number}": [shared(CLIENT)] for number in (1, 2, 3, 4)}
    publish(broker, 0, 20_000)
    running.wait_stored(20_000)
    sums = running.stop()["consumer"]
    assert sums["received"] == sums["stored"] == 20_000
    once_each(collection, range(20_000))
    taken = taken_by(broker)
    assert set(taken) == set(session_names(running)) and min(taken.values()) >= 1000, taken
    assert left_at(broker, session_names(running)) == []


def test_a_backlog(several, shared_mosquitto, collection):
    """What was published while the service was away is drained through all connections."""
    broker = shared_mosquitto(extra=["log_type all"])
    running = several(broker, 4)
    running.stop()
    publish(broker, 0, 20_000)
    assert taken_by(broker) == {}
    start(running).wait_stored(20_000)
    sums = running.stop()["consumer"]
    assert sums["received"] == sums["stored"] == 20_000
    once_each(collection, range(20_000))
    taken = taken_by(broker)
    assert set(taken) == set(session_names(running)) and min(taken.values()) >= 1000, taken


def test_with_mqtt_3_1_1(several, shared_mosquitto, collection):
    """$share is a name like others there, which this broker knows all the same."""
    broker = shared_mosquitto(extra=["log_type all"])
    running = several(broker, 2, **{"mqtt.protocol": "3.1.1"})
    publish(broker, 0, 2000)
    running.wait_stored(2000)
    running.stop()
    publish(broker, 2000, 2000)
    start(running).wait_stored(2000)
    running.stop()
    once_each(collection, range(4000))
    assert set(taken_by(broker)) == set(session_names(running))


def test_fewer_connections(several, shared_mosquitto, collection):
    """4, then 1: what the broker has queued for the other three is stored, they are ended there, and forgotten. The one that is
    left shares with nobody, and so has the plain filter."""
    broker = shared_mosquitto()
    running = several(broker, 4)
    running.stop()
    publish(broker, 0, 4000)
    running.settings["consumer.connections"] = 1
    start(running)
    for number in (2, 3, 4):
        running.wait_log(f"{CLIENT}-{number}: session left behind is empty and ended", timeout=30)
    wait_settled_sessions(running)
    assert recorded(running) == {f"{CLIENT}-1": [PLAIN]}
    publish(broker, 4000, 100)
    running.wait_stored(4100)
    running.stop()
    once_each(collection, range(4100))
    assert not any(known(broker.port, f"{CLIENT}-{number}") for number in (2, 3, 4))


@pytest.mark.heavy("sessions left behind are ended after three seconds each")
def test_fewer_and_more_connections(several, shared_mosquitto, collection):
    """4, 2, 4: with messages that come between the lives, and at each change."""
    broker = shared_mosquitto()
    running = several(broker, 4)
    running.stop()
    with Stream(broker.port, pace=500) as stream:
        for connections in (2, 4):
            stream.wait(len(stream.acknowledged) + 500)
            running.settings["consumer.connections"] = connections
            start(running)
            wait_settled_sessions(running)
            running.stop()
        stream.wait(len(stream.acknowledged) + 500)
        acknowledged = stream.finish()
    start(running)
    wait_all_stored(collection, acknowledged, running)
    running.stop()
    once_each(collection, acknowledged)
    assert left_at(broker, session_names(running)) == []


CHANGES = {
    "renamed": ({"consumer.share": "g"}, {"consumer.share": "h"}),
    "dropped": ({"consumer.share": "g"}, {"consumer.share": None}),
    "added": ({"consumer.share": None}, {"consumer.share": "g"}),
    "named": ({"consumer.connections": 2}, {"consumer.share": "g"}),
    "more, and named": ({"consumer.connections": 1}, {"consumer.connections": 3, "consumer.share": "g"}),
    "fewer, and dropped": ({"consumer.connections": 4, "consumer.share": "g"}, {"consumer.connections": 1, "consumer.share": None}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_group(several, shared_mosquitto, collection, change):
    """Under a steady stream the service is stopped and comes back with another group, or without one: nothing is lost, though what
    comes while both filters are subscribed may come twice. Then the old filter is gone: what is published later comes once."""
    before, after = CHANGES[change]
    broker = shared_mosquitto()
    running = several(broker, 1, **before)
    with Stream(broker.port, pace=500) as stream:
        stream.wait(200)
        running.stop()
        stream.wait(len(stream.acknowledged) + 500)
        running.settings |= after
        start(running)
        wait_settled_sessions(running)
        stream.wait(len(stream.acknowledged) + 100)
        acknowledged = stream.finish()
    wait_all_stored(collection, acknowledged, running)
    twice = Stored(collection).twice
    publish(broker, 100_000, 300)
    wait_all_stored(collection, set(range(100_000, 100_300)), running)
    running.stop()
    stored = Stored(collection)
    figures(change=change, messages=len(acknowledged), lost=len(stored.missing(acknowledged)), duplicates=stored.twice)
    assert stored.twice == twice, "it is still subscribed to the old filter"
    assert left_at(broker, session_names(running)) == []


def test_mongodb_is_away(several, shared_mosquitto, fresh_mongod):
    """Four connections and no MongoDB: everything is spooled and acknowledged; when MongoDB is back everything is stored."""
    broker, server = shared_mosquitto(), fresh_mongod()
    running = several(broker, 4, server=server)
    server.kill9()
    publish(broker, 0, 5000)
    wait_until(lambda: running.sums()["consumer"]["spooled"] == 5000 and running.sums()["consumer"]["in_flight"] == 0, 20,
               lambda: f"all is spooled: {running.sums()}")
    running.stop()
    assert left_at(broker, session_names(running)) == []
    start(running)
    server.restart()
    wait_until(lambda: running.sums()["consumer"]["recovered_from_spool"] == 5000, 30, lambda: f"all is stored: {running.sums()}")
    publish(broker, 5000, 100)
    wait_until(lambda: running.sums()["consumer"]["stored"] == 5100, 10, lambda: f"all is stored: {running.sums()}")
    running.stop()
    once_each(server.client().mqtt2mongo.messages, range(5100))


@pytest.mark.not_sanitized("it is about moments: a process that is killed has no word with its sanitizer")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("gate", ["closed", "open"])
def test_kill9_with_four_connections(several, shared_mosquitto, fresh_mongod, gate):
    """Fault: SIGKILL at 12 random moments under 3,000 messages a second, with four connections and a MongoDB that fails 3 of 10
    inserts, so that most of the time a batch waits to be tried again: received, not stored.
    Proof: messages come with the DUP flag; and the control, a build that acknowledges before it stores, loses messages.
    Held: nothing acknowledged is missing, and nothing is left in the four sessions."""
    moments, kills = seeded(), 12
    assert GATE_OPEN_BUILD != BUILD
    broker, server = shared_mosquitto(), fresh_mongod()
    running = several(broker, 4, server=server, build=BUILD if gate == "closed" else GATE_OPEN_BUILD, **{"spool.max_size": 0})
    collection = server.client().mqtt2mongo.messages
    server.fail({"activationProbability": 0.3}, ["insert"], errorCode=112, appName="mqtt2mongo")
    with Stream(broker.port, pace=3000) as stream:
        for _ in range(kills):
            time.sleep(moments.uniform(0.05, 0.6) * TIME_FACTOR)
            running.kill9()
            running.start()
        acknowledged = stream.finish()
    running.kill9()
    server.fail("off", ["insert"])
    start(running)
    if gate == "closed":
        wait_all_stored(collection, acknowledged, running, timeout=60)
    running.stop()
    left = left_at(broker, session_names(running))
    stored = Stored(collection)
    missing = stored.missing(acknowledged) - set(left)
    again = sum(document["dup"] for copies in stored.copies.values() for document in copies)
    figures(gate=gate, messages=len(acknowledged), rate=f"{stream.rate:.0f}/s", kills=kills, redelivered=again, lost=len(missing),
            duplicates=stored.twice)
    assert stream.lost == 0
    if gate == "closed":
        assert not missing and not left and again > 0
    else:
        assert missing, "the open gate loses nothing: this test proves nothing"


@pytest.mark.timeout(90)
def test_restart_of_the_broker(several, shared_mosquitto, collection):
    """Fault: the broker is stopped with SIGTERM, which writes everything to disk, and restarted mid-stream, 3 times.
    Proof: publisher and service lose that many connections, and each of the four subscribes anew each time.
    Held: every acknowledged message is in MongoDB, but for those that came when none of the four had subscribed again. mosquitto
    (2.0.21) does not write shared subscriptions to its file, only sessions and what is queued in them; it says in the PUBACK of
    such a message that nobody is subscribed. With a plain subscription there are none, see test_kill.py."""
    broker, restarts = shared_mosquitto(), 3
    running = several(broker, 4)
    line = f"subscribed to {filter_of(running)} at QoS 1"
    with Stream(broker.port, pace=2000) as stream:
        for number in range(restarts):
            stream.wait(len(stream.acknowledged) + 500)
            broker.stop()
            wait_until(lambda: stream.lost == number + 1, what="the publisher notices")
            broker.start()
            wait_until(lambda: running.log.count(line) == 4 * (number + 2), 20, running.tail)
        stream.wait(len(stream.acknowledged) + 500)
        acknowledged = stream.finish()
    wait_all_stored(collection, acknowledged - stream.unheard, running)
    running.stop()
    stored = Stored(collection)
    figures(messages=len(acknowledged), restarts=restarts, given_to_nobody=len(stream.unheard),
            lost=len(stored.missing(acknowledged) - stream.unheard), duplicates=stored.twice)
    assert left_at(broker, session_names(running)) == []


def test_what_is_queued_survives_a_restart_of_the_broker(several, shared_mosquitto, collection):
    """What the broker holds in the sessions of the group when it is restarted is delivered afterwards, each once."""
    broker = shared_mosquitto()
    running = several(broker, 4)
    running.stop()
    publish(broker, 0, 4000)
    broker.restart()
    start(running).wait_stored(4000)
    running.stop()
    once_each(collection, range(4000))


# ---- several services

@pytest.mark.not_sanitized("it is about moments: a process that is killed has no word with its sanitizer")
@pytest.mark.heavy("three services and ten seconds of messages")
@pytest.mark.timeout(120)
def test_three_services_in_a_group(several, shared_mosquitto, fresh_mongod):
    """Fault: of two services in a group one is killed, a third joins, the killed one comes back, is killed twice more and restarted
    at once, the other one is stopped and comes back; all under a steady stream. Inserts are slow, so that a batch is under way
    at most moments, and ids come from the messages, so that what is delivered again is a duplicate.
    Proof: exit by signal 9, and messages come with the DUP flag; the broker has sent some to each session.
    Held: each message that the broker acknowledged to the publisher is in MongoDB exactly once, the sums of each orderly life
    balance, and in the end nothing is left in any of the seven sessions."""
    broker, server = shared_mosquitto(extra=["log_type all"]), fresh_mongod()
    collection = server.client().mqtt2mongo.messages
    server.fail("alwaysOn", ["insert"], blockConnection=True, blockTimeMS=30, appName="mqtt2mongo")
    lives, kills = [], 0

    def member(name, connections):
        return several(broker, connections, server=server, **{
            "mqtt.client_id": name, "consumer.share": "plant", "consumer.id": "topic,/n"})

    def stop(running):
        lives.append(running.stop()["consumer"])
        assert lives[-1]["in_flight"] == lives[-1]["returned"] == 0

    def kill(running):
        running.kill9()
        assert running.popen.returncode == -signal.SIGKILL
        return kills + 1

    one, two = member("one", 2), member("two", 2)
    with Stream(broker.port, pace=1500) as stream:
        def more(count=2000):
            stream.wait(len(stream.acknowledged) + count)

        more()
        kills = kill(two)
        more()
        three = member("three", 3)
        more()
        for _ in range(2):
            start(two)
            more(300)
            kills = kill(two)
        start(two)
        more()
        stop(one)
        more()
        start(one)
        more()
        acknowledged = stream.finish()
    everybody = (one, two, three)
    wait_all_stored(collection, acknowledged, *everybody)
    for each in everybody:
        stop(each)
    names = [name for each in everybody for name in session_names(each)]
    left, stored, taken = left_at(broker, names), Stored(collection), taken_by(broker)
    redelivered, duplicates = (sum(life[term] for life in lives) for term in ("redelivered", "duplicates"))
    figures(messages=len(acknowledged), rate=f"{stream.rate:.0f}/s", services=3, sessions=len(names), lives=len(lives) + kills,
            kills=kills, lost=len(stored.missing(acknowledged)), redelivered=redelivered, duplicates=duplicates)
    once_each(collection, acknowledged)
    assert left == [] and stream.lost == 0
    assert redelivered > 0 and redelivered >= duplicates
    assert set(taken) >= set(names) and min(taken[name] for name in names) > 100, taken
    assert sum(life["stored"] for life in lives) <= stored.documents


@pytest.mark.not_sanitized("it is about moments")
@pytest.mark.timeout(90)
def test_a_group_that_comes_and_goes(several, shared_mosquitto, collection):
    """Fault: under a steady stream all of a group are killed and started again, 8 times, so that messages come when no member is
    there, or when one has connected and not yet subscribed: the moment at which mosquitto before 2.0.12 gave them to nobody.
    Held: nothing acknowledged is missing."""
    moments, kills = seeded(), 8
    broker = shared_mosquitto()
    running = several(broker, 2, **{"consumer.share": "plant"})
    with Stream(broker.port, pace=2000) as stream:
        for _ in range(kills):
            time.sleep(moments.uniform(0.05, 0.3) * TIME_FACTOR)
            running.kill9()
            time.sleep(moments.uniform(0.0, 0.2) * TIME_FACTOR)
            start(running)
        acknowledged = stream.finish()
    wait_all_stored(collection, acknowledged, running)
    running.stop()
    figures(messages=len(acknowledged), kills=kills, lost=0, duplicates=Stored(collection).twice)
    assert left_at(broker, session_names(running)) == [] and stream.lost == 0


# ---- brokers that do not share, or not well

def test_a_broker_before_2_0_12(several, mosquitto, collection):
    """The installed mosquitto, where it is such a one: the service warns of it, and while it is connected nothing is lost. Without
    shared subscriptions there is nothing to warn of."""
    broker = mosquitto(extra=["sys_interval 1"])
    if broker.version >= SHARES:
        pytest.skip("the installed mosquitto is not older than 2.0.12")
    running = several(broker, 2)
    running.wait_log(r"this broker is mosquitto version 2\.0\.\d+: before 2\.0\.12, unless patched, it loses messages of shared")
    publish(broker, 0, 3000)
    running.wait_stored(3000)
    running.settings |= {"consumer.connections": 1, "http.listen": f"127.0.0.1:{free_port()}"}
    mark = running.mark()
    running.stop()
    start(running)
    wait_settled_sessions(running)
    running.stop()
    assert "shared subscriptions" not in running.log[mark:]
    once_each(collection, range(3000))


def test_a_broker_from_2_0_12_on_is_not_warned_of(several, shared_mosquitto):
    broker = shared_mosquitto(extra=["sys_interval 1"])
    with clients.Subscriber(broker.port, "$SYS/broker/version", qos=0) as version:
        version.wait(1)
        running = several(broker, 2)
        wait_until(lambda: f"as {CLIENT}-sys" in broker.log, what="the service asks for the version")
        publish(broker, 0, 100)
        running.wait_stored(100)
    running.stop()
    assert not [record for record in running.records if record["level"] in ("warn", "error")], running.log


NO_SHARES = "the broker takes no shared subscriptions: set consumer.connections 1 and no consumer.share, or use another broker"


def _takes_no_shares(connack, reason):
    """A broker that answers CONNECT with `connack`, and each SUBSCRIBE with `reason`."""
    def behave(connection, _ending):
        if connection.recv(4096):
            connection.sendall(connack)
        while data := connection.recv(4096):
            while data and data[0] == 0x82:
                length, identifier = data[1], data[2:4]  # all are short: one byte of length
                connection.sendall(b"\x90\x04" + identifier + b"\x00" + bytes([reason]))
                data = data[2 + length:]

    return behave


@pytest.mark.parametrize("connack, reason", [(b"\x20\x05\x00\x00\x02\x2a\x00", 0x01), (b"\x20\x03\x00\x00\x00", 0x9e)],
                         ids=["CONNACK", "SUBACK"])
def test_a_broker_without_shared_subscriptions(service, mongod, database, connack, reason):
    """One that says so in CONNACK (property 0x2A), or in SUBACK (0x9E): an error that names the remedy, once, while the service
    tries again; and it can be stopped."""
    with peers.Peer(_takes_no_shares(connack, reason)) as broker:
        running = service(broker=broker, mongod=mongod, database=database, settings=QUICK | {"consumer.share": "g"})
        running.wait_log(re.escape(NO_SHARES))
        wait_until(lambda: len(broker.accepted) >= 6, 10, "it tries again")
        running.stop()
    errors = [record["message"] for record in running.records if record["level"] == "error"]
    assert len(errors) == 1 and NO_SHARES in errors[0], errors
    assert "subscribed to $share" not in running.log


@pytest.mark.parametrize("arguments, words", [
    (["--consumer-connections", "0"], ["--consumer-connections", "0", "1 to 64"]),
    (["--consumer-connections", "65"], ["--consumer-connections", "65", "1 to 64"]),
    (["--consumer-connections", "x"], ["--consumer-connections", "x"]),
    (["--consumer-share", "a/b"], ["--consumer-share", "holds no / + #"]),
    (["--consumer-share", "a+"], ["--consumer-share", "holds no / + #"]),
    (["--consumer-share", "#"], ["--consumer-share", "holds no / + #"]),
    (["--consumer-share", ""], ["--consumer-share", "empty"]),
    (["--consumer-topic", "$share/g/a"], ["--consumer-topic", "consumer.share"]),
    (["--consumer-topic", "$share/g/a", "--consumer-share", "h"], ["--consumer-topic", "consumer.share"]),
    (["--consumer-topic", "$share/g/a", "--consumer-connections", "2"], ["--consumer-topic", "consumer.share"]),
    (["--consumer-connections", "2", "--mqtt-client-id", "plant/7"],
     ["--consumer-connections", "mqtt.client_id", "consumer.share"]),
    (["--consumer-connections", "2", "--consumer-qos", "0"], ["--consumer-connections", "consumer.qos 0"]),
])
def test_bad_input(arguments, words):
    """Exit status 2, and an error that names the setting and what is wrong with it."""
    status, output, errors = run("--role", "consumer", *arguments)
    assert (status, output) == (2, "")
    assert all(word in errors for word in words), errors
