"""What bench/ says of what it measured, and what it measures with. Nothing is timed here."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import pytest

import clients
from processes import ROOT, wait_until

sys.path.insert(0, str(ROOT / "bench"))

import charts  # noqa: E402
import contenders  # noqa: E402
import harness  # noqa: E402
import report  # noqa: E402
import status  # noqa: E402
import targets  # noqa: E402
from works import rates, windows  # noqa: E402
from works.cost import calls_of  # noqa: E402
from works.latency import Watcher, latencies  # noqa: E402

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
    assert cells(text, "| the same at 50 %")[1:] == ["≤ 45 ms", "8 ms", "yes"]
    assert cells(text, "| p99 of the latency at 50 %, mqtt2mongo-interval-0")[1:] == ["≤ 15 ms", "not measured", "–"]
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


def test_works_that_are_not_measured_again_stay(tmp_path):
    """With when and of what they were measured; also when the next report keeps them once more. One that is no work any more goes."""
    import main

    first = sample() | {"rounds": 5, "versions": {"mqtt2mongo": "abc123"}}
    first["works"].append(work("retired", [row("bare", [1])]))
    report.write(first, tmp_path)
    for number in (1, 2):
        again = results(work("drain", [row("bare", [number])])) | {"rounds": 3, "begun": f"2026-11-2{number + 5}T08:00:00+00:00"}
        main.keep_others(again, main.last_report(tmp_path))
        report.write(again, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.count("Not measured again: from 2026-11-23 20:00:00 UTC, of abc123, in 5 rounds.") == 3
    assert cells(text, "| bare | 200,000")[2] == "2" and re.findall("^## (.*)", text, re.M)[1:] == ["Drain", "Latency", "Growth", "Spool"]


def test_a_damaged_report_is_named_before_anything_is_measured(tmp_path):
    (tmp_path / "results.json").write_text('{"works": [')
    said = subprocess.run([sys.executable, ROOT / "bench" / "main.py", "--works", "windows", "--output", tmp_path], capture_output=True,
                          text=True, timeout=20, check=False)
    assert said.returncode == 1 and said.stdout == ""
    assert said.stderr.startswith(f"{tmp_path}/results.json is no report (") and "give another --output" in said.stderr


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


# --- rates and windows -----------------------------------------------------------------------------------------------


def rate_row(contender, rate, values, p50):
    return row(contender, values, f"{rate:,} msg/s", x=rate, cpu_us=[value / 4 for value in values], extra={
        "mongod_cpu_us": [value * 3 / 4 for value in values], "flushes_per_s": [50.0], "p50_ms": p50, "p99_ms": [3 * ms for ms in p50]})


def sample_of_rates():
    return results(
        work("rates", [
            rate_row("mqtt2mongo-1", 10, [1600], [2.3]), rate_row("mqtt2mongo-interval-0", 10, [1500], [2.0]),
            rate_row("mqtt2mongo-1", 2_000, [60, 80, 100], [12.0, 14.0, 11.0]), rate_row("mqtt2mongo-interval-0", 2_000, [200], [2.0]),
            rate_row("python-batched", 2_000, [400], [4.0])],
            unit="µs CPU/msg", better="lower", base="mqtt2mongo-interval-0",
            left_out=[{"contender": "python", "case": "2,000 msg/s", "why": "3.5 s behind after 5 s"}]),
        work("windows", [row("mqtt2mongo-1", [90, 50, 99], "window 20", x=20),
                         row("mqtt2mongo-interval-0", [100, 50, 50], "window 20", x=20)], base="mqtt2mongo-interval-0"))


def test_rates_are_in_tables_and_charts(tmp_path):
    report.write(sample_of_rates(), tmp_path)
    text = (tmp_path / "report.md").read_text()
    header = cells(text, "| contender | case | median | min–max | ratio to mqtt2mongo-interval-0 | p50 ms")
    line = dict(zip(header, cells(text, "| mqtt2mongo-1 | 2,000 msg/s"), strict=True))
    assert line == {"contender": "mqtt2mongo-1", "case": "2,000 msg/s", "median": "80", "min–max": "60–100",
                    "ratio to mqtt2mongo-interval-0": "0.40", "p50 ms": "12", "p99 ms": "36", "flushes/s": "50", "mongod's CPU": "60",
                    "CPU µs/msg": "20"}
    assert "- Not measured: python, 2,000 msg/s: 3.5 s behind after 5 s\n" in text
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == [
        "rates-cpu.svg", "rates-flushes.svg", "rates-p50.svg", "rates-p99.svg", "windows.svg"]
    shown = {element.text for element in ElementTree.fromstring((tmp_path / "rates-p50.svg").read_text()).iter()}
    assert {"from due to stored, median" in str(each) for each in shown} == {True, False}
    assert {"ms", "10", "2,000", "messages a second", "python-batched"} <= shown


def test_a_logarithmic_axis_has_all_that_is_drawn():
    """Whiskers, too: the least of them is below the least median."""
    svg = charts.lines("t", [("a", [(1, 5000, 400, 6000), (10, 20, 3, 30)], "a")], "x", "µs", y_logarithmic=True)
    drawing = ElementTree.fromstring(svg)
    ends = [float(line.get(end)) for line in drawing.iter("{http://www.w3.org/2000/svg}line") for end in ("y1", "y2")]
    texts = [element for element in drawing.iter("{http://www.w3.org/2000/svg}text") if element.get("text-anchor") == "end"]
    marks = {element.text: float(element.get("y")) - 4.5 for element in texts}
    assert {"1", "10", "100", "1,000", "10,000"} <= set(marks)
    assert marks["10"] - marks["100"] == pytest.approx(marks["100"] - marks["1,000"], abs=0.2)
    assert marks["10,000"] - 0.2 <= min(ends[-4:]) and max(ends[-4:]) <= marks["1"] + 0.2


def test_targets_of_rates_and_windows():
    said = {what: (wanted, got, met) for what, wanted, got, met in targets.check(sample_of_rates())}
    total = "CPU time a message, with mongod's, at {}, mqtt2mongo-1 to {}"
    assert said[total.format("2,000 msg/s", "mqtt2mongo-interval-0")] == ("≤ 0.30", "0.40", False)
    assert said[total.format("2,000 msg/s", "python-batched")] == ("≤ 0.25", "0.20", True)
    assert said[total.format("200 msg/s", "telegraf")] == ("≤ 0.35", "not measured", None)
    assert said["median of the latency of lone messages, 10 msg/s, mqtt2mongo-1 to mqtt2mongo-interval-0"] == ("≤ 1.10", "1.15", False)
    assert said["median of the latency at 2,000 msg/s, mqtt2mongo-1"] == ("≤ 20 ms", "12 ms", True)
    # Round by round 0.9, 1 and 1.98: that of the medians would be 1.8.
    assert said["drain through a window of 20, mqtt2mongo-1 to mqtt2mongo-interval-0"] == ("≥ 0.95", "1", True)
    assert said["drain through a window of 1, mqtt2mongo-1 to mqtt2mongo-interval-0"][1:] == ("not measured", None)


def test_every_target_has_a_case_that_is_measured():
    """What a target looks for is what a work calls it."""
    asked = []

    class Asked(targets.Found):
        def values(self, work, contender, case, field="values"):
            asked.append((work, contender, case))
            return [1]

    for *_, find in targets.TARGETS:
        find(Asked(results()))
    assert {case for work, _, case in asked if work == "rates"} == {rate.case for rate in rates.RATES}
    assert {case for work, _, case in asked if work == "windows"} == {str(case) for case in windows.CASES}
    assert {contender for work, contender, _ in asked if work == "rates"} <= set(rates.CONTENDERS) <= set(contenders.ALL)
    assert {one.name for one in windows.made(1)} == {contender for work, contender, _ in asked if work == "windows"}


def test_a_latency_counts_from_when_the_message_was_due():
    """100 a second: number 3 is due 30 ms after number 0, whenever it left."""
    assert latencies({0: 1_000_900_000, 3: 1_032_000_000, 4: 1_041_000_000}, 100, 1_000_000_000, 3) == pytest.approx([2000, 1000])


class Stored:
    """A Bench that has stored so many."""

    def __init__(self, count):
        self.count = count

    def stored(self):
        return self.count


class Begun:
    """A publisher whose first message was due then."""

    def __init__(self, path, t0):
        self.stdout = path
        path.write_text(json.dumps({"t0": t0}) + "\n")

    def check_alive(self):
        pass


@pytest.mark.parametrize(("contender", "stored", "fits"), [("python", 850, True), ("python", 750, False), ("telegraf", 750, True)])
def test_a_contender_that_is_more_than_a_second_behind_is_too_slow(tmp_path, monkeypatch, contender, stored, fits):
    """9 s at 100 a second: 901 are due. What telegraf gathers for a second is no sign of slowness."""
    schedule = rates.Schedule(Begun(tmp_path / "out", 1_000_000_000), rates.Rate(100, 1, 1, 1))
    monkeypatch.setattr(rates, "time", SimpleNamespace(monotonic_ns=lambda: 10_000_000_000))
    assert schedule.due() == 901
    if fits:
        schedule.must_keep_up(Stored(stored), contenders.ALL[contender])
    else:
        with pytest.raises(rates.TooSlow, match=r"^1\.5 s behind after 9 s"):
            schedule.must_keep_up(Stored(stored), contenders.ALL[contender])


def test_who_is_left_out_has_no_further_turn():
    rows = harness.Rows("rates", "Rates", "µs", "lower")
    rows.leave_out("python", "2,000 msg/s", "why")
    with rows.attempt(None, Forgotten("node"), "10 msg/s"):
        raise harness.Failed("it")
    assert [rows.is_out(name, case) for name in ("python", "node") for case in ("10 msg/s", "2,000 msg/s")] == [
        False, True, True, False]


def test_what_the_live_rate_says_need_not_be_tried(tmp_path):
    """node-durable has none of its own: node's."""
    bench, rows = harness.Bench(tmp_path), harness.Rows("rates", "Rates", "µs", "lower")
    bench.found["live"] = work("live", [row("python", [600, 700, 800], "live"), row("node", [9_000], "live")])
    rates.leave_out_slow(bench, rows, [contenders.ALL[name] for name in ("python", "node-durable", "telegraf")], rates.RATES)
    assert [(out["contender"], out["case"], out["why"]) for out in rows.work["left_out"]] == [
        ("python", "2,000 msg/s", "its live rate is 700"), ("python", "10,000 msg/s", "its live rate is 700"),
        ("node-durable", "10,000 msg/s", "its live rate is 9,000")]


class Forgotten(contenders.Contender):
    def forget(self, bench):
        pass


def test_cpu_time_is_that_of_all_threads_and_finer_than_a_tick():
    """Those that have ended, too."""
    def burn():
        end = time.thread_time() + 0.05
        while time.thread_time() < end:
            pass

    before = harness.cpu_seconds(os.getpid())
    thread = threading.Thread(target=burn)
    thread.start()
    thread.join()
    used = harness.cpu_seconds(os.getpid()) - before
    assert 0.05 <= used < 0.5 and (used * 100) % 1 > 1e-6


def test_an_interval_of_zero_is_asked_for(tmp_path):
    bench = harness.Bench(tmp_path)
    bench.broker = bench.mongod = At()
    argv = [str(part) for part in contenders.ALL["mqtt2mongo-interval-0"].argv(bench)]
    assert argv[argv.index("--consumer-batch-interval") + 1] == "0s"
    assert "--consumer-batch-interval" not in contenders.ALL["mqtt2mongo-1"].argv(bench)
    windowed = [str(part) for part in windows.made(17)[1].argv(bench)]
    assert [windowed[windowed.index(name) + 1] for name in ("--mqtt-protocol", "--mqtt-port", "--consumer-batch-interval")] == [
        "3.1.1", "17", "0s"]


class At:
    port, uri = 18, "mongodb://127.0.0.1:19/"


def test_telegraf_is_configured_or_missing(tmp_path, monkeypatch):
    bench, telegraf = harness.Bench(tmp_path), contenders.ALL["telegraf"]
    bench.broker = bench.mongod = At()
    (tmp_path / "runs" / "telegraf").mkdir(parents=True)
    program = tmp_path / "telegraf"
    monkeypatch.setenv("MQTT2MONGO_BENCH_TELEGRAF", str(program))
    assert telegraf.missing() == f"{program} is no program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert telegraf.missing() == ""
    said, _, config = telegraf.argv(bench)
    assert said == str(program)
    found = tomllib.loads(config.read_text())
    assert found["inputs"]["mqtt_consumer"][0]["servers"] == ["tcp://127.0.0.1:18"]
    assert found["outputs"]["mongodb"][0] == {"dsn": At.uri, "database": harness.DATABASE}
    assert "$" not in config.read_text()
    monkeypatch.delenv("MQTT2MONGO_BENCH_TELEGRAF")
    monkeypatch.setattr(contenders, "TELEGRAF", ROOT / "build" / "no" / "telegraf")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert "no telegraf on PATH" in telegraf.missing()


# --- on a real mongod and a real broker ------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path, mongod):
    bench = harness.Bench(tmp_path)
    (tmp_path / "runs").mkdir()
    bench.mongod = bench.broker = mongod
    bench.client = mongod.client()
    bench.messages.drop()
    yield bench
    bench.messages.drop()


def numbered(numbers):
    return [{"payload": {"sequence": number}} for number in numbers]


def test_the_watcher_sees_all_before_it_ends(bench):
    """Nobody told it how many, and when it is told to end it has not looked at one of them yet."""
    with Watcher(bench, "payload.sequence", 3) as watcher:
        watcher.sigstop()
        for first in range(0, 100, 10):
            bench.messages.insert_many(numbered(range(first, first + 10)))
        watcher.signal(signal.SIGTERM)
        watcher.sigcont()
        watcher.finish()
        assert sorted(watcher.seen()) == list(range(0, 100, 3))


def test_a_watcher_that_was_told_ends_by_itself(bench):
    with Watcher(bench, "sequence", 1, 2) as watcher:
        bench.messages.insert_many([{"sequence": float(number)} for number in range(3)])
        wait_until(lambda: not watcher.alive, 10, "the watcher has ended")
        assert sorted(watcher.seen()) == [0, 1]


def test_inserts_and_flushes_are_counted(bench):
    """An insert that waits for the journal makes it be flushed."""
    before = rates.Seen(bench, None, first=True)
    for number in range(30):
        bench.messages.insert_many(numbered([number, number]))
    after = rates.Seen(bench, None, first=False)
    assert after.stored - before.stored == 60
    assert 30 <= after.inserts - before.inserts < 45
    assert 30 <= after.flushes - before.flushes < 90
    assert 0 < after.mongod - before.mongod < 10


def test_what_a_message_costs_is_what_was_spent_by_the_messages_stored(bench, monkeypatch):
    def pass_time(sleep):
        monkeypatch.setattr(rates, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))

    pass_time(lambda _: bench.messages.insert_many(numbered(range(40))))
    spent = rates.spent(bench, None, 1)
    assert 20 <= spent["messages_per_insert"] <= 40 and spent["contender_cpu_us"] == 0 and 0 < spent["mongod_cpu_us"] < 1e6
    pass_time(lambda _: None)
    with pytest.raises(harness.Failed, match="nothing was stored"):
        rates.spent(bench, None, 1)


@pytest.mark.parametrize("stored", [[0, 1, 1], [0, 1, 3], [0, 1], [0, 1, 2, 2], []])
def test_telegrafs_messages_are_counted(bench, stored):
    telegraf = contenders.ALL["telegraf"]
    if stored:
        bench.messages.insert_many([{"sequence": float(number)} for number in stored])
    with pytest.raises(harness.Failed, match="^telegraf stored"):
        telegraf.check(bench, 3)
    bench.messages.delete_many({})
    bench.messages.insert_many([{"sequence": float(number)} for number in range(3)])
    telegraf.check(bench, 3)


@pytest.mark.parametrize(("limit", "kept"), [(1, True), (50, False)])
def test_a_window_that_the_broker_does_not_keep_to_is_noticed(bench, mosquitto, limit, kept):
    """The work asks for windows of 1 from brokers that have one of 1, and of 50."""
    bench.broker = mosquitto(extra=[f"max_inflight_messages {limit}"])
    contender, case = windows.made(bench.broker.port)[0], windows.Case(1, 300)
    for client, topic_filter in contender.sessions():
        clients.create_session(bench.broker.port, client, topic_filter)
    clients.publish(bench.broker.port, [json.dumps(harness.payload(number)) for number in range(case.count)], harness.topic)
    if kept:
        assert windows.drain(bench, contender, case).extra["messages_per_insert"] > 0.9
    else:
        with pytest.raises(harness.Failed, match="does not keep to its window of 1"):
            windows.drain(bench, contender, case)
