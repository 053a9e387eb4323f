/*
 * json_to_bson() beside cJSON, on random texts: well-formed ones written by a small generator, and the same after a few
 * random edits. Each text is given to both.
 *
 * Both take it: the values must be the same, numbers as doubles, strings up to the NUL where cJSON's end.
 * Only we take it: the text must have a number of more than 63 bytes, which unpatched cJSON cuts there (Debian's does
 * not); there is no other reason.
 * Only cJSON takes it: what we blamed must be one of the leniencies listed below, told from the text itself.
 * Neither: fine; but as for every text we refuse, the blamed byte must be the first wrong one.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "json.h"

#include <bson/bson.h>
#include <cjson/cJSON.h>
#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { TEXTS = 200000, LONGEST = 4096, CJSON_NUMBER = 63 };

/* ---- random texts */

static uint64_t random_state = 20261122;

/* xorshift64* with a fixed seed. */
static size_t random_below(size_t bound)
{
	random_state ^= random_state >> 12;
	random_state ^= random_state << 25;
	random_state ^= random_state >> 27;
	return (size_t)((random_state * UINT64_C(2685821657736338717) >> 11) % bound);
}

struct text {
	size_t length;
	char bytes[LONGEST + 1]; /* with a NUL behind */
};

static void add(struct text *text, const char *bytes, size_t length)
{
	if (length > LONGEST - text->length)
		return;
	memcpy(text->bytes + text->length, bytes, length);
	text->length += length;
	text->bytes[text->length] = '\0';
}

struct piece {
	const char *bytes;
	size_t length;
};
#define PIECE(literal)                                                                                                 \
	{                                                                                                              \
		literal, sizeof(literal) - 1                                                                           \
	}
#define ADD_ONE_OF(text, pieces) add_piece(text, &(pieces)[random_below(sizeof(pieces) / sizeof *(pieces))])

static void add_piece(struct text *text, const struct piece *piece)
{
	add(text, piece->bytes, piece->length);
}

static void add_space(struct text *text)
{
	static const struct piece spaces[] = {PIECE(" "), PIECE("\n"), PIECE("\t"), PIECE("\r\n"), PIECE("    ")};
	if (random_below(8) == 0)
		ADD_ONE_OF(text, spaces);
}

static void add_digits(struct text *text, size_t count)
{
	while (count-- != 0)
		add(text, &"0123456789"[random_below(10)], 1);
}

static void add_number(struct text *text)
{
	static const size_t lengths[] = {1, 2, 4, 11, 20, 36, 70};
	static const struct piece edges[] = {
	    PIECE("2147483647"),
	    PIECE("2147483648"),
	    PIECE("9007199254740993"),
	    PIECE("9223372036854775807"),
	    PIECE("9223372036854775808"),
	    PIECE("5e-324"),
	    PIECE("1.7976931348623157e308"),
	    PIECE("1e309"),
	    PIECE("0"),
	};
	if (random_below(3) == 0)
		add(text, "-", 1);
	if (random_below(8) == 0) {
		ADD_ONE_OF(text, edges);
		return;
	}
	if (random_below(8) != 0) {
		add(text, &"123456789"[random_below(9)], 1);
		add_digits(text, random_below(lengths[random_below(7)]));
	} else {
		add(text, "0", 1);
	}
	if (random_below(3) == 0) {
		add(text, ".", 1);
		add_digits(text, 1 + random_below(lengths[random_below(6)]));
	}
	if (random_below(4) == 0) {
		static const struct piece exponents[] = {PIECE("e"), PIECE("E"), PIECE("e-"), PIECE("E+")};
		ADD_ONE_OF(text, exponents);
		add_digits(text, 1 + random_below(3));
	}
}

static void add_string(struct text *text)
{
	static const struct piece pieces[] = {
	    PIECE("a"),
	    PIECE("device-007"),
	    PIECE("$"),
	    PIECE("."),
	    PIECE("\\n"),
	    PIECE("\\\""),
	    PIECE("\\\\"),
	    PIECE("\\/"),
	    PIECE("\\u00e9"),
	    PIECE("\\u20AC"),
	    PIECE("\\u0000"),
	    PIECE("\\ud83d\\ude00"),
	    PIECE("\xC3\xA9"),
	    PIECE("\xE2\x82\xAC"),
	    PIECE("\xF0\x9F\x98\x80"),
	    PIECE("\xEF\xBB\xBF"),
	    PIECE("[{\x7F}]:,"),
	    PIECE("temperature"),
	};
	add(text, "\"", 1);
	for (size_t count = random_below(5); count != 0; count--)
		ADD_ONE_OF(text, pieces);
	add(text, "\"", 1);
}

static void add_value(struct text *text, int depth)
{
	static const struct piece literals[] = {PIECE("true"), PIECE("false"), PIECE("null")};
	size_t kind = random_below(depth < 5 ? 9 : 5);
	bool object = kind >= 7;
	if (kind < 2)
		add_number(text);
	else if (kind < 4)
		add_string(text);
	else if (kind < 5)
		ADD_ONE_OF(text, literals);
	if (kind < 5)
		return;
	add(text, object ? "{" : "[", 1);
	add_space(text);
	for (size_t count = random_below(4); count != 0; count--) {
		if (object) {
			add_string(text);
			add_space(text);
			add(text, ":", 1);
			add_space(text);
		}
		add_value(text, depth + 1);
		add_space(text);
		add(text, ",", count > 1);
		add_space(text);
	}
	add(text, object ? "}" : "]", 1);
}

/* Deeper than the generator goes by itself. */
static void add_tower(struct text *text)
{
	size_t depth = 95 + random_below(12);
	for (size_t level = 0; level < depth; level++)
		add(text, "[", 1);
	add_value(text, 5);
	for (size_t level = 0; level < depth; level++)
		add(text, "]", 1);
}

/* Replace `removed` bytes at a random place by a piece that is apt to be wrong there. */
static void edit(struct text *text)
{
	static const struct piece pieces[] = {
	    PIECE("\""),
	    PIECE("\\"),
	    PIECE("["),
	    PIECE("]"),
	    PIECE("{"),
	    PIECE("}"),
	    PIECE(","),
	    PIECE(":"),
	    PIECE("0"),
	    PIECE("1"),
	    PIECE("-"),
	    PIECE("+"),
	    PIECE("."),
	    PIECE("e"),
	    PIECE("E5"),
	    PIECE("e400"),
	    PIECE("00"),
	    PIECE(".e1"),
	    PIECE("true"),
	    PIECE("nul"),
	    PIECE("NaN"),
	    PIECE("Infinity"),
	    PIECE("'"),
	    PIECE("//"),
	    PIECE("/**/"),
	    PIECE(" "),
	    PIECE("\n"),
	    PIECE("\t"),
	    PIECE("\v"),
	    PIECE("\0"),
	    PIECE("\x01"),
	    PIECE("\x1F"),
	    PIECE("\x7F"),
	    PIECE("\x80"),
	    PIECE("\xC0\x80"),
	    PIECE("\xC3"),
	    PIECE("\xE2\x82"),
	    PIECE("\xED\xA0\x80"),
	    PIECE("\xF4\x90\x80\x80"),
	    PIECE("\xEF\xBB\xBF"),
	    PIECE("\xFF"),
	    PIECE("\\u"),
	    PIECE("\\u00"),
	    PIECE("\\u0000"),
	    PIECE("\\uD800"),
	    PIECE("\\uDC00"),
	    PIECE("\\uDCzz"),
	    PIECE("\\uzzzz"),
	    PIECE("\\x"),
	    PIECE("\\b"),
	    PIECE(""),
	    PIECE(""),
	    PIECE(""),
	};
	struct text before = *text;
	size_t place = random_below(8) == 0 ? 0 : random_below(before.length + 1);
	size_t removed = random_below(2) * random_below(4);
	if (removed > before.length - place)
		removed = before.length - place;
	text->length = place;
	ADD_ONE_OF(text, pieces);
	add(text, before.bytes + place + removed, before.length - place - removed);
}

static void make_text(struct text *text)
{
	text->length = 0;
	add_space(text);
	if (random_below(200) == 0)
		add_tower(text);
	else
		add_value(text, 0);
	add_space(text);
	if (random_below(2) == 0)
		return;
	for (size_t count = 1 + random_below(3); count != 0; count--)
		edit(text);
}

/* ---- the same value */

static double number_of(const bson_iter_t *iter)
{
	bson_decimal128_t decimal;
	char text[BSON_DECIMAL128_STRING];
	if (BSON_ITER_HOLDS_DOUBLE(iter))
		return bson_iter_double(iter);
	if (!BSON_ITER_HOLDS_DECIMAL128(iter))
		return (double)bson_iter_as_int64(iter);
	bson_iter_decimal128(iter, &decimal);
	bson_decimal128_to_string(&decimal, text);
	return strtod(text, NULL);
}

static bool same_value(const bson_iter_t *iter, const cJSON *item);

static bool same_children(const bson_iter_t *iter, const cJSON *item)
{
	bson_iter_t child;
	const cJSON *other = item->child;
	size_t index = 0;
	if (!bson_iter_recurse(iter, &child))
		return false;
	for (; bson_iter_next(&child); other = other->next, index++) {
		char name[24];
		snprintf(name, sizeof name, "%zu", index);
		if (other == NULL || !same_value(&child, other) ||
		    strcmp(bson_iter_key(&child), cJSON_IsArray(item) ? name : other->string) != 0)
			return false;
	}
	return other == NULL;
}

static bool same_value(const bson_iter_t *iter, const cJSON *item)
{
	uint32_t length;
	const char *string;
	switch (bson_iter_type(iter)) {
	case BSON_TYPE_NULL:
		return cJSON_IsNull(item);
	case BSON_TYPE_BOOL:
		return cJSON_IsBool(item) && bson_iter_bool(iter) == cJSON_IsTrue(item);
	case BSON_TYPE_UTF8:
		string = bson_iter_utf8(iter, &length);
		return cJSON_IsString(item) && strcmp(string, item->valuestring) == 0;
	case BSON_TYPE_ARRAY:
		return cJSON_IsArray(item) && same_children(iter, item);
	case BSON_TYPE_DOCUMENT:
		return cJSON_IsObject(item) && same_children(iter, item);
	default:
		return cJSON_IsNumber(item) && number_of(iter) == item->valuedouble;
	}
}

/* `element` is our only one; the document around it is made here. */
static bool same_document(const struct buffer *element, const cJSON *item)
{
	bson_t document;
	bson_iter_t iter;
	struct buffer bytes = {0};
	uint32_t length = (uint32_t)element->length + 5;
	for (int shift = 0; shift < 32; shift += 8)
		buffer_append_byte(&bytes, (uint8_t)(length >> shift));
	buffer_append(&bytes, element->data, element->length);
	buffer_append_byte(&bytes, 0);
	bool same = bson_init_static(&document, bytes.data, bytes.length) &&
	            bson_validate(&document, BSON_VALIDATE_UTF8 | BSON_VALIDATE_UTF8_ALLOW_NULL, NULL) &&
	            bson_iter_init_find(&iter, &document, "value") && same_value(&iter, item);
	buffer_finish(&bytes);
	return same;
}

/* ---- cJSON's own ways. `at` is what we blamed; everything before it is well-formed. */

static bool in_string(const char *text, const char *at)
{
	bool inside = false;
	for (; text < at; text++) {
		if (inside && *text == '\\')
			text++;
		else if (*text == '"')
			inside = !inside;
	}
	return inside;
}

/* Takes every byte up to the space as white space. */
static bool control_as_space(const struct text *text, const char *at)
{
	return (uint8_t)*at < 0x20 && !in_string(text->bytes, at);
}

static bool control_in_string(const struct text *text, const char *at)
{
	return (uint8_t)*at < 0x20 && in_string(text->bytes, at);
}

/* Does not look at UTF-8; it can be wrong in strings only. */
static bool invalid_utf8(const struct text *text, const char *at)
{
	return in_string(text->bytes, at) && ((uint8_t)*at >= 0x80 || (uint8_t)at[-1] >= 0x80);
}

static bool byte_order_mark(const struct text *text, const char *at)
{
	return at == text->bytes && strncmp(at, "\xEF\xBB\xBF", 3) == 0;
}

/* Leaves the grammar of numbers to strtod(). */
static bool leading_zero(const struct text *text, const char *at)
{
	return at > text->bytes && at[-1] == '0' && isdigit((uint8_t)*at) && !in_string(text->bytes, at);
}

static bool no_digit_beside_point(const struct text *text, const char *at)
{
	bool behind = at > text->bytes + 1 && at[-1] == '.' && isdigit((uint8_t)at[-2]);
	bool before = at > text->bytes && at[-1] == '-' && at[0] == '.' && isdigit((uint8_t)at[1]);
	return (behind || before) && !in_string(text->bytes, at);
}

/* Reads \u with any four bytes, as \u0000 if they are not hexadecimal. */
static bool no_hexadecimal(const struct text *text, const char *at)
{
	const char *start = at;
	while (start > text->bytes && at - start < 4 && start[-1] != 'u')
		start--;
	if (start - text->bytes < 3 || start[-1] != 'u' || start[-2] != '\\' || !in_string(text->bytes, start - 2))
		return false;
	for (int place = 0; place < 4; place++) {
		if (!isxdigit((uint8_t)start[place]))
			return true;
	}
	return false;
}

/* Its limit is 1000. */
static bool above_100_levels(const struct text *text, const char *at)
{
	int depth = 0;
	for (const char *byte = text->bytes; byte <= at; byte++) {
		if (!in_string(text->bytes, byte))
			depth += (*byte == '[' || *byte == '{') - (*byte == ']' || *byte == '}');
	}
	return depth == JSON_MAX_DEPTH + 1;
}

/* Every number is a double, infinite ones too. */
static bool number_out_of_range(const struct text *text, const char *at)
{
	size_t length = strspn(at, "-0123456789.eE+");
	size_t integer = strspn(at, "-0123456789");
	return isinf(strtod(at, NULL)) || (length == integer && integer - (*at == '-') > 34);
}

/* A key ends at its NUL. */
static bool key_with_nul(const struct text *text, const char *at)
{
	const char *nul = *at == '"' ? strstr(at, "\\u0000") : NULL;
	return nul != NULL && in_string(at, nul);
}

static struct leniency {
	const char *name;
	bool (*applies)(const struct text *text, const char *at);
	enum json_code code;
	int seen;
} leniencies[] = {
    {"\\u without four hexadecimal digits", no_hexadecimal, JSON_SYNTAX},
    {"\\u without four hexadecimal digits but other bytes than UTF-8", no_hexadecimal, JSON_UTF8},
    {"control characters as white space", control_as_space, JSON_SYNTAX},
    {"control characters in strings", control_in_string, JSON_SYNTAX},
    {"invalid UTF-8 in strings", invalid_utf8, JSON_UTF8},
    {"byte order mark", byte_order_mark, JSON_SYNTAX},
    {"leading zeros", leading_zero, JSON_SYNTAX},
    {"no digit beside the point", no_digit_beside_point, JSON_SYNTAX},
    {"depth", above_100_levels, JSON_DEPTH},
    {"number range", number_out_of_range, JSON_NUMBER_RANGE},
    {"key with NUL", key_with_nul, JSON_KEY_NUL},
};
enum { LENIENCIES = sizeof leniencies / sizeof *leniencies };

static bool is_lenient(const struct text *text, const struct json_fault *fault)
{
	for (int i = 0; i < LENIENCIES; i++) {
		if (leniencies[i].code == fault->code && leniencies[i].applies(text, text->bytes + fault->offset)) {
			leniencies[i].seen++;
			return true;
		}
	}
	return false;
}

/* Unpatched it copies a number into 64 bytes and takes what is beyond for the next token. */
static bool has_long_number(const struct text *text)
{
	for (const char *at = text->bytes; *at != '\0'; at++) {
		if (strspn(at, "+-0123456789.eE") > CJSON_NUMBER && !in_string(text->bytes, at))
			return true;
	}
	return false;
}

/* ---- the comparison */

/* From a block of its own size, to let the sanitizers see a byte read too far. */
static struct json_fault convert(const char *bytes, size_t length, struct buffer *out)
{
	struct json_fault fault;
	char *copy = malloc(length + 1);
	assert_non_null(copy);
	memcpy(copy, bytes, length);
	copy[length] = '\0';
	out->length = 0;
	json_to_bson(copy, length, "value", SIZE_MAX, out, &fault);
	free(copy);
	return fault;
}

static bool first_wrong_byte(const struct text *text, size_t offset, struct buffer *out)
{
	struct json_fault before = convert(text->bytes, offset, out);
	if (before.code != JSON_OK && before.offset != offset)
		return false;
	if (offset == text->length)
		return true;
	struct json_fault behind = convert(text->bytes, offset + 1, out);
	return behind.code != JSON_OK && behind.offset == offset;
}

struct tally {
	int both, ours, theirs, neither;
};

/* NULL, or what is wrong. */
static const char *compare(const struct text *text, struct buffer *out, struct tally *tally)
{
	struct json_fault fault = convert(text->bytes, text->length, out);
	cJSON *item = cJSON_ParseWithLengthOpts(text->bytes, text->length + 1, NULL, true);
	const char *wrong = NULL;
	bool ours = fault.code == JSON_OK;
	if (ours && item != NULL && !same_document(out, item))
		wrong = "other value than cJSON's";
	else if (ours && item == NULL && !has_long_number(text))
		wrong = "refused by cJSON only";
	else if (!ours && item != NULL && !is_lenient(text, &fault))
		wrong = "refused by us only, for no known reason";
	else if ((fault.code == JSON_SYNTAX || fault.code == JSON_UTF8 || fault.code == JSON_DEPTH) &&
	         !first_wrong_byte(text, fault.offset, out))
		wrong = "not the first wrong byte";
	tally->both += ours && item != NULL;
	tally->ours += ours && item == NULL;
	tally->theirs += !ours && item != NULL;
	tally->neither += !ours && item == NULL;
	cJSON_Delete(item);
	return wrong;
}

static void show(const struct text *text)
{
	for (size_t i = 0; i < text->length; i++)
		print_error(isprint((uint8_t)text->bytes[i]) ? "%c" : "<%02x>", (uint8_t)text->bytes[i]);
	print_error("\n");
}

static void agrees_with_cjson(void **state)
{
	static struct text text;
	struct buffer out = {0};
	struct tally tally = {0};
	for (int i = 0; i < TEXTS; i++) {
		make_text(&text);
		const char *wrong = compare(&text, &out, &tally);
		if (wrong != NULL) {
			show(&text);
			fail_msg("text %d: %s", i, wrong);
		}
	}
	buffer_finish(&out);
	printf("# taken by both %d, by us only %d, by cJSON only %d, by neither %d\n", tally.both, tally.ours,
	       tally.theirs, tally.neither);
}

/* A test that never meets what it lists proves nothing. */
static void every_leniency_was_met(void **state)
{
	for (int i = 0; i < LENIENCIES; i++) {
		printf("# cJSON only: %s: %d\n", leniencies[i].name, leniencies[i].seen);
		assert_true(leniencies[i].seen > 0);
	}
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
	    cmocka_unit_test(agrees_with_cjson),
	    cmocka_unit_test(every_leniency_was_met),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
