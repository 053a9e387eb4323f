"""What does a message cost at the rates that plants have, and how long is it on its way?

The load is open, as in the work "latency": message k is due at t0 + k / rate. A turn is one life of a contender at one rate and has
two parts. In the first nobody else is there, and what is counted is what a message costs: CPU time of the contender, of mongod and of
the broker, flushes of mongod's journal, inserts. In the second a change stream tells when messages are durable (bench/watch.py), for
which mongod is woken with every commit; so that part has only the latency. What starts do is in neither.

Flushes are serverStatus' wiredTiger.log "log sync operations", each of which is one fdatasync of the journal (mongod 6.0 under strace:
100 and 100). "log flush operations" are writes of the log's buffer, some without one. mongod by itself, with nothing to store, uses CPU
and flushes, too: the parameters idle_… say how much. At 10 messages a second that is a good part of what a message costs, with each
contender.

A contender that does not keep up with a rate, being more than a second behind, is left out there.
"""

import json
import time
from contextlib import contextmanager
from typing import NamedTuple

from contenders import chosen
from harness import LOAD, Failed, Rows, Run, say, wait_until
from works.latency import LIVE_AS, START_MS, Watcher, at_percentile, latencies, new_histogram
from works.live import known_rate, publisher_sent

WARM_UP, SETTLE, IDLE = 1.0, 0.5, 2.0
BEHIND = 1.0  # seconds
CONTENDERS = ["mqtt2mongo-1", "mqtt2mongo-interval-0", "node-durable", "python", "python-batched", "telegraf"]


class Rate(NamedTuple):
    """`per_second` messages; how many seconds each of the two parts lasts, one message in how many is watched, most rounds."""

    per_second: int
    cost: float
    latency: float
    every: int
    rounds: int = 5

    @property
    def case(self):
        return f"{self.per_second:,} msg/s"


RATES = [Rate(10, 10, 12, 1, rounds=2), Rate(200, 4, 4, 1), Rate(2_000, 4, 4, 4), Rate(10_000, 3, 3, 8)]
QUICK_RATES = [Rate(200, 2, 2, 1, rounds=1), Rate(2_000, 2, 2, 4, rounds=1)]


class TooSlow(Exception):
    """A contender that does not keep up with the rate."""


class Schedule:
    """The publisher's: when each message is due."""

    def __init__(self, publisher, rate):
        wait_until(lambda: publisher.check_alive() or "\n" in publisher.stdout.read_text(), 10, "the publisher has begun")
        self.rate, self.t0 = rate, json.loads(publisher.stdout.read_text().splitlines()[0])["t0"]

    def due(self):
        """How many messages are due by now: the number of the next one."""
        return max(0, int((time.monotonic_ns() - self.t0) / 1e9 * self.rate.per_second) + 1)

    def sleep_until(self, seconds):
        """Until so long after the first message was due."""
        time.sleep(max(0.0, self.t0 / 1e9 + seconds - time.monotonic()))

    def must_keep_up(self, bench, contender):
        behind = (self.due() - bench.stored()) / self.rate.per_second
        if behind > BEHIND + contender.gathers:
            raise TooSlow(f"{behind:.1f} s behind after {(time.monotonic_ns() - self.t0) / 1e9:.0f} s")


class Seen:
    """What was counted at a moment. `run`: the contender, or None. The questions to mongod are not in what it is charged for."""

    def __init__(self, bench, run, *, first):
        if first:
            self._ask(bench)
        self.time, self.contender = time.monotonic(), run.cpu() if run else 0
        self.broker, self.mongod = bench.server_cpu()
        if not first:
            self._ask(bench)

    def _ask(self, bench):
        self.stored = bench.stored()
        self.inserts, self.flushes = bench.done_by_mongod()


def spent(bench, run, seconds):
    """What is spent in so many seconds: {what: how much}, of messages what one of them costs."""
    before = Seen(bench, run, first=True)
    time.sleep(seconds)
    after = Seen(bench, run, first=False)
    messages = after.stored - before.stored
    if not messages:
        raise Failed(f"nothing was stored in {seconds} s")
    return {
        **{f"{who}_cpu_us": (getattr(after, who) - getattr(before, who)) / messages * 1e6
           for who in ("contender", "mongod", "broker")},
        "flushes_per_s": (after.flushes - before.flushes) / (after.time - before.time),
        "messages_per_insert": messages / max(1, after.inserts - before.inserts)}


def idle(bench):
    """What the servers use by themselves: ms of CPU a second, flushes a second."""
    bench.clear()
    before = Seen(bench, None, first=True)
    time.sleep(IDLE)
    after = Seen(bench, None, first=False)
    seconds = after.time - before.time
    return {"idle_mongod_cpu_ms_per_s": round((after.mongod - before.mongod) / seconds * 1000, 2),
            "idle_broker_cpu_ms_per_s": round((after.broker - before.broker) / seconds * 1000, 2),
            "idle_flushes_per_s": round((after.flushes - before.flushes) / seconds, 1)}


@contextmanager
def under_load(bench, contender, rate):
    """The contender and the publisher, which has begun: (run, publisher, Schedule)."""
    bench.clear()
    contender.prepare(bench)
    argv = [LOAD, "-p", bench.broker.port, "-r", rate.per_second, "-d", START_MS]
    with bench.connected(contender) as run, Run("load", bench.scratch / "runs", argv) as publisher:
        yield run, publisher, Schedule(publisher, rate)


def measure(bench, contender, rate):
    """One contender's turn at one rate: ({what: value}, its Run). TooSlow if it does not keep up."""
    with under_load(bench, contender, rate) as (run, publisher, schedule):
        schedule.sleep_until(WARM_UP)
        found = spent(bench, run, rate.cost)
        schedule.must_keep_up(bench, contender)
        with Watcher(bench, contender.sequence, rate.every) as watcher:
            time.sleep(SETTLE)
            first = schedule.due()
            time.sleep(rate.latency)
            schedule.must_keep_up(bench, contender)
            publisher.finish()
            sent = publisher_sent(publisher)
            bench.wait_stored(run, sent, limit=60)
            run.finish()
            watcher.finish()
    contender.check(bench, sent)
    seen = watcher.seen()
    missing = set(range(-(-first // rate.every) * rate.every, sent, rate.every)) - set(seen)
    if missing:
        raise Failed(f"the watcher has not seen {len(missing)} messages of {contender.name}, as number {min(missing)}")
    histogram = new_histogram(latencies(seen, rate.per_second, schedule.t0, first))
    shares = {"p50_ms": 50, "p99_ms": 99, "p999_ms": 99.9}
    return found | {name: at_percentile(histogram, share) for name, share in shares.items()}, run


def take(bench, rows, contender, rate):
    with rows.attempt(bench, contender, rate.case):
        try:
            found, run = measure(bench, contender, rate)
        except TooSlow as why:
            say(f"  {rate.case:>12} {contender.name:21} is left out: {why}")
            rows.leave_out(contender, rate.case, str(why))
            return
        own = found.pop("contender_cpu_us")
        total = own + found["mongod_cpu_us"]
        rows.add(contender, rate.case, total, x=rate.per_second, cpu_us=own, peak_mib=run.peak / 1024,
                 extra={**found, **contender.sums(run)})
        say("  {:>12} {:21} {:8.1f} µs CPU/msg: {:7.1f}, mongod {mongod_cpu_us:7.1f} (broker {broker_cpu_us:6.1f})  "
            "{flushes_per_s:6.1f} flushes/s  {messages_per_insert:6.1f} msg/insert  p50 {p50_ms:7.2f}  p99 {p99_ms:7.2f}  "
            "p99.9 {p999_ms:7.2f} ms".format(rate.case, contender.name, total, own, **found))


def leave_out_slow(bench, rows, contenders, rates):
    """Those that this run has seen to be too slow."""
    for contender in contenders:
        known = known_rate(bench, LIVE_AS.get(contender.name, contender.name))
        for rate in rates:
            if known and rate.per_second > 0.9 * known:
                rows.leave_out(contender, rate.case, f"its live rate is {known:,.0f}")


def rates(bench):
    chosen_rates = QUICK_RATES if bench.quick else RATES
    contenders, missing = chosen(*(CONTENDERS[:3] if bench.quick else CONTENDERS))
    rows = Rows("rates", "What a message costs and how long it takes, by rate", "µs CPU/msg", "lower", payload_bytes=110,
                topics=100, receive_maximum=4096, median_of="CPU time of contender and mongod", warm_up_seconds=WARM_UP, **idle(bench))
    rows.work["base"] = "mqtt2mongo-interval-0"
    for name, why in missing.items():
        rows.leave_out(name, "all", why)
    leave_out_slow(bench, rows, contenders, chosen_rates)
    for turn in range(bench.rounds):
        for rate in chosen_rates:
            if turn < rate.rounds:
                for contender in bench.rotated([one for one in contenders if not rows.is_out(one, rate.case)], turn):
                    take(bench, rows, contender, rate)
    return rows.work
