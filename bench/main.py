"""Measures mqtt2mongo side by side with what one would take instead, on a real mosquitto and a real mongod.

    build/venv/bin/python bench/main.py [--quick] [--works drain,live,…] [--rounds N] [--output DIRECTORY]

Contenders take turns in one session, on the same two servers; each round another one begins. Every value is kept. What was stored
is checked: complete, and equal for all. Exit status 1 if a work, or a contender in it, failed; the others are reported all the same.
"""

import argparse
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import report
from contenders import ALL, NODE, install_node
from harness import BUILD, ROOT, Bench, say
from works.cost import cost
from works.drain import drain
from works.growth import growth
from works.latency import latency
from works.live import live
from works.payloads import payloads
from works.publisher import publisher
from works.rates import rates
from works.spool import spool
from works.windows import windows

WORKS = {"drain": drain, "live": live, "rates": rates, "latency": latency, "windows": windows, "payloads": payloads, "growth": growth,
         "spool": spool, "publisher": publisher, "cost": cost}
NOT_QUICK = ("payloads", "growth", "spool", "publisher")


def first_line(*argv):
    try:
        done = subprocess.run([str(part) for part in argv], capture_output=True, text=True, timeout=20, check=False, cwd=ROOT,
                              stdin=subprocess.DEVNULL)
    except OSError:
        return None
    return next(iter((done.stdout + done.stderr).splitlines()), None)


def found_in(path, pattern):
    try:
        match = re.search(pattern, Path(path).read_text(), re.M)
    except OSError:
        return None
    return match and match[1]


def machine():
    memory = found_in("/proc/meminfo", r"MemTotal:\s+(\d+)")
    return {"cpu": found_in("/proc/cpuinfo", r"model name\s*: (.*)"), "cores": len(os.sched_getaffinity(0)),
            "memory_gib": memory and round(int(memory) / 1024**2, 1), "kernel": platform.release(),
            "system": found_in("/etc/os-release", r'PRETTY_NAME="(.*)"')}


def versions(bench):
    def library(name):
        return first_line("pkg-config", "--modversion", name)

    def package(name):
        return found_in(NODE / "node_modules" / name / "package.json", r'"version": "(.*)"')

    broker = re.search(r"mosquitto version (\S+)", bench.broker.log)
    found = {"mqtt2mongo": first_line("git", "describe", "--always", "--dirty", "--tags"), "mosquitto": broker and broker[1],
             "mongod": bench.client.server_info()["version"], "libmosquitto": library("libmosquitto"),
             "libmongoc": library("mongoc2") if "not found" not in str(library("mongoc2")) else library("libmongoc-1.0"),
             "libuv": library("libuv"), "python": platform.python_version(), "node": first_line("node", "--version"),
             "mqtt (npm)": package("mqtt"), "mongodb (npm)": package("mongodb"),
             "telegraf": None if ALL["telegraf"].missing() else first_line(ALL["telegraf"].program(), "--version")}
    return {**found, **{name: metadata.version(name) for name in ("paho-mqtt", "pymongo", "hdrhistogram")}}


def build_programs():
    programs = [f"bench/{name}" for name in ("bare", "load", "insert", "publish")]
    subprocess.run(["ninja", "-C", BUILD, "src/mqtt2mongo", *programs], check=True, stdout=subprocess.DEVNULL, timeout=600)


def run_works(bench, names):
    """The works' results in order; a work that breaks down is a result, too: its error."""
    for name in names:
        say(f"{name}:")
        begun = time.monotonic()
        try:
            work = WORKS[name](bench)
        except Exception as error:  # whatever it was, the other works are wanted all the same
            traceback.print_exc()
            work = {"name": name, "title": name, "unit": "", "better": "", "parameters": {}, "rows": [],
                    "errors": [{"contender": None, "case": None, "error": f"{type(error).__name__}: {error}"}]}
        work["seconds"] = round(time.monotonic() - begun, 1)
        bench.found[name] = work
        say(f"{name}: {work['seconds']} s")
    return [bench.found[name] for name in names]


def last_report(directory):
    """What the last report in `directory` found; without works if there is none."""
    path = directory / "results.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {"works": []}
    except ValueError as error:
        sys.exit(f"{path} is no report ({error}): remove it, or give another --output")


def keep_others(results, last):
    """Add the works of the last report that are not in this one, with when and of what they were measured; not those that are no
    works any more."""
    for work in last["works"]:
        if work["name"] in WORKS and work["name"] not in {one["name"] for one in results["works"]}:
            work.setdefault("measured", {"begun": last["begun"], "of": last["versions"].get("mqtt2mongo"), "rounds": last["rounds"]})
            results["works"].append(work)
    results["works"].sort(key=lambda work: list(WORKS).index(work["name"]))


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few contenders, small counts: minutes instead of half an hour")
    parser.add_argument("--works", help=f"of {', '.join(WORKS)}; default: all, with --quick not {', '.join(NOT_QUICK)}")
    parser.add_argument("--rounds", type=int, help="turns of each contender; default 5, quick 2")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench" / "results", help="directory for the report")
    found = parser.parse_args()
    found.works = [name for name in found.works.split(",") if name] if found.works else [
        name for name in WORKS if not found.quick or name not in NOT_QUICK]
    for name in found.works:
        if name not in WORKS:
            parser.error(f"no work {name}: there are {', '.join(WORKS)}")
    found.rounds = found.rounds or (2 if found.quick else 5)
    return found


def main():
    chosen = options()
    last = last_report(chosen.output)  # now: a file that cannot be read is not to be found out about after an hour
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    build_programs()
    install_node(Bench.tool)
    scratch = Path(tempfile.mkdtemp(prefix="mqtt2mongo-bench-"))
    begun = datetime.now(UTC)
    try:
        with Bench(scratch, rounds=chosen.rounds, quick=chosen.quick) as bench:
            works = run_works(bench, chosen.works)
            results = {"command": ["bench/main.py", *sys.argv[1:]], "begun": begun.isoformat(timespec="seconds"),
                       "seconds": round((datetime.now(UTC) - begun).total_seconds()), "quick": chosen.quick,
                       "rounds": chosen.rounds, "machine": machine(), "versions": versions(bench), "works": works}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    keep_others(results, last)
    say(f"written: {report.write(results, chosen.output)}")
    return 1 if any(work["errors"] for work in works) else 0


if __name__ == "__main__":
    sys.exit(main())
