/*
 * consumer.id: the rule that makes a document's _id from its message, so that a message that is delivered twice meets
 * itself in the database. Pure: no clock, no socket, no global. A rule is parsed once at start-up and read-only from
 * then on, so any thread may use it.
 *
 *   objectid             no rule: each delivery gets an ObjectId of its own
 *   topic                the topic, a string
 *   /pointer             the value in the payload that the JSON pointer (RFC 6901) leads to, with the BSON type it is
 *                        stored with; of equal keys the first
 *   user-property:NAME   the value of the first MQTT 5 user property of that name, a string
 *
 * One part: its value is the _id. Several: a document with a field for each, in their order, named "topic", the pointer
 * as it is written without its first slash, NAME.
 */
#ifndef MQTT2MONGO_ID_H
#define MQTT2MONGO_ID_H

#include "buffer.h"

#include <bson/bson.h>
#include <stdbool.h>

enum {
	ID_PARTS_MOST = 8,
	ID_TEXT_MOST = 1024, /* bytes of a text that may be part of an _id */
};

enum id_kind { ID_TOPIC, ID_POINTER, ID_PROPERTY };

struct id_part {
	enum id_kind kind;
	char *name;   /* of the field; for a property also its own */
	char *tokens; /* of a pointer: its keys, unescaped, each with its NUL, one behind the other */
	size_t token_count;
};

/* Zeroed: objectid. */
struct id_rule {
	struct id_part *parts; /* owned */
	size_t count;          /* 0: objectid */
	size_t property_count; /* how many of them are user properties */
};

/* What a message has for an _id. Borrowed. */
struct id_source {
	const char *topic; /* UTF-8, NUL-terminated */
	size_t topic_length;
	const uint8_t *document; /* BSON with a field "payload": the payload as it is stored */
	size_t document_length;
	const char *properties; /* as id_keep_property() wrote them */
	size_t properties_length;
};

/*
 * Fill `rule` from the parts as the user wrote them; {"objectid"} alone gives the zeroed rule. Returns NULL, or what is
 * wrong and what to write instead, allocated, and then the rule is zeroed. id_rule_finish() frees what is in it.
 */
char *id_rule_parse(struct id_rule *rule, const char *const *parts, size_t count);
void id_rule_finish(struct id_rule *rule);

/*
 * Append the element _id to `out`. False, and `out` as it was, when one of the parts is missing or cannot be used: not
 * a string, number or boolean, a text above ID_TEXT_MOST bytes, a property that is not UTF-8.
 */
bool id_build(const struct id_rule *rule, const struct id_source *source, bson_t *out);

/*
 * User properties as a run of bytes, each name and value with its NUL: what a batch holds and the spool keeps of a
 * message. A value above ID_TEXT_MOST bytes is of no use for an _id and is left out.
 */
void id_keep_property(struct buffer *run, const char *name, const char *value);

/* Step through such a run: start with *at == run, end when false is returned. The texts are NUL-terminated. */
bool id_next_property(const char **at, const char *end, const char **name, const char **value);

#endif
