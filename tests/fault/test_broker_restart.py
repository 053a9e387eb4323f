"""The broker is restarted, with its sessions on disk and without.

Fault: SIGTERM and a start of the broker mid-stream. With persistence, it keeps sessions and messages. Without, it comes back empty;
once mid-stream, and once while MongoDB is down and the spool holds what the broker no longer knows.
Proof: the publisher's connection is lost each time, and the service subscribes anew.
Held: with persistence, the oracle. Without, mid-stream: nothing that the service has received is lost, not even what it had
not stored when the connection went: received = stored + dead letters, none returned; only what the broker had not handed over
can be missing. Without, and all handed over: the oracle, without exception. Figure: messages, restarts, lost (0).
"""

import pytest

from oracle import SUBSCRIBED, scaled
from processes import wait_until
from stream import seeded


def restart_under(it, stream, times, moments):
    """Restart the broker so many times mid-stream."""
    for _ in range(times):
        stream.wait(len(stream.acknowledged) + moments.randrange(500, 3000))
        mark, lost = it.running.mark(), stream.lost
        it.broker.stop()
        wait_until(lambda lost=lost: stream.lost > lost, what="the publisher notices")
        it.broker.start()
        it.running.wait_log(SUBSCRIBED, timeout=30, after=mark)
    stream.wait(len(stream.acknowledged) + 500)
    return stream.finish()


@pytest.mark.timeout(scaled(120, 300))
def test_a_broker_with_persistence(scene):
    restarts = scaled(4, 20)
    it = scene()
    with it.stream(pace=2000) as stream:
        acknowledged = restart_under(it, stream, restarts, seeded())
    it.conclude("broker_restart, persistent", acknowledged, faults=restarts, publisher_lost=stream.lost)
    assert stream.lost >= restarts


@pytest.mark.timeout(scaled(120, 300))
def test_a_broker_without_persistence(scene):
    restarts = scaled(3, 20)
    it = scene(broker={"persistence": False})
    with it.stream(pace=2000) as stream:
        acknowledged = restart_under(it, stream, restarts, seeded())
    it.wait_settled()
    before = it.running.sums()["consumer"]
    got = before["received"] - 1  # the last message
    sums, kept = it.conclude("broker_restart, not persistent", acknowledged, faults=restarts, may_miss=acknowledged,
                             received=got, forgotten_by_broker=len(acknowledged) - got, returned=before["returned"])
    assert before["returned"] == 0 and before["redelivered"] == 0
    assert sum(kept.copies.values()) == len(kept.copies) == got, "received, and not kept"
    assert sums["received"] == sums["stored"] + sums["dead_lettered"] + sums["spooled"] - sums["recovered_from_spool"]


@pytest.mark.timeout(scaled(120, 300))
def test_a_broker_without_persistence_while_mongodb_is_down(scene):
    restarts, count = scaled(2, 10), 2000
    it = scene(broker={"persistence": False})
    it.server.kill9()
    for number in range(restarts):
        it.publish(count)
        it.wait_spooled(count * (number + 1))
        mark = it.running.mark()
        it.broker.restart()
        it.running.wait_log(SUBSCRIBED, timeout=30, after=mark)
    held = it.spool()
    it.server.restart()
    it.conclude("broker_restart, not persistent, MongoDB down", faults=restarts, in_spool=held)
    assert held >= restarts * count
