"""SIGKILL of the service, again and again, whatever MongoDB does meanwhile.

Fault: SIGKILL at random moments, restarted at once, under a steady stream: a third each while MongoDB is there, while it is
down, and while the spool is drained after that, with inserts made slow so that a drain takes its time. The control is a build
that acknowledges before anything is durable.
Proof: the process's exit by signal 9 each time; the spool holds messages just after the kills in an outage and in a drain.
Held: the oracle, and for the control, that the oracle finds what is lost. Figure: messages, kills, lost (0), duplicates.
"""

import signal

import pytest

from oracle import pause, scaled
from service import BUILD, GATE_OPEN_BUILD
from stream import seeded


@pytest.mark.timeout(scaled(180, 1200))
def test_kill9_of_the_service(scene):
    moments, rounds = seeded(), scaled(5, 34)
    it = scene()
    kills = dict.fromkeys(("present", "outage", "drain"), 0)
    with_spool = dict(kills)

    def kill(phase):
        pause(moments.uniform(0.02, 0.6))
        it.running.kill9()
        assert it.running.popen.returncode == -signal.SIGKILL
        kills[phase] += 1
        with_spool[phase] += it.spool() > 0
        it.running.start()

    with it.stream(pace=1500) as stream:
        for _ in range(rounds):
            for _ in range(2):
                kill("present")
            it.server.kill9()
            it.wait_spooled(500)
            for _ in range(2):
                kill("outage")
            it.server.restart()
            it.server.fail("alwaysOn", ["insert"], blockConnection=True, blockTimeMS=100, appName="mqtt2mongo")
            for _ in range(2):
                kill("drain")
            it.server.fail("off", [])
        acknowledged = stream.finish()
    assert stream.lost == 0
    it.conclude("kill9_service", acknowledged, faults=sum(kills.values()), rate=f"{stream.rate:.0f}/s", kills=kills,
                spool_held_messages_at=with_spool)
    assert with_spool["outage"] >= rounds and with_spool["drain"] >= rounds // 2, "the kills did not hit what they should"


@pytest.mark.timeout(90)
def test_the_oracle_finds_what_is_lost(scene):
    """The control."""
    assert GATE_OPEN_BUILD != BUILD
    it = scene(build=GATE_OPEN_BUILD, **{"spool.max_size": 0})
    it.server.kill9()
    it.publish(500)
    it.running.kill9()
    it.server.restart()
    it.start()
    with pytest.raises(AssertionError, match="are nowhere, such as"):
        it.conclude("control", faults=1)
