"""What every work of the bench stands on: the servers of one run, contenders as measured processes, and the rows of a result.

A work is a function that takes a Bench and returns a dict (see Rows); bench/main.py runs them. A contender (bench/contenders.py)
is a program that takes up a persistent session at the broker and stores what it gets. Everything is measured from outside the
contender: time until the collection has all, CPU and memory as the kernel counts them.
"""

import json
import mmap
import os
import re
import statistics
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from pymongo.errors import PyMongoError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "integration"))

from processes import Process, wait_until  # noqa: E402
from servers import Mongod, Mosquitto  # noqa: E402

BUILD = ROOT / os.environ.get("MQTT2MONGO_BUILD", "build/release")
BARE, LOAD, INSERT = (BUILD / "bench" / name for name in ("bare", "load", "insert"))
FILTER = "bench/#"
WINDOW = 4096  # receive maximum of every contender
DATABASE, COLLECTION = "bench", "messages"
DISTINCT_UP_TO = 300_000


class Failed(Exception):
    """A turn that did not come to its end, or stored something else than it was sent."""


def say(text):
    print(text, flush=True)


def topic(sequence, topics=100):
    return f"bench/line-1/device-{sequence % topics:05}/readings"


def payload(sequence, size=110, topics=100):
    """What bench/load.c publishes as message `sequence`."""
    made = {"device": f"device-{sequence % topics:05}", "sequence": sequence, "time": "2026-11-22T20:18:24.123Z",
            "temperature": 21.53, "online": True}
    if size > 110:
        length = len(json.dumps(made, separators=(",", ":"))) - 1 + len(',"readings":[')
        made["readings"] = []
        while not made["readings"] or length + 2 < size:
            index = len(made["readings"])
            value = (sequence * 31 + index * 7) % 5000
            text = f'{{"sensor":"s-{index % 100:02}","value":{value // 100}.{value % 100:02},"count":{index * 3},"ok":true}}'
            made["readings"].append(json.loads(text))
            length += len(text) + (index > 0)
    return made


class Run(Process):
    """One life of a contender, from its start on. usage: its rusage once it has ended; peak: KiB resident, as last looked at."""

    def __init__(self, name, directory, argv):
        # Variables that name the servers are no settings of the service, which would say so.
        super().__init__(name, directory, {key: value for key, value in os.environ.items() if not key.startswith("MQTT2MONGO_")})
        for path in (self.stdout, self.stderr):
            path.unlink(missing_ok=True)
        self.usage, self.peak = None, 0
        self.begun = time.monotonic()
        self.spawn(argv)

    @property
    def alive(self):
        """As in Process, but its end is taken with wait4(), which tells what it used."""
        if self.popen is None or self.popen.returncode is not None:
            return False
        ended, status, usage = os.wait4(self.pid, os.WNOHANG)
        if ended:
            self.usage, self.popen.returncode = usage, os.waitstatus_to_exitcode(status)
        return not ended

    def look(self):
        """Take note of its memory. (Its rusage would count this Python before the exec, too.)"""
        found = re.search(r"^VmHWM:\s+(\d+)", _read(f"/proc/{self.pid}/status"), re.M)
        self.peak = max(self.peak, int(found[1]) if found else 0)

    def cpu(self):
        """CPU seconds so far; of the whole life once it has ended."""
        if not self.alive:
            return self.usage.ru_utime + self.usage.ru_stime
        return cpu_seconds(self.pid)

    def check_alive(self):
        if not self.alive:
            raise Failed(f"{self.name} ended with {self.popen.returncode}\n{self.tail(10)}")

    def finish(self, timeout=60):
        """SIGTERM, wait, and it must have ended well."""
        self.look()
        self.ended_well(self.terminate(timeout))

    def ended_well(self, status):
        if status != 0:
            raise Failed(f"{self.name} ended with {status}\n{self.tail(10)}")

    def end(self):
        if self.alive:
            super().end()


def cpu_seconds(pid):
    """What a running process and all its threads used so far: the kernel's clock of that process, which counts nanoseconds."""
    return time.clock_gettime(~pid << 3 | 2)  # as clock_getcpuclockid() makes its number


def _read(path):
    try:
        return Path(path).read_text()
    except OSError:
        return ""


class Turn:
    """What one turn of a contender took: seconds, CPU seconds, peak KiB, for `count` messages."""

    def __init__(self, count, seconds, cpu, peak, extra=None):
        self.count, self.seconds, self.cpu, self.peak, self.extra = count, seconds, cpu, peak, extra or {}

    @property
    def rate(self):
        return self.count / self.seconds

    @property
    def cpu_us(self):
        return self.cpu / self.count * 1e6

    @property
    def peak_mib(self):
        return self.peak / 1024

    def __str__(self):
        return f"{self.rate:10,.0f} msg/s  {self.cpu_us:7.2f} µs CPU/msg  peak {self.peak_mib:7.1f} MiB"


class Counter:
    """A number of 8 bytes in a file that other processes map: how many messages are stored."""

    def __init__(self, path):
        self.path = Path(path)
        self.path.write_bytes(bytes(8))
        with self.path.open("r+b") as file:
            self.map = mmap.mmap(file.fileno(), 8)

    @property
    def value(self):
        return struct.unpack("=Q", self.map[:])[0]

    @value.setter
    def value(self, number):
        self.map[:] = struct.pack("=Q", number)


class Bench:
    """One broker and one mongod for a whole run; use as a context manager.

    rounds  how often each contender has its turn;  quick  a work is to be short
    found   results of earlier works by name, for works that build on them
    """

    def __init__(self, scratch, *, rounds=5, quick=False):
        self.scratch, self.rounds, self.quick = Path(scratch), rounds, quick
        self.found = {}
        self.broker = self.mongod = self.client = None

    def __enter__(self):
        for name in ("mosquitto", "mongod", "runs"):
            (self.scratch / name).mkdir()
        # Saving millions of queued messages in the middle of one contender's turn would be noise.
        self.broker = Mosquitto(self.scratch / "mosquitto", extra=["autosave_interval 3600"])
        self.mongod = Mongod(self.scratch / "mongod", failpoints=False)
        try:
            self.broker.start()
            self.mongod.start()
        except BaseException:
            self.__exit__()
            raise
        self.client = self.mongod.client()
        # The tests' mongod is kept small; one that is to store 100,000 a second is given memory, and an oplog of seconds.
        self.client.admin.command("setParameter", 1, wiredTigerEngineRuntimeConfig="cache_size=2G")
        self.client.admin.command("replSetResizeOplog", 1, size=990.0)
        return self

    def __exit__(self, *_):
        self.mongod.end()
        self.broker.end()

    @property
    def messages(self):
        return self.client[DATABASE][COLLECTION]

    def stored(self):
        return self.messages.estimated_document_count()

    def rotated(self, contenders, turn):
        """Who begins changes each round."""
        at = turn % max(1, len(contenders))
        return contenders[at:] + contenders[:at]

    def clear(self):
        """Nothing is stored, and what earlier turns left to do is done: mongod's checkpoint, the broker's sending."""
        self.messages.drop()
        self.client[DATABASE]["dead_letter"].drop()
        self.client.admin.command("fsync")
        self.quiet()

    def quiet(self, limit=20):
        """Wait until broker and mongod use next to no CPU; at most `limit` seconds, for it is only about noise."""
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            before = self.server_cpu()
            time.sleep(0.2)
            if sum(self.server_cpu()) - sum(before) <= 0.03:
                return

    def server_cpu(self):
        """CPU seconds of broker and mongod so far."""
        return cpu_seconds(self.broker.pid), cpu_seconds(self.mongod.pid)

    def server_use(self, before, count):
        """What broker and mongod used for `count` messages since server_cpu() said `before`: for a Turn's extra."""
        broker, mongod = ((now - then) / count * 1e6 for now, then in zip(self.server_cpu(), before, strict=True))
        return {"broker_cpu_us": broker, "mongod_cpu_us": mongod}

    def done_by_mongod(self):
        """(insert commands, flushes of the journal) so far; of the latter see bench/works/rates.py."""
        status = self.client.admin.command("serverStatus")
        return status["metrics"]["commands"]["insert"]["total"], status["wiredTiger"]["log"]["log sync operations"]

    # --- messages ---

    def publish(self, count, *, size=110, topics=100, limit=120):
        """Publish `count` messages as fast as the broker takes them: into the sessions that were prepared."""
        self.tool([LOAD, "-p", self.broker.port, "-n", count, "-s", size, "-t", topics], limit)

    def fill(self, contenders, count, **options):
        """A backlog of `count` messages for each of the contenders."""
        for contender in contenders:
            contender.prepare(self)
        self.publish(count, **options)

    def forget(self, contenders):
        for contender in contenders:
            contender.forget(self)

    @staticmethod
    def tool(argv, limit=20):
        """Run a program of ours to its end."""
        done = subprocess.run([str(part) for part in argv], timeout=limit, capture_output=True, text=True, check=False,
                              stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            raise Failed(f"{Path(argv[0]).name} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    # --- turns ---

    def start(self, contender, **options):
        """The contender's process, started. Use as a context manager: it does not outlive it."""
        (self.scratch / "runs" / contender.name).mkdir(exist_ok=True)
        return Run(contender.name, self.scratch / "runs" / contender.name, contender.argv(self, **options))

    @contextmanager
    def connected(self, contender, **options):
        """The contender's process, once it has taken up its sessions."""
        mark = self.broker.mark()
        with self.start(contender, **options) as run:
            for client, _ in contender.sessions():
                said = re.compile(rf"New client connected from \S+ as {re.escape(client)} ")
                wait_until(lambda said=said: run.check_alive() or said.search(self.broker.log, mark), 30,
                           f"{client} of {contender.name} is connected", interval=0.05)
            yield run

    def wait_stored(self, run, count, *, limit, stored=None, interval=0.01):
        """Wait until the collection has `count` documents; the seconds since the process was started."""
        stored, deadline, polled = stored or self.stored, time.monotonic() + limit, 0
        while (found := stored()) < count:
            run.check_alive()
            if time.monotonic() > deadline:
                raise Failed(f"{run.name}: {found} of {count} messages stored within {limit} s\n{run.tail(10)}")
            if polled % 5 == 0:
                run.look()
            polled += 1
            time.sleep(interval)
        return time.monotonic() - run.begun

    def drain(self, contender, count, *, size=110, topics=100, limit=None):
        """The contender drains its backlog of `count` messages, which must be stored whole: a Turn. The time is from the start of
        the process until the collection has the last message, or until the process ends if it stores none."""
        limit = limit or 60 + count / 1000
        self.clear()
        before = self.server_cpu()
        with self.start(contender, count=count) as run:
            if contender.stores and not contender.ends:
                seconds = self.wait_stored(run, count, limit=limit)
                run.finish()
            else:
                seconds = self.wait_end(run, count, limit)
        used = self.server_use(before, count)
        if contender.stores:
            self.check(contender.name, count, size=size, topics=topics)
        return Turn(count, seconds, run.cpu(), run.peak, {**used, **contender.sums(run)})

    def wait_end(self, run, count, limit):
        """Wait until the process ends by itself, after `count` messages; the seconds since it was started."""
        deadline = time.monotonic() + limit
        while run.alive:
            if time.monotonic() > deadline:
                raise Failed(f"{run.name} has not had its {count} messages within {limit} s")
            run.look()
            time.sleep(0.005)
        seconds = time.monotonic() - run.begun
        run.ended_well(run.popen.returncode)
        return seconds

    # --- what was stored ---

    def check(self, name, count, *, size=110, topics=100):
        """Every sequence number from 0 to count - 1 exactly once, in documents of the right shape, and a sample compared whole. Above
        DISTINCT_UP_TO numbers "once" is told by their sum and the sum of their squares, for comparing them all takes too long."""
        found = next(self.messages.aggregate([{"$group": {"_id": None, **_SUMS}}]), {"documents": 0})
        found.pop("_id", None)
        found["misshapen"] = self.messages.count_documents({"$nor": [_SHAPE]})
        if count <= DISTINCT_UP_TO:
            found["different"] = next(self.messages.aggregate(_DISTINCT, allowDiskUse=True), {"count": 0})["count"]
        expected = {"documents": count, "first": 0, "last": count - 1, "sum": count * (count - 1) // 2,
                    "squares": (count - 1) * count * (2 * count - 1) // 6, "misshapen": 0, "different": count}
        if any(expected[key] != value for key, value in found.items()) or "sum" not in found:
            raise Failed(f"{name} stored {found}, not {expected}")
        for document in self.messages.aggregate([{"$sample": {"size": min(100, count)}}]):
            self._check_document(name, document, size, topics)

    @staticmethod
    def _check_document(name, document, size, topics):
        sequence = document["payload"]["sequence"]
        expected = {"topic": topic(sequence, topics), "payload": payload(sequence, size, topics), "qos": 1, "retain": False,
                    "dup": False}
        got = {key: value for key, value in document.items() if key not in ("_id", "received_at")}
        if got != expected or set(document) != {*expected, "_id", "received_at"}:
            raise Failed(f"{name} stored {document}, not {expected}")


_TYPES = {"_id": "objectId", "topic": "string", "payload": "object", "received_at": "date", "qos": "int", "retain": "bool",
          "dup": "bool", "payload.device": "string", "payload.sequence": "int"}
_SHAPE = {key: {"$type": kind} for key, kind in _TYPES.items()}
_SUMS = {"documents": {"$sum": 1}, "first": {"$min": "$payload.sequence"}, "last": {"$max": "$payload.sequence"},
         "sum": {"$sum": "$payload.sequence"}, "squares": {"$sum": {"$multiply": ["$payload.sequence", "$payload.sequence"]}}}
_DISTINCT = [{"$group": {"_id": "$payload.sequence"}}, {"$count": "count"}]


class Rows:
    """Collects what a work finds, a row for each contender and case, a value for each round.

    name, title, unit ("msg/s"), better ("higher" or "lower"), parameters (anything JSON) describe the work.
    """

    def __init__(self, name, title, unit, better, **parameters):
        self.work = {"name": name, "title": title, "unit": unit, "better": better, "parameters": parameters, "rows": [],
                     "errors": []}

    def row(self, contender, case, x=None, **more):
        """The row of a contender (or of a name) in a case, made when it is new."""
        name, case = getattr(contender, "name", contender), str(case)
        for row in self.work["rows"]:
            if (row["contender"], row["case"]) == (name, case):
                return row
        row = {"contender": name, "case": case, "x": x, "values": [], "cpu_us": [], "peak_mib": [], "extra": {},
               "notes": getattr(contender, "notes", ""), **more}
        self.work["rows"].append(row)
        return row

    def add(self, contender, case, value, *, x=None, cpu_us=None, peak_mib=None, extra=None, **more):
        """A round's value. `extra` is kept as a list per key, a value for each round."""
        row = self.row(contender, case, x, **more)
        row["values"].append(value)
        row["cpu_us"].append(cpu_us)
        row["peak_mib"].append(peak_mib)
        for key, found in (extra or {}).items():
            row["extra"].setdefault(key, []).append(found)
        return row

    def add_turn(self, contender, case, turn, *, x=None, **more):
        """A Turn's messages a second, CPU and memory."""
        return self.add(contender, case, turn.rate, x=x, cpu_us=turn.cpu_us, peak_mib=turn.peak_mib, extra=turn.extra, **more)

    def leave_out(self, contender, case, why):
        """Say why a contender has no value in a case; not an error."""
        self.work.setdefault("left_out", []).append({"contender": getattr(contender, "name", contender), "case": str(case),
                                                     "why": why})

    def is_out(self, contender, case):
        """Has it failed in a case, or been left out of it?"""
        name = getattr(contender, "name", contender)
        return self.failed(contender, case) or any(
            (out["contender"], out["case"]) == (name, str(case)) for out in self.work.get("left_out", []))

    def failed(self, contender, case):
        name = getattr(contender, "name", contender)
        return any((error["contender"], error["case"]) == (name, str(case)) for error in self.work["errors"])

    @contextmanager
    def attempt(self, bench, contender, case):
        """One turn: when it fails this is noted as an error of the work, and the others go on. The contender's sessions end."""
        try:
            yield
        except (Failed, AssertionError, OSError, subprocess.SubprocessError, PyMongoError) as error:
            say(f"  {contender.name} ({case}) FAILED: {error}")
            self.work["errors"].append({"contender": contender.name, "case": str(case), "error": str(error)})
        finally:
            contender.forget(bench)

    def median(self, name, case):
        """The median of a row's values, or None if it has none."""
        values = [value for row in self.work["rows"] if (row["contender"], row["case"]) == (name, str(case))
                  for value in row["values"]]
        return statistics.median(values) if values else None
