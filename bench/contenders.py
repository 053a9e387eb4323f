"""The programs that are compared. All of them: QoS 1, MQTT 5, a persistent session, receive maximum 4096.

A contender has

    name, notes    as the report calls it, and what must be known to read its numbers fairly
    stores         it stores messages in MongoDB;  ends: it ends by itself once it has had `count` messages
    missing()      why it cannot run here, or ""
    prepare()      makes its session(s) at the broker;  forget()  ends them
    argv()         its command line. `count`: how many messages will come, None if they do not end; `counter`: a Counter
                   that one which stores nothing keeps itself
    sums()         what its process said of itself, for the report
    check()        what it stored is what was sent;  sequence: where its documents have a message's number
    gathers        seconds that messages wait in it for others, by its configuration
"""

import json
import os
import shutil
import sys
from pathlib import Path
from string import Template

from harness import BARE, BUILD, COLLECTION, DATABASE, FILTER, INSERT, ROOT, WINDOW, Failed

PEERS = Path(__file__).resolve().parent / "peers"
NODE = ROOT / "build" / "bench" / "node"
TELEGRAF = ROOT / "build" / "bench" / "telegraf" / "telegraf"


class Contender:
    stores, ends = True, False
    sequence, gathers = "payload.sequence", 0

    def __init__(self, name, notes=""):
        self.name, self.notes = name, notes

    def missing(self):
        return ""

    def sessions(self):
        """[(client id, filter)] at the broker."""
        return [(self.name, FILTER)]

    def prepare(self, bench):
        for client, filter_ in self.sessions():
            bench.tool([BARE, "session", bench.broker.port, filter_, client])

    def forget(self, bench):
        for client, _ in self.sessions():
            bench.tool([BARE, "forget", bench.broker.port, client])

    def argv(self, bench, count=None, counter=None):
        raise NotImplementedError

    def sums(self, run):
        return {}

    def check(self, bench, count):
        bench.check(self.name, count)


class Bare(Contender):
    """libmosquitto alone, discards: the floor. `how`: a loop made for speed, or mosquitto_loop()."""

    stores, ends = False, True

    def __init__(self, name, how, notes):
        super().__init__(name, notes)
        self.how = how

    def argv(self, bench, count=None, counter=None):
        return [BARE, self.how, bench.broker.port, FILTER, self.name, WINDOW, count or 0, *([counter.path] if counter else [])]


class Insert(Contender):
    """insert_many of ready documents: the database's ceiling. It has nothing to do with the broker."""

    ends = True

    def __init__(self, threads):
        super().__init__(f"insert-{threads}", "no broker, no JSON: insert_many of 1000 with w:majority, j:true")
        self.threads = threads

    def sessions(self):
        return []

    def argv(self, bench, count=None, counter=None):
        return [INSERT, bench.mongod.uri, DATABASE, COLLECTION, count, self.threads]


class Service(Contender):
    """mqtt2mongo with the given number of connections, which share the topic if they are several.

    settings  {"consumer.workers": 4, …} beyond the defaults;  program: another binary than the build's
    """

    def __init__(self, connections=1, *, name=None, notes="", settings=None, program=None):
        super().__init__(name or f"mqtt2mongo-{connections}", notes or "acknowledges what is stored: w:majority, j:true")
        self.connections, self.settings = connections, settings or {}
        self.program = program or BUILD / "src" / "mqtt2mongo"

    def sessions(self):
        shared = f"$share/{self.name}/{FILTER}" if self.connections > 1 else FILTER
        return [(f"{self.name}-{number}", shared) for number in range(1, self.connections + 1)]

    def argv(self, bench, count=None, counter=None):
        settings = {
            "role": "consumer", "log.format": "json", "mqtt.host": "127.0.0.1", "mqtt.port": bench.broker.port,
            "mqtt.client_id": self.name, "mqtt.receive_maximum": WINDOW, "consumer.topic": FILTER,
            "mongodb.uri": bench.mongod.uri, "mongodb.database": DATABASE,
            "state_dir": bench.scratch / "runs" / self.name / "state"}
        if self.connections > 1:
            settings |= {"consumer.connections": self.connections, "consumer.share": self.name}
        argv = [self.program]
        for key, value in {**settings, **self.settings}.items():
            argv += ["--" + key.replace(".", "-").replace("_", "-"), value]
        return argv

    def sums(self, run):
        """What went through the spool, because MongoDB took longer than spool.after."""
        lines = [json.loads(line) for line in run.stdout.read_text().splitlines() if line.startswith('{"sums"')]
        return {"spooled": lines[-1]["sums"]["consumer"]["spooled"]} if lines else {}


class Peer(Contender):
    """What a user would write instead; the argument list is the same for all of them."""

    def _arguments(self, bench):
        return [bench.broker.port, self.name, FILTER, WINDOW, bench.mongod.uri, DATABASE, COLLECTION]


class Python(Peer):
    def __init__(self, name, script, notes):
        super().__init__(name, notes)
        self.script = PEERS / script

    def argv(self, bench, count=None, counter=None):
        return [sys.executable, self.script, *self._arguments(bench)]


class Node(Peer):
    def __init__(self, name, concern, notes):
        super().__init__(name, notes)
        self.concern = concern

    def missing(self):
        if not shutil.which("node") or not shutil.which("npm"):
            return "no node or npm here (Debian: apt-get install nodejs npm)"
        return "" if (NODE / "node_modules" / "mongodb").exists() else "its packages are not installed"

    def argv(self, bench, count=None, counter=None):
        return ["node", NODE / "consumer.js", *self._arguments(bench), self.concern]


def install_node(tool):
    """The packages of bench/peers/node into build/bench/node, once; no lock file, which would name a registry."""
    if not shutil.which("npm"):
        return
    wanted = (PEERS / "node" / "package.json").read_text()
    stamp = NODE / "installed"
    NODE.mkdir(parents=True, exist_ok=True)
    shutil.copy(PEERS / "node" / "consumer.js", NODE)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    shutil.copy(PEERS / "node" / "package.json", NODE)
    try:
        tool(["npm", "install", "--prefix", NODE, "--no-package-lock", "--no-audit", "--no-fund", "--loglevel=error"], 300)
    except Failed as error:
        print(f"node is left out: {error}", file=sys.stderr)
        return
    stamp.write_text(wanted)


class Telegraf(Peer):
    """telegraf with its mqtt_consumer and its mongodb output, configured by peers/telegraf.conf. It speaks MQTT 3.1.1, so its window
    is the broker's max_inflight_messages, and has documents of its own shape: they are counted, not compared."""

    sequence, gathers = "sequence", 1

    def __init__(self):
        super().__init__("telegraf", "MQTT 3.1.1; acknowledges what is stored; an insert for each message, of a document of its "
                                     "own shape, into a plain collection; flush_interval 1s, metric_batch_size 1000")

    @staticmethod
    def program():
        named = os.environ.get("MQTT2MONGO_BENCH_TELEGRAF")
        return named or (TELEGRAF if TELEGRAF.exists() else shutil.which("telegraf"))

    def missing(self):
        program = self.program()
        if program and shutil.which(program):
            return ""
        return (f"{program} is no program" if program else
                f"no telegraf on PATH or in {TELEGRAF.relative_to(ROOT)}; bench/peers/telegraf.conf says how to build one")

    def prepare(self, bench):
        """Left to itself it would make a time series, of which a change stream tells nothing."""
        super().prepare(bench)
        bench.client[DATABASE].create_collection(COLLECTION)

    def argv(self, bench, count=None, counter=None):
        config = bench.scratch / "runs" / self.name / "telegraf.conf"
        config.write_text(Template((PEERS / "telegraf.conf").read_text()).substitute(
            broker=f"tcp://127.0.0.1:{bench.broker.port}", client=self.name, filter=FILTER, window=WINDOW, uri=bench.mongod.uri,
            database=DATABASE, collection=COLLECTION))
        return [self.program(), "--config", config]

    def check(self, bench, count):
        numbers = {"documents": {"$sum": 1}, "first": {"$min": "$_id"}, "last": {"$max": "$_id"}, "most": {"$max": "$times"}}
        found = next(bench.messages.aggregate([
            {"$group": {"_id": "$sequence", "times": {"$sum": 1}}}, {"$group": {"_id": None, **numbers}}]), {})
        found.pop("_id", None)
        expected = {"documents": count, "first": 0, "last": count - 1, "most": 1}
        if found != expected:
            raise Failed(f"{self.name} stored {found}, not {expected}")


_ACKS_AFTER = "acknowledges when insert_one has returned; a failed insert ends it"
_ACKS_EARLY = "acknowledges before it has stored: what is in its memory is lost with it"

ALL = {contender.name: contender for contender in (
    Bare("bare", "subscribe", "stores nothing: the floor, as fast as libmosquitto goes"),
    Bare("bare-loop", "loop", "stores nothing, by mosquitto_loop(), as most programs are written"),
    Insert(1), Insert(2), Service(1), Service(4),
    Service(1, name="mqtt2mongo-interval-0", settings={"consumer.batch.interval": "0s"},
            notes="mqtt2mongo-1 with consumer.batch.interval 0s: each write is made at once"),
    Python("python", "python_single.py", _ACKS_AFTER),
    Python("python-batched", "python_batched.py", _ACKS_EARLY),
    Node("node", "default", _ACKS_EARLY + "; the server's default write concern"),
    Node("node-durable", "durable", _ACKS_EARLY + "; w:majority, j:true"),
    Telegraf(),
)}


def chosen(*names):
    """The contenders of these names that can run here, and {name: why} of those that cannot."""
    only = os.environ.get("MQTT2MONGO_BENCH_CONTENDERS")
    names = [name for name in names if not only or name in only.split(",")]
    reasons = {name: ALL[name].missing() for name in names}
    return [ALL[name] for name in names if not reasons[name]], {name: why for name, why in reasons.items() if why}
