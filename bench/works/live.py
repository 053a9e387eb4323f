"""The highest rate at which nothing piles up: the publisher may be at most WINDOW messages ahead of what is stored.

So the contender itself sets the pace, and neither a rate has to be searched nor a backlog to be feared. How far it is comes
from the collection's count, polled every 5 ms (a contender that stores nothing counts for itself).
"""

import json
import time

from contenders import ALL, chosen
from harness import LOAD, Counter, Failed, Rows, Run, Turn, say

WINDOW = 20_000
SLOW_WINDOW = 2_000  # for a contender that takes half a minute for 20,000
POLL = 0.005
WARM_UP, MEASURED = 2.0, 4.0
CONTENDERS = ["bare", "mqtt2mongo-1", "mqtt2mongo-4", "node", "bare-loop", "python-batched", "python"]


class Pace:
    """The contender under load, seen through `counter`, which the publisher follows."""

    def __init__(self, bench, contender, run, counter):
        self.bench, self.contender, self.run, self.counter = bench, contender, run, counter

    def look(self):
        """(time, messages stored, CPU seconds of the contender); the publisher learns of it."""
        self.run.check_alive()
        if self.contender.stores:
            self.counter.value = self.bench.stored()
        return time.monotonic(), self.counter.value, self.run.cpu()

    def follow(self, seconds):
        """Keep looking for so long; the last look."""
        deadline = time.monotonic() + seconds
        while True:
            seen = self.look()
            if seen[0] >= deadline:
                self.run.look()
                return seen
            time.sleep(POLL)


def publisher_sent(publisher):
    """How many messages the publisher says it sent, after its end."""
    return json.loads(publisher.stdout.read_text().splitlines()[-1])["sent"]


def measure(bench, contender, seconds, warm_up=WARM_UP):
    """One contender under as much load as it bears: a Turn of `seconds`. All that was sent must be stored in the end."""
    bench.clear()
    counter = Counter(bench.scratch / "stored")
    window = SLOW_WINDOW if contender.name == "python" else WINDOW
    contender.prepare(bench)
    with (bench.connected(contender, counter=counter) as run,
          Run("load", bench.scratch / "runs", [LOAD, "-p", bench.broker.port, "-c", counter.path, "-w", window]) as publisher):
        pace = Pace(bench, contender, run, counter)
        begun, servers = pace.follow(warm_up), bench.server_cpu()
        ended = pace.follow(seconds)
        used = bench.server_use(servers, max(1, ended[1] - begun[1]))
        publisher.finish()
        sent = publisher_sent(publisher)
        wait_for_rest(pace, sent)
        run.finish()
    if contender.stores:
        bench.check(contender.name, sent)
    if ended[1] == begun[1]:
        raise Failed(f"{contender.name} stored nothing in {seconds} s; {sent} were sent")
    return Turn(ended[1] - begun[1], ended[0] - begun[0], ended[2] - begun[2], run.peak, {**used, **contender.sums(run)})


def wait_for_rest(pace, sent, limit=60):
    deadline = time.monotonic() + limit
    while (stored := pace.look()[1]) < sent:
        if time.monotonic() > deadline:
            raise Failed(f"{pace.contender.name}: {stored} of {sent} messages stored within {limit} s of the last")
        time.sleep(POLL)


def live(bench):
    warm_up, seconds = (1.0, 2.0) if bench.quick else (WARM_UP, MEASURED)
    rows = Rows("live", "Live, the highest rate without a backlog", "msg/s", "higher", payload_bytes=110, topics=100,
                receive_maximum=4096, window=WINDOW, warm_up_seconds=warm_up, measured_seconds=seconds)
    contenders, missing = chosen(*(CONTENDERS[:4] if bench.quick else CONTENDERS))
    for name, why in missing.items():
        rows.leave_out(name, "live", why)
    for turn in range(bench.rounds):
        for contender in bench.rotated([one for one in contenders if not rows.failed(one, "live")], turn):
            with rows.attempt(bench, contender, "live"):
                found = measure(bench, contender, seconds, warm_up)
                rows.add_turn(contender, "live", found)
                say(f"  {contender.name:15} {found}")
    return rows.work


def known_rate(bench, name):
    """The median live rate of a contender from this run's work; 0 if it has none."""
    rows = bench.found.get("live", {}).get("rows", [])
    values = sorted(value for row in rows if row["contender"] == name for value in row["values"])
    return values[len(values) // 2] if values else 0


def live_rate(bench, name):
    """The same, or else measured now."""
    known = known_rate(bench, name)
    if known:
        return known
    contender = ALL[name]
    try:
        return measure(bench, contender, 3.0).rate
    except (Failed, AssertionError):
        return 0
    finally:
        contender.forget(bench)
