"""Credentials that are wrong, and rights that are taken away.

Fault: the password at the broker is wrong when the service starts, while the broker has messages queued for it; the role of its MongoDB user
is revoked under a steady stream.
Proof: the broker refuses the connection, by its own log; MongoDB refuses the same user's insert.
Held: the service says what to do, keeps on trying without haste, and shows no secret. With the right password all that the broker had
queued arrives. While the role is missing messages go to the spool, and are acknowledged; it drains by itself when the role is back.
The oracle. Figure: messages, faults, in the spool, lost (0), duplicates.
"""

import pymongo
import pytest

from oracle import MONGO_SECRET, pause, scaled

WRONG = "hush-wrong-4714"


@pytest.mark.timeout(scaled(120, 120))
def test_a_wrong_password_at_the_broker(scene):
    it = scene()
    right = it.running.settings["mqtt.password"]
    it.running.stop()
    it.publish(2000)
    it.running.settings["mqtt.password"] = WRONG
    mark, brokers = it.running.mark(), it.broker.mark()
    it.running.start()
    it.running.wait_log("refuses the connection.*mqtt.username, mqtt.password", timeout=20, after=mark)
    it.publish(2000)
    pause(scaled(3, 20))
    refused = it.broker.log[brokers:].count("not authorised")
    assert 1 <= refused <= scaled(20, 60), "the waits between attempts are too short"
    assert it.running.sums()["consumer"]["received"] == 0 and WRONG not in it.running.log
    it.running.stop()
    it.running.settings["mqtt.password"] = right
    it.start()
    it.conclude("credentials, password at the broker", faults=1, refused=refused)


@pytest.mark.timeout(scaled(120, 300))
def test_a_role_that_is_revoked(scene):
    times = scaled(2, 10)
    it = scene(start=False)
    admin, role = it.server.client().admin, [{"role": "readWrite", "db": "mqtt2mongo"}]
    admin.command("createUser", "writer", pwd=MONGO_SECRET, roles=role)
    uri = it.server.uri.replace(f"{it.server.USER}:", "writer:")
    it.running.settings["mongodb.uri"] = f"{uri}&authSource=admin"
    it.start()
    held = []
    with pymongo.MongoClient(it.running.settings["mongodb.uri"]) as same, it.stream(pace=1000) as stream:
        for _ in range(times):
            stream.wait(len(stream.acknowledged) + 1000)
            mark = it.running.mark()
            admin.command("revokeRolesFromUser", "writer", roles=role)
            with pytest.raises(pymongo.errors.OperationFailure, match="not authorized"):
                same.mqtt2mongo.messages.insert_one({})
            it.running.wait_log("cannot store in MongoDB: not authorized.*needs the role readWrite on mongodb.database", timeout=20, after=mark)
            before = len(stream.acknowledged)
            it.wait_spooled(1500)
            held.append(it.spool())
            assert len(stream.acknowledged) > before
            said = it.running.log[mark:].count("not authorized")
            admin.command("grantRolesToUser", "writer", roles=role)
            it.wait_drained()
            it.running.wait_log("MongoDB takes documents again in the collection messages", after=mark)
            assert said <= 2, it.running.log[mark:]
        acknowledged = stream.finish()
    assert stream.lost == 0
    sums, _ = it.conclude("credentials, role revoked", acknowledged, faults=times, in_spool=held, rate=f"{stream.rate:.0f}/s")
    assert sums["returned"] == 0
