"""What the measurements are wanted to show, and whether they do: check(results) → [(what, wanted, got, met)].

`met` is True, False, or None for what was not measured. Each compares medians of one run.
"""

import statistics

from charts import number

MINE, AT_ONCE, TOLD, MANY = "mqtt2mongo-1", "mqtt2mongo-interval-0", "200000", "1000000"


class Missing(Exception):
    """The row that a target is about is not there, or is empty."""


class Found:
    """The medians of a run."""

    def __init__(self, results):
        self.rows = {(work["name"], row["contender"], row["case"]): row for work in results["works"] for row in work["rows"]}

    def values(self, work, contender, case, field="values"):
        """A row's, from its extra if it has no such field itself. None where a round has none."""
        row = self.rows.get((work, contender, case), {})
        return row.get(field) or row.get("extra", {}).get(field) or []

    def median(self, work, contender, case, field="values"):
        values = [value for value in self.values(work, contender, case, field) if value is not None]
        if not values:
            raise Missing
        return statistics.median(values)

    def ratio(self, work, contenders, case, field="values"):
        one, other = contenders
        return self.median(work, one, case, field) / self.median(work, other, case, field)

    def paired(self, work, contenders, case):
        """The median of the ratios that each round has: they had their turns one after the other."""
        pairs = list(zip(*(self.values(work, contender, case) for contender in contenders), strict=False))
        if not pairs:
            raise Missing
        return statistics.median(one / other for one, other in pairs)

    def growth(self, large, small):
        return self.median("growth", MINE, large) / self.median("growth", MINE, small)


def total(rate, other, wanted):
    """What a message costs contender and mongod together."""
    return (f"CPU time a message, with mongod's, at {rate} msg/s, mqtt2mongo-1 to {other}", "≤", wanted, "",
            lambda found: found.ratio("rates", (MINE, other), f"{rate} msg/s"))


def window(case):
    return (f"drain through a window of {case}, mqtt2mongo-1 to mqtt2mongo-interval-0", "≥", 0.95, "",
            lambda found: found.paired("windows", (MINE, AT_ONCE), f"window {case}"))


# (what, "≥" or "≤", how much, its unit, what finds out)
TARGETS = [
    ("drain of 200,000, mqtt2mongo-1 to bare", "≥", 0.50, "", lambda found: found.ratio("drain", (MINE, "bare"), TOLD)),
    ("drain of 200,000, mqtt2mongo-4 to bare", "≥", 0.65, "", lambda found: found.ratio("drain", ("mqtt2mongo-4", "bare"), TOLD)),
    ("the same to bare-loop, mqtt2mongo-1", "≥", 0.50, "", lambda found: found.ratio("drain", (MINE, "bare-loop"), TOLD)),
    ("the same to bare-loop, mqtt2mongo-4", "≥", 0.65, "",
     lambda found: found.ratio("drain", ("mqtt2mongo-4", "bare-loop"), TOLD)),
    ("drain of 200,000, mqtt2mongo-1 to node", "≥", 2.0, "", lambda found: found.ratio("drain", (MINE, "node"), TOLD)),
    ("live rate, mqtt2mongo-1 to bare", "≥", 0.95, "", lambda found: found.ratio("live", (MINE, "bare"), "live")),
    ("CPU time a message in the drain of 200,000, mqtt2mongo-1 to bare", "≤", 1.5, "",
     lambda found: found.ratio("drain", (MINE, "bare"), TOLD, "cpu_us")),
    *(total(rate, AT_ONCE, wanted) for rate, wanted in (("200", 0.40), ("2,000", 0.30), ("10,000", 0.45))),
    *(total("200", other, 0.35) for other in ("python", "node-durable", "telegraf")),
    *(total("2,000", other, 0.25) for other in ("python-batched", "node-durable")),
    ("median of the latency of lone messages, 10 msg/s, mqtt2mongo-1 to mqtt2mongo-interval-0", "≤", 1.1, "",
     lambda found: found.ratio("rates", (MINE, AT_ONCE), "10 msg/s", "p50_ms")),
    ("median of the latency at 2,000 msg/s, mqtt2mongo-1", "≤", 20, " ms",
     lambda found: found.median("rates", MINE, "2,000 msg/s", "p50_ms")),
    ("p99 of the latency at 2,000 msg/s, mqtt2mongo-1", "≤", 35, " ms",
     lambda found: found.median("rates", MINE, "2,000 msg/s", "p99_ms")),
    ("the same, mqtt2mongo-interval-0", "≤", 10, " ms", lambda found: found.median("rates", AT_ONCE, "2,000 msg/s", "p99_ms")),
    ("p99 of the latency at 50 %, mqtt2mongo-interval-0", "≤", 15, " ms", lambda found: found.median("latency", AT_ONCE, "50 %")),
    ("the same at 25 %", "≤", 15, " ms", lambda found: found.median("latency", AT_ONCE, "25 %")),
    ("the same at 12,500 msg/s", "≤", 15, " ms", lambda found: found.median("latency", AT_ONCE, "12,500 msg/s")),
    ("p99 of the latency at 12,500 msg/s, mqtt2mongo-1", "≤", 35, " ms",
     lambda found: found.median("latency", MINE, "12,500 msg/s")),
    ("the same at 50 %", "≤", 45, " ms", lambda found: found.median("latency", MINE, "50 %")),
    *(window(case) for case in ("1", "10", "20", "32", "20, 4 ms away")),
    ("p99 at 50 %, mqtt2mongo-1 to node-durable", "≤", 1.0, "", lambda found: found.ratio("latency", (MINE, "node-durable"), "50 %")),
    ("peak memory in the drain of 1,000,000, mqtt2mongo-1", "≤", 64, " MiB",
     lambda found: found.median("drain", MINE, MANY, "peak_mib")),
    ("peak memory in an outage with 1,000,000, mqtt2mongo-1", "≤", 64, " MiB",
     lambda found: found.median("spool", "spool out", MANY, "peak_mib")),
    ("into the spool, to the drain of 200,000", "≥", 0.6, "", lambda found: found.ratio("spool", ("spool in", "drain"), TOLD)),
    ("out of the spool, to the drain of 200,000", "≥", 0.8, "", lambda found: found.ratio("spool", ("spool out", "drain"), TOLD)),
    ("CPU time a message, one of 1,000,000 to one of 10,000", "≤", 1.1, "",
     lambda found: found.growth("1,000,000 messages", "10,000 messages")),
    ("CPU time a message, with 10,000 topics to one with 1", "≤", 1.1, "", lambda found: found.growth("10,000 topics", "1 topic")),
]


def check(results):
    checked, found = [], Found(results)
    for what, sign, wanted, unit, find in TARGETS:
        try:
            got = find(found)
        except Missing:
            checked.append((what, f"{sign} {number(wanted)}{unit}", "not measured", None))
            continue
        met = got >= wanted if sign == "≥" else got <= wanted
        checked.append((what, f"{sign} {number(wanted)}{unit}", f"{number(got)}{unit}", met))
    return checked
