"""Topics of every length and of every character that is allowed.

Fault: topics of 65,000 bytes, 50,000 distinct topics (short: 5,000), each character of Unicode that a topic may have, empty levels,
200 levels, spaces at both ends, a leading slash; half of each while MongoDB is there, half through the spool.
Proof: they were acknowledged by the broker; the second half is in the spool.
Held: each document has its topic, character for character; the service's memory stays below 64 MiB; the oracle. Figure: messages, distinct
topics, characters, peak memory, lost (0).
"""

import sys
import unicodedata

import pytest

import clients
from oracle import AS_TESTER, scaled

MOST = 64 << 20
LONGEST = 65_000


def characters():
    """All that a topic may have, and mosquitto takes: without NUL, + and #, control characters, surrogates and non-characters."""
    return [chr(code) for code in range(0x20, sys.maxunicode + 1)
            if unicodedata.category(chr(code)) not in ("Cc", "Cs") and code & 0xFFFE != 0xFFFE and not 0xFDD0 <= code <= 0xFDEF
            and chr(code) not in "+#"]


def long_topics(count):
    """Each of LONGEST bytes, and different from its first or its last level on."""
    topics = []
    for number in range(count):
        head, tail = (f"{number}/", "/x") if number % 2 else ("long/", f"/{number}")
        fill = LONGEST - len(head) - len(tail)
        topics.append(head + ("é" * (fill // 2) + "a" * (fill % 2) if number % 3 == 0 else "a" * fill) + tail)
    assert {len(topic.encode()) for topic in topics} == {LONGEST}
    return topics


def all_topics():
    every = characters()
    step = 4000
    topics = ["every/" + "".join(every[first:first + step]).replace("/", "") for first in range(0, len(every), step)]
    topics += long_topics(scaled(300, 2000))
    topics += [f"many/{number % 97}/{number}" for number in range(scaled(5000, 50_000))]
    topics += ["/", "//", "///", " ", " / ", "/leading", "trailing/", "a//b", " lead", "trail ", "a b", "a" * 255, "/".join("x" * 200),
               "/" * 150, "😀", "🏳️\u200d🌈/👨‍👩‍👧", "e\u0301", "é", "\u202eabc", "\ufeffbom", "\ufefftopic/\ufeff", "a/$SYS/b", "a/$share/g/x", "a$b",
               "%s%n%d", "{}", '"quoted"', "back\\slash", "'; drop", "a.b.c", "a/../b", "<script>", "\u2028", "\u00a0", "*", "?", "\U0010fffd"]
    return topics


@pytest.mark.timeout(scaled(180, 600))
def test_topics(scene):
    it = scene(**{"consumer.topic": "#"})
    topics = all_topics()
    assert len(set(topics)) == len(topics)

    def publish(numbers):
        payloads = [b'{"number":%d}' % number for number in numbers]
        assert len(clients.publish(it.broker.port, payloads, lambda index: topics[numbers[index]], timeout=300,
                                   **AS_TESTER)) == len(numbers)

    publish(range(0, len(topics), 2))
    it.wait_settled()
    it.server.kill9()
    publish(range(1, len(topics), 2))
    it.wait_spooled(len(topics) // 2, timeout=60)
    it.server.restart()
    it.wait_drained()
    it.wait_settled()
    found = {document["payload"]["number"]: document["topic"] for document in it.database.messages.find({"payload.number": {
        "$exists": True}})}
    wrong = [number for number, topic in enumerate(topics) if found.get(number) != topic]
    assert not wrong, f"{len(wrong)} topics are not what they were, such as {topics[wrong[0]][:100]!r}: {found.get(wrong[0])!r}"
    assert it.database.messages.count_documents({"payload.number": {"$exists": True}}) == len(topics)
    peak, _ = it.running.memory()
    it.conclude("topics", messages=len(topics), faults=len(topics), characters=len(characters()),
                peak=f"{peak / (1 << 20):.1f} MiB")
    assert peak <= MOST
