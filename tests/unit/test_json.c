/*
 * json_to_bson() against the rules of json.h, one table per rule: texts it takes with the exact bytes libbson would
 * write for them, and texts it refuses with code and offset.
 *
 * Each text is read from a heap block of its own size, so that a byte read too far is seen by the sanitizers and
 * valgrind, and written behind bytes that must stay as they are. A refused text is also cut before and behind the
 * byte that was blamed: without it the text must only have ended too early, with it the verdict must stand.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "json.h"

#include <bson/bson.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define KEY      "value"
#define OLD      "bytes of an earlier message"
#define NO_LIMIT SIZE_MAX

enum { OLD_LENGTH = sizeof OLD - 1 };

/* ---- one text in, bytes or a fault out */

struct text {
	const char *bytes;
	size_t length;
};
#define TEXT(literal)                                                                                                  \
	{                                                                                                              \
		literal, sizeof(literal) - 1                                                                           \
	}

struct outcome {
	struct buffer out; /* what was appended */
	struct json_fault fault;
};

static const char *printable(struct text text)
{
	static char shown[256];
	size_t used = 0;
	for (size_t i = 0; i < text.length && used < sizeof shown - 8; i++) {
		uint8_t byte = (uint8_t)text.bytes[i];
		const char *format = byte >= 0x20 && byte < 0x7F ? "%c" : "<%02x>";
		used += (size_t)snprintf(shown + used, sizeof shown - used, format, byte);
	}
	return shown;
}

static struct outcome convert(struct text text, size_t limit)
{
	struct outcome outcome = {0};
	struct buffer out = {0};
	char *copy = malloc(text.length + 1);
	assert_non_null(copy);
	memcpy(copy, text.bytes, text.length);
	copy[text.length] = '\0';
	buffer_append(&out, OLD, OLD_LENGTH);

	enum json_code code = json_to_bson(copy, text.length, KEY, limit, &out, &outcome.fault);

	if (code != outcome.fault.code || outcome.fault.message == NULL || outcome.fault.offset > text.length)
		fail_msg("%s: fault not filled in", printable(text));
	if (out.length < OLD_LENGTH || memcmp(out.data, OLD, OLD_LENGTH) != 0)
		fail_msg("%s: earlier bytes not kept", printable(text));
	if (code != JSON_OK && out.length != OLD_LENGTH)
		fail_msg("%s: refused, but %zu bytes left behind", printable(text), out.length - OLD_LENGTH);
	if (code == JSON_OK)
		buffer_append(&outcome.out, out.data + OLD_LENGTH, out.length - OLD_LENGTH);
	buffer_finish(&out);
	free(copy);
	return outcome;
}

/* The element as a document's only one. */
static void wrap(const struct buffer *element, struct buffer *document)
{
	uint32_t length = (uint32_t)element->length + 5;
	for (int shift = 0; shift < 32; shift += 8)
		buffer_append_byte(document, (uint8_t)(length >> shift));
	buffer_append(document, element->data, element->length);
	buffer_append_byte(document, 0);
}

static void assert_valid_bson(struct text text, const struct buffer *document)
{
	bson_t bson;
	size_t offset;
	if (!bson_init_static(&bson, document->data, document->length) ||
	    !bson_validate(&bson, BSON_VALIDATE_UTF8 | BSON_VALIDATE_UTF8_ALLOW_NULL, &offset))
		fail_msg("%s: not valid BSON", printable(text));
}

/* From the bytes: bson_new() gives less alignment than bson_t asks for, and UBSan minds a look at its `len`. */
static size_t length_of(const bson_t *bson)
{
	uint32_t length;
	memcpy(&length, bson_get_data(bson), sizeof length);
	return BSON_UINT32_FROM_LE(length);
}

static void assert_accepts(struct text text, const bson_t *expected)
{
	struct outcome outcome = convert(text, NO_LIMIT);
	struct buffer document = {0};
	if (outcome.fault.code != JSON_OK)
		fail_msg("%s: refused at %zu: %s", printable(text), outcome.fault.offset, outcome.fault.message);
	wrap(&outcome.out, &document);
	if (document.length != length_of(expected) ||
	    memcmp(document.data, bson_get_data(expected), document.length) != 0)
		fail_msg("%s: other bytes than libbson's", printable(text));
	assert_valid_bson(text, &document);
	buffer_finish(&document);
	buffer_finish(&outcome.out);
}

/* For tables: takes the expected document and frees it. */
static void assert_accepts_literal(const char *text, bson_t *expected)
{
	assert_accepts((struct text){text, strlen(text)}, expected);
	bson_destroy(expected);
}

static void assert_string(struct text text, struct text expected)
{
	bson_t *document = bson_new();
	assert_true(bson_append_utf8(document, KEY, -1, expected.bytes, (int)expected.length));
	assert_accepts(text, document);
	bson_destroy(document);
}

static struct json_fault fault_of(struct text text)
{
	struct outcome outcome = convert(text, NO_LIMIT);
	buffer_finish(&outcome.out);
	return outcome.fault;
}

static void assert_first_wrong_byte(struct text text, size_t offset)
{
	struct json_fault before = fault_of((struct text){text.bytes, offset});
	if (before.code != JSON_OK && before.offset != offset)
		fail_msg("%s: blamed %zu, but %zu when cut before it", printable(text), offset, before.offset);
	if (offset == text.length)
		return;
	struct json_fault behind = fault_of((struct text){text.bytes, offset + 1});
	if (behind.code == JSON_OK || behind.offset != offset)
		fail_msg("%s: blamed %zu, but not when cut behind it", printable(text), offset);
}

static void assert_refuses(struct text text, enum json_code code, size_t offset)
{
	struct json_fault fault = fault_of(text);
	if (fault.code != code || fault.offset != offset)
		fail_msg("%s: %s at %zu (%s), not %s at %zu", printable(text), json_code_name(fault.code), fault.offset,
		         fault.message, json_code_name(code), offset);
	if (code != JSON_NUMBER_RANGE && code != JSON_KEY_NUL)
		assert_first_wrong_byte(text, offset);
}

struct refusal {
	struct text text;
	enum json_code code;
	size_t offset;
};

#define ASSERT_REFUSES_ALL(refusals)                                                                                   \
	for (size_t i_ = 0; i_ < sizeof(refusals) / sizeof *(refusals); i_++)                                          \
	assert_refuses((refusals)[i_].text, (refusals)[i_].code, (refusals)[i_].offset)

static uint64_t random_state;

/* xorshift64*; the seed is fixed by each test. */
static uint64_t random_below(uint64_t bound)
{
	random_state ^= random_state >> 12;
	random_state ^= random_state << 25;
	random_state ^= random_state >> 27;
	return (random_state * UINT64_C(2685821657736338717) >> 11) % bound;
}

/* ---- literals and grammar */

static void literals_become_bool_and_null(void **state)
{
	assert_accepts_literal("true", BCON_NEW(KEY, BCON_BOOL(true)));
	assert_accepts_literal("false", BCON_NEW(KEY, BCON_BOOL(false)));
	assert_accepts_literal("null", BCON_NEW(KEY, BCON_NULL));
}

static void misspelt_literals_are_refused(void **state)
{
	static const struct refusal refusals[] = {
	    {TEXT("True"), JSON_SYNTAX, 0},      {TEXT("NULL"), JSON_SYNTAX, 0},
	    {TEXT("tru"), JSON_SYNTAX, 3},       {TEXT("trux"), JSON_SYNTAX, 3},
	    {TEXT("truee"), JSON_SYNTAX, 4},     {TEXT("fals"), JSON_SYNTAX, 4},
	    {TEXT("falsE"), JSON_SYNTAX, 4},     {TEXT("nul"), JSON_SYNTAX, 3},
	    {TEXT("nulll"), JSON_SYNTAX, 4},     {TEXT("[nul]"), JSON_SYNTAX, 4},
	    {TEXT("[tr ue]"), JSON_SYNTAX, 3},   {TEXT("n"), JSON_SYNTAX, 1},
	    {TEXT("NaN"), JSON_SYNTAX, 0},       {TEXT("nan"), JSON_SYNTAX, 1},
	    {TEXT("-NaN"), JSON_SYNTAX, 1},      {TEXT("Infinity"), JSON_SYNTAX, 0},
	    {TEXT("inf"), JSON_SYNTAX, 0},       {TEXT("-Infinity"), JSON_SYNTAX, 1},
	    {TEXT("undefined"), JSON_SYNTAX, 0}, {TEXT("[undefined]"), JSON_SYNTAX, 1},
	};
	ASSERT_REFUSES_ALL(refusals);
}

static void empty_payloads_are_told_apart(void **state)
{
	static const struct refusal refusals[] = {
	    {TEXT(""), JSON_EMPTY, 0},          {TEXT(" "), JSON_EMPTY, 1},    {TEXT("\t\r\n  "), JSON_EMPTY, 5},
	    {TEXT("\0"), JSON_SYNTAX, 0},       {TEXT(" \0"), JSON_SYNTAX, 1}, {TEXT("\v"), JSON_SYNTAX, 0},
	    {TEXT("\xC2\xA0"), JSON_SYNTAX, 0}, /* a no-break space */
	};
	ASSERT_REFUSES_ALL(refusals);
}

static void white_space_is_allowed_between_tokens(void **state)
{
	assert_accepts_literal(" \t\r\n1 \t\r\n", BCON_NEW(KEY, BCON_INT32(1)));
	assert_accepts_literal(" [ ] ", BCON_NEW(KEY, "[", "]"));
	assert_accepts_literal("\n{\n}\n", BCON_NEW(KEY, "{", "}"));
	assert_accepts_literal(" [ 1 , 2 ] ", BCON_NEW(KEY, "[", BCON_INT32(1), BCON_INT32(2), "]"));
	assert_accepts_literal("\r\n{\t\"a\"\n: 1 , \"b\" :\r2 }",
	                       BCON_NEW(KEY, "{", "a", BCON_INT32(1), "b", BCON_INT32(2), "}"));
}

static void arrays_get_decimal_indexes(void **state)
{
	assert_accepts_literal("[]", BCON_NEW(KEY, "[", "]"));
	assert_accepts_literal("[[]]", BCON_NEW(KEY, "[", "[", "]", "]"));
	assert_accepts_literal("[null,\"x\",{},1.5]",
	                       BCON_NEW(KEY, "[", BCON_NULL, BCON_UTF8("x"), "{", "}", BCON_DOUBLE(1.5), "]"));

	enum { COUNT = 12345 };
	struct buffer text = {0};
	bson_t expected = BSON_INITIALIZER;
	bson_t array;
	assert_true(bson_append_array_begin(&expected, KEY, -1, &array));
	for (int i = 0; i < COUNT; i++) {
		char index[16];
		snprintf(index, sizeof index, "%d", i);
		bson_append_bool(&array, index, -1, true);
		buffer_append(&text, i == 0 ? "[true" : ",true", 5);
	}
	bson_append_array_end(&expected, &array);
	buffer_append_byte(&text, ']');
	assert_accepts((struct text){(const char *)text.data, text.length}, &expected);
	bson_destroy(&expected);
	buffer_finish(&text);
}

static void objects_keep_keys_and_order(void **state)
{
	assert_accepts_literal("{}", BCON_NEW(KEY, "{", "}"));
	assert_accepts_literal("{\"b\":1,\"a\":2}", BCON_NEW(KEY, "{", "b", BCON_INT32(1), "a", BCON_INT32(2), "}"));
	assert_accepts_literal("{\"a\":1,\"a\":2}", BCON_NEW(KEY, "{", "a", BCON_INT32(1), "a", BCON_INT32(2), "}"));
	assert_accepts_literal("{\"\":1}", BCON_NEW(KEY, "{", "", BCON_INT32(1), "}"));
	assert_accepts_literal("{\"$set\":{\"a.b\":1}}",
	                       BCON_NEW(KEY, "{", "$set", "{", "a.b", BCON_INT32(1), "}", "}"));
	assert_accepts_literal("{\"$\":1,\".\":2}", BCON_NEW(KEY, "{", "$", BCON_INT32(1), ".", BCON_INT32(2), "}"));
	assert_accepts_literal("{\"$date\":{\"$numberLong\":\"0\"}}",
	                       BCON_NEW(KEY, "{", "$date", "{", "$numberLong", BCON_UTF8("0"), "}", "}"));
	assert_accepts_literal("{\"\\u00e9\\\"\xE2\x82\xAC\":[{\"a\":[]}]}",
	                       BCON_NEW(KEY, "{", "\xC3\xA9\"\xE2\x82\xAC", "[", "{", "a", "[", "]", "}", "]", "}"));
}

static void a_message_of_every_type(void **state)
{
	assert_accepts_literal("{\"device\":\"device-007\",\"seq\":12345,\"time\":\"2026-11-22T20:18:24.123Z\","
	                       "\"temperature\":21.53,\"big\":3000000000,\"ok\":true,\"none\":null,\"list\":[1,[2]]}",
	                       BCON_NEW(KEY, "{", "device", BCON_UTF8("device-007"), "seq", BCON_INT32(12345), "time",
	                                BCON_UTF8("2026-11-22T20:18:24.123Z"), "temperature", BCON_DOUBLE(21.53), "big",
	                                BCON_INT64(INT64_C(3000000000)), "ok", BCON_BOOL(true), "none", BCON_NULL,
	                                "list", "[", BCON_INT32(1), "[", BCON_INT32(2), "]", "]", "}"));
}

static void broken_structure_is_refused(void **state)
{
	static const struct refusal refusals[] = {
	    {TEXT("["), JSON_SYNTAX, 1},
	    {TEXT("]"), JSON_SYNTAX, 0},
	    {TEXT("[1"), JSON_SYNTAX, 2},
	    {TEXT("[1,"), JSON_SYNTAX, 3},
	    {TEXT("[1,]"), JSON_SYNTAX, 3},
	    {TEXT("[,]"), JSON_SYNTAX, 1},
	    {TEXT("[,1]"), JSON_SYNTAX, 1},
	    {TEXT("[1,,2]"), JSON_SYNTAX, 3},
	    {TEXT("[1 2]"), JSON_SYNTAX, 3},
	    {TEXT("[1:2]"), JSON_SYNTAX, 2},
	    {TEXT("[1}"), JSON_SYNTAX, 2},
	    {TEXT("[\"a\" \"b\"]"), JSON_SYNTAX, 5},
	    {TEXT("[1;2]"), JSON_SYNTAX, 2},
	    {TEXT("{"), JSON_SYNTAX, 1},
	    {TEXT("}"), JSON_SYNTAX, 0},
	    {TEXT("{]"), JSON_SYNTAX, 1},
	    {TEXT("{\"a\""), JSON_SYNTAX, 4},
	    {TEXT("{\"a\":"), JSON_SYNTAX, 5},
	    {TEXT("{\"a\":1"), JSON_SYNTAX, 6},
	    {TEXT("{\"a\":1,"), JSON_SYNTAX, 7},
	    {TEXT("{\"a\":1,}"), JSON_SYNTAX, 7},
	    {TEXT("{,}"), JSON_SYNTAX, 1},
	    {TEXT("{\"a\"}"), JSON_SYNTAX, 4},
	    {TEXT("{\"a\" 1}"), JSON_SYNTAX, 5},
	    {TEXT("{\"a\",1}"), JSON_SYNTAX, 4},
	    {TEXT("{\"a\":}"), JSON_SYNTAX, 5},
	    {TEXT("{\"a\"::1}"), JSON_SYNTAX, 5},
	    {TEXT("{\"a\":1 \"b\":2}"), JSON_SYNTAX, 7},
	    {TEXT("{\"a\":1,,\"b\":2}"), JSON_SYNTAX, 7},
	    {TEXT("{\"a\":1]"), JSON_SYNTAX, 6},
	    {TEXT("{a:1}"), JSON_SYNTAX, 1},
	    {TEXT("{1:1}"), JSON_SYNTAX, 1},
	    {TEXT("{null:1}"), JSON_SYNTAX, 1},
	    {TEXT("{'a':1}"), JSON_SYNTAX, 1},
	    {TEXT("'a'"), JSON_SYNTAX, 0},
	    {TEXT("['a']"), JSON_SYNTAX, 1},
	    {TEXT("abc"), JSON_SYNTAX, 0},
	    {TEXT("="), JSON_SYNTAX, 0},
	    {TEXT("// a\n1"), JSON_SYNTAX, 0},
	    {TEXT("/* a */1"), JSON_SYNTAX, 0},
	    {TEXT("1/* a */"), JSON_SYNTAX, 1},
	    {TEXT("[1,/**/2]"), JSON_SYNTAX, 3},
	    {TEXT("# a"), JSON_SYNTAX, 0},
	};
	ASSERT_REFUSES_ALL(refusals);
}

static void bytes_behind_the_value_are_refused(void **state)
{
	static const struct refusal refusals[] = {
	    {TEXT("1 2"), JSON_SYNTAX, 2},       {TEXT("{}{}"), JSON_SYNTAX, 2},   {TEXT("[]]"), JSON_SYNTAX, 2},
	    {TEXT("{},"), JSON_SYNTAX, 2},       {TEXT("\"a\"b"), JSON_SYNTAX, 3}, {TEXT("\"a\"\"b\""), JSON_SYNTAX, 3},
	    {TEXT("null,"), JSON_SYNTAX, 4},     {TEXT("1x"), JSON_SYNTAX, 1},     {TEXT("1\n{}"), JSON_SYNTAX, 2},
	    {TEXT("{}\0"), JSON_SYNTAX, 2},      {TEXT("{} \0"), JSON_SYNTAX, 3},  {TEXT("1\0"), JSON_SYNTAX, 1},
	    {TEXT("1\0x"), JSON_SYNTAX, 1},      {TEXT("1\f"), JSON_SYNTAX, 1},    {TEXT("1\xFF"), JSON_UTF8, 1},
	    {TEXT("1\xC3\xA9"), JSON_SYNTAX, 1},
	};
	ASSERT_REFUSES_ALL(refusals);
}

static void bytes_outside_strings_are_told_apart(void **state)
{
	static const struct refusal refusals[] = {
	    {TEXT("\xEF\xBB\xBF{}"), JSON_SYNTAX, 0}, /* byte order mark */
	    {TEXT("\xEF\xBB\xBF"), JSON_SYNTAX, 0},
	    {TEXT("[\xEF\xBB\xBF]"), JSON_SYNTAX, 1},
	    {TEXT("\xFE\xFF\0{\0}"), JSON_UTF8, 0}, /* UTF-16 */
	    {TEXT("\xFF\xFE{\0}\0"), JSON_UTF8, 0},
	    {TEXT("{\0}\0"), JSON_SYNTAX, 1},
	    {TEXT("\0{\0}"), JSON_SYNTAX, 0},
	    {TEXT("[\xC3\xA9]"), JSON_SYNTAX, 1},
	    {TEXT("[\xC3]"), JSON_UTF8, 1},
	    {TEXT("[\x80]"), JSON_UTF8, 1},
	    {TEXT("{\xE2\x80\x9Ckey\xE2\x80\x9D:1}"), JSON_SYNTAX, 1}, /* typographic quotes */
	    {TEXT("{\"a\"\xC0\x80:1}"), JSON_UTF8, 4},
	    {TEXT("t\xFFue"), JSON_UTF8, 1},
	    {TEXT("1.\xFF"), JSON_UTF8, 2},
	    {TEXT("[1\0]"), JSON_SYNTAX, 2},
	    {TEXT("[\0]"), JSON_SYNTAX, 1},
	    {TEXT("{\"a\"\0:1}"), JSON_SYNTAX, 4},
	    {TEXT("[1\x7F]"), JSON_SYNTAX, 2},
	};
	ASSERT_REFUSES_ALL(refusals);
}

/* ---- numbers */

static void integers_become_the_smallest_type(void **state)
{
	assert_accepts_literal("0", BCON_NEW(KEY, BCON_INT32(0)));
	assert_accepts_literal("-0", BCON_NEW(KEY, BCON_INT32(0)));
	assert_accepts_literal("7", BCON_NEW(KEY, BCON_INT32(7)));
	assert_accepts_literal("-1", BCON_NEW(KEY, BCON_INT32(-1)));
	assert_accepts_literal("1000000000", BCON_NEW(KEY, BCON_INT32(1000000000)));

	assert_accepts_literal("2147483647", BCON_NEW(KEY, BCON_INT32(INT32_MAX)));
	assert_accepts_literal("2147483648", BCON_NEW(KEY, BCON_INT64(INT64_C(2147483648))));
	assert_accepts_literal("2147483649", BCON_NEW(KEY, BCON_INT64(INT64_C(2147483649))));
	assert_accepts_literal("-2147483647", BCON_NEW(KEY, BCON_INT32(-INT32_MAX)));
	assert_accepts_literal("-2147483648", BCON_NEW(KEY, BCON_INT32(INT32_MIN)));
	assert_accepts_literal("-2147483649", BCON_NEW(KEY, BCON_INT64(INT64_C(-2147483649))));
	assert_accepts_literal("4294967295", BCON_NEW(KEY, BCON_INT64(INT64_C(4294967295))));
	assert_accepts_literal("4294967296", BCON_NEW(KEY, BCON_INT64(INT64_C(4294967296))));

	assert_accepts_literal("9007199254740991", BCON_NEW(KEY, BCON_INT64(INT64_C(9007199254740991))));
	assert_accepts_literal("9007199254740992", BCON_NEW(KEY, BCON_INT64(INT64_C(9007199254740992))));
	assert_accepts_literal("9007199254740993", BCON_NEW(KEY, BCON_INT64(INT64_C(9007199254740993))));
	assert_accepts_literal("-9007199254740993", BCON_NEW(KEY, BCON_INT64(INT64_C(-9007199254740993))));

	assert_accepts_literal("1000000000000000000", BCON_NEW(KEY, BCON_INT64(INT64_C(1000000000000000000))));
	assert_accepts_literal("9223372036854775806", BCON_NEW(KEY, BCON_INT64(INT64_MAX - 1)));
	assert_accepts_literal("9223372036854775807", BCON_NEW(KEY, BCON_INT64(INT64_MAX)));
	assert_accepts_literal("-9223372036854775807", BCON_NEW(KEY, BCON_INT64(-INT64_MAX)));
	assert_accepts_literal("-9223372036854775808", BCON_NEW(KEY, BCON_INT64(INT64_MIN)));
}

static void assert_decimal(const char *text)
{
	bson_t *expected = bson_new();
	bson_decimal128_t decimal;
	char shown[BSON_DECIMAL128_STRING];
	assert_true(bson_decimal128_from_string(text, &decimal));
	bson_decimal128_to_string(&decimal, shown);
	assert_string_equal(shown, text);
	assert_true(bson_append_decimal128(expected, KEY, -1, &decimal));
	assert_accepts_literal(text, expected);
}

static void large_integers_become_decimals(void **state)
{
	assert_decimal("9223372036854775808");
	assert_decimal("-9223372036854775809");
	assert_decimal("9999999999999999999");
	assert_decimal("10000000000000000000");
	assert_decimal("18446744073709551615");
	assert_decimal("18446744073709551616");
	assert_decimal("-18446744073709551616");
	assert_decimal("36893488147419103232");
	assert_decimal("340282366920938463463374607431768");
	assert_decimal("1000000000000000000000000000000000");
	assert_decimal("9999999999999999999999999999999999");
	assert_decimal("-9999999999999999999999999999999999");
	assert_decimal("1234567890123456789012345678901234");
}

static void integers_beyond_34_digits_are_refused(void **state)
{
	static const struct refusal refusals[] = {
	    {TEXT("10000000000000000000000000000000000"), JSON_NUMBER_RANGE, 0},
	    {TEXT("-10000000000000000000000000000000000"), JSON_NUMBER_RANGE, 0},
	    {TEXT("99999999999999999999999999999999999"), JSON_NUMBER_RANGE, 0},
	    {TEXT(" -12345678901234567890123456789012345"), JSON_NUMBER_RANGE, 1},
	    {TEXT("[1,34028236692093846346337460743176821145600]"), JSON_NUMBER_RANGE, 3},
	    {TEXT("{\"a\":99999999999999999999999999999999999}"), JSON_NUMBER_RANGE, 5},
	};
	ASSERT_REFUSES_ALL(refusals);
}

static void assert_double(const char *text, double expected)
{
	assert_accepts_literal(text, BCON_NEW(KEY, BCON_DOUBLE(expected)));
}

static void points_and_exponents_make_doubles(void **state)
{
	assert_double("0.0", 0.0);
	assert_double("-0.0", -0.0);
	assert_double("-0e0", -0.0);
	assert_double("0e999999999999999999999", 0.0);
	assert_double("-0.000e-999999999999999999999", -0.0);
	assert_double("1.0", 1.0);
	assert_double("1e0", 1.0);
	assert_double("1E+2", 100.0);
	assert_double("1e-2", 0.01);
	assert_double("1e02", 100.0);
	assert_double("0.5", 0.5);
	assert_double("-21.53", -21.53);
	assert_double("0.1", 0.1);
	assert_double("123.456e-7", 123.456e-7);
	assert_double("0.000001", 0.000001);
	assert_double("9007199254740991.0", 9007199254740991.0);
	assert_double("9007199254740992.0", 9007199254740992.0);
	assert_double("9007199254740993.0", 9007199254740992.0);
	assert_double("9007199254740993e0", 9007199254740992.0);
	assert_double("9007199254740993.00000000000000000001", 9007199254740994.0);
	assert_double("1e22", 1e22);
	assert_double("1e23", 1e23);
	assert_double("1e-22", 1e-22);
	assert_double("1e-23", 1e-23);
	assert_double("9007199254740992e22", 9007199254740992e22);
	assert_double("18446744073709551616.0", 18446744073709551616.0);
	assert_double("18446744073709551616e-1", 18446744073709551616e-1);
	assert_double("100000000000000000000000000000000000000000.5", 1e41);
}

static void doubles_at_their_limits(void **state)
{
	assert_double("1.7976931348623157e308", 1.7976931348623157e308);
	assert_double("-1.7976931348623157e308", -1.7976931348623157e308);
	assert_double("1.7976931348623158e308", 1.7976931348623157e308);
	assert_double("2.2250738585072014e-308", 2.2250738585072014e-308);
	assert_double("2.2250738585072011e-308", 2.2250738585072011e-308);
	assert_double("5e-324", 5e-324);
	assert_double("-5e-324", -5e-324);
	assert_double("2.4703282292062327e-324", 0.0);
	assert_double("2.4703282292062328e-324", 5e-324);
	assert_double("1e-400", 0.0);
	assert_double("-1e-400", -0.0);
	assert_double("1e-99999999999999999999999", 0.0);

	static const struct refusal refusals[] = {
	    {TEXT("1e400"), JSON_NUMBER_RANGE, 0},
	    {TEXT("-1e400"), JSON_NUMBER_RANGE, 0},
	    {TEXT("1e309"), JSON_NUMBER_RANGE, 0},
	    {TEXT("1.7976931348623159e308"), JSON_NUMBER_RANGE, 0},
	    {TEXT("[0.1e99999999999999999999999]"), JSON_NUMBER_RANGE, 1},
	    {TEXT("{\"a\" : -1.5E+999 }"), JSON_NUMBER_RANGE, 7},
	};
	ASSERT_REFUSES_ALL(refusals);
}

/* The text is "0.", so many zeros and the tail. */
static struct buffer fraction_text(size_t zeros, const char *tail)
{
	struct buffer text = {0};
	buffer_append(&text, "0.", 2);
	memset(buffer_extend(&text, zeros), '0', zeros);
	buffer_append(&text, tail, strlen(tail) + 1);
	return text;
}

static void assert_million_zeros(const char *tail, double expected)
{
	struct buffer text = fraction_text(1000000, tail);
	assert_double((const char *)text.data, expected);
	buffer_finish(&text);
}

/* A count of digits or an exponent that were cut off somewhere would show. */
static void long_fractions_and_exponents_balance(void **state)
{
	assert_million_zeros("1", 0.0);
	assert_million_zeros("125e1000003", 125.0);
	assert_million_zeros("125e1000099", 1.25e98);
	assert_million_zeros("125e-1000099", 0.0);
	for (size_t zeros = 100; zeros <= 10000000; zeros *= 10) {
		char tail[32];
		snprintf(tail, sizeof tail, "1e%zu0", zeros);
		struct buffer text = fraction_text(zeros, tail);
		assert_refuses((struct text){(const char *)text.data, text.length - 1}, JSON_NUMBER_RANGE, 0);
		buffer_finish(&text);
	}
}

static void broken_numbers_are_refused(void **state)
{
	static const struct refusal refusals[] = {
	    {TEXT("-"), JSON_SYNTAX, 1},     {TEXT("+1"), JSON_SYNTAX, 0},
	    {TEXT("--1"), JSON_SYNTAX, 1},   {TEXT("-+1"), JSON_SYNTAX, 1},
	    {TEXT("- 1"), JSON_SYNTAX, 1},   {TEXT("-a"), JSON_SYNTAX, 1},
	    {TEXT("00"), JSON_SYNTAX, 1},    {TEXT("01"), JSON_SYNTAX, 1},
	    {TEXT("-01"), JSON_SYNTAX, 2},   {TEXT("-00.5"), JSON_SYNTAX, 2},
	    {TEXT("[012]"), JSON_SYNTAX, 2}, {TEXT(".5"), JSON_SYNTAX, 0},
	    {TEXT("-.5"), JSON_SYNTAX, 1},   {TEXT("1."), JSON_SYNTAX, 2},
	    {TEXT("[1.]"), JSON_SYNTAX, 3},  {TEXT("1.e5"), JSON_SYNTAX, 2},
	    {TEXT("1.-5"), JSON_SYNTAX, 2},  {TEXT("1.2.3"), JSON_SYNTAX, 3},
	    {TEXT("1e"), JSON_SYNTAX, 2},    {TEXT("1e+"), JSON_SYNTAX, 3},
	    {TEXT("1E-"), JSON_SYNTAX, 3},   {TEXT("[1e]"), JSON_SYNTAX, 3},
	    {TEXT("1e+-1"), JSON_SYNTAX, 3}, {TEXT("1ee1"), JSON_SYNTAX, 2},
	    {TEXT("1e1.5"), JSON_SYNTAX, 3}, {TEXT("1e1e1"), JSON_SYNTAX, 3},
	    {TEXT("0x10"), JSON_SYNTAX, 1},  {TEXT("0b1"), JSON_SYNTAX, 1},
	    {TEXT("1_000"), JSON_SYNTAX, 1}, {TEXT("1,5"), JSON_SYNTAX, 1},
	    {TEXT("1.5f"), JSON_SYNTAX, 3},  {TEXT("1 000"), JSON_SYNTAX, 2},
	    {TEXT("0.5p1"), JSON_SYNTAX, 3}, {TEXT("1\xEF\xBC\x91"), JSON_SYNTAX, 1}, /* a full-width digit */
	};
	ASSERT_REFUSES_ALL(refusals);
}

/* Up to 25 digits, with a point, an exponent or both. */
static void random_double_text(char *text)
{
	static const uint64_t lengths[] = {3, 17, 20, 25};
	uint64_t whole = random_below(lengths[random_below(4)]) + 1;
	uint64_t fraction = random_below(lengths[random_below(4)]) + 1;
	bool exponent = random_below(2) != 0;
	bool point = !exponent || random_below(2) != 0;
	if (random_below(2) != 0)
		*text++ = '-';
	*text++ = (char)('0' + (whole == 1 ? random_below(10) : 1 + random_below(9)));
	while (--whole != 0)
		*text++ = (char)('0' + random_below(10));
	if (point) {
		*text++ = '.';
		while (fraction-- != 0)
			*text++ = (char)('0' + random_below(random_below(4) != 0 ? 10 : 1));
	}
	*text = '\0';
	if (exponent) {
		int range = random_below(2) != 0 ? 25 : 345;
		sprintf(text, "%c%s%d", random_below(2) != 0 ? 'e' : 'E', random_below(2) != 0 ? "-" : "",
		        (int)random_below((uint64_t)range));
	}
}

static void doubles_are_those_of_strtod(void **state)
{
	random_state = 20261122;
	int overflows = 0;
	struct buffer out = {0};
	for (int i = 0; i < 100000; i++) {
		char text[128];
		struct json_fault fault;
		random_double_text(text);
		double expected = strtod(text, NULL);
		out.length = 0;
		enum json_code code = json_to_bson(text, strlen(text), "", NO_LIMIT, &out, &fault);
		if (isinf(expected)) {
			overflows++;
			assert_int_equal(code, JSON_NUMBER_RANGE);
			continue;
		}
		uint64_t bits;
		uint64_t written = 0;
		memcpy(&bits, &expected, sizeof bits);
		for (int byte = 7; code == JSON_OK && byte >= 0; byte--)
			written = written << 8 | out.data[2 + byte];
		if (code != JSON_OK || out.length != 10 || out.data[0] != BSON_TYPE_DOUBLE || written != bits)
			fail_msg("%s: %016" PRIx64 ", not %016" PRIx64, text, written, bits);
	}
	assert_in_range(overflows, 100, 20000);
	buffer_finish(&out);
}

/* ---- strings */

static void strings_are_kept_as_they_are(void **state)
{
	static const struct {
		struct text text, expected;
	} cases[] = {
	    {TEXT("\"\""), TEXT("")},
	    {TEXT("\"a\""), TEXT("a")},
	    {TEXT("\"seven77\""), TEXT("seven77")},
	    {TEXT("\"eight888\""), TEXT("eight888")},
	    {TEXT("\"nine99999\""), TEXT("nine99999")},
	    {TEXT("\"/ ' \x7F //\""), TEXT("/ ' \x7F //")},
	    {TEXT("\"\\\"\\\\\\/\\b\\f\\n\\r\\t\""), TEXT("\"\\/\b\f\n\r\t")},
	    {TEXT("\"\\\\u0041\""), TEXT("\\u0041")},
	    {TEXT("\"\\u0041\\u00e9\\u00E9\\u20aC\\uFFFF\""), TEXT("A\xC3\xA9\xC3\xA9\xE2\x82\xAC\xEF\xBF\xBF")},
	    {TEXT("\"\\u0000\""), TEXT("\0")},
	    {TEXT("\"a\\u0000b\\u0000\""), TEXT("a\0b\0")},
	    {TEXT("\"\\u001f\\u007F\\u0080\\u07FF\\u0800\""), TEXT("\x1F\x7F\xC2\x80\xDF\xBF\xE0\xA0\x80")},
	    {TEXT("\"\\uD7FF\\uE000\\uFEFF\""), TEXT("\xED\x9F\xBF\xEE\x80\x80\xEF\xBB\xBF")},
	    {TEXT("\"\\uD800\\uDC00\""), TEXT("\xF0\x90\x80\x80")},
	    {TEXT("\"\\uDBFF\\udfff\""), TEXT("\xF4\x8F\xBF\xBF")},
	    {TEXT("\"x\\ud83d\\ude00x\""), TEXT("x\xF0\x9F\x98\x80x")},
	    {TEXT("\"\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\""), TEXT("\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80")},
	    {TEXT("\"\xEF\xBB\xBFx\""), TEXT("\xEF\xBB\xBFx")},
	    {TEXT("\"\xEF\xBF\xBE\xF0\x9F\xBF\xBF\""), TEXT("\xEF\xBF\xBE\xF0\x9F\xBF\xBF")}, /* noncharacters */
	    {TEXT("\"[1,{}\\\"]//\""), TEXT("[1,{}\"]//")},
	};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
		assert_string(cases[i].text, cases[i].expected);
}

static void broken_strings_are_refused(void **state)
{
	static const struct refusal refusals[] = {
	    {TEXT("\""), JSON_SYNTAX, 1},
	    {TEXT("\"abc"), JSON_SYNTAX, 4},
	    {TEXT("\"eight888"), JSON_SYNTAX, 9},
	    {TEXT("\"\\\""), JSON_SYNTAX, 3},
	    {TEXT("\"\\"), JSON_SYNTAX, 2},
	    {TEXT("\"\\\\"), JSON_SYNTAX, 3},
	    {TEXT("\"a\nb\""), JSON_SYNTAX, 2},
	    {TEXT("\"a\tb\""), JSON_SYNTAX, 2},
	    {TEXT("\"a\0b\""), JSON_SYNTAX, 2},
	    {TEXT("\"\\\0\""), JSON_SYNTAX, 2},
	    {TEXT("\"\\u\0\""), JSON_SYNTAX, 3},
	    {TEXT("\"\\u"), JSON_SYNTAX, 3},
	    {TEXT("\"\\u12"), JSON_SYNTAX, 5},
	    {TEXT("\"\\u\""), JSON_SYNTAX, 3},
	    {TEXT("\"\\u12\""), JSON_SYNTAX, 5},
	    {TEXT("\"\\u123\""), JSON_SYNTAX, 6},
	    {TEXT("\"\\u123g\""), JSON_SYNTAX, 6},
	    {TEXT("\"\\u 123\""), JSON_SYNTAX, 3},
	    {TEXT("\"\\u-123\""), JSON_SYNTAX, 3},
	    {TEXT("\"\\u+123\""), JSON_SYNTAX, 3},
	    {TEXT("\"\\u0x41\""), JSON_SYNTAX, 4},
	    {TEXT("\"\\u{41}\""), JSON_SYNTAX, 3},
	    {TEXT("\"\\U0041\""), JSON_SYNTAX, 2},
	    {TEXT("\"\\x41\""), JSON_SYNTAX, 2},
	    {TEXT("\"\\u00@0\""), JSON_SYNTAX, 5},
	    {TEXT("\"\\u00`0\""), JSON_SYNTAX, 5},
	    {TEXT("\"\\u00\0200\""), JSON_SYNTAX, 5}, /* '0' but for bit 5 */
	    {TEXT("\"\\\xC3\xA9\""), JSON_SYNTAX, 2},
	    {TEXT("\"\\\xFF\""), JSON_UTF8, 2},
	    {TEXT("\"\\u00\xFF\""), JSON_UTF8, 5},
	    {TEXT("{\"a\n\":1}"), JSON_SYNTAX, 3},
	    {TEXT("{\"a\\q\":1}"), JSON_SYNTAX, 4},
	    {TEXT("{\"a"), JSON_SYNTAX, 3},
	};
	ASSERT_REFUSES_ALL(refusals);
}

static void lone_surrogates_are_refused(void **state)
{
	static const struct refusal refusals[] = {
	    {TEXT("\"\\uD800\""), JSON_SYNTAX, 7},
	    {TEXT("\"\\uDBFFx\""), JSON_SYNTAX, 7},
	    {TEXT("\"\\uD800"), JSON_SYNTAX, 7},
	    {TEXT("\"\\uD800\\"), JSON_SYNTAX, 8},
	    {TEXT("\"\\uD800\\u"), JSON_SYNTAX, 9},
	    {TEXT("\"\\uD800\\uDC0"), JSON_SYNTAX, 12},
	    {TEXT("\"\\uD800\\n\""), JSON_SYNTAX, 8},
	    {TEXT("\"\\uD800\\\\\""), JSON_SYNTAX, 8},
	    {TEXT("\"\\uD800\\u0041\""), JSON_SYNTAX, 9},
	    {TEXT("\"\\uD800\\uE000\""), JSON_SYNTAX, 9},
	    {TEXT("\"\\uD800\\uDBFF\""), JSON_SYNTAX, 10},
	    {TEXT("\"\\uD800\\uD7FF\""), JSON_SYNTAX, 10},
	    {TEXT("\"\\uD800\\uDCG0\""), JSON_SYNTAX, 11},
	    {TEXT("\"\\uDC00\""), JSON_SYNTAX, 4},
	    {TEXT("\"\\uDFFF\""), JSON_SYNTAX, 4},
	    {TEXT("\"\\udc00\\ud800\""), JSON_SYNTAX, 4},
	    {TEXT("\"\\uD800\xED\xB0\x80\""), JSON_UTF8, 7}, /* half escaped, half raw */
	    {TEXT("\"\\uD800\xC3\xA9\""), JSON_SYNTAX, 7},
	    {TEXT("{\"\\uD800\":1}"), JSON_SYNTAX, 8},
	    {TEXT("{\"\\uDC00\":1}"), JSON_SYNTAX, 5},
	    {TEXT("\"\\uD83D\\uDE00\\uDE00\""), JSON_SYNTAX, 16},
	};
	ASSERT_REFUSES_ALL(refusals);
}

static void invalid_utf8_is_refused(void **state)
{
	static const struct refusal refusals[] = {
	    {TEXT("\"\x80\""), JSON_UTF8, 1}, /* continuation bytes alone */
	    {TEXT("\"\xBF\""), JSON_UTF8, 1},
	    {TEXT("\"a\xC3\xA9\xA9\""), JSON_UTF8, 4},
	    {TEXT("\"\xC0\x80\""), JSON_UTF8, 1}, /* overlong */
	    {TEXT("\"\xC0\xAF\""), JSON_UTF8, 1},
	    {TEXT("\"\xC1\xBF\""), JSON_UTF8, 1},
	    {TEXT("\"\xE0\x80\x80\""), JSON_UTF8, 2},
	    {TEXT("\"\xE0\x9F\xBF\""), JSON_UTF8, 2},
	    {TEXT("\"\xF0\x80\x80\x80\""), JSON_UTF8, 2},
	    {TEXT("\"\xF0\x8F\xBF\xBF\""), JSON_UTF8, 2},
	    {TEXT("\"\xED\xA0\x80\""), JSON_UTF8, 2}, /* surrogates */
	    {TEXT("\"\xED\xBF\xBF\""), JSON_UTF8, 2},
	    {TEXT("\"\xED\xA0\xBD\xED\xB8\x80\""), JSON_UTF8, 2},
	    {TEXT("\"\xF4\x90\x80\x80\""), JSON_UTF8, 2}, /* above U+10FFFF */
	    {TEXT("\"\xF5\x80\x80\x80\""), JSON_UTF8, 1},
	    {TEXT("\"\xF8\x88\x80\x80\x80\""), JSON_UTF8, 1},
	    {TEXT("\"\xFC\x84\x80\x80\x80\x80\""), JSON_UTF8, 1},
	    {TEXT("\"\xFE\""), JSON_UTF8, 1},
	    {TEXT("\"\xFF\""), JSON_UTF8, 1},
	    {TEXT("\"\xC3\""), JSON_UTF8, 2}, /* cut short by the quote */
	    {TEXT("\"\xE2\x82\""), JSON_UTF8, 3},
	    {TEXT("\"\xF0\x9F\x98\""), JSON_UTF8, 4},
	    {TEXT("\"\xC3z\""), JSON_UTF8, 2},            /* by a letter */
	    {TEXT("\"\xE2\x82\xC3\xA9\""), JSON_UTF8, 3}, /* by the next sequence */
	    {TEXT("\"\xE2\\u0041\""), JSON_UTF8, 2},      /* by an escape */
	    {TEXT("\"\xE2\x82\0\""), JSON_UTF8, 3},       /* by a NUL */
	    {TEXT("\"\xC3"), JSON_UTF8, 2},               /* by the end */
	    {TEXT("\"\xE2\x82"), JSON_UTF8, 3},
	    {TEXT("\"\xF0\x9F\x98"), JSON_UTF8, 4},
	    {TEXT("\"caf\xE9\""), JSON_UTF8, 5}, /* Latin-1 */
	    {TEXT("{\"caf\xE9\":1}"), JSON_UTF8, 6},
	    {TEXT("{\"\xC0\x80\":1}"), JSON_UTF8, 2},
	};
	ASSERT_REFUSES_ALL(refusals);
}

static void keys_with_nul_are_refused(void **state)
{
	static const struct refusal refusals[] = {
	    {TEXT("{\"\\u0000\":1}"), JSON_KEY_NUL, 1},
	    {TEXT("{\"a\\u0000b\":1}"), JSON_KEY_NUL, 1},
	    {TEXT("{\"a\":1, \"b\\u0000\":1}"), JSON_KEY_NUL, 8},
	    {TEXT("[{\"a\":{\"\\u0000\":1}}]"), JSON_KEY_NUL, 7},
	    {TEXT("{\"a\0b\":1}"), JSON_SYNTAX, 3},
	};
	ASSERT_REFUSES_ALL(refusals);
}

/* Every byte in a string, and behind a backslash, at each place of the eight that are looked at together. */
static void every_byte_at_every_place(void **state)
{
	for (size_t place = 1; place <= 20; place++) {
		for (int byte = 0; byte < 0x100; byte++) {
			char text[32];
			memset(text, 'x', sizeof text);
			text[0] = text[25] = '"';
			text[place] = (char)byte;
			struct text whole = {text, 26};
			if (byte >= 0xC2 && byte <= 0xF4)
				assert_refuses(whole, JSON_UTF8, place + 1);
			else if (byte >= 0x80)
				assert_refuses(whole, JSON_UTF8, place);
			else if (byte < 0x20)
				assert_refuses(whole, JSON_SYNTAX, place);
			else if (byte == '"' || byte == '\\')
				assert_refuses(whole, JSON_SYNTAX, place + 1);
			else
				assert_string(whole, (struct text){text + 1, 24});
		}
	}
}

static void every_letter_behind_a_backslash(void **state)
{
	for (int letter = 0; letter < 0x80; letter++) {
		char text[] = {'"', '\\', (char)letter, '"'};
		if (strchr("\"\\/bfnrtu", letter) == NULL || letter == 0)
			assert_refuses((struct text){text, sizeof text}, JSON_SYNTAX, 2);
	}
}

static size_t encode(uint32_t code, char *bytes)
{
	if (code < 0x80) {
		bytes[0] = (char)code;
		return 1;
	}
	if (code < 0x800) {
		bytes[0] = (char)(0xC0 | code >> 6);
		bytes[1] = (char)(0x80 | (code & 0x3F));
		return 2;
	}
	if (code < 0x10000) {
		bytes[0] = (char)(0xE0 | code >> 12);
		bytes[1] = (char)(0x80 | (code >> 6 & 0x3F));
		bytes[2] = (char)(0x80 | (code & 0x3F));
		return 3;
	}
	bytes[0] = (char)(0xF0 | code >> 18);
	bytes[1] = (char)(0x80 | (code >> 12 & 0x3F));
	bytes[2] = (char)(0x80 | (code >> 6 & 0x3F));
	bytes[3] = (char)(0x80 | (code & 0x3F));
	return 4;
}

/* A string of the character as it is and as an escape; returns its length. */
static int write_twice(uint32_t code, const char *raw, size_t size, char *text)
{
	if (code < 0x10000)
		return sprintf(text, "\"%.*s\\u%04x\"", (int)size, raw, code);
	return sprintf(text, "\"%.*s\\u%04X\\u%04X\"", (int)size, raw, 0xD800 + ((code - 0x10000) >> 10),
	               0xDC00 + (code & 0x3FF));
}

static void every_character_raw_and_escaped(void **state)
{
	struct buffer out = {0};
	for (uint32_t code = 0x20; code <= 0x10FFFF; code += code < 0x11000 ? 1 : 7) {
		char raw[4];
		char text[32];
		struct json_fault fault;
		if (code == '"' || code == '\\')
			continue;
		size_t size = encode(code, raw);
		size_t length = (size_t)write_twice(code, raw, size, text);
		bool allowed = code < 0xD800 || code > 0xDFFF;
		out.length = 0;
		enum json_code result = json_to_bson(text, length, "", NO_LIMIT, &out, &fault);
		if ((result == JSON_OK) != allowed)
			fail_msg("U+%04X: %s", code, json_code_name(result));
		if (allowed && (out.length != 7 + 2 * size || memcmp(out.data + 6, raw, size) != 0 ||
		                memcmp(out.data + 6 + size, raw, size) != 0))
			fail_msg("U+%04X: other bytes", code);
	}
	buffer_finish(&out);
}

/* Four bytes from the edges of each range; libbson's own check takes C0 80 for NUL, else both must agree. */
static void utf8_as_libbson_sees_it(void **state)
{
	static const char edges[] =
	    " a~\x7F\x80\x8F\x90\x9F\xA0\xBF\xC0\xC1\xC2\xDF\xE0\xE1\xEC\xED\xEE\xEF\xF0\xF1\xF3\xF4\xF5\xFF";
	enum { EDGES = sizeof edges - 1 };
	struct buffer out = {0};
	for (uint32_t choice = 0; choice < EDGES * EDGES * EDGES * EDGES; choice++) {
		char text[] = "\"....\"";
		struct json_fault fault;
		uint32_t rest = choice;
		for (int place = 1; place <= 4; place++, rest /= EDGES)
			text[place] = edges[rest % EDGES];
		out.length = 0;
		bool accepted = json_to_bson(text, 6, "", NO_LIMIT, &out, &fault) == JSON_OK;
		bool valid = strstr(text, "\xC0\x80") == NULL && bson_utf8_validate(text + 1, 4, true);
		if (accepted != valid)
			fail_msg("%s: %s", printable((struct text){text, 6}), accepted ? "accepted" : "refused");
	}
	buffer_finish(&out);
}

/* ---- depth and size */

/* `brackets` is what the levels take turns in: "[", "{" or both. */
static char bracket_at(const char *brackets, int level)
{
	return brackets[(size_t)level % strlen(brackets)];
}

static struct buffer nested_text(const char *brackets, int depth)
{
	struct buffer text = {0};
	for (int level = 0; level < depth; level++) {
		bool array = bracket_at(brackets, level) == '[';
		buffer_append(&text, array ? "[" : "{\"a\":", array ? 1 : 5);
	}
	buffer_append_byte(&text, '1');
	for (int level = depth - 1; level >= 0; level--)
		buffer_append_byte(&text, bracket_at(brackets, level) == '[' ? ']' : '}');
	return text;
}

static void append_nested(bson_t *parent, const char *name, const char *brackets, int level, int depth)
{
	bson_t child;
	if (level == depth) {
		assert_true(bson_append_int32(parent, name, -1, 1));
	} else if (bracket_at(brackets, level) == '[') {
		assert_true(bson_append_array_begin(parent, name, -1, &child));
		append_nested(&child, "0", brackets, level + 1, depth);
		assert_true(bson_append_array_end(parent, &child));
	} else {
		assert_true(bson_append_document_begin(parent, name, -1, &child));
		append_nested(&child, "a", brackets, level + 1, depth);
		assert_true(bson_append_document_end(parent, &child));
	}
}

static void a_hundred_levels_are_taken(void **state)
{
	static const char *const patterns[] = {"[", "{", "[{", "{[", "[[{"};
	for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++) {
		for (int depth = 99; depth <= JSON_MAX_DEPTH; depth++) {
			bson_t expected = BSON_INITIALIZER;
			struct buffer text = nested_text(patterns[i], depth);
			append_nested(&expected, KEY, patterns[i], 0, depth);
			assert_accepts((struct text){(const char *)text.data, text.length}, &expected);
			bson_destroy(&expected);
			buffer_finish(&text);
		}
	}
}

static void the_101st_level_is_refused(void **state)
{
	static const struct {
		const char *brackets;
		size_t offset;
	} cases[] = {{"[", 100}, {"{", 500}, {"[{", 300}, {"{[", 300}};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		for (int depth = JSON_MAX_DEPTH + 1; depth < 100000; depth *= 30) {
			struct buffer text = nested_text(cases[i].brackets, depth);
			assert_refuses((struct text){(const char *)text.data, text.length}, JSON_DEPTH,
			               cases[i].offset);
			buffer_finish(&text);
		}
	}
}

static void closed_levels_do_not_count(void **state)
{
	enum { PAIRS = 500 };
	struct buffer text = {0};
	bson_t expected = BSON_INITIALIZER;
	bson_t array;
	bson_append_array_begin(&expected, KEY, -1, &array);
	for (int i = 0; i < PAIRS; i++) {
		char index[16];
		bson_t empty = BSON_INITIALIZER;
		snprintf(index, sizeof index, "%d", i);
		if (i % 2 == 0)
			bson_append_array(&array, index, -1, &empty);
		else
			bson_append_document(&array, index, -1, &empty);
		bson_destroy(&empty);
		buffer_append(&text, i == 0 ? "[" : ",", 1);
		buffer_append(&text, i % 2 == 0 ? "[]" : "{}", 2);
	}
	bson_append_array_end(&expected, &array);
	buffer_append_byte(&text, ']');
	assert_accepts((struct text){(const char *)text.data, text.length}, &expected);
	bson_destroy(&expected);
	buffer_finish(&text);
}

static void the_limit_is_exact(void **state)
{
	static const struct text texts[] = {
	    TEXT("null"), TEXT("true"),
	    TEXT("1"),    TEXT("3000000000"),
	    TEXT("1.5"),  TEXT("18446744073709551616"),
	    TEXT("\"\""), TEXT("\"a\\nb\\u20ac\""),
	    TEXT("[]"),   TEXT("[1,[2],3]"),
	    TEXT("{}"),   TEXT("{\"a\":{\"b\":\"c\"}}"),
	};
	for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
		struct outcome whole = convert(texts[i], NO_LIMIT);
		assert_int_equal(whole.fault.code, JSON_OK);
		struct outcome enough = convert(texts[i], whole.out.length);
		assert_int_equal(enough.fault.code, JSON_OK);
		for (size_t limit = 0; limit < whole.out.length; limit++) {
			struct outcome tight = convert(texts[i], limit);
			if (tight.fault.code != JSON_TOO_LARGE)
				fail_msg("%s: limit %zu: %s", printable(texts[i]), limit,
				         json_code_name(tight.fault.code));
			buffer_finish(&tight.out);
		}
		buffer_finish(&enough.out);
		buffer_finish(&whole.out);
	}
}

/* Fill `text` with `count` times `item` between `open` and `close`, read it with a small limit. */
static void assert_little_memory(const char *open, const char *item, const char *close)
{
	enum { LENGTH = 1 << 20, LIMIT = 1000, MEMORY = 4096 };
	struct buffer text = {0};
	struct buffer out = {0};
	struct json_fault fault;
	buffer_append(&text, open, strlen(open));
	while (text.length < LENGTH)
		buffer_append(&text, item, strlen(item));
	buffer_append(&text, close, strlen(close) + 1);
	assert_int_equal(json_to_bson((const char *)text.data, text.length - 1, KEY, LIMIT, &out, &fault),
	                 JSON_TOO_LARGE);
	assert_int_equal(out.length, 0);
	assert_in_range(out.capacity, 0, MEMORY);
	buffer_finish(&out);
	buffer_finish(&text);
}

static void memory_stays_near_the_limit(void **state)
{
	assert_little_memory("\"", "x", "\"");
	assert_little_memory("\"", "\\n", "\"");
	assert_little_memory("\"", "\xC3\xA9", "\"");
	assert_little_memory("{\"", "x", "\":1}");
	assert_little_memory("[", "1,", "1]");
	assert_little_memory("[", "[],", "1]");
	assert_little_memory("{", "\"k\":{},", "\"k\":1}");
}

/* ---- the interface itself */

static void success_fills_in_the_fault(void **state)
{
	struct outcome outcome = convert((struct text){" [1] ", 5}, NO_LIMIT);
	assert_int_equal(outcome.fault.code, JSON_OK);
	assert_int_equal(outcome.fault.offset, 5);
	assert_string_equal(outcome.fault.message, "ok");
	buffer_finish(&outcome.out);
}

static void the_element_has_the_callers_key(void **state)
{
	static const uint8_t expected[] = {BSON_TYPE_INT32, 'a', '.', 'b', 0, 0x04, 0x03, 0x02, 0x01,
	                                   BSON_TYPE_NULL,  0};
	struct buffer out = {0};
	struct json_fault fault;
	assert_int_equal(json_to_bson("16909060", 8, "a.b", NO_LIMIT, &out, &fault), JSON_OK);
	assert_int_equal(json_to_bson("null", 4, "", NO_LIMIT, &out, &fault), JSON_OK);
	assert_int_equal(out.length, sizeof expected);
	assert_memory_equal(out.data, expected, sizeof expected);
	buffer_finish(&out);
}

static void faults_say_what_is_wrong(void **state)
{
	static const struct {
		struct text text;
		const char *message;
	} cases[] = {
	    {TEXT(" "), "no JSON value"},
	    {TEXT("[1"), "unexpected end of text"},
	    {TEXT("\xEF\xBB\xBF{}"), "byte order mark"},
	    {TEXT("[\xEF\xBB\xBF]"), "value expected"},
	    {TEXT("[1;]"), "',' or ']' expected"},
	    {TEXT("{\"a\":1]"), "',' or '}' expected"},
	    {TEXT("{\"a\"}"), "':' expected"},
	    {TEXT("{a:1}"), "key in double quotes expected"},
	    {TEXT("{} x"), "bytes after the JSON value"},
	    {TEXT("nuLL"), "misspelt true, false or null"},
	    {TEXT("01"), "leading zero"},
	    {TEXT("[1.]"), "digit expected"},
	    {TEXT("1e999"), "number too large for a double"},
	    {TEXT("99999999999999999999999999999999999"), "integer of more than 34 digits"},
	    {TEXT("\"\n\""), "unescaped control character in string"},
	    {TEXT("\"\\x\""), "unknown escape"},
	    {TEXT("\"\\u00g\""), "hexadecimal digit expected"},
	    {TEXT("\"\\uDC00\""), "lone surrogate"},
	    {TEXT("\"\\uD800\""), "lone surrogate"},
	    {TEXT("\"\xFF\""), "invalid UTF-8 in string"},
	    {TEXT("\xFF"), "invalid UTF-8"},
	    {TEXT("{\"\\u0000\":1}"), "key with \\u0000"},
	};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
		assert_string_equal(fault_of(cases[i].text).message, cases[i].message);
}

static void codes_have_names(void **state)
{
	static const char *const names[] = {
	    [JSON_OK] = "ok",
	    [JSON_EMPTY] = "empty_payload",
	    [JSON_SYNTAX] = "invalid_json",
	    [JSON_UTF8] = "invalid_utf8",
	    [JSON_DEPTH] = "too_deep",
	    [JSON_NUMBER_RANGE] = "number_out_of_range",
	    [JSON_KEY_NUL] = "key_with_nul",
	    [JSON_TOO_LARGE] = "document_too_large",
	};
	for (size_t code = 0; code < sizeof names / sizeof *names; code++)
		assert_string_equal(json_code_name((enum json_code)code), names[code]);
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
	    cmocka_unit_test(literals_become_bool_and_null),
	    cmocka_unit_test(misspelt_literals_are_refused),
	    cmocka_unit_test(empty_payloads_are_told_apart),
	    cmocka_unit_test(white_space_is_allowed_between_tokens),
	    cmocka_unit_test(arrays_get_decimal_indexes),
	    cmocka_unit_test(objects_keep_keys_and_order),
	    cmocka_unit_test(a_message_of_every_type),
	    cmocka_unit_test(broken_structure_is_refused),
	    cmocka_unit_test(bytes_behind_the_value_are_refused),
	    cmocka_unit_test(bytes_outside_strings_are_told_apart),
	    cmocka_unit_test(integers_become_the_smallest_type),
	    cmocka_unit_test(large_integers_become_decimals),
	    cmocka_unit_test(integers_beyond_34_digits_are_refused),
	    cmocka_unit_test(points_and_exponents_make_doubles),
	    cmocka_unit_test(doubles_at_their_limits),
	    cmocka_unit_test(long_fractions_and_exponents_balance),
	    cmocka_unit_test(broken_numbers_are_refused),
	    cmocka_unit_test(doubles_are_those_of_strtod),
	    cmocka_unit_test(strings_are_kept_as_they_are),
	    cmocka_unit_test(broken_strings_are_refused),
	    cmocka_unit_test(lone_surrogates_are_refused),
	    cmocka_unit_test(invalid_utf8_is_refused),
	    cmocka_unit_test(keys_with_nul_are_refused),
	    cmocka_unit_test(every_byte_at_every_place),
	    cmocka_unit_test(every_letter_behind_a_backslash),
	    cmocka_unit_test(every_character_raw_and_escaped),
	    cmocka_unit_test(utf8_as_libbson_sees_it),
	    cmocka_unit_test(a_hundred_levels_are_taken),
	    cmocka_unit_test(the_101st_level_is_refused),
	    cmocka_unit_test(closed_levels_do_not_count),
	    cmocka_unit_test(the_limit_is_exact),
	    cmocka_unit_test(memory_stays_near_the_limit),
	    cmocka_unit_test(success_fills_in_the_fault),
	    cmocka_unit_test(the_element_has_the_callers_key),
	    cmocka_unit_test(faults_say_what_is_wrong),
	    cmocka_unit_test(codes_have_names),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
