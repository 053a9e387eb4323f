"""--replay-dead-letters: what can be stored now is moved, whole and once; what cannot stays byte for byte as it is; whatever
interrupts it, nothing is lost and a repeat finishes it."""

import json
import random
import signal
import threading
import time

import bson
import pymongo
import pytest
from bson.raw_bson import RawBSONDocument

import clients
from processes import wait_until

RAW = bson.CodecOptions(document_class=RawBSONDocument)
MIB = 1024 * 1024


def raw(collection):
    """Every document as its bytes, by _id."""
    return {repr(each["_id"]): bytes(each.raw) for each in collection.with_options(RAW).find()}


def letters_of(collection):
    return collection.database.dead_letter


def refuse_all(collection):
    """A validator that nothing fits."""
    names = collection.database.list_collection_names()
    if collection.name in names:
        collection.database.command("collMod", collection.name, validator={"never": {"$exists": True}})
    else:
        collection.database.create_collection(collection.name, validator={"never": {"$exists": True}})


def refuse_nothing(collection):
    collection.database.command("collMod", collection.name, validator={})


def bury(service, broker, mongod, collection, payloads, topic="sensors/a", **settings):
    """Make dead letters as the service makes them, and return them. A number of payloads: that many, with {"n": number}."""
    if isinstance(payloads, int):
        payloads = [b'{"n": %d}' % number for number in range(payloads)]
    before = letters_of(collection).count_documents({}) + collection.count_documents({})
    running = service(broker=broker, mongod=mongod, database=collection.database.name, settings=settings)
    running.wait_log("subscribed to")
    assert len(clients.publish(broker.port, payloads, topic)) == len(payloads)
    wait_until(lambda: letters_of(collection).count_documents({}) + collection.count_documents({}) == before + len(payloads),
               30, "all are somewhere", interval=0.1)
    running.stop()
    return list(letters_of(collection).find())


def replay(service, mongod, collection, query=None, *, started=True, args=(), **settings):
    """The replay as a process of its own, with no broker."""
    more = [] if query is None else ["--filter", query if isinstance(query, str) else json.dumps(query)]
    return service(mongod=mongod, database=collection.database.name, args=["--replay-dead-letters", *more, *args],
                   settings={"role": None, "state_dir": None, **settings}, name="replay", started=started)


def result(running, expect=0, timeout=50):
    running.finish(expect=expect, sums=False, timeout=timeout)
    return printed(running)


def printed(running):
    """The last summary."""
    return json.loads(running.stdout.read_text().splitlines()[-1])["replay"]


def summary(looked_at, moved, failing=None, not_replayable=None):
    return {"looked_at": looked_at, "moved": moved,
            "still_failing": sum((failing or {}).values()), "still_failing_by_reason": failing or {},
            "not_replayable": sum((not_replayable or {}).values()), "not_replayable_by_cause": not_replayable or {}}


def numbers_in(collection):
    return [each["payload"]["n"] for each in collection.find({}, {"payload.n": 1})]


def numbers_buried(collection):
    return [json.loads(each["payload"])["n"] for each in letters_of(collection).find({}, {"payload": 1})]


# --- what is moved, and what is not ----------------------------------------------------------------------------------------


def test_what_passes_now_is_moved_and_the_rest_stays(mosquitto, mongod, service, database, collection):
    """Dead letters of four causes; three of them are mended: the messages are stored as if nothing had been wrong."""
    collection.database.create_collection("messages", validator={"payload.n": {"$not": {"$gte": 1000}}})
    collection.create_index("payload.key", unique=True, sparse=True)
    collection.insert_one({"payload": {"key": "taken"}})
    large = '{"n":1,"text":"%s"}' % ("x" * 100_000)
    cut = '{"n":2,"text":"%s"}' % ("x" * MIB)
    payloads = ['{"n": 5000, "pi": 3.0, "big": 9007199254740993, "\\u00fc": ["\\u0000", null, {"$set": 1}]}',
                '{"key": "taken", "n": 3}', large, cut, '{"n": 01}', "", '{"n": 7000}', b"\xff\xfe", '{"key":"taken","n":4}']
    broker = mosquitto(extra=["message_size_limit 0"])
    topics = ["sensors/" + name for name in ("validator", "ü/日本語", "large", "cut", "bad", "empty", "\\x41", "bytes", "index")]
    letters = bury(service, broker, mongod, collection, payloads, topics.__getitem__, **{"consumer.max_payload": "64KiB"})
    assert len(letters) == 9
    before = raw(letters_of(collection))

    def replayed(**settings):
        return result(replay(service, mongod, collection, **settings))

    # Nothing is mended: nothing changes.
    reasons = {"refused_by_mongodb": 2, "unique_index": 2, "payload_too_large": 1, "invalid_json": 1, "empty_payload": 1,
               "invalid_utf8": 1}
    assert replayed(**{"consumer.max_payload": "64KiB"}) == summary(9, 0, reasons, {"truncated": 1})
    assert raw(letters_of(collection)) == before and collection.count_documents({}) == 1

    refuse_nothing(collection)
    collection.drop_index("payload.key_1")
    failing = {"invalid_json": 1, "empty_payload": 1, "invalid_utf8": 1}
    assert replayed() == summary(9, 5, failing, {"truncated": 1})
    stored = raw(collection)
    moved = [letter for letter in letters if letter["reason"]["code"] in ("refused_by_mongodb", "unique_index")
             or letter["topic"] == "sensors/large"]
    assert len(moved) == 5 and len(stored) == 6
    for letter in moved:
        assert stored[repr(letter["_id"])] == bson.encode({
            "_id": letter["_id"], "topic": letter["topic"], "payload": typed(letter["payload"]),
            "received_at": letter["received_at"], "qos": 1, "retain": False, "dup": False})
        del before[repr(letter["_id"])]
    assert {letter["topic"] for letter in moved} == {topics[index] for index in (0, 1, 2, 6, 8)}
    assert raw(letters_of(collection)) == before and len(before) == 4

    # Once more: there is nothing left to do.
    assert replayed() == summary(4, 0, failing, {"truncated": 1})
    assert raw(letters_of(collection)) == before and raw(collection) == stored


def typed(payload):
    """JSON with the types that the service gives its numbers."""
    def integer(text):
        number = int(text)
        return number if -2**31 <= number < 2**31 else bson.int64.Int64(number)

    return json.loads(payload, parse_int=integer)


def test_collections_that_were_renamed(mosquitto, mongod, service, database, collection, mongo):
    """Replayed are those of consumer.dead_letter into consumer.collection, and no other collection is touched."""
    refuse_all(collection)
    letters = bury(service, mosquitto(), mongod, collection, 20)
    letters_of(collection).rename("letters of may")
    mongo[database].dead_letter.insert_one({"not": "touched"})
    settings = {"consumer.collection": "elsewhere", "consumer.dead_letter": "letters of may"}
    assert result(replay(service, mongod, collection, **settings)) == summary(20, 20)
    assert {each["_id"] for each in mongo[database].elsewhere.find()} == {each["_id"] for each in letters}
    assert mongo[database]["letters of may"].count_documents({}) == collection.count_documents({}) == 0
    assert mongo[database].dead_letter.count_documents({}) == 1


def test_nothing_to_do(mongod, service, database, collection):
    assert result(replay(service, mongod, collection)) == summary(0, 0)
    running = replay(service, mongod, collection, **{"log.format": "text"})
    running.finish(sums=False)
    assert running.stdout.read_text().split() == [
        "replay", "looked_at", "0", "moved", "0", "still_failing", "0", "not_replayable", "0"]
    assert collection.database.list_collection_names() == []


def test_large_payloads_go_in_small_batches(mosquitto, mongod, service, database, collection):
    """60 MiB of dead letters do not take 60 MiB of memory."""
    refuse_all(collection)
    text = "x" * (MIB - 100)
    broker = mosquitto(extra=["message_size_limit 0"])
    bury(service, broker, mongod, collection, ['{"n":%d,"t":"%s"}' % (number, text) for number in range(60)])
    refuse_nothing(collection)
    assert result(replay(service, mongod, collection)) == summary(60, 60)
    assert sorted(numbers_in(collection)) == list(range(60)) and not numbers_buried(collection)


# --- the filter ------------------------------------------------------------------------------------------------------------


def test_a_filter(mosquitto, mongod, service, database, collection):
    refuse_all(collection)
    letters = bury(service, mosquitto(), mongod, collection, 100, lambda index: f"sensors/{index % 4}")
    refuse_nothing(collection)
    assert result(replay(service, mongod, collection, {"reason.code": "unique_index"})) == summary(0, 0)
    assert result(replay(service, mongod, collection, {"topic": "sensors/2"})) == summary(25, 25)
    assert {each["topic"] for each in collection.find()} == {"sensors/2"}
    left = sorted(each["_id"] for each in letters if each["topic"] != "sensors/2")
    query = {"_id": {"$in": [{"$oid": str(each)} for each in left[:10]]}}
    assert result(replay(service, mongod, collection, query)) == summary(10, 10)
    query = {"_id": {"$gte": {"$oid": str(left[40])}}, "$or": [{"topic": "sensors/1"}, {"topic": {"$regex": "[03]$"}}]}
    assert result(replay(service, mongod, collection, query)) == summary(35, 35)
    assert {each["_id"] for each in letters_of(collection).find()} == set(left[10:40])
    assert result(replay(service, mongod, collection, {})) == summary(30, 30)
    assert sorted(numbers_in(collection)) == list(range(100))


@pytest.mark.parametrize("query, status, said", [
    ("{", 2, "--filter: no JSON: .* at byte 1"),
    ("[1]", 2, "--filter: a query is an object"),
    ('{"_id": {"$oid": "zz"}}', 2, "--filter: no extended JSON: .*zz"),
    ('{"$nonsense": 1}', 1, r"MongoDB refuses the query: .*\$nonsense"),
    ('{"a": {"$in": 5}}', 1, r"MongoDB refuses the query: .*\$in needs an array"),
])
def test_a_filter_that_is_wrong(mongod, service, database, collection, query, status, said):
    letters_of(collection).insert_one({"a": 1})
    running = replay(service, mongod, collection, query)
    running.finish(expect=status, sums=False)
    running.wait_log(said)
    assert "write_concern" not in running.log
    assert letters_of(collection).count_documents({}) == 1


# --- what it leaves alone --------------------------------------------------------------------------------------------------


def test_letters_of_others_are_left_alone(mosquitto, mongod, service, database, collection):
    """Documents that are not as the service writes them: other _ids, a field more, less, of another type."""
    refuse_all(collection)
    letters = bury(service, mosquitto(), mongod, collection, 12)
    refuse_nothing(collection)
    collection_of_letters = letters_of(collection)
    strange = [{"_id": 1, "topic": "x"}, {"_id": "text"}, {"_id": None}, {"_id": {"a": 1}}, {"_id": True},
               {"_id": bson.ObjectId("000000000000000000000001"), "payload": "x"}, {"_id": bson.Timestamp(1, 1)},
               {"_id": bson.ObjectId("ffffffffffffffffffffffff")}]
    collection_of_letters.insert_many(strange)
    changes = [{"$set": {"note": "looked at by the operator"}}, {"$unset": {"qos": 1}}, {"$set": {"payload": "text"}},
               {"$set": {"qos": 7}}, {"$rename": {"retain": "retained"}}]
    for letter, change in zip(letters, changes):
        collection_of_letters.update_one({"_id": letter["_id"]}, change)
    before = raw(collection_of_letters)
    assert result(replay(service, mongod, collection)) == summary(20, 7, None, {"unknown_form": 13})
    after = raw(collection_of_letters)
    assert len(after) == 13 and all(before[each] == document for each, document in after.items())
    assert {each["_id"] for each in collection.find()} == {letter["_id"] for letter in letters[5:]}
    query = {"note": {"$exists": True}}
    assert result(replay(service, mongod, collection, query)) == summary(1, 0, None, {"unknown_form": 1})


def test_beside_a_running_service(mosquitto, mongod, service, database, collection):
    """Dead letters are replayed while the service makes new ones: at the end each message is there, once."""
    refuse_all(collection)
    broker = mosquitto()
    running = service(broker=broker, mongod=mongod, database=database)
    running.wait_log("subscribed to")
    join = clients.publisher_thread(broker.port, 6000, pace=1500)
    ending = threading.Event()

    def flip():
        while not ending.is_set():
            refuse_nothing(collection)
            time.sleep(0.05)
            refuse_all(collection)
            time.sleep(0.1)

    flipper = threading.Thread(target=flip)
    flipper.start()
    runs, moved = 0, 0
    try:
        while running.sums()["consumer"]["received"] < 6000:
            done = result(replay(service, mongod, collection))
            runs, moved = runs + 1, moved + done["moved"]
            assert done["not_replayable"] == 0 and set(done["still_failing_by_reason"]) <= {"refused_by_mongodb"}
    finally:
        ending.set()
        flipper.join()
    assert len(join()) == 6000
    running.stop()
    refuse_nothing(collection)
    last = result(replay(service, mongod, collection))
    print(f"\n  {runs} replays moved {moved} of 6000 messages, the last one {last['moved']}")
    assert moved > 0 and last["moved"] > 0
    assert sorted(numbers_in(collection)) == list(range(6000)) and not numbers_buried(collection)


# --- interruptions ---------------------------------------------------------------------------------------------------------

# The writes of the replay take this much longer: there is time to interrupt it.
SLOW = {"appName": "mqtt2mongo", "blockConnection": True, "blockTimeMS": 60}


@pytest.fixture
def slow(mongod):
    """The shared mongod answers the service slowly."""
    mongod.fail("alwaysOn", ["insert", "delete"], **SLOW)
    yield
    mongod.fail("off", [])


def bury_many(service, mosquitto, mongod, collection, count=5000):
    """That many dead letters that can be replayed."""
    refuse_all(collection)
    letters = bury(service, mosquitto(), mongod, collection, count)
    refuse_nothing(collection)
    assert len(letters) == count
    return {letter["_id"]: letter for letter in letters}


def check_all_there(collection, letters):
    """Each once, whole, and no dead letter is left."""
    assert letters_of(collection).count_documents({}) == 0
    documents = {each["_id"]: each for each in collection.find()}
    assert collection.count_documents({}) == len(documents) == len(letters)
    for identity, letter in letters.items():
        document = documents[identity]
        assert document["payload"] == json.loads(letter["payload"]) and document["received_at"] == letter["received_at"]
        assert document["topic"] == letter["topic"]


@pytest.mark.timeout(180)
@pytest.mark.not_sanitized("it is about moments, and starting takes too long there")
def test_kill_9_at_any_moment(mosquitto, mongod, service, database, collection, request):
    """20 times killed, each time somewhere else: every message is in one of the collections, or in both; in the end once."""
    letters = bury_many(service, mosquitto, mongod, collection, 10_000)  # 20 batches: not done before the last kill
    request.getfixturevalue("slow")
    both = []
    for number in range(20):
        running = replay(service, mongod, collection)
        time.sleep(random.uniform(0.02, 0.2))
        assert running.alive, f"it was done before kill {number}\n{running.tail()}"
        running.kill9()
        stored = {each["_id"] for each in collection.find({}, {"_id": 1})}
        buried = {each["_id"] for each in letters_of(collection).find({}, {"_id": 1})}
        assert stored | buried == set(letters), "a message is lost"
        both.append(len(stored & buried))
    print(f"\n  left in both collections after each kill: {both}; {len(buried)} to go")
    assert any(both), "it was never killed between storing and deleting"
    done = result(replay(service, mongod, collection))
    assert done["moved"] == done["looked_at"] <= len(buried)  # the last one killed may have asked for a deletion still to come
    check_all_there(collection, letters)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_the_batch(mosquitto, mongod, service, database, collection, request, number):
    letters = bury_many(service, mosquitto, mongod, collection)
    request.getfixturevalue("slow")
    running = replay(service, mongod, collection)
    wait_until(lambda: collection.count_documents({}) > 0, what="something is moved")
    running.signal(number)
    first = result(running, expect=1)
    running.wait_log("interrupted")
    assert 0 < first["moved"] < 5000 and first["moved"] % 500 == 0
    assert collection.count_documents({}) == first["moved"]
    assert letters_of(collection).count_documents({}) == 5000 - first["moved"]
    assert result(replay(service, mongod, collection)) == summary(5000 - first["moved"], 5000 - first["moved"])
    check_all_there(collection, letters)


def test_mongodb_frozen_in_the_middle(mosquitto, fresh_mongod, service):
    server = fresh_mongod()
    collection = server.client().plant.messages
    letters = bury_many(service, mosquitto, server, collection)
    server.fail("alwaysOn", ["insert", "delete"], **SLOW)
    running = replay(service, server, collection)
    wait_until(lambda: collection.count_documents({}) > 0, what="something is moved")
    server.sigstop()
    time.sleep(3)
    server.sigcont()
    assert result(running) == summary(5000, 5000)
    check_all_there(collection, letters)


WRITE_CONCERN = {"writeConcernError": {"code": 64, "errmsg": "waiting for replication timed out"}}


@pytest.mark.parametrize("command, fault", [
    *[(command, fault) for command in ("find", "insert", "delete") for fault in ({"errorCode": 112}, {"closeConnection": True})],
    ("insert", WRITE_CONCERN), ("delete", WRITE_CONCERN)])
def test_a_fault_that_passes(mosquitto, mongod, service, database, collection, command, fault):
    """The first attempt at each kind of command fails: it is said, and made again."""
    refuse_all(collection)
    letters = {letter["_id"]: letter for letter in bury(service, mosquitto(), mongod, collection, 700)}
    refuse_nothing(collection)
    mongod.fail({"times": 1}, [command], appName="mqtt2mongo", **fault)
    try:
        running = replay(service, mongod, collection, **{"mongodb.uri": mongod.uri + "&retryReads=false"})
        assert result(running) == summary(700, 700)
    finally:
        mongod.fail("off", [command])
    said = [record for record in running.records if record["level"] == "warn"]
    assert len(said) == 1 and "trying again" in said[0]["message"]
    check_all_there(collection, letters)


@pytest.mark.timeout(120)
@pytest.mark.heavy("it gives up after half a minute")
def test_mongodb_gone(mosquitto, fresh_mongod, service):
    """MongoDB dies in the middle and stays away: it gives up, says what it has done, and a repeat does the rest."""
    server = fresh_mongod()
    collection = server.client().plant.messages
    letters = bury_many(service, mosquitto, server, collection)
    server.fail("alwaysOn", ["insert", "delete"], **SLOW)
    running = replay(service, server, collection)
    wait_until(lambda: letters_of(collection).count_documents({}) <= 4000, what="something is moved")
    server.kill9()
    first = result(running, expect=1, timeout=80)
    assert 0 < first["moved"] < 5000 and "MongoDB does not answer" in running.log
    server.restart()
    assert result(replay(service, server, collection))["moved"] > 0
    check_all_there(collection, letters)


def test_rights_that_are_missing(mosquitto, fresh_mongod, service):
    """A user who may read and insert but not delete: it says so at once, and nothing is lost."""
    server = fresh_mongod(auth=True)
    collection = server.client().plant.messages
    refuse_all(collection)
    bury(service, mosquitto(), server, collection, 30)
    refuse_nothing(collection)
    privileges = [{"resource": {"db": "plant", "collection": ""}, "actions": ["find", "insert"]}]
    server.client().admin.command("createRole", "writer", privileges=privileges, roles=[])
    server.client().admin.command("createUser", "limited", pwd="secret", roles=["writer"])
    uri = server.uri.replace(f"{server.USER}:{server.PASSWORD}", "limited:secret")
    done = result(replay(service, server, collection, **{"mongodb.uri": uri}), expect=1)
    assert done == summary(30, 0)
    assert letters_of(collection).count_documents({}) == collection.count_documents({}) == 30
    assert result(replay(service, server, collection)) == summary(30, 30)
    assert letters_of(collection).count_documents({}) == 0 and collection.count_documents({}) == 30


def test_the_dead_letters_have_got_a_validator(mosquitto, mongod, service, database, collection):
    """What fails again cannot be compared with its dead letter: it stops, after what could be moved was moved."""
    collection.database.create_collection("messages", validator={"payload.n": {"$ne": 7}})
    refuse_all(collection)
    bury(service, mosquitto(), mongod, collection, 20)
    collection.database.command("collMod", "messages", validator={"payload.n": {"$ne": 7}})
    collection.database.command("collMod", "dead_letter", validator={"never": {"$exists": True}})
    running = replay(service, mongod, collection)
    assert result(running, expect=1)["moved"] == 19
    running.wait_log("MongoDB refuses a dead letter")
    assert numbers_buried(collection) == [7] and len(numbers_in(collection)) == 19


def test_a_unique_index_still_there(mosquitto, mongod, service, database, collection):
    """Of two that exclude each other the first gets in, the other stays."""
    refuse_all(collection)
    bury(service, mosquitto(), mongod, collection, ['{"n":1,"key":1}', '{"n":2,"key":1}', '{"n":3,"key":2}'])
    refuse_nothing(collection)
    collection.create_index([("payload.key", pymongo.ASCENDING)], unique=True)
    assert result(replay(service, mongod, collection)) == summary(3, 2, {"unique_index": 1})
    assert sorted(numbers_in(collection) + numbers_buried(collection)) == [1, 2, 3]
