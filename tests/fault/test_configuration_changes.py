"""Client id and topic filter are changed between one life of the service and the next.

Fault: under a steady stream the service is killed at random moments, sometimes before it has connected, and started again with another
mqtt.client_id and another consumer.topic; also back to one it had before. While no filter of the new configuration matches them, and the
service is away, messages come that the one before was subscribed to.
Proof: exit by signal 9; the broker knew a session by each client id.
Held: the stream's topics match every filter, so the oracle holds for all of it; what came while the service was away for a filter that it no
longer has is stored as well, and what comes later is not; at the end no session is left but the one that is configured. Figure:
messages, changes, those for a former filter only, lost (0), duplicates.
"""

import json
import signal

import pytest

import clients
from oracle import AS_TESTER, pause, scaled
from processes import wait_until
from stream import CLIENT, SESSION, seeded

FILTERS = ["sensors/#", "sensors/+/readings", "+/+/readings", "#", "+/#", "sensors/+/#"]
WIDE = ("#", "+/#", "+/+/readings")  # these match plant/…/readings as well


def sessions(it):
    return json.loads((it.running.state / "state.json").read_text())["sessions"]


@pytest.mark.timeout(scaled(180, 900))
def test_changes_between_lives(scene):
    moments, changes = seeded(), scaled(10, 60)
    it = scene()
    ids, former = {CLIENT}, 0
    wide = False  # the filter of the last life that is known to have been subscribed
    with it.stream(pace=500) as stream:
        for number in range(changes):
            it.running.kill9()
            assert it.running.popen.returncode == -signal.SIGKILL
            if wide:
                clients.publish(it.broker.port, 50, lambda _index, number=number: f"plant/{number}/readings", **AS_TESTER)
                former += 50
            client = moments.choice(["one", "two", CLIENT])
            ids.add(client)
            it.running.settings |= {"mqtt.client_id": client, "consumer.topic": moments.choice(FILTERS)}
            if number % 3 == 2:
                it.running.start()
                pause(moments.uniform(0.0, 0.15))  # perhaps before it has subscribed
                wide = False
            else:
                it.start()
                pause(moments.uniform(0.0, 0.4))
                wide = it.running.settings["consumer.topic"] in WIDE
        it.running.kill9()
        it.running.settings |= {"mqtt.client_id": CLIENT, "consumer.topic": "sensors/#"}
        it.start()
        wait_until(lambda: sessions(it) == {SESSION: ["sensors/#"]}, 60,
                   lambda: f"one session is left: {sessions(it)}\n{it.running.tail()}")
        acknowledged = stream.finish()
    clients.publish(it.broker.port, ["0"] * 20, "plant/late/readings", **AS_TESTER)
    it.wait_settled()
    it.wait_drained()
    stored = {(document["topic"], document["payload"]["n"])
              for document in it.database.messages.find({"topic": {"$regex": "^plant/[0-9]"}})}
    assert len(stored) == former, f"{former - len(stored)} of {former} messages for former filters are lost"
    assert it.database.messages.count_documents({"topic": "plant/late/readings"}) == 0, "it is still subscribed to a former filter"
    left = {name: len(clients.take_session(it.broker.port, f"{name}-1", **AS_TESTER)) for name in sorted(ids - {CLIENT})}
    it.conclude("configuration_changes", acknowledged, faults=changes, for_former_filters=former, left_in_old_sessions=sum(left.values()))
    assert not any(left.values()), left
    assert former > 0 and stream.lost == 0
