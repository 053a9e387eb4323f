"""--spool-status and --spool-export: what is in the spool, beside somebody who writes to it, and what is said when it is not there.

The spool is written here by Python's sqlite3, from the format's description: what the program makes of it is a second opinion on
what its own code writes.
"""

import contextlib
import fcntl
import json
import os
import shutil
import sqlite3
import subprocess
import tempfile
from datetime import datetime
from pathlib import Path

import pytest
from bson import ObjectId, json_util

from processes import TIME_FACTOR, wait_until
from service import BUILD

PROGRAM = BUILD / "src" / "mqtt2mongo"
APPLICATION = 0x6D326D53
COLUMNS = ("row INTEGER PRIMARY KEY, id BLOB, route TEXT, topic BLOB, payload BLOB, received_at INTEGER, qos INTEGER, "
           "flags INTEGER, full_length INTEGER, digest BLOB, properties BLOB, checksum INTEGER")
SCHEMA = [f"CREATE TABLE message ({COLUMNS})", f"CREATE TABLE damaged ({COLUMNS})",
          "CREATE TABLE tally (messages INTEGER, next_row INTEGER, tests INTEGER)"]
MASK = (1 << 64) - 1
NOW = 1700000000123  # 2023-11-14T22:13:20.123Z


def mix(total, word):
    total = (total ^ (word & MASK)) * 0x9E3779B97F4A7C15 & MASK
    return total ^ total >> 32


def mix_bytes(total, data):
    total = mix(total, len(data))
    for at in range(0, len(data), 8):
        total = mix(total, int.from_bytes(data[at:at + 8], "little"))
    return total


def row_of(number, payload, *, topic=b"sensors/a", route="", received_at=NOW, qos=1, retain=False, dup=False, length=None, digest=None):
    """The columns of a message, the checksum over all of them last."""
    identity = bytes(4) + number.to_bytes(8, "big")
    flags = retain | dup << 1
    length = len(payload) if length is None else length
    total = mix(APPLICATION, number)
    for data in (identity, route.encode(), topic, payload):
        total = mix_bytes(total, data)
    total = mix(mix(mix(total, received_at), qos << 8 | flags), length)
    total = mix_bytes(mix_bytes(total, digest or b""), b"")
    return (number, identity, route, topic, payload, received_at, qos, flags, length, digest, None,
            total - (1 << 64) if total >> 63 else total)


class Spool:
    """A spool with a writer of its own, which holds the lock as a service does."""

    def __init__(self, path):
        self.path = Path(path)
        self.lock = open(f"{path}.lock", "w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        self.database = sqlite3.connect(path, isolation_level=None)
        self.database.execute("PRAGMA journal_mode = WAL")
        self.database.execute("PRAGMA wal_autocheckpoint = 0")
        self.database.execute("BEGIN")
        for statement in SCHEMA:
            self.database.execute(statement)
        self.database.execute("INSERT INTO tally VALUES (0, 1, 0)")
        self.database.execute(f"PRAGMA application_id = {APPLICATION}")
        self.database.execute("PRAGMA user_version = 1")
        self.database.execute("COMMIT")

    def add(self, *rows):
        self.database.execute("BEGIN")
        self.database.executemany(f"INSERT INTO message VALUES ({', '.join('?' * 12)})", rows)
        self.database.execute("UPDATE tally SET messages = messages + ?, next_row = ?", (len(rows), rows[-1][0] + 1))
        self.database.execute("COMMIT")

    def close(self):
        self.database.close()
        self.lock.close()


@pytest.fixture
def spool(tmp_path):
    with contextlib.closing(Spool(tmp_path / "spool.db")) as made:
        yield made


def run(*arguments, path=None, **options):
    """(exit status, standard output, standard error)."""
    where = ["--spool-path", path] if path else []
    done = subprocess.run([PROGRAM, *arguments, *where], stdin=subprocess.DEVNULL, capture_output=True, check=False,
                          timeout=30 * TIME_FACTOR, env={"HOME": "/nonexistent", "MONGOC_DISABLE_SHM": "1"}, **options)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def status(path):
    code, output, errors = run("--spool-status", "--log-format", "json", path=path)
    assert code == 0 and errors == "" and output.count("\n") == 1, errors
    return json.loads(output)["spool"]


def export(path):
    code, output, errors = run("--spool-export", path=path)
    assert (code, errors) == (0, "")
    return [json_util.loads(line) for line in output.splitlines()]


def on_disk(path):
    return sum(os.path.getsize(f"{path}{suffix}") for suffix in ("", "-wal", "-shm") if os.path.exists(f"{path}{suffix}"))


@pytest.mark.parametrize("where", ["spool.db", "no/such/directory/spool.db"])
def test_there_is_none(tmp_path, where):
    path = tmp_path / where
    code, output, errors = run("--spool-status", path=path)
    assert (code, errors) == (0, "")
    assert f"no spool at {path}" in output and output.splitlines()[1].split() == ["messages", "0"]
    assert status(path) == {"path": str(path), "exists": False, "messages": 0, "bytes": 0, "damaged": 0}
    code, output, errors = run("--spool-export", path=path)
    assert (code, output) == (0, "") and f"no spool at {path}" in errors
    assert list(tmp_path.iterdir()) == []


def test_what_it_holds(spool):
    digest = bytes(range(32))
    spool.add(row_of(5, b'{"a": 1}'),
              row_of(6, b"", topic="größe/a".encode(), route="größe/#", received_at=NOW + 1, qos=0, retain=True),
              row_of(7, b"\x00\xff", topic=b"\xff/x", dup=True),
              row_of(8, b"x" * 100000, length=3000000, digest=digest),
              row_of(9, b"x" * 100, digest=digest))
    found = status(spool.path)
    assert found == {"path": str(spool.path), "exists": True, "messages": 5, "bytes": on_disk(spool.path),
                     "oldest": "2023-11-14T22:13:20.123Z", "damaged": 0}
    code, output, _ = run("--spool-status", "--spool-max-size", "64MiB", path=spool.path)
    assert code == 0
    lines = dict(line.split(None, 1) for line in output.splitlines())
    assert lines["spool"] == str(spool.path) and lines["messages"] == "5"
    assert lines["bytes"] == f"{on_disk(spool.path)} of {64 << 20}"
    assert lines["oldest"].startswith("2023-11-14T22:13:20.123Z, ") and "damaged" not in lines

    first, second, third, cut, over = export(spool.path)
    assert first.pop("received_at").replace(tzinfo=None) == datetime(2023, 11, 14, 22, 13, 20, 123000)
    assert first == {"_id": ObjectId(bytes(11) + b"\x05"), "topic": "sensors/a", "payload": b'{"a": 1}', "qos": 1,
                     "retain": False, "dup": False}
    assert second.pop("received_at").replace(tzinfo=None) == datetime(2023, 11, 14, 22, 13, 20, 124000)
    assert second == {"_id": ObjectId(bytes(11) + b"\x06"), "topic": "größe/a", "payload": b"", "qos": 0, "retain": True,
                      "dup": False, "route": "größe/#"}
    assert third["topic"] == b"\xff/x" and third["payload"] == b"\x00\xff" and third["dup"] is True
    assert cut["payload"] == b"x" * 100000 and cut["truncated"] is True and cut["length"] == 3000000 and cut["sha256"] == digest
    assert over["payload"] == b"x" * 100 and "truncated" not in over and over["length"] == 100
    _, output, _ = run("--spool-export", path=spool.path)
    assert json.loads(output.splitlines()[0])["payload"] == {"$binary": {"base64": "eyJhIjogMX0=", "subType": "00"}}
    assert len(export(spool.path)) == 5  # still there


def test_what_a_topic_says_to_a_terminal(spool):
    """A topic of characters that turn or steer a terminal is exported, and shown as their escapes: the JSON means the same."""
    topic = "sensors/\x7f\u009b2J\u202egpj.exe\u2066\u061c"
    spool.add(row_of(1, b"1", topic=topic.encode(), route=topic))
    assert [(each["topic"], each["route"]) for each in export(spool.path)] == [(topic, topic)]
    _, output, _ = run("--spool-export", path=spool.path)
    assert output.isascii() and output.rstrip("\n").isprintable()


def test_in_the_state_directory(spool, tmp_path):
    """Neither a role nor a path is needed; a configuration for the service will do."""
    spool.add(row_of(1, b"1"))
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"role": "consumer", "state_dir": str(tmp_path), "log": {"format": "json"}}))
    for arguments in (["--state-dir", tmp_path, "--log-format", "json"], ["-c", settings]):
        code, output, errors = run("--spool-status", *arguments)
        assert (code, errors) == (0, "") and json.loads(output)["spool"]["messages"] == 1
        code, output, errors = run("--spool-export", *arguments)
        assert (code, errors) == (0, "") and json_util.loads(output)["payload"] == b"1"


@pytest.mark.parametrize("other", ["--check", "--dry-run", "--spool-status"])
def test_one_thing_at_a_time(tmp_path, other):
    code, output, errors = run("--spool-export", other, path=tmp_path / "spool.db")
    assert (code, output) == (2, "") and "exclude each other" in errors


def test_beside_a_writer(spool):
    """Who looks sees whole transactions, and the writer is not held up."""
    spool.add(*(row_of(number, b"x" * 100) for number in range(1, 20001)))
    exporter = subprocess.Popen([PROGRAM, "--spool-export", "--spool-path", spool.path], stdout=subprocess.PIPE)
    try:
        first = exporter.stdout.readline()  # it goes on as far as the pipe takes it, and waits in the middle
        number = 20000
        for _ in range(50):
            spool.add(*(row_of(number + i, b"y" * 100) for i in range(1, 101)))
            number += 100
            assert status(spool.path)["messages"] == number if number % 1000 == 0 else True
        wait_until(lambda: spool.database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0, 5, "the WAL can be emptied")
        rest = exporter.stdout.read().splitlines()
        assert exporter.wait(30) == 0
    finally:
        exporter.kill()
        exporter.wait()
        exporter.stdout.close()
    found = [json_util.loads(line) for line in [first, *rest]]
    assert [int(document["_id"].binary.hex(), 16) for document in found] == list(range(1, len(found) + 1))
    assert len(found) >= 20000 and len(found) % 100 == 0


def test_after_an_orderly_end_and_after_a_crash(spool, tmp_path):
    spool.add(*(row_of(number, b"x") for number in range(1, 101)))
    for suffix in ("", "-wal"):  # as a crash leaves it: with its log, without the log's index
        shutil.copy(f"{spool.path}{suffix}", tmp_path / f"crashed.db{suffix}")
    assert status(tmp_path / "crashed.db")["messages"] == 100
    assert len(export(tmp_path / "crashed.db")) == 100
    spool.close()
    assert not os.path.exists(f"{spool.path}-wal")
    assert status(spool.path)["messages"] == 100
    assert len(export(spool.path)) == 100


def test_in_a_directory_that_is_not_ours_to_write():
    """Without a log beside the file there is nothing to write. As nobody, for root may write everywhere."""
    with tempfile.TemporaryDirectory() as name:
        made = Spool(Path(name) / "spool.db")
        made.add(row_of(1, b"1"))
        made.close()
        os.chmod(made.path, 0o444)
        os.chmod(name, 0o555)
        other = {"user": 65534} if os.geteuid() == 0 else {}
        code, output, errors = run("--spool-status", path=made.path, **other)
        assert (code, errors) == (0, "") and "messages  1\n" in output
        code, output, errors = run("--spool-export", path=made.path, **other)
        assert (code, errors) == (0, "") and output.count("\n") == 1
        os.chmod(name, 0o755)
        assert sorted(os.listdir(name)) == ["spool.db", "spool.db.lock"]


@pytest.mark.parametrize("content", [b"a letter, and no database", b"SQLite format 3\0" + bytes(5000)])
def test_no_spool_but_something_else(tmp_path, content):
    path = tmp_path / "spool.db"
    path.write_bytes(content)
    for action in ("--spool-status", "--spool-export"):
        code, output, errors = run(action, path=path)
        assert (code, output) == (1, "") and str(path) in errors
    code, output, errors = run("--spool-status", path=tmp_path)
    assert (code, output) == (1, "") and str(tmp_path) in errors
    assert path.read_bytes() == content


def test_a_message_that_is_not_what_was_written(spool):
    spool.add(*(row_of(number, b"right") for number in range(1, 4)))
    spool.database.execute("UPDATE message SET payload = CAST('wrong' AS BLOB) WHERE row = 2")
    code, output, errors = run("--spool-export", path=spool.path)
    assert code == 1 and "1 messages are not what was written" in errors
    assert [json_util.loads(line)["payload"] for line in output.splitlines()] == [b"right", b"right"]
    spool.database.execute("INSERT INTO damaged SELECT * FROM message WHERE row = 2")
    assert status(spool.path)["damaged"] == 1


def test_a_reader_that_goes_away(spool):
    spool.add(*(row_of(number, b"x" * 1000) for number in range(1, 5001)))
    done = subprocess.run(["bash", "-c", '"$0" --spool-export --spool-path "$1" | head -1', PROGRAM, spool.path],
                          env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.count("\n") == 1 and done.stderr == ""
    with open("/dev/full", "w", encoding="ascii") as full:
        done = subprocess.run([PROGRAM, "--spool-export", "--spool-path", spool.path], stdout=full, stderr=subprocess.PIPE,
                              text=True, timeout=30, check=False)
    assert done.returncode == 1 and "No space left on device" in done.stderr
