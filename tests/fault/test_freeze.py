"""Each of the three is frozen (SIGSTOP): its connections stay open and say nothing.

Fault: mongod, the broker or the service is stopped for longer than the others have patience with it: mongod for 10 s (long: 60 s)
under 2,000 messages a second and with the broker's default queue of 1,000; the broker and the service for more than 1.5 times
the keepalive of 5 s.
Proof: the kernel's word that the process is stopped; mongod: the service complains, and the broker takes more meanwhile than its
queue holds; the broker: the service finds the connection lost; the service: the broker says that its client has exceeded its
time.
Held: the oracle; mongod: the broker drops nothing. Figure: messages, lost (0), duplicates, dropped (0).
"""

import time

import pytest

from oracle import SUBSCRIBED, pause, scaled
from stream import CLIENT

KEEPALIVE = {"mqtt.keepalive": "5s"}


@pytest.mark.timeout(scaled(120, 300))
def test_mongod_is_frozen(scene):
    frozen = scaled(10, 60)
    it = scene(default_queue=True)
    with it.stream(pace=2000, window=200) as stream:
        stream.wait(2000)
        before, mark = len(stream.acknowledged), it.running.mark()
        it.server.sigstop()
        pause(frozen)
        meanwhile, most = len(stream.acknowledged) - before, it.spool()
        said = it.running.log[mark:]
        it.server.sigcont()
        stream.wait(len(stream.acknowledged) + 2000)
        acknowledged = stream.finish()
    assert stream.lost == 0
    it.conclude("freeze of mongod", acknowledged, faults=1, rate=f"{stream.rate:.0f}/s", frozen=f"{frozen} s",
                taken_meanwhile=meanwhile, most_in_spool=most)
    assert "MongoDB" in said and meanwhile > 10_000 and most > 10_000


@pytest.mark.timeout(scaled(120, 300))
def test_the_broker_is_frozen(scene):
    times = scaled(1, 5)
    it = scene(**KEEPALIVE)
    with it.stream(pace=1000) as stream:
        for _ in range(times):
            stream.wait(len(stream.acknowledged) + 1000)
            mark = it.running.mark()
            it.broker.sigstop()
            it.running.wait_log("connection lost|PINGRESP|hung up", timeout=20, after=mark)
            pause(2)
            it.broker.sigcont()
            it.running.wait_log(SUBSCRIBED, timeout=30, after=mark)
        stream.wait(len(stream.acknowledged) + 1000)
        acknowledged = stream.finish()
    it.conclude("freeze of the broker", acknowledged, faults=times, publisher_lost=stream.lost)


@pytest.mark.timeout(scaled(120, 300))
def test_the_service_is_frozen(scene):
    times, frozen = scaled(1, 5), 9
    it = scene(**KEEPALIVE)
    with it.stream(pace=1000) as stream:
        for _ in range(times):
            stream.wait(len(stream.acknowledged) + 1000)
            mark = it.running.mark()
            it.running.sigstop()
            begun = time.monotonic()
            it.broker.wait_log(f"Client {CLIENT}-1 .*(exceeded timeout|disconnected)", timeout=20, after=it.broker.mark())
            pause(max(0, frozen - (time.monotonic() - begun)))
            it.running.sigcont()
            it.running.wait_log(SUBSCRIBED, timeout=30, after=mark)
        acknowledged = stream.finish()
    assert stream.lost == 0
    expired = it.broker.log.count("exceeded timeout")
    it.conclude("freeze of the service", acknowledged, faults=times, frozen=f"{frozen} s", exceeded_timeout=expired)
    assert expired >= times
