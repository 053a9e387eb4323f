/*
 * verdict.c: what a reply says of each document, for every reply a server could send: good ones case by case, and a
 * hundred thousand made at random, of which whatever is believed must add up.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "verdict.h"

#include <mongoc/mongoc.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 12, RUNS = 100000 };

static bson_t *parse(const char *json)
{
	bson_error_t error;
	bson_t *reply = bson_new_from_json((const uint8_t *)json, -1, &error);
	if (reply == NULL)
		fail_msg("%s: %s", json, error.message);
	return reply;
}

static void assert_kinds(const char *json, size_t count, const enum verdict_kind *kinds)
{
	struct verdict verdicts[MOST];
	bson_t *reply = parse(json);
	assert_true(verdict_read(reply, count, NULL, verdicts));
	for (size_t i = 0; i < count; i++)
		if (verdicts[i].kind != kinds[i])
			fail_msg("%s: document %zu is %d, not %d", json, i, (int)verdicts[i].kind, (int)kinds[i]);
	bson_destroy(reply);
}

static void assert_not_believed(const char *json, size_t count)
{
	struct verdict verdicts[MOST];
	bson_t *reply = parse(json);
	if (verdict_read(reply, count, NULL, verdicts))
		fail_msg("%s is believed", json);
	for (size_t i = 0; i < count; i++)
		assert_int_equal(verdicts[i].kind, VERDICT_OPEN);
	bson_destroy(reply);
}

static void each_kind_of_error(void **state)
{
	assert_kinds("{\"insertedCount\": 3}", 3,
	             (enum verdict_kind[]){VERDICT_INSERTED, VERDICT_INSERTED, VERDICT_INSERTED});
	assert_kinds(
	    "{\"insertedCount\": 1, \"writeErrors\": [{\"index\": 6, \"code\": 16755},"
	    "{\"index\": 0, \"code\": 121, \"errmsg\": \"x\"}, {\"index\": 2, \"code\": 11000, \"keyPattern\": "
	    "{\"_id\": 1}}, {\"index\": 3, \"code\": 11000, \"keyPattern\": {\"payload.n\": 1}}, {\"index\": 4, "
	    "\"code\": 11000}, {\"index\": 5, \"code\": 112}, {\"index\": 7, \"code\": 3}]}",
	    8,
	    (enum verdict_kind[]){VERDICT_REFUSED, VERDICT_INSERTED, VERDICT_ID_TAKEN, VERDICT_UNIQUE_INDEX,
	                          VERDICT_TAKEN, VERDICT_LATER, VERDICT_REFUSED, VERDICT_STRANGE});
}

/* What a server quotes in its text may be the message's own words. */
static void an_index_is_not_believed_by_a_text(void **state)
{
	static const char *const messages[] = {
	    "E11000 duplicate key error collection: a.b index: _id_ dup key: { _id: 1 }",
	    "E11000 duplicate key error collection: a.b index: n_1 dup key: { n: 1 }", ""};
	for (size_t i = 0; i < sizeof messages / sizeof *messages; i++) {
		struct verdict verdict;
		bson_t *reply =
		    BCON_NEW("insertedCount", BCON_INT32(0), "writeErrors", "[", "{", "index", BCON_INT32(0), "code",
		             BCON_INT32(11000), "errmsg", BCON_UTF8(messages[i]), "}", "]");
		assert_true(verdict_read(reply, 1, NULL, &verdict));
		assert_int_equal(verdict.kind, VERDICT_TAKEN);
		assert_string_equal(verdict.message, messages[i]);
		bson_destroy(reply);
	}
}

/* The call's own error: one that the reply lists, or nothing of it is believed. */
static void a_call_that_failed(void **state)
{
	static const struct {
		uint32_t domain, code;
		bool believed;
	} cases[] = {
	    {MONGOC_ERROR_SERVER, 121, true},
	    {MONGOC_ERROR_SERVER, 91, false},
	    {MONGOC_ERROR_STREAM, MONGOC_ERROR_STREAM_SOCKET, false},
	    {MONGOC_ERROR_COLLECTION, 121, false},
	};
	struct verdict verdicts[2];
	bson_t *listed = parse("{\"insertedCount\": 1, \"writeErrors\": [{\"index\": 1, \"code\": 121}]}");
	bson_t *none = parse("{\"insertedCount\": 2}");
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		bson_error_t error = {.domain = cases[i].domain, .code = cases[i].code};
		assert_int_equal(verdict_read(listed, 2, &error, verdicts), cases[i].believed);
		assert_int_equal(verdicts[0].kind, cases[i].believed ? VERDICT_INSERTED : VERDICT_OPEN);
		assert_false(verdict_read(none, 2, &error, verdicts));
		assert_int_equal(verdicts[0].kind, VERDICT_OPEN);
	}
	bson_destroy(listed);
	bson_destroy(none);
}

static void what_is_not_believed(void **state)
{
	static const char *const replies[] = {
	    "{}",
	    "{\"insertedCount\": 1}",
	    "{\"insertedCount\": 3}",
	    "{\"insertedCount\": -1}",
	    "{\"insertedCount\": \"2\"}",
	    "{\"insertedCount\": 1e300}",
	    "{\"insertedCount\": {\"$numberDouble\": \"NaN\"}}",
	    "{\"insertedCount\": 2, \"writeErrors\": 5}",
	    "{\"insertedCount\": 2, \"writeErrors\": [{\"index\": 0, \"code\": 121}]}",
	    "{\"insertedCount\": 1, \"writeErrors\": [{\"index\": 2, \"code\": 121}]}",
	    "{\"insertedCount\": 1, \"writeErrors\": [{\"index\": -1, \"code\": 121}]}",
	    "{\"insertedCount\": 1, \"writeErrors\": [{\"index\": 4294967296, \"code\": 121}]}",
	    "{\"insertedCount\": 1, \"writeErrors\": [{\"code\": 121}]}",
	    "{\"insertedCount\": 1, \"writeErrors\": [{\"index\": \"0\", \"code\": 121}]}",
	    "{\"insertedCount\": 1, \"writeErrors\": [7]}",
	    "{\"insertedCount\": 0, \"writeErrors\": [{\"index\": 0, \"code\": 121}, {\"index\": 0, \"code\": 121}]}",
	    "{\"insertedCount\": 2, \"writeConcernErrors\": [{\"code\": 64}]}",
	    "{\"insertedCount\": 2, \"writeConcernErrors\": 5}",
	    "{\"insertedCount\": 2, \"writeConcernError\": {\"code\": 64}}",
	};
	for (size_t i = 0; i < sizeof replies / sizeof *replies; i++)
		assert_not_believed(replies[i], 2);
}

static void an_error_that_is_listed_twice(void **state)
{
	assert_kinds(
	    "{\"insertedCount\": 1, \"writeErrors\": [{\"index\": 1, \"code\": 121}, {\"index\": 1, \"code\": 112}]}",
	    2, (enum verdict_kind[]){VERDICT_INSERTED, VERDICT_REFUSED});
}

/* ---- at random ---- */

static uint64_t seed = 88172645463325252U;

static unsigned below(unsigned limit)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return (unsigned)(seed % limit);
}

/* Mostly a document's index, sometimes none. */
static void append_index(bson_t *entry, size_t count, bool *named)
{
	int32_t index = (int32_t)below((unsigned)count + 2) - (below(20) == 0);
	switch (below(8)) {
	case 0:
		BSON_APPEND_DOUBLE(entry, "index", index);
		break;
	case 1:
		BSON_APPEND_INT64(entry, "index", index);
		break;
	default:
		BSON_APPEND_INT32(entry, "index", index);
		break;
	}
	if (index >= 0 && (size_t)index < count)
		named[index] = true;
}

static void append_error(bson_t *entry, size_t count, bool *named)
{
	static const int32_t codes[] = {11000, 121, 2, 112, 13, 16500, 0, 99999, -5, 91};
	if (below(40) != 0)
		append_index(entry, count, named);
	if (below(20) != 0)
		BSON_APPEND_INT32(entry, "code", codes[below(sizeof codes / sizeof *codes)]);
	const char *message = below(2) ? "index: _id_ x" : "other", *field = below(2) ? "_id" : "n";
	if (below(3) == 0)
		BSON_APPEND_UTF8(entry, "errmsg", message);
	if (below(3) == 0) {
		bson_t pattern;
		BSON_APPEND_DOCUMENT_BEGIN(entry, "keyPattern", &pattern);
		if (below(4) != 0)
			BSON_APPEND_INT32(&pattern, field, 1);
		if (below(4) == 0)
			BSON_APPEND_INT32(&pattern, "m", 1);
		bson_append_document_end(entry, &pattern);
	}
}

static void random_reply(bson_t *reply, size_t count, bool *named)
{
	bson_t errors, entry;
	char space[16];
	const char *key;
	unsigned listed = below(2) ? below((unsigned)count + 2) : 0;
	BSON_APPEND_ARRAY_BEGIN(reply, "writeErrors", &errors);
	for (uint32_t i = 0; i < listed; i++) {
		bson_uint32_to_string(i, &key, space, sizeof space);
		BSON_APPEND_DOCUMENT_BEGIN(&errors, key, &entry);
		append_error(&entry, count, named);
		bson_append_document_end(&errors, &entry);
	}
	bson_append_array_end(reply, &errors);
	size_t distinct = 0;
	for (size_t i = 0; i < count; i++)
		distinct += named[i];
	BSON_APPEND_INT32(reply, "insertedCount", (int32_t)(count - distinct) + (below(6) == 0) - (below(6) == 0));
	if (below(20) == 0)
		BSON_APPEND_INT32(reply, "writeConcernError", 1);
}

/* Believed or not, no document counts as written that the reply lists, as many count as written as it says, and every
 * verdict is one. */
static void whatever_is_believed_adds_up(void **state)
{
	size_t believed = 0;
	for (int run = 0; run < RUNS; run++) {
		struct verdict verdicts[MOST];
		bool named[MOST] = {false};
		size_t count = 1 + below(MOST), inserted = 0;
		bson_iter_t iter;
		bson_t reply = BSON_INITIALIZER;
		random_reply(&reply, count, named);
		bool told = verdict_read(&reply, count, NULL, verdicts);
		believed += told;
		for (size_t i = 0; i < count; i++) {
			assert_non_null(verdicts[i].message);
			assert_true(told ? verdicts[i].kind != VERDICT_OPEN : verdicts[i].kind == VERDICT_OPEN);
			inserted += verdicts[i].kind == VERDICT_INSERTED;
			if (told)
				assert_int_equal(named[i], verdicts[i].kind != VERDICT_INSERTED);
		}
		assert_true(bson_iter_init_find(&iter, &reply, "insertedCount"));
		if (told)
			assert_int_equal(inserted, bson_iter_int32(&iter));
		bson_destroy(&reply);
	}
	assert_true(believed > RUNS / 10 && believed < RUNS * 9 / 10); /* both happened often enough */
}

static void a_write_concern_error(void **state)
{
	bson_error_t error = {0};
	bson_t *reply = parse("{\"writeConcernErrors\": [{\"code\": 64, \"errmsg\": \"waiting timed out\"}]}");
	assert_true(verdict_write_concern_error(reply, &error));
	assert_int_equal(error.domain, MONGOC_ERROR_WRITE_CONCERN);
	assert_int_equal(error.code, 64);
	assert_string_equal(error.message, "waiting timed out");
	bson_destroy(reply);
	static const char *const none[] = {"{}", "{\"writeConcernErrors\": []}", "{\"writeConcernErrors\": 5}",
	                                   "{\"writeConcernErrors\": [5]}"};
	for (size_t i = 0; i < sizeof none / sizeof *none; i++) {
		reply = parse(none[i]);
		assert_false(verdict_write_concern_error(reply, &error));
		bson_destroy(reply);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	    cmocka_unit_test(each_kind_of_error),
	    cmocka_unit_test(an_index_is_not_believed_by_a_text),
	    cmocka_unit_test(a_call_that_failed),
	    cmocka_unit_test(what_is_not_believed),
	    cmocka_unit_test(an_error_that_is_listed_twice),
	    cmocka_unit_test(whatever_is_believed_adds_up),
	    cmocka_unit_test(a_write_concern_error),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
