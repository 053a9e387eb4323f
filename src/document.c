/*
 * See document.h. BSON is written here as bytes (bsonspec.org, version 1.1): the envelope is fixed and small, and a
 * worker builds tens of thousands of them a second.
 */
#include "document.h"

#include "escape.h"
#include "utf8.h"

#include <stdio.h>
#include <string.h>

enum {
	BSON_STRING_TYPE = 0x02,
	BSON_DOCUMENT_TYPE = 0x03,
	BSON_BINARY_TYPE = 0x05,
	BSON_OID_TYPE = 0x07,
	BSON_BOOL_TYPE = 0x08,
	BSON_DATE_TYPE = 0x09,
	BSON_INT32_TYPE = 0x10,
	BSON_INT64_TYPE = 0x12,
};

enum {
	PREVIEW_CHARACTERS = 120,
	OBJECT_ID_ELEMENT = 1 + sizeof "_id" + 12,
	ENVELOPE_TAIL = 128, /* more than received_at, qos, retain, dup and the closing byte take */
};

static void put_uint32_at(uint8_t *place, uint32_t value)
{
	for (int i = 0; i < 4; i++)
		place[i] = (uint8_t)(value >> (8 * i));
}

static void put_int32(struct buffer *out, int32_t value)
{
	put_uint32_at(buffer_extend(out, 4), (uint32_t)value);
}

static void put_int64(struct buffer *out, int64_t value)
{
	put_int32(out, (int32_t)((uint64_t)value & 0xffffffffu));
	put_int32(out, (int32_t)((uint64_t)value >> 32));
}

static void put_name(struct buffer *out, int type, const char *name)
{
	buffer_append_byte(out, (uint8_t)type);
	buffer_append(out, name, strlen(name) + 1);
}

static size_t open_document(struct buffer *out)
{
	size_t start = out->length;
	buffer_extend(out, 4);
	return start;
}

static void close_document(struct buffer *out, size_t start)
{
	buffer_append_byte(out, 0);
	put_uint32_at(out->data + start, (uint32_t)(out->length - start));
}

static void put_string_element(struct buffer *out, const char *name, const char *text, size_t length)
{
	put_name(out, BSON_STRING_TYPE, name);
	put_int32(out, (int32_t)length + 1);
	buffer_append(out, text, length);
	buffer_append_byte(out, 0);
}

static void put_bool_element(struct buffer *out, const char *name, bool value)
{
	put_name(out, BSON_BOOL_TYPE, name);
	buffer_append_byte(out, value);
}

static void put_int64_element(struct buffer *out, const char *name, int64_t value)
{
	put_name(out, BSON_INT64_TYPE, name);
	put_int64(out, value);
}

static void put_binary_element(struct buffer *out, const char *name, const void *bytes, size_t length)
{
	put_name(out, BSON_BINARY_TYPE, name);
	put_int32(out, (int32_t)length);
	buffer_append_byte(out, BSON_SUBTYPE_BINARY);
	buffer_append(out, bytes, length);
}

/* Append one character for people, or a byte that is none: what would mislead them becomes \xNN or \uNNNN. Returns the
 * bytes of `text` used. */
static size_t put_shown(struct buffer *out, const char *text, bool preview)
{
	const uint8_t *character = (const uint8_t *)text;
	size_t step = utf8_character(character);
	char escape[ESCAPE_SIZE] = "";
	if (step == 0 || *character < 0x20 || *character == 0x7f)
		snprintf(escape, sizeof escape, "\\x%02x", *character);
	else if (preview)
		escape_character(text, ESCAPE_TEXT, escape);
	if (escape[0] != '\0')
		buffer_append(out, escape, strlen(escape));
	else
		buffer_append(out, text, step);
	return step > 0 ? step : 1;
}

/* A string element from any bytes, at most `most` characters of them: controls of ASCII and what is no UTF-8 become
 * \xNN; in a preview, which is for terminals, the other controls as well (escape.h). */
static void put_escaped_element(struct buffer *out, const char *name, const char *text, size_t length, size_t most)
{
	bool preview = strcmp(name, "preview") == 0;
	put_name(out, BSON_STRING_TYPE, name);
	size_t start = out->length;
	put_int32(out, 0);
	for (size_t at = 0; at < length && most > 0; most--)
		at += put_shown(out, text + at, preview);
	buffer_append_byte(out, 0);
	put_uint32_at(out->data + start, (uint32_t)(out->length - start - 4));
}

/* As it came, so that the message can be stored from its dead letter; shown where BSON cannot hold it. */
static void put_topic(struct buffer *out, const char *topic, size_t length)
{
	if (utf8_is_text(topic, length))
		put_string_element(out, "topic", topic, length);
	else
		put_escaped_element(out, "topic", topic, length, length);
}

static void put_id(struct buffer *out, const struct batch_message *message)
{
	put_name(out, BSON_OID_TYPE, "_id");
	buffer_append(out, message->id.bytes, sizeof message->id.bytes);
}

/* The fields every document ends with. */
static void put_delivery(struct buffer *out, const struct batch_message *message)
{
	put_name(out, BSON_DATE_TYPE, "received_at");
	put_int64(out, message->received_at);
	put_name(out, BSON_INT32_TYPE, "qos");
	put_int32(out, message->qos);
	put_bool_element(out, "retain", message->retain);
	put_bool_element(out, "dup", message->dup);
}

const char *document_reason_name(enum document_reason reason)
{
	switch (reason) {
	case DOCUMENT_TOPIC_UTF8:
		return "topic_not_utf8";
	case DOCUMENT_PAYLOAD_SIZE:
		return "payload_too_large";
	case DOCUMENT_REFUSED:
		return "refused_by_mongodb";
	case DOCUMENT_UNIQUE_INDEX:
		return "unique_index";
	case DOCUMENT_ID_CONFLICT:
		return "id_conflict";
	default:
		return json_code_name((enum json_code)reason);
	}
}

static bool refuse(struct document_fault *fault, int reason, const char *text, size_t offset)
{
	*fault = (struct document_fault){.reason = (enum document_reason)reason, .message = text, .offset = offset};
	return false;
}

/* Put `length` bytes where the ObjectId element of the document at `start` is. */
static void replace_id(struct buffer *out, size_t start, const uint8_t *element, size_t length)
{
	size_t id = start + 4, behind = id + OBJECT_ID_ELEMENT, rest = out->length - behind;
	if (length > OBJECT_ID_ELEMENT)
		buffer_extend(out, length - OBJECT_ID_ELEMENT);
	memmove(out->data + id + length, out->data + behind, rest);
	memcpy(out->data + id, element, length);
	out->length = id + length + rest;
	put_uint32_at(out->data + start, (uint32_t)(out->length - start));
}

/* Give the document at `start`, complete with its ObjectId, the _id that the rule makes of the message, if it has one.
 * False when the document would become too large. */
static bool apply_rule(const struct id_rule *rule, const struct batch *batch, const struct batch_message *message,
                       struct buffer *out, size_t start)
{
	struct id_source source = {
	    .topic = batch_topic(batch, message),
	    .topic_length = message->topic_length,
	    .document = out->data + start,
	    .document_length = out->length - start,
	    .properties = batch_properties(batch, message),
	    .properties_length = message->properties_length,
	};
	bson_t id;
	bson_init(&id);
	bool fits = true;
	if (id_build(rule, &source, &id)) {
		size_t length = id.len - 5; /* without its own length and closing byte */
		fits = out->length - start - OBJECT_ID_ELEMENT + length <= DOCUMENT_MAX_BYTES;
		if (fits)
			replace_id(out, start, bson_get_data(&id) + 4, length);
	}
	bson_destroy(&id);
	return fits;
}

bool document_build(const struct batch *batch, const struct batch_message *message, const struct id_rule *rule,
                    struct buffer *out, struct document_fault *fault)
{
	const char *topic = batch_topic(batch, message);
	/* First: this reason tells that the dead letter lacks the topic. */
	if (!utf8_is_text(topic, message->topic_length))
		return refuse(fault, DOCUMENT_TOPIC_UTF8, "topic is not UTF-8", 0);
	if (message->oversized)
		return refuse(fault, DOCUMENT_PAYLOAD_SIZE, "payload above consumer.max_payload", 0);

	size_t start = open_document(out);
	put_id(out, message);
	put_string_element(out, "topic", topic, message->topic_length);
	size_t limit = DOCUMENT_MAX_BYTES - (out->length - start) - ENVELOPE_TAIL;
	struct json_fault json;
	if (json_to_bson(batch_payload(batch, message), message->payload_length, "payload", limit, out, &json) !=
	    JSON_OK) {
		out->length = start;
		return refuse(fault, (int)json.code, json.message, json.offset);
	}
	put_delivery(out, message);
	close_document(out, start);
	if (rule->count > 0 && !apply_rule(rule, batch, message, out, start)) {
		out->length = start;
		return refuse(fault, JSON_TOO_LARGE, "the document with its _id would be too large",
		              message->payload_length);
	}
	return true;
}

/* The user properties that were kept; they are text unless the broker let something else through. */
static void put_properties(struct buffer *out, const struct batch *batch, const struct batch_message *message)
{
	const char *at = batch_properties(batch, message), *end = at + message->properties_length, *name, *value;
	put_name(out, BSON_DOCUMENT_TYPE, "user_properties");
	size_t properties = open_document(out);
	while (id_next_property(&at, end, &name, &value)) {
		if (utf8_is_text(value, strlen(value)))
			put_string_element(out, name, value, strlen(value));
		else
			put_binary_element(out, name, value, strlen(value));
	}
	close_document(out, properties);
}

void document_dead_letter(const struct batch *batch, const struct batch_message *message,
                          const struct document_fault *fault, const char *route, struct buffer *out)
{
	const char *payload = batch_payload(batch, message);
	const char *code = document_reason_name(fault->reason);
	size_t start = open_document(out);
	put_id(out, message);
	put_topic(out, batch_topic(batch, message), message->topic_length);
	put_binary_element(out, "payload", payload, message->payload_length);
	put_escaped_element(out, "preview", payload, message->payload_length, PREVIEW_CHARACTERS);

	put_name(out, BSON_DOCUMENT_TYPE, "reason");
	size_t reason = open_document(out);
	put_string_element(out, "code", code, strlen(code));
	put_escaped_element(out, "message", fault->message, strlen(fault->message), 1000);
	put_int64_element(out, "offset", (int64_t)fault->offset);
	close_document(out, reason);

	put_delivery(out, message);
	put_escaped_element(out, "route", route, strlen(route), strlen(route));
	if (message->properties_length > 0)
		put_properties(out, batch, message);
	if (batch_is_cut(message)) {
		put_bool_element(out, "truncated", true);
		put_int64_element(out, "length", message->full_length);
		put_binary_element(out, "sha256", batch->arena.data + message->digest, BATCH_DIGEST_BYTES);
	}
	close_document(out, start);
}

/* ---- a dead letter read back ---- */

enum field {
	ID,
	TOPIC,
	PAYLOAD,
	PREVIEW,
	REASON,
	RECEIVED_AT,
	QOS,
	RETAIN,
	DUP,
	ROUTE,
	NEEDED,
	PROPERTIES = NEEDED,
	CUT,
	FIELDS = CUT + 3
};

static const struct {
	const char *name;
	bson_type_t type;
} fields[FIELDS] = {
    [ID] = {"_id", BSON_TYPE_OID},
    [TOPIC] = {"topic", BSON_TYPE_UTF8},
    [PAYLOAD] = {"payload", BSON_TYPE_BINARY},
    [PREVIEW] = {"preview", BSON_TYPE_UTF8},
    [REASON] = {"reason", BSON_TYPE_DOCUMENT},
    [RECEIVED_AT] = {"received_at", BSON_TYPE_DATE_TIME},
    [QOS] = {"qos", BSON_TYPE_INT32},
    [RETAIN] = {"retain", BSON_TYPE_BOOL},
    [DUP] = {"dup", BSON_TYPE_BOOL},
    [ROUTE] = {"route", BSON_TYPE_UTF8},
    [PROPERTIES] = {"user_properties", BSON_TYPE_DOCUMENT},
    [CUT] = {"truncated", BSON_TYPE_BOOL},
    [CUT + 1] = {"length", BSON_TYPE_INT64},
    [CUT + 2] = {"sha256", BSON_TYPE_BINARY},
};

static int field_named(const char *name)
{
	int field = 0;
	while (field < FIELDS && strcmp(name, fields[field].name) != 0)
		field++;
	return field;
}

static bool has_code(const bson_iter_t *reason, const char *code)
{
	bson_iter_t iter;
	return bson_iter_recurse(reason, &iter) && bson_iter_find(&iter, "code") && BSON_ITER_HOLDS_UTF8(&iter) &&
	       strcmp(bson_iter_utf8(&iter, NULL), code) == 0;
}

/* The user properties as they are kept with a message. False: they cannot be ours. */
static bool read_properties(const bson_iter_t *iter, struct buffer *properties)
{
	bson_iter_t pair;
	bool known = bson_iter_recurse(iter, &pair);
	while (known && bson_iter_next(&pair)) {
		bson_subtype_t subtype;
		const uint8_t *bytes = NULL;
		uint32_t length = 0;
		if (BSON_ITER_HOLDS_UTF8(&pair))
			bytes = (const uint8_t *)bson_iter_utf8(&pair, &length);
		else if (BSON_ITER_HOLDS_BINARY(&pair))
			bson_iter_binary(&pair, &subtype, &length, &bytes);
		char *value = bytes != NULL ? strndup((const char *)bytes, length) : NULL;
		known = value != NULL && strlen(value) == length;
		if (known)
			id_keep_property(properties, bson_iter_key(&pair), value);
		free(value);
	}
	return known;
}

/* Keep a field of the right type in `record`. False: its value cannot be one of ours. */
static bool read_field(int field, const bson_iter_t *iter, struct batch_record *record, enum document_letter *kind,
                       struct buffer *properties)
{
	bson_subtype_t subtype;
	const uint8_t *bytes;
	switch (field) {
	case ID:
		record->id = *bson_iter_oid(iter);
		return true;
	case TOPIC:
		record->topic = bson_iter_utf8(iter, &record->topic_length);
		return utf8_is_text(record->topic, record->topic_length);
	case PAYLOAD:
		bson_iter_binary(iter, &subtype, &record->payload_length, &bytes);
		record->payload = bytes;
		record->full_length = record->payload_length;
		return subtype == BSON_SUBTYPE_BINARY;
	case REASON:
		if (has_code(iter, document_reason_name(DOCUMENT_TOPIC_UTF8)))
			*kind = DOCUMENT_LETTER_TOPIC;
		return true;
	case RECEIVED_AT:
		record->received_at = bson_iter_date_time(iter);
		return true;
	case QOS:
		record->qos = (uint8_t)bson_iter_int32(iter);
		return bson_iter_int32(iter) >= 0 && bson_iter_int32(iter) <= 2;
	case PROPERTIES:
		return read_properties(iter, properties);
	case RETAIN:
		record->retain = bson_iter_bool(iter);
		return true;
	case DUP:
		record->dup = bson_iter_bool(iter);
		return true;
	default:
		return true;
	}
}

enum document_letter document_read_dead_letter(const bson_t *letter, struct batch_record *record,
                                               struct buffer *properties)
{
	bson_iter_t iter;
	bool seen[FIELDS] = {false};
	enum document_letter kind = DOCUMENT_LETTER_WHOLE;
	*record = (struct batch_record){0};
	properties->length = 0;
	if (!bson_iter_init(&iter, letter))
		return DOCUMENT_LETTER_STRANGE;
	while (bson_iter_next(&iter)) {
		int field = field_named(bson_iter_key(&iter));
		if (field == FIELDS || seen[field] || bson_iter_type(&iter) != fields[field].type ||
		    !read_field(field, &iter, record, &kind, properties))
			return DOCUMENT_LETTER_STRANGE;
		seen[field] = true;
	}
	for (int field = 0; field < NEEDED; field++)
		if (!seen[field])
			return DOCUMENT_LETTER_STRANGE;
	record->properties = properties->data;
	record->properties_length = (uint32_t)properties->length;
	return seen[CUT] ? DOCUMENT_LETTER_TRUNCATED : kind;
}
