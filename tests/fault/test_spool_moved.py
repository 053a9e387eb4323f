"""The spool's files are deleted, moved or replaced under the running service.

Fault: MongoDB is down; between two lots of 50 messages somebody removes the spool's files, renames the file, puts another in its
place, removes its write-ahead log or its index, or renames the directory. SIGKILL of the service after the second lot: what
it had only in files that nobody finds any more is gone then.
Proof: the file has another inode number than before, for the service had to make it anew.
Held: the service makes the spool anew with all messages of it, and says so once, as an error, with their number; after the kill
they are all there. The oracle, and each message once. Figure: messages, moved files, lost (0), duplicates (0).
"""

import subprocess

import pytest

from oracle import scaled
from processes import wait_until


def inode(path):
    return path.stat().st_ino if path.exists() else None


def delete_all(directory):
    for path in directory.glob("spool.db*"):
        path.unlink()


def rename_file(directory):
    (directory / "spool.db").rename(directory / "elsewhere.db")


def replace_file(directory):
    other = directory / "other"
    other.write_text("somebody else's\n" * 1000)
    other.rename(directory / "spool.db")


def delete_log(directory):
    (directory / "spool.db-wal").unlink()


def delete_index(directory):
    (directory / "spool.db-shm").unlink()


def rename_directory(directory):
    directory.rename(directory.with_name(f"was-{inode(directory)}"))


def without_mongodb(scene, tmp_path):
    """A scene whose MongoDB is down, and the directory of its spool."""
    directory = tmp_path / "spool"
    directory.mkdir()
    it = scene(**{"spool.path": directory / "spool.db"})
    it.server.kill9()
    return it, directory


def with_something_in_the_way(scene, tmp_path):
    """As without_mongodb(). 50 messages are spooled, the spool's directory is moved away, a file is in its place, and 50 more messages
    cannot be spooled."""
    it, directory = without_mongodb(scene, tmp_path)
    it.publish(50)
    it.wait_spooled(50)
    directory.rename(directory.with_name("elsewhere"))
    directory.write_text("in the way")
    mark = it.running.mark()
    it.publish(50)
    it.running.wait_log("spool failed: .* cannot be made anew.* 50 messages are only in this process", after=mark)
    return it, directory


WAYS = [delete_all, rename_file, replace_file, delete_log, delete_index, rename_directory]


@pytest.mark.timeout(scaled(180, 600))
def test_spool_moved(scene, tmp_path):
    it, directory = without_mongodb(scene, tmp_path)
    for number, way in enumerate(WAYS * scaled(1, 10)):
        it.publish(50)
        it.wait_spooled(number * 100 + 50)
        before, mark = inode(directory / "spool.db"), it.running.mark()
        way(directory)
        it.publish(50)
        wait_until(lambda: it.running.sums()["consumer"]["spooled"] == 100, 30, it.state)
        it.running.kill9()
        held, said = it.spool(), it.running.log.count(f"the {number * 100 + 50} messages in it were carried over", mark)
        assert held == (number + 1) * 100, f"{held} messages in the spool after {way.__name__}\n{it.running.tail()}"
        assert said == 1 and inode(directory / "spool.db") not in (before, None), f"{way.__name__}\n{it.running.tail()}"
        it.start()
    it.server.restart()
    _, kept = it.conclude("spool_moved", faults=len(WAYS) * scaled(1, 10))
    assert kept.twice == 0


@pytest.mark.timeout(scaled(120, 120))
def test_spool_moved_and_no_place_for_another(scene, tmp_path):
    """Nothing is acknowledged while there is no place for it; when there is one again, all goes on by itself."""
    it, directory = with_something_in_the_way(scene, tmp_path)
    assert it.running.sums()["consumer"]["spooled"] == 50
    directory.unlink()
    wait_until(lambda: it.running.sums()["consumer"]["spooled"] == 100, 30, it.state)
    it.running.kill9()
    it.start()
    assert it.spool() == 100
    it.server.restart()
    it.conclude("spool_moved, no place", faults=1)


@pytest.mark.timeout(scaled(120, 120))
def test_spool_moved_and_drained_without_a_place(scene, tmp_path):
    """What only the process still has reaches MongoDB when that is back, though the spool cannot be made anew."""
    it, directory = with_something_in_the_way(scene, tmp_path)
    it.server.restart()
    wait_until(lambda: it.running.sums()["consumer"]["recovered_from_spool"] == 50, 30, it.running.tail)
    directory.unlink()
    it.wait_settled()
    it.conclude("spool_moved, drained without a place", faults=1)


@pytest.mark.timeout(scaled(120, 120))
def test_spool_covered_and_uncovered(scene, tmp_path):
    """A file is mounted over the spool, so that it cannot be made anew, and taken away again: the copy that was begun meanwhile does
    not come back at the next start."""
    it, directory = without_mongodb(scene, tmp_path)
    it.publish(50)
    it.wait_spooled(50)
    (tmp_path / "other").write_bytes(b"")
    mounted = subprocess.run(["mount", "--bind", tmp_path / "other", directory / "spool.db"], capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"needs root to mount: {mounted.stderr.strip()}")
    try:
        mark = it.running.mark()
        it.publish(50)
        it.running.wait_log("spool failed: .* cannot be made anew", after=mark)
    finally:
        subprocess.run(["umount", directory / "spool.db"], check=True)
    wait_until(lambda: it.running.sums()["consumer"]["spooled"] == 100, 30, it.state)
    it.publish(50)
    wait_until(lambda: it.running.sums()["consumer"]["spooled"] == 150, 30, it.state)
    it.running.kill9()
    it.start()
    assert it.spool() == 150
    it.server.restart()
    it.conclude("spool_moved, covered and uncovered", faults=1)
