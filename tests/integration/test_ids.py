"""consumer.id: _ids made from the message. A message that is delivered twice becomes one document, another message under the same
_id a dead letter; one without a usable id is stored under an ObjectId and counted."""

import json
import re

import bson
import pymongo
import pytest
from bson.decimal128 import Decimal128
from bson.int64 import Int64
from bson.objectid import ObjectId
from bson.raw_bson import RawBSONDocument
from bson.son import SON
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

import clients
from processes import Process, wait_until
from servers import _program, _start_listening
from test_kill import QUICK, Stored, Stream, kill_at_random_moments, seeded, settle
from test_replay import refuse_all, refuse_nothing, replay, result, summary

MANY = 5000


def consuming(service, broker, mongod, database, rule, **settings):
    """A running service with that rule, a list."""
    running = service(broker=broker, mongod=mongod, database=database,
                      settings={"consumer.id": rule if isinstance(rule, str) else json.dumps(rule), **settings})
    running.wait_log("subscribed to")
    return running


def restart(running):
    mark = running.mark()
    running.start()
    running.wait_log("subscribed to", after=mark)


def wait_settled(running, count):
    """Wait until `count` messages are stored, duplicates or dead letters; the consumer's sums."""
    def settled():
        sums = running.sums()["consumer"]
        return sums if sums["stored"] + sums["duplicates"] + sums["dead_lettered"] >= count else None

    return wait_until(settled, 30, lambda: f"{count} messages have gone somewhere: {running.printed_sums[-1]}\n{running.tail()}",
                      interval=0.1)


def publish_with(port, messages):
    """Publish (topic, payload, [(name, value) of user properties])."""
    with clients.connected(port) as client:
        done = []
        client.on_publish = lambda *arguments: done.append(arguments)
        for topic, payload, pairs in messages:
            properties = Properties(PacketTypes.PUBLISH)
            if pairs:
                properties.UserProperty = pairs
            client.publish(topic, payload, qos=1, properties=properties)
        clients._drive(client, lambda: len(done) == len(messages), 10, "PUBACK")


def only(sums, **expected):
    """These counters, and 0 for the other ways a message can go."""
    ways = {"stored": 0, "duplicates": 0, "dead_lettered": 0, "returned": 0, "dropped": 0, "id_fallbacks": 0} | expected
    assert {way: sums[way] for way in ways} == ways


# --- what an _id is made of ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule, expected", [
    ("objectid", ObjectId),
    ("topic", "sensors/a"),
    ("/n", 5),
    ("user-property:message-id", "m-1"),
    ("topic,/n", SON([("topic", "sensors/a"), ("n", 5)])),
    (["/n", "user-property:message-id", "topic"], SON([("n", 5), ("message-id", "m-1"), ("topic", "sensors/a")])),
    (["topic", "/at/x~0y", "/at/a~1b", "/at/c.d", "/list/1"],
     SON([("topic", "sensors/a"), ("at/x~0y", 1.5), ("at/a~1b", True), ("at/c.d", "text"), ("list/1", Int64(2**40))])),
    (["/$id"], Decimal128("123456789012345678901234567890")),
    (["//"], "nameless"),
], ids=str)
def test_each_kind_of_part(mosquitto, mongod, service, database, collection, rule, expected):
    broker = mosquitto()
    running = consuming(service, broker, mongod, database, rule)
    payload = json.dumps({"n": 5, "at": {"x~y": 1.5, "a/b": True, "c.d": "text"}, "list": [0, 2**40],
                          "$id": 123456789012345678901234567890, "": {"": "nameless"}})
    publish_with(broker.port, [("sensors/a", payload, [("other", "x"), ("message-id", "m-1"), ("message-id", "m-2")])])
    only(wait_settled(running, 1), stored=1)
    running.stop()
    document = collection.with_options(bson.CodecOptions(document_class=SON)).find_one()
    if expected is ObjectId:
        assert isinstance(document["_id"], ObjectId)
    else:
        assert document["_id"] == expected and type(document["_id"]) is type(expected)
        if isinstance(expected, SON):
            assert [(key, type(value)) for key, value in document["_id"].items()] == [
                (key, type(value)) for key, value in expected.items()]
    assert list(document) == ["_id", "topic", "payload", "received_at", "qos", "retain", "dup"]
    assert document["topic"] == "sensors/a" and document["payload"]["n"] == 5


def test_an_id_has_the_type_that_the_payload_has(mosquitto, mongod, service, database, collection):
    values = ["1", "2147483648", "2.0", "1e300", "123456789012345678901234567890", "true", "false", '""', '"x"', r'"a\u0000b"',
              '"ä😀"', '"' + "x" * 1024 + '"', "-7", '"1"']
    broker = mosquitto()
    running = consuming(service, broker, mongod, database, ["/deep/0"])
    clients.publish(broker.port, [f'{{"deep": [{value}]}}'.encode() for value in values])
    only(wait_settled(running, len(values)), stored=len(values))
    raw = collection.with_options(bson.CodecOptions(document_class=RawBSONDocument))
    found = list(raw.find())
    assert len(found) == len(values)
    for document in found:
        identity, value = (bytes(bson.encode({"x": part})) for part in (document["_id"], document["payload"]["deep"][0]))
        assert identity == value
    assert running.stop()["consumer"]["id_fallbacks"] == 0


def test_without_a_usable_id(mosquitto, mongod, service, database, collection):
    """Stored under an ObjectId each time, counted, and said once."""
    broker = mosquitto()
    running = consuming(service, broker, mongod, database, ["topic", "/id"])
    without = ["{}", '{"id": null}', '{"id": {"a": 1}}', '{"id": [1]}', "5", '"id"', "[1]", '{"id": "' + "x" * 1025 + '"}',
               '{"ID": 1}']
    clients.publish(broker.port, [text.encode() for text in [*without, *without, '{"id": 1}', "not JSON"]])
    sums = wait_settled(running, 2 * len(without) + 2)
    only(sums, stored=2 * len(without) + 1, dead_lettered=1, id_fallbacks=2 * len(without))
    assert len(re.findall("without a usable id", running.log)) == 1
    running.stop()
    kinds = [type(document["_id"]) for document in collection.find()]
    assert kinds.count(ObjectId) == 2 * len(without) and kinds.count(dict) == 1


def test_a_user_property_that_is_none(mosquitto, mongod, service, database, collection):
    broker = mosquitto()
    running = consuming(service, broker, mongod, database, ["user-property:id"])
    publish_with(broker.port, [("sensors/a", "1", []), ("sensors/a", "2", [("ID", "x")]), ("sensors/a", "3", [("id", "x" * 1025)]),
                               ("sensors/a", "4", [("id", "x" * 1024)]), ("sensors/a", "5", [("id", "")])])
    only(wait_settled(running, 5), stored=5, id_fallbacks=3)
    running.stop()
    assert {document["payload"]: document["_id"] for document in collection.find({"_id": {"$type": "string"}})} == {
        4: "x" * 1024, 5: ""}


def test_a_user_property_with_mqtt_3_1_1(mosquitto, service):
    running = service(broker=mosquitto(), settings={"mqtt.protocol": "3.1.1", "consumer.id": "topic,user-property:id"})
    running.finish(expect=2, sums=False)
    assert "--consumer-id: MQTT 3.1.1 has no user properties" in running.log


def test_the_file_and_a_dry_run(mosquitto, mongod, service, database, collection, tmp_path):
    """The list in the file; what a dry run prints has the _id, and is not stored."""
    path = tmp_path / "settings.json"
    path.write_text('{"consumer": {"id": ["topic", // where\n "/n"]}}')
    broker = mosquitto()
    running = service(broker=broker, mongod=mongod, database=database, args=["-c", path, "--dry-run"])
    running.wait_log("nothing is stored")
    clients.publish(broker.port, ['{"n": 7}', '{"m": 7}', "broken"], "sensors/a")
    wait_until(lambda: running.stdout.read_text().count("\n") == 3, 10, "three documents are printed")
    lines = [line.split(" ", 1) for line in running.stdout.read_text().splitlines()]
    running.stop(sums=False)
    assert json.loads(lines[0][1])["_id"] == {"topic": "sensors/a", "n": {"$numberInt": "7"}}
    assert "$oid" in json.loads(lines[1][1])["_id"] and "$oid" in json.loads(lines[2][1])["_id"]
    assert collection.count_documents({}) == 0


# --- the same message twice ------------------------------------------------------------------------------------------------


def numbered(count):
    return [b'{"n": %d, "text": "Pr\xc3\xbcfung"}' % n for n in range(count)]


def test_twice_is_one_document(mosquitto, mongod, service, database, collection):
    """Each message of thousands twice: in one batch, in the next, and after a restart."""
    broker = mosquitto()
    running = consuming(service, broker, mongod, database, ["topic", "/n"])
    clients.publish(broker.port, [payload for payload in numbered(MANY) for _ in range(2)])
    only(wait_settled(running, 2 * MANY), stored=MANY, duplicates=MANY)
    clients.publish(broker.port, numbered(MANY))
    only(wait_settled(running, 3 * MANY), stored=MANY, duplicates=2 * MANY)
    running.stop()
    restart(running)
    clients.publish(broker.port, numbered(MANY + 10))
    only(wait_settled(running, MANY + 10), stored=10, duplicates=MANY)
    running.stop()
    assert collection.count_documents({}) == MANY + 10


def test_what_was_stored_before_a_kill(mosquitto, fresh_mongod, service):
    """Fault: MongoDB has written the first messages of a backlog but says that its write concern is not met; then the service is
    killed.
    Proof: documents are there before the kill, and the broker delivers their messages again, with the DUP flag.
    Held: there is one document for each message, and each that was there before the kill is counted as a duplicate."""
    broker, mongod = mosquitto(), fresh_mongod()
    running = consuming(service, broker, mongod, "kept", ["topic", "/n"], **{"spool.max_size": 0})
    running.stop()
    clients.publish(broker.port, numbered(300))
    collection = mongod.client().kept.messages
    mongod.fail("alwaysOn", ["insert"], writeConcernError={"code": 64, "errmsg": "as told by the test"})
    running.start()
    running.wait_log("as told by the test")
    running.kill9()
    before = collection.count_documents({})
    assert before > 0
    mongod.fail("off", [])
    restart(running)
    sums = wait_settled(running, 300)
    only(sums, stored=300 - before, duplicates=before)
    assert sums["redelivered"] >= before
    running.stop()
    assert collection.count_documents({}) == 300 and collection.count_documents({"dup": False}) >= before
    print(f"stored before the kill {before}  delivered again {sums['redelivered']}")


@pytest.mark.timeout(240)
def test_kills_at_random_moments_leave_one_document_each(mosquitto, fresh_mongod, service):
    """Fault: SIGKILL at 15 random moments, restarted at once, under 2,000 messages a second.
    Proof: messages came again with the DUP flag after some of the kills.
    Held: each message that the broker acknowledged is in MongoDB, and each once."""
    broker, mongod = mosquitto(), fresh_mongod()
    running = consuming(service, broker, mongod, "kept", ["topic", "/n"], **QUICK)
    collection = mongod.client().kept.messages
    with Stream(broker.port, 2000) as stream:
        kill_at_random_moments(running, stream, seeded(), 15, 5000)
        acknowledged = stream.finish()
    sums, left = settle(running, broker, collection)
    stored = Stored(collection)
    print(f"messages {len(acknowledged)}  came again {collection.count_documents({'dup': True})}  twice {stored.twice}  "
          f"duplicates in the last life {sums['consumer']['duplicates']}")
    assert not stored.missing(acknowledged) and not left and stored.twice == 0
    assert collection.count_documents({"dup": True}) > 0 or sums["consumer"]["duplicates"] > 0
    assert sums["consumer"]["dead_lettered"] == sums["consumer"]["id_fallbacks"] - 1 == 0  # the last message has no /n


def test_our_own_second_attempt_is_no_duplicate(mosquitto, fresh_mongod, service):
    """Fault as before, but the service lives on. Held: the second attempt finds its own documents, which count as stored; a message
    that was there twice is counted once."""
    broker, mongod = mosquitto(), fresh_mongod()
    running = consuming(service, broker, mongod, "kept", ["topic", "/n"])
    mongod.fail({"times": 1}, ["insert"], writeConcernError={"code": 64, "errmsg": "as told by the test"})
    clients.publish(broker.port, numbered(50) + numbered(50))
    sums = wait_settled(running, 100)
    assert "as told by the test" in running.log
    only(sums, stored=50, duplicates=50)
    running.stop()
    assert mongod.client().kept.messages.count_documents({}) == 50


def test_looking_up_is_tried_again(mosquitto, fresh_mongod, service):
    """Fault: the find that asks what is stored under the _id fails. Held: nothing is settled before it was answered."""
    broker, mongod = mosquitto(), fresh_mongod()
    running = consuming(service, broker, mongod, "kept", ["/n"])
    clients.publish(broker.port, numbered(20))
    wait_settled(running, 20)
    mongod.fail({"times": 2}, ["find"], errorCode=91)
    clients.publish(broker.port, [*numbered(21), b'{"n": 3}'])
    only(wait_settled(running, 42), stored=21, duplicates=20, dead_lettered=1)
    assert "cannot read what is stored under an _id that is taken" in running.log
    running.stop()


def test_a_document_that_goes_while_we_look(mosquitto, fresh_mongod, service):
    """Fault: the document is deleted between the refused insert and the find. Held: its message is stored again."""
    broker, mongod = mosquitto(), fresh_mongod()
    running = consuming(service, broker, mongod, "kept", ["/n"], **{"spool.max_size": 0})
    clients.publish(broker.port, numbered(2))
    wait_settled(running, 2)
    client = mongod.client()
    begun = client.admin.command("configureFailPoint", "failCommand", mode={"times": 1}, data={
        "failCommands": ["find"], "blockConnection": True, "blockTimeMS": 2000, "appName": "mqtt2mongo"})
    clients.publish(broker.port, numbered(2)[1:])
    client.admin.command("waitForFailPoint", "failCommand", timesEntered=begun["count"] + 1, maxTimeMS=20000)
    assert client.kept.messages.delete_one({"_id": 1}).deleted_count == 1
    only(wait_settled(running, 3), stored=3)
    assert "the document that has it was deleted meanwhile or cannot be read" in running.log
    running.stop()
    assert sorted(document["_id"] for document in client.kept.messages.find()) == [0, 1]


# --- another message under the same _id --------------------------------------------------------------------------------------


def test_a_conflict_is_a_dead_letter(mosquitto, mongod, mongo, service, database, collection):
    broker = mosquitto()
    running = consuming(service, broker, mongod, database, ["/id", "user-property:run"])
    first, second = b'{"id": "x", "value": 1}', b'{ "id": "x", "value": 2 }'
    pairs = [("run", "r\u00fcn"), ("unnamed", "is not kept")]
    publish_with(broker.port, [("sensors/a", first, pairs), ("sensors/a", second, pairs), ("sensors/b", first, pairs),
                               ("sensors/a", b'{"id":"x","value":1}', pairs), ("sensors/a", b"broken", pairs)])
    sums = wait_settled(running, 5)
    only(sums, stored=1, duplicates=1, dead_lettered=3)
    assert sums["dead_lettered_by_reason"] == {"id_conflict": 2, "invalid_json": 1}
    running.stop()
    assert collection.find_one()["payload"] == {"id": "x", "value": 1} and collection.count_documents({}) == 1
    letters = list(mongo[database].dead_letter.find({"reason.code": "id_conflict"}).sort("_id", 1))
    assert [(letter["topic"], letter["payload"]) for letter in letters] == [("sensors/a", second), ("sensors/b", first)]
    for letter in mongo[database].dead_letter.find():
        assert isinstance(letter["_id"], ObjectId) and letter["user_properties"] == {"run": "r\u00fcn"}
    for letter in letters:
        said = letter["reason"]["message"]
        assert "another message is stored under this _id" in said and '"id" : "x", "run" : "r\u00fcn"' in said, said


def test_a_replay_makes_the_same_ids(mosquitto, mongod, mongo, service, database, collection):
    """The _id of a replayed dead letter is made of its user properties again: redeliveries meet it."""
    rule = {"consumer.id": json.dumps(["/n", "user-property:run"])}
    broker = mosquitto()
    messages = [("sensors/a", b'{"n": 1}', [("run", "r\u00fcn"), ("unnamed", "x")]), ("sensors/a", b'{"n": 2}', [("run", "")]),
                ("sensors/a", b'{"n": 3}', []), ("sensors/a", b'{"n": 4, "a": 1}', [("run", "r")]),
                ("sensors/a", b'{"n": 5}', [("run", "r")])]
    refuse_all(collection)
    running = consuming(service, broker, mongod, database, rule["consumer.id"])
    publish_with(broker.port, messages)
    only(wait_settled(running, 5), dead_lettered=5)
    running.stop()
    letters = mongo[database].dead_letter
    object_ids = {letter["_id"] for letter in letters.find()}

    refuse_nothing(collection)
    collection.insert_many([{"_id": SON([("n", 4), ("run", "r")]), "topic": "sensors/a", "payload": {"n": 4, "a": 2}},
                            {"_id": SON([("n", 5), ("run", "r")]), "topic": "sensors/a", "payload": {"n": 5}}])
    assert result(replay(service, mongod, collection, **rule)) == summary(5, 4, {"id_conflict": 1})
    assert [letter["payload"] for letter in letters.find()] == [messages[3][1]]
    stored = {document["payload"]["n"]: document["_id"] for document in collection.find({"payload.n": {"$lte": 3}})}
    assert stored[1] == {"n": 1, "run": "r\u00fcn"} and stored[2] == {"n": 2, "run": ""} and stored[3] in object_ids
    assert collection.count_documents({}) == 5

    running = consuming(service, broker, mongod, database, rule["consumer.id"])
    publish_with(broker.port, messages[:2])
    only(wait_settled(running, 2), duplicates=2)
    running.stop()


def test_numbers_that_are_equal_to_mongodb(mosquitto, mongod, mongo, service, database, collection):
    """5, 5.0 and 5e0 are one _id. The payload decides: the same bytes of BSON are a duplicate."""
    broker = mosquitto()
    running = consuming(service, broker, mongod, database, ["/id"])
    clients.publish(broker.port, ['{"id": 5}', '{"id": 5.0}', '{"id": 5}', '{"id": 5e0}', '{"id":5 }', '{"id": 0.0}',
                                  '{"id": -0.0}', '{"id": "5"}'])
    only(wait_settled(running, 8), stored=3, duplicates=2, dead_lettered=3)
    running.stop()
    assert sorted(bytes(letter["payload"]) for letter in mongo[database].dead_letter.find()) == [
        b'{"id": -0.0}', b'{"id": 5.0}', b'{"id": 5e0}']


def test_texts_that_a_collation_holds_equal(mosquitto, mongod, mongo, service, database, collection):
    mongo[database].create_collection("messages", collation={"locale": "en", "strength": 2})
    broker = mosquitto()
    running = consuming(service, broker, mongod, database, ["/id"])
    clients.publish(broker.port, ['{"id": "a"}', '{"id": "A"}', '{"id": "a"}'])
    only(wait_settled(running, 3), stored=1, duplicates=1, dead_lettered=1)
    running.stop()


def test_what_others_have_written(mosquitto, mongod, mongo, service, database, collection):
    """Documents under our _ids that were not ours: each is compared as it is."""
    collection.insert_many([
        {"_id": 1, "topic": "sensors/a", "payload": {"id": 1}},
        {"_id": 2, "topic": "sensors/a", "payload": {"id": 2, "more": 1}},
        {"_id": 3, "topic": "sensors/a", "payload": {"id": Int64(3)}},
        {"_id": 4}, {"_id": 5, "payload": {"topic": "sensors/a", "id": 5}, "more": "x" * 100_000},
        {"payload": {"id": 6}, "topic": "sensors/a", "_id": 6, "received_at": "never"},
    ])
    broker = mosquitto()
    running = consuming(service, broker, mongod, database, ["/id"])
    clients.publish(broker.port, [b'{"id": %d}' % n for n in range(1, 8)], "sensors/a")
    only(wait_settled(running, 7), stored=1, duplicates=2, dead_lettered=4)
    running.stop()
    assert collection.count_documents({}) == 7
    assert sorted(bytes(letter["payload"]) for letter in mongo[database].dead_letter.find()) == [
        b'{"id": %d}' % n for n in (2, 3, 4, 5)]


def test_another_unique_index(mosquitto, mongod, mongo, service, database, collection):
    """Only an _id that is taken is looked up."""
    collection.create_index("payload.serial", unique=True)
    broker = mosquitto()
    running = consuming(service, broker, mongod, database, ["/id"])
    clients.publish(broker.port, ['{"id": 1, "serial": 7}', '{"id": 2, "serial": 7}', '{"id": 1, "serial": 7}'])
    sums = wait_settled(running, 3)
    only(sums, stored=1, duplicates=1, dead_lettered=1)
    assert sums["dead_lettered_by_reason"] == {"unique_index": 1}
    running.stop()


def test_conflicts_by_the_thousand(mosquitto, mongod, mongo, service, database, collection):
    broker = mosquitto()
    running = consuming(service, broker, mongod, database, ["/n"])
    clients.publish(broker.port, [b'{"n": %d, "try": %d}' % (n, attempt) for n in range(1000) for attempt in range(3)])
    only(wait_settled(running, 3000), stored=1000, dead_lettered=2000)
    running.stop()
    tries = {}
    for document in collection.find():
        tries.setdefault(document["payload"]["n"], []).append(document["payload"]["try"])
    for letter in mongo[database].dead_letter.find():
        payload = json.loads(letter["payload"])
        tries.setdefault(payload["n"], []).append(payload["try"])
    assert len(tries) == 1000 and all(sorted(each) == [0, 1, 2] for each in tries.values())


# --- other servers, fewer rights -----------------------------------------------------------------------------------------------


class Standalone(Process):
    """A mongod that is no replica set."""

    def __init__(self, directory):
        super().__init__("mongod", directory)
        (self.directory / "data").mkdir()
        self.port = None

    @property
    def uri(self):
        return f"mongodb://127.0.0.1:{self.port}/"

    def start(self):
        self.port = _start_listening(self, lambda port: [
            _program("MQTT2MONGO_MONGOD", "mongod"), "--bind_ip", "127.0.0.1", "--port", port, "--dbpath", self.directory / "data",
            "--nounixsocket", "--wiredTigerCacheSizeGB", "0.25"], None, 30)
        return self


def test_on_a_standalone_server(mosquitto, directory, service):
    broker = mosquitto()
    with Standalone(directory("standalone")) as mongod:
        running = consuming(service, broker, mongod.start(), "kept", ["topic", "/n"])
        clients.publish(broker.port, [*numbered(50), *numbered(50), b'{"n": 1}'])
        only(wait_settled(running, 101), stored=50, duplicates=50, dead_lettered=1)
        running.stop()
        with pymongo.MongoClient(mongod.uri) as client:
            assert client.kept.messages.count_documents({}) == 50 and client.kept.dead_letter.count_documents({}) == 1


@pytest.mark.parametrize("concern", ["1", "majority"])
def test_with_any_write_concern(mosquitto, mongod, service, database, collection, concern):
    broker = mosquitto()
    running = consuming(service, broker, mongod, database, ["/n"], **{"mongodb.write_concern.w": concern})
    clients.publish(broker.port, numbered(20) + numbered(20))
    only(wait_settled(running, 40), stored=20, duplicates=20)
    running.stop()


def test_a_user_that_may_not_read(mosquitto, fresh_mongod, service):
    """--check says so, and only where it matters; nothing is settled unread."""
    broker, mongod = mosquitto(), fresh_mongod(auth=True)
    client = mongod.client()
    client.kept.command("createRole", "writer", roles=[], privileges=[
        {"resource": {"db": "kept", "collection": name}, "actions": ["insert"]} for name in ("messages", "dead_letter")])
    client.kept.command("createUser", "writer", pwd="secret", roles=["writer"])
    uri = f"mongodb://writer:secret@127.0.0.1:{mongod.port}/kept?replicaSet=rs0"

    def check(rule, status):
        running = service(broker=broker, mongod=mongod, database="kept", args=["--check"],
                          settings={"mongodb.uri": uri, "consumer.id": rule})
        running.finish(expect=status, sums=False)
        return running.stdout.read_text()

    assert "database  ok" in check("objectid", 0)
    assert "or not read the first, which consumer.id asks for" in check("/n", 1)
    # An attempt that is overdue on a busy machine would be spooled, and meet its own documents unread.
    running = consuming(service, broker, mongod, "kept", ["/n"], **{"mongodb.uri": uri, "spool.after": "20s"})
    clients.publish(broker.port, numbered(2))
    wait_settled(running, 2)
    clients.publish(broker.port, numbered(2))
    running.wait_log("cannot read what is stored under an _id that is taken: not authorized")
    client.kept.command("grantPrivilegesToRole", "writer", privileges=[
        {"resource": {"db": "kept", "collection": "messages"}, "actions": ["find"]}])
    only(wait_settled(running, 4), stored=2, duplicates=2)
    running.stop()
