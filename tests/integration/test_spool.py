"""The spool in the life of a service: what MongoDB does not take is kept on disk, acknowledged, and stored when MongoDB is back.
What survives which fault is shown in tests/fault."""

import datetime
import json
import sqlite3
import time

import pytest

import clients
from processes import wait_until

pytestmark = pytest.mark.threads
CLIENT = "under-test"
SESSION = f"{CLIENT}-1"
QUICK = {"mqtt.client_id": CLIENT, "mqtt.reconnect.min": "100ms", "mqtt.reconnect.max": "500ms"}


def payloads(count, first=0):
    return [b'{"n": %d}' % number for number in range(first, first + count)]


def consumer(service, broker, server, **settings):
    running = service(broker=broker, mongod=server, settings=QUICK | settings)
    running.wait_log("subscribed to sensors/#")
    return running


def numbers(server):
    return sorted(document["payload"]["n"] for document in server.client().mqtt2mongo.messages.find({}, {"payload": 1}))


def wait_spooled(running, count):
    def enough():
        sums = running.sums()["consumer"]
        return sums if sums["spooled"] >= count and sums["in_flight"] == 0 else None

    return wait_until(enough, 30, lambda: f"{count} messages in the spool: {running.printed_sums[-1:]}\n{running.tail()}",
                      interval=0.1)


def in_spool(running):
    path = running.state / "spool.db"
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as spool:
        return spool.execute("select count(*) from message").fetchone()[0]


def test_an_outage_is_spooled_and_drained(service, mosquitto, fresh_mongod):
    """All is acknowledged while MongoDB is away, said once with the size, and drained with the time of receipt; each message once."""
    broker, server = mosquitto(), fresh_mongod()
    running = consumer(service, broker, server)
    server.kill9()
    begun = datetime.datetime.now(datetime.timezone.utc)
    assert len(clients.publish(broker.port, payloads(3000))) == 3000
    ended = datetime.datetime.now(datetime.timezone.utc)
    sums = wait_spooled(running, 3000)
    assert sums["stored"] == 0 and in_spool(running) == 3000
    time.sleep(1)  # so that the time of storing is another than that of receipt
    server.restart()
    running.wait_stored(3000)
    running.wait_log("empty: MongoDB has every message of it")
    assert in_spool(running) == 0
    sums = running.stop()["consumer"]
    assert sums["recovered_from_spool"] == sums["spooled"] == sums["stored"] == 3000
    assert numbers(server) == list(range(3000)) and clients.take_session(broker.port, SESSION) == []
    latest = server.client().mqtt2mongo.messages.find_one(sort=[("received_at", -1)])["received_at"]
    slack = datetime.timedelta(seconds=0.5)
    assert begun - slack < latest.replace(tzinfo=datetime.timezone.utc) < ended + slack
    assert sum("holds " in record["message"] for record in running.records) == 1


def test_what_is_in_the_spool_survives_a_restart(service, mosquitto, fresh_mongod):
    broker, server = mosquitto(), fresh_mongod()
    running = consumer(service, broker, server)
    server.kill9()
    clients.publish(broker.port, payloads(500) + [b"no JSON", b"\xff"])
    wait_spooled(running, 502)
    first = running.stop(timeout=9)["consumer"]  # an attempt under way is waited for, but no other is begun
    assert first["spooled"] == 502 and first["recovered_from_spool"] == first["returned"] == 0
    running.start()  # MongoDB is still away
    running.wait_log("holds 502 messages")
    clients.publish(broker.port, payloads(100, 500))
    wait_spooled(running, 100)
    running.kill9()
    server.restart()
    running.start()
    running.wait_stored(600)
    wait_until(lambda: running.sums()["consumer"]["recovered_from_spool"] == 602, what="the spool is empty")
    last = running.stop()["consumer"]
    assert last["stored"] == 600 and last["dead_lettered"] == 2
    assert numbers(server) == list(range(600)) and in_spool(running) == 0
    letters = [bytes(letter["payload"]) for letter in server.client().mqtt2mongo.dead_letter.find()]
    assert sorted(letters) == [b"no JSON", b"\xff"]


def test_a_frozen_mongodb_costs_the_broker_nothing(service, mosquitto, fresh_mongod):
    """An overdue attempt goes on while its messages are spooled and acknowledged; when it succeeds after all, the drain meets its
    documents: each is there once and counted once."""
    broker, server = mosquitto(), fresh_mongod()
    running = consumer(service, broker, server)
    clients.publish(broker.port, payloads(100))
    running.wait_stored(100)
    server.sigstop()
    clients.publish(broker.port, payloads(900, 100))
    sums = wait_spooled(running, 900)
    assert sums["stored"] == 100 and sums["returned"] == 0
    server.sigcont()
    running.wait_stored(1000)
    running.wait_log("empty: MongoDB has every message of it")
    sums = running.stop()["consumer"]
    assert sums["stored"] == 1000 and sums["recovered_from_spool"] == 900 and sums["duplicates"] == sums["redelivered"] == 0
    assert numbers(server) == list(range(1000))


def test_single_documents_that_fail_do_not_stop_the_others(service, mosquitto, fresh_mongod):
    """A dead letter that MongoDB refuses stays in the spool, tried again and again; what comes behind it is stored."""
    broker, server = mosquitto(), fresh_mongod()
    database = server.client().mqtt2mongo
    database.create_collection("dead_letter", validator={"never": {"$exists": True}})
    running = consumer(service, broker, server)
    clients.publish(broker.port, [b"poison", *payloads(50)])
    running.wait_stored(50)
    wait_spooled(running, 1)
    clients.publish(broker.port, payloads(50, 50))
    running.wait_stored(100)
    running.wait_log("has the collection consumer.dead_letter a validator")
    assert in_spool(running) == 1
    database.command("collMod", "dead_letter", validator={})
    wait_until(lambda: running.sums()["consumer"]["dead_lettered"] == 1, 20, "the dead letter is stored")
    sums = running.stop()["consumer"]
    assert sums["recovered_from_spool"] == sums["spooled"] >= 1 and in_spool(running) == 0
    assert numbers(server) == list(range(100))


def test_linger_lets_messages_share_a_commit(service, mosquitto, fresh_mongod):
    """With spool.linger single messages wait for others: far fewer batches, and nothing is kept back."""
    broker, server = mosquitto(), fresh_mongod()
    lives = {}
    for linger in ("0s", "1s"):
        running = service(broker=broker, mongod=server, settings=QUICK | {"spool.linger": linger})
        running.wait_log("subscribed to sensors/#")
        server.kill9()
        clients.publish(broker.port, payloads(1))
        wait_spooled(running, 1)
        begun = time.monotonic()
        clients.publish(broker.port, payloads(100), pace=50, window=1000)
        wait_spooled(running, 101)
        lives[linger] = time.monotonic() - begun
        path = running.state / "spool.db-wal"
        lives[linger, "wal"] = path.stat().st_size
        server.restart()
        running.wait_log("empty: MongoDB has every message of it", timeout=30)
        running.stop()
    print(lives)
    assert lives["1s", "wal"] < lives["0s", "wal"] / 2
    assert len(numbers(server)) == 202


def test_linger_is_for_bursts_as_well(service, mosquitto, fresh_mongod):
    """Sensors that report together, each second: with spool.linger bursts share a write to flash memory, too."""
    broker, server = mosquitto(), fresh_mongod()
    running = service(broker=broker, mongod=server, settings=QUICK | {"mqtt.keepalive": "60s", "spool.linger": "10s"})
    running.wait_log("subscribed to sensors/#")
    server.kill9()
    clients.publish(broker.port, payloads(1))
    wait_spooled(running, 1)
    for burst in range(6):
        clients.publish(broker.port, payloads(10, 1 + 10 * burst))
        time.sleep(0.3)
        assert running.sums()["consumer"]["spooled"] == 1
    server.restart()
    running.wait_log("empty: MongoDB has every message of it", timeout=30)
    running.wait_stored(61)
    running.stop()


def test_two_services_need_two_spools(service, mosquitto, mongod, database, tmp_path):
    broker = mosquitto()
    settings = {"spool.path": tmp_path / "spool.db"}
    first = service(broker=broker, mongod=mongod, database=database, settings=settings)
    first.wait_log("subscribed to")
    second = service(broker=broker, mongod=mongod, database=database, settings=settings)
    second.finish(expect=1)
    said = [record["message"] for record in second.records if record["level"] == "error"]
    assert str(first.pid) in said[0] and str(tmp_path / "spool.db") in said[0] and "spool.path" in said[0], said
    first.stop()


@pytest.mark.parametrize("size", ["0", "1GiB"])
def test_without_a_spool_there_is_no_file(service, mosquitto, mongod, database, size):
    running = service(broker=mosquitto(), mongod=mongod, database=database, settings={"spool.max_size": size})
    running.wait_log("subscribed to")
    assert (running.state / "spool.db").exists() == (size != "0")
    running.stop()


def test_the_status_line_tells_the_size(service, mosquitto, fresh_mongod):
    broker, server = mosquitto(), fresh_mongod()
    running = consumer(service, broker, server, **{"log.status": "on", "log.format": "json"})
    server.kill9()
    clients.publish(broker.port, payloads(200))
    wait_spooled(running, 200)
    running.wait_log(r"spooling, MongoDB does not answer.*200 in the spool \(\d+\.\d MiB\)")
    assert json.loads(running.log.splitlines()[-1])
    running.stop(timeout=20)
