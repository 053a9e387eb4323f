"""The real servers of the tests: a mosquitto broker, a mongod replica set of one, and one of several, on free ports of 127.0.0.1.

Both have: start(), stop() (SIGTERM, as an operator would), kill9(), restart() (on the same port and data),
sigstop()/sigcont() (frozen: connections stay open and say nothing), .log, .port.
"""

import getpass
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pymongo

from processes import ROOT, Process, accepts, free_port, wait_until

RECOMMENDED = ROOT / "config" / "mosquitto.conf"
MINIMAL = "persistence false\n"
SHARES = (2, 0, 12)  # the first mosquitto that keeps the shared subscriptions of a session that is taken up again


def _program(variable, name):
    found = os.environ.get(variable) or shutil.which(name) or shutil.which(name, path="/usr/sbin")
    if not found and name == "mongod":
        wheel = "lib/python3*/site-packages/fiftyone/db/bin/mongod"
        found = next(iter(sorted(Path(os.environ.get("MQTT2MONGO_VENV", ROOT / "build" / "venv")).glob(wheel))), None)
    assert found, f"no {name} here: run scripts/setup.sh, or set {variable}"
    return str(found)


def version_of(program):
    """The version of a mosquitto, as in (2, 0, 11); None when it does not run."""
    try:
        said = subprocess.run([program, "-h"], capture_output=True, text=True, check=False, timeout=10).stdout
    except OSError:
        return None
    found = re.search(r"^mosquitto version (\d+)\.(\d+)\.(\d+)", said, re.M)
    return found and tuple(map(int, found.groups()))


def shared_broker():
    """A mosquitto that keeps shared subscriptions of durable sessions, from 2.0.12 on, as scripts/setup.sh finds one; or None."""
    candidates = (os.environ.get("MQTT2MONGO_MOSQUITTO_SHARED"), _program("MQTT2MONGO_MOSQUITTO", "mosquitto"),
                  ROOT / "build" / "mosquitto-backports" / "mosquitto")
    return next((str(each) for each in candidates if each and (version_of(each) or ()) >= SHARES), None)


def mosquittos():
    """Every mosquitto there is here, by version: the installed one and that of shared_broker(), where it is another."""
    found = {version_of(each): each for each in (_program("MQTT2MONGO_MOSQUITTO", "mosquitto"), shared_broker()) if each}
    return list(found.values())


_IS_NEXT = "import ctypes, sys; sys.exit(ctypes.CDLL('libmosquitto.so.1').mosquitto_lib_version(None, None, None) < 2_001_000)"


def next_library():
    """The environment with which a program loads a libmosquitto from 2.1 on, as scripts/setup.sh finds one; None without one."""
    candidates = (os.environ.get("MQTT2MONGO_LIBMOSQUITTO_NEXT"), ROOT / "build" / "libmosquitto-next" / "lib")
    for environment in [{}, *({"LD_LIBRARY_PATH": str(each)} for each in candidates if each)]:
        if subprocess.run([sys.executable, "-c", _IS_NEXT], env=os.environ | environment, capture_output=True, check=False,
                          timeout=10).returncode == 0:
            return environment
    return None


def _start_listening(process, argv_for_port, port, timeout):
    """Spawn, wait until the port accepts. A port of our own choosing may be taken by then: another try. The port."""
    for last in (False, False, True):
        chosen = port or free_port()
        process.spawn(argv_for_port(chosen))
        wait_until(lambda: not process.alive or accepts(chosen), timeout,
                   lambda: f"{process.name} accepts connections\n{process.tail()}")
        if process.alive:
            return chosen
        assert not port and not last, f"{process.name} ended at once:\n{process.tail()}"
    return None


class Mosquitto(Process):
    """A broker with a configuration made for the test.

    directory    holds configuration, log and persistent sessions
    base         text to start from; None: the project's recommended config/mosquitto.conf, else a minimal one.
                 Where it listens, who may connect and where it keeps things is always replaced
    persistence  keep sessions and messages over a restart. Written when the broker stops and, if `autosave` is set, after
                 each `autosave` changes, which is what survives kill9()
    tls          a Certificates: `port` speaks TLS with its server certificate (or with `certificate`)
    certificate  the Certificate to show
    require_certificate  clients must show one that the authority signed
    users        {name: password}: nobody else may connect. None: everybody
    extra        further configuration lines; each replaces what `base` says for its keyword
    program      another mosquitto than the installed one

    port         where the service connects; plain_port: without TLS (the same one, unless tls), for the test's own clients
    """

    _OURS = {"listener", "port", "bind_address", "socket_domain", "persistence", "persistence_location", "persistence_file",
             "log_dest", "pid_file", "user", "allow_anonymous", "password_file", "acl_file", "cafile", "capath", "certfile",
             "keyfile", "crlfile", "require_certificate", "include_dir", "per_listener_settings"}

    def __init__(self, directory, *, base=None, persistence=True, autosave=None, tls=None, certificate=None,
                 require_certificate=False, users=None, extra=(), program=None):
        super().__init__("mosquitto", directory)
        self.base = base
        self.persistence, self.autosave = persistence, autosave
        self.tls, self.certificate, self.require_certificate = tls, certificate or (tls and tls.server), require_certificate
        self.users = users
        self.extra = list(extra)
        self.program = program
        self.port = self.plain_port = None
        self.config = self.directory / "mosquitto.conf"

    @property
    def version(self):
        """As in (2, 0, 11)."""
        return version_of(self._its_program())

    def _its_program(self):
        return self.program or _program("MQTT2MONGO_MOSQUITTO", "mosquitto")

    def _text(self, port):
        base = self.base
        if base is None:
            base = RECOMMENDED.read_text() if RECOMMENDED.exists() else MINIMAL
        lines = [f"user {getpass.getuser()}", "log_dest stderr", f"allow_anonymous {'false' if self.users else 'true'}",
                 f"persistence {'true' if self.persistence else 'false'}", f"persistence_location {self.directory}/"]
        if self.autosave:
            lines += ["autosave_on_changes true", f"autosave_interval {self.autosave}"]
        if self.users:
            lines.append(f"password_file {self._password_file()}")
        replaced = self._OURS | {line.split()[0] for line in lines + self.extra if line.strip()}
        kept = [line for line in base.splitlines() if line.strip() and line.split()[0] not in replaced]
        if self.tls:
            lines.append(f"listener {self.plain_port} 127.0.0.1")
        lines.append(f"listener {port} 127.0.0.1")
        if self.tls:
            lines += [f"cafile {self.tls.ca.cert}", f"certfile {self.certificate.cert}", f"keyfile {self.certificate.key}",
                      f"require_certificate {'true' if self.require_certificate else 'false'}"]
        return "\n".join(kept + lines + self.extra) + "\n"

    def _password_file(self):
        path = self.directory / "passwords"
        path.unlink(missing_ok=True)
        for index, (name, password) in enumerate(self.users.items()):
            subprocess.run(["mosquitto_passwd", *(["-c"] if index == 0 else []), "-b", path, name, password], check=True,
                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=10)
        return path

    def start(self):
        """Start (again) with the present settings, wait until it accepts."""
        def argv(port):
            if not self.tls:
                self.plain_port = port
            elif self.plain_port is None:
                self.plain_port = free_port()
            self.config.write_text(self._text(port))
            return [self._its_program(), "-c", self.config]

        self.port = _start_listening(self, argv, self.port, 10)
        return self

    def stop(self):
        """SIGTERM: it writes its sessions, if persistent, and ends."""
        status = self.terminate()
        assert status == 0, f"mosquitto exited with {status}:\n{self.tail()}"

    def restart(self):
        """End it, if it still runs, and start it on the same port and data."""
        if self.alive:
            self.stop()
        return self.start()


class Mongod(Process):
    """A replica set of one, so that writes can be w:majority, j:true.

    auth         user "tester", password "secret" or `password` (in the URI); nothing goes without
    failpoints   the test commands too: configureFailPoint makes the server fail or stall on demand
    extra        further arguments
    set_name     of the replica set

    uri          what the service gets;  client()  a pymongo client of the test's own
    """

    USER, PASSWORD = "tester", "secret"

    def __init__(self, directory, *, auth=False, password=None, failpoints=True, extra=(), set_name="rs0"):
        super().__init__("mongod", directory)
        self.set_name = set_name
        self.auth, self.failpoints, self.extra = auth, failpoints, list(extra)
        self.PASSWORD = password or self.PASSWORD
        self.port = None
        self.data = self.directory / "data"
        self.data.mkdir()
        self.key_file = self.directory / "key"
        if auth:
            self.key_file.write_text("mqtt2mongo test key 0123456789\n")
            self.key_file.chmod(0o600)
        self._clients = []

    @property
    def log(self):
        """mongod logs JSON lines to standard output."""
        return super().log + (self.stdout.read_text(errors="replace") if self.stdout.exists() else "")

    @property
    def uri(self):
        user = f"{self.USER}:{self.PASSWORD}@" if self.auth else ""
        return f"mongodb://{user}127.0.0.1:{self.port}/?replicaSet={quote(self.set_name)}"

    def client(self, **options):
        """A pymongo client; closed with the server. It gives up finding the server after 5 s."""
        client = pymongo.MongoClient(self.uri, **{"serverSelectionTimeoutMS": 5000, **options})
        self._clients.append(client)
        return client

    def launch(self):
        """Start (again), wait until it accepts connections."""
        def argv(port):
            arguments = [_program("MQTT2MONGO_MONGOD", "mongod"), "--replSet", self.set_name, "--bind_ip", "127.0.0.1", "--port", port,
                         "--dbpath", self.data, "--nounixsocket", "--wiredTigerCacheSizeGB", "0.25", "--oplogSize", "64"]
            for parameter in ["ttlMonitorEnabled=false", "diagnosticDataCollectionEnabled=false",
                              *(["enableTestCommands=1"] if self.failpoints else [])]:
                arguments += ["--setParameter", parameter]
            if self.auth:
                arguments += ["--keyFile", self.key_file]
            return arguments + self.extra

        self.port = _start_listening(self, argv, self.port, 30)
        return self

    def start(self):
        """Start (again), wait until it takes writes."""
        first = self.port is None
        self.launch()
        if first:
            self._initiate()
        with pymongo.MongoClient(self.uri, serverSelectionTimeoutMS=500) as client:
            wait_until(lambda: self._primary(client), 30, lambda: f"mongod is primary\n{self.tail()}")
        return self

    def _initiate(self):
        with pymongo.MongoClient("127.0.0.1", self.port, directConnection=True, serverSelectionTimeoutMS=10000) as client:
            members = [{"_id": 0, "host": f"127.0.0.1:{self.port}"}]
            client.admin.command("replSetInitiate", {"_id": self.set_name, "members": members})
            if self.auth:
                self.create_user(client)

    def create_user(self, client):
        """The localhost exception: the first user may be made by anybody here."""
        wait_until(lambda: self._primary(client), 30, "mongod is primary")
        client.admin.command("createUser", self.USER, pwd=self.PASSWORD, roles=["root"])

    @staticmethod
    def _primary(client):
        try:
            return client.admin.command("hello")["isWritablePrimary"]
        except pymongo.errors.PyMongoError:
            return False

    def fail(self, mode, commands, **data):
        """Make `commands` (such as ["insert"]) fail: mode {"times": 1}, "alwaysOn" or "off"; data for instance errorCode=91,
        closeConnection=True, or blockConnection=True, blockTimeMS=3000; appName limits it to one client."""
        with pymongo.MongoClient(self.uri, serverSelectionTimeoutMS=5000) as client:
            command = {"configureFailPoint": "failCommand", "mode": mode}
            if mode != "off":
                command["data"] = {"failCommands": commands, **data}
            client.admin.command(command)

    def stop(self):
        """SIGTERM, and wait. It may first wait ~10 s for a secondary that is not there to catch up."""
        status = self.terminate(timeout=30)
        assert status == 0, f"mongod exited with {status}:\n{self.tail()}"

    def restart(self):
        """End it, if it still runs, and start it on the same port and data."""
        if self.alive:
            self.stop()
        return self.start()

    def end(self):
        for client in self._clients:
            client.close()
        super().end()


class ReplicaSet:
    """Several mongods, of which one is primary and takes writes; with the arguments of Mongod. `members` are its Mongods.

    An election begins 2 s after a primary has fallen silent (by default it is 10 s).
    """

    def __init__(self, directory, *, size=3, **options):
        self.members = []
        for number in range(size):
            (Path(directory) / f"member-{number}").mkdir()
            self.members.append(Mongod(Path(directory) / f"member-{number}", **options))
        self._clients = []

    @property
    def uri(self):
        first = self.members[0]
        user = f"{first.USER}:{first.PASSWORD}@" if first.auth else ""
        return f"mongodb://{user}{','.join(f'127.0.0.1:{member.port}' for member in self.members)}/?replicaSet=rs0"

    def client(self, **options):
        """As Mongod.client()."""
        client = pymongo.MongoClient(self.uri, **{"serverSelectionTimeoutMS": 30000, **options})
        self._clients.append(client)
        return client

    def start(self):
        """Start all, for the first time, and wait for a primary."""
        for member in self.members:
            member.launch()
        first = self.members[0]
        with pymongo.MongoClient("127.0.0.1", first.port, directConnection=True, serverSelectionTimeoutMS=10000) as client:
            members = [{"_id": number, "host": f"127.0.0.1:{member.port}"}
                       for number, member in enumerate(self.members)]
            client.admin.command("replSetInitiate", {"_id": "rs0", "members": members,
                                                     "settings": {"electionTimeoutMillis": 2000}})
            if first.auth:
                first.create_user(client)
        self.wait_primary()
        return self

    def primary(self):
        """The member that takes writes, or None."""
        for member in self.members:
            if member.alive:
                options = {"username": member.USER, "password": member.PASSWORD} if member.auth else {}
                with pymongo.MongoClient("127.0.0.1", member.port, directConnection=True, serverSelectionTimeoutMS=1000,
                                         **options) as client:
                    try:
                        if client.admin.command("hello")["isWritablePrimary"]:
                            return member
                    except pymongo.errors.PyMongoError:
                        pass
        return None

    def wait_primary(self, other_than=None, timeout=60):
        """Wait for a primary that is not `other_than`, and return it."""
        def found():
            member = self.primary()
            return member if member is not other_than else None

        return wait_until(found, timeout, "there is a new primary", interval=0.1)

    def step_down(self):
        """The primary steps down, for 10 s at least: the member that was it."""
        member = self.wait_primary()
        with pymongo.MongoClient(self.uri, serverSelectionTimeoutMS=5000) as client:
            client.admin.command("replSetStepDown", 10, secondaryCatchUpPeriodSecs=5)
        return member

    def kill_primary(self):
        """SIGKILL for the primary: the member that was it. launch() brings it back."""
        member = self.wait_primary()
        member.kill9()
        return member

    @property
    def alive(self):
        return all(member.alive for member in self.members)

    @property
    def log(self):
        return "".join(member.log for member in self.members)

    def end(self):
        for client in self._clients:
            client.close()
        for member in self.members:
            member.end()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()
