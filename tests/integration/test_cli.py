"""The command line from end to end: exit statuses, what is said about mistakes, and which setting wins."""

import json
import re
import subprocess

import pytest

import clients
from processes import ROOT, free_port
from service import BUILD

PROGRAM = BUILD / "src" / "mqtt2mongo"


def run(*arguments, env=None, cwd=None):
    """(exit status, standard output, standard error) of a command that ends by itself. Without the driver's file in /dev/shm,
    about which it may warn before the program begins."""
    environment = {"HOME": "/nonexistent", "MONGOC_DISABLE_SHM": "1", **(env or {})}
    done = subprocess.run([PROGRAM, *map(str, arguments)], env=environment, cwd=cwd,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, done.stdout, done.stderr


def test_without_a_role():
    """What somebody sees who just tries it: three commands, one of which is theirs."""
    status, output, errors = run()
    assert (status, output) == (2, "")
    commands = [line.strip() for line in errors.splitlines() if line.startswith("  ")]
    assert [command.split()[:3] for command in commands] == [
        ["mqtt2mongo", "--role", role] for role in ("publisher", "consumer", "both")]
    for command in commands:  # each is one that works: it is no mistake in the configuration
        arguments = command.split()[1:]
        status, _, errors = run(*arguments, "--check", "--mqtt-port", free_port(),
                                env={"MQTT2MONGO_MONGODB_URI": "mongodb://127.0.0.1:1/?serverSelectionTimeoutMS=100"}
                                if "--mongodb-uri" not in arguments else {})
        assert status == 1 and "error:" not in errors, errors


@pytest.mark.parametrize("flag, expected", [("--help", "Usage: mqtt2mongo"), ("-h", "Usage: mqtt2mongo"),
                                            ("--version", "libmosquitto 2."), ("--man", ".TH MQTT2MONGO 1"),
                                            ("--markdown", "| `mqtt.host` |")])
def test_what_only_prints(flag, expected):
    status, output, errors = run(flag)
    assert (status, errors) == (0, "") and expected in output


def test_help_with_a_reader_that_goes_away():
    done = subprocess.run(["bash", "-c", 'set -o pipefail; "$0" --help | head -1', PROGRAM], capture_output=True, text=True,
                          timeout=10, check=False)
    assert done.stdout.startswith("mqtt2mongo ") and "rror" not in done.stderr


@pytest.mark.parametrize("arguments, words", [
    (["--mqtt-hots", "x"], ["unknown flag --mqtt-hots", "--mqtt-host"]),
    (["--mqtt.port=1"], ["unknown flag --mqtt.port", "--mqtt-port"]),
    (["--rate", "5/s"], ["unknown flag --rate", "--publisher-rate"]),
    (["--mqtt-port", "70000"], ["--mqtt-port", "70000", "1 to 65535"]),
    (["--publisher-rate", "0"], ["--publisher-rate", "0.1/s", "20000/s"]),
    (["--mqtt-keepalive", "60"], ["--mqtt-keepalive", "60s"]),
    (["--role", "produce"], ["--role", "publisher", "consumer", "both"]),
    (["-c", "/no/such/file.json"], ["/no/such/file.json", "No such file"]),
    (["--mongodb-write-concern-w", "0"], ["--mongodb-write-concern-w", "0 is refused"]),
    (["--consumer-topic", "a/#", "--consumer-qos0-topic", "a/fast"], ["--consumer-qos0-topic", "stored twice", "narrow one"]),
    (["--consumer-topic", "a/#", "--consumer-topic", "b/#"], ["--consumer-topic", "given twice", "one that matches all"]),
])
def test_mistakes(arguments, words):
    status, output, errors = run("--role", "both", *arguments)
    assert (status, output) == (2, "")
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    for word in words:
        assert word in said[0]


def test_a_mistake_in_the_file_has_its_line(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text('// a comment\n{\n\t"role": "consumer",\n\t"mqtt": {\n\t\t"prot": 1883,\n\t\t"keepalive": "soon"\n\t},\n'
                    '\t"consumer": { "workers": 0 }\n}\n')
    status, output, errors = run("-c", path)
    assert (status, output) == (2, "")
    said = {int(line): text for line, text in re.findall(rf"^error: {path}:(\d+): (.*)$", errors, re.M)}
    assert set(said) == {5, 6, 8}, errors
    assert "mqtt.prot" in said[5] and "mqtt.port" in said[5]
    assert "mqtt.keepalive" in said[6] and "soon" in said[6]
    assert "consumer.workers" in said[8] and "1 to 64" in said[8]

    path.write_text('{\n"role": "consumer",\n}\n')
    status, _, errors = run("-c", path)
    assert status == 2 and f"{path}:3" in errors, errors


def test_the_stronger_source_wins(mosquitto, mongod, mongo, service, database, tmp_path):
    """Default, file, environment and flag, each in force where nothing stronger is; seen in what is stored where."""
    broker = mosquitto()
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({
        "mqtt": {"keepalive": "21s", "session_expiry": "1h"}, "log": {"format": "text"},
        "mongodb": {"database": "never"}, "consumer": {"topic": "file/#", "collection": "from_file", "dead_letter": "d_file"}}))
    running = service(broker=broker, mongod=mongod, database=database, args=["-c", path], env={
        "MQTT2MONGO_MONGODB_DATABASE": "never", "MQTT2MONGO_CONSUMER_TOPIC": "environment/#",
        "MQTT2MONGO_CONSUMER_COLLECTION": "from_environment", "MQTT2MONGO_UNKNOWN": "x", "MQTT2MONGO_MQTT_KEEPALIVE": "22s"},
        settings={"consumer.collection": "from_flag", "mqtt.keepalive": "23s"})
    running.wait_log("subscribed to environment/#")
    clients.publish(broker.port, ["1", "2", "bad"], "environment/x")
    clients.publish(broker.port, ["3"], "file/x")
    running.wait_stored(2)
    assert "keepalive 23 s" in running.log and "expires after 3600 s" in running.log and "receive maximum 800" in running.log
    assert [record for record in running.records if record["level"] == "warn" and "MQTT2MONGO_UNKNOWN has no effect" in record["message"]]
    assert running.stop()["consumer"]["received"] == 3
    assert sorted(mongo[database].list_collection_names()) == ["d_file", "from_flag"]
    assert sorted(document["payload"] for document in mongo[database].from_flag.find()) == [1, 2]
    assert "never" not in mongo.list_database_names()


def test_the_example_file(mosquitto, mongod, service, database, collection):
    """config/mqtt2mongo.json as it is, but for where broker and database are; and it says what the defaults are."""
    running = service(broker=mosquitto(), mongod=mongod, database=database, args=["-c", ROOT / "config" / "mqtt2mongo.json"],
                      settings={"role": None, "publisher.count": 5, "publisher.rate": "100/s"})
    assert running.finish()["consumer"]["stored"] == 5
    assert collection.count_documents({}) == 5
    assert "warning" not in running.log and '"warn"' not in running.log

    def check(*arguments):
        return run("--check", "--role", "both", "--state-dir", running.state, "--mqtt-port", running.settings["mqtt.port"],
                   "--mongodb-uri", "mongodb://127.0.0.1:1/?serverSelectionTimeoutMS=100", *arguments)

    plain, with_file = check(), check("-c", ROOT / "config" / "mqtt2mongo.json")
    assert plain[0] == with_file[0] == 1  # the database is not there
    assert plain[1].splitlines()[1:] == with_file[1].splitlines()[1:]


def test_exit_statuses(mosquitto, mongod, service, database):
    """0 well, 1 something failed or is missing, 2 the configuration."""
    broker = mosquitto()
    running = service(broker=broker, mongod=mongod, database=database, role="both",
                      settings={"publisher.count": 3, "publisher.rate": "100/s"})
    running.finish()
    service(broker=broker, mongod=mongod, database=database, role="publisher", settings={"mqtt.keepalive": "1s"}).finish(
        expect=2, sums=False)
    service(broker=broker, mongod=mongod, args=["--check"], settings={"mqtt.port": free_port()}).finish(expect=1, sums=False)
    service(broker=broker, settings={"state_dir": "/proc/nothing"}).finish(expect=1, sums=False)
