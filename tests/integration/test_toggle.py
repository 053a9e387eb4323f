"""Publisher and consumer are turned on and off in one running process (toggle.c, which checks the counters)."""

import pytest

from service import BUILD

RATE = 200


@pytest.fixture
def toggle(service, mosquitto, mongod, database):
    """A function that makes a toggle.c, not started, with everything it needs."""
    def make(**settings):
        made = service(started=False, broker=mosquitto(), mongod=mongod, database=database, role="both", name="toggle",
                       settings={"publisher.rate": f"{RATE}/s", **settings})
        made.program = BUILD / "tests" / "integration" / "toggle"
        return made.start()

    return make


def _assert_all_stored(collection, sums):
    """Each message that the broker acknowledged to the publisher is in MongoDB, once."""
    documents = list(collection.find({}, {"_id": 0, "payload.run": 1, "payload.sequence": 1}))
    messages = {(document["payload"]["run"], document["payload"]["sequence"]) for document in documents}
    assert len(messages) == len(documents), "stored twice"
    runs = {run for run, _ in messages}
    for run in runs:
        sequences = sorted(sequence for that, sequence in messages if that == run)
        assert sequences == list(range(len(sequences))), "a message is missing"
    assert len(messages) == sums["consumer"]["stored"] == sums["publisher"]["acked"]
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
    assert len(_assert_all_stored(collection, sums)) >= 10
