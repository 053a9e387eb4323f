"""mqtt.watch_broker: what the broker drops never reaches us, so the log says what $SYS says of it, and how to end it."""

import re

import pytest

import clients
from processes import free_port, wait_until

QUEUED = 10
DROPPED = r'"level":"(\w+)","room":"broker","message":"the broker has dropped (\d+) messages'
QUICK = {"mqtt.reconnect.min": "100ms", "mqtt.reconnect.max": "500ms"}


@pytest.fixture
def tight(mosquitto):
    """A broker that queues little, and tells it at once."""
    return mosquitto(base="\n", extra=["sys_interval 1", f"max_queued_messages {QUEUED}", "max_inflight_messages 5"])


def rises(running):
    """How many messages the lines at level warn name, and those at level info."""
    found = re.findall(DROPPED, running.log)
    return [sum(int(number) for level, number in found if level == wanted) for wanted in ("warn", "info")]


def drop(broker, client_id, count, topic):
    """Have the broker drop `count` messages that it should queue for the session, which nobody uses meanwhile."""
    clients.create_session(broker.port, client_id, topic)
    assert len(clients.publish(broker.port, QUEUED + count, topic)) == QUEUED + count


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_each_rise_is_said(tight, service, mongod, database, protocol):
    running = service(broker=tight, mongod=mongod, database=database, settings=QUICK | {
        "mqtt.protocol": protocol, "http.listen": f"127.0.0.1:{free_port()}"})
    running.wait_log("subscribed to")
    drop(tight, "one", 25, "one/x")
    wait_until(lambda: rises(running)[0] == 25, 10, running.tail)
    drop(tight, "two", 7, "two/x")
    wait_until(lambda: rises(running)[0] == 32, 10, running.tail)
    assert "raise max_queued_messages" in running.log
    assert ("max_inflight_messages" in running.log) == (protocol == "3.1.1")
    # Started again it counts anew; nothing is said of its 0.
    lines = len(re.findall(DROPPED, running.log))
    mark = running.mark()
    tight.restart()
    running.wait_log("subscribed to", after=mark)
    drop(tight, "three", 4, "three/x")
    wait_until(lambda: rises(running)[0] == 36, 15, running.tail)
    running.stop()
    assert len(re.findall(DROPPED, running.log)) > lines


def test_what_was_dropped_before_the_start_is_said(tight, service, mongod, database):
    """It may have been the service's, which was away."""
    with clients.Subscriber(tight.port, "$SYS/broker/publish/messages/dropped") as subscriber:
        drop(tight, "one", 25, "one/x")
        wait_until(lambda: any(message.payload == b"25" for message in subscriber.messages), 10)
    running = service(broker=tight, mongod=mongod, database=database, settings=QUICK)
    running.wait_log(DROPPED)
    running.stop()
    assert rises(running) == [0, 25]


@pytest.mark.parametrize("settings", [{"mqtt.watch_broker": "false"}, {"consumer.qos": 0}], ids=["off", "no session"])
def test_not_watched(tight, service, mongod, database, settings):
    running = service(broker=tight, mongod=mongod, database=database, settings=QUICK | settings)
    running.wait_log("subscribed to")
    running.stop()
    assert "subscribed to" in running.log and "-sys" not in tight.log


def test_a_broker_that_refuses_the_connection_is_left_alone(mosquitto, service, mongod, database):
    """A user who may have one client id only: three attempts for $SYS, one line, and everything else works."""
    broker = mosquitto(base="\n", extra=["sys_interval 1", "clientid_prefixes plant-1", "max_queued_messages 1000"])
    running = service(broker=broker, mongod=mongod, database=database, settings=QUICK | {"mqtt.client_id": "plant"})
    running.wait_log("the broker refuses a connection of its own for \\$SYS")
    running.wait_log("subscribed to")
    clients.publish(broker.port, 5, client_id="plant-1x")
    running.wait_stored(5)
    running.stop()
    assert broker.log.count("plant-sys") <= 3
    assert not [record for record in running.records if record["level"] in ("warn", "error")]


def test_a_broker_that_gives_both_connections_one_client_id(mosquitto, service, mongod, database, collection):
    """As with use_username_as_clientid: the connection for $SYS takes the consumer's session over. It notices, and leaves at once
    without a word: what the session holds is stored."""
    user = {"username": "plant", "password": "hush-4711"}
    broker = mosquitto(users={"plant": "hush-4711", "sender": "hush-4712"}, extra=["use_username_as_clientid true"])
    running = service(broker=broker, mongod=mongod, database=database, settings=QUICK | {
        "mqtt.username": user["username"], "mqtt.password": user["password"]})
    running.wait_log("subscribed to")
    sent = clients.publish(broker.port, 3000, "sensors/x", username="sender", password="hush-4712", pace=1000)
    running.wait_log("use_username_as_clientid")
    assert len(sent) == 3000
    wait_until(lambda: collection.count_documents({}) >= 3000, 20, running.tail)
    assert len(collection.distinct("payload")) == 3000
    mark = running.mark()
    clients.publish(broker.port, 10, "sensors/x", username="sender", password="hush-4712")
    running.stop()
    assert "connection lost" not in running.log[mark:]
