"""Does a message cost more when there are more of them, or more topics? What is measured is mqtt2mongo-1.

It is started on an empty session, frozen (SIGSTOP) while the backlog is published, and set going again. Measured is from then until
the collection has the last message: wall time, and CPU as the kernel counts it, which leaves out the start of the process and its
end. 10,000 messages take a tenth of a second, so they are drained several times in one life and added up.
"""

import time

from contenders import ALL
from harness import Rows, say

REPEATED = 10
CASES = {
    "10,000 messages": (10_000, 100, REPEATED), "100,000 messages": (100_000, 100, 1), "1,000,000 messages": (1_000_000, 100, 1),
    "1 topic": (100_000, 1, 1), "100 topics": (100_000, 100, 1), "10,000 topics": (100_000, 10_000, 1)}
NAME = "mqtt2mongo-1"


def drain_frozen(bench, run, count, topics):
    """(wall seconds, CPU seconds) for a backlog, drained by a process that was frozen while it built up."""
    run.sigstop()
    bench.clear()
    bench.publish(count, topics=topics)
    bench.quiet()
    before, run.begun = run.cpu(), time.monotonic()
    run.sigcont()
    seconds = bench.wait_stored(run, count, limit=60 + count / 1000, interval=0.002)
    used = run.cpu() - before
    bench.check(run.name, count, topics=topics)
    return seconds, used


def measure(bench, count, topics, repeated):
    """(wall µs a message, CPU µs a message, peak MiB, what the service says)"""
    contender = ALL[NAME]
    contender.prepare(bench)
    with bench.start(contender) as run:
        run.wait_log("subscribed to")
        taken = [drain_frozen(bench, run, count, topics) for _ in range(repeated)]
        run.finish()
    wall, cpu = (sum(part) / (count * repeated) * 1e6 for part in zip(*taken, strict=True))
    return wall, cpu, run.peak / 1024, contender.sums(run)


def growth(bench):
    rows = Rows("growth", "What a message costs, by number of messages and topics", "µs CPU/msg", "lower", payload_bytes=110,
                receive_maximum=4096, ten_thousand_repeated=REPEATED)
    for _ in range(bench.rounds):
        for case, (count, topics, repeated) in CASES.items():
            if rows.failed(ALL[NAME], case):
                continue
            with rows.attempt(bench, ALL[NAME], case):
                wall, cpu, peak, extra = measure(bench, count, topics, repeated)
                x, series = (topics, "topics") if "topic" in case else (count, "messages")
                rows.add(ALL[NAME], case, cpu, x=x, series=series, cpu_us=cpu, peak_mib=peak, extra={"wall_us": wall, **extra})
                say(f"  {case:20} {cpu:6.2f} µs CPU/msg  {wall:7.2f} µs wall/msg  peak {peak:.1f} MiB")
    return rows.work
