"""Publisher and consumer are turned on and off in one running process (toggle.c, which checks the counters)."""

import json

import pytest

import clients
from service import BUILD

RATE = 200


@pytest.fixture
def toggle(service, mosquitto, mongod, database):
    """A function that makes a toggle.c, not started, with everything it needs."""
    def make(**settings):
        broker = mosquitto()
        made = service(started=False, broker=broker, mongod=mongod, database=database, role="both", name="toggle",
                       settings={"publisher.rate": f"{RATE}/s", **settings})
        made.broker = broker
        made.program = BUILD / "tests" / "integration" / "toggle"
        return made.start()

    return make


def _assert_all_stored(collection, sums, left):
    """Each message that the broker acknowledged to the publisher is in MongoDB, once; or still at the broker, if it had not come
    when the consumer was stopped for the last time."""
    documents = list(collection.find({}, {"_id": 0, "payload.run": 1, "payload.sequence": 1}))
    found = [document["payload"] for document in documents] + left
    messages = {(payload["run"], payload["sequence"]) for payload in found}
    assert len(messages) == len(found), "stored twice"
    runs = {run for run, _ in messages}
    for run in runs:
        sequences = sorted(sequence for that, sequence in messages if that == run)
        assert sequences == list(range(len(sequences))), "a message is missing"
    assert len(documents) == sums["consumer"]["stored"] and len(messages) == sums["publisher"]["acked"]
    return runs


@pytest.mark.timeout(180)
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_parts_are_turned_on_and_off(toggle, collection, protocol):
    process = toggle(**{"mqtt.protocol": protocol})
    sums = process.finish(timeout=150)
    steps = [record["message"] for record in process.records if record.get("room") == "toggle"]
    assert steps[-1] == "done", process.tail()
    print(f"{len(steps)} steps, {sums['consumer']['stored']} messages, loop {sums['loop']['longest_iteration_ms']} ms")
    assert sums["publisher"]["failed"] == sums["publisher"]["unacknowledged"] == 0
    assert sums["consumer"]["in_flight"] == sums["consumer"]["returned"] == 0
    assert sums["consumer"]["duplicates"] == 0
    # Each start of the publisher is a run of its own.
    client_id = json.loads((process.state / "state.json").read_text())["client_id"]
    messages = clients.take_session(process.broker.port, f"{client_id}-1", protocol=5 if protocol == "5" else 4)
    left = [json.loads(message.payload) for message in messages]
    assert len(_assert_all_stored(collection, sums, left)) >= 10 and len(left) < RATE
