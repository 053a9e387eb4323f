"""Few file descriptors.

Fault: RLIMIT_NOFILE is 32, under load, while the broker and MongoDB come and go and 40 connections hold on to the HTTP port; and it is
less, down to what does not suffice for anything.
Proof: the limit in /proc; the service has used as many as it may, or says that it may not have more.
Held: with 32 it runs, and the oracle. With less it runs or says what it lacks; it neither hangs without a word nor crashes. Without
the limit, after as many reconnects, it has no more descriptors open than before. Figure: messages, faults, the most descriptors, lost (0).
"""

import contextlib
import os
import resource
import socket
import time

import pytest

from oracle import SUBSCRIBED, pause, scaled
from processes import accepts, free_port, wait_until

LIMIT = 32
OPEN_TO_LOOK = {"core_dumps": "true"}  # else only root sees its descriptors in /proc


def descriptors(process):
    return len(os.listdir(f"/proc/{process.pid}/fd"))


def break_everything(it, stream, times):
    """The broker is restarted and MongoDB killed so many times. The most descriptors that were seen."""
    most = 0
    for _ in range(times):
        stream.wait(len(stream.acknowledged) + 500)
        mark, lost = it.running.mark(), stream.lost
        it.broker.stop()
        wait_until(lambda lost=lost: stream.lost > lost, what="the publisher notices")
        it.broker.start()
        it.running.wait_log(SUBSCRIBED, timeout=30, after=mark)
        most = max(most, descriptors(it.running))
        it.server.kill9()
        it.wait_spooled(300)
        most = max(most, descriptors(it.running))
        it.server.restart()
        it.wait_drained()
        most = max(most, descriptors(it.running))
    return most


@pytest.mark.timeout(scaled(150, 600))
def test_32_descriptors(scene):
    port = free_port()
    it = scene(start=False, **{"http.listen": f"127.0.0.1:{port}"}, **OPEN_TO_LOOK)
    it.running.limits = {resource.RLIMIT_NOFILE: LIMIT}
    it.start()
    assert resource.prlimit(it.running.pid, resource.RLIMIT_NOFILE)[0] == LIMIT
    pid, most = it.running.pid, 0
    with it.stream(pace=1000) as stream:
        stream.wait(500)
        with contextlib.ExitStack() as clients:
            for _ in range(40):
                clients.enter_context(socket.create_connection(("127.0.0.1", port)))
                most = max(most, descriptors(it.running))
            pause(1)
            most = max(most, descriptors(it.running))
            busy = sum(map(int, open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[11:13]))
            begun = time.monotonic()
            most = max(most, break_everything(it, stream, scaled(1, 10)))
            busy = sum(map(int, open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[11:13])) - busy
            share = busy / os.sysconf("SC_CLK_TCK") / (time.monotonic() - begun)
        acknowledged = stream.finish()
    assert it.running.pid == pid and it.running.alive
    assert accepts(port)
    it.conclude("few_descriptors, 32", acknowledged, faults=2 * scaled(1, 10) + 1, most=most, cpu=f"{share:.0%}")
    assert most >= LIMIT - 6, "it was never near its limit"
    assert share < 0.8, "it is busy with what it cannot have"


def started_with(it, limit):
    """A start with that limit: the exit status (None: it goes on), and what it said."""
    mark = it.running.mark()
    it.running.limits = {resource.RLIMIT_NOFILE: limit}
    it.running.start()
    wait_until(lambda: not it.running.alive or SUBSCRIBED in it.running.log[mark:] or "oo many open files" in it.running.log[mark:], 20,
               it.running.tail)
    if it.running.alive:
        pause(0.3)
    status, said = it.running.popen.poll(), it.running.log[mark:]
    it.running.kill9()
    return status, said


@pytest.mark.timeout(scaled(120, 200))
def test_fewer(scene):
    """A word about it, and an orderly end, or another attempt, or it works."""
    it = scene()
    it.running.kill9()
    it.publish(1000)
    figures = {}
    for limit in (9, 10, 12, 14, 16, 18, 20, 22, 24):
        status, said = started_with(it, limit)
        assert status in (None, 1), f"{limit}: {status}\n{said}"
        assert SUBSCRIBED in said or "oo many open files" in said, f"{limit}: {status}\n{said}"
        figures[limit] = "ends" if status else "works" if SUBSCRIBED in said else "waits"
    it.running.limits = {}
    it.start()
    it.conclude("few_descriptors, fewer", faults=len(figures), at=figures)


@pytest.mark.parametrize("limit", [4, 6, 8])
def test_fewer_than_a_loop_needs(scene, limit):
    it = scene(start=False)
    status, said = started_with(it, limit)
    assert status == 1 and "oo many open files" in said, f"{status}\n{said}"


@pytest.mark.timeout(scaled(120, 600))
def test_none_is_left_open(scene):
    it = scene(**OPEN_TO_LOOK)
    with it.stream(pace=1000) as stream:
        break_everything(it, stream, 1)
        before = descriptors(it.running)
        times = scaled(2, 15)
        break_everything(it, stream, times)
        pause(1)
        after = descriptors(it.running)
        acknowledged = stream.finish()
    it.conclude("few_descriptors, none left open", acknowledged, faults=2 * times + 2, before=before, after=after)
    assert after <= before + 2
