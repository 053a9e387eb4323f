"""Little memory.

Fault: 64 MiB for the service, enforced by a cgroup where one may be made; 300,000 messages (short: 50,000) wait for it at the broker, and
as many come while MongoDB is down.
Proof: the limit in the cgroup, and that the kernel counted the service there; else only its peak is looked at. All of the second half was
in the spool.
Held: it is not ended by the kernel, and its own peak stays below the limit; the oracle. Figure: messages, peaks after the backlog, in the
outage and after the drain, lost (0), duplicates (0).
"""

import pytest

from faults import memory_limit
from oracle import scaled
from processes import wait_until

LIMIT = 64


@pytest.mark.timeout(scaled(150, 900))
def test_64_mebibytes(scene):
    count = scaled(50_000, 300_000)
    it = scene()
    it.running.stop()
    it.publish(count, timeout=600)
    peaks = []

    def note():
        peaks.append(it.running.memory()[0] / (1 << 20))

    with memory_limit(LIMIT) as group:
        it.running.cgroup = group
        it.start()
        pid = it.running.pid
        assert group is None or str(pid) in (group / "cgroup.procs").read_text().split()
        wait_until(lambda: it.running.sums()["consumer"]["stored"] >= count * 0.99, 300, it.state, interval=0.2)
        it.wait_settled()
        note()
        it.server.kill9()
        it.publish(count, timeout=600)
        it.wait_spooled(count, timeout=300)
        note()
        it.server.restart()
        it.wait_drained(timeout=300)
        note()
        assert it.running.pid == pid and it.running.alive
        _, kept = it.conclude("memory", faults=1, limit="cgroup" if group else "watched only",
                              peaks=" ".join(f"{peak:.1f}" for peak in peaks) + " MiB")
    assert max(peaks) <= LIMIT and kept.twice == 0
