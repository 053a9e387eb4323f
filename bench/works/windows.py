"""What does it cost to wait for more messages where the broker's window is small?

A broker that speaks MQTT 3.1.1 with the service says nothing of its window, the messages that it sends before the first is
acknowledged: mosquitto's max_inflight_messages, 20 unless it is configured. When that many are held nothing more comes, however long
the service waits. So it must not wait for more: it drains a backlog with its defaults, and with consumer.batch.interval 0s, in turns,
from brokers with such windows; and with one of 20 from a broker that is a few milliseconds away, behind a proxy.

It takes a mosquitto from 2.0.12 on: older ones send as many messages as the window has with each acknowledgement that they get.
"""

import copy
import socket
from contextlib import contextmanager, suppress
from typing import NamedTuple

from contenders import Service
from harness import Failed, Rows, say
from peers import Recorder
from servers import Mosquitto, shared_broker

ROUND_TRIP = 0.004


class Case(NamedTuple):
    """A backlog of `count` messages; `delay`: seconds that what the broker says is on its way."""

    window: int
    count: int
    delay: float = 0.0

    def __str__(self):
        return f"window {self.window}" + (f", {self.delay * 1000:g} ms away" if self.delay else "")


CASES = [Case(1, 1_000), Case(10, 8_000), Case(20, 12_000), Case(32, 20_000), Case(20, 6_000, ROUND_TRIP)]
QUICK_CASES = [Case(20, 6_000)]


def made(port):
    """mqtt2mongo-1 at that port, as it is and without an interval."""
    settings, notes = {"mqtt.protocol": "3.1.1", "mqtt.port": port}, "MQTT 3.1.1, which does not tell the broker's window"
    return [Service(1, settings=settings, notes=notes),
            Service(1, name="mqtt2mongo-interval-0", settings=settings | {"consumer.batch.interval": "0s"},
                    notes=f"{notes}; consumer.batch.interval 0s")]


@contextmanager
def brokers(bench, program):
    """A function that gives the Bench with the broker of a window, which runs for as long as this does."""
    running = {}

    def of(window):
        if window not in running:
            directory = bench.scratch / f"mosquitto-with-{window}"
            directory.mkdir()
            elsewhere = copy.copy(bench)
            elsewhere.broker = Mosquitto(directory, program=program, extra=[
                "autosave_interval 3600", f"max_inflight_messages {window}"])
            running[window] = elsewhere
            elsewhere.broker.start()
        return running[window]

    try:
        yield of
    finally:
        for elsewhere in running.values():
            elsewhere.broker.end()


class Far(Recorder):
    """Delays, and nothing else: the kernel at this end acknowledges at once what a broker with Nagle's algorithm waits for, as it would
    do at the service's."""

    def _read(self, proxy, flow):
        super()._read(proxy, flow)
        with suppress(OSError):
            flow.source.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


@contextmanager
def reached(bench, delay):
    """The port at which its broker is reached, so far away."""
    if not delay:
        yield bench.broker.port
        return
    recorder = Far()
    port = recorder.add("mqtt", bench.broker.port, delay=delay).port
    with recorder:
        yield port


def drain(bench, contender, case):
    """A Turn. No insert can have more messages than the window: were it more on average, the broker would not have kept to it."""
    before, _ = bench.done_by_mongod()
    turn = bench.drain(contender, case.count)
    each = turn.extra["messages_per_insert"] = case.count / max(1, bench.done_by_mongod()[0] - before)
    if each > case.window:
        raise Failed(f"{each:.1f} messages an insert: the broker does not keep to its window of {case.window}")
    return turn


def one_round(bench, rows, case, turn):
    with reached(bench, case.delay) as port:
        contenders = [one for one in made(port) if not rows.is_out(one, case)]
        try:
            bench.fill(contenders, case.count)
            for contender in bench.rotated(contenders, turn):
                with rows.attempt(bench, contender, case):
                    took = drain(bench, contender, case)
                    rows.add_turn(contender, case, took, x=case.window)
                    say(f"  {case!s:>24} {contender.name:21} {took}  {took.extra['messages_per_insert']:5.1f} msg/insert")
        finally:
            bench.forget(contenders)


def windows(bench):
    cases = QUICK_CASES if bench.quick else CASES
    rows = Rows("windows", "A backlog is drained through a small window", "msg/s", "higher", payload_bytes=110, topics=100,
                messages={str(case): case.count for case in cases})
    rows.work["base"] = "mqtt2mongo-interval-0"
    program = shared_broker()
    if program is None:
        rows.leave_out("mqtt2mongo-1", "all", "no mosquitto from 2.0.12 on here, which keeps to its window")
        return rows.work
    with brokers(bench, program) as of:
        for turn in range(bench.rounds):
            for case in cases:
                one_round(of(case.window), rows, case, turn)
    return rows.work
