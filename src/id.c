/* See id.h. */
#include "id.h"

#include "memory.h"
#include "utf8.h"

#include <stdlib.h>
#include <string.h>

static const char OBJECTID[] = "objectid", TOPIC[] = "topic", PROPERTY[] = "user-property:";

/* ---- the rule ---- */

static bool is_utf8(const char *text)
{
	for (const uint8_t *at = (const uint8_t *)text; *at != 0; at += utf8_character(at))
		if (utf8_character(at) == 0)
			return false;
	return true;
}

/* The keys of a pointer that starts with a slash. NULL when a ~ is followed by neither 0 nor 1 (RFC 6901 §3). */
static char *unescape(const char *pointer, size_t *token_count)
{
	char *tokens = memory_string(pointer + 1), *to = tokens;
	*token_count = 1;
	for (const char *at = pointer + 1; *at != 0; at++) {
		if (*at == '/') {
			*to++ = 0;
			++*token_count;
		} else if (*at != '~') {
			*to++ = *at;
		} else if (at[1] == '0' || at[1] == '1') {
			*to++ = *++at == '0' ? '~' : '/';
		} else {
			free(tokens);
			return NULL;
		}
	}
	*to = 0;
	return tokens;
}

static char *parse_part(struct id_part *part, const char *text)
{
	size_t prefix = sizeof PROPERTY - 1;
	if (!is_utf8(text))
		return memory_string("a part is not UTF-8");
	if (strcmp(text, TOPIC) == 0) {
		*part = (struct id_part){.kind = ID_TOPIC, .name = memory_string(TOPIC)};
	} else if (text[0] == '/') {
		size_t count;
		char *tokens = unescape(text, &count);
		if (tokens == NULL)
			return memory_format("\"%s\": a ~ in a pointer must be ~0, which stands for ~, or ~1, which "
			                     "stands for /",
			                     text);
		*part = (struct id_part){
		    .kind = ID_POINTER, .name = memory_string(text + 1), .tokens = tokens, .token_count = count};
	} else if (strncmp(text, PROPERTY, prefix) == 0 && text[prefix] != 0) {
		*part = (struct id_part){.kind = ID_PROPERTY, .name = memory_string(text + prefix)};
	} else if (strncmp(text, PROPERTY, prefix) == 0) {
		return memory_format("\"%s\": the name of the property is missing, as in \"%smessage-id\"", text,
		                     PROPERTY);
	} else if (strcmp(text, OBJECTID) == 0) {
		return memory_string("\"objectid\" stands alone: it is no part of a message");
	} else {
		return memory_format("\"%s\" is no part of a message, allowed are \"topic\", a pointer into the "
		                     "payload as \"/%s\", and \"%s%s\"",
		                     text, text[0] != 0 ? text : "id", PROPERTY, text[0] != 0 ? text : "message-id");
	}
	return NULL;
}

/* What keeps the part from being a field of the _id beside those before it. */
static char *field_fault(const struct id_rule *rule, const struct id_part *part, const char *text)
{
	if (part->name[0] == 0)
		return memory_format("\"%s\": its field in the _id would have no name; it can only stand alone", text);
	if (part->name[0] == '$')
		return memory_format("\"%s\": MongoDB takes no field in an _id that starts with $; it can only stand "
		                     "alone",
		                     text);
	for (const struct id_part *other = rule->parts; other != part; other++)
		if (strcmp(other->name, part->name) == 0)
			return memory_format("\"%s\": another part is named \"%s\" as well, leave one of them out",
			                     text, part->name);
	return NULL;
}

char *id_rule_parse(struct id_rule *rule, const char *const *parts, size_t count)
{
	*rule = (struct id_rule){0};
	if (count == 1 && strcmp(parts[0], OBJECTID) == 0)
		return NULL;
	if (count == 0)
		return memory_string("the list is empty, write \"objectid\" for none");
	if (count > ID_PARTS_MOST)
		return memory_format("has %zu parts, the most are %d", count, ID_PARTS_MOST);
	char *fault = NULL;
	rule->parts = memory_zeroed(count, sizeof *rule->parts);
	while (fault == NULL && rule->count < count) {
		struct id_part *part = &rule->parts[rule->count];
		const char *text = parts[rule->count];
		fault = parse_part(part, text);
		if (fault == NULL && count > 1)
			fault = field_fault(rule, part, text);
		rule->count++; /* also after a fault, so that it is freed */
		rule->property_count += part->kind == ID_PROPERTY;
	}
	if (fault != NULL)
		id_rule_finish(rule);
	return fault;
}

void id_rule_finish(struct id_rule *rule)
{
	for (size_t i = 0; i < rule->count; i++) {
		free(rule->parts[i].name);
		free(rule->parts[i].tokens);
	}
	free(rule->parts);
	*rule = (struct id_rule){0};
}

/* ---- user properties ---- */

void id_keep_property(struct buffer *run, const char *name, const char *value)
{
	size_t length = strlen(value);
	if (length > ID_TEXT_MOST)
		return;
	buffer_append(run, name, strlen(name) + 1);
	buffer_append(run, value, length + 1);
}

bool id_next_property(const char **at, const char *end, const char **name, const char **value)
{
	const char *name_end = *at < end ? memchr(*at, 0, (size_t)(end - *at)) : NULL;
	const char *value_end = name_end != NULL ? memchr(name_end + 1, 0, (size_t)(end - name_end - 1)) : NULL;
	if (value_end == NULL)
		return false;
	*name = *at;
	*value = name_end + 1;
	*at = value_end + 1;
	return true;
}

static const char *find_property(const struct id_source *source, const char *wanted)
{
	const char *at = source->properties, *name, *value;
	if (source->properties_length == 0)
		return NULL;
	while (id_next_property(&at, source->properties + source->properties_length, &name, &value))
		if (strcmp(name, wanted) == 0)
			return value;
	return NULL;
}

/* ---- the _id ---- */

/* From a document or array to what it has under a key. An array's elements have their index as key, without leading
 * zeros, which is also how RFC 6901 §4 has it. */
static bool descend(bson_iter_t *value, const char *key)
{
	const uint8_t *bytes;
	uint32_t length;
	if (BSON_ITER_HOLDS_DOCUMENT(value))
		bson_iter_document(value, &length, &bytes);
	else if (BSON_ITER_HOLDS_ARRAY(value))
		bson_iter_array(value, &length, &bytes);
	else
		return false;
	return bson_iter_init_from_data(value, bytes, length) && bson_iter_find(value, key);
}

/* Follow the pointer into the payload. */
static bool follow(const struct id_part *part, const struct id_source *source, bson_iter_t *value)
{
	const char *token = part->tokens;
	bool found = bson_iter_init_from_data(value, source->document, source->document_length) &&
	             bson_iter_find(value, "payload");
	for (size_t i = 0; i < part->token_count && found; i++, token += strlen(token) + 1)
		found = descend(value, token);
	return found;
}

static bool is_usable(const bson_iter_t *value)
{
	uint32_t length;
	switch (bson_iter_type(value)) {
	case BSON_TYPE_UTF8:
		bson_iter_utf8(value, &length);
		return length <= ID_TEXT_MOST;
	case BSON_TYPE_INT32:
	case BSON_TYPE_INT64:
	case BSON_TYPE_DOUBLE:
	case BSON_TYPE_DECIMAL128:
	case BSON_TYPE_BOOL:
		return true;
	default:
		return false;
	}
}

static bool append_text(bson_t *out, const char *name, const char *text, size_t length)
{
	return length <= ID_TEXT_MOST && bson_append_utf8(out, name, -1, text, (int)length);
}

static bool append_part(const struct id_part *part, const struct id_source *source, bson_t *out, const char *name)
{
	const char *property;
	bson_iter_t value;
	switch (part->kind) {
	case ID_TOPIC:
		return append_text(out, name, source->topic, source->topic_length);
	case ID_PROPERTY:
		property = find_property(source, part->name);
		return property != NULL && is_utf8(property) && append_text(out, name, property, strlen(property));
	case ID_POINTER:
		return follow(part, source, &value) && is_usable(&value) && bson_append_iter(out, name, -1, &value);
	}
	return false;
}

bool id_build(const struct id_rule *rule, const struct id_source *source, bson_t *out)
{
	if (rule->count == 0)
		return false;
	if (rule->count == 1)
		return append_part(&rule->parts[0], source, out, "_id");
	bson_t fields;
	bson_init(&fields);
	bool built = true;
	for (size_t i = 0; i < rule->count && built; i++)
		built = append_part(&rule->parts[i], source, &fields, rule->parts[i].name);
	built = built && bson_append_document(out, "_id", -1, &fields);
	bson_destroy(&fields);
	return built;
}
