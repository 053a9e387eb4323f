/*
 * See insert.h.
 *
 * A batch is written in chunks of bounded bytes, so that a few messages whose BSON is six times their JSON do not pile
 * up in memory (the driver copies what it sends). A chunk is durable message by message: verdict.h reads what the reply
 * says of each document, all of it before anything is done about any of them. Then the messages are settled; those that
 * MongoDB will never take get a grave, which is a note and no more; and dead letters are written when all documents
 * have been. So nothing that is done about one reply can lead to another one while the first is still being read.
 *
 * What stays open is tried again later with the same _ids, where an earlier success shows as a duplicate key on _id.
 * Where consumer.id makes the _id from the message, such an error says less: clash.h finds out what is stored there.
 *
 * A call that fails as a whole is the database's fault, the collection's, or one document's. One document is found by
 * halves: at once where the error speaks of size or form, else when the batch has met the error several times and the
 * collection takes others meanwhile. Every error that is on no list ends so, in a dead letter, never in an endless
 * retry.
 */
#include "insert.h"

#include "clash.h"
#include "clock.h"
#include "document.h"
#include "id_key.h"
#include "memory.h"
#include "mongodb_error.h"
#include "verdict.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
	CHUNK_BYTES = 4 * 1024 * 1024, /* far below the driver's 48 MB per wire message */
	CHUNK_KEPT = 2 * 1024 * 1024,
	TEXTS_KEPT = 256 * 1024,
	LARGE_BYTES = 64 * 1024,
	GROWTH_MOST = 7,    /* BSON of JSON such as [1,1,1,…] */
	REFUSALS_MOST = 4,  /* attempts that list an error on no list for a document, or lose it alone */
	UNKNOWN_MOST = 8,   /* that fail as a whole with one, while the collection takes others */
	UNKNOWN_ALONE = 16, /* and while it takes nothing */
	TAKES_MS = 10000,   /* since it last did */
	LOSSES_MOST = 2,    /* times that a batch may lose the connection before it is taken for the cause */
	GONE_MOST = 8,      /* attempts that find an _id taken, but no document with it */
	MOST_LIMIT = 65536,
	CONFLICT_TEXT = 1000,
};

/* A message that becomes a dead letter. */
struct insert_grave {
	size_t message; /* index in the batch */
	enum document_reason reason;
	size_t offset; /* byte of the payload */
	size_t text;   /* in `texts`; NUL-terminated */
};

/* One insert_batch() under way. */
struct insert {
	const struct insert_target *target;
	struct insert_scratch *scratch;
	struct batch *batch;
	struct store_report *report;
	mongoc_collection_t *collections[STORE_NAMESPACES];
	enum store_namespace namespace; /* that the chunk is for */
	const bson_t **documents;       /* of the chunk, while it is written */
};

static const char *collection_name(const struct insert *insert)
{
	return mongoc_collection_get_name(insert->collections[insert->namespace]);
}

static struct batch_message *message_of(const struct insert *insert, size_t position)
{
	return &insert->batch->messages[insert->scratch->chunk.messages[position]];
}

/* A further insert into this collection may fare better than the last one. */
static bool may_go_on(const struct insert *insert)
{
	return !insert->report->away && !insert->report->refused[insert->namespace];
}

/* The collection takes documents, or did lately. */
static bool takes_others(const struct insert *insert)
{
	int64_t taken_at = insert->target->taken_at_ms[insert->namespace];
	return taken_at != 0 && clock_monotonic_ms() - taken_at < TAKES_MS;
}

static void note_error(struct insert *insert, const bson_error_t *error, const char *what)
{
	store_report_error(insert->report, error, what, collection_name(insert));
}

/* ---- scratch memory ---- */

void insert_scratch_finish(struct insert_scratch *scratch)
{
	buffer_finish(&scratch->chunk.bytes);
	free(scratch->chunk.starts);
	free(scratch->chunk.messages);
	buffer_finish(&scratch->texts);
	free(scratch->graves);
	free(scratch->clashes);
	*scratch = (struct insert_scratch){0};
}

static void chunk_reserve(struct insert_chunk *chunk)
{
	if (chunk->count + 1 < chunk->capacity)
		return;
	chunk->capacity = chunk->capacity ? chunk->capacity * 2 : 64;
	chunk->starts = memory_resize(chunk->starts, chunk->capacity * sizeof *chunk->starts);
	chunk->messages = memory_resize(chunk->messages, chunk->capacity * sizeof *chunk->messages);
}

/* The bytes appended since the last document are the one of `message`. */
static void chunk_add(struct insert_chunk *chunk, size_t start, size_t message)
{
	chunk_reserve(chunk);
	chunk->starts[chunk->count] = start;
	chunk->messages[chunk->count++] = message;
	chunk->starts[chunk->count] = chunk->bytes.length;
}

static void chunk_clear(struct insert_chunk *chunk)
{
	chunk->count = 0;
	buffer_reset(&chunk->bytes, CHUNK_KEPT);
}

static void add_grave(struct insert *insert, size_t message, const struct document_fault *fault)
{
	struct insert_scratch *scratch = insert->scratch;
	if (scratch->grave_count == scratch->grave_capacity) {
		scratch->grave_capacity = scratch->grave_capacity ? scratch->grave_capacity * 2 : 64;
		scratch->graves = memory_resize(scratch->graves, scratch->grave_capacity * sizeof *scratch->graves);
	}
	scratch->graves[scratch->grave_count++] = (struct insert_grave){
	    .message = message, .reason = fault->reason, .offset = fault->offset, .text = scratch->texts.length};
	buffer_append(&scratch->texts, fault->message, strlen(fault->message) + 1);
}

static void add_clash(struct insert *insert, size_t position)
{
	struct insert_scratch *scratch = insert->scratch;
	if (scratch->clash_count == scratch->clash_capacity) {
		scratch->clash_capacity = scratch->clash_capacity ? scratch->clash_capacity * 2 : 64;
		scratch->clashes = memory_resize(scratch->clashes, scratch->clash_capacity * sizeof *scratch->clashes);
	}
	scratch->clashes[scratch->clash_count++] =
	    (struct clash){.index = position, .document = insert->documents[position]};
}

/* ---- what becomes of one message ---- */

/* The document is there. */
static void settle_written(struct insert *insert, size_t position)
{
	message_of(insert, position)->outcome =
	    insert->namespace == STORE_DEAD_LETTERS ? BATCH_DEAD_LETTERED : BATCH_STORED;
}

/* MongoDB will never take this document. A dead letter it does not take stays open: somebody must look at that
 * collection. */
static void refuse(struct insert *insert, size_t position, enum document_reason reason, const char *text)
{
	if (insert->namespace == STORE_DEAD_LETTERS) {
		insert->report->class = STORE_CONFIGURATION;
		snprintf(insert->report->message, sizeof insert->report->message,
		         "MongoDB refuses a dead letter: %s; has the collection consumer.dead_letter a validator or "
		         "unique index?",
		         text);
		return;
	}
	struct document_fault fault = {.reason = reason, .message = text};
	add_grave(insert, insert->scratch->chunk.messages[position], &fault);
}

/* One attempt more that ended in an error which may be for ever. True when there have been `most`. */
static bool count_refusal(struct batch_message *message, unsigned most)
{
	message->refusals += message->refusals < UINT8_MAX;
	return message->refusals >= most;
}

static void leave_open(struct insert *insert, int code, const char *text)
{
	bson_error_t open = {.domain = MONGOC_ERROR_SERVER, .code = (uint32_t)code};
	snprintf(open.message, sizeof open.message, "%s", text);
	note_error(insert, &open, "MongoDB did not store a document");
}

/* A taken _id that we made ourselves is our own earlier attempt. So may be one of two that the server does not tell
 * apart, if there was an attempt. */
static void settle_taken(struct insert *insert, size_t position, const struct verdict *verdict)
{
	bool own_id = document_has_object_id(bson_get_data(insert->documents[position]));
	if (verdict->kind == VERDICT_ID_TAKEN && own_id)
		settle_written(insert, position);
	else if (verdict->kind == VERDICT_TAKEN && own_id && !message_of(insert, position)->tried)
		refuse(insert, position, DOCUMENT_UNIQUE_INDEX, verdict->message);
	else
		add_clash(insert, position);
}

static void settle_verdict(struct insert *insert, size_t position, const struct verdict *verdict)
{
	switch (verdict->kind) {
	case VERDICT_INSERTED:
		settle_written(insert, position);
		break;
	case VERDICT_ID_TAKEN:
	case VERDICT_TAKEN:
		settle_taken(insert, position, verdict);
		break;
	case VERDICT_UNIQUE_INDEX:
		refuse(insert, position, DOCUMENT_UNIQUE_INDEX, verdict->message);
		break;
	case VERDICT_REFUSED:
		refuse(insert, position, DOCUMENT_REFUSED, verdict->message);
		break;
	case VERDICT_STRANGE:
		/* A dead letter keeps every byte, while a document that is tried for ever would stop all others. */
		if (count_refusal(message_of(insert, position), REFUSALS_MOST)) {
			refuse(insert, position, DOCUMENT_REFUSED, verdict->message);
			break;
		}
		leave_open(insert, verdict->code, verdict->message);
		break;
	case VERDICT_LATER:
		leave_open(insert, verdict->code, verdict->message);
		break;
	case VERDICT_OPEN:
		break;
	}
}

/* ---- an _id that is taken ---- */

/* Another message has the _id: its place is taken for good. */
static void refuse_conflict(struct insert *insert, const struct clash *clash, const char *what)
{
	bson_t id;
	bson_iter_t iter;
	char message[CONFLICT_TEXT];
	bson_init(&id);
	if (bson_iter_init_find(&iter, clash->document, "_id"))
		bson_append_iter(&id, "_id", -1, &iter);
	char *text = bson_as_relaxed_extended_json(&id, NULL);
	snprintf(message, sizeof message, "%s: %s", what, text != NULL ? text : "");
	bson_free(text);
	bson_destroy(&id);
	refuse(insert, clash->index, DOCUMENT_ID_CONFLICT, message);
}

/* The _ids that messages of this chunk were stored under. A message that is received twice within a millisecond can be
 * told from its double only by this: of those that are written together one is the stored one. */
static void collect_claimed(const struct insert *insert, struct id_key_set *claimed)
{
	for (size_t i = 0; i < insert->scratch->chunk.count; i++)
		if (message_of(insert, i)->outcome == BATCH_STORED)
			id_key_set_add(claimed, insert->documents[i], i);
	id_key_set_sort(claimed);
}

static void settle_gone(struct insert *insert, const struct clash *clash, const struct verdict *verdict)
{
	if (!count_refusal(message_of(insert, clash->index), GONE_MOST))
		leave_open(insert, verdict->code,
		           "its _id is taken, but the document that has it was deleted meanwhile or cannot be read");
	else if (verdict->kind == VERDICT_TAKEN)
		refuse(insert, clash->index, DOCUMENT_UNIQUE_INDEX, verdict->message);
	else /* an orphan of a shard, for one */
		refuse_conflict(insert, clash, "this _id is taken by a document that cannot be read");
}

static void settle_clash(struct insert *insert, const struct clash *clash, const struct verdict *verdict,
                         const struct id_key_set *claimed)
{
	struct batch_message *message = message_of(insert, clash->index);
	const struct id_key_entry *first;
	bool own =
	    clash->answer == CLASH_SAME_OWN && message->tried && id_key_set_find(claimed, clash->document, &first) == 0;
	if (clash->answer == CLASH_GONE)
		settle_gone(insert, clash, verdict);
	else if (clash->answer == CLASH_OTHER)
		refuse_conflict(insert, clash, "another message is stored under this _id");
	else if (own || insert->namespace == STORE_DEAD_LETTERS)
		settle_written(insert, clash->index);
	else
		message->outcome = BATCH_DUPLICATE;
}

/* `verdicts` are those of the documents from `first` on. */
static void settle_clashes(struct insert *insert, const struct verdict *verdicts, size_t first)
{
	struct insert_scratch *scratch = insert->scratch;
	struct id_key_set claimed = {0};
	bson_error_t error = {0};
	if (scratch->clash_count == 0)
		return;
	if (!clash_look_up(insert->collections[insert->namespace], insert->target->write_concern, scratch->clashes,
	                   scratch->clash_count, &error)) {
		enum mongodb_scope scope = mongodb_error_scope(&error);
		insert->report->away = scope == MONGODB_DATABASE || scope == MONGODB_CONNECTION;
		note_error(insert, &error, "cannot read what is stored under an _id that is taken");
		scratch->clash_count = 0;
		return;
	}
	collect_claimed(insert, &claimed);
	for (size_t i = 0; i < scratch->clash_count; i++) {
		const struct clash *clash = &scratch->clashes[i];
		settle_clash(insert, clash, &verdicts[clash->index - first], &claimed);
	}
	id_key_set_finish(&claimed);
	scratch->clash_count = 0;
}

static void settle_verdicts(struct insert *insert, size_t first, size_t count, const struct verdict *verdicts)
{
	insert->report->taken[insert->namespace] = true;
	insert->target->taken_at_ms[insert->namespace] = clock_monotonic_ms();
	for (size_t i = 0; i < count; i++)
		settle_verdict(insert, first + i, &verdicts[i]);
	settle_clashes(insert, verdicts, first);
}

/* ---- a call that failed as a whole ---- */

static void insert_range(struct insert *insert, size_t first, size_t count);

/* One of these documents is at fault. */
static void narrow_down(struct insert *insert, size_t first, size_t count,
                        const char *text) // NOLINT(misc-no-recursion)
{
	if (count == 1) {
		refuse(insert, first, DOCUMENT_REFUSED, text);
		return;
	}
	insert_range(insert, first, count / 2);
	if (may_go_on(insert))
		insert_range(insert, first + count / 2, count - count / 2);
}

/* An error on no list, or an answer that contradicts itself. It may pass; if not, it is about one of them as soon as
 * the collection takes others. Where it takes nothing that need not be so, and each document would be tried alone in
 * vain. */
// NOLINTNEXTLINE(misc-no-recursion)
static void settle_unknown(struct insert *insert, size_t first, size_t count, const bson_error_t *error)
{
	bool others = takes_others(insert), for_ever = true;
	unsigned most = others || error->domain == 0 ? UNKNOWN_MOST : UNKNOWN_ALONE;
	for (size_t i = first; i < first + count; i++)
		for_ever = count_refusal(message_of(insert, i), most) && for_ever;
	bool waits =
	    insert->namespace == STORE_DEAD_LETTERS || mongodb_is_configuration(error->domain, (int)error->code);
	if (for_ever && (others || !waits)) {
		narrow_down(insert, first, count, error->message);
		return;
	}
	insert->report->refused[insert->namespace] = !others;
	note_error(insert, error, "cannot store in MongoDB");
}

static bool server_answers(const struct insert *insert)
{
	bson_t ping;
	bson_error_t error;
	bson_init(&ping);
	BSON_APPEND_INT32(&ping, "ping", 1);
	bool answers = mongoc_client_command_simple(insert->target->client, "admin", &ping, NULL, NULL, &error);
	bson_destroy(&ping);
	return answers;
}

/* A time-out looks to the driver as a connection that was closed, but says nothing about documents. */
static bool timed_out(const struct insert *insert, int64_t took_ms)
{
	int64_t most = insert->target->timeout_ms;
	return most > 0 && took_ms >= most - most / 10;
}

/* mongod closes the connection rather than send an answer above 16 MB, which errors that repeat a large validator for
 * each document can make. Then the server is there, and fewer documents make a smaller answer. */
// NOLINTNEXTLINE(misc-no-recursion)
static void settle_lost(struct insert *insert, size_t first, size_t count, int64_t took_ms, const bson_error_t *error)
{
	struct batch *batch = insert->batch;
	bool late = timed_out(insert, took_ms);
	batch->losses += !late && batch->losses < UINT8_MAX;
	if (late || batch->losses < LOSSES_MOST || !server_answers(insert)) {
		insert->report->away = true;
		note_error(insert, error, "cannot store in MongoDB");
		return;
	}
	insert->scratch->most[insert->namespace] = count > 1 ? count / 2 : 1;
	if (count > 1 || count_refusal(message_of(insert, first), REFUSALS_MOST))
		narrow_down(insert, first, count, "MongoDB closes the connection instead of answering");
	else
		note_error(insert, error, "cannot store in MongoDB");
}

static void settle_away(struct insert *insert, const bson_error_t *error)
{
	bool unmet = error->domain == MONGOC_ERROR_WRITE_CONCERN && mongodb_is_unmet((int)error->code);
	insert->report->away = true;
	store_report_error(insert->report, error,
	                   unmet ? "cannot store in MongoDB as mongodb.write_concern.w wants it"
	                   : error->domain == MONGOC_ERROR_WRITE_CONCERN ? "MongoDB did not confirm a write"
	                                                                 : "cannot store in MongoDB",
	                   NULL);
}

/* Nothing of the reply is believed: any of the documents may be there. */
// NOLINTNEXTLINE(misc-no-recursion)
static void settle_failure(struct insert *insert, size_t first, size_t count, int64_t took_ms, const bson_t *reply,
                           bson_error_t *error)
{
	for (size_t i = first; i < first + count; i++)
		message_of(insert, i)->tried = true;
	if (!verdict_write_concern_error(reply, error) && error->domain == 0)
		snprintf(error->message, sizeof error->message, "its answer does not account for every document");
	switch (mongodb_error_scope(error)) {
	case MONGODB_DATABASE:
		settle_away(insert, error);
		break;
	case MONGODB_CONNECTION:
		settle_lost(insert, first, count, took_ms, error);
		break;
	case MONGODB_NAMESPACE:
		insert->report->refused[insert->namespace] = true;
		note_error(insert, error, "cannot store in MongoDB");
		break;
	case MONGODB_DOCUMENT:
		narrow_down(insert, first, count, error->message);
		break;
	case MONGODB_UNKNOWN:
		if (bson_has_field(reply, "writeErrors")) /* it answered, but contradicts itself */
			error->domain = 0;
		settle_unknown(insert, first, count, error);
		break;
	}
}

/* ---- inserting ---- */

static void insert_range(struct insert *insert, size_t first, size_t count) // NOLINT(misc-no-recursion)
{
	struct verdict *verdicts = memory_zeroed(count, sizeof *verdicts);
	bson_t options, reply;
	bson_error_t error = {0};
	bson_init(&options);
	BSON_APPEND_BOOL(&options, "ordered", false);
	BSON_APPEND_BOOL(&options, "validate", false);
	int64_t begun_ms = clock_monotonic_ms();
	bool done = mongoc_collection_insert_many(insert->collections[insert->namespace], insert->documents + first,
	                                          count, &options, &reply, &error);
	bson_destroy(&options);
	if (verdict_read(&reply, count, done ? NULL : &error, verdicts))
		settle_verdicts(insert, first, count, verdicts);
	else
		settle_failure(insert, first, count, clock_monotonic_ms() - begun_ms, &reply, &error);
	bson_destroy(&reply);
	free(verdicts);
}

/* A collection whose answers were too large gets fewer documents at a time, then one more each time it went well. */
static void insert_ranges(struct insert *insert)
{
	size_t *most = &insert->scratch->most[insert->namespace], count = insert->scratch->chunk.count;
	for (size_t first = 0, next; first < count && may_go_on(insert); first = next) {
		next = *most > 0 && *most < count - first ? first + *most : count;
		insert_range(insert, first, next - first);
		if (*most > 0 && next - first == *most)
			*most = *most < MOST_LIMIT ? *most + 1 : 0;
	}
}

static void insert_chunk(struct insert *insert)
{
	struct insert_chunk *chunk = &insert->scratch->chunk;
	/* bson_t asks for more alignment than malloc() gives */
	bson_t *documents = memory_aligned(_Alignof(bson_t), chunk->count * sizeof *documents);
	insert->documents = memory_zeroed(chunk->count, sizeof(const bson_t *));
	for (size_t i = 0; i < chunk->count; i++) {
		size_t length = chunk->starts[i + 1] - chunk->starts[i];
		if (!bson_init_static(&documents[i], chunk->bytes.data + chunk->starts[i], length))
			abort(); /* we wrote it */
		insert->documents[i] = &documents[i];
	}
	insert_ranges(insert);
	free(insert->documents);
	insert->documents = NULL;
	free(documents);
}

/* Where nothing is taken the rest of the batch would only wait for the same time-out. */
static void flush_chunk(struct insert *insert)
{
	if (insert->scratch->chunk.count > 0 && may_go_on(insert))
		insert_chunk(insert);
	chunk_clear(&insert->scratch->chunk);
}

/* ---- a batch ---- */

/* The document that was appended at `start` belongs to `message`. When the chunk has become too large, what stood
 * before is sent, and the document moves to the front. */
static void take_document(struct insert *insert, size_t start, size_t message)
{
	struct insert_chunk *chunk = &insert->scratch->chunk;
	if (chunk->bytes.length > CHUNK_BYTES && chunk->count > 0) {
		struct buffer kept = {0};
		buffer_append(&kept, chunk->bytes.data + start, chunk->bytes.length - start);
		chunk->bytes.length = start;
		flush_chunk(insert);
		buffer_finish(&chunk->bytes);
		chunk->bytes = kept;
		start = 0;
	}
	chunk_add(chunk, start, message);
}

/* Two large documents in one buffer, and what the driver copies of them, add up for each worker: flush before it grows.
 */
static void make_room(struct insert *insert, const struct batch_message *message)
{
	struct insert_chunk *chunk = &insert->scratch->chunk;
	if (chunk->count > 0 && message->payload_length >= LARGE_BYTES &&
	    chunk->bytes.length + (size_t)message->payload_length * GROWTH_MOST > CHUNK_BYTES)
		flush_chunk(insert);
}

static void add_message(struct insert *insert, size_t index)
{
	struct insert_chunk *chunk = &insert->scratch->chunk;
	struct batch_message *message = &insert->batch->messages[index];
	const struct id_rule *rule = &insert->target->config->consumer.id;
	struct document_fault fault = {0};
	make_room(insert, message);
	size_t start = chunk->bytes.length;
	if (!document_build(insert->batch, message, rule, &chunk->bytes, &fault)) {
		add_grave(insert, index, &fault);
		return;
	}
	message->id_fallback = rule->count > 0 && document_has_object_id(chunk->bytes.data + start);
	take_document(insert, start, index);
}

static void insert_messages(struct insert *insert)
{
	insert->namespace = STORE_MESSAGES;
	for (size_t i = 0; i < insert->batch->count && !insert->report->away; i++)
		if (insert->batch->messages[i].outcome == BATCH_OPEN)
			add_message(insert, i);
	flush_chunk(insert);
}

static void add_dead_letter(struct insert *insert, const struct insert_grave *grave)
{
	struct insert_chunk *chunk = &insert->scratch->chunk;
	struct batch_message *message = &insert->batch->messages[grave->message];
	const char *route =
	    insert->batch->route != NULL ? insert->batch->route : insert->target->config->consumer.topic;
	struct document_fault fault = {.reason = grave->reason,
	                               .message = (const char *)insert->scratch->texts.data + grave->text,
	                               .offset = grave->offset};
	message->reason = (uint8_t)grave->reason;
	make_room(insert, message);
	size_t start = chunk->bytes.length;
	document_dead_letter(insert->batch, message, &fault, route, &chunk->bytes);
	take_document(insert, start, grave->message);
}

static void insert_dead_letters(struct insert *insert)
{
	insert->namespace = STORE_DEAD_LETTERS;
	for (size_t i = 0; i < insert->scratch->grave_count && may_go_on(insert); i++)
		add_dead_letter(insert, &insert->scratch->graves[i]);
	flush_chunk(insert);
	insert->scratch->grave_count = 0;
	buffer_reset(&insert->scratch->texts, TEXTS_KEPT);
}

static mongoc_collection_t *open_collection(const struct insert_target *target, const char *name)
{
	mongoc_collection_t *collection =
	    mongoc_client_get_collection(target->client, target->config->mongodb.database, name);
	mongoc_collection_set_write_concern(collection, target->write_concern);
	return collection;
}

void insert_batch(const struct insert_target *target, struct insert_scratch *scratch, struct batch *batch,
                  struct store_report *report)
{
	const struct config_consumer *config = &target->config->consumer;
	struct insert insert = {.target = target, .scratch = scratch, .batch = batch, .report = report};
	insert.collections[STORE_MESSAGES] = open_collection(target, config->collection);
	insert.collections[STORE_DEAD_LETTERS] = open_collection(target, config->dead_letter);
	insert_messages(&insert);
	insert_dead_letters(&insert);
	for (size_t i = 0; i < STORE_NAMESPACES; i++)
		mongoc_collection_destroy(insert.collections[i]);
}
