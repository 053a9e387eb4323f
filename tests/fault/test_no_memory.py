"""Libraries that find no memory: what they were asked for has not happened, and nobody may act as if it had.

Fault: one function returns its error for want of memory (preloaded library, nomem.c): the one that asks the broker to keep the session,
the one that unsubscribes, the one that makes a SHA-256. SIGKILL of the service then.
Proof: the library counts the failures.
Held: a session whose expiry could not be asked for is not connected, for it and what is queued in it would end with the connection; a
filter that could not be unsubscribed is not forgotten; a message whose SHA-256 could not be made is acknowledged only when it can.
The oracle. Figure: messages, failed calls, lost (0), duplicates.
"""

import hashlib
import signal

import clients
from oracle import AS_TESTER, pause
from processes import wait_until


def test_a_session_that_cannot_be_asked_for(scene, no_memory):
    it = scene(env=no_memory.environment)
    it.running.stop()
    it.publish(500)
    no_memory.on("mosquitto_property_add_int32")
    it.running.start()
    wait_until(lambda: no_memory.failures() >= 1, 20, lambda: f"an attempt\n{it.running.tail()}")
    pause(0.5)  # for as long it would be connected, or is trying
    it.running.kill9()
    it.publish(500)
    no_memory.off()
    it.start()
    it.conclude("no_memory, session expiry", faults=1, failed_calls=no_memory.failures())
    assert "cannot ask for mqtt.session_expiry" in it.running.log


def test_a_filter_that_cannot_be_unsubscribed(scene, no_memory):
    it = scene(env=no_memory.environment, **{"consumer.topic": "other/#"})
    it.running.stop()
    it.running.settings["consumer.topic"] = "sensors/#"
    no_memory.on("mosquitto_unsubscribe_v5")
    it.start()
    wait_until(lambda: no_memory.failures() >= 1, 20, lambda: f"an attempt\n{it.running.tail()}")
    pause(0.5)  # for as long it would be forgotten
    known = (it.running.state / "state.json").read_text()
    assert "other/#" in known, known
    no_memory.off()
    wait_until(lambda: "other/#" not in (it.running.state / "state.json").read_text(), 20, it.running.tail)
    it.conclude("no_memory, unsubscribe", faults=1, failed_calls=no_memory.failures())


def test_a_digest_that_cannot_be_made(scene, no_memory):
    """Of a payload above consumer.max_payload only the first MiB is kept: its SHA-256 is all that is left of the rest."""
    it = scene(env=no_memory.environment, **{"consumer.max_payload": "2MiB"}, broker={"extra": [
        "sys_interval 1", "message_size_limit 0"]})
    no_memory.on("EVP_Digest")
    payload = bytes(3 << 20)
    assert clients.publish(it.broker.plain_port, [payload], "sensors/big", **AS_TESTER)
    assert it.running.wait_exit(20) == -signal.SIGABRT
    assert "no SHA-256" in it.running.log and no_memory.failures() == 1
    no_memory.off()
    it.start()
    it.conclude("no_memory, SHA-256", faults=1, failed_calls=no_memory.failures())
    letter = it.database.dead_letter.find_one({"topic": "sensors/big"})
    assert letter["sha256"] == hashlib.sha256(payload).digest()
