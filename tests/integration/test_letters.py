"""What the log says of dead letters, which nobody would look for otherwise."""

import re

import clients
from processes import wait_until


def lines_of(running, after=0):
    """The log's lines about dead letters: [(how many, the line)]."""
    found = [(re.match(r"(\d+) new dead letters? in ", record["message"]), record) for record in running.records]
    assert all(record["level"] == "warn" for match, record in found if match)
    return [(int(match[1]), record["message"]) for match, record in found if match][after:]


def wait_dead(running, count):
    wait_until(lambda: running.sums()["consumer"]["dead_lettered"] >= count, 30, lambda: f"{count} dead letters\n{running.tail()}")


def test_dead_letters_are_told(mosquitto, mongod, service, database):
    """The first at once, with what to do about it; the rest within a minute, or at the end."""
    broker = mosquitto()
    running = service(broker=broker, mongod=mongod, database=database, settings={"consumer.max_payload": "64KiB"})
    running.wait_log("subscribed to")
    clients.publish(broker.port, ['{"n": 1,}\x1b[2J\n\x9b'], "sensors/first")
    wait_until(lambda: lines_of(running), 10, lambda: f"a line about the dead letter\n{running.tail()}")
    count, line = lines_of(running)[0]
    assert count == 1 and line.startswith(
        "1 new dead letter in dead_letter; the newest: invalid_json: its sender has to send JSON; its topic: sensors/first; "
        "its 16 bytes: {\"n\": 1,}")
    assert "\x1b" not in running.log and "\x9b" not in running.log
    clients.publish(broker.port, [b""] * 50 + [b"x" * 70000], "sensors/further")
    clients.publish(broker.port, 10, "sensors/good")
    wait_dead(running, 52)
    running.wait_stored(10)
    assert len(lines_of(running)) == 1  # the minute is not over
    sums = running.stop()["consumer"]
    (count, line), = lines_of(running, after=1)
    assert line.startswith("51 new dead letters in dead_letter (empty_payload 50, payload_too_large 1); the newest: ")
    assert sums["dead_lettered"] == count + 1 and sums["stored"] == 10


def test_a_hundred_thousand_dead_letters_are_two_lines(mosquitto, mongod, service, database):
    broker = mosquitto()
    running = service(broker=broker, mongod=mongod, database=database)
    running.wait_log("subscribed to")
    clients.publish(broker.port, [b"?"] * 100_000, "sensors/bad", qos=0)
    wait_dead(running, 100_000)
    sums = running.stop()["consumer"]
    assert sums["dead_lettered"] == sum(count for count, _ in lines_of(running)) == 100_000
    assert len(lines_of(running)) == 2


def test_dead_letters_of_the_drain_are_told(mosquitto, fresh_mongod, service):
    """MongoDB is frozen, so that everything goes to the spool: what the drain makes of it is told as well."""
    broker, server = mosquitto(), fresh_mongod()
    running = service(broker=broker, mongod=server)
    running.wait_log("subscribed to")
    clients.publish(broker.port, 1, "sensors/good")
    running.wait_stored(1)
    server.sigstop()
    clients.publish(broker.port, [b"bad"] * 30, "sensors/bad")
    wait_until(lambda: running.sums()["consumer"]["spooled"] >= 30, 20, "everything is in the spool")
    assert not lines_of(running)
    server.sigcont()
    wait_dead(running, 30)
    running.wait_log("empty: MongoDB has every message of it")
    sums = running.stop()["consumer"]
    assert sums["dead_lettered_by_reason"] == {"invalid_json": 30} and sums["recovered_from_spool"] == 30
    assert sum(count for count, _ in lines_of(running)) == 30
    assert "its topic: sensors/bad; its 3 bytes: bad" in lines_of(running)[0][1]
