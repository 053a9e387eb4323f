"""SIGKILL of mongod during inserts.

Fault: SIGKILL of mongod at random moments mid-stream, restarted on its data.
Proof: mongod's own word at each restart that it was not shut down cleanly; the service complains and says later that MongoDB
answers again, each time.
Held: the oracle; the service is the same process all along. Figure: messages, kills, lost (0), duplicates, spooled.
"""

import pytest

from oracle import scaled
from stream import seeded


@pytest.mark.timeout(scaled(120, 600))
def test_kill9_of_mongod(scene):
    moments, kills = seeded(), scaled(4, 25)
    it = scene()
    pid = it.running.pid
    with it.stream(pace=2000) as stream:
        for _ in range(kills):
            stream.wait(len(stream.acknowledged) + moments.randrange(200, 3000))
            mark = it.running.mark()
            it.server.kill9()
            it.running.wait_log(r"MongoDB.*(is mongod running|[Ff]ailed|refused|hung up|error)", timeout=20, after=mark)
            it.server.restart()
            it.running.wait_log("MongoDB answers again", timeout=60, after=mark)
        acknowledged = stream.finish()
    assert it.running.pid == pid and it.running.alive and stream.lost == 0
    unclean = it.server.log.count("Detected unclean shutdown")
    sums = it.running.sums()["consumer"]
    it.conclude("kill9_mongod", acknowledged, faults=kills, unclean=unclean, spooled=sums["spooled"], returned=sums["returned"])
    assert unclean == kills
