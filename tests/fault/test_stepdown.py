"""A replica set of three changes its primary, again and again.

Fault: under load the primary steps down, and the next is killed and brought back, in turns, every 8 s (long: every 20 s).
Proof: another member is primary each time.
Held: the oracle; the service is the same process all along. Figure: messages, changes of the primary, lost (0), duplicates.
"""

import time

import pytest

from oracle import MONGO_SECRET, pause, scaled


@pytest.mark.timeout(scaled(240, 1200))
def test_primaries_step_down_and_are_killed(scene, replica_set):
    changes, every = scaled(4, 20), scaled(8, 20)
    server = replica_set(auth=True, password=MONGO_SECRET)
    it = scene(server=server)
    pid, primaries = it.running.pid, [server.primary()]
    with it.stream(pace=1000) as stream:
        stream.wait(1000)
        for number in range(changes):
            begun = time.monotonic()
            former = server.step_down() if number % 2 == 0 else server.kill_primary()
            primaries.append(server.wait_primary(other_than=former))
            if not former.alive:
                former.launch()
            pause(max(0, every - (time.monotonic() - begun)))
        acknowledged = stream.finish()
    assert it.running.pid == pid and it.running.alive and stream.lost == 0
    assert all(one is not other for one, other in zip(primaries, primaries[1:], strict=False))
    spooled = it.running.sums()["consumer"]["spooled"]
    it.conclude("stepdown", acknowledged, faults=changes, rate=f"{stream.rate:.0f}/s",
                primaries=[server.members.index(member) for member in primaries], spooled=spooled)
