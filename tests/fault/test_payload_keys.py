"""Payloads whose keys mean something elsewhere: to MongoDB, to extended JSON, to a script.

Fault: $set, dots, the empty key, equal keys, an _id and other fields of ours, __proto__, everything that looks like extended JSON;
once while MongoDB is there, once through the spool.
Proof: the second half is in the spool, and counted as recovered from it.
Held: as the README has it, the keys are stored as they are, in their order, nothing in them is interpreted, and the document has an _id
of ours; a key with U+0000 is a dead letter. Both ways the same, byte for byte of BSON; the oracle. Figure: messages, kinds, lost (0).
"""

import bson
import pytest
from bson.raw_bson import RawBSONDocument

import clients
from oracle import AS_TESTER, scaled
from test_types import ARRAY, EMPTY, INT32, NULL, ONE, STRING, array, check_dead_letter, document, elements, payload_of

TWO = (INT32, 2)


def text(value):
    return STRING, value


# JSON text, and what it must become.
KEYS = [
    ('{"$set":{"a":1}}', document(("$set", document(("a", ONE))))), ('{"$unset":1,"$inc":{"topic":1}}',
                                                                     document(("$unset", ONE), ("$inc", document(("topic", ONE))))),
    ('{"$where":"sleep(1000)"}', document(("$where", text("sleep(1000)")))), ('{"$":1,"$$ROOT":1}', document(("$", ONE), ("$$ROOT", ONE))),
    ('[{"$set":{"a":1}},{"$project":{"a":0}}]',
     array(document(("$set", document(("a", ONE)))), document(("$project", document(("a", (INT32, 0))))))),
    ('{"a.b":1,"a":{"b":2}}', document(("a.b", ONE), ("a", document(("b", TWO))))), ('{".":1,"..":1,".a":1,"a.":1,"a..b":1}',
                                                                                  document(*((key, ONE) for key in (
                                                                                      ".", "..", ".a", "a.", "a..b")))),
    ('{"$a.$b":1,"a.$":1,"a.0":1}', document(("$a.$b", ONE), ("a.$", ONE), ("a.0", ONE))),
    ('{"":1}', document(("", ONE))), ('{"":{"":{"":1}}}', document(("", document(("", document(("", ONE))))))),
    ('{"a":1,"a":2}', document(("a", ONE), ("a", TWO))), ('{"a":{},"a":[],"A":1,"a":null}',
                                                         document(("a", EMPTY), ("a", (ARRAY, [])), ("A", ONE), ("a", (NULL, None)))),
    ("{" + ",".join(['"same":1'] * 1000) + "}", document(*[("same", ONE)] * 1000)),
    ('{"_id":1}', document(("_id", ONE))), ('{"_id":{"$oid":"0123456789abcdef01234567"}}',
                                           document(("_id", document(("$oid", text("0123456789abcdef01234567")))))),
    ('{"_id":1,"_id":2,"topic":"x","received_at":0,"qos":9,"payload":{}}',
     document(("_id", ONE), ("_id", TWO), ("topic", text("x")), ("received_at", (INT32, 0)), ("qos", (INT32, 9)), ("payload", EMPTY))),
    ('{"__proto__":{"admin":1},"constructor":1,"toString":1,"hasOwnProperty":1}',
     document(("__proto__", document(("admin", ONE))), ("constructor", ONE), ("toString", ONE), ("hasOwnProperty", ONE))),
    # like extended JSON
    ('{"$date":"2020-01-01T00:00:00Z"}', document(("$date", text("2020-01-01T00:00:00Z")))),
    ('{"$date":{"$numberLong":"1"}}', document(("$date", document(("$numberLong", text("1")))))),
    *((f'{{"${name}":"1"}}', document((f"${name}", text("1")))) for name in (
        "oid", "numberInt", "numberLong", "numberDouble", "numberDecimal", "uuid", "symbol", "code", "regex", "regularExpression")),
    *((f'{{"${name}":1}}', document((f"${name}", ONE))) for name in ("minKey", "maxKey", "undefined", "type", "timestamp")),
    ('{"$binary":{"base64":"AA==","subType":"00"}}', document(("$binary", document(("base64", text("AA==")), ("subType", text("00")))))),
    ('{"$timestamp":{"t":1,"i":1}}', document(("$timestamp", document(("t", ONE), ("i", ONE))))),
    ('{"$ref":"a","$id":1,"$db":"b"}', document(("$ref", text("a")), ("$id", ONE), ("$db", text("b")))),
    ('{"x":[{"$oid":"0123456789abcdef01234567"}]}', document(("x", array(document(("$oid", text("0123456789abcdef01234567"))))))),
    # and odd
    ('{"0":1,"1":1}', document(("0", ONE), ("1", ONE))), ('{" ":1,"\\t\\n\\u001f":1,"\\"":1,"\\\\":1}',
                                                         document((" ", ONE), ("\t\n\x1f", ONE), ('"', ONE), ("\\", ONE))),
    ('{"ключ":1,"😀":1,"\\ud83d\\ude00":2,"e\\u0301":1,"\u202e":1}',
     document(("ключ", ONE), ("😀", ONE), ("😀", TWO), ("e\u0301", ONE), ("\u202e", ONE))),
    ('{"' + "k" * 100_000 + '":1}', document(("k" * 100_000, ONE))),
]
NUL = b'{"a\\u0000b":1}'


@pytest.mark.timeout(scaled(120, 120))
def test_keys(scene):
    it = scene()
    payloads = [payload.encode() for payload, _ in KEYS] + [NUL]

    def publish(way):
        assert len(clients.publish(it.broker.port, payloads, lambda index: f"sensors/{way}/{index}", **AS_TESTER)) == len(payloads)

    publish("live")
    it.wait_settled()
    assert it.spool() == 0
    it.server.kill9()
    publish("spool")
    it.wait_spooled(len(payloads))
    it.server.restart()
    it.wait_drained()

    raw = it.database.messages.with_options(bson.CodecOptions(document_class=RawBSONDocument))
    found = {each["topic"]: each for each in raw.find()}
    for index, (payload, expected) in enumerate(KEYS):
        live, spooled = found[f"sensors/live/{index}"], found[f"sensors/spool/{index}"]
        assert payload_of(live) == expected, payload[:100]
        assert ([each for each in elements(bytes(live.raw)) if each[0] == "payload"]
                == [each for each in elements(bytes(spooled.raw)) if each[0] == "payload"]), payload[:100]
        for each in (live, spooled):
            assert isinstance(each["_id"], bson.ObjectId)
            assert [key for key, _, _ in elements(bytes(each.raw))] == ["_id", "topic", "payload", "received_at", "qos", "retain", "dup"]
    letters = {letter["topic"]: letter for letter in it.database.dead_letter.find()}
    assert len(letters) == 2
    for way in ("live", "spool"):
        topic = f"sensors/{way}/{len(KEYS)}"
        check_dead_letter(letters[topic], topic, NUL, "key_with_nul", 1)
    # No more and no fewer than these and the last messages of wait_settled(): nothing acted on another document.
    assert it.database.messages.count_documents({"topic": {"$ne": "sensors/end"}}) == 2 * len(KEYS)
    it.conclude("payload_keys", messages=2 * len(payloads), faults=2 * len(payloads), kinds=len(payloads), by_the_spool=len(payloads))
