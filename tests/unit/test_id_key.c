/* id_key.c: _ids that MongoDB takes for the same have one key, others have not. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "id_key.h"

#include <stdlib.h>
#include <string.h>

static bson_t *document_of(const char *id)
{
	bson_error_t error;
	char json[512];
	snprintf(json, sizeof json, "{\"n\": 1, \"_id\": %s}", id);
	bson_t *document = bson_new_from_json((const uint8_t *)json, -1, &error);
	if (document == NULL)
		fail_msg("%s: %s", json, error.message);
	return document;
}

static bool is_same(const char *one, const char *other)
{
	struct buffer keys[2] = {{0}, {0}};
	bson_t *documents[2] = {document_of(one), document_of(other)};
	for (int i = 0; i < 2; i++) {
		id_key_append(documents[i], &keys[i]);
		bson_destroy(documents[i]);
	}
	bool same = keys[0].length == keys[1].length && memcmp(keys[0].data, keys[1].data, keys[0].length) == 0;
	buffer_finish(&keys[0]);
	buffer_finish(&keys[1]);
	return same;
}

#define INT(text)     "{\"$numberInt\": \"" text "\"}"
#define LONG(text)    "{\"$numberLong\": \"" text "\"}"
#define DOUBLE(text)  "{\"$numberDouble\": \"" text "\"}"
#define DECIMAL(text) "{\"$numberDecimal\": \"" text "\"}"

/* Each row is one _id in several guises; nothing in one row is the same as anything in another. */
static const char *const rows[][6] = {
    {INT("5"), LONG("5"), DOUBLE("5.0"), DECIMAL("5"), DECIMAL("5.000"), DECIMAL("0.5E1")},
    {INT("-5"), DOUBLE("-5.0"), DECIMAL("-5")},
    {INT("0"), LONG("0"), DOUBLE("0.0"), DOUBLE("-0.0"), DECIMAL("0E+3"), DECIMAL("-0")},
    {LONG("9223372036854775807"), DECIMAL("9223372036854775807")},
    {LONG("-9223372036854775808"), DOUBLE("-9223372036854775808"), DECIMAL("-9223372036854775808")},
    {DOUBLE("9223372036854775808"), DECIMAL("9223372036854775808")},
    {LONG("9007199254740993"), DECIMAL("9007199254740993")},
    {DOUBLE("9007199254740992"), LONG("9007199254740992")},
    {DOUBLE("0.5"), DECIMAL("0.5"), DECIMAL("0.50")},
    {DOUBLE("0.1")}, /* is not a tenth */
    {DECIMAL("0.1"), DECIMAL("0.10"), DECIMAL("1E-1")},
    {DOUBLE("1e30"), DECIMAL("1000000000000000019884624838656")},
    {DECIMAL("1E30")},
    {DECIMAL("1E6000")},
    {DECIMAL("-1E6000")},
    {DECIMAL("1E-6000")},
    {DOUBLE("NaN"), DECIMAL("NaN")},
    {DOUBLE("Infinity"), DECIMAL("Infinity")},
    {DOUBLE("-Infinity"), DECIMAL("-Infinity")},
    {"\"5\""},
    {"\"\""},
    {"\"5\\u0000\""},
    {"\"a\""},
    {"\"A\""},
    {"true"},
    {"false"},
    {"null"},
    {"{\"$oid\": \"000000000000000000000005\"}"},
    {"{\"a\": " INT("5") "}", "{\"a\": " DOUBLE("5") "}", "{\"a\": " DECIMAL("5.0") "}"},
    {"{\"b\": " INT("5") "}"},
    {"{\"a\": " INT("5") ", \"b\": 1}", "{\"a\": " LONG("5") ", \"b\": " DOUBLE("1") "}"},
    {"{\"b\": 1, \"a\": " INT("5") "}"},
    {"{}"},
    {"[]"},
    {"[" INT("5") "]", "[" DOUBLE("5") "]"},
    {"[[" INT("5") "]]"},
    {"[" INT("5") ", " INT("5") "]"},
    {"{\"0\": " INT("5") "}"},
    {"{\"$date\": {\"$numberLong\": \"5\"}}"},
};

static void numbers_and_what_holds_them(void **state)
{
	size_t count = sizeof rows / sizeof *rows;
	for (size_t i = 0; i < count; i++)
		for (size_t j = 0; j < count; j++)
			for (size_t k = 0; k < 6 && rows[i][k] != NULL; k++)
				for (size_t l = 0; l < 6 && rows[j][l] != NULL; l++)
					if (is_same(rows[i][k], rows[j][l]) != (i == j))
						fail_msg("%s and %s", rows[i][k], rows[j][l]);
}

static void many_of_them(void **state)
{
	struct id_key_set set = {0};
	const struct id_key_entry *first;
	char text[64];
	for (int i = 0; i < 1000; i++) {
		snprintf(text, sizeof text, i % 2 ? DOUBLE("%d") : INT("%d"), i / 2 % 100);
		bson_t *document = document_of(text);
		id_key_set_add(&set, document, (size_t)i);
		bson_destroy(document);
	}
	id_key_set_sort(&set);
	bson_t *wanted = document_of(DECIMAL("7.0")), *missing = document_of("\"7\"");
	assert_int_equal(id_key_set_find(&set, wanted, &first), 10);
	for (size_t i = 0; i < 10; i++)
		assert_int_equal(first[i].owner, 14 + 200 * (i / 2) + i % 2); /* as they were added */
	assert_int_equal(id_key_set_find(&set, missing, &first), 0);
	assert_null(first);
	size_t runs = 0;
	for (size_t i = 0; i < set.count; i += id_key_set_run(&set, i))
		runs++;
	assert_int_equal(runs, 100);
	id_key_set_clear(&set);
	id_key_set_sort(&set);
	assert_int_equal(id_key_set_find(&set, wanted, &first), 0);
	bson_destroy(wanted);
	bson_destroy(missing);
	id_key_set_finish(&set);
}

static void a_document_without_id(void **state)
{
	struct buffer key = {0};
	bson_t *document = bson_new();
	id_key_append(document, &key);
	assert_int_equal(key.length, 0);
	bson_destroy(document);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	    cmocka_unit_test(numbers_and_what_holds_them),
	    cmocka_unit_test(many_of_them),
	    cmocka_unit_test(a_document_without_id),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
