/*
 * One received message to one BSON document: the stored envelope, or the dead letter when its payload cannot be
 * stored as what it claims to be. Pure: no clock, no socket, no global. Worker threads.
 *
 *   stored:      { _id, topic, payload: <the JSON, typed>, received_at, qos, retain, dup }
 *   dead letter: { _id, topic, payload: Binary, preview, reason: { code, message, offset }, received_at, qos, retain,
 *                  dup, route }   and, where the payload was too large to keep whole, length and sha256; where
 *                  consumer.id names user properties, user_properties with those the message had
 *
 * The _id of a stored document is made from the message when consumer.id says so and the message has what it takes. In
 * all other cases, and for every dead letter, it is the ObjectId that the message got when it was received.
 */
#ifndef MQTT2MONGO_DOCUMENT_H
#define MQTT2MONGO_DOCUMENT_H

#include "batch.h"
#include "json.h"

enum { DOCUMENT_MAX_BYTES = 16 * 1024 * 1024 }; /* MongoDB's maxBsonObjectSize */

/* Why a message became a dead letter. The first ones are json.h's codes under the same numbers. */
enum document_reason {
	DOCUMENT_TOPIC_UTF8 = JSON_TOO_LARGE + 1, /* the topic is not UTF-8 */
	DOCUMENT_PAYLOAD_SIZE,                    /* above consumer.max_payload */
	DOCUMENT_REFUSED,                         /* MongoDB refuses this document */
	DOCUMENT_UNIQUE_INDEX,                    /* another document holds the value of a unique index */
	DOCUMENT_ID_CONFLICT,                     /* another message is stored under the _id made from this one */
	DOCUMENT_REASONS                          /* how many there are */
};

struct document_fault {
	enum document_reason reason;
	const char *message; /* borrowed; any bytes, stored as valid UTF-8 */
	size_t offset;       /* byte of the payload, 0 where that means nothing */
};

/* The stable name of a reason: reason.code of a dead letter, label of a counter. */
const char *document_reason_name(enum document_reason reason);

/*
 * Append the stored document of `message` to `out`, its _id by `rule`. Returns true, or false with `out` as it was and
 * `fault` filled.
 */
bool document_build(const struct batch *batch, const struct batch_message *message, const struct id_rule *rule,
                    struct buffer *out, struct document_fault *fault);

/* Whether the _id of a document that document_build() wrote, which is its first element, is the ObjectId: nothing in a
 * message becomes one. */
static inline bool document_has_object_id(const uint8_t *document)
{
	return document[4] == BSON_TYPE_OID;
}

/* Append the dead letter of `message` to `out`. `route` names the topic filter it came by. */
void document_dead_letter(const struct batch *batch, const struct batch_message *message,
                          const struct document_fault *fault, const char *route, struct buffer *out);

#endif
