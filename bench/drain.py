"""How fast is a backlog drained, next to a subscriber that only discards?

A real mosquitto with our recommended configuration queues COUNT QoS 1 messages (110 bytes of JSON, MQTT 5) for a persistent
session. Then, in turns and on the same receive maximum:

  bare         libmosquitto alone (bench/bare.c), every message discarded: the floor
  mqtt2mongo   one connection, every message validated, stored in a real mongod (replica set of one, w:majority, j:true) and
               only then acknowledged; afterwards MongoDB must hold them all

Printed per round: messages a second (from the start of the process to the last message), CPU time per message, peak memory;
at the end the medians and their ratio.

  build/venv/bin/python bench/drain.py [--count 200000] [--rounds 3] [--window 4096]
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "integration"))

from servers import Mongod, Mosquitto  # noqa: E402

BUILD = ROOT / os.environ.get("MQTT2MONGO_BUILD", "build/release")
BARE = BUILD / "bench" / "bare"
TOPIC = "bench/plant/line-1/readings"


def peak_kib(pid):
    """The most memory it has had resident; 0 once it is gone. (Its rusage would count this Python before the exec, too.)"""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


def run_measured(argv, until=lambda: False):
    """Run to its end, or until `until()` and then SIGTERM. (seconds, CPU seconds, peak KiB)"""
    begun = time.monotonic()
    process = subprocess.Popen([str(part) for part in argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    seconds, peak, ended = None, 0, 0
    while not ended:
        peak = max(peak, peak_kib(process.pid))
        if seconds is None and until():
            seconds = time.monotonic() - begun
            process.terminate()
        assert time.monotonic() - begun < 300, "not drained within 5 minutes"
        time.sleep(0.01)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, process.stderr.read().decode()
    return seconds or time.monotonic() - begun, usage.ru_utime + usage.ru_stime, peak


def fill(broker, client_id, count):
    subprocess.run([BARE, "session", str(broker.port), TOPIC, client_id], check=True)
    subprocess.run([BARE, "publish", str(broker.port), str(count), TOPIC], check=True)


def drain_bare(broker, count, window):
    fill(broker, "bare-1", count)
    return run_measured([BARE, "subscribe", broker.port, count, TOPIC, "bare-1", window])


def drain_service(broker, mongod, count, window, directory):
    fill(broker, "bench-1", count)
    with mongod.client() as client:
        client.drop_database("bench")
        messages = client.bench.messages
        result = run_measured(
            [BUILD / "src" / "mqtt2mongo", "--role", "consumer", "--mqtt-host", "127.0.0.1", "--mqtt-port", broker.port,
             "--mqtt-client-id", "bench", "--mqtt-receive-maximum", window, "--consumer-topic", TOPIC, "--mongodb-uri",
             mongod.uri, "--mongodb-database", "bench", "--state-dir", directory / "state"],
            until=lambda: messages.estimated_document_count() >= count)
        stored = len(messages.distinct("payload.sequence")) if count <= 300_000 else messages.count_documents({})
        assert stored == count, f"{stored} of {count} messages are in MongoDB"
    return result


def show(name, count, result):
    seconds, cpu, peak = result
    print(f"{name:12} {count / seconds:10,.0f} msg/s   {cpu / count * 1e6:6.2f} µs CPU/msg   peak {peak / 1024:6.1f} MiB",
          flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--window", type=int, default=4096)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    scratch = Path(tempfile.mkdtemp(prefix="mqtt2mongo-bench-"))
    results = {"bare": [], "mqtt2mongo": []}
    try:
        (scratch / "mosquitto").mkdir()
        (scratch / "mongod").mkdir()
        with Mosquitto(scratch / "mosquitto") as broker, Mongod(scratch / "mongod") as mongod:
            broker.start()
            mongod.start()
            for turn in range(options.rounds):
                contenders = list(results)
                for name in contenders[turn % 2:] + contenders[:turn % 2]:
                    result = (drain_bare(broker, options.count, options.window) if name == "bare" else
                              drain_service(broker, mongod, options.count, options.window, scratch))
                    results[name].append(result)
                    show(name, options.count, result)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    rates = {name: statistics.median(options.count / seconds for seconds, _, _ in runs) for name, runs in results.items()}
    print(f"\nmedian of {options.rounds}: bare {rates['bare']:,.0f} msg/s, mqtt2mongo {rates['mqtt2mongo']:,.0f} msg/s, "
          f"ratio {rates['mqtt2mongo'] / rates['bare']:.2f}")


if __name__ == "__main__":
    main()
