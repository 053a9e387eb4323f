"""Count the tests of a run, for scripts/test.

    test_results.py SKIPS FILE

FILE is pytest's JUnit XML or meson's testlog.json. Prints "PASSED FAILED SKIPPED", then what failed, one a line. A skip
that the file SKIPS does not list counts as failed.
"""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def pytest_results(file):
    """(id, outcome) of each test. A test that failed and whose teardown failed too is in the file twice: it counts once."""
    results = {}
    for case in ElementTree.parse(file).iter("testcase"):
        name = f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            results[name] = "failed"
        elif case.find("skipped") is not None:
            results.setdefault(name, "allowed")  # the plugin skips.py has judged it
        else:
            results.setdefault(name, "passed")
    return results.items()


def meson_results(file):
    """(id, outcome) of each subtest: what the programs print as TAP; one that dies on the way has failed once more."""
    for line in Path(file).read_text().splitlines():
        program = json.loads(line)
        name = "unit/" + program["name"].rpartition(" / ")[2].rpartition(":")[2]
        subtests = re.findall(r"^(not )?ok +\d+(?: +- +([^#\n]*))?(?: *# *(SKIP) *(.*))?", program.get("stdout", ""), re.M)
        for bad, title, skip, skipped_title in subtests:  # cmocka says "not ok 3 # SKIP title"
            yield f"{name}/{(title or skipped_title).strip()}", "skipped" if skip else "failed" if bad else "passed"
        good = program["result"] in ("OK", "EXPECTEDFAIL")
        if not subtests:
            yield name, "passed" if good else "skipped" if program["result"] == "SKIP" else "failed"
        elif not good and not any(bad for bad, _, _, _ in subtests):
            yield f"{name} ({program['result']})", "failed"


def main(skips_file, file):
    lines = (line.strip() for line in Path(skips_file).read_text().splitlines())
    skips = {line.split()[0] for line in lines if line and not line.startswith("#")}
    passed, failed, skipped = 0, [], 0
    for name, outcome in meson_results(file) if file.endswith(".json") else pytest_results(file):
        if outcome == "passed":
            passed += 1
        elif outcome == "allowed" or (outcome == "skipped" and any(name == skip or name.startswith(f"{skip}/") for skip in skips)):
            skipped += 1
        else:
            failed.append(name + (" (skipped, which tests/skips.txt does not allow)" if outcome == "skipped" else ""))
    print(passed, len(failed), skipped)
    print("\n".join(failed))


if __name__ == "__main__":
    main(*sys.argv[1:])
