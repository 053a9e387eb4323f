"""The main job, end to end: messages of a broker into MongoDB, and generated messages into a broker."""

import contextlib
import datetime
import json
import pathlib
import random
import statistics
import time
from collections import Counter

import bson
import pytest

import clients
from processes import TIME_FACTOR, wait_until
from servers import mosquittos

DYNAMIC_SECURITY = "/usr/lib/x86_64-linux-gnu/mosquitto_dynamic_security.so"


def consuming(running):
    """Wait until the broker has taken the subscription of this life of the service."""
    running.wait_log("subscribed to")
    return running


def messages_of(running, level):
    return [record["message"] for record in running.records if record["level"] == level]


def moment(reading):
    return datetime.datetime.fromisoformat(reading["time"].replace("Z", "+00:00")).timestamp()


def typed(value):
    """A value with the BSON type of each part made visible, so that 1, Int64(1) and 1.0 differ."""
    if isinstance(value, dict):
        return [(name, typed(part)) for name, part in value.items()]
    if isinstance(value, list):
        return [typed(part) for part in value]
    return type(value).__name__, value


# --- the publisher alone -------------------------------------------------------------------------------------------------


def publish_and_collect(mosquitto, service, count, qos=1, **settings):
    """Run a publisher of `count` messages to its end; the sums, and what a subscriber got."""
    broker = mosquitto()
    with clients.Subscriber(broker.port, qos=2) as subscriber:
        running = service(broker=broker, role="publisher", settings={
            "publisher.count": count, "publisher.qos": qos, "publisher.rate": "1000/s", **settings})
        sums = running.finish()
        messages = subscriber.wait(count)
    assert set(sums) == {"publisher", "loop"}
    return sums["publisher"], messages, running


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_publisher_counts_to_the_end(mosquitto, service, qos, protocol):
    sums, messages, running = publish_and_collect(mosquitto, service, 500, qos, **{
        "mqtt.protocol": protocol, "publisher.topic": "plant/{device}/x/{device}", "publisher.devices": 7})
    assert sums == {"generated": 500, "acked": 500, "failed": 0, "unacknowledged": 0, "skipped": 0, "no_subscribers": 0}
    assert Counter(message.qos for message in messages) == {qos: 500}
    readings = [json.loads(message.payload) for message in messages]
    assert sorted(reading["sequence"] for reading in readings) == list(range(500))
    assert {message.topic for message in messages} == {f"plant/device-{n:03}/x/device-{n:03}" for n in range(7)}
    for message, reading in zip(messages, readings):
        assert message.topic == "plant/{0}/x/{0}".format(reading["device"])
        assert not message.retain
        assert set(reading) == {"device", "run", "sequence", "time", "temperature", "humidity", "battery", "online"}
        assert len(reading["time"]) == len("2026-11-22T20:18:24.123Z")
        assert abs(moment(reading) - time.time()) < 60
    assert len({reading["run"] for reading in readings}) == 1
    assert not messages_of(running, "error") and not messages_of(running, "warn")


def test_the_same_seed_gives_the_same_messages(mosquitto, service):
    def readings(seed):
        _, messages, _ = publish_and_collect(mosquitto, service, 300, **{"publisher.seed": seed})
        found = [(message.topic, json.loads(message.payload)) for message in messages]
        return [(topic, {name: value for name, value in reading.items() if name != "time"}) for topic, reading in found]

    first = readings(7)
    assert readings(7) == first
    other = readings(8)
    assert other != first
    assert [reading["temperature"] for _, reading in other] != [reading["temperature"] for _, reading in first]
    unseeded = readings("random")
    assert unseeded not in (first, other)


def test_publisher_keeps_its_rate(mosquitto, service, capsys):
    rate, seconds = 200, 6
    count = rate * seconds
    sums, messages, _ = publish_and_collect(mosquitto, service, count, **{"publisher.rate": f"{rate}/s"})
    assert sums["skipped"] == 0
    moments = [moment(json.loads(message.payload)) for message in messages]
    reached = (count - 1) / (moments[-1] - moments[0])
    late = [at - moments[0] - number / rate for number, at in enumerate(moments)]
    drift = statistics.median(late[-count // 4:]) - statistics.median(late[:count // 4])
    with capsys.disabled():
        print(f"\n  {rate}/s for {seconds} s: reached {reached:.2f}/s, latest {max(late) * 1000:.0f} ms late, "
              f"drift {drift * 1000:.1f} ms")
    assert reached == pytest.approx(rate, rel=0.02)
    assert abs(drift) < 0.02 * TIME_FACTOR, "the schedule is absolute: lateness must not grow"
    assert max(late) < 0.5 * TIME_FACTOR


def test_a_rate_below_one(mosquitto, service):
    """0.5/s: the first at once, then one every two seconds."""
    _, messages, _ = publish_and_collect(mosquitto, service, 3, **{"publisher.rate": "0.5/s"})
    moments = [moment(json.loads(message.payload)) for message in messages]
    assert [later - before for before, later in zip(moments, moments[1:])] == pytest.approx([2, 2], abs=0.1 * TIME_FACTOR)


@pytest.mark.not_sanitized("it is about speed")
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_the_highest_rate(mosquitto, service, capsys, qos):
    """20,000 messages a second, which nobody is subscribed to, so that only publisher and broker work."""
    broker = mosquitto()
    running = service(broker=broker, role="publisher", settings={
        "publisher.rate": "20000/s", "publisher.count": 60_000, "publisher.qos": qos})
    running.wait_log("connected to")
    begun = time.monotonic()
    sums = running.finish(timeout=50)
    reached = 60_000 / (time.monotonic() - begun)
    publisher = sums["publisher"]
    with capsys.disabled():
        print(f"\n  QoS {qos}: asked for 20000/s, reached {reached:.0f}/s, skipped {publisher['skipped']}, longest iteration "
              f"{sums['loop']['longest_iteration_ms']:.1f} ms")
    assert publisher["acked"] == publisher["generated"] == 60_000
    assert publisher["no_subscribers"] == (60_000 if qos == 1 else 0)  # only PUBACK tells; of QoS 2 the library keeps it
    assert reached > 20_000 / (8 if qos == 2 else 4)
    assert sums["loop"]["longest_iteration_ms"] < 1000


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_nobody_is_subscribed(mosquitto, service, protocol):
    """Only MQTT 5 brokers say so. It is said once, however many messages there are, also over a reconnect."""
    broker = mosquitto()
    running = service(broker=broker, role="publisher", settings={
        "publisher.count": 400, "publisher.rate": "400/s", "mqtt.protocol": protocol, "mqtt.reconnect.min": "100ms"})
    wait_until(lambda: running.sums()["publisher"]["acked"] > 50, what="some were acknowledged", interval=0.05)
    broker.restart()
    sums = running.finish()["publisher"]
    said = [text for text in messages_of(running, "warn") if "nobody is subscribed" in text]
    if protocol == "5":
        assert len(said) == 1 and "sensors/device-0" in said[0]
        assert sums["no_subscribers"] == sums["acked"] == 400
    else:
        assert not said and sums["no_subscribers"] == 0 and sums["acked"] == 400


def test_a_publisher_that_is_not_allowed_to_publish(mosquitto, service, directory):
    """The broker says no to each message: they count as failed, one line says why, and so does the exit status."""
    rules = directory("acl") / "acl"
    rules.write_text("topic read #\n")
    broker = mosquitto(extra=[f"acl_file {rules}"])
    running = service(broker=broker, role="publisher", settings={"publisher.count": 5, "publisher.rate": "100/s"})
    sums = running.finish(expect=1)["publisher"]
    assert (sums["generated"], sums["acked"], sums["failed"]) == (5, 0, 5)
    said = messages_of(running, "warn") + messages_of(running, "error")
    assert len(said) == 1 and "sensors/device-0" in said[0] and "access rules" in said[0], running.tail()


def test_publisher_stops_on_sigterm(mosquitto, service):
    broker = mosquitto()
    with clients.Subscriber(broker.port) as subscriber:
        running = service(broker=broker, role="publisher", settings={"publisher.rate": "500/s"})
        subscriber.wait(200)
        sums = running.stop()["publisher"]
        assert sums["acked"] == sums["generated"] >= 200
        assert len(subscriber.wait(sums["acked"])) == sums["acked"]


# --- both roles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_both_roles_store_everything_published(mosquitto, mongod, service, database, collection, qos, protocol):
    running = service(broker=mosquitto(), mongod=mongod, database=database, role="both", settings={
        "publisher.count": 2000, "publisher.rate": "2000/s", "publisher.qos": qos, "mqtt.protocol": protocol})
    sums = running.finish()
    assert sums["publisher"] == {"generated": 2000, "acked": 2000, "failed": 0, "unacknowledged": 0, "skipped": 0,
                                 "no_subscribers": 0}
    assert sums["consumer"]["received"] == sums["consumer"]["stored"] == 2000
    assert sums["consumer"]["in_flight"] == sums["consumer"]["returned"] == sums["consumer"]["dead_lettered"] == 0
    documents = list(collection.find())
    assert sorted(document["payload"]["sequence"] for document in documents) == list(range(2000))
    for document in documents:
        assert document["topic"] == f"sensors/{document['payload']['device']}/readings"
        assert document["qos"] == min(qos, 1)
    assert not messages_of(running, "error") and not messages_of(running, "warn")


def test_both_roles_in_two_processes(mosquitto, mongod, service, database, collection):
    """One state directory serves a consumer and a publisher: they have a lock each."""
    broker = mosquitto()
    consumer = consuming(service(broker=broker, mongod=mongod, database=database))
    publisher = service(broker=broker, role="publisher", settings={
        "publisher.count": 1000, "publisher.rate": "1000/s", "state_dir": consumer.state})
    assert publisher.finish()["publisher"]["acked"] == 1000
    consumer.wait_stored(1000)
    sums = consumer.stop()["consumer"]
    assert sums["stored"] == sums["received"] == 1000
    assert sorted(document["payload"]["sequence"] for document in collection.find()) == list(range(1000))


def test_both_roles_until_sigterm(mosquitto, mongod, service, database, collection):
    """Ended in full flight: the publisher first, and what it published is stored before the consumer goes."""
    running = service(broker=mosquitto(), mongod=mongod, database=database, role="both",
                      settings={"publisher.rate": "2000/s"})
    running.wait_stored(1000)
    sums = running.stop()
    assert sums["publisher"]["unacknowledged"] == 0 and sums["consumer"]["in_flight"] == 0
    stored = [document["payload"]["sequence"] for document in collection.find()]
    assert len(stored) == len(set(stored)) == sums["consumer"]["stored"]
    # What the broker had not delivered when the consumer went waits in its session.
    running.settings |= {"role": "consumer"}
    mark = running.mark()
    running.start()
    running.wait_log("subscribed to", after=mark)
    wait_until(lambda: collection.count_documents({}) == sums["publisher"]["acked"], what="the rest is stored")
    running.stop()
    assert {document["payload"]["sequence"] for document in collection.find()} == set(range(sums["publisher"]["acked"]))


# --- the consumer --------------------------------------------------------------------------------------------------------

TOPICS = ["sensors/a", "sensors/b/readings", "sensors", "sensors/", "sensors//x", "sensors/ü/日本語", "sensors/😀 with space",
          "sensors/" + "deep/" * 60 + "end", "sensors/+plus-like-%23".replace("+", "＋")]


def made_up(number):
    """A value with something of every type, other text in each, and what BSON makes of it."""
    dice = random.Random(number)
    text = "".join(dice.choice("aZ0 \"\\/\b\n\x1f\x00äß日😀\u2028") for _ in range(dice.randrange(40)))
    return {
        "number": number,
        "text": text,
        "": {"$set": [], "a.b": {}, "ключ": None},
        "list": [True, False, None, dice.random() * 10 ** dice.randrange(-20, 20), [-number, [text]]],
        "long": bson.int64.Int64(dice.randrange(2**31, 2**63) * dice.choice([1, -1])),
        "float": float(number),
    }


def test_every_document_is_equal_to_its_message(mosquitto, mongod, service, database, collection):
    """20,000 messages: each is there once, with its topic, its content and its types, and nothing else is."""
    broker = mosquitto()
    running = consuming(service(broker=broker, mongod=mongod, database=database))
    values = [made_up(number) for number in range(20_000)]
    payloads = [json.dumps(value, ensure_ascii=number % 2 == 0, indent=[None, 1][number % 3 == 0]).encode()
                for number, value in enumerate(values)]
    before = datetime.datetime.now(datetime.timezone.utc)
    assert len(clients.publish(broker.port, payloads, lambda index: TOPICS[index % len(TOPICS)])) == 20_000
    running.wait_stored(20_000)
    after = datetime.datetime.now(datetime.timezone.utc)
    sums = running.stop()["consumer"]
    assert sums["received"] == sums["stored"] == 20_000 and sums["redelivered"] == 0
    documents = {document["payload"]["number"]: document
                 for document in collection.with_options(bson.CodecOptions(tz_aware=True)).find()}
    assert collection.count_documents({}) == len(documents) == 20_000
    for number, value in enumerate(values):
        document = documents[number]
        assert list(document) == ["_id", "topic", "payload", "received_at", "qos", "retain", "dup"]
        assert document["topic"] == TOPICS[number % len(TOPICS)]
        assert typed(document["payload"]) == typed(value)
        assert isinstance(document["_id"], bson.ObjectId)
        assert before - datetime.timedelta(seconds=1) < document["received_at"] < after + datetime.timedelta(seconds=1)
        assert typed(document["qos"]) == ("int", 1)
        assert (document["retain"], document["dup"]) == (False, False)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_senders_of_every_qos(mosquitto, mongod, service, database, collection, protocol):
    broker = mosquitto()
    running = consuming(service(broker=broker, mongod=mongod, database=database, settings={"mqtt.protocol": protocol}))
    with clients.connected(broker.port) as client:
        for number in range(300):
            client.publish("sensors/0", json.dumps({"n": number}))
    for qos in (1, 2):
        assert len(clients.publish(broker.port, 300, f"sensors/{qos}", qos=qos)) == 300
    running.wait_stored(900)
    running.stop()
    for sent, stored in ((0, 0), (1, 1), (2, 1)):
        documents = list(collection.find({"topic": f"sensors/{sent}"}))
        assert sorted(document["payload"]["n"] for document in documents) == list(range(300))
        assert {document["qos"] for document in documents} == {stored}


@pytest.mark.parametrize("qos, granted", [(0, 0), (1, 1), (2, 1)])
def test_consumer_qos(mosquitto, mongod, service, database, collection, qos, granted):
    broker = mosquitto()
    running = consuming(service(broker=broker, mongod=mongod, database=database, settings={"consumer.qos": qos}))
    assert f"subscribed to sensors/# at QoS {granted}" in running.log
    if qos == 2:
        assert "subscribed as QoS 1" in running.log
    clients.publish(broker.port, 100, "sensors/x", qos=2)
    running.wait_stored(100)
    running.stop()
    assert [document["qos"] for document in collection.find()] == [granted] * 100


def test_retained_messages_are_stored_once(mosquitto, mongod, service, database, collection):
    """They come with a new subscription, and under MQTT 5 not again when it is renewed."""
    broker = mosquitto()
    for name in "abc":
        clients.publish(broker.port, [json.dumps({"name": name})], f"sensors/{name}", retain=True)
    running = consuming(service(broker=broker, mongod=mongod, database=database, settings={"mqtt.reconnect.min": "100ms"}))
    running.wait_stored(3)

    clients.publish(broker.port, ['{"name": "live"}'], "sensors/live", retain=True)  # subscribed already: as any other
    running.wait_stored(4)
    mark = running.mark()
    broker.restart()
    running.wait_log("subscribed to", after=mark)
    clients.publish(broker.port, ['{"name": "after the broker"}'], "sensors/after")
    running.wait_stored(5)
    assert running.stop()["consumer"]["received"] == 5

    mark = running.mark()
    running.start()
    running.wait_log("session resumed.*[\\s\\S]*subscribed to", after=mark)
    clients.publish(broker.port, ['{"name": "after us"}'], "sensors/after")
    running.wait_stored(1)
    assert running.stop()["consumer"]["received"] == 1

    assert sorted((document["payload"]["name"], document["retain"]) for document in collection.find()) == [
        ("a", True), ("after the broker", False), ("after us", False), ("b", True), ("c", True), ("live", False)]


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_messages_wait_while_the_consumer_is_away(mosquitto, mongod, service, database, collection, protocol):
    broker = mosquitto()
    running = consuming(service(broker=broker, mongod=mongod, database=database, settings={"mqtt.protocol": protocol}))
    running.stop()
    assert len(clients.publish(broker.port, 3000)) == 3000
    broker.restart()
    running.start()
    running.wait_stored(3000)
    running.wait_log("session resumed")
    assert running.stop()["consumer"]["received"] == 3000
    assert sorted(document["payload"]["n"] for document in collection.find()) == list(range(3000))


def test_qos_0_waits_too_with_the_recommended_broker(mosquitto, mongod, service, database, collection):
    """mosquitto's default drops what was sent at QoS 0 to a session that is away, in silence."""
    broker = mosquitto()
    running = consuming(service(broker=broker, mongod=mongod, database=database))
    running.stop()
    clients.publish(broker.port, 100, qos=0)
    assert len(clients.publish(broker.port, 1, "sensors/last")) == 1
    running.start()
    wait_until(lambda: collection.count_documents({"topic": "sensors/last"}), 30, "the last message is stored")
    sums = running.stop()["consumer"]
    assert (sums["stored"], sums["received_qos0"]) == (101, 100)
    assert sorted(document["payload"]["n"] for document in collection.find({"qos": 0})) == list(range(100))


def devices(size):
    """As Zigbee2MQTT's bridge/devices: one JSON list that tells each device with all it can do."""
    one = {"ieee_address": "0x00158d0001a2b3c4", "type": "EndDevice", "definition": {"vendor": "Xiaomi", "exposes": [
        {"type": "numeric", "name": "battery", "unit": "%", "value_min": 0, "value_max": 100}]}}
    return json.dumps([one | {"n": number} for number in range(size // (len(json.dumps(one)) + len(', "n": 12345, ')))])


@pytest.mark.parametrize("qos", [0, 1])
def test_a_large_payload_with_the_recommended_broker_and_defaults(mosquitto, mongod, service, database, collection, qos):
    """1.75 MB in one message, and one of just the limit. With a smaller message_size_limit the broker discards it, and a QoS 1
    sender of MQTT 5 gets a PUBACK that its library does not know and hangs up on."""
    for program in mosquittos():
        broker = mosquitto(program=program)
        running = consuming(service(broker=broker, mongod=mongod, database=database))
        payload, largest = devices(1_750_000), '"' + "x" * (4 * 1024 * 1024 - 2) + '"'
        assert len(payload) > 1_700_000
        assert clients.publish(broker.port, [payload, largest], "sensors/large", qos=qos) == [payload, largest]
        running.wait_stored(2)
        sums = running.stop()["consumer"]
        assert (sums["received"], sums["dead_lettered"]) == (2, 0)
        stored = {type(document["payload"]): document["payload"] for document in collection.find({"topic": "sensors/large"})}
        assert stored == {list: json.loads(payload), str: json.loads(largest)}
        collection.delete_many({})


def test_what_is_too_large_leaves_its_sender_connected(mosquitto):
    """The recommended broker discards it; the packet's own limit, which throws its sender out, is well above that."""
    for program in mosquittos():
        broker = mosquitto(program=program)
        with clients.Subscriber(broker.port) as subscriber:
            payloads = ["x" * (5 * 1024 * 1024), "behind"]
            assert clients.publish(broker.port, payloads, qos=0, protocol=4) == payloads
            assert [message.payload for message in subscriber.wait(1)] == [b"behind"]


def test_a_filter_that_is_no_longer_configured(mosquitto, mongod, service, database, collection):
    """Its session is told so at the next start; what was queued for it until then is stored, what comes later stays away."""
    broker = mosquitto()
    running = consuming(service(broker=broker, mongod=mongod, database=database, settings={"consumer.topic": "old/#"}))
    clients.publish(broker.port, ['"first"'], "old/x")
    running.wait_stored(1)
    running.stop()
    assert filters(running) == ["old/#"]
    clients.publish(broker.port, ['"while away"'], "old/x")

    running.settings["consumer.topic"] = "new/#"
    mark = running.mark()
    running.start()
    running.wait_log("unsubscribing from old/#", after=mark)
    running.wait_log("subscribed to new/#", after=mark)
    wait_until(lambda: filters(running) == ["new/#"], what=lambda: f"old/# is forgotten: {filters(running)}")
    clients.publish(broker.port, ['"nobody wants it"'], "old/x")
    clients.publish(broker.port, ['"second"'], "new/x")
    running.wait_stored(2)
    assert running.stop()["consumer"]["received"] == 2
    assert sorted(document["payload"] for document in collection.find()) == ["first", "second", "while away"]

    mark = running.mark()
    running.start()
    running.wait_log("subscribed to new/#", after=mark)
    running.stop()
    assert "unsubscribing" not in running.log[mark:]


def filters(running):
    """What state.json says that the one session holds."""
    sessions = json.loads((running.state / "state.json").read_text())["sessions"]
    return next(iter(sessions.values())) if len(sessions) == 1 else sessions


@pytest.mark.parametrize("role", ["consumer", "publisher", "both"])
def test_two_processes_with_one_state_directory(mosquitto, mongod, service, database, role):
    broker = mosquitto()
    settings = {"publisher.rate": "1/s"}
    first = service(broker=broker, mongod=mongod, database=database, role=role, settings=settings)
    first.wait_log("connected to")
    second = service(broker=broker, mongod=mongod, database=database, role=role,
                     settings={**settings, "state_dir": first.state})
    second.finish(expect=1, sums=False)
    said = messages_of(second, "error")
    assert len(said) == 1
    for word in (f"process {first.pid}", str(first.state), "its own state_dir"):
        assert word in said[0]
    assert "connected to" not in second.log
    first.stop()
    assert not [text for text in messages_of(first, "warn") + messages_of(first, "error") if "nobody is subscribed" not in text]
    second.start().wait_log("connected to")  # the lock went with its owner
    second.stop()


def test_the_lock_of_a_killed_process_is_gone(mosquitto, mongod, service, database):
    running = consuming(service(broker=mosquitto(), mongod=mongod, database=database))
    running.kill9()
    mark = running.mark()
    running.start()
    running.wait_log("subscribed to", after=mark)
    running.stop()


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_subscription_that_is_refused(mosquitto, mongod, service, database, directory, protocol):
    """The broker's dynamic security plugin refuses SUBSCRIBE itself: an error that names the filter and the remedy, again and
    again with a backoff, until somebody changes the rules."""
    rules = directory("security") / "security.json"

    def allow(subscribing):
        access = {"publishClientSend": True, "publishClientReceive": True, "subscribe": subscribing, "unsubscribe": True}
        rules.write_text(json.dumps({"defaultACLAccess": access, "clients": [], "groups": [], "roles": []}))

    allow(False)
    broker = mosquitto(extra=[f"plugin {DYNAMIC_SECURITY}", f"plugin_opt_config_file {rules}"])
    running = service(broker=broker, mongod=mongod, database=database,
                      settings={"mqtt.protocol": protocol, "mqtt.reconnect.min": "100ms"})
    running.wait_log("refuses the subscription")
    said = messages_of(running, "error")
    assert len(said) == 1
    for word in ("sensors/#", "access rules", "0x87" if protocol == "5" else "0x80"):
        assert word in said[0]
    wait_until(lambda: running.log.count("connected to") >= 3, what="it tries again")
    assert "subscribed to" not in running.log
    assert len(messages_of(running, "error")) == 1, "the same complaint is not repeated for every attempt"
    allow(True)
    broker.restart()
    running.wait_log("subscribed to")
    clients.publish(broker.port, 10)
    running.wait_stored(10)
    running.stop()


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_topics_that_an_access_list_hides(mosquitto, mongod, service, database, directory, capsys, protocol):
    """mosquitto's acl_file does not refuse subscriptions in 2.0: it grants them and delivers nothing. What it does is printed;
    either the error is seen, or the service works for what it may read."""
    rules = directory("acl") / "acl"
    rules.write_text("topic write #\ntopic read sensors/allowed/#\n")
    broker = mosquitto(extra=[f"acl_file {rules}"])
    running = service(broker=broker, mongod=mongod, database=database, settings={"mqtt.protocol": protocol})
    seen = running.wait_log(r"subscribed to sensors/# at QoS 1|refuses the subscription to sensors/# \(reason 0x8\d\)")[0]
    with capsys.disabled():
        print(f"\n  mosquitto with acl_file, MQTT {protocol}: {seen}")
    if "refuses" not in seen:
        clients.publish(broker.port, 5, "sensors/hidden/x")
        clients.publish(broker.port, 5, "sensors/allowed/x")
        running.wait_stored(5)
        assert running.sums()["consumer"]["received"] == 5
    running.stop()


def test_the_broker_delivers_in_small_portions(mosquitto, mongod, service, database, collection):
    """A receive maximum of 1, and batches of one: slow, and still everything."""
    broker = mosquitto()
    running = consuming(service(broker=broker, mongod=mongod, database=database, settings={
        "mqtt.receive_maximum": 1, "consumer.batch.count": 1, "consumer.workers": 1}))
    clients.publish(broker.port, 200)
    sums = running.wait_stored(200)["consumer"]
    assert sums["largest_batch"] == 1 and sums["batches"] == 200
    running.stop()
    assert collection.count_documents({}) == 200


@pytest.mark.parametrize("workers", [1, 8])
@pytest.mark.parametrize("count", [2, 5, 65535])
def test_batches_of_other_sizes(mosquitto, mongod, service, database, collection, count, workers):
    broker = mosquitto()
    running = consuming(service(broker=broker, mongod=mongod, database=database, settings={
        "mqtt.receive_maximum": 65535, "consumer.batch.count": count, "consumer.workers": workers}))
    clients.publish(broker.port, 1000)
    sums = running.wait_stored(1000)["consumer"]
    assert sums["largest_batch"] <= count
    running.stop()
    assert sorted(document["payload"]["n"] for document in collection.find()) == list(range(1000))


# --- how it speaks -------------------------------------------------------------------------------------------------------


def test_signals(mosquitto, mongod, service, database):
    broker = mosquitto()
    running = service(broker=broker, mongod=mongod, database=database, role="both", settings={"publisher.rate": "100/s"})
    running.wait_stored(10)
    first = running.sums()
    assert set(first) == {"publisher", "consumer", "loop"}
    running.signal(1)  # SIGHUP
    running.wait_log("SIGHUP ignored")
    stored = first["consumer"]["stored"]
    running.wait_stored(stored + 10)  # and it goes on
    assert len(running.printed_sums) >= 3
    last = running.stop()
    assert last["consumer"]["stored"] > stored
    assert last == running.printed_sums[-1], "the sums are printed at the end too"


def test_waiting_is_not_work(mosquitto, service):
    """The longest iteration of the loop is what it worked, not what it waited, also when a signal ended the waiting."""
    running = service(broker=mosquitto(), role="publisher", settings={"publisher.rate": "0.1/s", "publisher.count": 100})
    running.wait_log("connected to")
    for _ in range(5):
        begun = time.monotonic()
        wait_until(lambda: time.monotonic() - begun > 0.4)
        running.sums()
    assert running.stop()["loop"]["longest_iteration_ms"] < 100 * TIME_FACTOR


def test_a_killed_process_leaves_nothing_in_shared_memory(mosquitto, mongod, service, database):
    """The driver keeps counters in a file under the process id, and warns when a dead process of the same id has left one."""
    running = consuming(service(broker=mosquitto(), mongod=mongod, database=database))
    left = pathlib.Path(f"/dev/shm/mongoc-{running.pid}")
    running.kill9()
    found = left.exists()
    left.unlink(missing_ok=True)
    assert not found, f"{left} is left behind"


def test_sigint_ends_it_too(mosquitto, mongod, service, database):
    running = consuming(service(broker=mosquitto(), mongod=mongod, database=database))
    running.signal(2)
    running.finish()
    assert "SIGINT: stopping" in running.log


def test_sums_as_text(mosquitto, mongod, service, database):
    broker = mosquitto()
    running = consuming(service(broker=broker, mongod=mongod, database=database, settings={"log.format": "text"}))
    clients.publish(broker.port, ["1", "2", "no JSON"])
    running.signal(10)  # SIGUSR1
    wait_until(lambda: "received" in running.stdout.read_text(), what="the sums")
    wait_until(lambda: mongod_count(mongod, database) == 3, what="stored")
    running.stop(sums=False)
    last = running.stdout.read_text().rpartition("consumer\n")[2]
    lines = dict(line.split(None, 1) for line in last.splitlines() if len(line.split()) > 1)
    assert (lines["received"], lines["stored"], lines["dead_lettered"]) == ("3", "2", "1")
    assert lines["dead_lettered_by_reason"] == "invalid_json 1"


def mongod_count(mongod, database):
    with contextlib.closing(mongod.client()) as client:
        return sum(client[database][name].count_documents({}) for name in ("messages", "dead_letter"))


def test_the_status_line(mosquitto, mongod, service, database):
    """Where standard error is no terminal it is a log line a second, and only when asked for."""
    broker = mosquitto()
    running = service(broker=broker, mongod=mongod, database=database, role="both",
                      settings={"log.status": "on", "publisher.rate": "100/s"})
    running.wait_log("publisher: publishing, .*consumer: consuming, .* stored", timeout=15)
    running.wait_stored(150)
    statuses = [record for record in running.records if record.get("room") == "status"]
    assert all(status["level"] == "info" for status in statuses)
    running.stop()
    quiet = consuming(service(broker=broker, mongod=mongod, database=database))
    clients.publish(broker.port, 200, pace=100)
    quiet.wait_stored(200)
    assert not [record for record in quiet.records if record.get("room") == "status"]
    quiet.stop()


def test_the_log_tells_the_promise_and_what_was_granted(mosquitto, mongod, service, database):
    running = consuming(service(broker=mosquitto(), mongod=mongod, database=database))
    running.stop()
    assert "a message is acknowledged once MongoDB has it with w:majority, j:true" in running.log
    for granted in ("MQTT 5", "session new", "expires after 604800 s", "keepalive 60 s", "receive maximum 800"):
        assert granted in running.log
    assert all(set(record) == {"time", "level", "room", "message"} for record in running.records), running.log
