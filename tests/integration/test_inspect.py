"""--check and --dry-run: they look, and leave everything as it was."""

import contextlib
import json
import re
import signal

import pytest
from bson import json_util
from bson.int64 import Int64

import clients
from processes import free_port, wait_until


def consuming(running):
    running.wait_log("subscribed to")
    return running


def wait_said(running, text):
    wait_until(lambda: text in running.log, 10, lambda: f"{text!r} was said\n{running.tail()}")


def files(path):
    return sorted(each.name for each in path.iterdir())


@contextlib.contextmanager
def undisturbed(running, broker):
    """The service must not notice: no line in its log, no other connection of its client id at the broker."""
    client_id = json.loads((running.state / "state.json").read_text())["client_id"]
    mark, before = running.mark(), (running.state / "state.json").read_text()
    connected = broker.log.count(f"as {client_id}-")
    assert connected > 0
    yield
    assert running.alive
    assert not [line for line in running.log[mark:].splitlines() if '"room":"status"' not in line], running.log[mark:]
    assert broker.log.count(f"as {client_id}-") == connected, "somebody has connected under the service's client id"
    assert (running.state / "state.json").read_text() == before


# --- --check ---------------------------------------------------------------------------------------------------------------


def check(service, expect=0, **options):
    running = service(args=["--check"], **options)
    running.finish(expect=expect, sums=False, timeout=20)
    return running.stdout.read_text(), running


@pytest.mark.parametrize("role", ["consumer", "publisher", "both", None])
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_check_says_what_was_granted_and_would_be_done(mosquitto, mongod, mongo, service, database, role, protocol):
    broker = mosquitto()
    said, running = check(service, broker=broker, mongod=mongod, database=database, settings={
        "role": role, "mqtt.protocol": protocol, "mqtt.keepalive": "33s", "consumer.topic": "a/+/b", "publisher.topic": "p/q",
        "publisher.rate": "12/s"})
    lines = dict(re.findall(r"^(broker|subscribe|database) +(.*)", said, re.M))
    assert re.search(r"^config +ok", said)
    for word in ("ok", f"127.0.0.1:{broker.port}", f"MQTT {protocol}", "keepalive 33 s", "maximum QoS 2"):
        assert word in lines["broker"]
    if role == "publisher":
        assert set(lines) == {"broker"}, "a publisher needs no database and subscribes to nothing"
    else:
        assert lines["subscribe"] == "ok: a/+/b at QoS 1"
        for word in ("ok", f"127.0.0.1:{mongod.port}", "MongoDB 6.0", "replica set rs0"):
            assert word in lines["database"] or word == "MongoDB 6.0" and "MongoDB" in lines["database"]
        assert f"would     store a/+/b into {database}.messages" in said and f"{database}.dead_letter" in said
        assert f"would     keep what MongoDB does not take within 250 ms in {running.state / 'spool.db'}, at most 1024 MiB" in said
        assert "w:majority, j:true" in said
    assert ("would     publish to p/q, 12 messages a second at QoS 1" in said) == (role != "consumer")
    assert files(running.state) == [] and database not in mongo.list_database_names()
    assert not [record for record in running.records if record["level"] in ("warn", "error")]


def test_check_with_the_broker_down(mongod, service, database):
    port = free_port()
    said, running = check(service, expect=1, mongod=mongod, database=database,
                          settings={"mqtt.host": "127.0.0.1", "mqtt.port": port})
    assert re.search("^broker +failed", said, re.M) and re.search("^database +ok", said, re.M)
    assert f"127.0.0.1:{port}" in running.log and "is the broker running" in running.log
    assert running.log.count("\n") == 1, "one attempt, one line"


def test_check_with_the_database_down(mosquitto, service):
    port = free_port()
    said, _ = check(service, expect=1, broker=mosquitto(), settings={
        "mongodb.uri": f"mongodb://user:secret@127.0.0.1:{port}/?serverSelectionTimeoutMS=300"})
    assert re.search("^broker +ok", said, re.M)
    failed = re.search("^database +failed: .*", said, re.M)[0]
    for word in (f"***@127.0.0.1:{port}", "is mongod running", "mongodb.uri"):
        assert word in failed
    assert "secret" not in said


def test_check_with_everything_down(service):
    said, _ = check(service, expect=1, settings={
        "mqtt.host": "127.0.0.1", "mqtt.port": free_port(),
        "mongodb.uri": f"mongodb://127.0.0.1:{free_port()}/?serverSelectionTimeoutMS=300"})
    assert re.search("^broker +failed", said, re.M) and re.search("^database +failed", said, re.M)


def test_check_with_wrong_passwords(mosquitto, fresh_mongod, service):
    server = fresh_mongod(auth=True)
    broker = mosquitto(users={"u": "right"})
    said, running = check(service, expect=1, broker=broker, settings={"mqtt.username": "u"}, env={
        "MQTT2MONGO_MQTT_PASSWORD": "wrong-1", "MQTT2MONGO_MONGODB_URI": server.uri.replace(server.PASSWORD, "wrong-2")})
    assert re.search("^broker +failed", said, re.M) and re.search("^database +failed.*authSource", said, re.M)
    assert "mqtt.password" in running.log
    assert "wrong-" not in said + running.log


def test_check_with_a_database_user_who_may_not_write(mosquitto, fresh_mongod, service):
    """It can log in and read, which is not enough: the check has to tell, or its ok is worth nothing."""
    server = fresh_mongod(auth=True)
    server.client().admin.command("createUser", "reader", pwd="secret", roles=["readAnyDatabase"])
    said, _ = check(service, expect=1, broker=mosquitto(), settings={"mongodb.uri": server.uri.replace("tester", "reader")})
    assert re.search("^database +failed.*readWrite", said, re.M), said


@pytest.mark.parametrize("rule", [None, "/n"])
def test_a_time_series_collection(mosquitto, mongod, mongo, service, database, rule):
    """MongoDB does not keep _id unique there: with consumer.id an error, in the check and in the log of the service; else a warning.
    An ordinary collection, or none yet, is not mentioned."""
    broker = mosquitto()
    settings = {"consumer.collection": "series", **({"consumer.id": f'["{rule}"]'} if rule else {})}
    said, _ = check(service, broker=broker, mongod=mongod, database=database, settings=settings)
    assert "time-series" not in said
    mongo[database].create_collection("series", timeseries={"timeField": "received_at", "metaField": "topic"})
    mongo[database].create_collection("ordinary")
    said, _ = check(service, broker=broker, mongod=mongod, database=database, settings=settings, expect=1 if rule else 0)
    wanted = rf"failed: .*, but {database}.series is .*leave out consumer.id$" if rule else rf"warning: {database}.series is "
    assert re.search(f"^database +{wanted}", said, re.M), said
    said, _ = check(service, broker=broker, mongod=mongod, database=database, settings={**settings, "consumer.collection": "ordinary"})
    assert "time-series" not in said

    running = service(broker=broker, mongod=mongod, database=database, settings=settings)
    running.wait_log("subscribed to")
    running.wait_log("is a time-series collection")
    clients.publish(broker.port, ['{"n": 1}', '{"n": 1}'])
    running.wait_stored(2)
    running.stop()
    about = [record["level"] for record in running.records if "time-series" in record["message"]]
    assert about == ["error" if rule else "warn"]
    assert mongo[database].series.count_documents({}) == 2


def test_a_time_series_collection_of_a_mongodb_that_comes_later(mosquitto, fresh_mongod, service):
    """It is looked at when MongoDB answers for the first time."""
    broker, server = mosquitto(), fresh_mongod()
    server.client().mqtt2mongo.create_collection("messages", timeseries={"timeField": "received_at"})
    server.stop()
    running = service(broker=broker, mongod=server, settings={"consumer.id": "topic"})
    running.wait_log("MongoDB does not answer")
    assert "time-series" not in running.log
    server.restart()
    running.wait_log("is a time-series collection")
    running.stop()


def test_check_does_not_disturb_a_running_service(mosquitto, mongod, service, database):
    broker = mosquitto()
    running = consuming(service(broker=broker, mongod=mongod, database=database, role="both",
                                settings={"publisher.rate": "200/s"}))
    running.wait_stored(20)
    client_id = json.loads((running.state / "state.json").read_text())["client_id"]
    with undisturbed(running, broker):
        for settings in ({"state_dir": running.state}, {"state_dir": running.state, "mqtt.client_id": client_id}):
            check(service, broker=broker, mongod=mongod, database=database, role="both", settings=settings)
        stored = running.sums()["consumer"]["stored"]
        running.wait_stored(stored + 100)
    sums = running.stop()
    left = clients.take_session(broker.port, f"{client_id}-1")  # sent by the broker, not read before the end
    assert sums["publisher"]["acked"] == sums["consumer"]["stored"] + len(left) and sums["consumer"]["redelivered"] == 0


def test_check_leaves_no_session(mosquitto, mongod, service, database):
    broker = mosquitto()
    _, running = check(service, broker=broker, mongod=mongod, database=database)
    client_id, = re.findall(r"as (mqtt2mongo-check-\w+)", running.log)
    clients.publish(broker.port, 10)
    assert not clients.take_session(broker.port, client_id, quiet=0.2)


def test_check_takes_nothing_from_a_share_group(mosquitto, mongod, service, database, collection):
    """It says what group would be joined, and whether the broker is one that loses messages of it; it does not join: every message
    that is published while checks run is the service's."""
    broker = mosquitto()
    shared = {"consumer.share": "plant-7", "consumer.connections": 2}
    running = consuming(service(broker=broker, mongod=mongod, database=database, settings=shared))
    for turn in range(3):
        with clients.connected(broker.port) as publisher:
            for number in range(20):
                publisher.publish("sensors/a", json.dumps(turn * 20 + number), qos=1)
            said, _ = check(service, broker=broker, mongod=mongod, database=database,
                            settings=shared | {"role": "consumer", "mqtt.client_id": "another"})
            publisher.loop(0.1)
        assert re.search(r"^would +be 2 connections of the share group plant-7$", said, re.M), said
        assert ("loses messages of shared subscriptions" in said) == ("mosquitto version 2.0.11" in broker.log), said
    wait_until(lambda: collection.count_documents({}) == 60, 10, "all are stored")
    running.stop()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_check_interrupted_is_no_success(mosquitto, mongod, service, database, number):
    broker = mosquitto()
    broker.sigstop()
    running = service(broker=broker, mongod=mongod, database=database, args=["--check"],
                      settings={"mqtt.connect_timeout": "50s"})
    wait_until(lambda: catches(running, number), 10, "it is under way")
    running.signal(number)
    status = running.wait_exit(10)
    broker.sigcont()
    assert status not in (0, 2), f"exit status {status}:\n{running.stdout.read_text()}"


def catches(running, number):
    """Has the process set a handler for the signal?"""
    with open(f"/proc/{running.pid}/status") as status:
        caught = int(re.search(r"^SigCgt:\s+(\w+)", status.read(), re.M)[1], 16)
    return caught >> (number - 1) & 1


@pytest.mark.parametrize("protocol, most", [("5", 1800), ("3.1.1", 1020)])
def test_check_warns_of_retained_messages_that_would_not_arrive(mosquitto, mongod, service, database, protocol, most):
    """A broker with default settings sends so many of them to a new subscription, and drops the others in silence."""
    broker = mosquitto(base="\n", extra=["sys_interval 1"])
    with clients.Subscriber(broker.port, "$SYS/broker/retained messages/count") as subscriber:
        def held(count):
            wait_until(lambda: subscriber.messages and int(subscriber.messages[-1].payload) >= count, 10,
                       lambda: f"{count} retained: {[message.payload for message in subscriber.messages]}")

        settings = {"mqtt.protocol": protocol}
        held(1)
        assert "warning" not in check(service, broker=broker, mongod=mongod, database=database, settings=settings)[0]
        clients.publish(broker.port, 2000, lambda index: f"sensors/{index}", retain=True)
        held(2000)
        said = check(service, broker=broker, mongod=mongod, database=database, settings=settings)[0]
        warning, = re.findall(r"^broker +warning: it holds (\d+) retained messages; .* sends (\d+) .*max_queued_messages", said, re.M)
        assert int(warning[0]) >= 2000 and int(warning[1]) == most
        settings["mqtt.watch_broker"] = "false"
        assert "warning" not in check(service, broker=broker, mongod=mongod, database=database, settings=settings)[0]


# --- --dry-run -------------------------------------------------------------------------------------------------------------


def dry_run(service, **options):
    running = service(args=["--dry-run"], **options)
    wait_said(running, "dry run: printing")
    return running


def printed(running):
    """What it printed so far: (collection, document)."""
    lines = running.stdout.read_text().splitlines()
    return [(line.partition(" ")[0], json_util.loads(line.partition(" ")[2])) for line in lines]


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_dry_run_prints_good_and_bad(mosquitto, mongod, mongo, service, database, protocol):
    broker = mosquitto()
    running = dry_run(service, broker=broker, mongod=mongod, database=database, settings={
        "mqtt.protocol": protocol, "consumer.collection": "good", "consumer.dead_letter": "bad"})
    payloads = [b'{"n": 1, "big": 2147483648, "x": 0.5, "list": [null, "\\u0000\xc3\xbc"]}', b"no JSON \xff", b"", b'"text"']
    clients.publish(broker.port, payloads, lambda index: f"sensors/{index}")
    wait_until(lambda: running.stdout.read_text().count("\n") == 4, 10, "four lines")
    running.signal(signal.SIGINT)
    running.finish(sums=False)
    assert "dry run: 2 documents, 2 dead letters" in running.log

    (first, good), (second, bad), (third, empty), (fourth, text) = printed(running)
    assert [first, second, third, fourth] == ["good", "bad", "bad", "good"]
    assert list(good) == ["_id", "topic", "payload", "received_at", "qos", "retain", "dup"]
    assert good["topic"] == "sensors/0" and text["payload"] == "text"
    assert good["payload"] == {"n": 1, "big": 2147483648, "x": 0.5, "list": [None, "\0ü"]}
    assert isinstance(good["payload"]["big"], Int64)
    assert bad["payload"] == payloads[1] and bad["reason"]["code"] == "invalid_json" and bad["preview"] == "no JSON \\xff"
    assert empty["payload"] == b"" and empty["reason"]["code"] == "empty_payload"
    assert '"$numberInt":"1"' in running.stdout.read_text().replace(" ", ""), "extended JSON with its types"

    assert files(running.state) == [], "nothing is remembered"
    assert database not in mongo.list_database_names(), "nothing is stored"


def test_dry_run_needs_no_database(mosquitto, service):
    broker = mosquitto()
    running = dry_run(service, broker=broker, settings={"role": None, "mongodb.uri": f"mongodb://127.0.0.1:{free_port()}"})
    clients.publish(broker.port, 3)
    wait_until(lambda: len(printed(running)) == 3, 10, "three lines")
    running.signal(signal.SIGTERM)
    running.finish(sums=False)


def test_dry_run_beside_a_running_service(mosquitto, mongod, service, database, collection):
    """With its state directory and its client id: both get every message, and the session is untouched."""
    broker = mosquitto()
    running = consuming(service(broker=broker, mongod=mongod, database=database))
    client_id = json.loads((running.state / "state.json").read_text())["client_id"]
    with undisturbed(running, broker):
        dry = dry_run(service, broker=broker, mongod=mongod, database=database,
                      settings={"state_dir": running.state, "mqtt.client_id": client_id})
        clients.publish(broker.port, 2000, pace=2000)
        running.wait_stored(2000)
        wait_until(lambda: len(printed(dry)) == 2000, 10, lambda: f"2000 lines: {len(printed(dry))}")
        dry.signal(signal.SIGINT)
        dry.finish(sums=False)
        clients.publish(broker.port, 10)
        running.wait_stored(2010)
    sums = running.stop()["consumer"]
    assert sums["received"] == sums["stored"] == 2010 and sums["redelivered"] == 0
    assert sorted(document["payload"]["n"] for _, document in printed(dry)) == list(range(2000))
    assert collection.count_documents({}) == 2010


def test_dry_run_leaves_what_waits_for_the_service(mosquitto, mongod, service, database, collection):
    broker = mosquitto()
    running = consuming(service(broker=broker, mongod=mongod, database=database))
    running.stop()
    clients.publish(broker.port, 50)
    dry = dry_run(service, broker=broker, settings={"state_dir": running.state})
    clients.publish(broker.port, ['{"n": 50}'])
    wait_until(lambda: printed(dry), 10, "one line")
    dry.signal(signal.SIGINT)
    dry.finish(sums=False)
    assert [document["payload"]["n"] for _, document in printed(dry)] == [50]
    running.start()
    running.wait_stored(51)
    running.stop()
    assert sorted(document["payload"]["n"] for document in collection.find()) == list(range(51))


def test_dry_run_without_a_broker(service):
    running = service(args=["--dry-run"], settings={"mqtt.host": "127.0.0.1", "mqtt.port": free_port()})
    running.finish(expect=1, sums=False)
    assert "is the broker running" in running.log


def test_dry_run_whose_reader_goes_away(mosquitto, service):
    """`mqtt2mongo --dry-run | head -1` ends when head does, at the next message."""
    broker = mosquitto()
    running = service(broker=broker, started=False, args=["--dry-run"])
    running.state.mkdir()
    running.spawn(["sh", "-c", '"$@" | head -1', "sh", *running.argv()])
    wait_said(running, "dry run: printing")

    def ended():
        clients.publish(broker.port, 1)
        return not running.alive

    wait_until(ended, 5, lambda: f"it has ended\n{running.tail()}", interval=0.1)
    assert len(printed(running)) == 1


def test_dry_run_of_a_publisher_is_a_mistake(service):
    running = service(args=["--dry-run"], role="publisher")
    running.finish(expect=2, sums=False)
    assert "must be consumer" in running.log


def test_check_and_dry_run_exclude_each_other(service):
    service(args=["--dry-run", "--check"]).finish(expect=2, sums=False)
