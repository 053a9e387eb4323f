"""What the measurements are wanted to show, and whether they do: check(results) → [(what, wanted, got, met)].

`met` is True, False, or None for what was not measured. Each compares medians of one run.
"""

import statistics

from charts import number

MINE, TOLD = "mqtt2mongo-1", "200000"


class Missing(Exception):
    """The row that a target is about is not there."""


def rows_of(results, work, contender, case=None):
    """Rows of a work; a case may be written as a number or as text."""
    found = [row for entry in results["works"] if entry["name"] == work for row in entry.get("rows", [])
             if row["contender"] == contender and (case is None or same(row["case"], case))]
    found = [row for row in found if any(value is not None for value in row["values"])]
    if not found:
        raise Missing
    return found


def same(one, other):
    return str(one).replace(",", "").replace(" ", "") == str(other).replace(",", "").replace(" ", "")


def median(values):
    present = [value for value in values or [] if value is not None]
    if not present:
        raise Missing
    return statistics.median(present)


def value(results, work, contender, case=None, field="values"):
    row = rows_of(results, work, contender, case)[0]
    return median(row["extra"].get(field) if field.startswith("p") and field != "peak_mib" else row.get(field))


def ratio(results, work, contender, base, case=None, field="values"):
    return value(results, work, contender, case, field) / value(results, work, base, case, field)


def growth(results, case, small, large):
    """How much dearer a message is at `large` than at `small`."""
    rows = {row["x"]: row for row in rows_of(results, "growth", MINE, case)}
    work = next(entry for entry in results["works"] if entry["name"] == "growth")
    if small not in rows or large not in rows:
        raise Missing
    quotient = median(rows[large]["values"]) / median(rows[small]["values"])
    return 1 / quotient if work.get("better") == "higher" else quotient


def targets(results):
    """(what, "≥" or "≤", how much, the unit, a function that finds out)"""
    r = results
    return [
        ("drain 200,000: mqtt2mongo-1 / bare", "≥", 0.50, "", lambda: ratio(r, "drain", MINE, "bare", TOLD)),
        ("drain 200,000: mqtt2mongo-4 / bare", "≥", 0.65, "", lambda: ratio(r, "drain", "mqtt2mongo-4", "bare", TOLD)),
        ("drain 200,000: mqtt2mongo-1 / node", "≥", 2.0, "", lambda: ratio(r, "drain", MINE, "node", TOLD)),
        ("live: mqtt2mongo-1 / bare", "≥", 0.95, "", lambda: ratio(r, "live", MINE, "bare")),
        ("drain 200,000, CPU a message: mqtt2mongo-1 / bare", "≤", 1.5, "",
         lambda: ratio(r, "drain", MINE, "bare", TOLD, "cpu_us")),
    ]


def check(results):
    checked = []
    for what, sign, wanted, unit, find in targets(results):
        try:
            got = find()
        except Missing:
            checked.append((what, f"{sign} {number(wanted)}{unit}", "not measured", None))
            continue
        met = got >= wanted if sign == "≥" else got <= wanted
        checked.append((what, f"{sign} {number(wanted)}{unit}", f"{number(got)}{unit}", met))
    return checked
