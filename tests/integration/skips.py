"""A pytest plugin: a skip that tests/skips.txt does not list is a failure, so that no test falls silent unseen."""

from pathlib import Path

import pytest

FILE = Path(__file__).parent.parent / "skips.txt"


def listed(path=FILE):
    """The test ids of skips.txt."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return {line.split()[0] for line in lines if line and not line.startswith("#")}


def allowed(test_id, ids):
    return test_id in ids or test_id.split("[")[0] in ids


def _judge(report):
    if report.outcome == "skipped" and not hasattr(report, "wasxfail") and not allowed(report.nodeid, listed()):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped, which tests/skips.txt does not allow: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return _judge((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return _judge((yield))
