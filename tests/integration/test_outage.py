"""MongoDB or the broker away, frozen, or refusing: nothing is acknowledged that is not stored, it is said once what is wrong and
what to do about it, and everything goes on by itself when the fault is gone.

Real servers and an independent publisher (paho). Each test states the fault, the proof that it happened, and what is held.
"""

import json
import time

import pytest

import clients
from processes import wait_until

CLIENT = "under-test"
SESSION = f"{CLIENT}-1"
# keepalive 10 s: what cannot be stored is held for 10 s / 2 - 2 s = 3 s. No spool: this is about holding.
QUICK = {"spool.max_size": 0, "mqtt.client_id": CLIENT, "mqtt.keepalive": "10s", "mqtt.reconnect.min": "100ms",
         "mqtt.reconnect.max": "500ms"}
SUBSCRIBED = "subscribed to sensors/#"


def figures(**held):
    print("  ".join(f"{name} {value}" for name, value in held.items()))


def payloads(count, first=0):
    return [b'{"n": %d}' % number for number in range(first, first + count)]


def publish(broker, count, first=0, **options):
    """Publish {"n": first} … and return the numbers that the broker acknowledged: all of them."""
    numbers = {json.loads(payload)["n"] for payload in clients.publish(broker.port, payloads(count, first), **options)}
    assert len(numbers) == count
    return numbers


def numbers_in(collection):
    """The numbers stored, one for each document."""
    return [document["payload"]["n"] for document in collection.find({}, {"payload": 1})]


def wait_numbers(collection, numbers, timeout=30):
    """Wait until each of `numbers` is stored; how many documents there are beyond."""
    wait_until(lambda: numbers <= set(numbers_in(collection)), timeout,
               lambda: f"{len(numbers - set(numbers_in(collection)))} of {len(numbers)} messages are not stored", interval=0.1)
    return collection.count_documents({}) - len(numbers)


def complaints(running, after=0):
    """The warnings and errors it has logged since mark `after`."""
    found = (json.loads(line) for line in running.log[after:].splitlines() if line.startswith("{"))
    return [record["message"] for record in found if record["level"] in ("warn", "error")]


def in_session(broker, **options):
    """The numbers of the messages that the broker still holds for the service's session; it is ended."""
    return {json.loads(message.payload)["n"] for message in clients.take_session(broker.port, SESSION, **options)}


def consumer(service, broker, server, *, wait=SUBSCRIBED, **settings):
    running = service(broker=broker, mongod=server, settings=QUICK | settings)
    if wait:
        running.wait_log(wait)
    return running


def messages(server, database="mqtt2mongo"):
    return server.client()[database].messages


# ---- MongoDB away ----


def test_mongodb_away_at_the_start_acknowledges_nothing(service, mosquitto, fresh_mongod):
    """Fault: MongoDB is down when the service starts, and stays down beyond the hold limit.
    Proof: the service says so, and hands the messages back.
    Held: the broker has every message in its session afterwards: none was acknowledged. A handful of lines, none twice;
    SIGTERM exits with 0."""
    broker, server = mosquitto(), fresh_mongod()
    server.kill9()
    running = consumer(service, broker, server)
    published = publish(broker, 500)
    running.wait_log("handed back to the broker", timeout=30)
    publish(broker, 100, first=500)
    said = complaints(running)
    sums = running.stop(timeout=15)["consumer"]
    left = in_session(broker)
    figures(messages=600, stored=sums["stored"], returned=sums["returned"], in_the_session=len(left), lines=len(said))
    assert left == published | set(range(500, 600)), "messages were acknowledged that are not stored"
    assert sums["stored"] == 0 and sums["received"] == sums["returned"] > 0 and sums["in_flight"] == 0
    assert len(said) == len(set(said)) <= 6, said
    assert any("is mongod running, and is mongodb.uri right?" in line for line in said), said


@pytest.mark.timeout(90)
def test_mongodb_comes_up_after_the_service(service, mosquitto, fresh_mongod):
    """Fault: MongoDB is down for 10 s and more when the service starts, while messages are published.
    Proof: nothing is stored until it is up.
    Held: then everything is, without a restart; a handful of lines in all that time, and one when MongoDB answers."""
    broker, server = mosquitto(), fresh_mongod()
    server.kill9()
    running = consumer(service, broker, server)
    begun = time.monotonic()
    published = publish(broker, 2000, pace=200, timeout=30)
    down = time.monotonic() - begun
    assert running.sums()["consumer"]["stored"] == 0
    said = complaints(running)
    server.restart()
    surplus = wait_numbers(messages(server), published)
    running.wait_log("MongoDB answers again")
    sums = running.stop()["consumer"]
    left = in_session(broker)
    figures(messages=len(published), down=f"{down:.0f} s", stored=sums["stored"], returned=sums["returned"], lines=len(said),
            lost=0, duplicates=surplus)
    assert not left and surplus == 0 and sums["stored"] == len(published)
    assert down >= 9 and len(said) <= 6, said
    assert running.log.count("MongoDB answers again") == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize("end", ["goes on", "killed and restarted"])
def test_a_frozen_mongodb(service, mosquitto, fresh_mongod, end):
    """Fault: MongoDB is frozen (SIGSTOP) mid-stream, beyond the hold limit of 3 s and the socket timeout of 5 s; connections
    stay open and say nothing. It freezes just when a full round of 800 messages comes, in four batches for two workers.
    Proof: the connection to the broker is given up, the sums show what was returned.
    Held: no message is acknowledged meanwhile, all are stored when it goes on, sums add up throughout, the service survives."""
    broker, server = mosquitto(), fresh_mongod()
    running = consumer(service, broker, server,
                       **{"mongodb.uri": f"{server.uri}&socketTimeoutMS=5000", "consumer.batch.count": 800,
                          "consumer.batch.interval": "0s"})
    join = clients.publisher_thread(broker.port, payloads(3000), pace=500)
    running.wait_stored(300)
    running.sigstop()
    published = publish(broker, 2000, first=3000)
    server.sigstop()
    mark = running.mark()
    running.sigcont()
    running.wait_log("given up unacknowledged", timeout=15, after=mark)
    running.wait_log("handed back to the broker", timeout=30, after=mark)
    frozen = running.sums()["consumer"]
    published |= {json.loads(payload)["n"] for payload in join()}
    said = complaints(running, mark)
    assert running.sums()["consumer"]["stored"] == frozen["stored"]
    if end == "goes on":
        server.sigcont()
    else:
        server.kill9()
        server.restart()
    surplus = wait_numbers(messages(server), published)
    sums = running.stop()["consumer"]
    left = in_session(broker)
    figures(messages=len(published), returned=sums["returned"], lines=len(said), lost=0, duplicates=surplus)
    assert len(published) == 5000 and not left
    assert frozen["returned"] >= 700 and frozen["in_flight"] == 0
    assert sums["returned_by_cause"] == {"hold_limit": sums["returned"]}
    assert surplus <= sums["returned"], "only what was returned may be stored twice"
    assert len(said) <= 6, said


@pytest.mark.timeout(120)
def test_a_short_freeze_of_mongodb_costs_nothing(service, mosquitto, fresh_mongod):
    """Fault: MongoDB is frozen three times for less than the hold limit (28 s, for keepalive is 60 s).
    Proof: nothing is stored meanwhile, with messages in flight.
    Held: the connection is kept, nothing is returned, nothing is stored twice, nothing is complained about."""
    broker, server = mosquitto(), fresh_mongod()
    running = consumer(service, broker, server, **{"mqtt.keepalive": "60s"})
    join = clients.publisher_thread(broker.port, payloads(4000), pace=500)
    held = []
    for number in range(3):
        running.wait_stored(200 + running.sums()["consumer"]["stored"])
        server.sigstop()
        sums = running.sums()["consumer"]
        wait_until(lambda: running.sums()["consumer"]["in_flight"] > 0, what="a batch waits")
        begun = time.monotonic()
        wait_until(lambda: time.monotonic() - begun > 1)  # how long the fault lasts
        held.append(running.sums()["consumer"]["in_flight"])
        assert running.sums()["consumer"]["stored"] - sums["stored"] <= 800 and held[number] > 0
        server.sigcont()
    published = {json.loads(payload)["n"] for payload in join()}
    surplus = wait_numbers(messages(server), published)
    sums = running.stop()["consumer"]
    figures(messages=len(published), freezes=3, held=held, returned=sums["returned"], lost=0, duplicates=surplus)
    assert len(published) == 4000 and surplus == 0 and sums["returned"] == 0 and sums["redelivered"] == 0
    assert not complaints(running) and not in_session(broker)


@pytest.mark.timeout(90)
def test_a_mongodb_srv_name_that_cannot_be_resolved(service, mosquitto):
    """Fault: mongodb+srv:// with a name that does not exist.
    Proof: the error names it.
    Held: said no more than a few times in 10 s; the messages stay in the session; SIGTERM exits with 0 quickly."""
    broker = mosquitto()
    uri = "mongodb+srv://cluster.example.invalid/"
    running = consumer(service, broker, None, **{"mongodb.uri": uri, "shutdown_timeout": "3s"})
    published = publish(broker, 200)
    running.wait_log(r"mongodb\.uri.*cluster\.example\.invalid", timeout=40)
    begun = time.monotonic()
    wait_until(lambda: time.monotonic() - begun > 10, timeout=20)  # the time in which the lines are counted
    said = complaints(running)
    assert running.sums()["consumer"]["stored"] == 0
    begun = time.monotonic()
    sums = running.stop(timeout=10)["consumer"]
    took = time.monotonic() - begun
    left = in_session(broker)
    figures(messages=200, in_the_session=len(left), lines=len(said), exit_after=f"{took:.1f} s", returned=sums["returned"])
    assert left == published and sums["stored"] == 0
    assert len([line for line in said if "mongodb.uri" in line]) <= 3 and len(said) <= 6, said
    assert took < 5


# ---- credentials ----


@pytest.mark.timeout(120)
def test_wrong_mongodb_credentials(service, mosquitto, fresh_mongod):
    """Fault: the user of mongodb.uri does not exist; then it does, without any role; then it has one.
    Proof: MongoDB's own errors 18 and 13 in the log.
    Held: an error with the remedy each time, no tight loop; nothing is acknowledged; once the role is granted everything is
    stored without a restart."""
    broker, server = mosquitto(), fresh_mongod(auth=True)
    uri = f"mongodb://writer:pass-word@127.0.0.1:{server.port}/?replicaSet=rs0&authSource=mqtt2mongo"
    running = consumer(service, broker, server, **{"mongodb.uri": uri})
    published = publish(broker, 300)
    begun = time.monotonic()
    running.wait_log("check user name, password and authSource in mongodb.uri", timeout=20)
    running.wait_log("handed back to the broker", timeout=20)
    mark = running.mark()
    wait_until(lambda: time.monotonic() - begun > 10, timeout=20)  # the time in which the lines are counted
    unknown, later = complaints(running), complaints(running, mark)
    assert len(unknown) <= 8 and len(later) <= 1, (unknown, later)

    database = server.client().mqtt2mongo
    database.command("createUser", "writer", pwd="pass-word", roles=[])
    running.wait_log("needs the role readWrite on mongodb.database", timeout=30)
    begun, mark = time.monotonic(), running.mark()
    others = server.client().others.things
    while time.monotonic() - begun < 7:  # two hold limits, on a server that is busy with others: its cluster time moves on
        others.insert_one({})
    unauthorized = complaints(running, mark)
    assert len([line for line in unauthorized if "cannot store" in line]) <= 6 and len(unauthorized) <= 15, unauthorized
    assert database.messages.count_documents({}) == 0 and running.sums()["consumer"]["stored"] == 0

    database.command("grantRolesToUser", "writer", roles=["readWrite"])
    surplus = wait_numbers(database.messages, published)
    sums = running.stop()["consumer"]
    left = in_session(broker)
    figures(messages=len(published), lines_unknown=len(unknown), lines_unauthorized=len(unauthorized), returned=sums["returned"],
            lost=0, duplicates=surplus)
    assert not left and surplus == 0
    assert "pass-word" not in running.log


def test_wrong_broker_credentials(service, mosquitto, mongod, database, collection):
    """Fault: the broker does not know the service's password; then it does, after a restart of the broker.
    Proof: the broker's refusal in both logs.
    Held: an error that names the settings, no tight loop (waits grow), and then everything is stored without a restart."""
    broker = mosquitto(users={"tester": "secret", "writer": "pass-word-1"})
    running = service(broker=broker, mongod=mongod, database=database,
                      settings=QUICK | {"mqtt.username": "writer", "mqtt.password": "pass-word-2"})
    running.wait_log("check mqtt.username, mqtt.password and the broker's access rules")
    begun, mark, attempts = time.monotonic(), running.mark(), broker.log.count("New connection")
    wait_until(lambda: time.monotonic() - begun > 5)  # the time in which the lines are counted
    said, attempts = complaints(running, mark), broker.log.count("New connection") - attempts
    assert len(said) <= 3, said
    assert 5 <= attempts <= 60, "an attempt about every 0.25 to 0.5 s, each of one or two connections"
    assert running.sums()["consumer"]["received"] == 0
    broker.users["writer"] = "pass-word-2"
    broker.restart()
    running.wait_log(SUBSCRIBED)
    published = publish(broker, 100, username="tester", password="secret")
    surplus = wait_numbers(collection, published)
    sums = running.stop()["consumer"]
    figures(messages=len(published), attempts_in_5s=attempts, lines=len(said), lost=0, duplicates=surplus)
    assert surplus == 0 and sums["stored"] == 100
    assert "pass-word" not in running.log


# ---- the broker away ----


@pytest.mark.timeout(90)
def test_the_broker_comes_up_after_the_service(service, mosquitto, mongod, database, collection):
    """Fault: the broker is down when the service starts, and is stopped for a while later on.
    Proof: refused connections in the log, each once.
    Held: the service connects by itself, with waits that grow to mqtt.reconnect.max and no further, and subscribes anew; what is
    published then is stored."""
    broker = mosquitto()
    broker.stop()
    running = service(broker=broker, mongod=mongod, database=database, settings=QUICK | {"mqtt.reconnect.max": "2s"})
    running.wait_log("is the broker running, and are mqtt.host and mqtt.port right?")
    begun = time.monotonic()
    wait_until(lambda: time.monotonic() - begun > 6)  # the time in which the lines are counted
    said = complaints(running)
    assert running.alive and len(said) <= 3, said
    broker.start()
    begun = time.monotonic()
    running.wait_log(SUBSCRIBED)
    took = time.monotonic() - begun
    published = publish(broker, 100)
    wait_numbers(collection, published)
    mark = running.mark()
    broker.stop()
    running.wait_log("is the broker running", after=mark)
    broker.start()
    running.wait_log(SUBSCRIBED, after=mark)
    published |= publish(broker, 100, first=100)
    surplus = wait_numbers(collection, published)
    sums = running.stop()["consumer"]
    figures(messages=len(published), lines=len(said), connected_after=f"{took:.1f} s", lost=0, duplicates=surplus)
    assert took < 5 and surplus == 0 and sums["stored"] == 200 and sums["returned"] == 0


@pytest.mark.timeout(90)
def test_the_publisher_survives_restarts_of_the_broker(service, mosquitto):
    """Fault: the broker is stopped and restarted three times while the service publishes 6,000 messages.
    Proof: the publisher's connection was lost that often, and messages were on the way then.
    Held: it ends by itself with every message acknowledged; each is with an independent subscriber's session."""
    broker = mosquitto()
    clients.create_session(broker.port, "independent", "sensors/#")
    running = service(broker=broker, role="publisher", settings={
        "publisher.count": 6000, "publisher.rate": "1000/s", "mqtt.reconnect.min": "100ms", "mqtt.reconnect.max": "300ms"})
    restarts = 3
    for _ in range(restarts):
        mark, acked = running.mark(), running.sums()["publisher"]["acked"]
        wait_until(lambda acked=acked: running.sums()["publisher"]["acked"] > acked + 700, what="messages are acknowledged")
        broker.restart()
        running.wait_log("publisher: connected to", after=mark)
    sums = running.finish(timeout=40)["publisher"]
    received = [json.loads(message.payload)["sequence"] for message in clients.take_session(broker.port, "independent")]
    missing = set(range(6000)) - set(received)
    figures(messages=6000, restarts=restarts, acked=sums["acked"], lost=len(missing),
            duplicates=len(received) - len(set(received)))
    assert sums["acked"] == sums["generated"] == 6000 and sums["failed"] == 0 and sums["unacknowledged"] == 0
    assert not missing
    assert running.log.count("publisher: connected to") == restarts + 1


@pytest.mark.timeout(90)
def test_both_roles_survive_restarts_of_the_broker(service, mosquitto, mongod, database, collection):
    """Fault: as above, for one process that publishes and consumes.
    Held: it ends by itself with exit status 0, every message of its own acknowledged and stored."""
    broker = mosquitto()
    running = service(broker=broker, mongod=mongod, database=database, role="both", settings={
        "publisher.count": 4000, "publisher.rate": "1000/s", "mqtt.reconnect.min": "100ms", "mqtt.reconnect.max": "300ms"})
    for _ in range(2):
        mark = running.mark()
        running.wait_stored(running.sums()["consumer"]["stored"] + 500)
        broker.restart()
        running.wait_log("consumer: connected to", after=mark)
    sums = running.finish(timeout=40)
    stored = [document["payload"]["sequence"] for document in collection.find({}, {"payload.sequence": 1})]
    missing = set(range(4000)) - set(stored)
    figures(messages=4000, restarts=2, lost=len(missing), duplicates=len(stored) - len(set(stored)))
    assert sums["publisher"]["acked"] == 4000 and not missing
    assert sums["consumer"]["stored"] == len(stored)


# ---- MongoDB refuses ----


def test_a_document_that_mongodb_refuses(service, mosquitto, mongod, mongo, database, collection):
    """Fault: the collection has a validator that refuses every 10th document, and a unique index that every 15th violates.
    Proof: MongoDB's own errors (121 and 11000) in the dead letters.
    Held: those alone are dead letters, byte for byte and with the reason; their neighbours are stored; all are acknowledged."""
    mongo[database].create_collection("messages", validator={"$jsonSchema": {
        "properties": {"payload": {"properties": {"n": {"not": {"multipleOf": 10}}}}}}})
    collection.create_index("payload.key", unique=True)
    collection.insert_one({"payload": {"n": 1, "key": "taken"}})
    broker = mosquitto()
    sent = {}
    for number in range(1000, 1300):
        key = "taken" if number % 15 == 0 else number
        sent[number] = json.dumps({"n": number, "key": key}).encode() + b"  "  # spaces: the bytes are kept
    running = service(broker=broker, mongod=mongod, database=database, settings=QUICK)
    running.wait_log(SUBSCRIBED)
    assert len(clients.publish(broker.port, list(sent.values()))) == 300
    running.wait_stored(1)
    wait_until(lambda: running.sums()["consumer"]["received"] == 300 and running.sums()["consumer"]["in_flight"] == 0, 30,
               "all are settled")
    sums = running.stop()["consumer"]
    letters = {json.loads(letter["payload"])["n"]: letter for letter in mongo[database].dead_letter.find()}
    refused = {number for number in sent if number % 10 == 0}
    taken = {number for number in sent if number % 15 == 0} - refused
    codes = {number: letter["reason"]["code"] for number, letter in letters.items()}
    figures(messages=300, stored=sums["stored"], dead_lettered=sums["dead_lettered_by_reason"], lost=0)
    assert codes == {number: "refused_by_mongodb" for number in refused} | {number: "unique_index" for number in taken}
    assert all(letter["payload"] == sent[number] for number, letter in letters.items())
    assert all("validation" in letters[number]["reason"]["message"] for number in refused), letters[min(refused)]
    assert all("E11000" in letters[number]["reason"]["message"] for number in taken), letters[min(taken)]
    assert sorted(numbers_in(collection)) == sorted({1} | (sent.keys() - refused - taken))
    assert sums["dead_lettered_by_reason"] == {"refused_by_mongodb": len(refused), "unique_index": len(taken)}
    assert not in_session(broker)


@pytest.mark.timeout(120)
def test_a_write_concern_that_cannot_be_met(service, mosquitto, fresh_mongod):
    """Fault: w:3 on a replica set of one: MongoDB writes the documents and says that the write concern was not met.
    Proof: MongoDB's error in the log; the documents are there all the same.
    Held: nothing is acknowledged: what came is returned, all is still in the session; a clear error, not a thousand; SIGTERM
    exits with 0; with a write concern that can be met everything is stored."""
    broker, server = mosquitto(), fresh_mongod()
    running = consumer(service, broker, server, **{"mongodb.write_concern.w": "3", "mongodb.write_concern.timeout": "500ms"})
    published = publish(broker, 300)
    running.wait_log(r"Not enough data-bearing nodes.*check mongodb\.write_concern", timeout=20)
    wait_until(lambda: running.log.count("handed back to the broker") >= 2, 30, "messages are handed back, and once more")
    begun, mark = time.monotonic(), running.mark()
    wait_until(lambda: time.monotonic() - begun > 7, timeout=20)  # two hold limits: the time in which the lines are counted
    said = complaints(running, mark)
    sums = running.stop(timeout=15)["consumer"]
    collection = messages(server)
    written = collection.count_documents({})
    assert sums["stored"] == 0 and sums["returned"] == sums["received"] > 0 and sums["in_flight"] == 0
    assert written > 0 and len(said) <= 15, said
    assert "E11000" not in running.log, "its own earlier attempt hides what is wrong"

    running.settings |= {"mongodb.write_concern.w": "majority"}
    mark = running.mark()
    running.start()
    running.wait_log(SUBSCRIBED, after=mark)
    running.wait_stored(300)
    second = running.stop()["consumer"]
    left = in_session(broker)
    stored = numbers_in(collection)
    figures(messages=len(published), returned=sums["returned"], written_without_the_write_concern=written, lines=len(said),
            lost=len(published - set(stored)), duplicates=len(stored) - len(published))
    assert published <= set(stored) and not left
    assert second["received"] == second["stored"] == 300, "none of the 300 had been acknowledged before"


def test_a_dead_letter_that_mongodb_refuses(service, mosquitto, mongod, mongo, database, collection):
    """Fault: the collection of the dead letters has a validator that refuses them all.
    Proof: the error in the log.
    Held: the message is not acknowledged and not lost: it is returned, and a dead letter as soon as the validator is gone."""
    letters = mongo[database].create_collection("dead_letter", validator={"never": {"$exists": True}})
    broker = mosquitto()
    running = service(broker=broker, mongod=mongod, database=database, settings=QUICK)
    running.wait_log(SUBSCRIBED)
    assert clients.publish(broker.port, ["no JSON"])
    running.wait_log("MongoDB refuses a dead letter.*consumer.dead_letter")
    running.wait_log("handed back to the broker", timeout=20)
    assert letters.count_documents({}) == 0 and running.sums()["consumer"]["dead_lettered"] == 0
    mongo[database].command("collMod", "dead_letter", validator={})
    wait_until(lambda: letters.count_documents({}) == 1, 20, "the dead letter")
    sums = running.stop()["consumer"]
    figures(messages=1, returned=sums["returned"], dead_lettered=sums["dead_lettered"], lost=0)
    assert sums["dead_lettered"] == 1 and sums["returned"] >= 1
    assert letters.find_one()["payload"] == b"no JSON" and collection.count_documents({}) == 0
    assert not clients.take_session(broker.port, SESSION)


@pytest.mark.timeout(90)
def test_a_database_that_is_dropped_again_and_again(service, mosquitto, fresh_mongod):
    """Fault: somebody drops the database in a loop while messages are stored.
    Proof: MongoDB's error 215 (DatabaseDropPending), which it lists for each document, where the drop was met; drops succeed.
    Held: that says nothing about the documents: none is taken for one MongoDB refuses. All that was received counts as stored."""
    broker, server = mosquitto(), fresh_mongod()
    running = consumer(service, broker, server)
    client, drops = server.client(), 0
    join = clients.publisher_thread(broker.port, 3000, pace=600)
    while running.sums()["consumer"]["stored"] < 2900:
        client.drop_database("mqtt2mongo")
        drops += 1
    join()
    running.wait_stored(3000)
    sums = running.stop()["consumer"]
    figures(messages=3000, drops=drops, met="(215)" in running.log, dead_lettered=sums["dead_lettered"], stored=sums["stored"])
    assert drops > 10 and sums["dead_lettered"] == 0 and sums["stored"] == sums["received"] - sums["returned"] >= 3000
