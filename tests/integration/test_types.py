"""Payloads: every JSON value with its exact BSON type, and everything else as a dead letter, byte for byte."""

import datetime
import hashlib
import json
import re
import struct

import bson
import pymongo
import pytest
from bson.decimal128 import Decimal128
from bson.int64 import Int64
from bson.raw_bson import RawBSONDocument

import clients
from processes import wait_until

KIB, MIB = 1024, 1024 * 1024


def consuming(running):
    running.wait_log("subscribed to")
    return running


def wait_settled(running, count):
    """Wait until `count` messages are stored or dead letters."""
    def settled():
        sums = running.sums()["consumer"]
        return sums["stored"] + sums["dead_lettered"] >= count

    wait_until(settled, 30, lambda: f"{count} messages have gone somewhere: {running.printed_sums[-1]}", interval=0.1)


# --- reading BSON as it is, duplicates and all -----------------------------------------------------------------------------

DOUBLE, STRING, DOCUMENT, ARRAY, BOOL, NULL, INT32, INT64, DECIMAL = 0x01, 0x02, 0x03, 0x04, 0x08, 0x0A, 0x10, 0x12, 0x13


def elements(data):
    """The elements of a BSON document in their order, as (key, type, bytes of the value). pymongo would drop duplicates."""
    size, = struct.unpack_from("<i", data)
    assert size == len(data) and data[-1] == 0
    at, found = 4, []
    while at < size - 1:
        kind = data[at]
        end = data.index(0, at + 1)
        key = data[at + 1:end].decode()
        at = end + 1
        length = {DOUBLE: 8, BOOL: 1, NULL: 0, INT32: 4, INT64: 8, DECIMAL: 16, 0x07: 12, 0x09: 8}.get(kind)
        if length is None:
            length, = struct.unpack_from("<i", data, at)
            length += {STRING: 4, 0x05: 5}.get(kind, 0)
        found.append((key, kind, data[at:at + length]))
        at += length
    assert at == size - 1
    return found


def value_of(kind, data):
    """(type, value); documents as [(key, type, value), …], doubles as their bits."""
    if kind in (DOCUMENT, ARRAY):
        inside = [(key, *value_of(part, piece)) for key, part, piece in elements(data)]
        if kind == ARRAY:
            assert [key for key, _, _ in inside] == [str(index) for index in range(len(inside))]
        return kind, inside
    if kind == STRING:
        assert data[-1] == 0
        return kind, data[4:-1].decode()
    if kind == DECIMAL:
        return kind, str(Decimal128.from_bid(data))
    return kind, {DOUBLE: lambda: data, BOOL: lambda: bool(data[0]), NULL: lambda: None,
                  INT32: lambda: struct.unpack("<i", data)[0], INT64: lambda: struct.unpack("<q", data)[0]}[kind]()


def payload_of(document):
    """The payload of a RawBSONDocument as value_of() tells it."""
    return next(value_of(kind, data) for key, kind, data in elements(bytes(document.raw)) if key == "payload")


def double(value):
    return DOUBLE, struct.pack("<d", value)


def array(*values):
    return ARRAY, [(str(index), *value) for index, value in enumerate(values)]


def document(*members):
    return DOCUMENT, [(key, *value) for key, value in members]


ONE, EMPTY = (INT32, 1), (DOCUMENT, [])

# JSON text and what it must become.
VALUES = [
    ("null", (NULL, None)), ("true", (BOOL, True)), ("false", (BOOL, False)), ('""', (STRING, "")), ('"x"', (STRING, "x")),
    ("{}", EMPTY), ("[]", (ARRAY, [])), ("[[],{}]", array((ARRAY, []), EMPTY)),
    (" \t\r\n1 \t\r\n", ONE), ('{ "a" : [ 1 , "x" ] }', document(("a", array(ONE, (STRING, "x"))))),
    # integers
    ("0", (INT32, 0)), ("-0", (INT32, 0)), ("1", ONE), ("-1", (INT32, -1)),
    ("2147483647", (INT32, 2**31 - 1)), ("2147483648", (INT64, 2**31)),
    ("-2147483648", (INT32, -2**31)), ("-2147483649", (INT64, -2**31 - 1)),
    ("9007199254740993", (INT64, 2**53 + 1)),
    ("9223372036854775807", (INT64, 2**63 - 1)), ("-9223372036854775808", (INT64, -2**63)),
    ("9223372036854775808", (DECIMAL, "9223372036854775808")), ("-9223372036854775809", (DECIMAL, "-9223372036854775809")),
    ("18446744073709551615", (DECIMAL, "18446744073709551615")), ("18446744073709551616", (DECIMAL, "18446744073709551616")),
    ("9" * 34, (DECIMAL, "9" * 34)), ("-" + "9" * 34, (DECIMAL, "-" + "9" * 34)), ("1" + "0" * 33, (DECIMAL, "1" + "0" * 33)),
    # anything with a point or an exponent is a double
    ("0.0", double(0.0)), ("-0.0", double(-0.0)), ("1.0", double(1.0)), ("1e0", double(1.0)), ("1E+2", double(100.0)),
    ("0.1", double(0.1)), ("3.14159265358979", double(3.14159265358979)), ("1e22", double(1e22)), ("1e23", double(1e23)),
    ("9007199254740993.0", double(9007199254740992.0)), ("9223372036854775807.0", double(2.0**63)),
    ("1.7976931348623157e308", double(1.7976931348623157e308)), ("2.2250738585072014e-308", double(2.2250738585072014e-308)),
    ("2.2250738585072011e-308", double(2.2250738585072011e-308)), ("5e-324", double(5e-324)), ("1e-400", double(0.0)),
    ("-1e-400", double(-0.0)), ("0e999999999999999999999", double(0.0)), ("0." + "0" * 400 + "1", double(0.0)),
    ("8.41", double(8.41)), ("123456789012345678901234567890.5", double(123456789012345678901234567890.5)),
    # strings
    (r'"\u0000"', (STRING, "\0")), (r'"a\u0000b"', (STRING, "a\0b")), (r'"\"\\\/\b\f\n\r\t"', (STRING, '"\\/\b\f\n\r\t')),
    (r'"\u00e9\u20AC"', (STRING, "é€")), (r'"\ud83d\ude00"', (STRING, "😀")), ('"é€😀"', (STRING, "é€😀")),
    ('"\u2028\u2029\x7f\ufeff\uffff"', (STRING, "\u2028\u2029\x7f\ufeff\uffff")),
    ('"' + "x" * 100_000 + '"', (STRING, "x" * 100_000)),
    ("[" + '"ä😀\\n",' * 5000 + "0]", array(*[(STRING, "ä😀\n")] * 5000, (INT32, 0))),
    # keys
    ('{"":1}', document(("", ONE))), ('{"$set":{"a.b":1}}', document(("$set", document(("a.b", ONE))))),
    ('{"a":1,"a":2,"b":0,"a":{}}', document(("a", ONE), ("a", (INT32, 2)), ("b", (INT32, 0)), ("a", EMPTY))),
    ('{"_id":1,"topic":2,"payload":3}', document(("_id", ONE), ("topic", (INT32, 2)), ("payload", (INT32, 3)))),
    (r'{"\u0041\n😀":1}', document(("A\n😀", ONE))), ('{"$date":"2020","$oid":"x"}',
                                                     document(("$date", (STRING, "2020")), ("$oid", (STRING, "x")))),
    ('{".":1,"..":2,"$":3,"a.":4}', document((".", ONE), ("..", (INT32, 2)), ("$", (INT32, 3)), ("a.", (INT32, 4)))),
    ('{"1":1,"0":0}', document(("1", ONE), ("0", (INT32, 0)))),
]


def nested(depth, opening, closing, inside):
    return opening * depth + inside + closing * depth


def test_every_type(mosquitto, mongod, service, database, collection):
    """Each value of the table, with 100 levels of nesting on top: the deepest that is taken."""
    broker = mosquitto()
    running = consuming(service(broker=broker, mongod=mongod, database=database))
    deep = (nested(100, "[", "]", "1"), nested(50, '[{"a":', "}]", "1"))
    payloads = [text.encode() for text, _ in VALUES] + [text.encode() for text in deep]
    clients.publish(broker.port, payloads, lambda index: f"sensors/{index}")
    running.wait_stored(len(payloads))
    sums = running.stop()["consumer"]
    assert sums["stored"] == len(payloads) and sums["dead_lettered"] == 0
    raw = collection.with_options(bson.CodecOptions(document_class=RawBSONDocument))
    found = {each["topic"]: payload_of(each) for each in raw.find()}
    for index, (text, expected) in enumerate(VALUES):
        assert found[f"sensors/{index}"] == expected, text[:100]
    for index in (len(VALUES), len(VALUES) + 1):
        kind, inside = found[f"sensors/{index}"]
        for _ in range(99):
            kind, inside = inside[0][1:]
        assert kind == (ARRAY if index == len(VALUES) else DOCUMENT) and inside[0][1:] == ONE


def test_the_driver_reads_what_we_wrote(mosquitto, mongod, service, database, collection):
    """The same through pymongo's own decoder: an integer is Int64 only where it has to be."""
    broker = mosquitto()
    running = consuming(service(broker=broker, mongod=mongod, database=database))
    clients.publish(broker.port, ['{"a":1,"b":2147483648,"c":9223372036854775808,"d":1.0,"e":"\\u0000","f":null,"g":[true]}'])
    running.wait_stored(1)
    running.stop()
    payload = collection.find_one()["payload"]
    assert [(name, type(value), value) for name, value in payload.items()] == [
        ("a", int, 1), ("b", Int64, 2**31), ("c", Decimal128, Decimal128("9223372036854775808")), ("d", float, 1.0),
        ("e", str, "\0"), ("f", type(None), None), ("g", list, [True])]
    assert collection.count_documents({"payload.b": 2**31, "payload.d": {"$type": "double"}}) == 1


# --- poison ----------------------------------------------------------------------------------------------------------------

LIMIT = 64 * KIB  # consumer.max_payload below


def oversized(size):
    return b'["' + b"x" * (size - 4) + b'"]'


# What comes, the reason's code, and the offset where it went wrong.
POISON = [
    (b"", "empty_payload", 0), (b" ", "empty_payload", 1), (b" \t\r\n ", "empty_payload", 5),
    (b"\n" * 300, "empty_payload", 300),
    # syntax
    (b"{", "invalid_json", 1), (b"[1,2", "invalid_json", 4), (b'"abc', "invalid_json", 4), (b'{"a":1', "invalid_json", 6),
    (b"[1,]", "invalid_json", 3), (b'{"a":1,}', "invalid_json", 7), (b"[,1]", "invalid_json", 1), (b"[1 2]", "invalid_json", 3),
    (b'{"a" 1}', "invalid_json", 5), (b"{a:1}", "invalid_json", 1), (b"{'a':1}", "invalid_json", 1),
    (b"{1:1}", "invalid_json", 1),
    (b"01", "invalid_json", 1), (b"-01", "invalid_json", 2), (b"1.", "invalid_json", 2), (b".5", "invalid_json", 0),
    (b"+1", "invalid_json", 0), (b"1e", "invalid_json", 2), (b"1e+", "invalid_json", 3), (b"-", "invalid_json", 1),
    (b"0x10", "invalid_json", 1), (b"1_000", "invalid_json", 1), (b"1 2", "invalid_json", 2), (b"{}{}", "invalid_json", 2),
    (b"]", "invalid_json", 0), (b"[}", "invalid_json", 1), (b'{"a"]', "invalid_json", 4), (b"[1}", "invalid_json", 2),
    (b"NaN", "invalid_json", 0), (b"Infinity", "invalid_json", 0), (b"-Infinity", "invalid_json", 1),
    (b"nul", "invalid_json", 3),
    (b"nulL", "invalid_json", 3), (b"TRUE", "invalid_json", 0), (b"truefalse", "invalid_json", 4),
    (b"undefined", "invalid_json", 0),
    (b'"\t"', "invalid_json", 1), (b'"a\nb"', "invalid_json", 2), (b'"\x00"', "invalid_json", 1), (b"1\x00", "invalid_json", 1),
    (b"\x00", "invalid_json", 0), (b'"\\x41"', "invalid_json", 2), (b'"\\u12g4"', "invalid_json", 5),
    (b'"\\', "invalid_json", 2),
    (b'"\\u12', "invalid_json", 5), (b"// x\n1", "invalid_json", 0), (b"[1/*x*/]", "invalid_json", 2),
    (b"1;", "invalid_json", 1),
    (b"\x0c1", "invalid_json", 0), ("\u00a01".encode(), "invalid_json", 0), (b"hello world", "invalid_json", 0),
    (b"temperature=21.5", "invalid_json", 1), (b"<xml/>", "invalid_json", 0), (b"id,value\n1,2\n", "invalid_json", 0),
    (b"\xef\xbb\xbf{}", "invalid_json", 0), (b"\xef\xbb\xbf", "invalid_json", 0),
    # lone surrogates
    (b'"\\ud800"', "invalid_json", 7), (b'"\\ud83dx"', "invalid_json", 7), (b'"\\ud83d\\n"', "invalid_json", 8),
    (b'"\\udc00"', "invalid_json", 4), (b'"\\ud83d\\u0041"', "invalid_json", 9), (b'{"\\udead":1}', "invalid_json", 5),
    # UTF-8
    (b'"\xff"', "invalid_utf8", 1), (b'"ab\xc0\x80"', "invalid_utf8", 3), (b'"\xc3"', "invalid_utf8", 2),
    (b'"\xc3', "invalid_utf8", 2),
    (b'"\xe2\x82"', "invalid_utf8", 3), (b'"\xed\xa0\x80"', "invalid_utf8", 2), (b'"\xf4\x90\x80\x80"', "invalid_utf8", 2),
    (b'"\xf0\x80\x80\x80"', "invalid_utf8", 2), (b'"\x80"', "invalid_utf8", 1), (b'{"\xfe":1}', "invalid_utf8", 2),
    (b"\xff\xfe{\x00}\x00", "invalid_utf8", 0), (b"[\x80]", "invalid_utf8", 1), (b"1\xff", "invalid_utf8", 1),
    ("[\"grün\"]".encode("latin-1"), "invalid_utf8", 4), (bytes(range(128, 256)), "invalid_utf8", 0),
    # depth
    (b"[" * 101 + b"]" * 101, "too_deep", 100), (b'{"a":' * 101 + b"1" + b"}" * 101, "too_deep", 500),
    (b"[" * 60_000, "too_deep", 100), (b'[{"a":' * 51 + b"1" + b"}]" * 51, "too_deep", 300),
    # numbers
    (b"1e309", "number_out_of_range", 0), (b"[1,-1e309]", "number_out_of_range", 3),
    (b"1e999999999999999999", "number_out_of_range", 0),
    (b"9" * 35, "number_out_of_range", 0), (b'{"n":-1' + b"0" * 34 + b"}", "number_out_of_range", 5),
    (b"1" * 5000, "number_out_of_range", 0), (b"1.7976931348623159e308", "number_out_of_range", 0),
    # keys
    (b'{"\\u0000":1}', "key_with_nul", 1), (b'{"a":{"b\\u0000c":1}}', "key_with_nul", 6),
    # above consumer.max_payload, valid or not; the third is above what is kept of it
    (oversized(LIMIT + 1), "payload_too_large", 0), (b"\xff" * (2 * LIMIT), "payload_too_large", 0),
    (oversized(MIB + 123), "payload_too_large", 0), (oversized(MIB), "payload_too_large", 0),
]


# C1, the characters of direction, the separators of lines.
STEERS = re.compile("[\x80-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f]")


def preview_of(payload):
    """As documented: the first 120 characters; what is no printable UTF-8 as \\xNN, what steers a terminal as \\uNNNN."""
    text, at = "", 0
    payload = payload[:MIB]
    for _ in range(120):
        if at == len(payload):
            break
        for length in (1, 2, 3, 4):
            try:
                character = payload[at:at + length].decode()
                break
            except UnicodeDecodeError:
                character = None
        if not character or character < " " or character == "\x7f":
            length, character = 1, f"\\x{payload[at]:02x}"
        elif STEERS.match(character):
            character = f"\\u{ord(character):04x}"
        text += character
        at += length
    return text


def check_dead_letter(letter, topic, payload, code, offset):
    what = f"{topic}: {payload[:60]}"
    kept = payload[:MIB] if code == "payload_too_large" else payload
    assert letter["topic"] == topic
    assert letter["reason"]["code"] == code, what
    assert letter["reason"]["offset"] == offset, (what, letter["reason"])
    assert len(letter["reason"]["message"]) > 5, what
    assert type(letter["payload"]) is bytes and letter["payload"] == kept, what  # Binary of subtype 0 reads as bytes
    assert letter["preview"] == preview_of(payload), what
    assert isinstance(letter["received_at"], datetime.datetime)
    assert (letter["qos"], letter["retain"], letter["dup"], letter["route"]) == (1, False, False, "sensors/#"), what
    fields = ["_id", "topic", "payload", "preview", "reason", "received_at", "qos", "retain", "dup", "route"]
    if len(payload) > MIB:  # not kept whole
        fields += ["truncated", "length", "sha256"]
        assert letter["truncated"] is True and letter["length"] == len(payload)
        assert letter["sha256"] == hashlib.sha256(payload).digest()
    assert list(letter) == fields, what


def test_poison_among_good_messages(mosquitto, mongod, service, database, collection, mongo, capsys):
    broker = mosquitto(extra=["message_size_limit 0"])
    running = consuming(service(broker=broker, mongod=mongod, database=database, settings={"consumer.max_payload": "64KiB"}))
    poison = [POISON[number % len(POISON)] for number in range(1000)]
    payloads, topics = [], []
    for number, (bad, _, _) in enumerate(poison):
        payloads += [b'{"n":%d}' % number, bad]
        topics += [f"sensors/good/{number}", f"sensors/bad/{number}"]
    assert len(clients.publish(broker.port, payloads, topics.__getitem__)) == 2000
    wait_settled(running, 2000)
    sums = running.stop()["consumer"]
    assert (sums["received"], sums["stored"], sums["dead_lettered"], sums["in_flight"]) == (2000, 1000, 1000, 0)

    expected = {}
    for _, code, _ in poison:
        expected[code] = expected.get(code, 0) + 1
    assert sums["dead_lettered_by_reason"] == expected
    assert 0 < sums["truncated"] == sum(len(bad) > MIB for bad, _, _ in poison) < expected["payload_too_large"]
    with capsys.disabled():
        print(f"\n  {len(POISON)} kinds of poison: {expected}")

    assert sorted((each["topic"], each["payload"]["n"]) for each in collection.find()) == sorted(
        (f"sensors/good/{number}", number) for number in range(1000))
    letters = {letter["topic"]: letter for letter in mongo[database].dead_letter.find()}
    assert mongo[database].dead_letter.count_documents({}) == len(letters) == 1000
    for number, (payload, code, offset) in enumerate(poison):
        check_dead_letter(letters[f"sensors/bad/{number}"], f"sensors/bad/{number}", payload, code, offset)
    assert not [record for record in running.records if record["level"] == "error"]


def test_a_document_larger_than_mongodb_takes(mosquitto, mongod, service, database, collection, mongo):
    """Valid JSON below the limit whose BSON is above 16 MiB: whole in a dead letter. The largest allowed payload as well."""
    broker = mosquitto(extra=["message_size_limit 0"])
    running = consuming(service(broker=broker, mongod=mongod, database=database, settings={"consumer.max_payload": "15MiB"}))
    ones = b"[" + b"1," * (3 * MIB) + b"1]"
    largest = b"\xff" * (15 * MIB)
    text = b'"' + b"x" * (15 * MIB - 2) + b'"'
    for payload in (ones, largest, text):
        assert clients.publish(broker.port, [payload], "sensors/large")
    wait_settled(running, 3)
    sums = running.stop()["consumer"]
    assert sums["dead_lettered_by_reason"] == {"document_too_large": 1, "invalid_utf8": 1} and sums["truncated"] == 0
    assert collection.find_one()["payload"] == "x" * (15 * MIB - 2)
    letters = {letter["reason"]["code"]: letter for letter in mongo[database].dead_letter.find()}
    assert letters["document_too_large"]["payload"] == ones and letters["invalid_utf8"]["payload"] == largest


def test_what_mongodb_refuses(mosquitto, mongod, service, database, collection, mongo):
    """A validator and a unique index of the collection's owner: what they refuse are dead letters, the rest is stored."""
    mongo[database].create_collection("messages", validator={"payload.n": {"$lt": 1000}})
    collection.create_index([("payload.key", pymongo.ASCENDING)], unique=True)
    broker = mosquitto()
    running = consuming(service(broker=broker, mongod=mongod, database=database))
    payloads = [json.dumps({"n": number if number % 10 else 5000 + number, "key": number // 2}) for number in range(200)]
    clients.publish(broker.port, payloads, lambda index: f"sensors/{index}")
    wait_settled(running, 200)
    sums = running.stop()["consumer"]
    assert sums["stored"] == 100  # of each pair with one key one is stored: the second where the first fails the validator
    assert sums["dead_lettered_by_reason"] == {"refused_by_mongodb": 20, "unique_index": 80}
    assert len({each["payload"]["key"] for each in collection.find()}) == 100
    for letter in mongo[database].dead_letter.find():
        number = int(letter["topic"].rpartition("/")[2])
        assert letter["payload"].decode() == payloads[number]
        if letter["reason"]["code"] == "refused_by_mongodb":
            assert number % 10 == 0 and "validation" in letter["reason"]["message"]
        else:
            assert re.search(r"payload\.key", letter["reason"]["message"])


@pytest.mark.not_sanitized("it is about memory")
def test_memory_with_the_largest_payloads(mosquitto, mongod, service, database, collection):
    """40 × 4 MiB, the most that the defaults let in: as docs/operation.md says, and not by the number of messages."""
    broker = mosquitto()
    running = consuming(service(broker=broker, mongod=mongod, database=database))
    text = b'"' + b"x" * (4 * MIB - 2) + b'"'
    assert len(clients.publish(broker.port, [text] * 40, "sensors/large", window=20)) == 40
    running.wait_stored(40)
    peak = running.rss_peak()
    running.stop()
    assert collection.count_documents({}) == 40
    assert peak <= 80 * MIB, f"{peak / MIB:.1f} MiB"


@pytest.mark.timeout(180)
@pytest.mark.not_sanitized("it is about memory")
def test_memory_with_payloads_that_grow(mosquitto, mongod, service, database, collection, capsys):
    """100 × [1,1,…] of just under 1 MiB, which become 6 MiB each, must not take memory by the number of messages."""
    broker = mosquitto(extra=["message_size_limit 0"])
    running = consuming(service(broker=broker, mongod=mongod, database=database))
    ones = b"[" + b"1," * ((MIB - 200) // 2) + b"1]"
    clients.publish(broker.port, [ones] * 100, lambda index: f"sensors/{index}", timeout=150)
    running.wait_stored(100, timeout=150)
    peak, resident = running.memory()
    sums = running.stop(timeout=60)
    with capsys.disabled():
        print(f"\n  100 payloads of {len(ones) / MIB:.2f} MiB: peak RSS {peak / MIB:.1f} MiB, now {resident / MIB:.1f} MiB, "
              f"largest batch {sums['consumer']['largest_batch']}, "
              f"longest iteration {sums['loop']['longest_iteration_ms']:.1f} ms")
    assert sums["consumer"]["stored"] == sums["consumer"]["received"] == 100
    sizes = [(each["size"], each["length"]) for each in collection.aggregate([
        {"$project": {"size": {"$bsonSize": "$$ROOT"}, "length": {"$size": "$payload"}}}])]
    assert {length for _, length in sizes} == {(MIB - 200) // 2 + 1} and len(sizes) == 100
    assert sizes[0][0] > 5.5 * MIB
    assert peak <= 96 * MIB
