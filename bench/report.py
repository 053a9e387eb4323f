"""Results of bench/main.py on paper: write(results, directory) makes results.json, report.md and an SVG chart or more a work.

The report says nothing that is not in `results`: medians, ratios and targets are worked out here, from the values of each
round, and a work that failed is shown as such.
"""

import json
import re
import statistics
from pathlib import Path

import charts
import targets
from charts import number

GROWING = ("growth",)  # the works of which x is the point
BY_RATE = {  # a chart each of "rates": what of a row, what it is called, its unit
    "values": ("CPU time of contender and mongod", "µs/msg"), "p50_ms": ("from due to stored, median", "ms"),
    "p99_ms": ("from due to stored, p99", "ms"), "flushes_per_s": ("flushes of mongod's journal", "flushes/s")}
EXTRAS = {  # of a row's extra: columns of their own
    "p50": "p50", "p99.9": "p99.9", "p50_ms": "p50 ms", "p99_ms": "p99 ms", "p999_ms": "p99.9 ms", "wall_us": "µs/msg",
    "mb_per_s": "MB/s", "spooled": "spooled", "flushes_per_s": "flushes/s", "messages_per_insert": "msg/insert",
    "broker_cpu_us": "broker's CPU", "mongod_cpu_us": "mongod's CPU"}
COLUMNS = ("contender", "case", "median", "min–max", "ratio", *EXTRAS.values(), "CPU µs/msg", "peak MiB", "notes")


def write(results, directory):
    """Write them all into `directory`, in place of the charts that are there. The path of report.md."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*.svg"):
        old.unlink()
    sections = []
    for work in results["works"]:
        drawn = draw(work)
        for name, svg in drawn.items():
            (directory / name).write_text(svg)
        sections.append(section(work, drawn))
    (directory / "results.json").write_text(compact(results))
    path = directory / "report.md"
    path.write_text("\n".join([head(results), target_table(results), *sections]))
    return path


def compact(results):
    """JSON with a row's numbers on one line, so that a change of one is a change of one line."""
    text = json.dumps(results, indent=1, ensure_ascii=False, default=str)
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda match: re.sub(r"\s+", " ", match[0]).replace("[ ", "[").replace(" ]", "]"),
                  text) + "\n"


# --- the text --------------------------------------------------------------------------------------------------------

def cell(value):
    return str(value).replace("|", "\\|").replace("\n", " ")


def table(header, rows, right=()):
    """A Markdown table; the columns named in `right` are set to the right."""
    lines = ["| " + " | ".join(header) + " |",
             "|" + "|".join(" ---: " if name in right else " --- " for name in header) + "|"]
    return "\n".join(lines + ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]) + "\n"


def said(value):
    if isinstance(value, dict):
        return ", ".join(f"{name} {said(part)}" for name, part in value.items())
    return number(value) if isinstance(value, (int, float)) else str(value)


def head(results):
    begun, command = results["begun"].replace("T", " ").replace("+00:00", " UTC"), " ".join(results["command"])
    machine = [(name.replace("_", " "), value) for name, value in results["machine"].items()]
    versions = [(name, value) for name, value in results["versions"].items() if value]
    return "\n".join([
        "# Measured", "", f"{begun}, in {results['seconds']:,} s, by", "", f"    {command}", "",
        "Medians of the rounds; contenders take turns on the same servers. Machines are noisy: what counts is the ratio of two",
        "that were measured in one run. Every value of every round is in [results.json](results.json).", "",
        table(("machine", ""), machine), table(("version", ""), versions)])


def target_table(results):
    words = {True: "yes", False: "**no**", None: "–"}
    rows = [(what, wanted, got, words[met]) for what, wanted, got, met in targets.check(results)]
    return "\n".join(["## Targets", "", table(("target", "wanted", "got", "met"), rows, ("wanted", "got"))])


def section(work, drawn):
    parts = [f"## {work['title']}", ""]
    if work.get("measured"):
        parts += ["Not measured again: from {begun} UTC, of {of}, in {rounds} rounds.".format(
            **work["measured"] | {"begun": work["measured"]["begun"].replace("T", " ").replace("+00:00", "")}), ""]
    if work.get("parameters"):
        parts += ["; ".join(f"{name.replace('_', ' ')}: {said(value)}" for name, value in work["parameters"].items()), ""]
    parts += failures(work)
    if work["rows"]:
        parts += [work_table(work)]
    parts += [f"- Not measured: {one['contender']}, {case_of(one)}: {one['why']}" for one in work.get("left_out", [])]
    if work.get("left_out"):
        parts += [""]
    for name in drawn:
        parts += [f"![{work['title']}]({name})", ""]
    details = [line for row in work["rows"] for line in row_details(row)]
    return "\n".join(parts + (details + [""] if details else []))


def failures(work):
    """What went wrong, in its own words. Where no contender is named the whole work broke down."""
    lines = []
    for error in work["errors"]:
        who = "This work" if error["contender"] is None else f"{error['contender']}, {case_of(error)}"
        lines += [f"**{who} failed:**", "", *("    " + line for line in error["error"].strip().splitlines()), ""]
    return lines


def row_details(row):
    """What a row breaks down to: extra["breakdown"] is [{what: number} for each round]; the last one's, the largest first."""
    if not row["extra"].get("breakdown"):
        return []
    parts = sorted(row["extra"]["breakdown"][-1].items(), key=lambda item: -item[1])
    return [f"- {row['contender']}, {case_of(row)}: " + ", ".join(f"{what} {number(share)}" for what, share in parts)]


def work_table(work):
    """One line a row; columns that would be empty are left out."""
    base = work.get("base", "bare")
    header = [f"ratio to {base}" if name == "ratio" else name for name in COLUMNS]
    lines = [_line(work, row, base) for row in work["rows"]]
    kept = [place for place in range(len(header)) if any(line[place] for line in lines)]
    caption = f"{work['unit']}, {work['better']} is better" if work.get("unit") else ""
    units = {row.get("unit") or work["unit"] for row in work["rows"]}
    caption = "" if len(units) > 1 else caption + "\n\n"
    right = [name for name in header if name not in ("contender", "case", "notes")]
    return caption + table([header[place] for place in kept], [[line[place] for place in kept] for line in lines], right)


def _line(work, row, base):
    values = present(row["values"])
    unit = row.get("unit")
    suffix = f" {unit}" if unit and unit != work["unit"] else ""
    return (row["contender"], case_of(row), number(statistics.median(values)) + suffix if values else "–",
            spread(values), ratio(work, row, base), *(middle(row["extra"].get(key)) for key in EXTRAS), middle(row.get("cpu_us")), middle(row.get("peak_mib")),
            row.get("notes") or "")


def case_of(row):
    """A case that is a number has its thousands separated."""
    text = str(row["case"])
    return f"{int(text):,}" if text.isdecimal() else text


def present(values):
    return [value for value in values or [] if value is not None]


def middle(values):
    """The median; nothing where there is none, or where it was 0 each time."""
    values = present(values)
    return number(statistics.median(values)) if any(values) else ""


def spread(values):
    return f"{number(min(values))}–{number(max(values))}" if len(values) > 1 else ""


def ratio(work, row, base):
    """To the median of `base` in the same case and unit."""
    own = present(row["values"])
    for other in work["rows"]:
        theirs = present(other["values"])
        if other["contender"] == base and (other["case"], other.get("unit")) == (row["case"], row.get("unit")) and theirs:
            divisor = statistics.median(theirs)
            return f"{statistics.median(own) / divisor:.2f}" if own and divisor else ""
    return ""


# --- the charts ------------------------------------------------------------------------------------------------------

def draw(work):
    """{file name: SVG} of a work: percentile curves where rows have them, lines for what grows, else bars."""
    curved = [row for row in work["rows"] if row["extra"].get("curve")]
    if curved:
        return {chart_name(work, case): charts.percentiles(f"{work['title']}: {case}", [
            (row["contender"], row["extra"]["curve"], row["contender"]) for row in curved if row["case"] == case])
            for case in unique(row["case"] for row in curved)}
    rows = [row for row in work["rows"] if present(row["values"])]
    if work["name"] in GROWING:
        return draw_lines(work, rows)
    if work["name"] == "rates":
        return draw_rates(work, rows)
    units = unique(unit_of(work, row) for row in rows)
    return {chart_name(work, unit if len(units) > 1 else ""): draw_bars(work, unit, [
        row for row in rows if unit_of(work, row) == unit]) for unit in units}


def unit_of(work, row):
    return row.get("unit") or work["unit"]


def unique(values):
    return list(dict.fromkeys(values))


def chart_name(work, part=""):
    slug = re.sub(r"[^a-z0-9]+", "-", str(part).lower().replace("µ", "u")).strip("-")
    return f"{work['name']}-{slug}.svg" if slug else f"{work['name']}.svg"


def draw_bars(work, unit, rows):
    cases = unique(case_of(row) for row in rows)
    groups = [(case if len(cases) > 1 else "", [
        (row["contender"], present(row["values"]), row["contender"]) for row in rows if case_of(row) == case])
        for case in cases]
    return charts.bars(": ".join([work["title"], *cases][:2 if len(cases) == 1 else 1]), groups, unit)


def axis_of(row):
    """Of "1,000 messages" the messages."""
    return re.sub(r"^[\d,]+ ", "", row["case"]).removesuffix("s") + "s"


def series_of(rows, field="values"):
    """For charts.lines(): what the rows have in a field, by x, a line for each contender."""
    points = {}
    for row in rows:
        found = present(row["values"] if field == "values" else row["extra"].get(field))
        if found:
            points.setdefault(row["contender"], []).append((row["x"], statistics.median(found), min(found), max(found)))
    return [(contender, sorted(mine), contender) for contender, mine in points.items()]


def draw_lines(work, rows):
    """A chart for each axis."""
    drawn = {}
    for axis in unique(axis_of(row) for row in rows):
        mine = [row for row in rows if axis_of(row) == axis]
        drawn[chart_name(work, axis)] = charts.lines(f"{work['title']}: {axis}", series_of(mine), axis, unit_of(work, mine[0]))
    return drawn


def draw_rates(work, rows):
    """Both axes are logarithmic: what a message costs at 10 a second is a hundred times what it costs at 10,000."""
    drawn = {}
    for field, (what, unit) in BY_RATE.items():
        series = series_of(rows, field)
        if series:
            name = "cpu" if field == "values" else field.partition("_")[0]
            drawn[chart_name(work, name)] = charts.lines(f"By rate: {what}", series, "messages a second", unit, y_logarithmic=True)
    return drawn
