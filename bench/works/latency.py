"""How long from publishing until the message is durable, at a fixed rate?

The load is open: message k is due at t0 + k / rate, whatever happened to the ones before it, and its latency counts from then, not
from when it could be sent. A contender that stalls is charged for all that came due meanwhile. "Durable" is what a change stream
says (bench/watch.py), the same for all contenders; of some messages only, for of thousands a second it would take the CPU time whose
want it then measures. The loads are parts of the live rate of mqtt2mongo-1, so that all contenders are measured at the same rates,
and one load is the same in every run; one whose own live rate is too low for a load is left out there.
"""

import array
import json
import sys
import time
from pathlib import Path

from contenders import chosen
from harness import COLLECTION, DATABASE, LOAD, Failed, Rows, Run, say, wait_until
from works.live import live_rate

WATCH = Path(__file__).resolve().parent.parent / "watch.py"
WATCHED = 400  # messages a second
WARM_UP, MEASURED = 2.0, 4.0
START_MS = 200  # from the start of the publisher until the first message is due
LARGEST_US = 120_000_000
PERCENTILES = (0, 25, 50, 75, 90, 95, 98, 99, 99.5, 99.8, 99.9, 99.95, 99.99, 100)
CONTENDERS = ["mqtt2mongo-1", "mqtt2mongo-interval-0", "node-durable", "mqtt2mongo-4", "python-batched"]
PLAIN = 12_500  # messages a second, beside the parts of the live rate: the same in every run
LIVE_AS = {"node-durable": "node", "mqtt2mongo-interval-0": "mqtt2mongo-1"}  # have no live rate of their own


def new_histogram(values=()):
    """Of latencies in µs."""
    from hdrh.histogram import HdrHistogram  # here: whoever only reads results need not have it

    histogram = HdrHistogram(1, LARGEST_US, 3)
    for value in values:
        histogram.record_value(min(max(1, round(value)), LARGEST_US))
    return histogram


def at_percentile(histogram, percentile):
    return histogram.get_value_at_percentile(percentile) / 1000


def latencies(seen, rate, t0, first):
    """The µs from when each message was due until it was seen, of messages from number `first` on. `seen`: {sequence: ns}, t0: ns
    when number 0 was due."""
    return [(when - t0 - sequence / rate * 1e9) / 1000 for sequence, when in seen.items() if sequence >= first]


class Load:
    """A schedule: `rate` messages a second, of which the first `warm_up` seconds do not count."""

    def __init__(self, rate, warm_up, seconds):
        self.rate, self.count, self.first = rate, int(rate * (warm_up + seconds)), int(rate * warm_up)
        self.every = max(1, round(rate / WATCHED))  # one message in so many is watched
        self.watched = -(-self.count // self.every)


class Watcher(Run):
    """bench/watch.py, ready. It ends once it has seen `expected` messages; 0: by finish(), when it has seen all."""

    def __init__(self, bench, field, every, expected=0):
        self.file = bench.scratch / "runs" / "seen"
        self.file.unlink(missing_ok=True)
        super().__init__("watch", bench.scratch / "runs", [sys.executable, WATCH, bench.mongod.uri, DATABASE, COLLECTION, field, every,
                                                           expected, self.file])
        wait_until(lambda: self.check_alive() or "ready" in self.stdout.read_text(), 20, "the watcher is ready")

    def seen(self):
        """{sequence: ns}, the first time each; after its end."""
        pairs = array.array("q")
        pairs.frombytes(self.file.read_bytes())
        found = {}
        for sequence, when in zip(pairs[::2], pairs[1::2], strict=True):
            found.setdefault(sequence, when)
        return found


def measure(bench, contender, load):
    """One contender at one load: (histogram of µs, Run, {"watcher_behind_ms": behind the collection's count at the end,
    "publisher_late_ms": the most that a message left after it was due})."""
    bench.clear()
    contender.prepare(bench)
    argv = [LOAD, "-p", bench.broker.port, "-n", load.count, "-r", f"{load.rate:.3f}", "-d", START_MS]
    with (Watcher(bench, contender.sequence, load.every, load.watched) as watcher, bench.connected(contender) as run,
          Run("load", bench.scratch / "runs", argv) as publisher):
        wait_until(lambda: not publisher.alive, 60, f"all {load.count} messages for {contender.name} are sent", interval=0.1)
        publisher.ended_well(publisher.popen.returncode)
        bench.wait_stored(run, load.count, limit=60, interval=0.005)
        stored = time.monotonic_ns()
        run.finish()
        wait_until(lambda: not watcher.alive, 30, f"the watcher has seen {load.watched} messages of {contender.name}")
        watcher.ended_well(watcher.popen.returncode)
    bench.check(contender.name, load.count)
    seen = watcher.seen()
    if len(seen) != load.watched:
        raise Failed(f"the watcher saw {len(seen)} of {load.watched} messages of {contender.name}")
    began, ended = (json.loads(line) for line in publisher.stdout.read_text().splitlines())
    return new_histogram(latencies(seen, load.rate, began["t0"], load.first)), run, {
        "watcher_behind_ms": max(0, (max(seen.values()) - stored) / 1e6), "publisher_late_ms": ended["late_ms"]}


class Loads:
    """The work: which contenders at which loads, and what was found."""

    def __init__(self, bench, rows, contenders, shares, warm_up, seconds):
        self.bench, self.rows, self.contenders = bench, rows, contenders
        self.full = live_rate(bench, "mqtt2mongo-1")
        if not self.full:
            raise Failed("the loads are parts of mqtt2mongo-1's live rate, and it has none")
        self.loads = {f"{PLAIN:,} msg/s": (None, Load(PLAIN, warm_up, seconds))}
        self.loads |= {f"{share} %": (share, Load(self.full * share / 100, warm_up, seconds)) for share in shares}
        self.merged = {}
        rates = {one.name: live_rate(bench, LIVE_AS.get(one.name, one.name)) for one in contenders}
        self.turns = {case: [one for one in contenders if self.bears(one, case, rates[one.name])] for case in self.loads}

    def bears(self, contender, case, rate):
        load = self.loads[case][1]
        if load.rate <= 0.9 * rate:
            return True
        self.rows.leave_out(contender, case, f"{load.rate:,.0f} msg/s is too much for it: its live rate is {rate:,.0f}")
        return False

    def round(self, turn):
        for case, (share, load) in self.loads.items():
            for contender in self.bench.rotated(self.turns[case], turn):
                if not self.rows.failed(contender, case):
                    with self.rows.attempt(self.bench, contender, case):
                        self.take(contender, case, share, load)

    def take(self, contender, case, share, load):
        histogram, run, checks = measure(self.bench, contender, load)
        found = {f"p{percentile:g}": at_percentile(histogram, percentile) for percentile in (50, 99, 99.9)}
        self.rows.add(contender, case, found["p99"], x=share, cpu_us=run.cpu() / load.count * 1e6, peak_mib=run.peak / 1024, extra={
            **found, "rate": load.rate, "watched": load.watched, **checks, **contender.sums(run)})
        self.merged.setdefault((contender.name, case), new_histogram()).add(histogram)
        say(f"  {case:12} of {self.full:,.0f} {contender.name:15} p50 {found['p50']:8.2f} ms  p99 {found['p99']:8.2f} ms  "
            f"p99.9 {found['p99.9']:8.2f} ms")

    def add_curves(self):
        for (name, case), histogram in self.merged.items():
            self.rows.row(name, case)["extra"]["curve"] = [[percentile, at_percentile(histogram, percentile)]
                                                           for percentile in PERCENTILES]


def latency(bench):
    warm_up, seconds = (1.0, 2.0) if bench.quick else (WARM_UP, MEASURED)
    rows = Rows("latency", "From publishing to durable, p99", "ms", "lower", payload_bytes=110, topics=100, receive_maximum=4096,
                warm_up_seconds=warm_up, measured_seconds=seconds, watched_a_second=WATCHED)
    contenders, missing = chosen(*(CONTENDERS[:3] if bench.quick else CONTENDERS))
    for name, why in missing.items():
        rows.leave_out(name, "all", why)
    loads = Loads(bench, rows, contenders, [50] if bench.quick else [25, 50, 75], warm_up, seconds)
    rows.work["parameters"]["full_rate"] = loads.full
    for turn in range(bench.rounds):
        loads.round(turn)
    loads.add_curves()
    return rows.work
