"""The program under test, as an operator runs it: a process with flags, signals, an exit status, a log."""

import json
import os
import re
import signal
from pathlib import Path

from processes import ROOT, Process, wait_until

BUILD = ROOT / os.environ.get("MQTT2MONGO_BUILD", "build/release")
GATE_OPEN_BUILD = ROOT / os.environ.get("MQTT2MONGO_GATE_OPEN_BUILD", "build/gate-open")

_SANITIZER = re.compile(r"ERROR: \w+Sanitizer|runtime error:|WARNING: ThreadSanitizer|SUMMARY: \w+Sanitizer")


def check_sums(sums):
    """Every message is accounted for. `sums` is the object that the service prints, without its "sums" shell."""
    consumer = sums.get("consumer")
    if consumer:
        came = consumer["received"] + consumer["recovered_from_spool"]
        ways = ("stored", "duplicates", "dead_lettered", "spooled", "dropped", "returned", "in_flight")
        went = sum(_total(consumer[way]) for way in ways)
        assert came == went, f"the consumer's sums do not add up, {came} came and {went} went: {consumer}"
        in_mongodb = sum(_total(consumer[way]) for way in ("stored", "duplicates", "dead_lettered"))
        if "batches" in consumer:  # the drain's as well
            assert in_mongodb <= consumer["batches"] * consumer["largest_batch"], f"batches that nobody counted: {consumer}"
    publisher = sums.get("publisher")
    if publisher:
        went = publisher["acked"] + publisher["failed"] + publisher["unacknowledged"]
        assert publisher["generated"] == went, f"the publisher's sums do not add up: {publisher}"


def _total(value):
    return sum(value.values()) if isinstance(value, dict) else value  # dropped may be told by reason


class Service(Process):
    """One mqtt2mongo. Not started yet: start() does that.

    directory  its own; the state directory is state/ in it, over restarts too
    broker     a Mosquitto, or None;  mongod  a Mongod, or None: what it connects to
    role       consumer, publisher or both
    settings   {"consumer.topic": "a/#", "publisher.rate": "100/s", …}: becomes --consumer-topic a/# …; beats the defaults below;
               None for a value leaves that flag out
    args       further arguments as they are
    env        further environment; the test's own MQTT2MONGO_… variables are not handed on
    build      the build directory (meson's) to take the program from
    """

    def __init__(self, directory, *, broker=None, mongod=None, database="mqtt2mongo", role="consumer", settings=None, args=(),
                 env=None, build=None, name="mqtt2mongo"):
        super().__init__(name, directory)
        self.program = (ROOT / (build or BUILD)) / "src" / "mqtt2mongo"
        self.state = self.directory / "state"
        self.settings = {"role": role, "state_dir": self.state, "log.format": "json"}
        if broker:
            self.settings |= {"mqtt.host": "127.0.0.1", "mqtt.port": broker.port}
        if mongod:
            self.settings |= {"mongodb.uri": mongod.uri, "mongodb.database": database}
        self.settings |= settings or {}
        self.args = list(args)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MQTT2MONGO_")}
        self.environment = {
            **kept, "HOME": str(self.directory), "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=1",
            "UBSAN_OPTIONS": "print_stacktrace=1", **_suppressions(), **(env or {})}
        self.peak = 0  # peak resident memory in bytes, as last seen

    def argv(self):
        flags = []
        for key, value in self.settings.items():
            if value is not None:
                flags += ["--" + re.sub(r"[._]", "-", key), str(value)]
        return [self.program, *flags, *self.args]

    def start(self):
        """Start it (again, with the same state directory). Does not wait for anything: see wait_log() and wait_stored()."""
        assert self.program.exists(), f"no program at {self.program}: scripts/setup.sh builds it"
        self.state.mkdir(exist_ok=True)
        self.spawn(self.argv())
        return self

    @property
    def records(self):
        """Its log as a list of objects (time, level, room, message, …)."""
        found = []
        for line in self.log.splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                found.append({"level": "?", "message": line})
        return found

    @property
    def printed_sums(self):
        """All sums it has printed so far, the oldest first."""
        if not self.stdout.exists():
            return []
        whole = self.stdout.read_text().rpartition("\n")[0]  # a line that is being written does not count yet
        lines = (json.loads(line) for line in whole.splitlines() if line.startswith("{"))
        return [line["sums"] for line in lines if "sums" in line]

    def sums(self, timeout=5):
        """The sums: asked for with SIGUSR1 while it runs, the last printed after its end. Checked to add up."""
        if self.alive:
            before = len(self.printed_sums)
            # Before it catches it, the signal would end it.
            wait_until(lambda: not self.alive or self.catches(signal.SIGUSR1), timeout, "SIGUSR1 is caught")
            self.signal(signal.SIGUSR1)
            wait_until(lambda: len(self.printed_sums) > before or not self.alive, timeout,
                       lambda: f"sums on SIGUSR1\n{self.tail()}")
        found = self.printed_sums
        assert found, f"no sums were printed\n{self.tail()}"
        check_sums(found[-1])
        return found[-1]

    def wait_stored(self, count, timeout=30):
        """Wait until it says that `count` messages or more are stored (duplicates not counted); its sums."""
        last = {}

        def enough():
            assert self.alive, f"it ended with {self.popen.returncode}\n{self.tail()}"
            last.update(self.sums())
            return last["consumer"]["stored"] >= count

        wait_until(enough, timeout, lambda: f"{count} stored: {last}\n{self.tail()}", interval=0.1)
        return last

    def rss_peak(self):
        """Peak resident memory in bytes (VmHWM); the last seen once it has ended."""
        if self.alive:
            self.peak = max(self.peak, self.memory()[0])
        return self.peak

    def check_sanitizers(self):
        match = _SANITIZER.search(self.log)
        assert not match, f"the sanitizer complains: {self.log[match.start():match.start() + 4000]}"

    def stop(self, *, expect=0, timeout=20, sums=True):
        """SIGTERM, wait, and check: exit status, sums (in `sums` mode) and that no sanitizer complained. Returns the last sums, or
        None without."""
        if self.alive:
            self.rss_peak()
        status = self.terminate(timeout)
        return self._checked(status, expect, sums)

    def finish(self, *, expect=0, timeout=30, sums=True):
        """As stop(), but it ends by itself (publisher.count, --check, an error)."""
        return self._checked(self.wait_exit(timeout), expect, sums)

    def _checked(self, status, expect, sums):
        self.check_sanitizers()
        assert status == expect, f"exit status {status}, not {expect}\n{self.tail()}"
        return self.sums() if sums else None

    def end(self):
        super().end()
        self.check_sanitizers()


def _suppressions():
    path = Path(__file__).parent.parent / "lsan.supp"
    return {"LSAN_OPTIONS": f"suppressions={path}"} if path.exists() else {}
