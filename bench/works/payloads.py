"""Drained at four sizes of payload: does the cost follow the messages or the bytes?"""

from contenders import chosen
from harness import Rows, say

SIZES = {"110 B": (110, 100_000), "1 KiB": (1024, 50_000), "10 KiB": (10 * 1024, 10_000), "100 KiB": (100 * 1024, 2_000)}
CONTENDERS = ["bare", "mqtt2mongo-1", "node"]


def payloads_round(bench, rows, contenders, case, turn):
    size, count = SIZES[case]
    contenders = bench.rotated([one for one in contenders if not rows.failed(one, case)], turn)
    if not contenders:
        return
    try:
        bench.fill(contenders, count, size=size)
        for contender in contenders:
            with rows.attempt(bench, contender, case):
                found = bench.drain(contender, count, size=size)
                found.extra["mb_per_s"] = found.rate * size / 1e6
                rows.add_turn(contender, case, found, x=size)
                say(f"  {case:>7} {contender.name:15} {found}  {found.extra['mb_per_s']:6.1f} MB/s")
    finally:
        bench.forget(contenders)


def payloads(bench):
    rows = Rows("payloads", "A backlog is drained, by size of payload", "msg/s", "higher",
                messages={case: count for case, (_, count) in SIZES.items()}, topics=100, receive_maximum=4096)
    contenders, missing = chosen(*CONTENDERS)
    for name, why in missing.items():
        rows.leave_out(name, "all", why)
    for turn in range(bench.rounds):
        for case in SIZES:
            payloads_round(bench, rows, contenders, case, turn)
    return rows.work
