"""Does `--role publisher` keep the rate it is asked for, and what does a message cost it?

Counted by somebody else: bench/bare subscribes and keeps a counter, which is looked at one second after the publisher has begun and
again after the window. publisher.rate ends at 20,000/s, so there is no "as fast as it goes" of the service: its CPU time is compared
with that of bench/publish, libmosquitto alone, at the same rate; bench/publish is then let loose, to show how far the limit is from
what the library can do.
"""

import json
import time

from contenders import ALL, Contender
from harness import BUILD, Counter, Failed, Rows, say
from processes import wait_until

RATES = (10, 1_000, 20_000)
LIMIT = RATES[-1]
WINDOW_SECONDS, SETTLE = 10, 1
ROUNDS = 2


class Publisher(Contender):
    """mqtt2mongo --role publisher."""

    def __init__(self, rate):
        super().__init__("mqtt2mongo publisher")
        self.rate = rate

    def sessions(self):
        return []

    def argv(self, bench, count=None, counter=None):
        return [BUILD / "src" / "mqtt2mongo", "--role", "publisher", "--mqtt-host", "127.0.0.1", "--mqtt-port", bench.broker.port,
                "--publisher-rate", f"{self.rate}/s", "--publisher-topic", "bench/{device}/readings", "--log-format", "json",
                "--state-dir", bench.scratch / "runs" / self.name / "state"]

    def sums(self, run):
        """What it says itself, at its end."""
        lines = [json.loads(line) for line in run.stdout.read_text().splitlines() if line.startswith('{"sums"')]
        if not lines:
            raise Failed(f"{self.name}: no sums\n{run.tail(10)}")
        return lines[-1]["sums"]["publisher"]


class BarePublisher(Contender):
    """libmosquitto alone, at a rate; 0: as fast as it goes."""

    def __init__(self, rate):
        super().__init__("bare")
        self.rate = rate

    def sessions(self):
        return []

    def argv(self, bench, count=None, counter=None):
        return [BUILD / "bench" / "publish", bench.broker.port, "bench/bare/readings", self.rate]


class Window:
    """What came in a window of time, and what the publisher spent in it."""

    def __init__(self, bench, publisher, counter):
        self.skipped = None
        counter.value = 0
        with bench.start(publisher) as run:
            wait_until(lambda: counter.value or not run.alive, 10, "the first message has come", interval=0.001)
            time.sleep(SETTLE)
            begun, came, spent = time.monotonic(), counter.value, run.cpu()
            time.sleep(WINDOW_SECONDS)
            run.check_alive()
            self.seconds, self.count, self.cpu = time.monotonic() - begun, counter.value - came, run.cpu() - spent
            run.finish()
            self.peak_mib = run.peak / 1024
            if isinstance(publisher, Publisher):
                self.skipped = publisher.sums(run)["skipped"]

    @property
    def rate(self):
        return self.count / self.seconds

    @property
    def cpu_us(self):
        """None where it is so little that what it does beside the messages shows."""
        return self.cpu / self.count * 1e6 if self.cpu > 0.5 else None


def publisher(bench):
    rows = Rows("publisher", "The publisher keeps its rate", "achieved/asked", "higher", qos=1, window_seconds=WINDOW_SECONDS,
                begins_after_seconds=SETTLE)
    subscriber, counter = ALL["bare"], Counter(bench.scratch / "published")
    bench.clear()
    subscriber.prepare(bench)
    try:
        with bench.start(subscriber, counter=counter):
            for _ in range(min(bench.rounds, ROUNDS)):
                one_round(bench, rows, counter)
    finally:
        subscriber.forget(bench)
    return rows.work


def one_round(bench, rows, counter):
    for made in [*(Publisher(rate) for rate in RATES), BarePublisher(LIMIT)]:
        case = f"{made.rate:,}/s"
        with rows.attempt(bench, made, case):
            window = Window(bench, made, counter)
            note(rows, made, case, window, window.rate / made.rate, "")
    loose = BarePublisher(0)
    with rows.attempt(bench, loose, "flat out"):
        window = Window(bench, loose, counter)
        note(rows, loose, "flat out", window, window.rate, "msg/s",
             notes=f"mqtt2mongo's publisher.rate ends at {LIMIT:,}/s: compare CPU µs/msg with its own there")


def note(rows, made, case, window, value, unit, notes=""):
    skipped = "" if window.skipped is None else f"{window.skipped:,} skipped"
    rows.add(made, case, value, cpu_us=window.cpu_us, peak_mib=window.peak_mib, unit=unit or None, notes=notes or skipped,
             extra={} if window.skipped is None else {"skipped": window.skipped})
    cpu = f"{window.cpu_us:.2f} µs CPU/msg" if window.cpu_us else ""
    say(f"  {case:>10} {made.name:20} {value:12,.4f} {unit:15} {cpu}  peak {window.peak_mib:.1f} MiB  {skipped}")
