"""Retained messages, and connections that come and go.

Fault: 50 topics have retained messages, half from before the service first subscribed, half from after; then the broker is restarted,
the connection is cut, the service is restarted by SIGTERM and by SIGKILL, once with messages on their way and once with MongoDB down.
Proof: it subscribes anew each time; a client that subscribes for the first time is given all 50.
Held: each retained message is stored once, however often the service comes back: those from before as retained, the others as not; a new
value published meanwhile is stored once, too; the oracle. Figure: messages, reconnects, retained ones, stored again (0), lost (0).
"""

import pytest

import clients
from faults import Link
from oracle import AS_TESTER, SUBSCRIBED, scaled
from processes import wait_until

COUNT = 50


def retain(it, numbers, value):
    for number in numbers:
        clients.publish(it.broker.port, [b'{"value": "%s"}' % value.encode()], f"sensors/retained/{number}", retain=True, **AS_TESTER)


def retained(it):
    """{topic: [(value, retain), …]}"""
    found = {}
    for document in it.database.messages.find({"topic": {"$regex": "^sensors/retained/"}}).sort("_id", 1):
        found.setdefault(document["topic"], []).append((document["payload"]["value"], document["retain"]))
    return found


@pytest.mark.timeout(scaled(120, 400))
def test_retained_messages(scene):
    times = scaled(1, 8)
    it = scene(start=False)
    reconnects = 0
    with Link(it.broker.port) as link:
        it.running.settings["mqtt.port"] = link.port
        retain(it, range(0, COUNT, 2), "before")
        it.start()
        retain(it, range(1, COUNT, 2), "after")
        it.wait_settled()
        expected = {f"sensors/retained/{number}": [("after", False) if number % 2 else ("before", True)] for number in range(COUNT)}
        assert retained(it) == expected

        def broker_restarts():
            it.broker.restart()

        def connection_is_cut():
            link.cut_in_answer(60)
            it.publish(100)

        def terminated():
            it.running.stop()
            it.running.start()

        def killed():
            it.publish(2000)
            it.running.kill9()
            it.running.start()

        def killed_without_mongodb():
            it.server.kill9()
            it.publish(500)
            it.wait_spooled(500)
            it.running.kill9()
            it.server.restart()
            it.running.start()

        for round_ in range(times):
            for happens in (broker_restarts, connection_is_cut, terminated, killed, killed_without_mongodb):
                mark = it.running.mark()
                happens()
                it.running.wait_log(SUBSCRIBED, timeout=30, after=mark)
                reconnects += 1
                if happens is connection_is_cut:
                    wait_until(lambda: not link.cutting, 10, "the connection is cut")
            retain(it, [round_], f"new {round_}")
            expected[f"sensors/retained/{round_}"].append((f"new {round_}", False))
        it.wait_settled()
        it.wait_drained()
        with clients.Subscriber(it.broker.port, "sensors/retained/#", **AS_TESTER) as subscriber:
            assert len(subscriber.wait(COUNT)) == COUNT and all(message.retain for message in subscriber.messages)
        found = retained(it)
        again = sum(len(each) for each in found.values()) - sum(len(each) for each in expected.values())
        it.conclude("retained", faults=reconnects, retained=COUNT, stored_again=again)
        assert found == expected and link.cuts == times
