"""How fast do messages go into the spool while MongoDB is away, and out of it when it is back?

mongod is frozen (SIGSTOP) before the service starts, and thawed (SIGCONT) when all of the backlog is in the spool: its caches are as
warm as they are for "drain", the same backlog with MongoDB there. All three rates are from the first message to the last, by the
service's own counters; what was stored in the end is checked as always.
"""

import shutil

from contenders import Service
from harness import Rows, say
from processes import free_port
from status import Status, rate_until

COUNT, LARGE = 200_000, 1_000_000
DISK_FOR_LARGE = 6 * 1024**3
LIMIT = 120


def spool(bench):
    rows = Rows("spool", "Into the spool and out of it", "msg/s", "higher", payload_bytes=110, outage="mongod is frozen (SIGSTOP)",
                spool_max_size="default")
    rows.work["base"] = "drain"
    for _ in range(min(bench.rounds, 3)):
        measure(bench, rows, COUNT, there)
        measure(bench, rows, COUNT, away)
    if shutil.disk_usage(bench.scratch).free > DISK_FOR_LARGE:
        measure(bench, rows, LARGE, away)
    else:
        rows.leave_out("spool in", LARGE, "too little disk space")
    return rows.work


def measure(bench, rows, count, turn):
    port = free_port()
    service = Service(1, name="mqtt2mongo-spool", settings={"http.listen": f"127.0.0.1:{port}"})
    with rows.attempt(bench, service, count):
        bench.clear()
        bench.fill([service], count)
        turn(bench, rows, service, count, Status(port))
        bench.check(service.name, count)


def note(rows, run, contender, count, rate, cpu, notes):
    rows.add(contender, count, rate, cpu_us=cpu / count * 1e6, peak_mib=run.peak / 1024, notes=notes)
    say(f"  {count:>9,} {contender:10} {rate:10,.0f} msg/s  {cpu / count * 1e6:6.2f} µs CPU/msg  peak {run.peak / 1024:6.1f} MiB")


def there(bench, rows, service, count, status):
    """The whole backlog, MongoDB being there."""
    with bench.start(service) as run:
        rate = rate_until(run, lambda: status.counter("stored"), count, LIMIT)
        note(rows, run, "drain", count, rate, run.cpu(), "mqtt2mongo-1, MongoDB is there")
        run.finish()


def away(bench, rows, service, count, status):
    """The same, but the first half of the way while MongoDB is frozen."""
    bench.mongod.sigstop()
    try:
        with bench.start(service) as run:
            rate = rate_until(run, lambda: status.counter("spooled"), count, LIMIT)
            spent = run.cpu()
            note(rows, run, "spool in", count, rate, spent, "acknowledged, in the spool")
            bench.mongod.sigcont()
            rate = rate_until(run, lambda: status.counter("stored"), count, LIMIT)
            note(rows, run, "spool out", count, rate, run.cpu() - spent, "stored after the outage; peak of both")
            run.finish()
    finally:
        bench.mongod.sigcont()
