"""The spool is full: nothing is acknowledged beyond what fits.

Fault: MongoDB is down and the spool cannot grow: the file system it is on has 16 MiB, or spool.max_size is 8 MiB. More messages
of 1 KiB come than that. SIGKILL of the service then takes with it whatever it had in memory only.
Proof: the service says that the spool is full; the file system has no room left, or the spool's files are near spool.max_size;
there are far fewer messages in the spool than were published.
Held: it never takes more disk than it may; after the restart, and again full, it resumes by itself when MongoDB is back; the
oracle: what did not fit had stayed at the broker. Figure: messages, what fitted, lost (0), duplicates.
"""

import os

import pytest

from oracle import scaled
from processes import wait_until
from stream import payload_of

COUNT = scaled(20_000, 60_000)


def padded(number):
    """1 KiB; what is behind the JSON changes nothing about it."""
    return payload_of(number).ljust(1024)


def size(directory):
    return sum(entry.stat().st_size for entry in directory.iterdir())


def fill(it, directory, most, kill=True):
    """Publish until it is full, kill it, and let it become full again. What was in the spool when it was."""
    it.payload_of = padded
    it.server.kill9()
    it.publish(COUNT, timeout=120)
    it.running.wait_log(r"spool.* full", timeout=60)
    sums = it.running.sums()["consumer"]
    held = it.spool()
    assert 0 < held < COUNT and sums["spooled"] == held
    assert size(directory) <= most
    if not kill:
        return held
    it.running.kill9()
    assert it.spool() == held, "the kill changed what was committed"
    mark = it.running.mark()
    it.running.start()  # the subscription waits behind messages for which there is no room
    it.running.wait_log(r"spool.* full", timeout=60, after=mark)
    assert size(directory) <= most
    return held


def resume(it, name, held, **further):
    pid = it.running.pid
    it.server.restart()
    wait_until(lambda: it.database.messages.estimated_document_count() > held, 90, it.state, interval=0.2)
    assert it.running.pid == pid and it.running.alive
    it.conclude(f"spool_full, {name}", faults=1, fitted=held, **further)


@pytest.mark.timeout(scaled(180, 400))
@pytest.mark.parametrize("kill", [False, True], ids=["goes on", "killed"])
def test_a_full_disk(scene, tmpfs, kill):
    disk = tmpfs(16)
    it = scene(**{"spool.path": disk / "spool.db", "spool.max_size": "1GiB"})
    held = fill(it, disk, 16 << 20, kill)
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    assert free < 4 << 20, "the disk is not full, but for what the spool keeps to be able to empty itself"
    resume(it, "disk of 16 MiB", held, killed=kill, free_bytes=free)


@pytest.mark.timeout(scaled(180, 400))
def test_a_full_spool(scene, tmp_path):
    directory, most = tmp_path / "spool", 8 << 20
    directory.mkdir()
    it = scene(**{"spool.path": directory / "spool.db", "spool.max_size": "8MiB"})
    held = fill(it, directory, most)
    taken = size(directory)
    assert taken > most // 2, "the spool was not full"
    resume(it, "spool.max_size 8 MiB", held, bytes_taken=taken)
