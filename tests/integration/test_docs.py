"""What the documents say, held against the program."""

import re
import subprocess

import clients
from processes import ROOT, wait_until
from service import BUILD
from test_http import parse, request, scrape, watched  # noqa: F401 (a fixture, found by name)

README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def output(*args):
    return subprocess.run([BUILD / "src" / "mqtt2mongo", *args], check=True, capture_output=True, text=True, timeout=20).stdout


def test_the_readme_has_the_table_of_settings():
    """Generated: build/release/src/mqtt2mongo --markdown"""
    assert output("--markdown").strip() in README


def test_every_setting_named_in_the_documents_exists():
    table = set(re.findall(r"^\| `([a-z_.]+)`", output("--markdown"), re.M))
    sections = {key.split(".")[0] for key in table if "." in key}
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        named = set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", path.read_text()))
        unknown = {key for key in named if key.split(".")[0] in sections} - table
        assert not {key for key in unknown if not key.endswith((".c", ".h", ".py", ".conf", ".lock", ".json", ".db"))}, path


def test_every_flag_of_the_readme_exists():
    known = set(re.findall(r"--[a-z][a-z0-9-]+", output("--help")))
    usage = README[README.index("## Using it"):README.index("## Configuration")]
    lines = [line for line in usage.splitlines() if "mqtt2mongo -" in line]
    assert lines
    for line in lines:
        assert set(re.findall(r"--[a-z][a-z0-9-]+", line)) <= known, line


def test_every_flag_of_a_script_exists():
    """What follows the script's name, up to the end of the line or of the quotation."""
    seen = set()
    for path in DOCUMENTS:
        for script, rest in re.findall(r"\bscripts/(demo|test|bench)\b([^`\n]*)", path.read_text()):
            usage = subprocess.run([ROOT / "scripts" / script, "--help"], check=True, capture_output=True, text=True, timeout=20)
            for flag in re.findall(r"(?<=\s)--?[a-z][a-z-]*", rest):
                assert re.search(rf"(?<![\w-]){flag}\b", usage.stdout), f"{path.name}: scripts/{script} {flag}"
                seen.add((script, flag))
    assert {("test", "--quick"), ("bench", "--quick"), ("demo", "--keep")} <= seen


def test_every_file_named_in_the_documents_exists():
    for path in DOCUMENTS:
        text = path.read_text()
        links = re.findall(r"\]\(([^)#:]+)\)", text)
        named = re.findall(r"`((?:scripts|config|docs|bench|tests)/[\w./-]+)`", text)
        for name in links + named:
            assert (ROOT / name).exists() or (path.parent / name).exists(), f"{path.name}: {name}"


def test_every_reason_of_a_dead_letter_is_documented():
    reasons = set(re.findall(r'return "([a-z0-9_]+)";', (ROOT / "src" / "document.c").read_text()))
    assert {"payload_too_large", "unique_index"} <= reasons
    for reason in reasons:
        assert f"`{reason}`" in README, reason


def table_of(section, head):
    """The names in the first column of the table that begins with `head`, in a section of docs/operation.md."""
    text = (ROOT / "docs" / "operation.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    table = re.search(rf"^\| {head} \|[^\n]*\n\|---\|---\|\n((?:\|[^\n]*\n)+)", text, re.M)
    assert table, f"no table {head} in {section}"
    return [name for row in table[1].splitlines() for name in re.findall(r"`([a-z0-9_]+)(?:\{[a-z]+\})?`", row.split("|")[1])]


def test_the_sums_and_metrics_are_those_of_the_documents(watched, mosquitto):
    """What it prints and what /metrics says, name by name: no term without a word about it, none that is not there."""
    broker = mosquitto(extra=["sys_interval 1"])
    running = watched(broker=broker)
    wait_until(lambda: "broker_dropped_messages" in scrape(running.http_port), what="the broker has told")
    families = re.findall(r"^# TYPE mqtt2mongo_(\w+) ", request(running.http_port, "/metrics").text, re.M)
    asked = running.sums()
    assert running.stop().keys() == asked.keys() == {"consumer", "publisher", "loop"}
    told = watched(broker=broker, ready=False, **{"publisher.count": 20}).finish()
    assert told.keys() == {*asked, "check"}
    for part, terms in told.items():
        assert sorted(table_of("The sums", part)) == sorted(terms), part
        assert part == "check" or asked[part].keys() == terms.keys()
    assert sorted(table_of("Watching it", "metric")) == sorted(families)
    equation = (ROOT / "docs" / "operation.md").read_text().partition("\n## The sums\n")[2].partition("\n| consumer")[0]
    assert set(re.findall(r"[a-z_]+(?= [+=]|\n)", equation[equation.index("    received"):])) <= set(told["consumer"])


def test_a_retained_deletion_raises_no_alert(watched, mosquitto):
    """The rule of docs/operation.md, read as Prometheus would: an empty payload deletes a retained message, JSON that is none is bad."""
    rule = re.search(r"expr: .*increase\(mqtt2mongo_dead_lettered_total(\{.*?\})?\[", (ROOT / "docs" / "operation.md").read_text())
    excluded = set(re.findall(r'reason!="([a-z_]+)"', rule[1] or ""))

    def firing():
        reasons = parse(request(running.http_port, "/metrics").text)["mqtt2mongo_dead_lettered_total"]
        return {dict(labels)["reason"]: count for labels, count in reasons.items() if count and dict(labels)["reason"] not in excluded}

    broker = mosquitto()
    running = watched(broker=broker, role="consumer")
    clients.publish(broker.port, ["{}", ""], "sensors/gone", retain=True)
    wait_until(lambda: scrape(running.http_port)["dead_lettered_total"] == 1, what="the deletion is a dead letter")
    assert not firing()
    clients.publish(broker.port, ["{"])
    wait_until(firing, what="the alert fires")
    assert firing() == {"invalid_json": 1}
    running.stop()


def test_every_metric_is_documented():
    source = (ROOT / "src" / "metrics_prometheus.c").read_text()
    metrics = set(re.findall(r'\b(?:family|counter|gauge|seconds|histogram|causes)\(out, "([a-z0-9_]+)"', source))
    operation = (ROOT / "docs" / "operation.md").read_text()
    documented = set(re.findall(r"`([a-z0-9_]+)(?:\{[a-z]+\})?`", operation))
    assert len(metrics) > 30
    assert metrics <= documented, metrics - documented
    alerts = set(re.findall(r"mqtt2mongo_([a-z0-9_]+?)(?:_bucket)?\b", operation[operation.index("## Watching it"):])) - {""}
    assert alerts <= metrics, alerts - metrics
