/* See spool_row.h. */
#define _GNU_SOURCE
#include "spool_row.h"

#include <endian.h>

enum { FLAG_RETAIN = 1, FLAG_DUP = 2, FLAG_TRIED = 4, ROW_ID = 12 };

int spool_row_flags(const struct batch_record *record)
{
	return (record->retain ? FLAG_RETAIN : 0) | (record->dup ? FLAG_DUP : 0) | (record->tried ? FLAG_TRIED : 0);
}

void spool_row_set_flags(struct batch_record *record, int64_t flags)
{
	record->retain = flags & FLAG_RETAIN;
	record->dup = flags & FLAG_DUP;
	record->tried = flags & FLAG_TRIED;
}

struct spool_row spool_row_of(const struct batch *batch, const struct batch_message *message, int64_t row)
{
	const char *route = batch->route != NULL ? batch->route : "";
	return (struct spool_row){
	    .record =
		{
		    .topic = batch_topic(batch, message),
		    .topic_length = message->topic_length,
		    .payload = batch_payload(batch, message),
		    .payload_length = message->payload_length,
		    .full_length = message->full_length,
		    .digest = message->oversized ? batch->arena.data + message->digest : NULL,
		    .id = message->id,
		    .received_at = message->received_at,
		    .row = row,
		    .qos = message->qos,
		    .retain = message->retain,
		    .dup = message->dup,
		    .tried = true, /* maybe at this moment */
		},
	    .route = route,
	    .route_length = strlen(route),
	    .properties = message->properties_length > 0 ? batch_properties(batch, message) : NULL,
	    .properties_length = message->properties_length,
	};
}

/* For a given sum a bijection of the word, for a given word one of the sum: a change within one word always shows. */
static uint64_t mix(uint64_t sum, uint64_t word)
{
	sum = (sum ^ word) * 0x9e3779b97f4a7c15u;
	return sum ^ (sum >> 32);
}

static uint64_t mix_bytes(uint64_t sum, const void *bytes, size_t length)
{
	const uint8_t *at = bytes;
	uint64_t word;
	sum = mix(sum, length);
	for (; length >= sizeof word; at += sizeof word, length -= sizeof word) {
		memcpy(&word, at, sizeof word);
		sum = mix(sum, le64toh(word));
	}
	if (length == 0)
		return sum;
	word = 0;
	memcpy(&word, at, length);
	return mix(sum, le64toh(word));
}

uint64_t spool_row_checksum(const struct spool_row *row)
{
	const struct batch_record *record = &row->record;
	uint64_t sum = mix(SPOOL_APPLICATION, (uint64_t)record->row);
	sum = mix_bytes(sum, record->id.bytes, sizeof record->id.bytes);
	sum = mix_bytes(sum, row->route, row->route_length);
	sum = mix_bytes(sum, record->topic, record->topic_length);
	sum = mix_bytes(sum, record->payload, record->payload_length);
	sum = mix(sum, (uint64_t)record->received_at);
	sum = mix(sum, (uint64_t)record->qos << 8 | (uint64_t)spool_row_flags(record));
	sum = mix(sum, record->full_length);
	sum = mix_bytes(sum, record->digest, record->digest != NULL ? BATCH_DIGEST_BYTES : 0);
	return mix_bytes(sum, row->properties, row->properties_length);
}

size_t spool_row_bytes(const struct spool_row *row)
{
	return row->route_length + row->record.topic_length + row->record.payload_length + row->properties_length +
	       (row->record.digest != NULL ? BATCH_DIGEST_BYTES : 0);
}

/* An empty value is one of no bytes, not NULL. */
static void bind_bytes(sqlite3_stmt *statement, int column, const void *bytes, size_t length)
{
	sqlite3_bind_blob64(statement, column, bytes != NULL ? bytes : "", length, SQLITE_STATIC);
}

void spool_row_bind(sqlite3_stmt *statement, const struct spool_row *row)
{
	const struct batch_record *record = &row->record;
	int column = 0;
	sqlite3_bind_int64(statement, ++column, record->row);
	bind_bytes(statement, ++column, record->id.bytes, sizeof record->id.bytes);
	sqlite3_bind_text64(statement, ++column, row->route, row->route_length, SQLITE_STATIC, SQLITE_UTF8);
	bind_bytes(statement, ++column, record->topic, record->topic_length);
	bind_bytes(statement, ++column, record->payload, record->payload_length);
	sqlite3_bind_int64(statement, ++column, record->received_at);
	sqlite3_bind_int(statement, ++column, record->qos);
	sqlite3_bind_int(statement, ++column, spool_row_flags(record));
	sqlite3_bind_int64(statement, ++column, record->full_length);
	if (record->digest != NULL)
		bind_bytes(statement, ++column, record->digest, BATCH_DIGEST_BYTES);
	else
		sqlite3_bind_null(statement, ++column);
	if (row->properties != NULL)
		bind_bytes(statement, ++column, row->properties, row->properties_length);
	else
		sqlite3_bind_null(statement, ++column);
	sqlite3_bind_int64(statement, ++column, (sqlite3_int64)spool_row_checksum(row));
}

static const void *take_bytes(sqlite3_stmt *statement, int column, size_t *length)
{
	const void *bytes = sqlite3_column_blob(statement, column);
	*length = (size_t)sqlite3_column_bytes(statement, column);
	return bytes != NULL ? bytes : "";
}

bool spool_row_take(sqlite3_stmt *statement, struct spool_row *row)
{
	struct batch_record *record = &row->record;
	size_t id, topic, payload, digest = 0;
	*row = (struct spool_row){0};
	int column = 0;
	record->row = sqlite3_column_int64(statement, column++);
	const void *id_bytes = take_bytes(statement, column++, &id);
	row->route = (const char *)sqlite3_column_text(statement, column);
	row->route_length = (size_t)sqlite3_column_bytes(statement, column++);
	record->topic = take_bytes(statement, column++, &topic);
	record->payload = take_bytes(statement, column++, &payload);
	record->received_at = sqlite3_column_int64(statement, column++);
	record->qos = (uint8_t)sqlite3_column_int(statement, column++);
	spool_row_set_flags(record, sqlite3_column_int64(statement, column++));
	record->full_length = (uint32_t)sqlite3_column_int64(statement, column++);
	if (sqlite3_column_type(statement, column) != SQLITE_NULL)
		record->digest = take_bytes(statement, column, &digest);
	column++;
	if (sqlite3_column_type(statement, column) != SQLITE_NULL)
		row->properties = take_bytes(statement, column, &row->properties_length);
	record->properties = row->properties;
	record->properties_length = (uint32_t)row->properties_length;
	uint64_t checksum = (uint64_t)sqlite3_column_int64(statement, ++column);
	record->topic_length = (uint32_t)topic;
	record->payload_length = (uint32_t)payload;
	if (id != ROW_ID || row->route == NULL || (record->digest != NULL && digest != BATCH_DIGEST_BYTES))
		return false;
	memcpy(record->id.bytes, id_bytes, ROW_ID);
	return checksum == spool_row_checksum(row);
}
