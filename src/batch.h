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
#include "mqtt.h"

#include <bson/bson.h>
#include <stdbool.h>

enum {
	BATCH_TRUNCATED_BYTES = 1024 * 1024, /* kept of a payload above consumer.max_payload */
	BATCH_DIGEST_BYTES = 32,             /* SHA-256 */
};

enum batch_outcome {
	BATCH_OPEN, /* not durable yet */
	BATCH_STORED,
	BATCH_DEAD_LETTERED,
};

struct batch_message {
	size_t topic;   /* offset in the arena; NUL-terminated */
	size_t payload; /* offset in the arena; NUL-terminated beyond its length */
	size_t digest;  /* offset in the arena, when oversized */
	uint32_t topic_length;
	uint32_t payload_length; /* bytes kept */
	uint32_t full_length;    /* bytes received */
	bson_oid_t id;           /* the document's _id, fixed here so that a second attempt meets itself */
	int64_t received_at;     /* wall clock, ms since 1970 */
	uint8_t qos;
	bool retain, dup;
	bool oversized;   /* above consumer.max_payload */
	uint8_t outcome;  /* enum batch_outcome; set by the worker */
	uint8_t refusals; /* errors of unknown meaning for this document alone; counted by the worker */
	uint8_t reason;   /* enum document_reason, when dead-lettered; set by the worker */
};

struct batch {
	struct buffer arena;
	struct batch_message *messages;
	size_t count, capacity;
};

/*
 * Append a copy of `received`. Of a payload above `max_payload` bytes only the first BATCH_TRUNCATED_BYTES are kept,
 * with the length and the SHA-256 of the whole. `received_at`: ms since 1970. Loop thread.
 */
void batch_add(struct batch *batch, const struct mqtt_message *received, size_t max_payload, int64_t received_at);

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

#endif
