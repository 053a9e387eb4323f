"""10,000 payloads that are no JSON, or none that can be stored.

Fault: every kind of poison that the tests of types know, random bytes, and JSON cut off anywhere; half of them while MongoDB is there,
half while it is down, so that they go through the spool; with a good message between any two.
Proof: the sums count each kind by its reason, and half of all messages as recovered from the spool.
Held: each is a dead letter, byte for byte, with the reason and the offset where it went wrong, once; each good message is stored,
once; the service says nothing as an error; the oracle. Figure: messages, poisoned ones by reason, lost (0), duplicates (0).
"""

import collections
import json

import pytest

import clients
from oracle import AS_TESTER, scaled
from processes import wait_until
from stream import seeded
from test_types import LIMIT, MIB, POISON, check_dead_letter

COUNT = scaled(10_000, 10_000)
BULKY = 8 * LIMIT  # so large a payload comes a few times, not a hundred times


def kinds(moments):
    """COUNT times (payload, code, offset)."""
    small, bulky = ([case for case in POISON if (len(case[0]) > BULKY) is large] for large in (False, True))
    made = bulky * 3
    whole = json.dumps({"device": "device-1", "values": [1, -2.5e3, True, False, None, "text \\u20ac"], "more": {"a": {}}}).encode()
    while len(made) < COUNT:
        choice = moments.randrange(3)
        if choice == 0:
            end = moments.randrange(1, len(whole))
            made.append((whole[:end], "invalid_json", end))
        elif choice == 1:
            made.append((moments.choice([b"\x80", b"\xbf", b"\xff"]) + moments.randbytes(moments.randrange(300)), "invalid_utf8", 0))
        else:
            made.append(moments.choice(small))
    moments.shuffle(made)
    return made


@pytest.mark.timeout(scaled(180, 180))
def test_ten_thousand_poisoned_payloads(scene):
    poison = kinds(seeded())
    it = scene(broker={"extra": ["sys_interval 1", "message_size_limit 0"]}, **{"consumer.max_payload": "64KiB"})

    def publish(numbers):
        payloads, topics = [], []
        for number in numbers:
            payloads += [b'{"n":%d}' % number, poison[number][0]]
            topics += [f"sensors/good/{number}", f"sensors/bad/{number}"]
        assert len(clients.publish(it.broker.port, payloads, topics.__getitem__, **AS_TESTER)) == len(payloads)

    publish(range(COUNT // 2))
    it.wait_settled()
    it.server.kill9()
    publish(range(COUNT // 2, COUNT))
    it.wait_spooled(COUNT)
    it.server.restart()
    it.wait_drained()
    wait_until(lambda: it.running.sums()["consumer"]["in_flight"] == 0, 20, it.state)
    sums = it.running.sums()["consumer"]
    expected = collections.Counter(code for _, code, _ in poison)
    assert sums["dead_lettered_by_reason"] == expected and sums["recovered_from_spool"] >= COUNT
    assert sums["truncated"] == sum(len(payload) > MIB for payload, _, _ in poison)

    database = it.database
    letters = {letter["topic"]: letter for letter in database.dead_letter.find()}
    assert len(letters) == database.dead_letter.count_documents({}) == COUNT
    for number, (payload, code, offset) in enumerate(poison):
        check_dead_letter(letters[f"sensors/bad/{number}"], f"sensors/bad/{number}", payload, code, offset)
    good = [(document["topic"], document["payload"]) for document in database.messages.find({"topic": {"$regex": "^sensors/good/"}})]
    assert sorted(good, key=lambda each: each[1]["n"]) == [(f"sensors/good/{number}", {"n": number}) for number in range(COUNT)]
    said = [record["message"] for record in it.running.records if record["level"] == "error"]
    assert not said, said
    it.conclude("poison", messages=2 * COUNT, faults=COUNT, **expected)
