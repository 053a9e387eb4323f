"""MongoDB is away for long, and the broker's queue is as short as it is without any setting.

Fault: mongod is down for 20 s (long: 3 minutes) under 2,000 messages a second, with a broker that queues 1,000 messages for a
client and drops the rest without a word; once it is stopped, once frozen (freeze.py has that).
Proof: connecting to mongod's port is refused; the broker takes many times more than its queue holds meanwhile.
Held: the oracle, and the broker drops nothing, by its own count. Figure: messages, lost (0), duplicates, dropped (0), the most
that was in the spool, and how long it took to drain.
"""

import time

import pytest

from oracle import pause, scaled
from processes import accepts


@pytest.mark.timeout(scaled(150, 600))
def test_an_outage_of_mongodb(scene):
    away = scaled(20, 180)
    it = scene(default_queue=True)
    pid = it.running.pid
    with it.stream(pace=2000, window=200) as stream:
        stream.wait(2000)
        it.server.kill9()
        before, begun = len(stream.acknowledged), time.monotonic()
        while time.monotonic() - begun < away:
            pause(1)
            assert not accepts(it.server.port)
            it.running.sums()  # they add up
        meanwhile = len(stream.acknowledged) - before
        most = it.spool()
        it.server.restart()
        begun = time.monotonic()
        stream.wait(len(stream.acknowledged) + 2000)
        acknowledged = stream.finish()
    it.wait_drained()
    drained = time.monotonic() - begun
    sums = it.running.sums()["consumer"]
    assert it.running.pid == pid and it.running.alive and stream.lost == 0
    it.conclude("long_outage", acknowledged, faults=1, rate=f"{stream.rate:.0f}/s", away=f"{away} s", taken_meanwhile=meanwhile,
                most_in_spool=most, drained_after=f"{drained:.1f} s", returned=sums["returned"])
    assert meanwhile > 10_000 and most > 10_000, "the broker's queue could have held that"
