/*
 * document.c: the bytes of stored documents and dead letters are those that libbson writes for the same fields, for
 * every reason, every kind of topic and up to MongoDB's limit.
 *
 * The batch under a message is filled by hand into a block of exactly its size, so that a byte read too far is seen.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "document.h"

#include <bson/bson.h>
#include <stdio.h>
#include <stdlib.h>

#define ROUTE "sensors/#"
#define OLD   "an earlier document"

enum { OLD_LENGTH = sizeof OLD - 1 };
#define MIB ((size_t)1024 * 1024)

static const struct id_rule object_ids;
static const int64_t received_at = INT64_C(1795378704123);

/* ---- one message in a batch ---- */

struct text {
	const char *bytes;
	size_t length;
};
#define TEXT(literal) ((struct text){literal, sizeof(literal) - 1})

static struct text text_of(const char *bytes)
{
	return (struct text){bytes, strlen(bytes)};
}

static void make_batch(struct batch *batch, struct text topic, struct text payload)
{
	size_t size = topic.length + payload.length + 2 + BATCH_DIGEST_BYTES;
	uint8_t *arena = calloc(1, size);
	assert_non_null(arena);
	*batch = (struct batch){.arena = {.data = arena, .length = size, .capacity = size}, .count = 1, .capacity = 1};
	batch->messages = calloc(1, sizeof *batch->messages);
	assert_non_null(batch->messages);
	/* the payload last: json_to_bson() may read its NUL, and nothing behind it */
	for (size_t i = 0; i < BATCH_DIGEST_BYTES; i++)
		arena[i] = (uint8_t)(0xa0 + i);
	memcpy(arena + BATCH_DIGEST_BYTES, topic.bytes, topic.length);
	memcpy(arena + BATCH_DIGEST_BYTES + topic.length + 1, payload.bytes, payload.length);
	struct batch_message *message = batch->messages;
	*message = (struct batch_message){
	    .topic = BATCH_DIGEST_BYTES,
	    .payload = BATCH_DIGEST_BYTES + topic.length + 1,
	    .topic_length = (uint32_t)topic.length,
	    .payload_length = (uint32_t)payload.length,
	    .full_length = (uint32_t)payload.length,
	    .received_at = received_at,
	    .qos = 1,
	};
	bson_oid_init_from_string(&message->id, "0123456789abcdef01234567");
}

/* ---- what libbson makes of it ---- */

static void expect_head(bson_t *document, const struct batch *batch, struct text topic)
{
	bson_append_oid(document, "_id", -1, &batch->messages->id);
	bson_append_utf8(document, "topic", -1, topic.bytes, (int)topic.length);
}

static void expect_delivery(bson_t *document, const struct batch *batch)
{
	BSON_APPEND_DATE_TIME(document, "received_at", batch->messages->received_at);
	BSON_APPEND_INT32(document, "qos", batch->messages->qos);
	BSON_APPEND_BOOL(document, "retain", batch->messages->retain);
	BSON_APPEND_BOOL(document, "dup", batch->messages->dup);
}

static void assert_document(const struct buffer *out, bson_t *expected)
{
	bson_t found;
	size_t offset;
	const uint8_t *bytes = out->data + OLD_LENGTH;
	size_t length = out->length - OLD_LENGTH;
	assert_memory_equal(out->data, OLD, OLD_LENGTH);
	if (!bson_init_static(&found, bytes, length) ||
	    !bson_validate(&found, BSON_VALIDATE_UTF8 | BSON_VALIDATE_UTF8_ALLOW_NULL, &offset))
		fail_msg("not valid BSON");
	if (length != expected->len || memcmp(bytes, bson_get_data(expected), length) != 0) {
		char *is = bson_as_canonical_extended_json(&found, NULL);
		char *should = bson_as_canonical_extended_json(expected, NULL);
		fail_msg("is %.2000s, should be %.2000s", is, should);
	}
	bson_destroy(expected);
}

/* Its document, behind bytes that stay. */
static struct buffer build(const struct batch *batch)
{
	struct buffer out = {0};
	struct document_fault fault = {0};
	buffer_append(&out, OLD, OLD_LENGTH);
	if (!document_build(batch, batch->messages, &object_ids, &out, &fault))
		fail_msg("refused at %zu: %s", fault.offset, fault.message);
	return out;
}

static struct document_fault refused(const struct batch *batch)
{
	struct buffer out = {0};
	struct document_fault fault = {0};
	buffer_append(&out, OLD, OLD_LENGTH);
	if (document_build(batch, batch->messages, &object_ids, &out, &fault))
		fail_msg("not refused");
	assert_int_equal(out.length, OLD_LENGTH);
	assert_memory_equal(out.data, OLD, OLD_LENGTH);
	assert_non_null(fault.message);
	assert_true(strlen(fault.message) > 3);
	buffer_finish(&out);
	return fault;
}

static struct buffer dead_letter(const struct batch *batch, const struct document_fault *fault)
{
	struct buffer out = {0};
	buffer_append(&out, OLD, OLD_LENGTH);
	document_dead_letter(batch, batch->messages, fault, ROUTE, &out);
	return out;
}

/* ---- stored ---- */

/* The document of `json` is the envelope with the one field of `payload`, which is freed. */
static void assert_stored(const char *json, bson_t *payload)
{
	struct batch batch;
	make_batch(&batch, TEXT("sensors/device-007/readings"), text_of(json));
	bson_t *expected = bson_new();
	expect_head(expected, &batch, TEXT("sensors/device-007/readings"));
	bson_concat(expected, payload);
	expect_delivery(expected, &batch);
	struct buffer out = build(&batch);
	assert_document(&out, expected);
	bson_destroy(payload);
	buffer_finish(&out);
	batch_finish(&batch);
}

static void the_envelope_of_every_type(void **state)
{
	bson_decimal128_t decimal;
	bson_decimal128_from_string("123456789012345678901234567890", &decimal);
	assert_stored("1", BCON_NEW("payload", BCON_INT32(1)));
	assert_stored(" -2147483649 ", BCON_NEW("payload", BCON_INT64(INT64_C(-2147483649))));
	assert_stored("123456789012345678901234567890", BCON_NEW("payload", BCON_DECIMAL128(&decimal)));
	assert_stored("1.5", BCON_NEW("payload", BCON_DOUBLE(1.5)));
	assert_stored("\"text\"", BCON_NEW("payload", BCON_UTF8("text")));
	assert_stored("true", BCON_NEW("payload", BCON_BOOL(true)));
	assert_stored("null", BCON_NEW("payload", BCON_NULL));
	assert_stored("{}", BCON_NEW("payload", "{", "}"));
	assert_stored("[]", BCON_NEW("payload", "[", "]"));
	assert_stored("{\"a\":[1,{\"b\":\"c\"}],\"d\":-0.5}",
	              BCON_NEW("payload", "{", "a", "[", BCON_INT32(1), "{", "b", BCON_UTF8("c"), "}", "]", "d",
	                       BCON_DOUBLE(-0.5), "}"));
}

/* A payload's keys are data, whatever they look like. */
static void keys_of_the_payload_do_nothing(void **state)
{
	assert_stored("{\"_id\":1,\"$set\":{\"topic\":\"x\"},\"$date\":\"2020\",\"a.b\":2,\"\":3}",
	              BCON_NEW("payload", "{", "_id", BCON_INT32(1), "$set", "{", "topic", BCON_UTF8("x"), "}", "$date",
	                       BCON_UTF8("2020"), "a.b", BCON_INT32(2), "", BCON_INT32(3), "}"));
}

static void flags_and_times(void **state)
{
	static const int64_t times[] = {0, 1, -1, INT64_MAX, INT64_MIN, INT64_C(1795378704123), INT64_C(0x80000000)};
	for (unsigned i = 0; i < 8 * sizeof times / sizeof *times; i++) {
		struct batch batch;
		make_batch(&batch, TEXT("t"), TEXT("7"));
		batch.messages->qos = i & 1;
		batch.messages->retain = i & 2;
		batch.messages->dup = i & 4;
		batch.messages->received_at = times[i / 8];
		bson_t *expected = bson_new();
		expect_head(expected, &batch, TEXT("t"));
		BSON_APPEND_INT32(expected, "payload", 7);
		expect_delivery(expected, &batch);
		struct buffer out = build(&batch);
		assert_document(&out, expected);
		buffer_finish(&out);
		batch_finish(&batch);
	}
}

/* Documents stand back to back, each by itself. */
static void documents_are_appended(void **state)
{
	struct batch batch;
	make_batch(&batch, TEXT("t"), TEXT("{\"n\":1}"));
	struct buffer once = build(&batch);
	struct document_fault fault;
	struct buffer twice = {0};
	assert_true(document_build(&batch, batch.messages, &object_ids, &twice, &fault));
	size_t length = twice.length;
	assert_true(document_build(&batch, batch.messages, &object_ids, &twice, &fault));
	assert_int_equal(twice.length, 2 * length);
	assert_memory_equal(twice.data, once.data + OLD_LENGTH, length);
	assert_memory_equal(twice.data + length, once.data + OLD_LENGTH, length);
	buffer_finish(&once);
	buffer_finish(&twice);
	batch_finish(&batch);
}

/* ---- topics ---- */

static void odd_topics_are_kept(void **state)
{
	static const struct text topics[] = {
	    {" ", 1},
	    {"/", 1},
	    {"a//b/", 5},
	    {"$SYS/x", 6},
	    {"\x01\x1f\x7f\n\"\\", 6},
	    {"caf\xc3\xa9", 5},
	    {"\xc2\x80\xdf\xbf", 4},
	    {"\xe0\xa0\x80\xed\x9f\xbf\xee\x80\x80\xef\xbf\xbf", 12},
	    {"\xf0\x90\x80\x80\xf4\x8f\xbf\xbf", 8},
	    {"\xe2\x80\xa8\xf0\x9d\x84\x9e", 7},
	};
	for (size_t i = 0; i < sizeof topics / sizeof *topics; i++) {
		struct batch batch;
		make_batch(&batch, topics[i], TEXT("null"));
		bson_t *expected = bson_new();
		expect_head(expected, &batch, topics[i]);
		BSON_APPEND_NULL(expected, "payload");
		expect_delivery(expected, &batch);
		struct buffer out = build(&batch);
		assert_document(&out, expected);
		buffer_finish(&out);
		batch_finish(&batch);
	}
}

static void the_longest_topic(void **state)
{
	static char bytes[65535];
	memset(bytes, 't', sizeof bytes);
	struct text topic = {bytes, sizeof bytes};
	struct batch batch;
	make_batch(&batch, topic, TEXT("1"));
	bson_t *expected = bson_new();
	expect_head(expected, &batch, topic);
	BSON_APPEND_INT32(expected, "payload", 1);
	expect_delivery(expected, &batch);
	struct buffer out = build(&batch);
	assert_document(&out, expected);
	buffer_finish(&out);
	batch_finish(&batch);
}

/* The dead letter shows the bytes that are none. */
static void topics_that_are_not_utf8(void **state)
{
	static const struct {
		struct text topic;
		const char *shown;
	} cases[] = {
	    {{"a/\xff", 3}, "a/\\xff"},
	    {{"\x80", 1}, "\\x80"},
	    {{"\xc0\x80", 2}, "\\xc0\\x80"},
	    {{"\xc1\xbf", 2}, "\\xc1\\xbf"},
	    {{"\xe0\x9f\xbf", 3}, "\\xe0\\x9f\\xbf"},
	    {{"\xed\xa0\x80", 3}, "\\xed\\xa0\\x80"},
	    {{"\xf0\x8f\xbf\xbf", 4}, "\\xf0\\x8f\\xbf\\xbf"},
	    {{"\xf4\x90\x80\x80", 4}, "\\xf4\\x90\\x80\\x80"},
	    {{"\xf5\x80\x80\x80", 4}, "\\xf5\\x80\\x80\\x80"},
	    {{"cut \xc3", 5}, "cut \\xc3"},
	    {{"cut \xe2\x80", 6}, "cut \\xe2\\x80"},
	    {{"cut \xf0\x9d\x84", 7}, "cut \\xf0\\x9d\\x84"},
	    {{"\xc3\xa9\xe2\x28\xa1\n", 6}, "\xc3\xa9\\xe2(\\xa1\\x0a"},
	    {{"a\0b", 3}, "a\\x00b"},
	};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		struct batch batch;
		make_batch(&batch, cases[i].topic, TEXT("1"));
		struct document_fault fault = refused(&batch);
		assert_int_equal(fault.reason, DOCUMENT_TOPIC_UTF8);
		bson_t *expected = bson_new();
		expect_head(expected, &batch, text_of(cases[i].shown));
		BSON_APPEND_BINARY(expected, "payload", BSON_SUBTYPE_BINARY, (const uint8_t *)"1", 1);
		BSON_APPEND_UTF8(expected, "preview", "1");
		bson_t *reason =
		    BCON_NEW("code", "topic_not_utf8", "message", BCON_UTF8(fault.message), "offset", BCON_INT64(0));
		BSON_APPEND_DOCUMENT(expected, "reason", reason);
		bson_destroy(reason);
		expect_delivery(expected, &batch);
		BSON_APPEND_UTF8(expected, "route", ROUTE);
		struct buffer out = dead_letter(&batch, &fault);
		assert_document(&out, expected);
		buffer_finish(&out);
		batch_finish(&batch);
	}
}

/* ---- dead letters ---- */

/* The dead letter of `payload` with that fault; `topic` is the one of make_batch(). */
static bson_t *expected_letter(const struct batch *batch, struct text payload, const char *preview, const char *code,
                               const char *message, int64_t offset)
{
	bson_t *expected = bson_new();
	expect_head(expected, batch, TEXT("sensors/a"));
	BSON_APPEND_BINARY(expected, "payload", BSON_SUBTYPE_BINARY, (const uint8_t *)payload.bytes,
	                   (uint32_t)payload.length);
	BSON_APPEND_UTF8(expected, "preview", preview);
	bson_t *reason = BCON_NEW("code", BCON_UTF8(code), "message", BCON_UTF8(message), "offset", BCON_INT64(offset));
	BSON_APPEND_DOCUMENT(expected, "reason", reason);
	bson_destroy(reason);
	expect_delivery(expected, batch);
	BSON_APPEND_UTF8(expected, "route", ROUTE);
	return expected;
}

static void every_reason_of_json(void **state)
{
	static char deep[102];
	memset(deep, '[', 101);
	const struct {
		struct text payload;
		enum json_code code;
		const char *name, *preview;
		size_t offset;
	} cases[] = {
	    {TEXT(""), JSON_EMPTY, "empty_payload", "", 0},
	    {TEXT(" \n"), JSON_EMPTY, "empty_payload", " \\x0a", 2},
	    {TEXT("{\"a\": 01}"), JSON_SYNTAX, "invalid_json", "{\"a\": 01}", 7},
	    {TEXT("hello"), JSON_SYNTAX, "invalid_json", "hello", 0},
	    {TEXT("1\0"), JSON_SYNTAX, "invalid_json", "1\\x00", 1},
	    {TEXT("\"\xff\""), JSON_UTF8, "invalid_utf8", "\"\\xff\"", 1},
	    {{deep, 101}, JSON_DEPTH, "too_deep", deep, 100},
	    {TEXT("[1e400]"), JSON_NUMBER_RANGE, "number_out_of_range", "[1e400]", 1},
	    {TEXT("{\"a\\u0000b\":1}"), JSON_KEY_NUL, "key_with_nul", "{\"a\\u0000b\":1}", 1},
	};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		struct batch batch;
		make_batch(&batch, TEXT("sensors/a"), cases[i].payload);
		batch.messages->retain = batch.messages->dup = i % 2;
		struct document_fault fault = refused(&batch);
		assert_int_equal(fault.reason, cases[i].code);
		assert_int_equal(fault.offset, cases[i].offset);
		bson_t *expected = expected_letter(&batch, cases[i].payload, cases[i].preview, cases[i].name,
		                                   fault.message, (int64_t)cases[i].offset);
		struct buffer out = dead_letter(&batch, &fault);
		assert_document(&out, expected);
		buffer_finish(&out);
		batch_finish(&batch);
	}
}

/* What the store gives as reason comes from MongoDB: any bytes, any length. */
static void reasons_of_mongodb(void **state)
{
	static char endless[5001], cut[1001];
	memset(endless, 'm', sizeof endless - 1);
	memset(cut, 'm', sizeof cut - 1);
	static const struct {
		enum document_reason reason;
		const char *name, *message, *stored;
	} cases[] = {
	    {DOCUMENT_REFUSED, "refused_by_mongodb", "Document failed validation", "Document failed validation"},
	    {DOCUMENT_REFUSED, "refused_by_mongodb", "", ""},
	    {DOCUMENT_REFUSED, "refused_by_mongodb", "caf\xc3\xa9 \xff\n", "caf\xc3\xa9 \\xff\\x0a"},
	    {DOCUMENT_REFUSED, "refused_by_mongodb", "\xc2\x9b\xe2\x80\xae", "\xc2\x9b\xe2\x80\xae"},
	    {DOCUMENT_UNIQUE_INDEX, "unique_index", "E11000 duplicate key", "E11000 duplicate key"},
	    {DOCUMENT_UNIQUE_INDEX, "unique_index", endless, cut},
	};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		struct batch batch;
		make_batch(&batch, TEXT("sensors/a"), TEXT("{}"));
		struct document_fault fault = {.reason = cases[i].reason, .message = cases[i].message};
		bson_t *expected = expected_letter(&batch, TEXT("{}"), "{}", cases[i].name, cases[i].stored, 0);
		struct buffer out = dead_letter(&batch, &fault);
		assert_document(&out, expected);
		buffer_finish(&out);
		batch_finish(&batch);
	}
}

/* At most 120 characters, not bytes; never half of one. */
static void previews_are_cut(void **state)
{
	static const struct {
		const char *piece, *shown;
	} cases[] = {{"x", "x"},
	             {"\xc3\xa9", "\xc3\xa9"},
	             {"\xf0\x9d\x84\x9e", "\xf0\x9d\x84\x9e"},
	             {"\xff", "\\xff"},
	             {"\n", "\\x0a"},
	             {"\x7f", "\\x7f"},
	             {"\xc2\x9b", "\\u009b"},
	             {"\xe2\x80\xae", "\\u202e"}};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		for (int count = 119; count <= 121; count++) {
			char bytes[500], preview[800];
			size_t length = 0, shown = 0;
			for (int k = 0; k < count; k++) {
				length += (size_t)snprintf(bytes + length, sizeof bytes - length, "%s", cases[i].piece);
				if (k < 120)
					shown += (size_t)snprintf(preview + shown, sizeof preview - shown, "%s",
					                          cases[i].shown);
			}
			struct batch batch;
			make_batch(&batch, TEXT("sensors/a"), text_of(bytes));
			struct document_fault fault = {.reason = DOCUMENT_REFUSED, .message = "no"};
			bson_t *expected =
			    expected_letter(&batch, text_of(bytes), preview, "refused_by_mongodb", "no", 0);
			struct buffer out = dead_letter(&batch, &fault);
			assert_document(&out, expected);
			buffer_finish(&out);
			batch_finish(&batch);
		}
	}
}

static void odd_routes(void **state)
{
	struct batch batch;
	make_batch(&batch, TEXT("sensors/a"), TEXT("x"));
	struct document_fault fault = {.reason = DOCUMENT_REFUSED, .message = "no"};
	struct buffer out = {0};
	document_dead_letter(&batch, batch.messages, &fault, "caf\xc3\xa9/+/\xff", &out);
	bson_t found;
	bson_iter_t iter;
	assert_true(bson_init_static(&found, out.data, out.length));
	assert_true(bson_iter_init_find(&iter, &found, "route"));
	assert_string_equal(bson_iter_utf8(&iter, NULL), "caf\xc3\xa9/+/\\xff");
	buffer_finish(&out);
	batch_finish(&batch);
}

/* ---- too large ---- */

/* Of a payload above consumer.max_payload the beginning, with length and digest of the whole. */
static void a_truncated_payload(void **state)
{
	struct batch batch;
	make_batch(&batch, TEXT("sensors/a"), TEXT("{\"beginning\": \"of"));
	batch.messages->oversized = true;
	batch.messages->full_length = UINT32_C(3000000000);
	struct document_fault fault = refused(&batch);
	assert_int_equal(fault.reason, DOCUMENT_PAYLOAD_SIZE);
	bson_t *expected = expected_letter(&batch, TEXT("{\"beginning\": \"of"), "{\"beginning\": \"of",
	                                   "payload_too_large", fault.message, 0);
	BSON_APPEND_BOOL(expected, "truncated", true);
	BSON_APPEND_INT64(expected, "length", INT64_C(3000000000));
	BSON_APPEND_BINARY(expected, "sha256", BSON_SUBTYPE_BINARY, batch.arena.data, BATCH_DIGEST_BYTES);
	struct buffer out = dead_letter(&batch, &fault);
	assert_document(&out, expected);
	buffer_finish(&out);
	batch_finish(&batch);
}

/* The same through batch_add(): kept bytes, length and digest are the payload's. */
static void a_truncated_payload_of_a_batch(void **state)
{
	const size_t length = 2 * MIB + 5;
	struct batch batch = {0};
	char *payload = malloc(length);
	assert_non_null(payload);
	memset(payload, 'a', length);
	struct message message = {
	    .topic = "sensors/a", .topic_length = 9, .payload = payload, .payload_length = length, .qos = 1};
	batch_add(&batch, &message, &object_ids, 2 * MIB, received_at);
	struct document_fault fault = refused(&batch);
	assert_int_equal(fault.reason, DOCUMENT_PAYLOAD_SIZE);
	struct buffer out = dead_letter(&batch, &fault);
	char preview[121] = "";
	memset(preview, 'a', 120);
	bson_t *expected = expected_letter(&batch, (struct text){payload, BATCH_TRUNCATED_BYTES}, preview,
	                                   "payload_too_large", fault.message, 0);
	BSON_APPEND_BOOL(expected, "truncated", true);
	BSON_APPEND_INT64(expected, "length", (int64_t)length);
	static const uint8_t digest[] = {0xf0, 0x77, 0xad, 0x66, 0xa4, 0x99, 0x66, 0x3e, 0xa4, 0x9b, 0xdb,
	                                 0x00, 0x67, 0xbb, 0x7d, 0x51, 0x74, 0x5c, 0x75, 0xa6, 0x51, 0xe1,
	                                 0x7c, 0x45, 0x84, 0x35, 0x75, 0x69, 0x86, 0xbb, 0xc5, 0x23};
	BSON_APPEND_BINARY(expected, "sha256", BSON_SUBTYPE_BINARY, digest, sizeof digest);
	assert_document(&out, expected);
	buffer_finish(&out);
	batch_finish(&batch);
	free(payload);
}

/* Above a consumer.max_payload that is smaller than what is kept anyway: refused, but whole, and it says so. */
static void a_refused_payload_that_is_kept_whole(void **state)
{
	struct batch batch = {0};
	struct message message = {
	    .topic = "sensors/a", .topic_length = 9, .payload = "\"0123456789\"", .payload_length = 12, .qos = 1};
	batch_add(&batch, &message, &object_ids, 11, received_at);
	struct document_fault fault = refused(&batch);
	assert_int_equal(fault.reason, DOCUMENT_PAYLOAD_SIZE);
	struct buffer out = dead_letter(&batch, &fault);
	bson_t *expected =
	    expected_letter(&batch, TEXT("\"0123456789\""), "\"0123456789\"", "payload_too_large", fault.message, 0);
	assert_document(&out, expected);
	buffer_finish(&out);
	batch_finish(&batch);
}

/* A JSON string of `length` letters. */
static void make_string(struct batch *batch, size_t length)
{
	char *json = malloc(length + 2);
	assert_non_null(json);
	memset(json, 'a', length + 2);
	json[0] = json[length + 1] = '"';
	make_batch(batch, TEXT("sensors/a"), (struct text){json, length + 2});
	free(json);
}

static bool fits(size_t length)
{
	struct batch batch;
	struct buffer out = {0};
	struct document_fault fault = {0};
	make_string(&batch, length);
	bool built = document_build(&batch, batch.messages, &object_ids, &out, &fault);
	if (built) {
		assert_true(out.length <= DOCUMENT_MAX_BYTES);
	} else {
		assert_int_equal(fault.reason, JSON_TOO_LARGE);
		assert_int_equal(out.length, 0);
	}
	buffer_finish(&out);
	batch_finish(&batch);
	return built;
}

/* MongoDB takes documents of up to 16 MiB; at most a few hundred bytes of that are not used. */
static void up_to_16_mebibytes(void **state)
{
	size_t low = 0, high = DOCUMENT_MAX_BYTES;
	while (high - low > 1) {
		size_t middle = low + (high - low) / 2;
		if (fits(middle))
			low = middle;
		else
			high = middle;
	}
	assert_true(low > DOCUMENT_MAX_BYTES - 400);
	assert_true(fits(15 * MIB));
}

/* 15 MiB of [1,1,…] are 50 MiB of BSON: refused with all its bytes, and that dead letter is not above the limit. */
static void json_that_grows_beyond_the_limit(void **state)
{
	size_t length = 15 * MIB - 1;
	char *json = malloc(length);
	assert_non_null(json);
	for (size_t i = 1; i < length - 1; i++)
		json[i] = i % 2 == 0 ? ',' : '1';
	json[0] = '[';
	json[length - 1] = ']';
	static char topic[65535];
	memset(topic, 0xff, sizeof topic);
	struct batch batch;
	make_batch(&batch, TEXT("sensors/a"), (struct text){json, length});
	struct document_fault fault = refused(&batch);
	assert_int_equal(fault.reason, JSON_TOO_LARGE);
	assert_string_equal(document_reason_name(fault.reason), "document_too_large");
	batch_finish(&batch);
	/* the longest topic, escaped to four times its length */
	make_batch(&batch, (struct text){topic, sizeof topic}, (struct text){json, length});
	struct buffer out = {0};
	document_dead_letter(&batch, batch.messages, &fault, ROUTE, &out);
	assert_true(out.length <= DOCUMENT_MAX_BYTES);
	assert_true(out.length > length + 4 * sizeof topic);
	bson_t found;
	bson_iter_t iter;
	uint32_t kept;
	const uint8_t *bytes;
	assert_true(bson_init_static(&found, out.data, out.length));
	assert_true(bson_iter_init_find(&iter, &found, "payload"));
	bson_iter_binary(&iter, NULL, &kept, &bytes);
	assert_int_equal(kept, length);
	assert_memory_equal(bytes, json, length);
	buffer_finish(&out);
	batch_finish(&batch);
	free(json);
}

/* ---- ids from the message ---- */

static struct id_rule rule_of(const char *first, const char *second)
{
	struct id_rule rule;
	const char *parts[] = {first, second};
	assert_null(id_rule_parse(&rule, parts, second != NULL ? 2 : 1));
	return rule;
}

/* Under that rule the document has this _id (NULL: its ObjectId), and is for the rest what it was. */
static void assert_id(const char *first, const char *second, const char *json, bson_t *id)
{
	struct id_rule rule = rule_of(first, second);
	struct batch batch;
	struct buffer plain = {0}, out = {0};
	struct document_fault fault;
	make_batch(&batch, TEXT("sensors/a"), text_of(json));
	assert_true(document_build(&batch, batch.messages, &object_ids, &plain, &fault));
	buffer_append(&out, OLD, OLD_LENGTH);
	assert_true(document_build(&batch, batch.messages, &rule, &out, &fault));
	assert_int_equal(document_has_object_id(out.data + OLD_LENGTH), id == NULL);
	bson_t rest, *expected = bson_new();
	assert_true(bson_init_static(&rest, plain.data, plain.length));
	if (id != NULL) {
		bson_concat(expected, id);
		bson_copy_to_excluding_noinit(&rest, expected, "_id", (char *)NULL);
	} else {
		bson_concat(expected, &rest);
	}
	assert_document(&out, expected);
	bson_destroy(id);
	buffer_finish(&plain);
	buffer_finish(&out);
	batch_finish(&batch);
	id_rule_finish(&rule);
}

static void ids_of_every_length(void **state)
{
	char json[1100], text[1001];
	assert_id("topic", NULL, "7", BCON_NEW("_id", BCON_UTF8("sensors/a")));
	assert_id("/b", NULL, "{\"b\":true}", BCON_NEW("_id", BCON_BOOL(true)));
	assert_id("/b", NULL, "{\"b\":-5}", BCON_NEW("_id", BCON_INT32(-5)));
	assert_id("topic", "/b", "{\"b\":1.5,\"c\":[]}",
	          BCON_NEW("_id", "{", "topic", BCON_UTF8("sensors/a"), "b", BCON_DOUBLE(1.5), "}"));
	for (size_t length = 0; length <= 1000; length = length < 20 ? length + 1 : length + 490) {
		memset(text, 'x', length);
		text[length] = 0;
		snprintf(json, sizeof json, "{\"b\":\"%s\"}", text);
		assert_id("/b", NULL, json, BCON_NEW("_id", BCON_UTF8(text)));
	}
	assert_id("/b", NULL, "{}", NULL);
	assert_id("topic", "/b", "{\"b\":null}", NULL);
}

/* A payload that is stored under an ObjectId may be too large together with a longer _id; it is kept as a dead letter.
 */
static void an_id_counts_for_the_limit(void **state)
{
	static const char tail[] = {',', '1', '2', '3', '4', ']'};
	struct id_rule rule = rule_of("topic", "/1");
	size_t low = 14 * MIB, high = DOCUMENT_MAX_BYTES;
	struct document_fault fault;
	while (high - low > 1) {
		size_t middle = low + (high - low) / 2;
		char *json = malloc(middle);
		assert_non_null(json);
		memset(json, 'a', middle);
		json[0] = '[';
		json[1] = json[middle - 7] = '"';
		memcpy(json + middle - sizeof tail, tail, sizeof tail);
		struct batch batch;
		struct buffer plain = {0}, out = {0};
		make_batch(&batch, TEXT("sensors/a"), (struct text){json, middle});
		bool fits_plain = document_build(&batch, batch.messages, &object_ids, &plain, &fault);
		bool fits_rule = document_build(&batch, batch.messages, &rule, &out, &fault);
		assert_true(fits_plain || !fits_rule);
		if (!fits_rule) {
			assert_int_equal(fault.reason, JSON_TOO_LARGE);
			assert_int_equal(out.length, 0);
		}
		assert_true(out.length <= DOCUMENT_MAX_BYTES);
		low = fits_rule ? middle : low;
		high = fits_rule ? high : middle;
		buffer_finish(&plain);
		buffer_finish(&out);
		batch_finish(&batch);
		free(json);
	}
	assert_true(low > DOCUMENT_MAX_BYTES - 400);
	id_rule_finish(&rule);
}

/* They are in the dead letter, which keeps its ObjectId. */
static void user_properties_of_a_dead_letter(void **state)
{
	static const uint8_t bad[] = {'b', 'a', 'd', 0xff};
	struct batch batch;
	make_batch(&batch, TEXT("t"), TEXT("x"));
	struct batch_message *message = batch.messages;
	message->properties = batch.arena.length;
	id_keep_property(&batch.arena, "id", "\xc3\xa4 7");
	id_keep_property(&batch.arena, "odd", "bad\xff");
	message->properties_length = (uint32_t)(batch.arena.length - message->properties);
	struct document_fault fault = {.reason = DOCUMENT_ID_CONFLICT, .message = "taken"};
	struct buffer out = dead_letter(&batch, &fault);
	bson_t found, properties;
	bson_iter_t iter;
	assert_true(bson_init_static(&found, out.data + OLD_LENGTH, out.length - OLD_LENGTH));
	assert_true(document_has_object_id(out.data + OLD_LENGTH));
	assert_true(bson_iter_init_find(&iter, &found, "user_properties"));
	uint32_t length;
	const uint8_t *bytes;
	bson_iter_document(&iter, &length, &bytes);
	assert_true(bson_init_static(&properties, bytes, length));
	bson_t *expected = BCON_NEW("id", BCON_UTF8("\xc3\xa4 7"), "odd", BCON_BIN(BSON_SUBTYPE_BINARY, bad, 4));
	assert_true(bson_equal(&properties, expected));
	bson_destroy(expected);
	assert_true(bson_iter_init(&iter, &found) && bson_iter_find_descendant(&iter, "reason.code", &iter));
	assert_string_equal(bson_iter_utf8(&iter, NULL), "id_conflict");
	buffer_finish(&out);
	batch_finish(&batch);
}

/* ---- read back ---- */

/* The message's user properties, so that the same _id is made of it again. */
static void user_properties_are_read_back(void **state)
{
	static const char *const values[] = {"", "\xc3\xa4 7", "bad\xff"};
	struct batch batch;
	make_batch(&batch, TEXT("t"), TEXT("x"));
	struct batch_message *message = batch.messages;
	message->properties = batch.arena.length;
	for (size_t i = 0; i < sizeof values / sizeof *values; i++)
		id_keep_property(&batch.arena, "id", values[i]);
	message->properties_length = (uint32_t)(batch.arena.length - message->properties);
	struct document_fault fault = refused(&batch);
	struct buffer out = dead_letter(&batch, &fault), properties = {0};
	struct batch_record record;
	bson_t letter;
	assert_true(bson_init_static(&letter, out.data + OLD_LENGTH, out.length - OLD_LENGTH));
	for (int again = 0; again < 2; again++) { /* nothing of the letter before is left in the buffer */
		assert_int_equal(document_read_dead_letter(&letter, &record, &properties), DOCUMENT_LETTER_WHOLE);
		assert_int_equal(record.properties_length, message->properties_length);
		assert_memory_equal(record.properties, batch.arena.data + message->properties,
		                    message->properties_length);
	}
	buffer_finish(&out);
	batch_finish(&batch);
	make_batch(&batch, TEXT("t"), TEXT("x"));
	fault = refused(&batch);
	out = dead_letter(&batch, &fault);
	assert_true(bson_init_static(&letter, out.data + OLD_LENGTH, out.length - OLD_LENGTH));
	assert_int_equal(document_read_dead_letter(&letter, &record, &properties), DOCUMENT_LETTER_WHOLE);
	assert_int_equal(record.properties_length, 0);
	buffer_finish(&properties);
	buffer_finish(&out);
	batch_finish(&batch);
}

/* The message of the batch is in its dead letter as it was. */
static void assert_read_back(const struct batch *batch)
{
	const struct batch_message *message = batch->messages;
	struct document_fault fault = {.reason = DOCUMENT_REFUSED, .message = "no"};
	struct buffer out = {0};
	document_dead_letter(batch, message, &fault, ROUTE, &out);
	bson_t letter;
	struct batch_record record;
	struct buffer properties = {0};
	assert_true(bson_init_static(&letter, out.data, out.length));
	assert_int_equal(document_read_dead_letter(&letter, &record, &properties), DOCUMENT_LETTER_WHOLE);
	assert_int_equal(record.topic_length, message->topic_length);
	assert_memory_equal(record.topic, batch_topic(batch, message), record.topic_length);
	assert_int_equal(record.payload_length, message->payload_length);
	assert_int_equal(record.full_length, message->payload_length);
	assert_memory_equal(record.payload, batch_payload(batch, message), record.payload_length);
	assert_null(record.digest);
	assert_true(bson_oid_equal(&record.id, &message->id));
	assert_true(record.received_at == message->received_at);
	assert_int_equal(record.qos, message->qos);
	assert_int_equal(record.retain, message->retain);
	assert_int_equal(record.dup, message->dup);
	assert_int_equal(record.row, 0);
	buffer_finish(&properties);
	buffer_finish(&out);
}

static void a_dead_letter_holds_its_message(void **state)
{
	static const struct text topics[] = {
	    {"sensors/a", 9}, {"", 0}, {"\\x41\\", 5}, {"\x01\x1f\x7f\n\"\\", 6}, {"\xf0\x90\x80\x80/\xc3\xa9", 7}};
	static const struct text payloads[] = {{"", 0}, {"{}", 2}, {"\0\xff\n", 3}, {"{\"a\": 01}", 9}};
	static const int64_t times[] = {0, -1, INT64_MAX, INT64_MIN};
	for (unsigned i = 0; i < 20; i++) {
		struct batch batch;
		make_batch(&batch, topics[i % 5], payloads[i % 4]);
		batch.messages->qos = i % 3;
		batch.messages->retain = i & 1;
		batch.messages->dup = i & 2;
		batch.messages->received_at = times[i / 5];
		assert_read_back(&batch);
		batch_finish(&batch);
	}
}

static enum document_letter read_and_free(bson_t *letter)
{
	struct batch_record record;
	struct buffer properties = {0};
	enum document_letter kind = document_read_dead_letter(letter, &record, &properties);
	buffer_finish(&properties);
	bson_destroy(letter);
	return kind;
}

/* A dead letter without the field `but`, or a whole one for NULL. */
static bson_t *letter_without(const char *but)
{
	struct batch batch;
	make_batch(&batch, TEXT("sensors/a"), TEXT("x"));
	struct document_fault fault = refused(&batch);
	struct buffer out = dead_letter(&batch, &fault);
	bson_t all, *some = bson_new();
	assert_true(bson_init_static(&all, out.data + OLD_LENGTH, out.length - OLD_LENGTH));
	bson_copy_to_excluding_noinit(&all, some, but != NULL ? but : "none", NULL);
	buffer_finish(&out);
	batch_finish(&batch);
	return some;
}

/* What is not as we write it is not ours to move. */
static void strange_letters(void **state)
{
	static const char *const names[] = {"_id",         "topic", "payload", "preview", "reason",
	                                    "received_at", "qos",   "retain",  "dup",     "route"};
	assert_int_equal(read_and_free(letter_without(NULL)), DOCUMENT_LETTER_WHOLE);
	for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
		assert_int_equal(read_and_free(letter_without(names[i])), DOCUMENT_LETTER_STRANGE);
		bson_t *other = letter_without(names[i]);
		BSON_APPEND_NULL(other, names[i]);
		assert_int_equal(read_and_free(other), DOCUMENT_LETTER_STRANGE);
		bson_t *twice = letter_without(NULL), *one = letter_without(NULL);
		bson_concat(twice, one);
		bson_destroy(one);
		assert_int_equal(read_and_free(twice), DOCUMENT_LETTER_STRANGE);
	}
	bson_t *letter = letter_without(NULL);
	BSON_APPEND_UTF8(letter, "note", "of an operator");
	assert_int_equal(read_and_free(letter), DOCUMENT_LETTER_STRANGE);
	letter = letter_without("qos");
	BSON_APPEND_INT32(letter, "qos", 3);
	assert_int_equal(read_and_free(letter), DOCUMENT_LETTER_STRANGE);
	letter = letter_without("payload");
	BSON_APPEND_BINARY(letter, "payload", BSON_SUBTYPE_USER, (const uint8_t *)"x", 1);
	assert_int_equal(read_and_free(letter), DOCUMENT_LETTER_STRANGE);
	letter = letter_without("topic");
	bson_append_utf8(letter, "topic", -1, "a\0b", 3);
	assert_int_equal(read_and_free(letter), DOCUMENT_LETTER_STRANGE);
	letter = letter_without(NULL);
	BCON_APPEND(letter, "user_properties", "{", "id", BCON_INT32(7), "}");
	assert_int_equal(read_and_free(letter), DOCUMENT_LETTER_STRANGE);
	letter = letter_without(NULL);
	BCON_APPEND(letter, "user_properties", "[", BCON_UTF8("7"), "]");
	assert_int_equal(read_and_free(letter), DOCUMENT_LETTER_STRANGE);
	letter = letter_without(NULL);
	BCON_APPEND(letter, "user_properties", "{", "id", BCON_BIN(BSON_SUBTYPE_BINARY, (const uint8_t *)"a\0b", 3),
	            "}");
	assert_int_equal(read_and_free(letter), DOCUMENT_LETTER_STRANGE);
	assert_int_equal(read_and_free(bson_new()), DOCUMENT_LETTER_STRANGE);
}

/* What is in them is not the whole message. */
static void letters_that_lack_something(void **state)
{
	bson_t *letter = letter_without(NULL);
	BSON_APPEND_BOOL(letter, "truncated", true);
	BSON_APPEND_INT64(letter, "length", 2);
	BSON_APPEND_BINARY(letter, "sha256", BSON_SUBTYPE_BINARY, (const uint8_t *)"x", 1);
	assert_int_equal(read_and_free(letter), DOCUMENT_LETTER_TRUNCATED);
	struct batch batch;
	make_batch(&batch, TEXT("a/\xff"), TEXT("1"));
	batch.messages->oversized = true; /* the other reason must not hide this one */
	struct document_fault fault = refused(&batch);
	struct buffer out = dead_letter(&batch, &fault);
	struct batch_record record;
	struct buffer properties = {0};
	bson_t found;
	assert_true(bson_init_static(&found, out.data + OLD_LENGTH, out.length - OLD_LENGTH));
	assert_int_equal(document_read_dead_letter(&found, &record, &properties), DOCUMENT_LETTER_TOPIC);
	buffer_finish(&properties);
	buffer_finish(&out);
	batch_finish(&batch);
}

/* ---- names ---- */

static void reasons_have_names_of_their_own(void **state)
{
	for (int i = 0; i < DOCUMENT_REASONS; i++) {
		const char *name = document_reason_name((enum document_reason)i);
		assert_non_null(name);
		assert_true(strlen(name) > 1);
		assert_int_equal(strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789_"), strlen(name));
		for (int k = 0; k < i; k++)
			assert_string_not_equal(name, document_reason_name((enum document_reason)k));
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	    cmocka_unit_test(the_envelope_of_every_type),
	    cmocka_unit_test(keys_of_the_payload_do_nothing),
	    cmocka_unit_test(flags_and_times),
	    cmocka_unit_test(documents_are_appended),
	    cmocka_unit_test(odd_topics_are_kept),
	    cmocka_unit_test(the_longest_topic),
	    cmocka_unit_test(topics_that_are_not_utf8),
	    cmocka_unit_test(every_reason_of_json),
	    cmocka_unit_test(reasons_of_mongodb),
	    cmocka_unit_test(previews_are_cut),
	    cmocka_unit_test(odd_routes),
	    cmocka_unit_test(a_truncated_payload),
	    cmocka_unit_test(a_truncated_payload_of_a_batch),
	    cmocka_unit_test(a_refused_payload_that_is_kept_whole),
	    cmocka_unit_test(up_to_16_mebibytes),
	    cmocka_unit_test(json_that_grows_beyond_the_limit),
	    cmocka_unit_test(ids_of_every_length),
	    cmocka_unit_test(an_id_counts_for_the_limit),
	    cmocka_unit_test(user_properties_of_a_dead_letter),
	    cmocka_unit_test(user_properties_are_read_back),
	    cmocka_unit_test(a_dead_letter_holds_its_message),
	    cmocka_unit_test(strange_letters),
	    cmocka_unit_test(letters_that_lack_something),
	    cmocka_unit_test(reasons_have_names_of_their_own),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
