"""The fixtures themselves, against the real servers: what the other tests stand on."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pymongo
import pytest

import clients
import skips
from processes import ROOT, Process, accepts, free_port, wait_until
from service import Service, check_sums

pytestmark = pytest.mark.not_sanitized("it is about the tests' own tools")


def test_a_message_goes_through_the_broker(mosquitto):
    broker = mosquitto()
    with clients.Subscriber(broker.port, "sensors/#") as subscriber:
        acknowledged = clients.publish(broker.port, ["one", "two"], "sensors/a")
        messages = subscriber.wait(2)
    assert acknowledged == ["one", "two"]
    assert [(message.topic, message.payload) for message in messages] == [("sensors/a", b"one"), ("sensors/a", b"two")]
    assert "New client connected" in broker.log


@pytest.mark.parametrize("protocol", [5, 4])
def test_a_backlog_survives_a_restart_of_the_broker(mosquitto, protocol):
    broker = mosquitto(extra=["max_queued_messages 0"])
    clients.create_session(broker.port, "backlog", "sensors/#", protocol=protocol)
    acknowledged = clients.publish(broker.port, 2000, lambda index: f"sensors/{index % 7}")
    assert len(acknowledged) == 2000
    broker.restart()
    messages = clients.take_session(broker.port, "backlog", protocol=protocol)
    assert sorted(message.payload for message in messages) == sorted(acknowledged)
    assert not clients.take_session(broker.port, "backlog", quiet=0.2), "taking a session ends it"


def test_kill9_of_the_broker_keeps_what_it_saved(mosquitto):
    broker = mosquitto(autosave=1)
    clients.create_session(broker.port, "backlog", "sensors/#")
    assert len(clients.publish(broker.port, 50)) == 50
    acknowledged, saved = time.time(), broker.directory / "mosquitto.db"
    clients.publish(broker.port, 1, topic="elsewhere", retain=True)  # one change more: mosquitto acknowledges before it writes
    wait_until(lambda: saved.exists() and saved.stat().st_mtime >= acknowledged, 10, "the broker has saved")
    port = broker.port
    broker.kill9()
    assert not accepts(port)
    assert broker.restart().port == port
    assert len(clients.take_session(broker.port, "backlog")) == 50


def test_publish_tells_what_was_acknowledged_when_the_broker_dies(mosquitto):
    broker = mosquitto()
    join = clients.publisher_thread(broker.port, 100_000, pace=2000)
    with clients.Subscriber(broker.port) as subscriber:
        subscriber.wait(100)
        broker.kill9()
    assert 1 <= len(join()) < 100_000


def test_publish_more_messages_than_there_are_packet_identifiers(mosquitto):
    broker = mosquitto()
    assert len(set(clients.publish(broker.port, 70_000, window=1000))) == 70_000


def test_a_frozen_broker_says_nothing(mosquitto):
    broker = mosquitto()
    broker.sigstop()
    with pytest.raises(AssertionError, match="no CONNACK"), clients.connected(broker.port, connect_timeout=0.5):
        pass
    broker.sigcont()
    assert clients.publish(broker.port, 1)


def test_broker_with_password(mosquitto):
    broker = mosquitto(users={"alice": "wonder land"})
    assert clients.publish(broker.port, 1, username="alice", password="wonder land")
    with pytest.raises(AssertionError, match="refused"):
        clients.publish(broker.port, 1, username="alice", password="wrong")
    with pytest.raises(AssertionError, match="refused"):
        clients.publish(broker.port, 1)


def test_broker_with_tls(mosquitto, certificates):
    broker = mosquitto(tls=certificates, require_certificate=True,
                       extra=[f"crlfile {certificates.revocation_list(certificates.issue('revoked'))}"])
    assert broker.port != broker.plain_port
    assert clients.publish(broker.port, 1, tls=certificates)
    assert clients.publish(broker.plain_port, 1)


@pytest.mark.parametrize("which", ["wrong", "expired"])
def test_a_bad_server_certificate_is_refused(mosquitto, certificates, which):
    broker = mosquitto(tls=certificates, certificate=getattr(certificates, which))
    with pytest.raises(OSError, match="(?i)certificate"):
        clients.publish(broker.port, 1, tls=certificates)


def test_a_durable_write(mongo, collection):
    durable = collection.with_options(write_concern=pymongo.WriteConcern("majority", j=True))
    assert durable.insert_one({"_id": 1}).acknowledged
    assert mongo.admin.command("hello")["setName"] == "rs0"


def test_each_test_has_an_empty_database(collection):
    assert collection.count_documents({}) == 0


def test_kill9_of_mongod_keeps_durable_writes(fresh_mongod):
    server = fresh_mongod()
    durable = server.client().test.get_collection("kept", write_concern=pymongo.WriteConcern("majority", j=True))
    durable.insert_many([{"_id": number} for number in range(100)])
    port = server.port
    server.kill9()
    server.restart()
    assert server.port == port
    assert server.client().test.kept.count_documents({}) == 100


def test_mongod_with_users(fresh_mongod):
    server = fresh_mongod(auth=True)
    server.client().test.kept.insert_one({})
    with pymongo.MongoClient("127.0.0.1", server.port, directConnection=True) as stranger, \
            pytest.raises(pymongo.errors.OperationFailure, match="requires authentication"):
        stranger.test.kept.insert_one({})
    server.restart()
    assert server.client().test.kept.count_documents({}) == 1


def test_a_frozen_mongod_says_nothing(fresh_mongod):
    server = fresh_mongod()
    server.sigstop()
    with pytest.raises(pymongo.errors.ConnectionFailure):
        server.client(serverSelectionTimeoutMS=500, socketTimeoutMS=500, connectTimeoutMS=500).admin.command("ping")
    server.sigcont()
    server.client().admin.command("ping")


def test_mongod_fails_on_demand(fresh_mongod):
    server = fresh_mongod()
    collection = server.client(retryWrites=False).test.kept
    server.fail({"times": 1}, ["insert"], errorCode=13)
    with pytest.raises(pymongo.errors.OperationFailure, match="failCommand"):
        collection.insert_one({})
    collection.insert_one({})


# A stand-in for the service: it knows the flags' shape, the signals and the sums' form, and nothing else.
STAND_IN = """\
#!{python}
import json, signal, sys, time
sums = dict(received=3, recovered_from_spool=0, stored=2, duplicates=1, dead_lettered=0, spooled=0, dropped=0, returned=0,
            in_flight=0)
def show(*_):
    print(json.dumps(dict(sums=dict(consumer=sums, loop=dict(longest_iteration_ms=1)))), flush=True)
def end(*_):
    show()
    sys.exit(0)
signal.signal(signal.SIGUSR1, show)
signal.signal(signal.SIGTERM, end)
print(json.dumps(dict(time="now", level="info", room="main", message=" ".join(sys.argv[1:]))), file=sys.stderr, flush=True)
if "--complain" in sys.argv:
    print("src/json.c:1: runtime error: signed integer overflow", file=sys.stderr, flush=True)
if "--fail" in sys.argv:
    sys.exit(2)
time.sleep(60)
"""


@pytest.fixture
def stand_in(tmp_path):
    program = tmp_path / "build" / "src" / "mqtt2mongo"
    program.parent.mkdir(parents=True)
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    return tmp_path / "build"


def test_service_life(service, stand_in):
    running = service(build=stand_in, settings={"consumer.topic": "a/#", "mqtt.password_file": "x", "log.level": None})
    running.wait_log("consumer-topic")
    assert running.records[0]["message"] == \
        f"--role consumer --state-dir {running.state} --log-format json --consumer-topic a/# --mqtt-password-file x"
    assert running.sums()["consumer"]["stored"] == 2
    assert running.wait_stored(2)["loop"]["longest_iteration_ms"] == 1
    assert running.stop()["consumer"]["received"] == 3
    assert running.rss_peak() > 1_000_000
    running.start().kill9()
    assert running.popen.returncode == -9


def test_service_ends_by_itself(service, stand_in):
    service(build=stand_in, args=["--fail"]).finish(expect=2, sums=False)
    with pytest.raises(AssertionError, match="exit status 2, not 0"):
        service(build=stand_in, args=["--fail"]).finish()


def test_a_sanitizer_report_fails_the_test(tmp_path, stand_in):
    running = Service(tmp_path, build=stand_in, args=["--complain"]).start()
    running.wait_log("runtime error")
    with pytest.raises(AssertionError, match="signed integer overflow"):
        running.stop()
    running.popen = None
    with pytest.raises(AssertionError, match="signed integer overflow"):
        running.end()


def test_sums_that_do_not_add_up_are_noticed():
    sums = {"received": 3, "recovered_from_spool": 0, "stored": 2, "duplicates": 0, "dead_lettered": 0, "spooled": 0,
            "dropped": {"overload": 1}, "returned": 0, "in_flight": 0}
    check_sums({"consumer": sums})
    with pytest.raises(AssertionError, match="3 came and 2 went"):
        check_sums({"consumer": {**sums, "dropped": {}}})


def test_wait_until_says_what_it_waited_for():
    with pytest.raises(AssertionError, match="not within .* the moon is blue"):
        wait_until(lambda: False, 0.05, "the moon is blue")


def test_nothing_outlives_its_test(tmp_path):
    with Process("sleep", tmp_path) as process:
        process.spawn(["sh", "-c", "sleep 1000 & wait"])
        pid = process.pid
        group = wait_until(lambda: subprocess.run(["pgrep", "-g", str(pid)], capture_output=True, text=True, check=False)
                           .stdout.split()[1:])
        process.sigstop()
    wait_until(lambda: not any(Path(f"/proc/{each}/cwd").exists() and os.path.realpath(f"/proc/{each}/cwd") == str(tmp_path)
                               for each in group))


def _pytest(tmp_path, test, *arguments):
    """Run a pytest of its own, with our conftest, on the given test."""
    here = Path(__file__).parent
    (tmp_path / "conftest.py").write_text((here.parent / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(textwrap.dedent(test))
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {here}\n")
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path), *arguments]


def test_a_skip_that_is_not_listed_fails(tmp_path):
    command = _pytest(tmp_path, """
        import pytest
        def test_skips():
            pytest.skip("why not")
        @pytest.mark.skip
        def test_marked():
            pass
        @pytest.mark.xfail
        def test_known():
            assert False
        """)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "1 failed, 1 xfailed, 1 error" in done.stdout, done.stdout
    assert "which tests/skips.txt does not allow" in done.stdout


def test_skip_list(tmp_path):
    path = tmp_path / "skips.txt"
    path.write_text("# why\n\nintegration/test_x.py::test_y  no such server\n")
    assert skips.allowed("integration/test_x.py::test_y[5]", skips.listed(path))
    assert not skips.allowed("integration/test_x.py::test_z", skips.listed(path))


@pytest.mark.parametrize("number", [15, 9])
def test_servers_end_with_pytest(tmp_path, number):
    """SIGTERM takes the fixtures down; after SIGKILL the kernel does."""
    inner = tmp_path / "inner"
    inner.mkdir()
    command = _pytest(inner, f"""
        import time
        def test_waits(mosquitto):
            with open({str(tmp_path / "port")!r} + ".new", "w") as file:
                file.write(str(mosquitto().port))
            import os
            os.rename({str(tmp_path / "port")!r} + ".new", {str(tmp_path / "port")!r})
            time.sleep(60)
        """)
    with Process("pytest", tmp_path) as process:
        process.spawn(command)
        port = int(wait_until(lambda: (tmp_path / "port").exists() and (tmp_path / "port").read_text(), 20))
        assert accepts(port)
        process.signal(number)
        process.wait_exit(10)
        wait_until(lambda: not accepts(port), 5, "the broker is gone")


def test_free_ports_are_free():
    begun = time.monotonic()
    assert not accepts(free_port())
    assert time.monotonic() - begun < 1


def test_the_demo_builds_the_program_alone(tmp_path):
    """Whoever only wants to see it run need not have what the tests are compiled with. This ninja notes what it was asked for."""
    ninja = tmp_path / "ninja"
    ninja.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\nexit 1\n')
    ninja.chmod(0o755)
    done = subprocess.run([ROOT / "scripts" / "demo"], capture_output=True, text=True, check=False, timeout=60,
                          env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.returncode == 1, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line.split()[2:] for line in asked] == [["src/mqtt2mongo"]], asked
