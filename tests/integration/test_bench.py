"""What bench/ says of what it measured. Nothing is measured here."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from processes import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import charts  # noqa: E402
import report  # noqa: E402
import status  # noqa: E402
from works.cost import calls_of  # noqa: E402

pytestmark = pytest.mark.not_sanitized("it is about the benchmark's own tools")


def row(contender, values, case="200000", **more):
    return {"contender": contender, "case": case, "x": None, "values": values, "cpu_us": None, "peak_mib": None, "extra": {},
            "notes": "", **more}


def work(name, rows, **more):
    return {"name": name, "title": name.capitalize(), "unit": "msg/s", "better": "higher", "parameters": {"window": 4096},
            "rows": rows, "errors": [], **more}


CURVE = [[0, 1.0], [50, 2.0], [90, 3.5], [99, 8.0], [99.9, 40.0], [99.99, 90.0], [100, 91.0]]


def results(*works):
    return {"begun": "2026-11-23T20:00:00+00:00", "seconds": 200, "command": ["bench/main.py", "--quick"], "machine": {"processor": "a | b", "cores": 2},
            "versions": {"mongod": "6.0.5"}, "works": list(works)}


def sample():
    drain = work("drain", [
        row("bare", [200_000, 100_000, 300_000], cpu_us=[4, 5, 6], peak_mib=[3, 3, 3]),
        row("mqtt2mongo-1", [120_000, 110_000, 90_000], cpu_us=[9, 8, 7], peak_mib=[20, 21, 22], notes="of <all> & each"),
        row("mqtt2mongo-4", [150_000, 140_000, 120_000]), row("node", [60_000, 50_000, 40_000])],
        left_out=[{"contender": "python", "case": "200000", "why": "too slow"}],
        errors=[{"contender": "insert-1", "case": "200000", "error": "ended with 1"}])
    latency = work("latency", [row("mqtt2mongo-1", [8.0], "50 %", extra={"curve": CURVE, "p50": [2.0]}),
                               row("node-durable", [16.0], "50 %", extra={"curve": [[share, ms * 2] for share, ms in CURVE], "p50": [4.0]})],
                   unit="ms", better="lower")
    growth = work("growth", [row("mqtt2mongo-1", [5 + step, 6 + step], f"{10 ** step:,} messages", x=10 ** step)
                            for step in (4, 5, 6)], unit="µs", better="lower")
    return results(drain, latency, growth, work("spool", [], errors=[
        {"contender": None, "case": None, "error": "AssertionError: not within 30 s\nlast line"}]))


@pytest.fixture
def written(tmp_path):
    report.write(sample(), tmp_path)
    return tmp_path


def cells(text, start):
    line = next(line for line in text.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables_have_medians_and_ratios(written):
    text = (written / "report.md").read_text()
    assert cells(text, "| mqtt2mongo-1 | 200,000") == ["mqtt2mongo-1", "200,000", "110,000", "90,000–120,000", "0.55", "8", "21",
                                                       "of <all> & each"]
    assert cells(text, "| mqtt2mongo-1 | 50 %") == ["mqtt2mongo-1", "50 %", "8", "2"]
    assert cells(text, "| bare ")[2:5] == ["200,000", "100,000–300,000", "1.00"]
    assert "    bench/main.py --quick\n" in text and "a \\| b" in text and "6.0.5" in text


def test_a_work_that_failed_is_shown_as_such(written):
    text = (written / "report.md").read_text()
    assert re.search(r"## Spool\n.*\*\*This work failed:\*\*\n\n    AssertionError: not within 30 s\n    last line", text, re.S)


def test_a_contender_that_failed_or_was_left_out_is_shown_as_such(written):
    text = (written / "report.md").read_text()
    assert "**insert-1, 200,000 failed:**\n\n    ended with 1\n" in text
    assert "- Not measured: python, 200,000: too slow\n" in text


def test_targets_are_met_missed_or_not_measured(written):
    text = (written / "report.md").read_text()
    assert cells(text, "| drain of 200,000, mqtt2mongo-1 to bare ")[1:] == ["≥ 0.50", "0.55", "yes"]
    assert cells(text, "| CPU time a message in the drain")[1:] == ["≤ 1.50", "1.60", "**no**"]
    assert cells(text, "| p99 of the latency at 50 %")[1:] == ["≤ 15 ms", "8 ms", "yes"]
    assert cells(text, "| CPU time a message, one of 1,000,000")[1:] == ["≤ 1.10", "1.21", "**no**"]
    assert cells(text, "| live rate")[2:] == ["not measured", "–"]


def test_charts_are_svg_and_named_in_the_report(written):
    charts_there = sorted(path.name for path in written.glob("*.svg"))
    assert charts_there == ["drain.svg", "growth-messages.svg", "latency-50.svg"]
    for name in charts_there:
        root = ElementTree.fromstring((written / name).read_text())
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert f"]({name})" in (written / "report.md").read_text()
    texts = [element.text for element in ElementTree.fromstring((written / "drain.svg").read_text()).iter()]
    assert {"mqtt2mongo-1", "110,000", "msg/s"} <= set(texts)


def test_results_are_kept_as_they_are(written):
    assert json.loads((written / "results.json").read_text()) == sample()


def test_an_old_chart_does_not_stay(written):
    report.write(results(), written)
    assert not list(written.glob("*.svg"))


def test_numbers_are_for_people():
    assert [charts.number(value) for value in (1234567, 99.46, 5.678, 3, 0.001234, 0, None)] == [
        "1,234,567", "99.5", "5.68", "3", "0.0012", "0", "–"]


def test_the_table_of_strace_is_read():
    assert calls_of("""% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 85.32    2.882275       18595       155        15 futex
  2.62    0.088510          10      8123           read
------ ----------- ----------- --------- --------- ----------------
100.00    3.378291         217     15539        15 total
""") == {"futex": 155, "futex failed": 15, "read": 8123}


class Running:
    """A Run that runs."""

    name = "it"

    def check_alive(self):
        pass

    look = check_alive

    @staticmethod
    def tail(_):
        return ""


def test_a_rate_is_from_the_first_message_seen_to_the_last(monkeypatch):
    monkeypatch.setattr(status, "INTERVAL", 0.1)
    seen = iter([0, 0, 0, 100, 150, 200])
    assert status.rate_until(Running(), lambda: next(seen), 200, 10) == pytest.approx(500, rel=0.1)
    with pytest.raises(status.Failed, match="100 of 200 within 0.05 s"):
        status.rate_until(Running(), lambda: 100, 200, 0.05)
    with pytest.raises(status.Failed, match="all 200 at once"):
        status.rate_until(Running(), lambda: 200, 200, 10)


def test_scripts_bench_says_how_it_is_used():
    said = subprocess.run([ROOT / "scripts" / "bench", "--help"], check=True, capture_output=True, text=True, timeout=20).stdout
    assert {"--quick", "--works", "--rounds", "--report"} <= set(re.findall(r"--[a-z]+", said))
    assert subprocess.run([ROOT / "scripts" / "bench", "--unknown"], capture_output=True, timeout=20, check=False).returncode == 2
