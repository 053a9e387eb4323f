"""A bad network between the service and both its servers.

Fault: 100 ms each way and 5 % of all packets lost, on the way to the broker and on the way to MongoDB; or connections that are
reset when half of an answer has come: of MongoDB's answer to an insert, of a message from the broker.
Proof: the link counts what came late by a loss, and what it cut; the service says that it lost its connection to the broker.
Held: the oracle. Figure: messages, pieces late, connections cut, lost (0), duplicates.
"""

import contextlib

import pytest

from faults import Link
from oracle import pause, scaled
from processes import wait_until


@contextlib.contextmanager
def linked(it, **options):
    """The service, started behind two links: to the broker and to MongoDB."""
    with Link(it.broker.port, **options) as mqtt, Link(it.server.port, **options) as mongodb:
        uri = it.server.uri.replace(f":{it.server.port}/?replicaSet=rs0", f":{mongodb.port}/?directConnection=true")
        assert uri != it.server.uri
        it.running.settings |= {"mqtt.port": mqtt.port, "mongodb.uri": uri}
        it.start()
        yield mqtt, mongodb


@pytest.mark.timeout(scaled(120, 400))
def test_latency_and_loss(scene):
    it = scene(start=False)
    with linked(it, latency=0.1, loss=0.05) as links:
        with it.stream(pace=500) as stream:
            stream.wait(scaled(5000, 60_000), timeout=300)
            acknowledged = stream.finish()
        sums = it.running.sums()["consumer"]
        it.conclude("network, latency and loss", acknowledged, faults=sum(link.late for link in links),
                    rate=f"{stream.rate:.0f}/s", pieces=sum(link.pieces for link in links), spooled=sums["spooled"])
        assert all(link.late > 5 for link in links)


@pytest.mark.timeout(scaled(120, 400))
def test_connections_cut_in_the_middle_of_an_answer(scene):
    cuts = scaled(6, 50)
    it = scene(start=False)
    with linked(it) as (mqtt, mongodb):
        with it.stream(pace=1000) as stream:
            stream.wait(500)
            for number in range(cuts):
                # An answer to an insert has about 200 bytes with its cluster time; a message of ours about 100.
                link, least = (mqtt, 60) if number % 2 else (mongodb, 150)
                mark = it.running.mark()
                link.cut_in_answer(least)
                wait_until(lambda link=link: not link.cutting, 10, "the connection is cut")
                if link is mqtt:
                    it.running.wait_log("connection lost|hung up", after=mark)
                pause(0.5)
            acknowledged = stream.finish()
        assert mqtt.cuts == mongodb.cuts == cuts // 2
        it.conclude("network, cut in an answer", acknowledged, faults=cuts, rate=f"{stream.rate:.0f}/s")
