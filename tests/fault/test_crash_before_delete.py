"""SIGKILL between MongoDB's answer and the spool's delete.

Fault: MongoDB is back, the spool is drained, and the service is killed when MongoDB has stored the documents, and before it has
deleted them from the spool. Answers are held back for a moment on their way, so that there is such a moment.
Proof: just after the kill the documents are in MongoDB, and the spool still has them, by their _ids; a kill too early or too
late does not count, and is repeated.
Held: the oracle, and no duplicate at all: the next drain meets its own _ids. Figure: messages, kills that hit, lost (0),
duplicates (0).
"""

import pytest

from faults import Link
from oracle import scaled
from processes import wait_until


def in_both(it):
    """How many documents of MongoDB are in the spool as well, by _id."""
    ids = [line["_id"]["$oid"] for line in it.export()]
    stored = {str(document["_id"]) for name in ("messages", "dead_letter") for document in it.database[name].find({}, {"_id": 1})}
    return len(stored & set(ids))


@pytest.mark.timeout(scaled(180, 900))
def test_a_crash_before_the_delete(scene):
    hits_wanted, kills, hits = scaled(4, 25), 0, []
    it = scene(start=False)
    with Link(it.server.port) as link:
        uri = it.server.uri.replace(f":{it.server.port}/?replicaSet=rs0", f":{link.port}/?directConnection=true")
        assert uri != it.server.uri
        it.running.settings["mongodb.uri"] = uri
        it.start()
        while len(hits) < hits_wanted:
            it.server.sigstop()
            already = it.spool()
            it.publish(1000)
            it.wait_spooled(already + 1000)
            link.latency = 0.15
            before = it.running.sums()["consumer"]
            it.server.sigcont()
            stored = it.database.messages.estimated_document_count()
            wait_until(lambda: it.database.messages.estimated_document_count() > stored, 30, it.state, interval=0.005)
            it.running.kill9()
            link.latency = 0
            kills += 1
            both = in_both(it)
            if both:
                hits.append(both)
            assert kills < 5 * hits_wanted, f"only {len(hits)} of {kills} kills hit, {before}"
            it.start()
        it.wait_drained()
        _, kept = it.conclude("crash_before_delete", faults=len(hits), kills=kills, in_both=hits)
    assert kept.twice == 0, f"{kept.twice} duplicates"
