"""What the documents say, held against the program."""

import re
import subprocess

from processes import ROOT
from service import BUILD

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


def test_every_metric_is_documented():
    source = (ROOT / "src" / "metrics_prometheus.c").read_text()
    metrics = set(re.findall(r'\b(?:family|counter|gauge|seconds|histogram|causes)\(out, "([a-z0-9_]+)"', source))
    operation = (ROOT / "docs" / "operation.md").read_text()
    documented = set(re.findall(r"`([a-z0-9_]+)(?:\{[a-z]+\})?`", operation))
    assert len(metrics) > 30
    assert metrics <= documented, metrics - documented
    alerts = set(re.findall(r"mqtt2mongo_([a-z0-9_]+?)(?:_bucket)?\b", operation[operation.index("## Watching it"):])) - {""}
    assert alerts <= metrics, alerts - metrics
