/*
 * See json.h. The reader walks the text once, left to right, and writes BSON as it goes: no tree, no second look.
 *
 * A BSON element is its type, its name, a NUL and its value, so each element starts with a type byte that is filled
 * in when the value's first byte shows what it is; a document or array starts with four bytes for its length, filled
 * in at its closing bracket. Both are kept as offsets into the buffer, which moves as it grows. The two readers of
 * arrays and objects and read_value() call each other; JSON_MAX_DEPTH bounds the stack.
 *
 * The NUL behind the text is no valid byte of JSON anywhere, so every scan stops at it by the test it makes anyway;
 * only unexpected() asks whether the text ended there. Strings go eight bytes at a time while nothing in them needs
 * a look, and are copied in runs between escapes.
 *
 * Each read_…() starts at the first byte of what it reads and stops behind the last. False means that the fault is
 * filled in; json_to_bson() then takes back what was written.
 */
#include "json.h"

#include "utf8.h"

#include <bson/bson.h>
#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

enum {
	DIGITS_IN_UINT64 = 19,  /* decimal digits that always fit */
	DIGITS_IN_DECIMAL = 34, /* of Decimal128 */
	EXACT_POWER = 22,       /* 10^22 is the largest power of ten that is a double exactly */
};
#define EXACT_INTEGER (UINT64_C(1) << 53) /* up to here every integer is a double exactly */

struct reader {
	const uint8_t *text;
	const uint8_t *at;  /* the next byte */
	const uint8_t *end; /* the NUL behind the text */
	struct buffer *out;
	size_t most;    /* the length that `out` may reach */
	unsigned depth; /* arrays and objects open here */
	struct json_fault *fault;
};

static bool fail(struct reader *reader, enum json_code code, const uint8_t *at, const char *message)
{
	*reader->fault = (struct json_fault){.code = code, .offset = (size_t)(at - reader->text), .message = message};
	return false;
}

/* Fail at the next byte, which `message` describes unless there is none or it is not even UTF-8. */
static bool unexpected(struct reader *reader, const char *message)
{
	size_t length;
	if (reader->at == reader->end)
		return fail(reader, JSON_SYNTAX, reader->at, "unexpected end of text");
	if (*reader->at >= 0x80 && !utf8_sequence(reader->at, &length))
		return fail(reader, JSON_UTF8, reader->at, "invalid UTF-8");
	return fail(reader, JSON_SYNTAX, reader->at, message);
}

static bool fits(struct reader *reader, size_t more)
{
	if (reader->out->length <= reader->most && more <= reader->most - reader->out->length)
		return true;
	return fail(reader, JSON_TOO_LARGE, reader->at, "BSON value larger than the limit");
}

/* BSON is little-endian on every machine. */
static void store_32(uint8_t *place, uint32_t value)
{
	place[0] = (uint8_t)value;
	place[1] = (uint8_t)(value >> 8);
	place[2] = (uint8_t)(value >> 16);
	place[3] = (uint8_t)(value >> 24);
}

static void append_32(struct reader *reader, uint32_t value)
{
	store_32(buffer_extend(reader->out, 4), value);
}

static void append_64(struct reader *reader, uint64_t value)
{
	uint8_t *place = buffer_extend(reader->out, 8);
	store_32(place, (uint32_t)value);
	store_32(place + 4, (uint32_t)(value >> 32));
}

static void set_type(struct reader *reader, size_t type_at, bson_type_t type)
{
	reader->out->data[type_at] = (uint8_t)type;
}

static void skip_space(struct reader *reader)
{
	const uint8_t *at = reader->at;
	while (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r')
		at++;
	reader->at = at;
}

/* ---- strings (RFC 8259 §7) */

#define EVERY_BYTE(byte) (UINT64_C(0x0101010101010101) * (byte))

/*
 * True when none of the eight bytes is a quote, a backslash, a control character or part of a longer sequence: taking
 * 0x20 (or, after the exclusive or, 1) off each byte sets the top bit of one that is less.
 */
static bool all_plain(const uint8_t *at)
{
	uint64_t bytes;
	memcpy(&bytes, at, sizeof bytes);
	uint64_t control = bytes - EVERY_BYTE(0x20);
	uint64_t quote = (bytes ^ EVERY_BYTE('"')) - EVERY_BYTE(1);
	uint64_t backslash = (bytes ^ EVERY_BYTE('\\')) - EVERY_BYTE(1);
	return ((bytes | control | quote | backslash) & EVERY_BYTE(0x80)) == 0;
}

static const uint8_t *skip_plain(const uint8_t *at, const uint8_t *end)
{
	while (end - at >= 8 && all_plain(at))
		at += 8;
	while (*at >= 0x20 && *at < 0x80 && *at != '"' && *at != '\\')
		at++;
	return at;
}

/* Copy what stands for itself, up to a quote, a backslash or a byte that is wrong there. */
static bool read_run(struct reader *reader)
{
	const uint8_t *start = reader->at;
	const uint8_t *at = skip_plain(start, reader->end);
	while (*at >= 0x80) {
		size_t length;
		if (!utf8_sequence(at, &length))
			return fail(reader, JSON_UTF8, at + length, "invalid UTF-8 in string");
		at = skip_plain(at + length, reader->end);
	}
	reader->at = at;
	if (!fits(reader, (size_t)(at - start)))
		return false;
	buffer_append(reader->out, start, (size_t)(at - start));
	return true;
}

static void append_character(struct buffer *out, uint32_t code)
{
	uint8_t bytes[4];
	size_t size = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
	static const uint8_t lead[] = {0, 0, 0xC0, 0xE0, 0xF0};
	for (size_t place = size - 1; place > 0; place--, code >>= 6)
		bytes[place] = (uint8_t)(0x80 | (code & 0x3F));
	bytes[0] = (uint8_t)(lead[size] | code);
	buffer_append(out, bytes, size);
}

static int hexadecimal(uint8_t byte)
{
	if (byte >= '0' && byte <= '9')
		return byte - '0';
	byte |= 0x20;
	return byte >= 'a' && byte <= 'f' ? byte - 'a' + 10 : -1;
}

/*
 * Four digits for one UTF-16 unit, which must (`low`) or must not be a low surrogate: refused at the digit after which
 * no other unit is possible.
 */
static bool read_unit(struct reader *reader, bool low, uint32_t *unit)
{
	*unit = 0;
	for (int shift = 12; shift >= 0; shift -= 4) {
		int digit = hexadecimal(*reader->at);
		if (digit < 0)
			return unexpected(reader, "hexadecimal digit expected");
		*unit |= (uint32_t)digit << shift;
		uint32_t last = *unit | ((UINT32_C(1) << shift) - 1);
		bool must_be = *unit >= 0xDC00 && last <= 0xDFFF;
		bool cannot_be = *unit > 0xDFFF || last < 0xDC00;
		if (low ? cannot_be : must_be)
			return unexpected(reader, "lone surrogate");
		reader->at++;
	}
	return true;
}

/* The hexadecimal digits behind \u, and for a high surrogate the \u of the low one. */
static bool read_unicode(struct reader *reader, uint32_t *code)
{
	if (!read_unit(reader, false, code))
		return false;
	if (*code < 0xD800 || *code > 0xDBFF)
		return true;
	for (const char *wanted = "\\u"; *wanted != '\0'; wanted++, reader->at++) {
		if (*reader->at != (uint8_t)*wanted)
			return unexpected(reader, "lone surrogate");
	}
	uint32_t low;
	if (!read_unit(reader, true, &low))
		return false;
	*code = 0x10000 + ((*code - 0xD800) << 10) + (low - 0xDC00);
	return true;
}

static bool read_escape(struct reader *reader, uint32_t *code)
{
	static const char letters[] = "\"\\/bfnrt";
	static const char meanings[] = "\"\\/\b\f\n\r\t";
	uint8_t letter = *++reader->at;
	if (letter == 'u') {
		reader->at++;
		return read_unicode(reader, code);
	}
	const char *known = letter == '\0' ? NULL : strchr(letters, letter);
	if (known == NULL)
		return unexpected(reader, "unknown escape");
	*code = (uint8_t)meanings[known - letters];
	reader->at++;
	return true;
}

/* Append the characters of a string or key, without a NUL behind them. */
static bool read_characters(struct reader *reader, bool key)
{
	const uint8_t *start = reader->at++;
	for (;;) {
		if (!read_run(reader))
			return false;
		if (*reader->at == '"')
			break;
		if (*reader->at != '\\')
			return unexpected(reader, "unescaped control character in string");
		uint32_t code;
		if (!read_escape(reader, &code))
			return false;
		if (key && code == 0)
			return fail(reader, JSON_KEY_NUL, start, "key with \\u0000");
		append_character(reader->out, code);
	}
	reader->at++;
	return true;
}

static bool read_string(struct reader *reader)
{
	size_t start = reader->out->length;
	buffer_extend(reader->out, 4);
	if (!read_characters(reader, false))
		return false;
	buffer_append_byte(reader->out, 0);
	store_32(reader->out->data + start, (uint32_t)(reader->out->length - start - 4));
	return true;
}

/* ---- numbers (RFC 8259 §6) */

struct number {
	const uint8_t *start;
	bool negative;
	bool integer;       /* written without point and exponent */
	uint64_t digits;    /* all of them as one integer, of no use beyond DIGITS_IN_UINT64 significant ones */
	size_t significant; /* digits from the first that is not 0 */
	int64_t power;      /* of ten, that `digits` are to be multiplied by */
};

static bool is_digit(uint8_t byte)
{
	return byte >= '0' && byte <= '9';
}

static bool read_digits(struct reader *reader, struct number *number)
{
	const uint8_t *at = reader->at;
	if (!is_digit(*at))
		return unexpected(reader, "digit expected");
	for (; is_digit(*at); at++) {
		number->digits = number->digits * 10 + (uint64_t)(*at - '0');
		if (number->digits != 0 || number->significant != 0)
			number->significant++;
	}
	reader->at = at;
	return true;
}

static bool read_whole_part(struct reader *reader, struct number *number)
{
	number->negative = *reader->at == '-';
	if (number->negative)
		reader->at++;
	if (*reader->at != '0')
		return read_digits(reader, number);
	reader->at++;
	return !is_digit(*reader->at) || unexpected(reader, "leading zero");
}

static bool read_fraction(struct reader *reader, struct number *number)
{
	const uint8_t *start = ++reader->at;
	number->integer = false;
	if (!read_digits(reader, number))
		return false;
	number->power -= reader->at - start;
	return true;
}

static bool read_exponent(struct reader *reader, struct number *number)
{
	const int64_t beyond_any_text = INT64_C(1000000000000000);
	int64_t exponent = 0;
	number->integer = false;
	reader->at++;
	bool negative = *reader->at == '-';
	if (negative || *reader->at == '+')
		reader->at++;
	if (!is_digit(*reader->at))
		return unexpected(reader, "digit expected");
	for (; is_digit(*reader->at); reader->at++) {
		if (exponent < beyond_any_text)
			exponent = exponent * 10 + (*reader->at - '0');
	}
	number->power += negative ? -exponent : exponent;
	return true;
}

/*
 * One rounding, and so the nearest double, when both operands are doubles exactly (Clinger 1990) and the machine
 * computes in doubles; else strtod(), which stops where the number does.
 */
static double nearest_double(const struct number *number)
{
	static const double powers[EXACT_POWER + 1] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,
	                                               1e8,  1e9,  1e10, 1e11, 1e12, 1e13, 1e14, 1e15,
	                                               1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};
	if (FLT_EVAL_METHOD != 0 || number->significant > DIGITS_IN_UINT64 || number->digits > EXACT_INTEGER ||
	    number->power < -EXACT_POWER || number->power > EXACT_POWER)
		return strtod((const char *)number->start, NULL);
	double value = (double)number->digits;
	value = number->power < 0 ? value / powers[-number->power] : value * powers[number->power];
	return number->negative ? -value : value;
}

static bool append_double(struct reader *reader, size_t type_at, const struct number *number)
{
	double value = nearest_double(number);
	uint64_t bits;
	if (isinf(value))
		return fail(reader, JSON_NUMBER_RANGE, number->start, "number too large for a double");
	memcpy(&bits, &value, sizeof bits);
	set_type(reader, type_at, BSON_TYPE_DOUBLE);
	append_64(reader, bits);
	return true;
}

static bool append_decimal(struct reader *reader, size_t type_at, const struct number *number)
{
	bson_decimal128_t decimal;
	int length = (int)number->significant + number->negative;
	if (number->significant > DIGITS_IN_DECIMAL ||
	    !bson_decimal128_from_string_w_len((const char *)number->start, length, &decimal))
		return fail(reader, JSON_NUMBER_RANGE, number->start, "integer of more than 34 digits");
	set_type(reader, type_at, BSON_TYPE_DECIMAL128);
	append_64(reader, decimal.low);
	append_64(reader, decimal.high);
	return true;
}

static bool append_integer(struct reader *reader, size_t type_at, const struct number *number)
{
	uint64_t bits = number->negative ? 0 - number->digits : number->digits;
	if (number->significant > DIGITS_IN_UINT64 || number->digits > (uint64_t)INT64_MAX + number->negative)
		return append_decimal(reader, type_at, number);
	if (number->digits <= (uint64_t)INT32_MAX + number->negative) {
		set_type(reader, type_at, BSON_TYPE_INT32);
		append_32(reader, (uint32_t)bits);
	} else {
		set_type(reader, type_at, BSON_TYPE_INT64);
		append_64(reader, bits);
	}
	return true;
}

static bool read_number(struct reader *reader, size_t type_at)
{
	struct number number = {.start = reader->at, .integer = true};
	if (!read_whole_part(reader, &number))
		return false;
	if (*reader->at == '.' && !read_fraction(reader, &number))
		return false;
	if ((*reader->at == 'e' || *reader->at == 'E') && !read_exponent(reader, &number))
		return false;
	return number.integer ? append_integer(reader, type_at, &number) : append_double(reader, type_at, &number);
}

/* ---- arrays, objects (RFC 8259 §4, §5) and any value */

static bool read_value(struct reader *reader, size_t type_at);

/* The bracket, and room for the length; returns where that is. */
static size_t open_document(struct reader *reader)
{
	size_t start = reader->out->length;
	buffer_extend(reader->out, 4);
	reader->depth++;
	reader->at++;
	skip_space(reader);
	return start;
}

static void close_document(struct reader *reader, size_t start)
{
	buffer_append_byte(reader->out, 0);
	store_32(reader->out->data + start, (uint32_t)(reader->out->length - start));
	reader->depth--;
	reader->at++;
}

/* Start the array's next element: its place in decimal is its name. Returns where the type goes. */
static size_t append_index(struct reader *reader, size_t index)
{
	uint8_t name[24];
	size_t first = sizeof name - 1;
	name[first] = '\0';
	do {
		name[--first] = (uint8_t)('0' + index % 10);
		index /= 10;
	} while (index != 0);
	name[--first] = 0;
	size_t type_at = reader->out->length;
	buffer_append(reader->out, name + first, sizeof name - first);
	return type_at;
}

static bool read_array(struct reader *reader)
{
	size_t start = open_document(reader);
	bool more = *reader->at != ']';
	for (size_t index = 0; more; index++) {
		if (!read_value(reader, append_index(reader, index)))
			return false;
		skip_space(reader);
		more = *reader->at != ']';
		if (more && *reader->at != ',')
			return unexpected(reader, "',' or ']' expected");
		if (more)
			reader->at++;
		skip_space(reader);
	}
	close_document(reader, start);
	return true;
}

static bool read_member(struct reader *reader)
{
	size_t type_at = reader->out->length;
	buffer_append_byte(reader->out, 0);
	if (*reader->at != '"')
		return unexpected(reader, "key in double quotes expected");
	if (!read_characters(reader, true))
		return false;
	buffer_append_byte(reader->out, 0);
	skip_space(reader);
	if (*reader->at != ':')
		return unexpected(reader, "':' expected");
	reader->at++;
	skip_space(reader);
	return read_value(reader, type_at);
}

static bool read_object(struct reader *reader)
{
	size_t start = open_document(reader);
	bool more = *reader->at != '}';
	while (more) {
		if (!read_member(reader))
			return false;
		skip_space(reader);
		more = *reader->at != '}';
		if (more && *reader->at != ',')
			return unexpected(reader, "',' or '}' expected");
		if (more)
			reader->at++;
		skip_space(reader);
	}
	close_document(reader, start);
	return true;
}

static bool read_literal(struct reader *reader, const char *word)
{
	for (; *word != '\0'; word++, reader->at++) {
		if (*reader->at != (uint8_t)*word)
			return unexpected(reader, "misspelt true, false or null");
	}
	return true;
}

static bool read_boolean(struct reader *reader, bool value)
{
	buffer_append_byte(reader->out, value);
	return read_literal(reader, value ? "true" : "false");
}

static bool no_value(struct reader *reader)
{
	bool marked = reader->at == reader->text && strncmp((const char *)reader->text, "\xEF\xBB\xBF", 3) == 0;
	return unexpected(reader, marked ? "byte order mark" : "value expected");
}

static bool read_any(struct reader *reader, size_t type_at)
{
	bool opening = *reader->at == '{' || *reader->at == '[';
	if (opening && reader->depth == JSON_MAX_DEPTH)
		return fail(reader, JSON_DEPTH, reader->at, "more than 100 arrays and objects in one another");
	switch (*reader->at) {
	case '{':
		set_type(reader, type_at, BSON_TYPE_DOCUMENT);
		return read_object(reader);
	case '[':
		set_type(reader, type_at, BSON_TYPE_ARRAY);
		return read_array(reader);
	case '"':
		set_type(reader, type_at, BSON_TYPE_UTF8);
		return read_string(reader);
	case 't':
	case 'f':
		set_type(reader, type_at, BSON_TYPE_BOOL);
		return read_boolean(reader, *reader->at == 't');
	case 'n':
		set_type(reader, type_at, BSON_TYPE_NULL);
		return read_literal(reader, "null");
	default:
		if (*reader->at == '-' || is_digit(*reader->at))
			return read_number(reader, type_at);
		return no_value(reader);
	}
}

static bool read_value(struct reader *reader, size_t type_at)
{
	return read_any(reader, type_at) && fits(reader, 0);
}

static bool read_text(struct reader *reader, const char *key)
{
	size_t type_at = reader->out->length;
	skip_space(reader);
	if (reader->at == reader->end)
		return fail(reader, JSON_EMPTY, reader->at, "no JSON value");
	buffer_append_byte(reader->out, 0);
	buffer_append(reader->out, key, strlen(key) + 1);
	if (!read_value(reader, type_at))
		return false;
	skip_space(reader);
	return reader->at == reader->end || unexpected(reader, "bytes after the JSON value");
}

enum json_code json_to_bson(const char *text, size_t length, const char *key, size_t limit, struct buffer *out,
                            struct json_fault *fault)
{
	const uint8_t *bytes = (const uint8_t *)text;
	size_t old_length = out->length;
	size_t largest = limit < INT32_MAX ? limit : INT32_MAX;
	struct reader reader = {.text = bytes,
	                        .at = bytes,
	                        .end = bytes + length,
	                        .out = out,
	                        .most = old_length + largest,
	                        .fault = fault};
	*fault = (struct json_fault){.code = JSON_OK, .offset = length, .message = "ok"};
	if (!read_text(&reader, key))
		out->length = old_length;
	return fault->code;
}

const char *json_code_name(enum json_code code)
{
	switch (code) {
	case JSON_OK:
		return "ok";
	case JSON_EMPTY:
		return "empty_payload";
	case JSON_SYNTAX:
		return "invalid_json";
	case JSON_UTF8:
		return "invalid_utf8";
	case JSON_DEPTH:
		return "too_deep";
	case JSON_NUMBER_RANGE:
		return "number_out_of_range";
	case JSON_KEY_NUL:
		return "key_with_nul";
	case JSON_TOO_LARGE:
		return "document_too_large";
	}
	return "unknown";
}
