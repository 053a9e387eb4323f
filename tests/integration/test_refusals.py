"""One bad message, one place that refuses, never stops the next: what MongoDB does not take concerns the messages it is about, whatever
the reply looks like."""

import json
import re
import time

import pymongo
import pytest

import clients
from peers import Altering
from processes import wait_until
from test_ids import only, wait_settled
from test_replay import refuse_all
from test_spool import QUICK, in_spool, wait_spooled

SECRET = "hush-4713"


def started(service, broker, server, **settings):
    running = service(broker=broker, mongod=server, settings=QUICK | settings)
    running.wait_log("subscribed to")
    return running


def sized(identity, size, **fields):
    """A JSON object with that id, about `size` bytes long."""
    return json.dumps({"id": identity, **fields, "text": "x" * size}).encode()


def bad(count):
    return [b"no JSON %d" % number for number in range(count)]


def good(count, first=0):
    return [b'{"n": %d}' % number for number in range(first, first + count)]


# --- many dead letters and an _id that is taken, in one reply -------------------------------------------------------------


@pytest.mark.parametrize("size", [1200, 1500, 2000])
def test_dead_letters_and_taken_ids_of_one_reply(service, mosquitto, fresh_mongod, size):
    """More than 4 MiB of dead letters come up in one reply that also says that an _id is taken: each message is what it is."""
    broker, server = mosquitto(), fresh_mongod()
    database = server.client().mqtt2mongo
    database.create_collection("messages", validator={"payload.bad": {"$exists": False}})
    running = started(service, broker, server, **{
        "consumer.id": '["/id"]', "consumer.batch.count": 16384, "consumer.batch.bytes": "128MiB"})
    clients.publish(broker.port, [sized(7, size)])
    running.wait_stored(1)
    server.stop()
    clients.publish(broker.port, [
        *(sized(1000 + number, size) for number in range(300)), sized(7, size),
        *(sized(10000 + number, size, bad=1) for number in range(3400)), *(sized(2000 + number, size) for number in range(300))])
    wait_spooled(running, 4001)
    running.kill9()
    server.restart()
    running.start()  # and reads all of them as one batch
    sums = wait_settled(running, 4001)
    only(sums, stored=600, duplicates=1, dead_lettered=3400)
    assert running.stop()["consumer"]["dead_lettered_by_reason"] == {"refused_by_mongodb": 3400}
    assert database.messages.count_documents({}) == 601 and database.dead_letter.count_documents({}) == 3400
    assert {letter["topic"] for letter in database.dead_letter.find({}, {"topic": 1})} == {"sensors/test"}


# --- one collection that refuses -------------------------------------------------------------------------------------------


def writer(server, *collections):
    """A user who may insert into these collections and no others; a URI."""
    privileges = [{"resource": {"db": "mqtt2mongo", "collection": name}, "actions": ["insert", "find", "createCollection"]}
                  for name in collections]
    admin = server.client().admin
    admin.command("createRole", "some", privileges=privileges, roles=[])
    admin.command("createUser", "writer", pwd=SECRET, roles=["some"])
    return server.uri.replace(f"{server.USER}:{server.PASSWORD}@", f"writer:{SECRET}@") + "&authSource=admin"


def grant_all(server):
    server.client().admin.command("grantRolesToUser", "writer", roles=[{"role": "readWrite", "db": "mqtt2mongo"}])


def test_no_right_to_the_dead_letters(service, mosquitto, fresh_mongod):
    """The bad message waits in the spool, all others are stored; it leaves as soon as the right is there."""
    broker, server = mosquitto(), fresh_mongod(auth=True)
    running = started(service, broker, server, **{"mongodb.uri": writer(server, "messages")})
    clients.publish(broker.port, [*good(20), *bad(1), *good(20, 20)])
    sums = running.wait_stored(40)["consumer"]
    clients.publish(broker.port, good(1000, 40))
    sums = running.wait_stored(1040)["consumer"]
    wait_spooled(running, 1)
    assert sums["dead_lettered"] == 0 and in_spool(running) == 1
    said = running.wait_log("cannot store in MongoDB: not authorized.*in the collection dead_letter.*needs the role readWrite")
    assert "does not answer" not in running.log, said
    time.sleep(1.2)  # what a collection refuses for less is not worth a line when it is over
    grant_all(server)
    running.wait_log("empty: MongoDB has every message of it")
    running.wait_log("MongoDB takes documents again in the collection dead_letter")
    sums = running.stop()["consumer"]
    assert sums["stored"] == 1040 and sums["dead_lettered"] == 1 and sums["spooled"] == sums["recovered_from_spool"] == 1
    assert SECRET not in running.log


def test_no_right_to_the_messages(service, mosquitto, fresh_mongod):
    """The other way round: dead letters are written, documents wait."""
    broker, server = mosquitto(), fresh_mongod(auth=True)
    running = started(service, broker, server, **{"mongodb.uri": writer(server, "dead_letter")})
    clients.publish(broker.port, [*good(30), *bad(3), *good(30, 30)])
    wait_until(lambda: running.sums()["consumer"]["dead_lettered"] == 3, 20, running.tail)
    wait_spooled(running, 60)
    running.wait_log("cannot store in MongoDB: not authorized.*in the collection messages.*needs the role readWrite")
    time.sleep(1.2)
    grant_all(server)
    running.wait_stored(60)
    running.wait_log("MongoDB takes documents again in the collection messages")
    sums = running.stop()["consumer"]
    assert sums["stored"] == 60 and sums["dead_lettered"] == 3 and sums["returned"] == 0


def test_good_messages_behind_refused_ones(service, mosquitto, fresh_mongod):
    """Several batches of the spool hold nothing but dead letters that a validator refuses: what is behind them does not wait for them."""
    broker, server = mosquitto(), fresh_mongod()
    database = server.client().mqtt2mongo
    refuse_all(database.dead_letter)
    running = started(service, broker, server, **{"consumer.batch.count": 100})
    server.stop()
    clients.publish(broker.port, [*bad(600), *good(10)])
    wait_spooled(running, 610)
    server.restart()
    begun = time.monotonic()
    running.wait_stored(10, timeout=60)
    assert time.monotonic() - begun < 15, "the good messages waited for bad ones"
    database.command("collMod", "dead_letter", validator={})
    running.wait_log("empty: MongoDB has every message of it", timeout=40)
    sums = running.stop()["consumer"]
    assert sums["stored"] == 10 and sums["dead_lettered"] == 600


def test_a_message_left_behind_after_an_outage(service, mosquitto, fresh_mongod):
    """The drain rests as long as it has worked, not as long as MongoDB was away."""
    broker, server = mosquitto(), fresh_mongod()
    database = server.client().mqtt2mongo
    refuse_all(database.dead_letter)
    running = started(service, broker, server)
    server.stop()
    clients.publish(broker.port, [*bad(1), *good(10)])
    wait_spooled(running, 11)
    time.sleep(10)
    server.restart()
    running.wait_stored(10)
    database.command("collMod", "dead_letter", validator={})
    begun = time.monotonic()
    wait_until(lambda: running.sums()["consumer"]["dead_lettered"] == 1, 30, running.tail)
    assert time.monotonic() - begun < 6
    running.stop()


def test_qos0_messages_that_nobody_takes(service, mosquitto, fresh_mongod):
    """No broker and no spool keeps them: they are dropped and counted, and the good ones behind them are stored."""
    broker, server = mosquitto(), fresh_mongod()
    refuse_all(server.client().mqtt2mongo.dead_letter)
    running = started(service, broker, server, **{"consumer.qos0_topic": "free/#"})
    running.wait_log("subscribed to free/#")
    for payload in bad(3):
        clients.publish(broker.port, [payload], "free/x", qos=0)
    clients.publish(broker.port, good(50), "free/x", qos=0)
    running.wait_stored(50)
    wait_until(lambda: running.sums()["consumer"]["dropped_by_cause"].get("refused") == 3, 20, running.tail)
    running.stop()


def test_without_a_spool_the_others_go_on(service, mosquitto, fresh_mongod):
    """A second connection's messages are stored while the first one's wait for a right, and hand-backs become rarer and rarer."""
    broker, server = mosquitto(), fresh_mongod(auth=True)
    running = started(service, broker, server, **{
        "mongodb.uri": writer(server, "messages"), "spool.max_size": 0, "mqtt.keepalive": "5s", "consumer.qos0_topic": "free/#"})
    running.wait_log("subscribed to free/#")
    clients.publish(broker.port, [*good(300), *bad(1), *good(48, 300)])
    last, moments = 0, []
    begun = time.monotonic()
    number = 1000
    while len(moments) < 5 and time.monotonic() - begun < 60:
        clients.publish(broker.port, good(1, number), "free/x", qos=0)
        number += 1
        count = running.log.count("handed back to the broker unacknowledged")
        moments += [time.monotonic()] * (count - last)
        last = count
        time.sleep(0.1)
    gaps = [after - before for before, after in zip(moments, moments[1:])]
    assert len(moments) == 5 and all(later > earlier for earlier, later in zip(gaps[1:], gaps[2:])), gaps
    assert gaps[-1] > 1.5 * gaps[1], gaps  # 0.1 s, 1.6 s, 3.2 s, 6.4 s and the hold limit
    database = server.client().mqtt2mongo
    wait_until(lambda: database.messages.count_documents({"topic": "free/x"}) >= number - 1000 - 5, 10, "QoS 0 is stored meanwhile")
    grant_all(server)
    wait_until(lambda: running.sums()["consumer"]["dead_lettered"] == 1, 40, running.tail)
    wait_until(lambda: running.sums()["consumer"]["in_flight"] == 0, 20, running.tail)
    running.stop()
    assert {document["payload"]["n"] for document in database.messages.find({"topic": "sensors/test"})} == set(range(348))
    print("gaps between hand-backs:", [round(gap, 1) for gap in gaps])


# --- a reply that is too large ------------------------------------------------------------------------------------------------


def test_a_validator_whose_errors_are_too_large(service, mosquitto, fresh_mongod):
    """mongod closes the connection rather than send an answer above 16 MB: fewer documents at a time go through."""
    broker, server = mosquitto(), fresh_mongod()
    database = server.client().mqtt2mongo
    words = [f"word-{number:04d}-{'y' * 16}" for number in range(800)]
    database.create_collection("messages", validator={"$jsonSchema": {"properties": {"payload": {
        "properties": {"kind": {"enum": words}}}}}})
    running = started(service, broker, server, **{"consumer.batch.count": 16384, "consumer.batch.bytes": "64MiB"})
    server.stop()
    clients.publish(broker.port, [b'{"kind": "none"}'] * 4096 + [b'{"kind": "%s"}' % words[1].encode()] * 100)
    wait_spooled(running, 4196)
    running.kill9()
    server.restart()
    running.start()  # and reads all of them as one batch, whose answer would not even fit into mongod's own buffer
    wait_until(lambda: running.sums()["consumer"]["dead_lettered"] >= 4096, 60, running.tail)
    running.wait_stored(100)
    clients.publish(broker.port, good(50))
    running.wait_stored(150)
    sums = running.stop()["consumer"]
    only(sums, stored=150, dead_lettered=4096)
    assert sums["dead_lettered_by_reason"] == {"refused_by_mongodb": 4096}
    assert database.messages.count_documents({}) == 150 and database.dead_letter.count_documents({}) == 4096


# --- replies of other servers -----------------------------------------------------------------------------------------------


def without_key_pattern(command, reply):
    """As a server that names no index."""
    for error in reply.get("writeErrors", []):
        if error["code"] == 11000:
            error.pop("keyPattern", None)
            error.pop("keyValue", None)
            error["errmsg"] = "duplicate key error: _id or unique index constraint"
    return reply


@pytest.mark.parametrize("rule", ["objectid", '["/n"]'])
def test_a_server_that_names_no_index(service, mosquitto, fresh_mongod, rule):
    """What an attempt has stored whose answer was lost is found by its _id; what another unique index refuses is a dead letter."""
    broker, server = mosquitto(), fresh_mongod()
    database = server.client().mqtt2mongo
    database.messages.create_index("payload.serial", unique=True, sparse=True)
    database.messages.insert_one({"payload": {"serial": 5}})
    with Altering(server.port, without_key_pattern) as proxy:
        running = started(service, broker, server, **{"mongodb.uri": proxy.uri, "consumer.id": rule})
        server.fail({"times": 2}, ["insert"], writeConcernError={"code": 64, "errmsg": "as told by the test"})
        clients.publish(broker.port, [*good(50), b'{"n": 50, "serial": 5}'])
        sums = wait_settled(running, 51)
        assert sums["stored"] + sums["duplicates"] == 50 and sums["dead_lettered_by_reason"] == {"unique_index": 1}, sums
        assert proxy.altered > 0
        running.stop()
    assert database.messages.count_documents({"topic": "sensors/test"}) == 50


@pytest.mark.parametrize("spool", ["1GiB", "0"])
def test_an_id_that_is_taken_by_nothing(service, mosquitto, fresh_mongod, spool):
    """As with an orphan of a shard: the insert says that the _id is taken, no find shows the document. Eight attempts, by way of the
    spool too, then it is a dead letter; what comes after it does not wait."""
    hidden = []

    def hide(command, reply):
        if "find" in command and command["find"] == "messages":
            hidden.append(command)
            reply["cursor"] = {**reply["cursor"], "firstBatch": []}
        return reply

    broker, server = mosquitto(), fresh_mongod()
    database = server.client().mqtt2mongo
    database.messages.insert_one({"_id": 7})
    with Altering(server.port, hide) as proxy:
        running = started(service, broker, server, **{
            "mongodb.uri": proxy.uri, "consumer.id": '["/n"]', "spool.max_size": spool})
        clients.publish(broker.port, good(20))
        clients.publish(broker.port, good(20, 20))
        sums = wait_settled(running, 40)
        only(sums, stored=39, dead_lettered=1)
        assert sums["dead_lettered_by_reason"] == {"id_conflict": 1}
        assert len(hidden) >= 8
        assert spool == "0" or in_spool(running) == 0
        running.stop()
    assert "cannot be read" in database.dead_letter.find_one()["reason"]["message"]


def test_a_failed_command_that_claims_success(service, mosquitto, fresh_mongod):
    """ok: 0 with an n that fits: the command failed, so nothing is taken for stored."""
    refusing = [True]

    def alter(command, reply):
        if refusing and command.get("insert") == "messages":
            return {"ok": 0.0, "code": 91, "codeName": "ShutdownInProgress", "errmsg": "as told by the test",
                    "n": len(command["documents"])}
        return reply

    broker, server = mosquitto(), fresh_mongod()
    with Altering(server.port, alter) as proxy:
        running = started(service, broker, server, **{"mongodb.uri": proxy.uri})
        clients.publish(broker.port, good(10))
        assert wait_spooled(running, 10)["stored"] == 0
        refusing.clear()
        running.wait_stored(10)
        running.stop()
    assert server.client().mqtt2mongo.messages.count_documents({}) == 10


def test_inserts_that_hang_while_pings_are_answered(service, mosquitto, fresh_mongod):
    """A time-out of the driver looks like a connection that mongod has closed, but is about no document."""
    broker, server = mosquitto(), fresh_mongod()
    running = started(service, broker, server, **{"mongodb.uri": server.uri + "&socketTimeoutMS=500"})
    server.fail("alwaysOn", ["insert"], blockConnection=True, blockTimeMS=1500)
    clients.publish(broker.port, good(4))
    wait_spooled(running, 4)
    time.sleep(8)
    assert running.sums()["consumer"]["dead_lettered"] == 0
    server.fail("off", [])
    running.wait_stored(4)
    only(running.stop()["consumer"], stored=4)


def contradiction(kind):
    """A reply to an insert of `messages` that contradicts itself."""
    def alter(command, reply):
        if command.get("insert") != "messages":
            return reply
        error = {"code": 121, "errmsg": "refused", "index": 0}
        return reply | {
            "out of range": {"writeErrors": [error | {"index": 100000}]},
            "negative": {"writeErrors": [error | {"index": -1}]},
            "no index": {"writeErrors": [{"code": 121, "errmsg": "refused"}]},
            "n too large": {"n": reply["n"] + 1},
            "n too small": {"n": reply["n"] - 1},
        }[kind]

    return alter


@pytest.mark.parametrize("kind", ["out of range", "negative", "no index", "n too large", "n too small"])
def test_a_reply_that_contradicts_itself(service, mosquitto, fresh_mongod, kind):
    """Nothing of it is believed; it ends in dead letters, which keep every byte, and never in an endless retry."""
    broker, server = mosquitto(), fresh_mongod()
    with Altering(server.port, contradiction(kind)) as proxy:
        running = started(service, broker, server, **{"mongodb.uri": proxy.uri})
        clients.publish(broker.port, good(10))
        sums = wait_settled(running, 10)
        assert sums["stored"] + sums["dead_lettered"] == 10 and proxy.altered >= 4
        running.wait_log("does not account for every document|refused")
        running.stop()
    database = server.client().mqtt2mongo
    kept = [json.dumps(document["payload"]) for document in database.messages.find()]
    kept += [letter["payload"].decode() for letter in database.dead_letter.find()]
    assert {json.loads(payload)["n"] for payload in kept} == set(range(10))


@pytest.mark.parametrize("code, name", [(4242, "Strange"), (2, "BadValue")])
def test_a_command_error_that_one_document_causes(service, mosquitto, fresh_mongod, code, name):
    """An error that nobody has listed, or that is mostly about the configuration, whenever a certain document is in the command: as
    soon as the collection takes others it is found by halves, and its neighbours are stored."""
    def alter(command, reply):
        poisoned = command.get("insert") == "messages" and any(
            document["payload"].get("n") == 13 for document in command.get("documents", []))
        return {"ok": 0.0, "code": code, "errmsg": "as no server says", "codeName": name} if poisoned else reply

    broker, server = mosquitto(), fresh_mongod()
    with Altering(server.port, alter) as proxy:
        running = started(service, broker, server, **{"mongodb.uri": proxy.uri})
        server.stop()
        clients.publish(broker.port, good(40))
        wait_spooled(running, 40)
        server.restart()
        number = 1000
        while running.sums()["consumer"]["dead_lettered"] == 0 and number < 1100:
            clients.publish(broker.port, good(1, number))
            number += 1
            time.sleep(0.4)
        running.wait_stored(39 + number - 1000)
        assert in_spool(running) == 0
        only(running.stop()["consumer"], stored=39 + number - 1000, dead_lettered=1)
    letter = server.client().mqtt2mongo.dead_letter.find_one()
    assert letter["payload"] == b'{"n": 13}' and "as no server says" in letter["reason"]["message"]


# --- ids that are equal, and how they are looked up ---------------------------------------------------------------------------


def finds(server):
    return server.client().admin.command("serverStatus")["opcounters"]["query"]


def test_numbers_are_compared_as_mongodb_does(service, mosquitto, fresh_mongod):
    """5 and 5.0 are one _id: all of a batch are looked up together, and each once."""
    broker, server = mosquitto(), fresh_mongod()
    running = started(service, broker, server, **{"consumer.id": '["/id"]'})
    clients.publish(broker.port, [b'{"id": %d}' % number for number in range(1000)])
    running.wait_stored(1000)
    server.stop()  # so that they come in few batches, by way of the spool
    clients.publish(broker.port, [b'{"id": %d.0}' % (number % 1000) for number in range(2000)])
    wait_spooled(running, 2000)
    server.restart()
    before = finds(server)
    sums = wait_settled(running, 3000)
    asked = finds(server) - before
    only(sums, stored=1000, dead_lettered=2000)
    assert sums["dead_lettered_by_reason"] == {"id_conflict": 2000} and asked < 200, asked
    running.stop()


def test_a_collation_that_takes_more_for_the_same(service, mosquitto, fresh_mongod):
    """Only the server knows that "A" is "a" there."""
    broker, server = mosquitto(), fresh_mongod()
    database = server.client().mqtt2mongo
    database.create_collection("messages", collation=pymongo.collation.Collation("en", strength=2))
    running = started(service, broker, server, **{"consumer.id": '["/id"]'})
    clients.publish(broker.port, [b'{"id": "a"}'])
    running.wait_stored(1)
    clients.publish(broker.port, [b'{"id": "A"}', b'{"id": "A"}', b'{"id": "a"}', b'{"id": "b"}'])
    only(wait_settled(running, 5), stored=2, duplicates=1, dead_lettered=2)
    assert re.search("another message is stored under this _id", database.dead_letter.find_one()["reason"]["message"])
    running.stop()
