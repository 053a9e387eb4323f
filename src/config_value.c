/*
 * Text to typed value, for file, environment and flags alike, checked against the entry's own range. Pure. Numbers are
 * read by hand: strtod() would take "inf", "0x10" and, in some locales, "1,5".
 *
 * Every complaint shows what was given (never for a secret) and the right form.
 */
#define _GNU_SOURCE
#include "config_table.h"

#include "buffer.h"
#include "json.h"
#include "memory.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum { QUOTE_LIMIT = 60, LIST_LIMIT = 1 << 20 };

struct unit {
	const char *name;
	double factor;
};

static const struct unit DURATION_UNITS[] = {{"ms", 1},      {"s", 1000},     {"m", 60000}, {"min", 60000},
                                             {"h", 3600000}, {"d", 86400000}, {NULL, 0}};
static const struct unit SIZE_UNITS[] = {{"B", 1},     {"KiB", 1024}, {"MiB", 1048576}, {"GiB", 1073741824},
                                         {"kB", 1000}, {"KB", 1000},  {"MB", 1e6},      {"GB", 1e9},
                                         {NULL, 0}};
static const struct unit RATE_UNITS[] = {{"/s", 1}, {"/min", 1.0 / 60}, {"/m", 1.0 / 60}, {"/h", 1.0 / 3600},
                                         {"", 1},   {NULL, 0}};

/* What a type looks like in messages: an example to append a unit to, and the words for it. */
struct form {
	const struct unit *units;
	const char *usual, *other; /* the units a bare number most likely meant */
	const char *words;
};

static const struct form DURATION_FORM = {DURATION_UNITS, "s", "ms",
                                          "a duration, as in \"500ms\", \"30s\", \"5min\", \"7d\""};
static const struct form SIZE_FORM = {SIZE_UNITS, "B", "MiB", "a size, as in \"512KiB\", \"8MiB\", \"1GiB\""};
static const struct form RATE_FORM = {RATE_UNITS, "/s", "/min", "a rate, as in \"20/s\", \"5/min\", \"100/h\""};

char *config_quote(const char *text)
{
	char *shown = strstr(text, "://") != NULL ? config_redact_uri(text) : memory_string(text);
	char *quoted = memory_zeroed(strlen(shown) + 2, 4);
	size_t length = 0, i = 0;
	quoted[length++] = '"';
	for (; shown[i] != '\0' && (i < QUOTE_LIMIT || (shown[i] & 0xc0) == 0x80); i++) {
		unsigned char byte = (unsigned char)shown[i];
		if (byte < 0x20 || byte == 0x7f)
			length += (size_t)snprintf(quoted + length, 5, "\\x%02x", byte);
		else
			quoted[length++] = (char)byte;
	}
	memcpy(quoted + length, shown[i] == '\0' ? "\"" : "…\"", shown[i] == '\0' ? 2 : 5);
	free(shown);
	return quoted;
}

/* A copy of how the user wrote it: strings in quotes, numbers bare. */
static char *as_written(enum config_kind kind, const char *text)
{
	return kind == CONFIG_KIND_NUMBER || kind == CONFIG_KIND_BOOLEAN ? memory_string(text) : config_quote(text);
}

/* Digits with at most one point; returns what follows, or NULL if there is no number. */
static const char *read_decimal(const char *text, double *number)
{
	double scale = 1;
	bool point = false, digits = false;
	*number = 0;
	for (; isdigit((unsigned char)*text) || (*text == '.' && !point && digits); text++) {
		if (*text == '.') {
			point = true;
			continue;
		}
		digits = true;
		*number = *number * 10 + (*text - '0');
		scale *= point ? 10 : 1;
	}
	*number /= scale;
	return digits ? text : NULL;
}

static const struct unit *find_unit(const struct unit *units, const char *name)
{
	for (; units->name != NULL; units++)
		if (strcmp(units->name, name) == 0)
			return units;
	return NULL;
}

/* A number with a unit, in the smallest unit. NULL or the complaint. */
static char *parse_quantity(const struct form *form, enum config_kind kind, const char *text, double *number)
{
	const char *rest = read_decimal(text, number);
	while (rest != NULL && *rest == ' ')
		rest++;
	const struct unit *unit = rest != NULL ? find_unit(form->units, rest) : NULL;
	if (unit != NULL) {
		*number *= unit->factor;
		return NULL;
	}
	if (rest != NULL && *rest == '\0' && *number == 0)
		return NULL;
	char *given = as_written(kind, text), *error;
	if (rest != NULL && *rest == '\0')
		error = memory_format("%s has no unit, write \"%s%s\" or \"%s%s\"", given, text, form->usual, text,
		                      form->other);
	else
		error = memory_format("%s is not %s", given, form->words);
	free(given);
	return error;
}

static char *parse_whole(enum config_kind kind, const char *text, int64_t *number)
{
	const char *digits = text[0] == '-' ? text + 1 : text;
	char *end;
	errno = 0;
	*number = strtoll(text, &end, 10);
	if (isdigit((unsigned char)digits[0]) && *end == '\0' && errno == 0)
		return NULL;
	char *given = as_written(kind, text);
	char *error = memory_format("%s is not a whole number", given);
	free(given);
	return error;
}

static char *parse_seed(enum config_kind kind, const char *text, struct config_value *value)
{
	char *end;
	errno = 0;
	value->yes = strcmp(text, "random") != 0;
	value->seed = strtoull(text, &end, 10);
	if (!value->yes || (isdigit((unsigned char)text[0]) && *end == '\0' && errno == 0))
		return NULL;
	char *given = as_written(kind, text);
	char *error = memory_format("%s is not a seed, allowed are 0 to 18446744073709551615 and \"random\"", given);
	free(given);
	return error;
}

static char *parse_boolean(enum config_kind kind, const char *text, bool *yes)
{
	*yes = strcmp(text, "true") == 0;
	if (*yes || strcmp(text, "false") == 0)
		return NULL;
	char *given = as_written(kind, text);
	char *error = memory_format("%s is neither true nor false", given);
	free(given);
	return error;
}

static char *parse_choice(const struct config_entry *entry, enum config_kind kind, const char *text, int64_t *number)
{
	char *allowed = memory_string("");
	for (const struct config_choice *choice = entry->choices; choice->name != NULL; choice++) {
		if (strcmp(choice->name, text) == 0) {
			*number = choice->value;
			free(allowed);
			return NULL;
		}
		char *longer = memory_format("%s%s%s", allowed, allowed[0] != '\0' ? ", " : "", choice->name);
		free(allowed);
		allowed = longer;
	}
	char *given = as_written(kind, text);
	char *error = memory_format("%s is none of: %s", given, allowed);
	free(given);
	free(allowed);
	return error;
}

static char *parse_amount(const struct config_entry *entry, enum config_kind kind, const char *text,
                          struct config_value *value)
{
	const struct form *form = entry->type == CONFIG_TYPE_SIZE   ? &SIZE_FORM
	                          : entry->type == CONFIG_TYPE_RATE ? &RATE_FORM
	                                                            : &DURATION_FORM;
	double number;
	char *error = parse_quantity(form, kind, text, &number);
	int64_t step = entry->type == CONFIG_TYPE_SECONDS ? 1000 : 1;
	value->rate = number;
	value->integer = number < 9e15 ? (int64_t)(number + 0.5) : INT64_MAX;
	bool whole = entry->type == CONFIG_TYPE_RATE || number >= 9e15 ||
	             (value->integer % step == 0 && (double)value->integer == number);
	if (error != NULL || whole)
		return error;
	char *given = as_written(kind, text);
	error = memory_format("%s must be whole %s", given,
	                      entry->type == CONFIG_TYPE_SIZE ? "bytes"
	                      : step > 1                      ? "seconds"
	                                                      : "milliseconds");
	free(given);
	return error;
}

void config_list_finish(struct config_list *list)
{
	for (size_t i = 0; i < list->count; i++)
		free(list->items[i]);
	free(list->items);
	*list = (struct config_list){0};
}

static void list_add(struct config_list *list, const char *text, size_t length)
{
	list->items = memory_resize(list->items, (list->count + 1) * sizeof *list->items);
	list->items[list->count++] = memory_format("%.*s", (int)length, text);
}

static char *add_array_items(bson_iter_t *item, struct config_list *list)
{
	for (int number = 1; bson_iter_next(item); number++) {
		uint32_t length;
		if (!BSON_ITER_HOLDS_UTF8(item))
			return memory_format("item %d of the list is no text in quotes", number);
		const char *text = bson_iter_utf8(item, &length);
		if (strlen(text) != length)
			return memory_string("holds a NUL character (\\u0000), take it out");
		list_add(list, text, length);
	}
	return NULL;
}

/* The JSON text of an array of strings. */
static char *parse_array(const char *text, struct config_list *list)
{
	struct buffer bytes = {0};
	struct json_fault fault;
	char *error = NULL;
	bson_iter_t iter, item;
	size_t start = 4, length = strlen(text);
	buffer_extend(&bytes, start); /* of the document around it */
	if (json_to_bson(text, length, "list", LIST_LIMIT, &bytes, &fault) != JSON_OK) {
		error = memory_format("is no list in JSON, as in [\"topic\", \"/id\"]: %s at byte %zu", fault.message,
		                      fault.offset);
	} else {
		buffer_append_byte(&bytes, 0);
		for (size_t i = 0; i < start; i++)
			bytes.data[i] = (uint8_t)(bytes.length >> (8 * i));
		if (bson_iter_init_from_data(&iter, bytes.data, bytes.length) && bson_iter_next(&iter) &&
		    bson_iter_recurse(&iter, &item))
			error = add_array_items(&item, list);
	}
	buffer_finish(&bytes);
	return error;
}

char *config_list_parse(const char *text, struct config_list *list)
{
	*list = (struct config_list){0};
	char *error = NULL;
	if (text[strspn(text, " \t\r\n")] == '[') {
		error = parse_array(text, list);
	} else {
		list_add(list, text, strcspn(text, ","));
		while ((text = strchr(text, ',')) != NULL) {
			text++;
			list_add(list, text, strcspn(text, ","));
		}
	}
	if (error != NULL)
		config_list_finish(list);
	return error;
}

/* A string in the file is the default's name: one item must be a list too, so that a second can join it. */
static char *parse_list(const struct config_entry *entry, enum config_kind kind, const char *text)
{
	const char *initial = entry->initial;
	if (kind == CONFIG_KIND_STRING && (initial == NULL || strcmp(text, initial) != 0)) {
		char *given = config_quote(text);
		char *error = initial != NULL
		                  ? memory_format("%s is neither \"%s\" nor a list, write [%s]", given, initial, given)
		                  : memory_format("%s is not a list, write [%s]", given, given);
		free(given);
		return error;
	}
	struct config_list list;
	char *error = config_list_parse(text, &list);
	config_list_finish(&list);
	return error;
}

static char *parse_by_type(const struct config_entry *entry, enum config_kind kind, const char *text,
                           struct config_value *value)
{
	switch (entry->type) {
	case CONFIG_TYPE_BOOLEAN:
		return parse_boolean(kind, text, &value->yes);
	case CONFIG_TYPE_INTEGER:
	case CONFIG_TYPE_COUNT:
		return parse_whole(kind, text, &value->integer);
	case CONFIG_TYPE_SEED:
		return parse_seed(kind, text, value);
	case CONFIG_TYPE_CHOICE:
		return parse_choice(entry, kind, text, &value->integer);
	case CONFIG_TYPE_TEXT:
	case CONFIG_TYPE_CONCERN:
		value->text = text;
		return NULL;
	case CONFIG_TYPE_LIST:
		value->text = text;
		return parse_list(entry, kind, text);
	default:
		return parse_amount(entry, kind, text, value);
	}
}

/* The table's own limits, parsed like any value: they are tested to be right. */
static char *check_range(const struct config_entry *entry, enum config_kind kind, const char *text,
                         const struct config_value *value)
{
	struct config_value least = {0}, most = {0};
	if (entry->least == NULL)
		return NULL;
	free(parse_by_type(entry, CONFIG_KIND_PLAIN, entry->least, &least));
	free(parse_by_type(entry, CONFIG_KIND_PLAIN, entry->most, &most));
	bool inside = entry->type == CONFIG_TYPE_RATE
	                  ? value->rate >= least.rate * (1 - 1e-9) && value->rate <= most.rate
	                  : value->integer >= least.integer && value->integer <= most.integer;
	if (inside)
		return NULL;
	char *given = entry->type == CONFIG_TYPE_INTEGER || entry->type == CONFIG_TYPE_COUNT ? memory_string(text)
	                                                                                     : as_written(kind, text);
	char *error = memory_format("%s is out of range, allowed are %s to %s", given, entry->least, entry->most);
	free(given);
	return error;
}

/* What the file must hold for this type, as words; NULL if a value of this kind is fine. */
static const char *wrong_kind(enum config_type type, enum config_kind kind)
{
	bool number = kind == CONFIG_KIND_NUMBER, string = kind == CONFIG_KIND_STRING;
	if (kind == CONFIG_KIND_PLAIN)
		return NULL;
	switch (type) {
	case CONFIG_TYPE_BOOLEAN:
		return kind == CONFIG_KIND_BOOLEAN ? NULL : "true or false, without quotes";
	case CONFIG_TYPE_INTEGER:
	case CONFIG_TYPE_COUNT:
		return number ? NULL : "a whole number, without quotes";
	case CONFIG_TYPE_TEXT:
		return string ? NULL : "a text in quotes";
	case CONFIG_TYPE_LIST:
		return string || kind == CONFIG_KIND_ARRAY ? NULL : "a list of texts in quotes, as in [\"a\", \"b\"]";
	case CONFIG_TYPE_DURATION:
	case CONFIG_TYPE_SECONDS:
		return string || number ? NULL : DURATION_FORM.words;
	case CONFIG_TYPE_SIZE:
		return string || number ? NULL : SIZE_FORM.words;
	case CONFIG_TYPE_RATE:
		return string || number ? NULL : RATE_FORM.words;
	default:
		return string || number ? NULL : "a text in quotes or a number";
	}
}

static const char *kind_words(enum config_kind kind)
{
	switch (kind) {
	case CONFIG_KIND_STRING:
		return "a text";
	case CONFIG_KIND_NUMBER:
		return "a number";
	case CONFIG_KIND_BOOLEAN:
		return "true or false";
	case CONFIG_KIND_OBJECT:
		return "an object";
	case CONFIG_KIND_ARRAY:
		return "a list";
	default:
		return "null";
	}
}

/* A value is shown as it was written; a list or object by its kind, and so is whatever stands where a secret belongs.
 */
static char *complain_of_kind(const struct config_entry *entry, enum config_kind kind, const char *text,
                              const char *wanted)
{
	bool simple = kind == CONFIG_KIND_STRING || kind == CONFIG_KIND_NUMBER || kind == CONFIG_KIND_BOOLEAN;
	char *given = simple && !entry->secret ? as_written(kind, text) : memory_string(kind_words(kind));
	char *error = memory_format("is %s, must be %s", given, wanted);
	free(given);
	return error;
}

char *config_value_parse(const struct config_entry *entry, enum config_kind kind, const char *text,
                         struct config_value *value)
{
	*value = (struct config_value){0};
	if (kind == CONFIG_KIND_NULL)
		return memory_string("is null; give a value or leave it out to get the default");
	const char *wanted = wrong_kind(entry->type, kind);
	if (wanted != NULL)
		return complain_of_kind(entry, kind, text, wanted);
	if (text[0] == '\0')
		return memory_string("is empty; give a value or leave it out to get the default");
	char *error = parse_by_type(entry, kind, text, value);
	return error != NULL ? error : check_range(entry, kind, text, value);
}
