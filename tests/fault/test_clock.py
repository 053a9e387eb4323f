"""The wall clock is set back.

Fault: mid-stream the service's wall clock goes back by an hour, then to 1970, then forward again; MongoDB and the
service are killed while it is in 1970. The monotonic clock goes on, as it does when somebody sets the time.
Proof: received_at of what comes meanwhile is an hour ago, and in 1970.
Held: messages go on arriving within seconds of each change, the spool takes them and drains, connections live on; received_at is what the
clock said; the oracle. Figure: messages, faults, the longest pause, lost (0), duplicates.
"""

import datetime
import time

import pytest

from faults import Clock
from oracle import pause, scaled
from processes import wait_until


@pytest.mark.not_sanitized("libfaketime does not go with it")
@pytest.mark.timeout(scaled(150, 300))
def test_the_clock_is_set_back(scene, tmp_path):
    lasts = scaled(2, 20)
    clock = Clock(tmp_path)
    it = scene(env=clock.environment)
    longest = 0.0

    def goes_on():
        """How long it takes until what is published now is received."""
        before, begun = it.running.sums()["consumer"]["received"], time.monotonic()
        wait_until(lambda: it.running.sums()["consumer"]["received"] >= before + 1000, 20, it.state)
        return time.monotonic() - begun

    with it.stream(pace=1000) as stream:
        stream.wait(1000)
        clock.set("-1h")
        longest = max(longest, goes_on())
        pause(lasts)
        clock.set("@1970-01-01 00:00:10")
        longest = max(longest, goes_on())
        pause(1.5)
        it.server.kill9()
        it.wait_spooled(2000)
        it.running.kill9()
        it.start()
        longest = max(longest, goes_on())
        held = it.spool()
        it.server.restart()
        it.wait_drained()
        longest = max(longest, goes_on())
        clock.set("+0")
        pause(1.5)
        longest = max(longest, goes_on())
        acknowledged = stream.finish()
    assert stream.lost == 0

    it.wait_settled()
    behind, in_1970, right, other = 0, 0, 0, []
    for document in it.database.messages.find({"topic": {"$regex": "^sensors/device-"}}, {"received_at": 1, "payload.n": 1}):
        received = document["received_at"].replace(tzinfo=datetime.timezone.utc).timestamp()
        published = stream.acknowledged[document["payload"]["n"]]
        if 0 < received < 3600:
            in_1970 += 1
        elif abs(received + 3600 - published) < 5:
            behind += 1
        elif abs(received - published) < 5:
            right += 1
        else:
            other.append(received - published)
    it.conclude("clock", acknowledged, faults=5, rate=f"{stream.rate:.0f}/s", an_hour_ago=behind, in_1970=in_1970, right=right,
                in_spool=held, longest_pause=f"{longest - 1:.1f} s")
    assert not other and behind > 1000 and in_1970 > 2000 and right > 1000
    assert longest < 5
