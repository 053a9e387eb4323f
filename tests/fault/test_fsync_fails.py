"""fsync does not work: what was written before it is not durable, whatever the file seems to hold.

Fault: MongoDB is down, and fsync and fdatasync of the spool's files fail with EIO (preloaded library, fsync.c). SIGKILL of the
service then; and as a power cut would, the spool's files go back to what they were when fsync last worked.
Proof: the library counts the failures; the files have been put back.
Held: nothing that came while fsync failed was acknowledged: the broker delivers it again; and when fsync works again, the
service resumes by itself. The oracle. Figure: messages, failed calls, lost (0), duplicates.
"""

import shutil

import pytest

from oracle import Kept, pause, scaled
from processes import wait_until


def while_fsync_fails(it, fault, count):
    """Publish so many messages while fsync fails, and wait until it has failed."""
    fault.on()
    before, kept = fault.failures(), it.running.sums()["consumer"]["spooled"]
    it.publish(count)
    wait_until(lambda: fault.failures() > before, 30, lambda: f"a failing fsync: {it.state()}")
    pause(1)  # for as long, anything may be acknowledged that should not
    assert it.running.alive
    assert it.running.sums()["consumer"]["spooled"] == kept, "counted as spooled without an fsync"


@pytest.mark.timeout(scaled(180, 600))
def test_fsync_fails_and_power_is_cut(scene, fsync_fault, tmp_path):
    times = scaled(3, 20)
    directory = tmp_path / "spool"
    directory.mkdir()
    it = scene(env=fsync_fault.environment, **{"spool.path": directory / "spool.db"})
    it.server.kill9()
    for _ in range(times):
        it.publish(500)
        it.wait_settled()
        durable = tmp_path / "durable"
        shutil.rmtree(durable, ignore_errors=True)
        shutil.copytree(directory, durable)
        while_fsync_fails(it, fsync_fault, 500)
        it.running.kill9()
        shutil.rmtree(directory)
        shutil.copytree(durable, directory)
        fsync_fault.off()
        it.start()
    it.wait_spooled(times * 1000)
    it.server.restart()
    it.conclude("fsync_fails, power cut", faults=times, failed_calls=fsync_fault.failures())


@pytest.mark.timeout(scaled(120, 300))
def test_fsync_works_again(scene, fsync_fault):
    it = scene(env=fsync_fault.environment)
    pid = it.running.pid
    it.server.kill9()
    it.publish(500)
    it.wait_settled()
    while_fsync_fails(it, fsync_fault, 1000)
    mark = it.running.mark()
    pause(scaled(3, 30))
    fsync_fault.off()
    it.wait_spooled(1500)
    assert it.running.pid == pid and it.running.alive
    it.server.restart()
    it.conclude("fsync_fails, works again", faults=1, failed_calls=fsync_fault.failures(),
                lines=it.running.log[mark:].count('"level":"error"'))


@pytest.mark.timeout(scaled(120, 300))
def test_fsync_fails_with_mongodb_there(scene, fsync_fault):
    """The spool's fault is no reason not to store: what has not gone to the spool goes to MongoDB when it is there again."""
    it = scene(env=fsync_fault.environment)
    fsync_fault.on()
    with it.stream(pace=1000) as stream:
        stream.wait(3000)
        it.server.sigstop()
        wait_until(lambda: fsync_fault.failures() > 0, 30, it.state)
        it.server.sigcont()
        stream.wait(len(stream.acknowledged) + 3000)
        acknowledged = stream.finish()
    it.wait_settled()
    stored = Kept(it)
    assert not acknowledged - stored.copies.keys()
    fsync_fault.off()
    it.conclude("fsync_fails, MongoDB there", acknowledged, faults=1, failed_calls=fsync_fault.failures())


@pytest.mark.timeout(scaled(120, 300))
def test_fsync_works_again_while_an_attempt_hangs(scene, fsync_fault):
    """What the spool refused is offered to it again as soon as it takes messages, not when the attempt that hangs has ended."""
    it = scene(env=fsync_fault.environment)
    it.publish(10)
    it.wait_settled()
    fsync_fault.on()
    it.server.sigstop()
    it.publish(100)
    wait_until(lambda: fsync_fault.failures() > 0, 30, lambda: f"a failing fsync: {it.state()}")
    pause(1)
    assert it.running.sums()["consumer"]["spooled"] == 0
    fsync_fault.off()
    # The attempt ends by the driver's time-out, after 20 s.
    wait_until(lambda: it.running.sums()["consumer"]["spooled"] == 100, 10, it.state)
    it.server.sigcont()
    it.conclude("fsync_fails, an attempt hangs", faults=1, failed_calls=fsync_fault.failures())
