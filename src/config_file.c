/*
 * The configuration file: JSON with // and slash-star comments. Start-up only, main thread.
 *
 * Four steps. Comments become spaces, so every byte keeps its offset. json_to_bson() checks the rest by RFC 8259 and
 * says exactly where it fails. cJSON, which takes more than RFC 8259 but has no positions, builds the tree. A scan
 * lists every object key in the order of the text; walking the tree takes the next of them for each member, so each
 * value has its line, and a number its digits as they were written.
 *
 * What the file held is wiped before it is freed: there may be secrets in it.
 */
#define _GNU_SOURCE
#include "config_table.h"

#include "buffer.h"
#include "json.h"
#include "memory.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { FILE_LIMIT = 1 << 20, BSON_LIMIT = 64 << 20 };

/* One object key of the text. */
struct key {
	unsigned line;
	const char *value; /* its value's first byte */
};

struct reader {
	struct config_loader *loader;
	const char *path;
	char *text; /* comments blanked */
	size_t length;
	struct key *keys;
	size_t key_count, next_key;
};

char *config_slurp(const char *path, size_t limit, size_t *length)
{
	FILE *file = fopen(path, "re");
	if (file == NULL)
		return NULL;
	char *text = memory_zeroed(1, limit + 2);
	*length = fread(text, 1, limit + 1, file);
	int failure = ferror(file) ? errno : *length > limit ? EFBIG : 0;
	fclose(file);
	if (failure == 0)
		return text;
	explicit_bzero(text, *length);
	free(text);
	errno = failure;
	return NULL;
}

/* The quote that ends the string which starts at `text`, or the end of the text. */
static size_t string_end(const char *text, size_t at, size_t length)
{
	for (at++; at < length && text[at] != '"'; at++)
		if (text[at] == '\\')
			at++;
	return at < length ? at : length;
}

/* The first byte behind the comment that starts at `at`; behind the text if it is not closed. */
static size_t comment_end(const char *text, size_t at, size_t length)
{
	if (text[at + 1] == '/') {
		const char *line_feed = memchr(text + at, '\n', length - at);
		return line_feed != NULL ? (size_t)(line_feed - text) : length;
	}
	const char *end = length - at > 2 ? memmem(text + at + 2, length - at - 2, "*/", 2) : NULL;
	return end != NULL ? (size_t)(end - text) + 2 : length + 1;
}

/* Turn comments into spaces. Returns the offset of a comment that is not closed, or `length`. */
static size_t blank_comments(char *text, size_t length)
{
	for (size_t at = 0; at < length; at++) {
		if (text[at] == '"')
			at = string_end(text, at, length);
		if (at >= length || text[at] != '/' || (text[at + 1] != '/' && text[at + 1] != '*'))
			continue;
		size_t end = comment_end(text, at, length);
		if (end > length)
			return at;
		for (; at < end; at++)
			if (text[at] != '\n')
				text[at] = ' ';
		at--;
	}
	return length;
}

/* Complain about the byte at `offset` as file:line:column. */
static void error_at(struct reader *reader, size_t offset, const char *message)
{
	unsigned line = 1, column = 1;
	for (size_t i = 0; i < offset; i++) {
		column++;
		if (reader->text[i] == '\n') {
			line++;
			column = 1;
		}
	}
	config_error(reader->loader, "%s:%u:%u: %s", reader->path, line, column, message);
}

static bool check_syntax(struct reader *reader)
{
	struct buffer discarded = {0};
	struct json_fault fault;
	enum json_code code = json_to_bson(reader->text, reader->length, "", BSON_LIMIT, &discarded, &fault);
	if (discarded.data != NULL)
		explicit_bzero(discarded.data, discarded.capacity);
	buffer_finish(&discarded);
	if (code == JSON_EMPTY)
		error_at(reader, fault.offset, "the file is empty, the least it can hold is {}");
	else if (code != JSON_OK)
		error_at(reader, fault.offset, fault.message);
	return code == JSON_OK;
}

/* List the keys. In valid JSON, a string before a colon is a key, and nothing else is. */
static void find_keys(struct reader *reader)
{
	const char *text = reader->text;
	unsigned line = 1;
	for (size_t at = 0; at < reader->length; at++) {
		line += text[at] == '\n';
		if (text[at] != '"')
			continue;
		at = string_end(text, at, reader->length);
		size_t behind = at + 1 + strspn(text + at + 1, " \t\r\n");
		if (text[behind] != ':')
			continue;
		reader->keys = memory_resize(reader->keys, (reader->key_count + 1) * sizeof *reader->keys);
		behind += 1 + strspn(text + behind + 1, " \t\r\n");
		reader->keys[reader->key_count++] = (struct key){line, text + behind};
	}
}

/* The string literal at `value` has an escaped NUL, at which a C string would end. */
static bool holds_nul(const char *value)
{
	for (value++; *value != '"' && *value != '\0'; value++) {
		if (*value != '\\')
			continue;
		value++;
		if (strncmp(value, "u0000", 5) == 0)
			return true;
	}
	return false;
}

static enum config_kind kind_of(const cJSON *item)
{
	return cJSON_IsString(item)   ? CONFIG_KIND_STRING
	       : cJSON_IsNumber(item) ? CONFIG_KIND_NUMBER
	       : cJSON_IsBool(item)   ? CONFIG_KIND_BOOLEAN
	       : cJSON_IsObject(item) ? CONFIG_KIND_OBJECT
	       : cJSON_IsArray(item)  ? CONFIG_KIND_ARRAY
	                              : CONFIG_KIND_NULL;
}

/* The length of the array at `text`, with its brackets. It is valid JSON. */
static size_t array_length(const char *text)
{
	size_t at = 0, length = strlen(text);
	for (int depth = 0; at < length; at++) {
		if (text[at] == '"')
			at = string_end(text, at, length);
		else if (text[at] == '[')
			depth++;
		else if (text[at] == ']' && --depth == 0)
			return at + 1;
	}
	return length;
}

/* The value as text: a string's contents, else the literal or array as it stands in the file. Allocated. */
static char *text_of(const cJSON *item, const struct key *key)
{
	if (cJSON_IsString(item))
		return memory_string(item->valuestring);
	if (cJSON_IsArray(item))
		return memory_format("%.*s", (int)array_length(key->value), key->value);
	return memory_format("%.*s", (int)strcspn(key->value, " \t\r\n,}]{["), key->value);
}

static void offer_value(struct reader *reader, const struct config_entry *entry, const cJSON *item,
                        const struct key *key)
{
	char *place = memory_format("%s:%u: %s", reader->path, key->line, entry->key);
	char *text = text_of(item, key);
	if (cJSON_IsString(item) && holds_nul(key->value))
		config_error(reader->loader, "%s: holds a NUL character (\\u0000), take it out", place);
	else
		config_offer(reader->loader, CONFIG_SOURCE_FILE, entry, kind_of(item), text, place);
	memory_wipe_free(text);
	free(place);
}

static bool is_duplicate(const cJSON *object, const cJSON *item)
{
	for (const cJSON *earlier = object->child; earlier != item; earlier = earlier->next)
		if (strcmp(earlier->string, item->string) == 0)
			return true;
	return false;
}

/* Step over the keys inside a value nobody wants. */
static void skip_keys(struct reader *reader, const cJSON *value)
{
	for (const cJSON *item = value->child; item != NULL; item = item->next) {
		reader->next_key += item->string != NULL;
		skip_keys(reader, item);
	}
}

static void unknown_key(struct reader *reader, const char *name, const struct key *key)
{
	char *hint = config_suggest(CONFIG_SOURCE_FILE, name, strlen(name)), *shown = config_quote(name);
	config_error(reader->loader, "%s:%u: unknown key %s%s", reader->path, key->line, shown, hint);
	free(shown);
	free(hint);
}

/* The next key of the text. The scan and cJSON agree on their number, or one of them is wrong. */
static const struct key *take_key(struct reader *reader)
{
	if (reader->keys == NULL || reader->next_key >= reader->key_count)
		abort();
	return &reader->keys[reader->next_key++];
}

static void read_object(struct reader *reader, const cJSON *object, const char *section);

static void read_member(struct reader *reader, const cJSON *object, const cJSON *item, const char *name)
{
	const struct key *key = take_key(reader);
	bool dotted = strchr(item->string, '.') != NULL, section = !dotted && config_is_section(name);
	const struct config_entry *entry = dotted ? NULL : config_entry_find(name);
	if (section && cJSON_IsObject(item) && !is_duplicate(object, item)) {
		read_object(reader, item, name);
		return;
	}
	skip_keys(reader, item);
	if (is_duplicate(object, item))
		config_error(reader->loader, "%s:%u: %s is in the file twice, keep one", reader->path, key->line, name);
	else if (entry != NULL)
		offer_value(reader, entry, item, key);
	else if (section)
		config_error(reader->loader, "%s:%u: %s is a section, must be an object: \"%s\": { … }", reader->path,
		             key->line, name, item->string);
	else if (dotted)
		config_error(reader->loader,
		             "%s:%u: \"%s\" must be nested, one object for each dot, as in \"mqtt\": { \"host\": … }",
		             reader->path, key->line, item->string);
	else
		unknown_key(reader, name, key);
}

static void read_object(struct reader *reader, const cJSON *object, const char *section)
{
	for (const cJSON *item = object->child; item != NULL; item = item->next) {
		char *name = memory_format("%s%s%s", section, section[0] != '\0' ? "." : "", item->string);
		read_member(reader, object, item, name);
		free(name);
	}
}

static void wipe_strings(cJSON *value)
{
	if (cJSON_IsString(value))
		explicit_bzero(value->valuestring, strlen(value->valuestring));
	for (cJSON *item = value->child; item != NULL; item = item->next)
		wipe_strings(item);
}

static void read_tree(struct reader *reader)
{
	cJSON *root = cJSON_ParseWithLength(reader->text, reader->length);
	if (root == NULL) {
		error_at(reader, (size_t)(cJSON_GetErrorPtr() - reader->text), "a number has too many digits");
	} else if (!cJSON_IsObject(root)) {
		error_at(reader, strspn(reader->text, " \t\r\n"), "the file must hold one object: { … }");
	} else {
		find_keys(reader);
		read_object(reader, root, "");
	}
	if (root != NULL)
		wipe_strings(root);
	cJSON_Delete(root);
	free(reader->keys);
}

void config_file_read(struct config_loader *loader)
{
	struct reader reader = {.loader = loader, .path = loader->config->file};
	reader.text = config_slurp(reader.path, FILE_LIMIT, &reader.length);
	if (reader.text == NULL) {
		config_error(loader, "cannot read %s: %s", reader.path, strerror(errno));
		return;
	}
	size_t open_comment = blank_comments(reader.text, reader.length);
	if (open_comment < reader.length)
		error_at(&reader, open_comment, "the comment that starts here is not closed with */");
	else if (check_syntax(&reader))
		read_tree(&reader);
	explicit_bzero(reader.text, reader.length);
	free(reader.text);
}
