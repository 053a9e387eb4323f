"""SIGTERM in an outage and in the middle of a drain; the books are balanced over all lives.

Fault: under a steady stream the service is stopped by SIGTERM while MongoDB is there, while it is down, while it is frozen, and while the spool
is drained into it (with inserts made slow), and started again each time.
Proof: the signal it says it got; the spool holds messages at the end of each life in an outage or a drain.
Held: exit status 0 within shutdown_timeout and a little, nothing in flight; the sums of each life add up, and those of all lives together:
what is in the spool is what went in less what came out of it, by two counts; as many documents and dead letters as the sums say; the oracle.
Figure: messages, stops, sums over all lives, lost (0), duplicates (0).
"""

import collections
import contextlib
import sqlite3
import time

import pytest

from oracle import pause, scaled
from stream import seeded

TERMS = ("received", "recovered_from_spool", "stored", "duplicates", "dead_lettered", "spooled", "dropped", "returned", "in_flight",
         "redelivered")


def rows(it):
    """Messages in the spool, counted by SQLite."""
    with contextlib.closing(sqlite3.connect(it.running.state / "spool.db")) as database:
        return database.execute("SELECT count(*) FROM message").fetchone()[0]


@pytest.mark.timeout(scaled(150, 900))
def test_sigterm_and_the_books(scene):
    moments, rounds = seeded(), scaled(1, 15)
    it = scene(**{"shutdown_timeout": "3s"})
    total, held, longest = collections.Counter(), collections.Counter(), collections.Counter()

    def stop(phase):
        pause(moments.uniform(0.1, 0.6))
        begun = time.monotonic()
        sums = it.running.stop(timeout=20)["consumer"]
        longest[phase] = max(longest[phase], time.monotonic() - begun)
        assert sums["in_flight"] == 0 and sums["dropped"] == 0
        total.update({term: sums[term] for term in TERMS})
        left = it.spool()
        assert left == rows(it) == total["spooled"] - total["recovered_from_spool"], f"{phase}: {left} in the spool, {total}, {sums}"
        held[phase] += left > 0
        it.start()

    with it.stream(pace=1500) as stream:
        for _ in range(rounds):
            stop("present")
            it.server.kill9()
            it.wait_spooled(it.spool() + 500)
            stop("down")
            it.wait_spooled(it.spool() + 500)
            it.server.restart()
            it.server.fail("alwaysOn", ["insert"], blockConnection=True, blockTimeMS=150, appName="mqtt2mongo")
            stop("drain")
            stop("drain")
            it.server.fail("off", [])
            it.server.sigstop()
            it.wait_spooled(it.spool() + 500)
            stop("frozen")
            it.server.sigcont()
        acknowledged = stream.finish()
    assert stream.lost == 0
    last, kept = it.conclude("sigterm", acknowledged, faults=5 * rounds, rate=f"{stream.rate:.0f}/s", spool_held_messages_at=dict(held),
                             longest_stop={phase: f"{took:.1f} s" for phase, took in longest.items()})
    total.update({term: last[term] for term in TERMS})
    print("over all lives: " + "  ".join(f"{term} {total[term]}" for term in TERMS))
    assert total["received"] + total["recovered_from_spool"] == sum(total[term] for term in TERMS[2:9])
    assert total["spooled"] == total["recovered_from_spool"] and total["duplicates"] == 0
    documents, letters = (it.database[name].count_documents({}) for name in ("messages", "dead_letter"))
    assert (documents, letters) == (total["stored"], total["dead_lettered"])
    assert total["received"] - total["returned"] == documents + letters
    assert kept.twice == 0 and last["returned"] == 0
    assert held["down"] == rounds and held["drain"] >= rounds and held["frozen"] == rounds, "the stops did not hit what they should"
    assert max(longest.values()) < 3 + 1.5 + 2
