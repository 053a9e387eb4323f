"""The count check: a run of a known number of messages ends with what of it is in MongoDB, and exits 0 only if all of it is."""

import json
import threading
import time

import pytest

import clients
from processes import wait_until


def both(service, broker, mongod, collection, count, rate=2000, **settings):
    return service(broker=broker, mongod=mongod, database=collection.database.name, role="both", settings={
        "publisher.count": count, "publisher.rate": f"{rate}/s", **settings})


def check(generated, distinct, *, acked=None, duplicates=0, missing=0):
    return {"generated": generated, "acked": generated if acked is None else acked, "distinct": distinct,
            "duplicates": duplicates, "missing": missing}


def said(running, level):
    return [record["message"] for record in running.records if record["level"] == level and record["room"] == "check"]


# --- all there -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_an_exact_run(mosquitto, mongod, service, collection, qos):
    running = both(service, mosquitto(), mongod, collection, 2000, **{"publisher.qos": qos})
    begun = time.monotonic()
    assert running.finish()["check"] == check(2000, 2000)
    assert said(running, "info") == ["all 2000 messages of this run are in MongoDB, 0 of them as dead letters"]
    assert not said(running, "error") and time.monotonic() - begun < 10


def test_as_text(mosquitto, mongod, service, collection):
    running = both(service, mosquitto(), mongod, collection, 10, **{"log.format": "text"})
    running.finish(sums=False)
    part = running.stdout.read_text().partition("\ncheck\n")[2].splitlines()
    assert part[:5] == ["  generated              10", "  acked                  10", "  distinct               10",
                        "  duplicates             0", "  missing                0"]


def test_dead_letters_are_there(mosquitto, mongod, service, collection):
    """A validator refuses a third of the messages: in the dead letters they are as safe as in the collection."""
    collection.database.create_collection("messages", validator={"payload.sequence": {"$not": {"$mod": [3, 0]}}})
    running = both(service, mosquitto(), mongod, collection, 300)
    sums = running.finish()
    assert sums["check"] == check(300, 300) and sums["consumer"]["dead_lettered"] == 100
    assert said(running, "info") == ["all 300 messages of this run are in MongoDB, 100 of them as dead letters"]


def test_others_do_not_count(mosquitto, mongod, service, collection):
    """Another publisher's messages, and an earlier run of the same seed, are no messages of this run."""
    broker = mosquitto()
    settings = {"publisher.seed": 7}
    assert both(service, broker, mongod, collection, 500, **settings).finish()["check"] == check(500, 500)
    earlier = {each["payload"]["sequence"] for each in collection.find()}
    collection.delete_many({"payload.sequence": {"$lt": 100}})
    join = clients.publisher_thread(broker.port, 1000, "sensors/other", pace=1000)
    assert both(service, broker, mongod, collection, 500, **settings).finish()["check"] == check(500, 500)
    join()
    runs = collection.distinct("payload.run")
    assert len(runs) == 1 and len(earlier) == 500
    assert collection.count_documents({"payload.run": runs[0]}) == 900


@pytest.mark.parametrize("rule", ["/sequence", "/run,/sequence", "topic,/sequence"])
def test_ids_from_the_messages(mosquitto, mongod, service, collection, rule):
    """Nothing in such an _id says when it was made."""
    running = both(service, mosquitto(), mongod, collection, 1000, **{"consumer.id": rule})
    assert running.finish()["check"] == check(1000, 1000)
    assert not said(running, "error") and collection.count_documents({"_id": {"$type": "objectId"}}) == 0


def test_only_where_both_roles_run(mosquitto, mongod, service, collection):
    broker = mosquitto()
    running = service(broker=broker, role="publisher", settings={"publisher.count": 10, "publisher.rate": "100/s"})
    assert "check" not in running.finish()
    running = both(service, broker, mongod, collection, 0, rate=100)
    running.wait_stored(50)
    assert "check" not in running.stop()


def test_duplicates_are_counted_beside(mosquitto, mongod, service, collection):
    """The broker is restarted in full flight, and what was not acknowledged is delivered, and stored, again."""
    broker = mosquitto()
    running = both(service, broker, mongod, collection, 6000, rate=3000, **{"mqtt.reconnect.min": "100ms"})
    running.wait_stored(1000)
    broker.restart()
    sums = running.finish(timeout=50)
    documents = collection.count_documents({})
    print(f"\n  {documents} documents of {sums['check']['distinct']} messages, redelivered {sums['consumer']['redelivered']}")
    assert sums["check"]["generated"] == sums["check"]["distinct"] == 6000
    assert sums["check"]["duplicates"] == documents - 6000 and sums["check"]["missing"] == 0


def test_it_waits_for_a_slow_mongodb(mosquitto, mongod, service, collection):
    """The last messages are stored long after the publisher is done: longer than it would wait without any progress."""
    mongod.fail("alwaysOn", ["insert"], appName="mqtt2mongo", blockConnection=True, blockTimeMS=6000)
    try:
        running = both(service, mosquitto(), mongod, collection, 1000, rate=20000, **{
            "consumer.workers": 1, "spool.max_size": 0})
        running.wait_log("1000 messages acknowledged, 0 failed: done", timeout=30)
        published = time.monotonic()
        sums = running.finish(timeout=50)
    finally:
        mongod.fail("off", [])
    print(f"\n  done {time.monotonic() - published:.1f} s after the publisher, {sums['consumer']['batches']} batches")
    assert time.monotonic() - published > 11
    assert sums["check"] == check(1000, 1000)


def test_what_went_through_the_spool_counts(mosquitto, fresh_mongod, service):
    """MongoDB is away for a while in the middle: all is there in the end, and the check waits for it."""
    server = fresh_mongod()
    collection = server.client().counted.messages
    running = both(service, mosquitto(), server, collection, 3000, rate=1000)
    running.wait_stored(500)
    server.kill9()
    wait_until(lambda: running.sums()["consumer"]["spooled"] > 500, what="messages go to the spool")
    server.restart()
    sums = running.finish(timeout=60)
    assert sums["check"]["distinct"] == 3000 and sums["check"]["missing"] == 0
    assert sums["consumer"]["recovered_from_spool"] == sums["consumer"]["spooled"] > 500


def test_what_stays_in_the_spool_is_missing(mosquitto, fresh_mongod, service):
    server = fresh_mongod()
    collection = server.client().counted.messages
    running = both(service, mosquitto(), server, collection, 2000, rate=1000)
    running.wait_stored(500)
    server.kill9()
    sums = running.finish(expect=1, timeout=90)
    assert sums["consumer"]["spooled"] > 500 and "check" not in sums
    assert [said(running, "error")[0].partition(":")[0]] == ["cannot count the messages of this run"]


# --- something is missing --------------------------------------------------------------------------------------------------


class Thief(threading.Thread):
    """Deletes documents behind the service's back, as soon as they appear."""

    def __init__(self, collection, query):
        super().__init__(daemon=True)
        self.collection, self.query, self.stolen, self.ending = collection, query, 0, threading.Event()

    def run(self):
        while not self.ending.is_set():
            self.stolen += self.collection.delete_many(self.query).deleted_count
            time.sleep(0.005)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.ending.set()
        self.join()


def test_what_is_missing_is_named(mosquitto, mongod, service, collection):
    """Documents vanish from the collection: exit status 1, and the log names them."""
    with Thief(collection, {"payload.sequence": {"$in": [0, 17, 123, 299]}}) as thief:
        running = both(service, mosquitto(), mongod, collection, 300, rate=300)
        sums = running.finish(expect=1, timeout=40)
    assert thief.stolen == 4
    assert sums["check"] == check(300, 296, missing=4)
    assert said(running, "error") == ["4 of 300 messages of this run are not in MongoDB, sequence 0, 17, 123, 299"]


def test_many_are_missing(mosquitto, mongod, service, collection):
    """Only the first ones are named."""
    with Thief(collection, {"payload.sequence": {"$gte": 100}}):
        running = both(service, mosquitto(), mongod, collection, 300, rate=300)
        sums = running.finish(expect=1, timeout=40)
    assert sums["check"] == check(300, 100, missing=200)
    assert said(running, "error") == ["200 of 300 messages of this run are not in MongoDB, sequence 100, 101, 102, 103, 104, 105, "
                                      "106, 107, 108, 109, …"]


def test_a_message_that_comes_late_is_not_missing(mosquitto, mongod, service, collection):
    """What was missing at the first count is there at the last: others' messages had made it seem that all had come."""
    broker = mosquitto()
    held = []
    with Thief(collection, {"payload.sequence": 5}) as thief:
        running = both(service, broker, mongod, collection, 100, rate=1000)
        running.wait_log("100 messages acknowledged")
        wait_until(lambda: thief.stolen == 1, what="one document is stolen")
        time.sleep(2)
        held = collection.find_one({"payload.sequence": 6})
    assert running.alive
    held["_id"] = None
    del held["_id"]
    held["payload"]["sequence"] = 5
    clients.publish(broker.port, [json.dumps(held["payload"])], held["topic"])  # as the broker might deliver it at last
    assert running.finish()["check"] == check(100, 100)
    assert not said(running, "error")


def test_messages_the_broker_refuses(mosquitto, mongod, service, collection, directory):
    """Refused ones are not expected in MongoDB; the run has failed all the same."""
    rules = directory("acl") / "acl"
    rules.write_text("topic readwrite #\ntopic deny sensors/device-001/#\n")
    running = both(service, mosquitto(extra=[f"acl_file {rules}"]), mongod, collection, 200, **{"publisher.devices": 2})
    sums = running.finish(expect=1)
    failed = sums["publisher"]["failed"]
    assert 0 < failed < 200
    assert sums["check"] == check(200, 200 - failed, acked=200 - failed)
    assert not said(running, "error")


def test_a_consumer_of_other_topics(mosquitto, mongod, service, collection):
    running = both(service, mosquitto(), mongod, collection, 20, **{"consumer.topic": "plant/#"})
    assert "check" not in running.finish(expect=1)
    assert said(running, "error") == ["cannot count the messages of this run: consumer.topic plant/# does not match "
                                      "publisher.topic sensors/{device}/readings"]


def test_a_consumer_of_one_device(mosquitto, mongod, service, collection):
    """Nobody is subscribed to the other devices' topics: that is why their messages are missing."""
    running = both(service, mosquitto(), mongod, collection, 50, rate=1000, **{
        "consumer.topic": "sensors/device-000/#", "publisher.devices": 2})
    sums = running.finish(expect=1, timeout=40)
    alone = sums["publisher"]["no_subscribers"]
    assert 0 < alone < 50
    assert sums["check"] == check(50, 50 - alone, missing=alone)
    assert f"{alone} were published while nobody was subscribed" in said(running, "error")[0]


@pytest.mark.timeout(120)
def test_mongodb_does_not_answer_at_the_end(mosquitto, fresh_mongod, service):
    """Nothing can be said about messages that may be there: it says that, and exits 1."""
    server = fresh_mongod()
    collection = server.client().plant.messages
    running = both(service, mosquitto(), server, collection, 400, rate=200, **{"shutdown_timeout": "1s"})
    running.wait_stored(100)
    server.kill9()
    sums = running.finish(expect=1, timeout=80)
    assert "check" not in sums
    assert len(said(running, "error")) == 1 and "cannot count the messages of this run: MongoDB does not answer" in said(
        running, "error")[0]


def test_sigterm_while_it_waits(mosquitto, mongod, service, collection):
    """It can be ended while it waits for what does not come: no result, and the exit status of a stop."""
    with Thief(collection, {"payload.sequence": 3}):
        running = both(service, mosquitto(), mongod, collection, 20, rate=1000)
        running.wait_log("20 messages acknowledged")
        time.sleep(1)
        running.stop()
    assert not said(running, "error")
