/* See id_key.h. */
#include "id_key.h"

#include "memory.h"

#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
	KEPT_BYTES = 256 * 1024,
	DECIMAL_DIGITS = 34,
	DOUBLE_DIGITS = 767, /* of the double with the longest decimal expansion */
	DOUBLE_TEXT = DOUBLE_DIGITS + 16,
};

/* The kinds of value that can never be the same, and of number once its type is out of the way. */
enum tag {
	TAG_END,
	TAG_WHOLE = 'w',   /* an integer that fits into 64 bits */
	TAG_BINARY = 'b',  /* another number that a double holds exactly */
	TAG_DECIMAL = 'd', /* another number */
	TAG_TEXT = 't',
	TAG_DOCUMENT = 'o',
	TAG_ARRAY = 'a',
	TAG_OTHER = 'x',
};

static void append_tagged(struct buffer *out, enum tag tag, const void *bytes, size_t size)
{
	buffer_append_byte(out, (uint8_t)tag);
	buffer_append(out, bytes, size);
}

/* ---- numbers ---- */

static void append_whole(struct buffer *out, int64_t value)
{
	append_tagged(out, TAG_WHOLE, &value, sizeof value);
}

static void append_double(struct buffer *out, double value)
{
	if (value >= -0x1p63 && value < 0x1p63 && trunc(value) == value) {
		append_whole(out, (int64_t)value);
		return;
	}
	double same = isnan(value) ? (double)NAN : value;
	append_tagged(out, TAG_BINARY, &same, sizeof same);
}

/* A number in decimal: digits without zeros around them, times ten to a power. Zero has no digits. */
struct decimal {
	bool negative;
	char digits[DOUBLE_DIGITS + 1];
	size_t count;
	long exponent; /* of the last digit */
};

/* From "-1.50E+3" and the like. */
static struct decimal parse_decimal(const char *text)
{
	struct decimal decimal = {.negative = *text == '-'};
	bool point = false;
	for (text += decimal.negative; isdigit((unsigned char)*text) || *text == '.'; text++) {
		if (*text == '.') {
			point = true;
			continue;
		}
		decimal.exponent -= point;
		if ((decimal.count > 0 || *text != '0') && decimal.count < DOUBLE_DIGITS)
			decimal.digits[decimal.count++] = *text;
	}
	if (*text == 'e' || *text == 'E')
		decimal.exponent += strtol(text + 1, NULL, 10);
	for (; decimal.count > 0 && decimal.digits[decimal.count - 1] == '0'; decimal.exponent++)
		decimal.count--;
	decimal.digits[decimal.count] = 0;
	return decimal;
}

static bool is_same_decimal(const struct decimal *left, const struct decimal *right)
{
	return left->negative == right->negative && left->exponent == right->exponent && left->count == right->count &&
	       memcmp(left->digits, right->digits, left->count) == 0;
}

/* Whether it is an integer of 64 bits. */
static bool is_whole(const struct decimal *decimal, int64_t *value)
{
	if (decimal->exponent < 0 || decimal->count + (size_t)decimal->exponent > 19)
		return false;
	uint64_t magnitude = 0, most = decimal->negative ? (uint64_t)INT64_MAX + 1 : INT64_MAX;
	for (size_t i = 0; i < decimal->count + (size_t)decimal->exponent; i++) {
		unsigned digit = i < decimal->count ? (unsigned)(decimal->digits[i] - '0') : 0;
		if (magnitude > (most - digit) / 10)
			return false;
		magnitude = magnitude * 10 + digit;
	}
	*value = decimal->negative ? (int64_t)(0 - magnitude) : (int64_t)magnitude;
	return true;
}

/* The double that is exactly this number, if there is one. */
static bool is_double(const struct decimal *decimal, const char *text, double *value)
{
	char exact[DOUBLE_TEXT];
	*value = strtod(text, NULL);
	if (!isfinite(*value))
		return false;
	snprintf(exact, sizeof exact, "%.*e", DOUBLE_DIGITS - 1, *value);
	struct decimal other = parse_decimal(exact);
	return is_same_decimal(decimal, &other);
}

static void append_decimal(struct buffer *out, const bson_iter_t *value)
{
	bson_decimal128_t number;
	char text[BSON_DECIMAL128_STRING];
	int64_t whole;
	double same;
	if (!bson_iter_decimal128(value, &number))
		return;
	bson_decimal128_to_string(&number, text);
	if (strchr(text, 'N') != NULL || strchr(text, 'I') != NULL) { /* NaN, Infinity, -Infinity */
		append_double(out, strtod(text, NULL));
		return;
	}
	struct decimal decimal = parse_decimal(text);
	if (decimal.count == 0) {
		append_whole(out, 0);
	} else if (is_whole(&decimal, &whole)) {
		append_whole(out, whole);
	} else if (is_double(&decimal, text, &same)) {
		append_double(out, same);
	} else {
		append_tagged(out, TAG_DECIMAL, &decimal.exponent, sizeof decimal.exponent);
		buffer_append_byte(out, decimal.negative);
		buffer_append(out, decimal.digits, decimal.count + 1);
	}
}

/* ---- values ---- */

static void append_sized(struct buffer *out, const void *bytes, size_t size)
{
	buffer_append(out, &size, sizeof size);
	buffer_append(out, bytes, size);
}

static void append_text(struct buffer *out, const bson_iter_t *value)
{
	uint32_t length;
	const char *text = bson_iter_utf8(value, &length);
	buffer_append_byte(out, TAG_TEXT);
	append_sized(out, text, length);
}

/* Type and bytes, which lie between the name and the next element. */
static void append_other(struct buffer *out, const bson_iter_t *value)
{
	size_t start = value->off + 1 + strlen(bson_iter_key(value)) + 1;
	buffer_append_byte(out, TAG_OTHER);
	buffer_append_byte(out, (uint8_t)bson_iter_type(value));
	append_sized(out, value->raw + start, value->next_off - start);
}

static void append_value(struct buffer *out, const bson_iter_t *value);

/* As deep as it is nested, which MongoDB limits to 100. */
static void append_fields(struct buffer *out, enum tag tag, const bson_iter_t *value) // NOLINT(misc-no-recursion)
{
	bson_iter_t field;
	buffer_append_byte(out, (uint8_t)tag);
	if (bson_iter_recurse(value, &field))
		while (bson_iter_next(&field)) {
			append_value(out, &field);
			buffer_append(out, bson_iter_key(&field), strlen(bson_iter_key(&field)) + 1);
		}
	buffer_append_byte(out, TAG_END);
}

static void append_value(struct buffer *out, const bson_iter_t *value) // NOLINT(misc-no-recursion)
{
	switch (bson_iter_type(value)) {
	case BSON_TYPE_INT32:
	case BSON_TYPE_INT64:
		append_whole(out, bson_iter_as_int64(value));
		break;
	case BSON_TYPE_DOUBLE:
		append_double(out, bson_iter_double(value));
		break;
	case BSON_TYPE_DECIMAL128:
		append_decimal(out, value);
		break;
	case BSON_TYPE_UTF8:
		append_text(out, value);
		break;
	case BSON_TYPE_DOCUMENT:
		append_fields(out, TAG_DOCUMENT, value);
		break;
	case BSON_TYPE_ARRAY:
		append_fields(out, TAG_ARRAY, value);
		break;
	default:
		append_other(out, value);
		break;
	}
}

void id_key_append(const bson_t *document, struct buffer *out)
{
	bson_iter_t id;
	if (bson_iter_init_find(&id, document, "_id"))
		append_value(out, &id);
}

/* ---- many of them ---- */

void id_key_set_finish(struct id_key_set *set)
{
	buffer_finish(&set->bytes);
	free(set->entries);
	*set = (struct id_key_set){0};
}

void id_key_set_clear(struct id_key_set *set)
{
	buffer_reset(&set->bytes, KEPT_BYTES);
	set->count = 0;
}

void id_key_set_add(struct id_key_set *set, const bson_t *document, size_t owner)
{
	if (set->count == set->capacity) {
		set->capacity = set->capacity ? set->capacity * 2 : 64;
		set->entries = memory_resize(set->entries, set->capacity * sizeof *set->entries);
	}
	size_t start = set->bytes.length;
	id_key_append(document, &set->bytes);
	set->entries[set->count++] =
	    (struct id_key_entry){.start = start, .length = set->bytes.length - start, .owner = owner};
}

static int compare_keys(const struct id_key_entry *left, const struct id_key_entry *right)
{
	if (left->length != right->length)
		return left->length < right->length ? -1 : 1;
	return left->length > 0 ? memcmp(left->key, right->key, left->length) : 0;
}

static int compare_entries(const void *left, const void *right)
{
	const struct id_key_entry *one = left, *other = right;
	int order = compare_keys(one, other);
	return order != 0 ? order : (one->start > other->start) - (one->start < other->start);
}

void id_key_set_sort(struct id_key_set *set)
{
	for (size_t i = 0; i < set->count && set->bytes.length > 0; i++)
		set->entries[i].key = set->bytes.data + set->entries[i].start;
	if (set->count > 0)
		qsort(set->entries, set->count, sizeof *set->entries, compare_entries);
}

size_t id_key_set_run(const struct id_key_set *set, size_t index)
{
	size_t end = index + 1;
	while (end < set->count && compare_keys(&set->entries[index], &set->entries[end]) == 0)
		end++;
	return end - index;
}

size_t id_key_set_find(const struct id_key_set *set, const bson_t *document, const struct id_key_entry **first)
{
	struct buffer bytes = {0};
	size_t low = 0, high = set->count;
	id_key_append(document, &bytes);
	struct id_key_entry wanted = {.key = bytes.data, .length = bytes.length};
	while (low < high) {
		size_t middle = low + (high - low) / 2;
		if (compare_keys(&set->entries[middle], &wanted) < 0)
			low = middle + 1;
		else
			high = middle;
	}
	bool found = low < set->count && compare_keys(&set->entries[low], &wanted) == 0;
	buffer_finish(&bytes);
	*first = found ? &set->entries[low] : NULL;
	return found ? id_key_set_run(set, low) : 0;
}
