/*
 * The messages of one batch: topics and payloads copied into one arena, and an outcome for each message.
 *
 * A batch has one owner at a time. The loop thread fills it; while a worker stores it nobody else touches it; when
 * the work is done the loop thread reads the outcomes and empties it for the next round. The arena is kept, so that a
 * busy service allocates nothing per message.
 */
#ifndef MQTT2MONGO_BATCH_H
#define MQTT2MONGO_BATCH_H

#include "buffer.h"
#include "id.h"
#include "message.h"

#include <bson/bson.h>
#include <stdbool.h>

enum {
	BATCH_TRUNCATED_BYTES = 1024 * 1024, /* kept of a payload above consumer.max_payload */
	BATCH_DIGEST_BYTES = 32,             /* SHA-256 */
};

enum batch_outcome {
	BATCH_OPEN, /* not durable yet */
	BATCH_STORED,
	BATCH_DUPLICATE, /* the same message was stored before, under an _id made from the message */
	BATCH_DEAD_LETTERED,
};

struct batch_message {
	size_t topic;      /* offset in the arena; NUL-terminated */
	size_t payload;    /* offset in the arena; NUL-terminated beyond its length */
	size_t digest;     /* offset in the arena, when oversized */
	size_t properties; /* offset in the arena of the user properties that are kept, as id_keep_property() writes
	                      them */
	uint32_t topic_length;
	uint32_t payload_length; /* bytes kept */
	uint32_t full_length;    /* bytes received */
	uint32_t properties_length;
	bson_oid_t id;       /* the document's _id, fixed here so that a second attempt meets itself */
	int64_t received_at; /* wall clock, ms since 1970 */
	int64_t row;         /* in the spool, when it came from there; else 0 */
	uint8_t qos;
	bool retain, dup;
	bool oversized;   /* above consumer.max_payload */
	bool tried;       /* an attempt to store it came before, whose outcome is not known; set by the worker */
	bool id_fallback; /* consumer.id wants an _id from the message, which has none; set by the worker */
	bool settled;     /* durable and counted; set by the loop thread, and then no job touches the message */
	uint8_t outcome;  /* enum batch_outcome; set by the worker */
	uint8_t refusals; /* attempts that ended in an error which may be for ever; counted by the worker */
	uint8_t reason;   /* enum document_reason, when dead-lettered; set by the worker */
};

struct batch {
	struct buffer arena;
	struct batch_message *messages;
	size_t count, capacity;
	const char
	    *route;       /* the topic filter all of them came by; borrowed, or in `route_kept`. NULL: consumer.topic */
	char *route_kept; /* owned, or NULL; see batch_keep_route() */
	uint8_t losses;   /* how often the connection to MongoDB was lost while it was written; counted by the worker */
	bson_context_t *ids; /* makes the ObjectIds, borrowed; NULL: libbson's own, which asks the kernel for the
	                        process id each time */
};

/* A message that was received earlier, from the spool or a dead letter. Everything is copied by batch_restore(). */
struct batch_record {
	const char *topic;
	uint32_t topic_length;
	const void *payload;
	uint32_t payload_length; /* bytes kept */
	uint32_t full_length;    /* bytes received */
	const uint8_t *digest;   /* BATCH_DIGEST_BYTES when it was oversized, else NULL */
	const void *properties;  /* the batch's bytes for them, opaque */
	uint32_t properties_length;
	bson_oid_t id;
	int64_t received_at;
	int64_t row;
	uint8_t qos;
	bool retain, dup, tried;
};

/*
 * Append a copy of `received`. Of a payload above `max_payload` bytes only the first BATCH_TRUNCATED_BYTES are kept,
 * with the length and the SHA-256 of the whole. Of its user properties those are kept that `rule` names.
 * `received_at`: ms since 1970. Loop thread.
 */
void batch_add(struct batch *batch, const struct message *received, const struct id_rule *rule, size_t max_payload,
               int64_t received_at);

/* The SHA-256 of a payload. Aborts when OpenSSL has no memory for it. */
void batch_digest(const void *bytes, size_t length, uint8_t digest[BATCH_DIGEST_BYTES]);

/* Append a message as it was received earlier. Any thread that owns the batch. */
void batch_restore(struct batch *batch, const struct batch_record *record);

/* Set the route to a copy of `route`. */
void batch_keep_route(struct batch *batch, const char *route);

/* How many messages have this outcome. */
size_t batch_count_outcome(const struct batch *batch, enum batch_outcome outcome);

/* Forget the messages; memory beyond what a usual batch takes is given back. */
void batch_reset(struct batch *batch);

/* Free everything; the struct is zeroed. */
void batch_finish(struct batch *batch);

/* Not all of the payload is kept. */
static inline bool batch_is_cut(const struct batch_message *message)
{
	return message->payload_length < message->full_length;
}

static inline const char *batch_topic(const struct batch *batch, const struct batch_message *message)
{
	return (const char *)batch->arena.data + message->topic;
}

static inline const char *batch_payload(const struct batch *batch, const struct batch_message *message)
{
	return (const char *)batch->arena.data + message->payload;
}

static inline const char *batch_properties(const struct batch *batch, const struct batch_message *message)
{
	return (const char *)batch->arena.data + message->properties;
}

#endif
