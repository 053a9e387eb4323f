"""Two services with one client id.

Fault: a second service is started with the mqtt.client_id of the first, another state directory and another spool; the broker throws one out
when the other connects. After a while the second is stopped.
Proof: the broker says that a client was already connected, several times.
Held: both say what is wrong; they do not throw each other out faster and faster: the waits between attempts grow; what each had received is
stored, and what it had not comes to the other; when one is gone the other goes on as before. The oracle. Figure: messages, how often
they were thrown out in the first and in the second half, lost (0), duplicates.
"""

import pytest

from oracle import SERVICE, SUBSCRIBED, pause, scaled
from stream import CLIENT, SESSION


@pytest.mark.timeout(scaled(120, 200))
@pytest.mark.parametrize("protocol", scaled(["5"], ["5", "3.1.1"]))
def test_two_services(scene, service, protocol):
    half = scaled(6, 30)
    waits = {"mqtt.reconnect.min": "500ms", "mqtt.reconnect.max": "30s", "mqtt.protocol": protocol}
    it = scene(**waits)
    pid, thrown_out = it.running.pid, []
    with it.stream(pace=500) as stream:
        stream.wait(500)
        mark = it.running.mark()
        second = service(broker=it.broker, mongod=it.server, settings=waits | {
            "mqtt.client_id": CLIENT, "mqtt.username": SERVICE[0], "mqtt.password": SERVICE[1]}, name="second")
        second.wait_log(SUBSCRIBED, timeout=20)
        for _ in range(2):
            brokers = it.broker.mark()
            pause(half)
            thrown_out.append(it.broker.log[brokers:].count(f"{SESSION} already connected, closing old connection"))
        said = [it.running.log[mark:], second.log]
        stopped = second.stop()["consumer"]
        stream.wait(len(stream.acknowledged) + 500)
        acknowledged = stream.finish()
    assert it.running.pid == pid and it.running.alive
    first = it.running.sums()["consumer"]
    it.conclude(f"one_client_id, {protocol}", acknowledged, faults=1, thrown_out=thrown_out, first_received=first["received"],
                second_received=stopped["received"], redelivered=first["redelivered"] + stopped["redelivered"])
    assert all("client id" in each for each in said), said
    assert stopped["in_flight"] == 0 and stopped["received"] > 0 and stopped["spooled"] == stopped["recovered_from_spool"]
    assert sum(thrown_out) >= 2 and sum(thrown_out) <= half * 2, "it is a ping-pong"
    assert thrown_out[1] <= thrown_out[0], "the waits do not grow"
