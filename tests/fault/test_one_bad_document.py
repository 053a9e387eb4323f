"""One document of a batch of 1,000 cannot be stored: the first, the one in the middle, the last.

Fault: a message that a validator of the collection refuses, one nested too deep, one that is no JSON, at position 0, 499 and 999
of 1,000 messages that are stored together; as they come, and out of the spool that was filled while MongoDB was down.
Proof: the sums say that the 1,000 were one batch; the reason of each dead letter.
Held: of each batch 999 are stored and that one is a dead letter with its own reason; nothing is tried again or comes twice; the
oracle. Figure: messages, bad ones, lost (0), duplicates (0).
"""

import json

import pytest

from oracle import scaled
from processes import wait_until
from stream import content_of

BATCH = 1000
BAD = {
    "refused_by_mongodb": lambda number: json.dumps({"n": number, "refuse": True}).encode(),
    "too_deep": lambda number: b'{"n": %d, "deep": %s}' % (number, b"[" * 101 + b"]" * 101),
    "invalid_json": lambda number: b"no JSON %d" % number,
}
CASES = [(kind, position) for kind in BAD for position in (0, BATCH // 2 - 1, BATCH - 1)]


def prepare(scene, **settings):
    """A scene whose collection has a validator, and the numbers of the bad messages, with their reasons: one in each BATCH."""
    bad = {case * BATCH + position: kind for case, (kind, position) in enumerate(CASES)}
    it = scene(start=False, **{"mqtt.receive_maximum": BATCH} | settings)
    it.database.create_collection("messages", validator={"payload.refuse": {"$exists": False}})
    it.payload_of = lambda number: BAD[bad[number]](number) if number in bad else json.dumps(content_of(number)).encode()
    return it, bad


def check(it, name, bad):
    sums, kept = it.conclude(name, faults=len(bad))
    assert {kind: sums["dead_lettered_by_reason"][kind] for kind in BAD} == dict.fromkeys(BAD, 3)
    letters = {letter["payload"]: letter["reason"] for letter in it.database.dead_letter.find()}
    assert {payload: reason["code"] for payload, reason in letters.items()} == {
        it.payload_of(number): kind for number, kind in bad.items()}
    stored = it.database.messages.count_documents({"topic": {"$regex": "^sensors/device-"}})
    assert stored == len(CASES) * BATCH - len(bad) and kept.twice == 0


@pytest.mark.timeout(scaled(120, 120))
def test_in_a_batch_that_comes(scene):
    it, bad = prepare(scene, **{"consumer.batch.count": 4 * BATCH})  # it is written in quarters
    it.start()
    for _ in CASES:
        before = it.running.sums()["consumer"]
        it.running.sigstop()
        it.publish(BATCH, window=BATCH)
        wait_until(lambda: it.unread() >= BATCH * 60, 10, "the broker has sent the batch")
        it.running.sigcont()
        wait_until(lambda before=before: it.running.sums()["consumer"]["received"] == before["received"] + BATCH, 20, it.state)
        wait_until(lambda: it.running.sums()["consumer"]["in_flight"] == 0, 20, it.state)
        sums = it.running.sums()["consumer"]
        assert sums["batches"] == before["batches"] + 1 and sums["largest_batch"] == BATCH
        assert sums["dead_lettered"] == before["dead_lettered"] + 1 and sums["spooled"] == 0
    check(it, "one_bad_document, live", bad)


@pytest.mark.timeout(scaled(120, 120))
def test_in_a_batch_from_the_spool(scene):
    it, bad = prepare(scene, **{"consumer.batch.count": BATCH})
    it.start()
    it.server.kill9()
    it.publish(len(CASES) * BATCH)
    it.wait_spooled(len(CASES) * BATCH)
    it.running.kill9()
    it.server.restart()
    it.start()
    it.wait_drained()
    sums = it.running.sums()["consumer"]
    assert sums["batches"] == len(CASES) and sums["recovered_from_spool"] == len(CASES) * BATCH
    assert sums["dead_lettered"] == len(bad) and sums["stored"] == len(CASES) * BATCH - len(bad)
    check(it, "one_bad_document, spool", bad)
