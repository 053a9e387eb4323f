"""The program with the libmosquitto it was built with, and with the next one, 2.1, which does some things differently and has the
same soname: `library` is the environment that has the program load it."""

import json
import resource
import time

import pytest
from bson.objectid import ObjectId

import clients
import peers
from processes import TIME_FACTOR
from servers import next_library
from test_ids import publish_with

CONNACK = b"\x20\x03\x00\x00\x00"  # MQTT 5: accepted, no properties


@pytest.fixture(params=["installed", "next"])
def library(request):
    if request.param == "installed":
        return {}
    found = next_library()
    if found is None:
        pytest.skip("no libmosquitto from 2.1 on: scripts/setup.sh fetches Debian's, if it can be had")
    return found


def _children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _stop_measured(running, **options):
    """Stop it; the seconds that took, and the CPU seconds of its whole life."""
    begun, before = time.monotonic(), _children()
    running.stop(**options)
    return time.monotonic() - begun, _children() - before


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_a_clean_stop(service, mosquitto, mongod, database, collection, certificates, library, tls):
    """It takes a moment, not shutdown_timeout, and what was stored before it is acknowledged."""
    broker = mosquitto(**({"tls": certificates} if tls else {}))
    settings = {"mqtt.client_id": "c", "publisher.rate": "100/s", "shutdown_timeout": "10s"}
    if tls:
        settings |= {"mqtt.tls.enabled": "true", "mqtt.tls.ca": certificates.ca.cert}
    running = service(broker=broker, mongod=mongod, database=database, role="both", env=library, settings=settings)
    running.wait_stored(50)
    took, used = _stop_measured(running)
    print(f"stopped in {took:.2f} s, {used:.2f} s of CPU in all")
    assert took < 3 * TIME_FACTOR
    assert used < 1.5 * TIME_FACTOR
    left = {json.loads(message.payload)["sequence"] for message in clients.take_session(broker.plain_port, "c-1")}
    assert not left & {document["payload"]["sequence"] for document in collection.find()}, "stored, but not acknowledged"
    assert "Client c-1 disconnected." in broker.log and "Client c-pub disconnected." in broker.log


def _deaf(connection, ending):
    """Takes the connection, and then neither reads nor hangs up."""
    if connection.recv(4096):
        connection.sendall(CONNACK)
        ending.wait()


def test_a_stop_that_the_broker_does_not_answer(service, mongod, database, library):
    """The broker does not hang up after DISCONNECT: it is waited for, which takes no work."""
    with peers.Peer(_deaf) as broker:
        running = service(broker=broker, mongod=mongod, database=database, env=library, settings={"shutdown_timeout": "1s"})
        running.wait_log("connected to")
        took, used = _stop_measured(running)
    print(f"stopped in {took:.2f} s, {used:.2f} s of CPU in all")
    assert took > 0.9, "it did not wait"
    assert used < 0.3 * TIME_FACTOR


def test_user_properties_without_a_name_or_a_value(service, mosquitto, mongod, database, collection, library):
    """An empty text is one like others: the _id is made of it, and it is no reason to stop."""
    broker = mosquitto()
    running = service(broker=broker, mongod=mongod, database=database, env=library, settings={"consumer.id": "user-property:id"})
    running.wait_log("subscribed to")
    publish_with(broker.port, [("sensors/a", "1", [("", "a"), ("id", "one")]), ("sensors/a", "2", [("x", ""), ("id", "two")]),
                               ("sensors/a", "3", [("", ""), ("id", "")]), ("sensors/a", "4", [("", "")])])
    running.wait_stored(4)
    running.stop()
    found = {document["payload"]: document["_id"] for document in collection.find()}
    assert isinstance(found.pop(4), ObjectId)
    assert found == {1: "one", 2: "two", 3: ""}
