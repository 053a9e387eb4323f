"""Sessions left behind: what is no longer configured is unsubscribed, emptied through a normal connection and ended; nothing that
a broker has queued under an earlier configuration is stranded."""

import json

import clients
from processes import wait_until

QUICK = {"mqtt.reconnect.min": "100ms", "mqtt.reconnect.max": "500ms"}


def stored(collection):
    return sorted(document["payload"]["n"] for document in collection.find({}, {"payload": 1}))


def sessions(running):
    return json.loads((running.state / "state.json").read_text())["sessions"]


def run_and_stop(service_of, **settings):
    """A life of the service that leaves a session behind."""
    running = service_of(settings=QUICK | settings)
    running.wait_log("subscribed to")
    running.stop()
    return running


def test_a_changed_client_id_strands_nothing(service, mosquitto, mongod, database, collection):
    """The session of the old client id still has its subscription and 3,000 messages: they are stored, it is unsubscribed and
    ended, what is published from now on comes once, and the state file knows only the new one."""
    broker = mosquitto()
    running = service(broker=broker, mongod=mongod, database=database, settings=QUICK | {"mqtt.client_id": "before"})
    running.wait_log("subscribed to")
    running.stop()
    assert len(clients.publish(broker.port, 3000)) == 3000
    running.settings["mqtt.client_id"] = "after"
    running.start()
    running.wait_log("before-1: session left behind is empty and ended", timeout=30)
    wait_until(lambda: list(sessions(running)) == ["after-1"], what="the old session is forgotten")
    assert len(clients.publish(broker.port, [b'{"n": %d}' % n for n in range(3000, 3100)])) == 100
    running.wait_stored(3100)
    running.stop()
    assert stored(collection) == list(range(3100))
    assert clients.take_session(broker.port, "before-1") == []
    assert "before-1" not in {line for line in sessions(running)}


def test_an_ended_session_gets_no_more_messages(service, mosquitto, mongod, database, collection):
    """After the old session was ended the broker queues nothing for it: resumed by another client it is new."""
    broker = mosquitto()
    running = service(broker=broker, mongod=mongod, database=database, settings=QUICK | {"mqtt.client_id": "before"})
    running.wait_log("subscribed to")
    running.stop()
    running.settings["mqtt.client_id"] = "after"
    running.start()
    running.wait_log("session left behind is empty and ended", timeout=30)
    present = []

    def note(client):
        inner = client.on_connect

        def on_connect(client, data, flags, reason, properties):
            present.append(flags.session_present)
            inner(client, data, flags, reason, properties)

        client.on_connect = on_connect

    wait_until(lambda: list(sessions(running)) == ["after-1"], what="the old session is forgotten")
    with clients.connected(broker.port, client_id="before-1", clean_start=False, session_expiry=10, setup=note):
        pass
    assert present == [False]
    running.stop()


def test_a_session_the_broker_does_not_know_is_forgotten(service, mosquitto, mongod, database):
    broker = mosquitto(persistence=False)
    running = service(broker=broker, mongod=mongod, database=database, settings=QUICK | {"mqtt.client_id": "before"})
    running.wait_log("subscribed to")
    running.stop()
    broker.stop()
    broker.start()
    running.settings["mqtt.client_id"] = "after"
    running.start()
    running.wait_log("before-1: session left behind is not known to the broker", timeout=30)
    wait_until(lambda: list(sessions(running)) == ["after-1"], what="the old session is forgotten")
    running.stop()


def test_killed_while_it_empties_a_session(service, mosquitto, mongod, database, collection):
    """kill -9 in the middle: the next start goes on."""
    broker = mosquitto()
    running = service(broker=broker, mongod=mongod, database=database,
                      settings=QUICK | {"mqtt.client_id": "before", "consumer.batch.count": 100})
    running.wait_log("subscribed to")
    running.stop()
    assert len(clients.publish(broker.port, 20000)) == 20000
    running.settings["mqtt.client_id"] = "after"
    for _ in range(3):
        before = collection.estimated_document_count()
        running.start()
        wait_until(lambda: collection.estimated_document_count() > before + 500, what="some are stored")
        running.kill9()
    assert collection.estimated_document_count() < 20000
    running.start()
    running.wait_log("before-1: session left behind is empty and ended", timeout=60)
    running.stop()
    assert sorted(set(stored(collection))) == list(range(20000))
