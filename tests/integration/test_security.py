"""Who may connect, TLS, and secrets: what goes wrong is said once, with its remedy; what is secret is said nowhere."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time
from pathlib import Path

import pytest
from bson import json_util

import clients
from processes import ROOT, TIME_FACTOR, free_port, wait_until
from service import BUILD

NOBODY = 65534
SECRET = "Tr0ub4dor-and-3"  # no part of it is a word the program has


@pytest.fixture
def service(service):
    """As everywhere, but with shorter waits between attempts, unless the test says otherwise; and without the driver's file in
    /dev/shm, about which it may warn before the program begins when a killed process of the same id has left one."""
    def make(*, env=None, **options):
        return service(env={"MQTT2MONGO_MQTT_RECONNECT_MIN": "300ms", "MONGOC_DISABLE_SHM": "1", **(env or {})}, **options)

    return make


def complaints(running):
    return [record["message"] for record in running.records if record["level"] in ("warn", "error", "?")]


def stores(running, broker, count=5):
    """It works: messages go all the way."""
    running.wait_log("subscribed to")
    credentials = {"username": "u", "password": SECRET} if broker.users else {}
    assert len(clients.publish(broker.plain_port, count, **credentials)) == count
    running.wait_stored(count)


def connections(broker):
    """How often somebody has connected, also those whom TLS did not let through."""
    return len(re.findall("(?:New|Client) connection from", broker.log))


def check_refusal(running, words, broker=None):
    """One line with these words, a backoff, and a clean end."""
    begun = time.monotonic()
    wait_until(lambda: complaints(running), what=lambda: f"a complaint\n{running.tail()}", timeout=15)
    if broker:
        mark = connections(broker)
        # An attempt is two connections: one finds out whether anything is there. Up to now it was the first; two more.
        wait_until(lambda: connections(broker) >= mark + 4, 20, lambda: f"attempts\n{running.tail()}")
        assert time.monotonic() - begun > 0.4, "three attempts with at least 150 ms and 300 ms between them"
    said = complaints(running)
    assert len(said) == 1, said
    for word in words:
        assert word.lower() in said[0].lower(), said[0]
    assert "subscribed to" not in running.log
    running.stop()
    assert complaints(running) == said


# --- what the broker does not like ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize("settings", [
    {"mqtt.username": "u", "mqtt.password": "wrong"}, {"mqtt.username": "stranger", "mqtt.password": SECRET}, {}],
    ids=["password", "user", "anonymous"])
def test_wrong_credentials(mosquitto, mongod, service, database, settings, protocol):
    broker = mosquitto(users={"u": SECRET})
    running = service(broker=broker, mongod=mongod, database=database, settings={
        **settings, "mqtt.protocol": protocol}, env={"MQTT2MONGO_LOG_LEVEL": "debug"})
    words = ["consumer", f"127.0.0.1:{broker.port}", "refuses the connection", "mqtt.username", "mqtt.password"]
    if "mqtt.password" in settings:  # the warning about a secret in argv comes first, and is no JSON
        wait_until(lambda: len(complaints(running)) == 2, what=lambda: f"two complaints\n{running.tail()}")
        assert "--mqtt-password-file" in complaints(running)[0]
        assert all(word in complaints(running)[1] for word in words), complaints(running)
        running.stop()
        assert settings["mqtt.password"] not in running.log
    else:
        check_refusal(running, words, broker)


def test_right_credentials(mosquitto, mongod, service, database):
    broker = mosquitto(users={"u": SECRET})
    running = service(broker=broker, mongod=mongod, database=database, settings={"mqtt.username": "u"},
                      env={"MQTT2MONGO_MQTT_PASSWORD": SECRET})
    stores(running, broker)
    running.stop()
    assert not complaints(running)


def test_unknown_host(mongod, service, database):
    running = service(mongod=mongod, database=database, settings={"mqtt.host": "no-such-host.invalid"})
    check_refusal(running, ["no-such-host.invalid:1883", "cannot resolve", "mqtt.host"])


def test_closed_port(mongod, service, database):
    port = free_port()
    running = service(mongod=mongod, database=database, settings={"mqtt.host": "127.0.0.1", "mqtt.port": port})
    check_refusal(running, [f"127.0.0.1:{port}", "connection refused", "is the broker running", "mqtt.port"])


@contextlib.contextmanager
def listener(answer):
    """Something that is no broker: accepts, sends `answer` and hangs up. Yields its port and the moments of the connections."""
    moments = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    moments.append(time.monotonic())
                    with contextlib.suppress(OSError), connection:
                        connection.settimeout(0.5)
                        connection.recv(1000)
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1], moments
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["silence", "http"])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_a_port_that_is_no_broker(mongod, service, database, certificates, tls, answer):
    settings = {"mqtt.tls.enabled": "true", "mqtt.tls.ca": certificates.ca.cert} if tls else {}
    with listener(answer) as (port, _):
        running = service(mongod=mongod, database=database, settings={
            "mqtt.host": "127.0.0.1", "mqtt.port": port, **settings})
        check_refusal(running, [f"127.0.0.1:{port}", "TLS" if tls else "MQTT", "port"])


def test_the_waits_between_attempts_grow(mongod, service, database):
    """mqtt.reconnect.min, then about twice as long each time (a random half less), up to mqtt.reconnect.max."""
    with listener(b"") as (port, moments):
        running = service(mongod=mongod, database=database, settings={
            "mqtt.host": "127.0.0.1", "mqtt.port": port, "mqtt.reconnect.min": "400ms", "mqtt.reconnect.max": "1600ms"})
        wait_until(lambda: len(moments) >= 12, 20, lambda: f"six attempts: {moments}\n{running.tail()}")
        running.stop()
    attempts = moments[0:12:2]  # each is two connections
    waits = [later - before for before, later in zip(attempts, attempts[1:])]
    for wait, longest in zip(waits, [0.4, 0.8, 1.6, 1.6, 1.6]):
        assert longest / 2 - 0.05 < wait < longest + 0.3 * TIME_FACTOR, waits


def test_few_attempts_in_five_seconds(mosquitto, mongod, service, database):
    """With the default of mqtt.reconnect.min: at 0 s, then after at least 0.5 s, 1 s, 2 s."""
    broker = mosquitto(users={"u": SECRET})
    before = connections(broker)
    begun = time.monotonic()
    running = service(broker=broker, mongod=mongod, database=database, settings={"mqtt.reconnect.min": "1s"})
    wait_until(lambda: time.monotonic() - begun > 5, 10)
    assert 2 <= broker.log.count("not authorised") <= 5
    assert connections(broker) - before <= 10
    assert len(complaints(running)) == 1
    running.stop()


# --- TLS -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tls(certificates):
    return {"mqtt.tls.enabled": "true", "mqtt.tls.ca": certificates.ca.cert}


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_tls(mosquitto, mongod, service, database, certificates, tls, host, protocol):
    broker = mosquitto(tls=certificates)
    running = service(broker=broker, mongod=mongod, database=database, settings={
        **tls, "mqtt.host": host, "mqtt.protocol": protocol})
    stores(running, broker, 2000)
    assert "over TLS" in running.log
    running.stop()
    assert not complaints(running)


def test_tls_with_both_roles(mosquitto, mongod, service, database, certificates, tls):
    running = service(broker=mosquitto(tls=certificates), mongod=mongod, database=database, role="both", settings={
        **tls, "publisher.count": 2000, "publisher.rate": "5000/s"})
    assert running.finish()["consumer"]["stored"] == 2000


def test_tls_with_the_authorities_of_the_system(mosquitto, mongod, service, database, certificates):
    broker = mosquitto(tls=certificates)
    running = service(broker=broker, mongod=mongod, database=database, settings={"mqtt.tls.enabled": "true"},
                      env={"SSL_CERT_FILE": str(certificates.ca.cert)})
    stores(running, broker)
    running.stop()


def test_tls_with_a_client_certificate(mosquitto, mongod, service, database, certificates, tls):
    broker = mosquitto(tls=certificates, require_certificate=True)
    running = service(broker=broker, mongod=mongod, database=database, settings={
        **tls, "mqtt.tls.cert": certificates.client.cert, "mqtt.tls.key": certificates.client.key})
    stores(running, broker)
    running.stop()
    assert not complaints(running)


def test_tls_without_the_client_certificate(mosquitto, mongod, service, database, certificates, tls):
    broker = mosquitto(tls=certificates, require_certificate=True)
    running = service(broker=broker, mongod=mongod, database=database, settings=tls)
    check_refusal(running, ["TLS", "certificate", "mqtt.tls.cert"], broker)


def test_tls_with_the_wrong_authority(mosquitto, mongod, service, database, certificates, tls):
    broker = mosquitto(tls=certificates)
    running = service(broker=broker, mongod=mongod, database=database, settings={
        **tls, "mqtt.tls.ca": certificates.other_ca.cert})
    check_refusal(running, ["TLS failed", "certificate", "mqtt.tls.ca"], broker)


def test_tls_with_a_self_signed_certificate(mosquitto, mongod, service, database, certificates, tls):
    """As many home brokers have one. The remedy that the line names is one."""
    broker = mosquitto(tls=certificates, certificate=certificates.self_signed)
    running = service(broker=broker, mongod=mongod, database=database, settings=tls)
    check_refusal(running, ["TLS failed", "self-signed", "mqtt.tls.ca"], broker)
    running.settings["mqtt.tls.ca"] = certificates.self_signed.cert
    running.start()
    stores(running, broker)
    running.stop()


def test_tls_with_the_name_of_another_host(mosquitto, mongod, service, database, certificates, tls):
    broker = mosquitto(tls=certificates, certificate=certificates.wrong)
    running = service(broker=broker, mongod=mongod, database=database, settings=tls)
    check_refusal(running, ["TLS failed", "host name", "mqtt.host"], broker)


def test_tls_insecure_does_not_look_at_the_name(mosquitto, mongod, service, database, certificates, tls):
    """But still at who signed the certificate."""
    broker = mosquitto(tls=certificates, certificate=certificates.wrong)
    running = service(broker=broker, mongod=mongod, database=database, settings={**tls, "mqtt.tls.insecure": "true"})
    stores(running, broker)
    running.stop()
    said = complaints(running)
    assert len(said) == 1 and "mqtt-tls-insecure" in said[0]

    running.settings["mqtt.tls.ca"] = certificates.other_ca.cert
    mark = running.mark()
    running.start().wait_log("TLS failed", after=mark)
    running.stop()


def test_tls_with_an_expired_certificate(mosquitto, mongod, service, database, certificates, tls):
    broker = mosquitto(tls=certificates, certificate=certificates.expired)
    running = service(broker=broker, mongod=mongod, database=database, settings=tls)
    check_refusal(running, ["TLS failed", "certificate", "expired"], broker)


def test_tls_to_a_port_without(mosquitto, mongod, service, database, tls):
    broker = mosquitto()
    running = service(broker=broker, mongod=mongod, database=database, settings=tls)
    check_refusal(running, ["TLS", "mqtt.port", "mqtt.tls.enabled"], broker)


def test_no_tls_to_a_port_with(mosquitto, mongod, service, database, certificates):
    broker = mosquitto(tls=certificates)
    running = service(broker=broker, mongod=mongod, database=database)
    check_refusal(running, ["TLS", "port"], broker)


@pytest.mark.parametrize("key", ["mqtt.tls.ca", "mqtt.tls.cert", "mqtt.tls.key"])
def test_a_file_that_is_no_pem(mosquitto, mongod, service, database, certificates, tls, tmp_path, key):
    """Readable, so that start-up takes it, but of no use."""
    broker = mosquitto(tls=certificates, require_certificate=True)
    rubbish = tmp_path / "rubbish.pem"
    rubbish.write_text("rubbish\n")
    rubbish.chmod(0o600)
    running = service(broker=broker, mongod=mongod, database=database, settings={
        **tls, "mqtt.tls.cert": certificates.client.cert, "mqtt.tls.key": certificates.client.key, key: rubbish})
    check_refusal(running, ["TLS", key])


# --- secrets ---------------------------------------------------------------------------------------------------------------


def check_silent(running, *secrets):
    texts = {"standard output": running.stdout.read_text(), "standard error": running.log}
    for path in running.state.rglob("*"):
        texts[str(path)] = path.read_text(errors="replace") if path.is_file() else ""
    for secret in secrets:
        for where, text in texts.items():
            assert secret not in text, f"a secret in {where}"


def command_line(running):
    return Path(f"/proc/{running.pid}/cmdline").read_bytes().decode()


@pytest.mark.parametrize("way", ["flag", "equals", "environment", "file", "config"])
def test_the_password_is_said_nowhere(mosquitto, mongod, service, database, tmp_path, way):
    broker = mosquitto(users={"u": SECRET})
    file = tmp_path / "password"
    file.write_text(f"{SECRET}\n")
    file.chmod(0o600)
    config = tmp_path / "config.json"
    config.write_text('{"mqtt": {"password": "%s"}}' % SECRET)
    config.chmod(0o600)
    settings, env, args = {
        "flag": ({"mqtt.password": SECRET}, {}, []), "equals": ({}, {}, [f"--mqtt-password={SECRET}"]),
        "environment": ({}, {"MQTT2MONGO_MQTT_PASSWORD": SECRET}, []),
        "file": ({"mqtt.password_file": file}, {}, []), "config": ({}, {}, ["-c", config])}[way]
    running = service(broker=broker, mongod=mongod, database=database, args=args, env=env, settings={
        "mqtt.username": "u", "log.level": "debug", "log.status": "on", **settings})
    wait_until(lambda: SECRET not in command_line(running), 5, "the password is wiped from the command line")
    stores(running, broker)
    assert SECRET not in command_line(running) and "--role" in command_line(running)
    running.sums()
    running.stop()
    check_silent(running, SECRET)
    if way in ("flag", "equals"):
        assert "--mqtt-password-file" in running.log.splitlines()[0], "a warning names the better way"

    for action in ("--check", "--help", "--version", "--man", "--markdown"):
        running.args = [*args, action]
        running.start().finish(sums=False)
        check_silent(running, SECRET)


@pytest.mark.parametrize("way", ["flag", "environment", "file"])
def test_the_database_password_is_said_nowhere(mosquitto, fresh_mongod, service, tmp_path, way):
    server, broker = fresh_mongod(auth=True), mosquitto()
    uri = server.uri
    secret = f":{server.PASSWORD}@"
    file = tmp_path / "uri"
    file.write_text(f"{uri}\n")
    file.chmod(0o600)
    settings, env = {"flag": ({"mongodb.uri": uri}, {}), "environment": ({}, {"MQTT2MONGO_MONGODB_URI": uri}),
                     "file": ({"mongodb.uri_file": file}, {})}[way]
    running = service(broker=broker, env=env, settings={"log.level": "debug", **settings})
    wait_until(lambda: secret not in command_line(running), 5, "the password is wiped from the command line")
    stores(running, broker)
    running.stop()
    check_silent(running, secret)
    running.args = ["--check"]
    running.start().finish(sums=False)
    check_silent(running, secret)
    assert "***@127.0.0.1" in running.stdout.read_text()


def test_a_wrong_database_password(mosquitto, fresh_mongod, service):
    """An error with its remedy; the message stays at the broker until somebody has mended it."""
    server, broker = fresh_mongod(auth=True), mosquitto()
    right = server.uri
    running = service(broker=broker, env={"MQTT2MONGO_MONGODB_URI": right.replace(server.PASSWORD, SECRET)},
                      settings={"log.level": "debug", "shutdown_timeout": "500ms"})
    running.wait_log("subscribed to")
    clients.publish(broker.port, 10)
    running.wait_log("authSource")
    wait_until(lambda: running.sums()["consumer"]["received"] >= 10, what="the messages have come")
    said = [record["message"] for record in running.records if record["level"] == "error"]
    assert len(said) <= 2, "once for asking, once for storing, and not again for every attempt"
    for text in said:
        for word in ("authentication failed", "user name, password and authsource in mongodb.uri"):
            assert word in text.lower()
    sums = running.stop()["consumer"]
    assert sums["stored"] == sums["dead_lettered"] == 0 and sums["spooled"] + sums["returned"] == sums["received"] >= 10
    check_silent(running, SECRET)
    running.environment["MQTT2MONGO_MONGODB_URI"] = right
    running.start()
    running.wait_stored(10)
    running.stop()


def test_a_database_user_who_may_not_write(mosquitto, fresh_mongod, service):
    """As with the password: nothing is lost or buried while somebody gives the user the role it needs."""
    server, broker = fresh_mongod(auth=True), mosquitto()
    admin = server.client().admin
    admin.command("createUser", "reader", pwd=SECRET, roles=["readAnyDatabase"])
    uri = server.uri.replace(f"{server.USER}:{server.PASSWORD}", f"reader:{SECRET}")
    running = service(broker=broker, env={"MQTT2MONGO_MONGODB_URI": uri})
    running.wait_log("subscribed to")
    clients.publish(broker.port, ["1", "no JSON"])
    running.wait_log("readWrite")
    said = [record for record in running.records if record["level"] == "error"]
    assert len(said) == 1 and "mongodb.database" in said[0]["message"]
    sums = running.sums()["consumer"]
    assert sums["stored"] == sums["dead_lettered"] == 0
    admin.command("grantRolesToUser", "reader", roles=["readWriteAnyDatabase"])
    running.wait_stored(1)
    wait_until(lambda: running.sums()["consumer"]["dead_lettered"] == 1, 20, running.tail)
    assert running.stop()["consumer"]["dead_lettered"] == 1
    check_silent(running, SECRET)


# The password has a part that is nowhere else; with one character of it not escaped, or with another mistake in the string.
BROKEN = [
    "mongodb://user:{0}@{0}@localhost/", "mongodb://user:{0}/{0}@localhost/", "mongodb://user:{0}:{0}@localhost/",
    "mongodb://user:{0}?{0}@localhost/", "mongodb://user:{0}#{0}@localhost/", "mongodb://user:{0}%{0}@localhost/",
    "mongodb://user:{0}[{0}@localhost/", "mongodb://us@er:{0}@localhost/", "mongodb://user:{0}%zz@localhost",
    "mongodb://user:{0}@localhost:99999/", "mongodb://user:{0}@localhost:port/", "mongodb://user:{0}@/", "mongodb://user:{0}",
    "mongodb://user:{0}@localhost/?w=0", "mongodb://user:{0}@localhost/?replicaSet",
    "mongodb://user:{0}@localhost/?tlsCertificateKeyFilePassword={0}&tls=maybe", "mongo://user:{0}@localhost/",
    "mongodb+srv://user:{0}@localhost:27017/", "mongodb+srv://user:{0}@a.example,b.example/", "user:{0}@localhost", "{0}", "",
    "mongodb://user:{0}@localhost/db with spaces?x", "http://user:{0}@localhost/",
]

# What only shows when the driver tries.
USELESS = [form + "serverSelectionTimeoutMS=100" for form in (
    "mongodb://user:{0}@localhost:1/?authMechanism=WRONG&", "mongodb://user:{0}@local host/?",
    "mongodb://user:{0}@no.invalid/?", "mongodb://user:{0}@localhost:1/?tlsCertificateKeyFilePassword={0}&appName=me@plant&",
    "mongodb://user:{0}@localhost:1/?appName=me@plant&tlsCertificateKeyFilePassword={0}&",
    "mongodb+srv://user:{0}@no.such.invalid/?", "mongodb://user:{0}@localhost:1/?tls=true&tlsCertificateKeyFilePassword={0}&")]


@pytest.mark.parametrize("way", ["flag", "environment", "file"])
def test_a_broken_uri_does_not_give_its_password_away(service, mosquitto, tmp_path, way):
    broker = mosquitto()
    running = service(broker=broker, started=False)
    for form in BROKEN + USELESS:
        uri = form.format(SECRET)
        file = tmp_path / "uri"
        file.write_text(uri)
        file.chmod(0o600)
        running.args, env = {"flag": ([f"--mongodb-uri={uri}"], {}), "environment": ([], {"MQTT2MONGO_MONGODB_URI": uri}),
                             "file": (["--mongodb-uri-file", file], {})}[way]
        running.environment = {key: value for key, value in running.environment.items() if "MONGODB" not in key} | env
        running.args.append("--check")
        mark = running.mark()
        running.start()
        status = running.wait_exit(20)
        said = running.log[mark:]
        assert SECRET not in said + running.stdout.read_text(), f"{form}: {said.replace(SECRET, '<the secret>')}"
        assert status == (1 if form in USELESS else 2), f"{form}: exit status {status}\n{said}"
        assert form in USELESS or re.search('"level":"error","room":"config","message":".*uri', said, re.I), (form, said)


@pytest.mark.parametrize("arguments", [
    ["--mqtt-pasword", SECRET], [f"--mqtt-pasword={SECRET}"], ["--mqtt-password-fil", SECRET], ["--password", SECRET], [SECRET],
    ["--mqtt-password", SECRET, "--mqtt-port", "x"], ["--mqtt-host", f"mqtts://u:{SECRET}@broker:8883"],
    ["--mqtt-password", SECRET, "--mqtt-protocol", "3.1.1"]])
def test_mistakes_around_secrets(service, arguments):
    running = service(args=arguments)
    running.finish(expect=2, sums=False)
    check_silent(running, SECRET)


def test_secrets_in_a_broken_file(service, tmp_path):
    for number, text in enumerate([
            '{"mqtt": {"password": "%s"', '{"mqtt": {"pasword": "%s"}}', '{"mqtt": {"password": ["%s"]}}',
            '{"mqtt": {"password": "%s"}, "mqtt": 1}', '{"mqtt": {"username": "u", "password": "%s}}']):
        path = tmp_path / f"{number}.json"
        path.write_text(text % SECRET)
        running = service(args=["-c", path])
        running.finish(expect=2, sums=False)
        check_silent(running, SECRET)


def crash(running):
    """Have it end by SIGABRT; did the kernel write its memory somewhere?"""
    os.kill(running.pid, signal.SIGABRT)
    return os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOWAIT).si_code == os.CLD_DUMPED


@pytest.mark.not_sanitized
@pytest.mark.parametrize("allowed", [False, True])
def test_a_crash_leaves_no_secret_behind(mosquitto, mongod, service, database, allowed):
    """Whatever the limit. With core_dumps it does, which shows that this test can fail; how is the machine's affair."""
    broker = mosquitto(users={"u": SECRET})
    running = service(broker=broker, mongod=mongod, database=database, started=False, env={"MQTT2MONGO_MQTT_PASSWORD": SECRET},
                      settings={"mqtt.username": "u", **({"core_dumps": "true"} if allowed else {})})
    running.limits[resource.RLIMIT_CORE] = resource.RLIM_INFINITY
    stores(running.start(), broker)
    assert ("a core dump holds passwords" in running.log) == allowed
    # What is not dumpable belongs to root in /proc: not even our own user reads its memory or environment.
    assert Path(f"/proc/{running.pid}/environ").stat().st_uid == (os.geteuid() if allowed else 0)
    limits = Path(f"/proc/{running.pid}/limits").read_text()
    assert re.search(r"^Max core file size +(\S+) +(\S+)", limits, re.M).groups() == (("unlimited",) * 2 if allowed else ("0",) * 2)
    dumped = crash(running)
    dumps = [each for each in running.directory.iterdir() if each.name.startswith("core")]
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    if not allowed:
        assert not dumped and not dumps
    elif pattern[0] not in "|/":
        assert dumped and any(SECRET.encode() in each.read_bytes() for each in dumps)
    for each in dumps:
        each.unlink()


def compiler_takes(*flags):
    return subprocess.run(["cc", "-Werror", *flags, "-c", "-x", "c", "/dev/null", "-o", "/dev/null"], capture_output=True, check=False,
                          timeout=20).returncode == 0


@pytest.mark.not_sanitized
def test_how_it_is_built():
    """What makes a fault harder to use, where compiler and machine have it."""
    commands = [each["command"] for each in json.loads((BUILD / "compile_commands.json").read_text())
                if each["file"].endswith(("/src/main.c", "/src/json.c"))]
    assert len(commands) == 2
    for flag in ("-fstack-protector-strong", "-fstack-clash-protection", "-fcf-protection", "-ftrivial-auto-var-init=zero"):
        assert not compiler_takes(flag) or all(flag in command.split() for command in commands), flag

    def readelf(*arguments):
        return subprocess.run(["readelf", "-W", *map(str, arguments)], capture_output=True, check=True, text=True, timeout=20).stdout

    program = readelf("-h", "-l", "-d", BUILD / "src" / "mqtt2mongo")
    assert re.search(r"Type:\s+DYN", program) and "GNU_RELRO" in program and "BIND_NOW" in program
    assert re.search(r"GNU_STACK.* RW +0x", program), "the stack is not to be run"
    assert "RPATH" not in program and "RUNPATH" not in program
    if os.uname().machine == "x86_64" and compiler_takes("-fcf-protection"):
        objects = list((BUILD / "src").glob("**/*.o"))
        assert len(objects) > 30
        for each in objects:
            assert "IBT, SHSTK" in readelf("-n", each), each


def test_only_we_may_read_our_state(mosquitto, mongod, service, database, tmp_path):
    """Under a careless umask, too."""
    wrapper = tmp_path / "program"
    path = tmp_path / "made" / "by" / "us"
    running = service(broker=mosquitto(), mongod=mongod, database=database, role="both", started=False,
                      settings={"state_dir": path})
    wrapper.write_text(f'#!/bin/sh\numask 0\nexec {running.program} "$@"\n')
    wrapper.chmod(0o755)
    running.program = wrapper
    running.start().wait_log("subscribed to")
    names = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.iterdir()}
    assert set(names) == {"state.json", "consumer.lock", "publisher.lock", "state.lock", "spool.db", "spool.db-wal", "spool.db-shm",
                          "spool.db.lock"}
    assert all(mode == 0o600 for mode in names.values()), {name: oct(mode) for name, mode in names.items()}
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.parent.stat().st_mode) & 0o022 == 0, "nobody else can put another directory in its place"
    running.stop()


def _victims(directory, names):
    """Files of somebody else's, and a link to each where a file of ours would be."""
    directory.mkdir(parents=True)
    victims = {name: directory.parent / f"victim-{name}" for name in names}
    for name, victim in victims.items():
        victim.write_text("precious")
        (directory / name).symlink_to(victim)
    return victims.values()


LINKS = ("consumer.lock", "state.lock", "state.json.tmp", "spool.db", "spool.db.lock")


@pytest.mark.skipif(os.geteuid() != 0, reason="for a service that runs as root")
@pytest.mark.parametrize("key", ["state_dir", "spool.path"])
def test_root_takes_no_directory_of_somebody_else(mosquitto, mongod, service, tmp_path, key):
    """Who owns it, or may write to it, could have root overwrite any file."""
    theirs, broker = tmp_path / "theirs", mosquitto()
    victims = _victims(theirs, LINKS)
    for owner, mode, remedy in ((NOBODY, 0o700, "as that user"), (0, 0o777, "chmod go-w"), (0, 0o1777, "chmod go-w")):
        os.chown(theirs, owner, owner)
        theirs.chmod(mode)
        running = service(broker=broker, mongod=mongod, settings={key: theirs / "spool.db" if key == "spool.path" else theirs})
        running.finish(expect=1, sums=False)
        said = complaints(running)[-1]
        assert str(theirs) in said and remedy in said and key in said, said
        assert all(victim.read_text() == "precious" for victim in victims)
    assert sorted(path.name for path in theirs.iterdir()) == sorted(LINKS)


@pytest.mark.parametrize("name", LINKS)
def test_no_link_is_followed(mosquitto, mongod, service, database, tmp_path, name):
    """Not in a directory of our own either."""
    directory = tmp_path / "own" / "state"
    victim, = _victims(directory, [name])
    running = service(broker=mosquitto(), mongod=mongod, database=database, settings={"state_dir": directory})
    if name in ("consumer.lock", "state.lock"):
        running.finish(expect=1, sums=False)
    elif name == "state.json.tmp":
        running.wait_log("subscribed to")
        running.stop()
    else:
        running.wait_log(f"spool failed: .*{name}")
        running.kill9()
    assert victim.read_text() == "precious"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_takes_a_shared_volume(mosquitto, mongod, service, database, tmp_path):
    """As Kubernetes gives it with fsGroup: it belongs to root, and a group may write to it. By way of a link, as systemd has it."""
    volume, link = tmp_path / "volume", tmp_path / "link"
    volume.mkdir()
    os.chown(volume, 0, NOBODY)
    volume.chmod(0o2777)
    link.symlink_to("volume")
    broker, wrapper = mosquitto(), tmp_path / "program"
    running = service(broker=broker, mongod=mongod, database=database, started=False, settings={"state_dir": link / "state"})
    # Another user, who may all the same pass through the directories of this test.
    wrapper.write_text(f'#!/bin/sh\nexec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups --inh-caps=+dac_override '
                       f'--ambient-caps=+dac_override {running.program} "$@"\n')
    wrapper.chmod(0o755)
    running.program = wrapper
    running.start()
    stores(running, broker)
    assert {path.stat().st_uid for path in (volume / "state").iterdir()} == {NOBODY}
    running.stop()


def test_a_state_directory_that_cannot_be_used(service, mosquitto, tmp_path):
    (tmp_path / "file").write_text("")
    running = service(broker=mosquitto(), settings={"state_dir": tmp_path / "file" / "state"})
    running.finish(expect=1, sums=False)
    assert "state_dir" in complaints(running)[-1] and str(tmp_path / "file") in complaints(running)[-1]


def test_a_damaged_state_file_is_set_aside(mosquitto, mongod, service, database):
    running = service(broker=mosquitto(), mongod=mongod, database=database, started=False)
    running.state.mkdir()
    shutil.copy("/dev/null", running.state / "state.json")
    (running.state / "state.json").write_text('{"client_id": "x", "sess')
    running.start().wait_log("subscribed to")
    running.stop()
    assert len(complaints(running)) == 1 and "damaged" in complaints(running)[0]
    assert [path.read_text() for path in running.state.glob("state.json.corrupt-*")] == ['{"client_id": "x", "sess']


# --- what others say, on a terminal ----------------------------------------------------------------------------------------

# A title for the window, C1, DEL, and characters that turn what stands around them.
STEERING = "\x1b]0;owned\x07\x7f\u009b31m\u202e\u2066\u200f\u061c"
STEERS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f]")


def test_what_mongod_calls_its_replica_set(mosquitto, fresh_mongod, service):
    """A real one: it takes any name."""
    server = fresh_mongod(set_name=f"rs{STEERING}")
    for log_format in ("text", "json"):
        running = service(broker=mosquitto(), mongod=server, args=["--check"], settings={"log.format": log_format})
        running.finish(sums=False)
        said = running.stdout.read_text()
        assert r"replica set rs\x1b]0;owned\x07\x7f\u009b31m\u202e\u2066\u200f\u061c" in said
        assert not STEERS.search(said + running.log)


def test_what_is_published(mosquitto, mongod, database, service):
    """A dry run prints what anybody may have published: as extended JSON that means the same, and a preview for people."""
    broker = mosquitto()
    topic = "sensors/\u202egpj.exe\u2066"
    running = service(broker=broker, args=["--dry-run"])
    wait_until(lambda: "dry run: printing" in running.log, 10, "it has subscribed")
    payloads = [json.dumps({STEERING: STEERING}, ensure_ascii=False), f"no JSON {STEERING}"]
    clients.publish(broker.port, payloads, topic)
    wait_until(lambda: running.stdout.read_text().count("\n") == 2, 10, "two lines")
    running.stop(sums=False)
    said = running.stdout.read_text()
    assert not STEERS.search(said + running.log)
    good, bad = (json_util.loads(line.partition(" ")[2]) for line in said.splitlines())
    assert good["topic"] == bad["topic"] == topic and good["payload"] == {STEERING: STEERING}
    assert bad["payload"] == payloads[1].encode() and not STEERS.search(bad["preview"]) and r"\u202e\u2066" in bad["preview"]


def test_nothing_is_printed_past_the_printers():
    """Standard output and standard error have four writers: the log, the escaping printers, --help and its like, whose text is all
    ours. Who adds another has to think of what others can make it print."""
    allowed = {"log.c", "escape.c", "config_print.c"}
    direct = re.compile(r"\b(printf|vprintf|puts|putchar|perror)\s*\(|\b(fprintf|vfprintf|fputs|fputc|fwrite|putc)\s*\([^;]*\b(stdout|stderr|errors)\b"
                        r"|\bwrite\s*\(\s*(STD\w+|[12]\b)")
    sources = sorted((ROOT / "src").glob("**/*.c"))
    assert len(sources) > 30
    for source in sources:
        text = re.sub(r"/\*.*?\*/", "", source.read_text(), flags=re.S)
        assert source.name in allowed or not (found := direct.search(text)), f"{source.name}: {found[0]}"
