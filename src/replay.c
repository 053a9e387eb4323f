/*
 * See replay.h.
 *
 * Batch by batch, in the order of _id: read, write, delete. Each of the three steps is repeated by itself until MongoDB
 * has done it, for every one of them does no harm the second time: reading changes nothing, a message that was written
 * meets its own _id, a dead letter that is gone is gone. The next batch begins behind the last _id read, so that what
 * stays is not looked at again, and the whole ends at the newest dead letter of the beginning, so that it ends also
 * where a service beside it makes new ones all the time.
 */
#include "replay.h"

#include "batch.h"
#include "document.h"
#include "escape.h"
#include "log.h"
#include "metrics.h"
#include "store.h"

#include <cjson/cJSON.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>
#include <uv.h>

enum {
	BATCH_MESSAGES = 500,
	BATCH_BYTES = 8 * 1024 * 1024,
	RETRY_FIRST_MS = 100,
	RETRY_MOST_MS = 2000,
	RETRY_GIVE_UP_MS = 30000,
	PROGRESS_MS = 10000,
};

/* One batch as it is read; begun anew with each attempt. */
struct reading {
	uint64_t looked_at;
	uint64_t kinds[DOCUMENT_LETTERS];
	bson_oid_t last;
};

struct replay {
	const struct config *config;
	struct store *store;
	struct store_scratch *scratch;
	bson_t *filter;
	struct batch batch;
	struct reading reading;
	uint8_t digest[BATCH_DIGEST_BYTES]; /* of the letter at hand */
	struct buffer properties;           /* the same */
	bson_oid_t after, newest;           /* what is still to be read: after < _id <= newest */
	bool begun;                         /* `after` means something */
	bool any;                           /* `newest` does */
	bool ending;                        /* no second attempts any more */
	uint64_t said_at;                   /* the last line on its progress, hrtime */

	uint64_t looked_at, moved;
	uint64_t failing[DOCUMENT_REASONS];
	uint64_t kinds[DOCUMENT_LETTERS];
};

static volatile sig_atomic_t interrupted;

static void on_signal(int number)
{
	interrupted = number;
}

/* The second one has its usual effect: it ends the process, which is safe at any moment. */
static void watch_signals(void)
{
	struct sigaction action = {.sa_handler = on_signal, .sa_flags = (int)SA_RESETHAND};
	sigemptyset(&action.sa_mask);
	sigaction(SIGINT, &action, NULL);
	sigaction(SIGTERM, &action, NULL);
	signal(SIGPIPE, SIG_IGN);
}

/* ---- reading ---- */

/* { $and: [ { _id: ids }, filter ] } */
static bson_t *make_query(const struct replay *replay, const bson_t *ids)
{
	bson_t *query = bson_new();
	bson_t both, id;
	BSON_APPEND_ARRAY_BEGIN(query, "$and", &both);
	BSON_APPEND_DOCUMENT_BEGIN(&both, "0", &id);
	BSON_APPEND_DOCUMENT(&id, "_id", ids);
	bson_append_document_end(&both, &id);
	BSON_APPEND_DOCUMENT(&both, "1", replay->filter);
	bson_append_array_end(query, &both);
	return query;
}

static bool find(struct replay *replay, bson_t *ids, bson_t *options, bool (*take)(void *, const bson_t *),
                 struct store_report *report)
{
	bson_t *query = make_query(replay, ids);
	bool found =
	    store_find(replay->store, replay->config->consumer.dead_letter, query, options, take, replay, report);
	bson_destroy(query);
	bson_destroy(ids);
	bson_destroy(options);
	return found;
}

static bool take_newest(void *context, const bson_t *letter)
{
	struct replay *replay = context;
	bson_iter_t iter;
	if (bson_iter_init_find(&iter, letter, "_id") && BSON_ITER_HOLDS_OID(&iter)) {
		replay->newest = *bson_iter_oid(&iter);
		replay->any = true;
	}
	return false;
}

static void find_newest(struct replay *replay, struct store_report *report)
{
	find(replay, BCON_NEW("$type", "objectId"),
	     BCON_NEW("sort", "{", "_id", BCON_INT32(-1), "}", "limit", BCON_INT64(1), "projection", "{", "_id",
	              BCON_INT32(1), "}"),
	     take_newest, report);
}

static bool count_other(void *context, const bson_t *letter)
{
	struct replay *replay = context;
	replay->reading.looked_at++;
	replay->reading.kinds[DOCUMENT_LETTER_STRANGE]++;
	return true;
}

/* All of ours have an ObjectId: the others are not in the range that is read. */
static void count_others(struct replay *replay, struct store_report *report)
{
	replay->reading = (struct reading){0};
	find(replay, BCON_NEW("$not", "{", "$type", "objectId", "}"),
	     BCON_NEW("projection", "{", "_id", BCON_INT32(1), "}"), count_other, report);
}

static void restore(struct replay *replay, struct batch_record *record)
{
	record->tried = true; /* by a replay that was cut short between writing and deleting */
	if (record->payload_length > (uint64_t)replay->config->consumer.max_payload) {
		batch_digest(record->payload, record->payload_length, replay->digest);
		record->digest = replay->digest;
	}
	batch_restore(&replay->batch, record);
}

static bool take_letter(void *context, const bson_t *letter)
{
	struct replay *replay = context;
	struct reading *reading = &replay->reading;
	struct batch_record record;
	bson_iter_t iter;
	enum document_letter kind = document_read_dead_letter(letter, &record, &replay->properties);
	if (bson_iter_init_find(&iter, letter, "_id") && BSON_ITER_HOLDS_OID(&iter))
		reading->last = *bson_iter_oid(&iter);
	reading->looked_at++;
	reading->kinds[kind]++;
	if (kind == DOCUMENT_LETTER_WHOLE)
		restore(replay, &record);
	return replay->batch.arena.length < BATCH_BYTES;
}

static void read_batch(struct replay *replay, struct store_report *report)
{
	replay->reading = (struct reading){0};
	batch_reset(&replay->batch);
	bson_t *ids = BCON_NEW("$lte", BCON_OID(&replay->newest));
	if (replay->begun)
		BSON_APPEND_OID(ids, "$gt", &replay->after);
	find(replay, ids,
	     BCON_NEW("sort", "{", "_id", BCON_INT32(1), "}", "limit", BCON_INT64(BATCH_MESSAGES), "batchSize",
	              BCON_INT64(BATCH_MESSAGES)),
	     take_letter, report);
}

/* ---- writing and deleting ---- */

static void write_batch(struct replay *replay, struct store_report *report)
{
	store_write(replay->store, replay->scratch, &replay->batch, report);
}

static void delete_moved(struct replay *replay, struct store_report *report)
{
	store_delete_dead_letters(replay->store, &replay->batch, report);
}

static uint64_t count_moved(const struct batch *batch)
{
	return batch_count_outcome(batch, BATCH_STORED) + batch_count_outcome(batch, BATCH_DUPLICATE);
}

/* ---- again and again ---- */

static void wait_ms(int milliseconds)
{
	struct timespec time = {.tv_sec = milliseconds / 1000, .tv_nsec = (long)(milliseconds % 1000) * 1000000};
	if (!interrupted)
		nanosleep(&time, NULL); /* a signal ends it */
}

/* Repeat a step until it is done. False: it is not, and the log says why. */
static bool insist(struct replay *replay, void (*step)(struct replay *replay, struct store_report *report))
{
	uint64_t begun = uv_hrtime();
	for (int wait = RETRY_FIRST_MS;; wait = wait * 2 < RETRY_MOST_MS ? wait * 2 : RETRY_MOST_MS) {
		struct store_report report = {0};
		step(replay, &report);
		if (report.class == STORE_OK)
			return true;
		bool late = (uv_hrtime() - begun) / 1000000 >= RETRY_GIVE_UP_MS;
		if (report.class == STORE_CONFIGURATION || late || interrupted || replay->ending) {
			log_error("replay", "%s", report.message);
			return false;
		}
		if (wait == RETRY_FIRST_MS)
			log_warn("replay", "%s; trying again for %d s", report.message, RETRY_GIVE_UP_MS / 1000);
		wait_ms(wait);
	}
}

/* What was read is of use once the whole reading has succeeded. */
static void count_reading(struct replay *replay)
{
	replay->looked_at += replay->reading.looked_at;
	for (int kind = 0; kind < DOCUMENT_LETTERS; kind++)
		replay->kinds[kind] += replay->reading.kinds[kind];
}

static void count_batch(struct replay *replay, bool deleted)
{
	uint64_t moved = count_moved(&replay->batch);
	for (size_t i = 0; i < replay->batch.count; i++)
		if (replay->batch.messages[i].outcome == BATCH_DEAD_LETTERED)
			replay->failing[replay->batch.messages[i].reason]++;
	if (deleted)
		replay->moved += moved;
	else if (moved > 0)
		log_warn("replay",
		         "%llu messages are stored whose dead letters may still be there; a repeat deletes them",
		         (unsigned long long)moved);
}

static void say_progress(struct replay *replay)
{
	uint64_t now = uv_hrtime();
	if ((now - replay->said_at) / 1000000 < PROGRESS_MS)
		return;
	replay->said_at = now;
	log_info("replay", "%llu dead letters looked at, %llu moved so far", (unsigned long long)replay->looked_at,
	         (unsigned long long)replay->moved);
}

/* Write and delete what was read. */
static bool move_batch(struct replay *replay)
{
	bool written = insist(replay, write_batch);
	replay->ending = !written;
	bool deleted = count_moved(&replay->batch) == 0 || insist(replay, delete_moved);
	count_batch(replay, deleted);
	return written && deleted;
}

static bool replay_all(struct replay *replay)
{
	if (!insist(replay, find_newest) || !insist(replay, count_others))
		return false;
	count_reading(replay);
	while (replay->any && !interrupted) {
		if (!insist(replay, read_batch))
			return false;
		if (replay->reading.looked_at == 0)
			break;
		count_reading(replay);
		replay->after = replay->reading.last;
		replay->begun = true;
		if (!move_batch(replay))
			return false;
		say_progress(replay);
	}
	return !interrupted;
}

/* ---- what was done ---- */

static void add_counts(cJSON *object, const char *total_name, const char *name, const uint64_t *counts, int count,
                       const char *(*name_of)(int))
{
	uint64_t total = 0;
	for (int i = 0; i < count; i++)
		total += counts[i];
	cJSON_AddNumberToObject(object, total_name, (double)total);
	cJSON *each = cJSON_AddObjectToObject(object, name);
	for (int i = 0; i < count; i++)
		if (counts[i] != 0)
			cJSON_AddNumberToObject(each, name_of(i), (double)counts[i]);
}

static const char *reason_name(int reason)
{
	return document_reason_name((enum document_reason)reason);
}

/* Of those that are not replayable. */
static const char *kind_name(int kind)
{
	static const char *const names[] = {"truncated", "topic_not_utf8", "unknown_form"};
	return names[kind];
}

static void print_result(const struct replay *replay)
{
	cJSON *root = cJSON_CreateObject(), *part = cJSON_AddObjectToObject(root, "replay");
	cJSON_AddNumberToObject(part, "looked_at", (double)replay->looked_at);
	cJSON_AddNumberToObject(part, "moved", (double)replay->moved);
	add_counts(part, "still_failing", "still_failing_by_reason", replay->failing, DOCUMENT_REASONS, reason_name);
	add_counts(part, "not_replayable", "not_replayable_by_cause", replay->kinds + DOCUMENT_LETTER_TRUNCATED,
	           DOCUMENT_LETTERS - DOCUMENT_LETTER_TRUNCATED, kind_name);
	bool json = replay->config->log_format == LOG_FORMAT_JSON;
	char *text = json ? cJSON_PrintUnformatted(root) : metrics_text(root);
	escape_print_lines(stdout, text);
	if (json)
		escape_print_lines(stdout, "\n");
	fflush(stdout);
	free(text);
	cJSON_Delete(root);
}

int replay_dead_letters(const struct config *config)
{
	bson_error_t error;
	const char *filter = config->replay_filter != NULL ? config->replay_filter : "{}";
	struct replay replay = {.config = config, .said_at = uv_hrtime()};
	replay.filter = bson_new_from_json((const uint8_t *)filter, -1, &error);
	if (replay.filter == NULL) {
		log_error("replay", "--filter: %s", error.message);
		return 2;
	}
	watch_signals();
	replay.store = store_create(config);
	replay.scratch = store_scratch_create();
	bool complete = replay_all(&replay);
	if (interrupted)
		log_warn("replay", "interrupted; a repeat goes on where this one ended");
	print_result(&replay);
	store_scratch_destroy(replay.scratch);
	store_destroy(replay.store);
	batch_finish(&replay.batch);
	buffer_finish(&replay.properties);
	bson_destroy(replay.filter);
	return complete ? 0 : 1;
}
