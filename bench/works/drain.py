"""How fast is a backlog drained? Published once for all contenders of a round, then drained in turns."""

from contenders import chosen
from harness import Rows, say

SLOW = 20_000  # messages, for contenders that take a few thousand a second
FAST = ["bare", "bare-loop", "insert-1", "insert-2", "mqtt2mongo-1", "mqtt2mongo-4", "node"]


def drain_backlogs(bench, rows, count, names, **row):
    """One round after the other: a backlog of `count` for each of these contenders, drained in turns."""
    contenders, missing = chosen(*names)
    for name, why in missing.items():
        rows.leave_out(name, count, why)
    for turn in range(bench.rounds):
        drain_round(bench, rows, count, bench.rotated([one for one in contenders if not rows.failed(one, count)], turn), **row)


def drain_round(bench, rows, count, contenders, **row):
    if not contenders:
        return
    try:
        bench.fill(contenders, count)
        for contender in contenders:
            with rows.attempt(bench, contender, count):
                turn = bench.drain(contender, count)
                rows.add_turn(contender, count, turn, x=count, **row)
                say(f"  {count:>9,} {contender.name:15} {turn}")
    finally:
        bench.forget(contenders)


def drain(bench):
    rows = Rows("drain", "A backlog is drained", "msg/s", "higher", payload_bytes=110, topics=100, receive_maximum=4096)
    if bench.quick:
        drain_backlogs(bench, rows, 100_000, ["bare", "mqtt2mongo-1", "mqtt2mongo-4", "node"])
    else:
        drain_backlogs(bench, rows, 200_000, FAST)
        drain_backlogs(bench, rows, SLOW, ["python-batched", "python"])
        drain_backlogs(bench, rows, 1_000_000, ["bare", "mqtt2mongo-1", "mqtt2mongo-4", "node"])
    return rows.work
