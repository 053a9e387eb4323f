"""What does a message cost, beside time: CPU, instructions, system calls, memory; and how long does a start take?

Instructions (valgrind's callgrind) and system calls (strace) are those of the whole process with a backlog of 20,000 less those
with one of 2,000, divided by the difference: what start and end take drops out. The callgrind files stay in build/bench:
callgrind_annotate reads them.
"""

import copy
import re
import subprocess
import time

from contenders import Contender, chosen
from harness import ROOT, Failed, Rows, say
from processes import wait_until
from servers import Mosquitto

COUNT, QUICK_COUNT = 200_000, 50_000
SMALL, LARGE = 2_000, 20_000
STARTS = 5
NAMES = ("bare", "mqtt2mongo-1", "node")
KEPT = ROOT / "build" / "bench"


def cost(bench):
    rows = Rows("cost", "What a message costs", "µs/msg", "lower", payload_bytes=110, topics=100)
    contenders, missing = chosen(*NAMES)
    for name, why in missing.items():
        rows.leave_out(name, "all", why)
    processor(bench, rows, contenders)
    if not bench.quick:
        KEPT.mkdir(parents=True, exist_ok=True)
        by_difference(bench, rows, contenders, "instructions", "instructions/msg", Callgrind)
        by_difference(bench, rows, contenders, "system calls", "calls/msg", Strace)
        start_up(bench, rows, contenders)
    return rows.work


def processor(bench, rows, contenders):
    count = QUICK_COUNT if bench.quick else COUNT
    for turn in range(min(bench.rounds, 3)):
        turns = bench.rotated([one for one in contenders if not rows.failed(one, "CPU")], turn)
        try:
            bench.fill(turns, count)
            for contender in turns:
                with rows.attempt(bench, contender, "CPU"):
                    took = bench.drain(contender, count)
                    rows.add(contender, "CPU", took.cpu_us, peak_mib=took.peak_mib,
                             notes=f"a backlog of {count:,}, start and end too")
                    say(f"  CPU {contender.name:15} {took}")
        finally:
            bench.forget(turns)


# --- instructions and system calls -----------------------------------------------------------------------------------

class Under(Contender):
    """A contender that another program runs and watches. `parts` tells what that has counted, {what: how often}."""

    def __init__(self, contender, count):
        super().__init__(contender.name)
        self.contender, self.count = contender, count
        self.stores, self.ends = contender.stores, contender.ends
        self.kept = KEPT / f"{self.tool}.{contender.name}.{count}"
        self.kept.unlink(missing_ok=True)

    def sessions(self):
        return self.contender.sessions()

    def argv(self, bench, count=None, counter=None):
        return [*self.prefix(), *self.contender.argv(bench, count=count, counter=counter)]


class Callgrind(Under):
    tool = "callgrind"

    @staticmethod
    def missing_for(contender):
        if contender.name.startswith("node"):
            return "it makes its code while it runs: valgrind is no measure for that"
        return cannot_run("valgrind", "--tool=none", "true")

    def prefix(self):
        return ["valgrind", "--tool=callgrind", "--separate-threads=no", f"--callgrind-out-file={self.kept}"]

    def parts(self):
        return {"instructions": int(re.search(r"^(?:summary|totals): (\d+)", self.kept.read_text(), re.M)[1])}


class Strace(Under):
    tool = "strace"

    @staticmethod
    def missing_for(_):
        return cannot_run("strace", "-D", "-o", "/dev/null", "true")

    def prefix(self):
        """-D: the process that is started is the contender, not strace."""
        return ["strace", "-D", "-f", "-c", "-o", self.kept]

    def parts(self):
        return calls_of(wait_until(lambda: self.kept.exists() and (found := self.kept.read_text()).endswith(" total\n") and found,
                                   10, "strace has written its table"))


def calls_of(table):
    """{system call: how often} of strace's table: % time, seconds, usecs/call, calls, errors if any, name. Those that failed are
    counted once more, apart."""
    calls = {}
    for number, errors, name in re.findall(r"^ *[\d.]+ +[\d.]+ +\d+ +(\d+) +(\d+ )? *(\w+)$", table, re.M):
        if name != "total":
            calls[name] = int(number)
            if errors:
                calls[f"{name} failed"] = int(errors)
    return calls


def cannot_run(*argv):
    """Why not, or ""."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def by_difference(bench, rows, contenders, case, unit, tool):
    for contender in contenders:
        why = tool.missing_for(contender)
        if why:
            rows.leave_out(contender, case, why)
            continue
        with rows.attempt(bench, contender, case):
            small, large = (counted(bench, tool(contender, count)) for count in (SMALL, LARGE))
            each = {what: (number - small.get(what, 0)) / (LARGE - SMALL) for what, number in large.items()}
            total = sum(number for what, number in each.items() if not what.endswith(" failed"))
            breakdown = {what: round(number, 3) for what, number in each.items() if number >= 0.001}
            rows.add(contender, case, total, unit=unit, extra={"breakdown": breakdown} if len(breakdown) > 1 else {}, notes="")
            say(f"  {case} {contender.name:15} {total:,.1f}/msg")


def counted(bench, under):
    try:
        bench.fill([under], under.count)
        bench.drain(under, under.count)
    finally:
        bench.forget([under])
    return under.parts()


# --- starting --------------------------------------------------------------------------------------------------------

def start_up(bench, rows, contenders):
    """From the start of the process until the broker has its SUBSCRIBE, which a broker that logs such things tells."""
    directory = bench.scratch / "mosquitto-for-starts"
    directory.mkdir()
    with Mosquitto(directory, extra=["log_type error", "log_type notice", "log_type subscribe"]) as broker:
        broker.start()
        elsewhere = copy.copy(bench)
        elsewhere.broker = broker
        for turn in range(STARTS):
            for contender in bench.rotated(contenders, turn):
                with rows.attempt(elsewhere, contender, "start"):
                    ms = one_start(elsewhere, contender)
                    rows.add(contender, "start", ms, unit="ms", notes="until it is subscribed, no session there")
    for contender in contenders:
        say(f"  start {contender.name:15} {rows.median(contender.name, 'start')} ms")


def one_start(bench, contender):
    client, filter_ = contender.sessions()[0]
    subscribed, mark = f" {client} 1 {filter_}", bench.broker.mark()
    deadline = time.monotonic() + 10
    with bench.start(contender) as run:
        while subscribed not in bench.broker.log[mark:]:
            run.check_alive()
            if time.monotonic() > deadline:
                raise Failed(f"{contender.name} has not subscribed within 10 s\n{run.tail(10)}")
            time.sleep(0.001)
        ms = (time.monotonic() - run.begun) * 1000
        run.finish()
    return ms
