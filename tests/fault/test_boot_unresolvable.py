"""The service starts, and the name of its database cannot be resolved.

Fault: mongodb.uri names a host that does not exist, as mongodb:// and as mongodb+srv://, which needs the name for anything at all.
Proof: the service's complaint names the host; nothing is in MongoDB.
Held: it subscribes, and what comes is in the spool; SIGKILL, a start with the right name, and the oracle: all arrives. Figure:
messages, in the spool, lost (0), duplicates (0).
"""

import pytest

from oracle import MONGO_SECRET, scaled

HOST = "database.example.invalid"


@pytest.mark.timeout(scaled(120, 120))
@pytest.mark.parametrize("scheme", ["mongodb", "mongodb+srv"])
def test_a_name_that_cannot_be_resolved(scene, scheme):
    count = scaled(3000, 50_000)
    it = scene(start=False)
    right = it.running.settings["mongodb.uri"]
    it.running.settings["mongodb.uri"] = f"{scheme}://tester:{MONGO_SECRET}@{HOST}/?replicaSet=rs0"
    it.start()
    it.publish(count)
    it.wait_spooled(count)
    it.running.wait_log(HOST.replace(".", r"\."), timeout=60)
    assert it.database.messages.estimated_document_count() == 0
    it.running.kill9()
    held = it.spool()
    it.running.settings["mongodb.uri"] = right
    it.start()
    _, kept = it.conclude(f"boot_unresolvable, {scheme}", faults=1, in_spool=held)
    assert held >= count and kept.twice == 0
