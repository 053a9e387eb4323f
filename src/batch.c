/* See batch.h. */
#include "batch.h"

#include "log.h"
#include "memory.h"

#include <openssl/evp.h>
#include <stdlib.h>

/* The compiler sees to it that nobody ignores what it says. */
__typeof__(EVP_Digest) EVP_Digest __attribute__((warn_unused_result));

enum {
	SMALLEST_CAPACITY = 64,
	ARENA_KEPT = 2 * 1024 * 1024,
};

static struct batch_message *append_message(struct batch *batch)
{
	if (batch->count == batch->capacity) {
		batch->capacity = batch->capacity ? batch->capacity * 2 : SMALLEST_CAPACITY;
		batch->messages = memory_resize(batch->messages, batch->capacity * sizeof *batch->messages);
	}
	struct batch_message *message = &batch->messages[batch->count++];
	memset(message, 0, sizeof *message);
	return message;
}

/* Copy bytes into the arena with a NUL behind them; returns their offset. */
static size_t keep_bytes(struct buffer *arena, const void *bytes, size_t length)
{
	size_t offset = arena->length;
	uint8_t *place = buffer_extend(arena, length + 1);
	if (length != 0)
		memcpy(place, bytes, length);
	place[length] = 0;
	return offset;
}

void batch_digest(const void *bytes, size_t length, uint8_t digest[BATCH_DIGEST_BYTES])
{
	if (EVP_Digest(bytes, length, digest, NULL, EVP_sha256(), NULL) != 1) {
		log_error("memory",
		          "OpenSSL gives no SHA-256: out of memory, or its configuration (OPENSSL_CONF) lacks "
		          "it; nothing unacknowledged is lost");
		abort(); /* a wrong digest in a dead letter would be believed */
	}
}

static size_t keep_digest(struct buffer *arena, const void *bytes, size_t length)
{
	size_t offset = arena->length;
	batch_digest(bytes, length, buffer_extend(arena, BATCH_DIGEST_BYTES));
	return offset;
}

static void keep_properties(struct batch *batch, struct batch_message *message, const struct message *received,
                            const struct id_rule *rule)
{
	message->properties = batch->arena.length;
	for (size_t i = 0; i < rule->count; i++) {
		if (rule->parts[i].kind != ID_PROPERTY)
			continue;
		char *value = received->user_property(received, rule->parts[i].name);
		if (value != NULL)
			id_keep_property(&batch->arena, rule->parts[i].name, value);
		free(value);
	}
	message->properties_length = (uint32_t)(batch->arena.length - message->properties);
}

void batch_add(struct batch *batch, const struct message *received, const struct id_rule *rule, size_t max_payload,
               int64_t received_at)
{
	struct batch_message *message = append_message(batch);
	size_t kept = received->payload_length;
	if (received->payload_length > max_payload) {
		message->oversized = true;
		message->digest = keep_digest(&batch->arena, received->payload, received->payload_length);
		if (kept > BATCH_TRUNCATED_BYTES)
			kept = BATCH_TRUNCATED_BYTES;
	}
	message->topic = keep_bytes(&batch->arena, received->topic, received->topic_length);
	message->payload = keep_bytes(&batch->arena, received->payload, kept);
	if (rule->property_count > 0 && received->user_property != NULL)
		keep_properties(batch, message, received, rule);
	message->topic_length = (uint32_t)received->topic_length;
	message->payload_length = (uint32_t)kept;
	message->full_length = (uint32_t)received->payload_length;
	message->received_at = received_at;
	message->qos = (uint8_t)received->qos;
	message->retain = received->retain;
	message->dup = received->dup;
	bson_oid_init(&message->id, batch->ids);
}

void batch_restore(struct batch *batch, const struct batch_record *record)
{
	struct batch_message *message = append_message(batch);
	if (record->digest != NULL) {
		message->oversized = true;
		message->digest = batch->arena.length;
		buffer_append(&batch->arena, record->digest, BATCH_DIGEST_BYTES);
	}
	message->topic = keep_bytes(&batch->arena, record->topic, record->topic_length);
	message->payload = keep_bytes(&batch->arena, record->payload, record->payload_length);
	if (record->properties_length > 0)
		message->properties = keep_bytes(&batch->arena, record->properties, record->properties_length);
	message->properties_length = record->properties_length;
	message->topic_length = record->topic_length;
	message->payload_length = record->payload_length;
	message->full_length = record->full_length;
	message->id = record->id;
	message->received_at = record->received_at;
	message->row = record->row;
	message->qos = record->qos;
	message->retain = record->retain;
	message->dup = record->dup;
	message->tried = record->tried;
}

void batch_keep_route(struct batch *batch, const char *route)
{
	free(batch->route_kept);
	batch->route = batch->route_kept = memory_string(route);
}

size_t batch_count_outcome(const struct batch *batch, enum batch_outcome outcome)
{
	size_t found = 0;
	for (size_t i = 0; i < batch->count; i++)
		found += batch->messages[i].outcome == outcome;
	return found;
}

void batch_reset(struct batch *batch)
{
	batch->count = 0;
	batch->losses = 0;
	buffer_reset(&batch->arena, ARENA_KEPT);
}

void batch_finish(struct batch *batch)
{
	buffer_finish(&batch->arena);
	free(batch->messages);
	free(batch->route_kept);
	*batch = (struct batch){0};
}
