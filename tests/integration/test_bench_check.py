"""The bench compares only what is complete: its check must fail when it should. (Nothing is timed here.)"""

import copy
import json
import sys
from datetime import UTC, datetime

import pytest

from processes import ROOT

sys.path.insert(0, str(ROOT / "bench"))

from harness import Bench, Failed, payload, topic  # noqa: E402

pytestmark = pytest.mark.not_sanitized("it is about the bench's own tools")
COUNT = 50


@pytest.fixture
def bench(tmp_path, mongod):
    bench = Bench(tmp_path)
    bench.client = mongod.client()
    bench.messages.drop()
    yield bench
    bench.messages.drop()


def documents():
    return [{"topic": topic(number), "payload": payload(number), "received_at": datetime.now(UTC), "qos": 1, "retain": False,
             "dup": False} for number in range(COUNT)]


def test_what_is_complete_passes(bench):
    bench.messages.insert_many(documents())
    bench.check("it", COUNT)


def missing(stored):
    stored.pop(7)


def doubled(stored):
    stored.append(copy.deepcopy(stored[7]))


def one_twice_instead_of_another(stored):
    stored[7] = copy.deepcopy(stored[8])


def altered(stored):
    stored[7]["payload"]["temperature"] = 21.54


def of_another_type(stored):
    stored[7]["payload"]["sequence"] = 7.0


def with_more_than_the_envelope(stored):
    stored[7]["extra"] = 1


def without_time(stored):
    del stored[7]["received_at"]


@pytest.mark.parametrize("wrong", [missing, doubled, one_twice_instead_of_another, altered, of_another_type,
                                   with_more_than_the_envelope, without_time, list.clear])
def test_what_is_wrong_fails(bench, wrong):
    stored = documents()
    wrong(stored)
    if stored:
        bench.messages.insert_many(stored)
    with pytest.raises(Failed, match="^it stored"):
        bench.check("it", COUNT)


@pytest.mark.parametrize("size", [1024, 10 * 1024])
def test_a_payload_is_as_large_as_it_says(size):
    length = len(json.dumps(payload(3, size), separators=(",", ":")))
    assert size <= length < size + 100
