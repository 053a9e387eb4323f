"""Killed, stopped and restarted at any moment: what the broker has acknowledged to its publisher is in MongoDB in the end.

Real servers, and an independent publisher (paho) that goes on all the while and knows which messages the broker took. Each test
states the fault, the proof that it happened, and what is held against the publisher's list; it prints the figures (pytest -rP).

MQTT2MONGO_TEST_SEED repeats the random moments of an earlier run as far as the machine allows.
"""

import bisect
import datetime
import json
import signal
import time

import pytest

import clients
from processes import TIME_FACTOR, wait_until
from service import BUILD, GATE_OPEN_BUILD
from stream import CLIENT, END, SESSION, Stored, Stream, content_of, figures, seeded, topic_of

pytestmark = pytest.mark.not_sanitized("it is about moments: a process that is killed has no word with its sanitizer")
QUICK = {"mqtt.client_id": CLIENT, "mqtt.reconnect.min": "100ms", "mqtt.reconnect.max": "500ms"}


def wall_time(document):
    return document["received_at"].replace(tzinfo=datetime.timezone.utc).timestamp()


def settle(running, broker, collection):
    """Nothing is published any more: let the service store all that the broker still has, which a last message shows, and stop
    it. Its sums, and the numbers of what the session still holds, which nobody has acknowledged."""
    assert clients.publish(broker.port, ['"end"'], END)
    wait_until(lambda: collection.find_one({"topic": END}), 60,
               lambda: f"the last message is stored\n{running.tail()}", interval=0.2)
    sums = running.stop()
    assert sums["consumer"]["in_flight"] == 0
    return sums, {json.loads(message.payload)["n"] for message in clients.take_session(broker.port, SESSION)
                  if message.topic != END}


def consumer(service, broker, mongod, database="mqtt2mongo", build=None, **settings):
    """A running service that has subscribed: from now on nothing that is published escapes."""
    running = service(broker=broker, mongod=mongod, database=database, build=build, settings=QUICK | settings)
    running.wait_log("subscribed to sensors/#")
    return running


def kill_at_random_moments(running, stream, moments, kills, messages):
    """Kill and restart at once, `kills` times; the stream lives on until it has `messages`. The times of the kills."""
    times = []
    for _ in range(kills):
        time.sleep(moments.uniform(0.02, 0.8) * TIME_FACTOR)
        assert running.alive, running.tail()
        running.kill9()
        times.append(time.time())
        running.start()
    stream.wait(messages)
    return times


def hits(stored, times):
    """The kills that hit stored but unacknowledged messages, and those that the broker answered with redeliveries: the first are
    those after which a message that was stored already was received and stored once more; the others those after which
    messages came with the DUP flag. A kill when no batch was under way is in neither."""
    def kill_before(document):
        return bisect.bisect(times, wall_time(document)) - 1

    twice = {kill_before(document) for copies in stored.copies.values() for document in copies[1:]}
    again = {kill_before(document) for copies in stored.copies.values() for document in copies if document["dup"]}
    return twice, again


@pytest.mark.timeout(240)
@pytest.mark.parametrize("interval", ["0s", "20ms"])
def test_kill9_of_the_service_loses_nothing(service, mosquitto, fresh_mongod, interval):
    """Fault: SIGKILL at 50 random moments, restarted at once, under 3,000 messages a second.
    Proof: after at least 20 of the kills a message that MongoDB had already came and was stored again, so its batch was
    with a worker when the kill came: stored, not acknowledged. (With an interval a batch fills for most of the time, and inserts
    are slowed down so that there are as many such moments.)
    Held: each message that the broker acknowledged to the publisher is in MongoDB, and nothing is left in the session."""
    moments = seeded()
    broker, server = mosquitto(), fresh_mongod()
    running = consumer(service, broker, server, **{"consumer.batch.interval": interval})
    collection = server.client().mqtt2mongo.messages
    if interval != "0s":
        server.fail("alwaysOn", ["insert"], blockConnection=True, blockTimeMS=30, appName="mqtt2mongo")
    with Stream(broker.port, pace=3000) as stream:
        times = kill_at_random_moments(running, stream, moments, kills=50, messages=50_000)
        acknowledged = stream.finish()
    _, left = settle(running, broker, collection)
    stored = Stored(collection)
    twice, again = hits(stored, times)
    missing = stored.missing(acknowledged)
    figures(messages=len(acknowledged), rate=f"{stream.rate:.0f}/s", kills=len(times), hit_a_stored_batch=len(twice),
            redelivered_after=len(again), lost=len(missing), duplicates=stored.twice)
    assert not missing, f"{len(missing)} messages are lost, such as {sorted(missing)[:5]}"
    assert not left, f"{len(left)} messages still wait in the session"
    assert stream.lost == 0 and len(acknowledged) >= 50_000 and len(times) >= 25
    assert stream.rate >= 2000
    assert len(twice) >= 20 and -1 not in twice and -1 not in again


@pytest.mark.timeout(120)
@pytest.mark.parametrize("gate", ["closed", "open"])
def test_kill9_while_batches_wait_for_another_attempt(service, mosquitto, fresh_mongod, gate):
    """Fault: SIGKILL at 30 random moments under 3,000 messages a second, with a MongoDB that fails 3 of 10 inserts
    (WriteConflict), so that most of the time a batch waits to be tried again: received, not stored.
    Proof: after at least 20 of the kills the broker delivers messages again; and the control loses them.
    Held: nothing acknowledged is missing. The control is a build that acknowledges before it stores: under the same kills
    it loses messages, so the kill tests can fail."""
    moments = seeded()
    assert GATE_OPEN_BUILD != BUILD
    broker, server = mosquitto(), fresh_mongod()
    running = consumer(service, broker, server, build=BUILD if gate == "closed" else GATE_OPEN_BUILD,
                       **{"spool.max_size": 0})
    collection = server.client().mqtt2mongo.messages
    server.fail({"activationProbability": 0.3}, ["insert"], errorCode=112, appName="mqtt2mongo")
    with Stream(broker.port, pace=3000) as stream:
        times = kill_at_random_moments(running, stream, moments, kills=30, messages=20_000)
        acknowledged = stream.finish()
    _, left = settle(running, broker, collection)
    stored = Stored(collection)
    twice, again = hits(stored, times)
    missing = stored.missing(acknowledged)
    figures(gate=gate, messages=len(acknowledged), rate=f"{stream.rate:.0f}/s", kills=len(times), hit_a_stored_batch=len(twice),
            redelivered_after=len(again), lost=len(missing), duplicates=stored.twice)
    assert not left, f"{len(left)} messages still wait in the session"
    assert stream.lost == 0 and stream.rate >= 2000
    if gate == "closed":
        assert not missing, f"{len(missing)} messages are lost, such as {sorted(missing)[:5]}"
        assert len(again) >= 20
    else:
        assert len(missing) > 0, "the open gate loses nothing: the kill tests prove nothing"


@pytest.mark.timeout(180)
def test_kill9_of_mongod(service, mosquitto, fresh_mongod):
    """Fault: SIGKILL of mongod mid-stream, 4 times, restarted on its data.
    Proof: the service complains and then says that MongoDB answers again, each time.
    Held: nothing acknowledged is missing; nothing is stored twice either, for the batch is held and tried again under its ids
    on a connection that is never given up; the service is the same process all along, its sums add up, it exits with 0."""
    moments = seeded()
    broker, server = mosquitto(), fresh_mongod()
    running = consumer(service, broker, server)
    collection = server.client().mqtt2mongo.messages
    pid, kills = running.pid, 4
    with Stream(broker.port, pace=1000) as stream:
        for _ in range(kills):
            stream.wait(len(stream.acknowledged) + moments.randrange(200, 1500))
            mark = running.mark()
            server.kill9()
            running.wait_log(r"MongoDB.*(is mongod running|[Ff]ailed|refused|hung up|error)", after=mark)
            server.restart()
            running.wait_log("MongoDB answers again", timeout=30, after=mark)
        acknowledged = stream.finish()
    assert running.pid == pid and running.alive
    sums, left = settle(running, broker, collection)
    stored = Stored(collection)
    missing = stored.missing(acknowledged)
    figures(messages=len(acknowledged), kills=kills, lost=len(missing), duplicates=stored.twice,
            returned=sums["consumer"]["returned"])
    assert not missing and not left
    assert stored.twice == 0 and sums["consumer"]["returned"] == 0
    assert sums["consumer"]["stored"] == stored.documents + 1  # the last message


def saved_at(broker):
    """When the broker last wrote its sessions to disk. It has one thread: what it had acknowledged before is in there."""
    file = broker.directory / "mosquitto.db"
    return file.stat().st_mtime if file.exists() else 0


def wait_saved(broker, since):
    """Wait until the broker has written its sessions later than `since`; a retained message of our own makes it do so."""
    def saved():
        clients.publish(broker.port, 1, "nudge", retain=True)
        return saved_at(broker) > since

    wait_until(saved, what="the broker saves its sessions")


@pytest.mark.timeout(180)
def test_kill9_of_the_broker(service, mosquitto, mongod, database, collection):
    """Fault: SIGKILL of a broker that writes its sessions to disk every 20 changes, 6 times mid-stream, restarted.
    Proof: the publisher and the service lose that many connections, the service subscribes anew each time.
    Held: what the broker had acknowledged before its last write is in MongoDB. What it acknowledged after that is on no
    disk when it is killed, so it may be missing, and nothing else may."""
    moments = seeded()
    broker = mosquitto(autosave=20)
    running = consumer(service, broker, mongod, database)
    wait_saved(broker, time.time())  # the session too
    unsaved, kills = set(), 6
    with Stream(broker.port, pace=500) as stream:
        for number in range(kills):
            stream.wait(len(stream.acknowledged) + moments.randrange(50, 600))
            mark = running.mark()
            broker.kill9()
            wait_until(lambda: stream.lost == number + 1, what="the publisher notices")
            unsaved |= {each for each, when in stream.acknowledged.copy().items() if when > saved_at(broker)}
            broker.restart()
            running.wait_log("subscribed to sensors/#", timeout=20, after=mark)
        stream.wait(len(stream.acknowledged) + 200)
        acknowledged = stream.finish()
    sums, left = settle(running, broker, collection)
    stored = Stored(collection)
    missing = stored.missing(acknowledged)
    figures(messages=len(acknowledged), kills=kills, acknowledged_after_the_last_save=len(unsaved),
            lost_by_the_broker=len(missing), lost=len(missing - unsaved), duplicates=stored.twice,
            returned=sums["consumer"]["returned"])
    assert not missing - unsaved and not left
    assert running.log.count("subscribed to sensors/#") == kills + 1


@pytest.mark.timeout(120)
def test_kill9_of_the_broker_with_everything_saved(service, mosquitto, mongod, database, collection):
    """Fault: SIGKILL of a broker with 2,000 messages that the service has not taken, for it is frozen; 3 times.
    Proof: the broker's last write to disk is later than its last acknowledgement, none of the messages was stored before.
    Held: every acknowledged message is in MongoDB, without exception."""
    broker = mosquitto(autosave=50)
    running = consumer(service, broker, mongod, database)
    acknowledged, kills = set(), 3
    for number in range(kills):
        running.sigstop()
        payloads = [json.dumps(content_of(each)) for each in range(number * 2000, (number + 1) * 2000)]
        taken = {json.loads(each)["n"] for each in clients.publish(
            broker.port, payloads, lambda index, first=number * 2000: topic_of(first + index))}
        assert len(taken) == 2000 and not collection.find_one({"payload.n": {"$in": list(taken)}})
        wait_saved(broker, time.time())
        mark = running.mark()
        broker.kill9()
        broker.restart()
        running.sigcont()
        running.wait_log("subscribed to sensors/#", timeout=20, after=mark)
        acknowledged |= taken
        wait_until(lambda: not Stored(collection).missing(acknowledged), 30,
                   lambda: f"{len(Stored(collection).missing(acknowledged))} messages are missing", interval=0.2)
    _, left = settle(running, broker, collection)
    stored = Stored(collection)
    figures(messages=len(acknowledged), kills=kills, lost=len(stored.missing(acknowledged)), duplicates=stored.twice)
    assert not stored.missing(acknowledged) and not left


@pytest.mark.timeout(120)
def test_restart_of_the_broker(service, mosquitto, mongod, database, collection):
    """Fault: the broker is stopped with SIGTERM, which writes everything to disk, and restarted mid-stream, 4 times.
    Proof: publisher and service lose that many connections, the service subscribes anew each time.
    Held: every acknowledged message is in MongoDB, without exception."""
    moments = seeded()
    broker = mosquitto()
    running = consumer(service, broker, mongod, database)
    restarts = 4
    with Stream(broker.port, pace=2000) as stream:
        for number in range(restarts):
            stream.wait(len(stream.acknowledged) + moments.randrange(200, 3000))
            mark = running.mark()
            broker.stop()
            wait_until(lambda: stream.lost == number + 1, what="the publisher notices")
            broker.start()
            running.wait_log("subscribed to sensors/#", timeout=20, after=mark)
        stream.wait(len(stream.acknowledged) + 200)
        acknowledged = stream.finish()
    sums, left = settle(running, broker, collection)
    stored = Stored(collection)
    missing = stored.missing(acknowledged)
    figures(messages=len(acknowledged), restarts=restarts, lost=len(missing), duplicates=stored.twice,
            returned=sums["consumer"]["returned"])
    assert not missing and not left
    assert running.log.count("subscribed to sensors/#") == restarts + 1


@pytest.mark.timeout(120)
def test_sigterm_under_load(service, mosquitto, mongod, database, collection):
    """Fault: SIGTERM (every other time SIGINT) under 2,500 messages a second at 8 random moments, restarted at once.
    Proof: each life has received messages, and the stream went on.
    Held: exit status 0 within the shutdown time, nothing in flight at the end, all that was received was stored; nothing is
    missing in the end, and nothing is stored twice: what a clean stop has stored it has acknowledged."""
    moments = seeded()
    broker = mosquitto()
    running = consumer(service, broker, mongod, database)
    lives = []
    with Stream(broker.port, pace=2500) as stream:
        for number in range(8):
            received = stream.sent
            stream.wait(received + moments.randrange(300, 2000))
            if number % 2:
                running.signal(signal.SIGINT)
                sums = running.finish(timeout=5)
            else:
                sums = running.stop(timeout=5)
            lives.append(sums["consumer"])
            running.start()
        acknowledged = stream.finish()
    sums, left = settle(running, broker, collection)
    lives.append(sums["consumer"])
    stored = Stored(collection)
    missing = stored.missing(acknowledged)
    figures(messages=len(acknowledged), rate=f"{stream.rate:.0f}/s", stops=len(lives) - 1, lost=len(missing),
            duplicates=stored.twice, redelivered=sum(life["redelivered"] for life in lives),
            returned=sum(life["returned"] for life in lives))
    assert not missing and not left
    for life in lives:
        assert life["received"] > 0 and life["received"] == life["stored"] and life["in_flight"] == 0, life
    assert stored.twice == 0, "a clean stop left messages unacknowledged that it had stored"
    assert sum(life["stored"] for life in lives) == stored.documents + 1  # the last message


@pytest.mark.timeout(90)
def test_sigterm_with_a_slow_broker(service, mosquitto, mongod, database, collection):
    """Fault: SIGTERM while a broker that writes its whole state with every change is seconds behind with reading.
    Proof: ending takes longer than a second, and less than shutdown_timeout.
    Held: what was stored is acknowledged: closing earlier would reset the connection and destroy PUBACKs on their way."""
    broker = mosquitto(autosave=1)
    clients.create_session(broker.port, SESSION, "sensors/#")
    clients.publish(broker.port, [json.dumps(content_of(number)) for number in range(3000)], topic_of)
    running = consumer(service, broker, mongod, database, **{"shutdown_timeout": "45s"})
    running.wait_stored(1500)
    begun = time.monotonic()
    sums = running.stop(timeout=50)["consumer"]
    took = time.monotonic() - begun
    left = {json.loads(message.payload)["n"] for message in clients.take_session(broker.port, SESSION, quiet=3)}
    twice = left & Stored(collection).copies.keys()
    figures(stored=sums["stored"], left=len(left), stored_and_left=len(twice), exit_after=f"{took:.1f} s")
    assert took > 1, "the broker was not slow"
    assert not twice and sums["stored"] + len(left) == 3000


@pytest.mark.timeout(90)
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_exits_at_once(service, mosquitto, fresh_mongod, second):
    """Fault: SIGTERM while MongoDB is frozen and a batch waits for it, and a second signal behind it.
    Proof: the service is still there a while after the first signal, with messages in flight.
    Held: it exits with 1 within a second of the second signal, far below shutdown_timeout (60 s); nothing was acknowledged, and
    everything is stored by the next start."""
    broker, server = mosquitto(), fresh_mongod()
    running = consumer(service, broker, server, **{"shutdown_timeout": "60s", "spool.max_size": 0})
    collection = server.client().mqtt2mongo.messages
    server.sigstop()
    with Stream(broker.port, pace=1000) as stream:
        stream.wait(500)
        acknowledged = stream.finish()
    wait_until(lambda: running.sums()["consumer"]["in_flight"] > 0, what="a batch is under way")
    running.signal(signal.SIGTERM)
    running.wait_log("SIGTERM: stopping")
    in_flight = running.sums()["consumer"]["in_flight"]
    assert in_flight > 0 and running.alive
    begun = time.monotonic()
    running.signal(second)
    running.finish(expect=1, timeout=5, sums=False)
    took = time.monotonic() - begun
    assert "second signal" in running.log
    server.sigcont()
    running.start()
    wait_until(lambda: not Stored(collection).missing(acknowledged), 30, "everything is stored", interval=0.2)
    _, left = settle(running, broker, collection)
    figures(messages=len(acknowledged), in_flight=in_flight, exit_after=f"{took * 1000:.0f} ms", lost=0,
            duplicates=Stored(collection).twice)
    assert took < 1 * TIME_FACTOR and not left
