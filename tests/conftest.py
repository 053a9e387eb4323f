"""Fixtures: real servers and the real program, each in a directory of the test's own; nothing outlives its test.

    mosquitto(...)      starts a Mosquitto (servers.py); arguments are Mosquitto's
    shared_mosquitto(...)  the same, of a version whose shared subscriptions keep durable sessions; skips without one
    mongod              the session's Mongod, shared: do not stop it; each test has a `database` of its own on it
    fresh_mongod(...)   starts a Mongod of the test's own, to be killed and restarted
    replica_set(...)    starts a ReplicaSet of three
    database            name of a database that is empty, and dropped afterwards
    collection          pymongo collection: the default one of `database`
    certificates        Certificates (certificates.py), made once a session
    service(...)        starts a Service (service.py)

With started=False these functions only make it.
"""

import contextlib
import re
import signal

import pytest

from certificates import Certificates
from servers import Mongod, Mosquitto, ReplicaSet, shared_broker
from service import Service
from skips import pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401 (hooks, found by name)


def pytest_configure():
    """Ended from outside (a time limit on the whole run), pytest still takes its servers down."""
    def terminated(*_):
        pytest.exit("terminated", returncode=143)

    signal.signal(signal.SIGTERM, terminated)


@pytest.fixture
def directory(tmp_path):
    """A function that makes numbered directories: directory("mosquitto") → …/mosquitto-1."""
    def make(name):
        number = 1
        while (tmp_path / f"{name}-{number}").exists():
            number += 1
        path = tmp_path / f"{name}-{number}"
        path.mkdir()
        return path

    return make


def _factory(make):
    """A fixture body: yields a function that makes and starts processes; ends them all, the last made first."""
    with contextlib.ExitStack() as stack:
        def start(*, started=True, **options):
            process = stack.enter_context(make(**options))
            return process.start() if started else process

        yield start


@pytest.fixture
def mosquitto(directory):
    yield from _factory(lambda **options: Mosquitto(directory("mosquitto"), **options))


@pytest.fixture
def shared_mosquitto(directory):
    program = shared_broker()
    if program is None:
        pytest.skip("no mosquitto from 2.0.12 on: scripts/setup.sh fetches Debian's backport, if it can be had")
    yield from _factory(lambda **options: Mosquitto(directory("mosquitto"), program=program, **options))


@pytest.fixture(scope="session")
def mongod(tmp_path_factory):
    with Mongod(tmp_path_factory.mktemp("mongod")) as server:
        yield server.start()


@pytest.fixture
def fresh_mongod(directory):
    yield from _factory(lambda **options: Mongod(directory("mongod"), **options))


@pytest.fixture
def replica_set(directory):
    yield from _factory(lambda **options: ReplicaSet(directory("replica-set"), **options))


@pytest.fixture
def database(mongod, request):
    number = getattr(request.session, "databases", 0) + 1
    request.session.databases = number
    name = f"{re.sub(r'[^A-Za-z0-9_]', '_', request.node.name)[:40]}_{number}"
    yield name
    with contextlib.closing(mongod.client()) as client:
        client.drop_database(name)


@pytest.fixture
def mongo(mongod):
    """A pymongo client to the shared mongod."""
    with contextlib.closing(mongod.client()) as client:
        yield client


@pytest.fixture
def collection(mongo, database):
    return mongo[database].messages


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def service(directory):
    yield from _factory(lambda **options: Service(directory("service"), **options))
