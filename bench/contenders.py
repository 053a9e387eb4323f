"""The programs that are compared. All of them: QoS 1, MQTT 5, a persistent session, receive maximum 4096.

A contender has

    name, notes    as the report calls it, and what must be known to read its numbers fairly
    stores         it stores messages in MongoDB;  ends: it ends by itself once it has had `count` messages
    missing()      why it cannot run here, or ""
    prepare()      makes its session(s) at the broker;  forget()  ends them
    argv()         its command line. `count`: how many messages will come, None if they do not end; `counter`: a Counter
                   that one which stores nothing keeps itself
    sums()         what its process said of itself, for the report
"""

import json
import os
import shutil
import sys
from pathlib import Path

from harness import BARE, BUILD, COLLECTION, DATABASE, FILTER, INSERT, ROOT, WINDOW, Failed

PEERS = Path(__file__).resolve().parent / "peers"
NODE = ROOT / "build" / "bench" / "node"


class Contender:
    stores, ends = True, False

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


_ACKS_AFTER = "acknowledges when insert_one has returned; a failed insert ends it"
_ACKS_EARLY = "acknowledges before it has stored: what is in its memory is lost with it"

ALL = {contender.name: contender for contender in (
    Bare("bare", "subscribe", "stores nothing: the floor, as fast as libmosquitto goes"),
    Bare("bare-loop", "loop", "stores nothing, by mosquitto_loop(), as most programs are written"),
    Insert(1), Insert(2), Service(1), Service(4),
    Python("python", "python_single.py", _ACKS_AFTER),
    Python("python-batched", "python_batched.py", _ACKS_EARLY),
    Node("node", "default", _ACKS_EARLY + "; the server's default write concern"),
    Node("node-durable", "durable", _ACKS_EARLY + "; w:majority, j:true"),
)}


def chosen(*names):
    """The contenders of these names that can run here, and {name: why} of those that cannot."""
    only = os.environ.get("MQTT2MONGO_BENCH_CONTENDERS")
    names = [name for name in names if not only or name in only.split(",")]
    reasons = {name: ALL[name].missing() for name in names}
    return [ALL[name] for name in names if not reasons[name]], {name: why for name, why in reasons.items() if why}
