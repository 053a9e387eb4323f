/*
 * See store.h.
 *
 * A batch is written in chunks of bounded bytes, so that a few messages whose BSON is six times their JSON do not pile
 * up in memory (the driver copies what it sends). A chunk is durable message by message: the driver's reply lists the
 * inserts and the errors with their index, and only when both together account for every document, and no write concern
 * error is among them, is any of it believed. Everything else stays open for another attempt with the same _ids, where
 * an earlier success shows as a duplicate key on _id. Where consumer.id makes the _id from the message, such an error
 * says less: clash.h finds out what is stored there.
 */
#include "store.h"

#include "clash.h"
#include "document.h"
#include "log.h"
#include "memory.h"

#include <mongoc/mongoc.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
	CHUNK_BYTES = 4 * 1024 * 1024, /* far below the driver's 48 MB per wire message */
	CHUNK_KEPT = 2 * 1024 * 1024,
	LARGE_BYTES = 64 * 1024,
	GROWTH_MOST = 7,            /* BSON of JSON such as [1,1,1,…] */
	SERVER_SELECTION_MS = 3000, /* at most two of them in a row, when it stops without MongoDB */
	CONNECT_MS = 5000,
	SOCKET_MS = 20000,
	ERROR_API = 2,
	REFUSALS_MOST = 4, /* attempts with an unknown error for one document */
	GONE_MOST = 8,     /* attempts that find an _id taken, but no document with it */
	CONFLICT_TEXT = 1000,
};

struct store {
	const struct config *config;
	mongoc_write_concern_t *write_concern;
	mongoc_uri_t *uri;
	pthread_mutex_t lock;       /* guards the making of the pool, and looked */
	mongoc_client_pool_t *pool; /* NULL until its name has been resolved (mongodb+srv) */
	bool looked;                /* at consumer.collection, or somebody is about to */
};

/* Documents waiting for one insert, back to back, and the message each came from. */
struct chunk {
	struct buffer bytes;
	size_t *starts;   /* of the documents; starts[count] is the end */
	size_t *messages; /* index in the batch */
	size_t count, capacity;
};

struct store_scratch {
	struct chunk stored, dead;
	struct clash *clashes; /* of one reply */
	size_t clash_count, clash_capacity;
};

/* One store_write() under way. */
struct write {
	struct store *store;
	struct store_scratch *scratch;
	struct batch *batch;
	struct store_report *report;
	mongoc_client_t *client;
	mongoc_collection_t *stored, *dead;
};

/* ---- error classes ---- */

static bool one_of(int code, const int *codes)
{
	for (; *codes != 0; codes++)
		if (*codes == code)
			return true;
	return false;
}

/* Server error codes that another attempt may not meet: the network, elections, shutdowns, time-outs, conflicts, full
 * disks and memory, interruptions, drops and migrations under way, a hosted service's rate limit (16500). From
 * MongoDB's error_codes.yml. */
static bool is_transient(int code)
{
	static const int codes[] = {
	    1,   6,   7,   8,   24,   39,    46,    50,    63,    64,    70,    71,    74,    82,    83,    89,  90,
	    91,  100, 112, 117, 133,  134,   145,   146,   149,   150,   172,   189,   199,   202,   203,   215, 216,
	    225, 226, 227, 237, 239,  246,   249,   250,   251,   256,   262,   264,   267,   272,   279,   281, 282,
	    290, 314, 317, 319, 338,  342,   343,   355,   358,   363,   365,   371,   384,   388,   402,   406, 407,
	    412, 414, 433, 449, 9001, 10058, 10107, 11600, 11601, 11602, 13388, 13435, 13436, 14031, 16500, 0};
	return one_of(code, codes);
}

/* Unauthorized, AuthenticationFailed, InvalidNamespace, UnknownReplWriteConcern, a view, a hosted service's login; for
 * a command as a whole also BadValue and FailedToParse, which are about its write concern. */
static bool is_configuration(uint32_t domain, int code)
{
	static const int codes[] = {2, 9, 11, 13, 18, 20, 26, 31, 48, 72, 73, 79, 166, 167, 242, 391, 8000, 13297, 0};
	return (domain == MONGOC_ERROR_CLIENT && code == MONGOC_ERROR_CLIENT_AUTHENTICATE) ||
	       ((domain == MONGOC_ERROR_SERVER || domain == MONGOC_ERROR_WRITE_CONCERN) && one_of(code, codes));
}

/* Of write concern errors: too few members confirm in time, or there never can be enough. The others are elections and
 * shutdowns, which only interrupted the waiting. */
static bool is_unmet(int code)
{
	static const int codes[] = {2, 9, 64, 79, 100, 0};
	return one_of(code, codes);
}

static const char *remedy(uint32_t domain, int code)
{
	if ((domain == MONGOC_ERROR_CLIENT && code == MONGOC_ERROR_CLIENT_AUTHENTICATE) ||
	    (domain == MONGOC_ERROR_SERVER && (code == 18 || code == 8000)))
		return "; check user name, password and authSource in mongodb.uri";
	if (domain == MONGOC_ERROR_SERVER && code == 13)
		return "; the user of mongodb.uri needs the role readWrite on mongodb.database";
	if ((domain == MONGOC_ERROR_WRITE_CONCERN && is_unmet(code)) ||
	    (domain == MONGOC_ERROR_SERVER && (code == 2 || code == 9 || code == 79 || code == 100)))
		return "; check mongodb.write_concern.w against the replica set and its members";
	if (domain == MONGOC_ERROR_SERVER_SELECTION)
		return "; is mongod running, and is mongodb.uri right?";
	return "";
}

/* The same cause is to give the same text whichever call met it, so that the log can leave repetitions out. */
static const char *describe(uint32_t domain, const char *what)
{
	if (domain == MONGOC_ERROR_SERVER_SELECTION || domain == MONGOC_ERROR_STREAM)
		return "MongoDB does not answer";
	if (domain == MONGOC_ERROR_CLIENT)
		return "MongoDB does not let us in";
	return what;
}

/* "not authorized on plant to execute command { insert: …, $clusterTime: … }": the command differs each time. */
static int without_command(const char *message)
{
	const char *command = strstr(message, " to execute command {");
	return command != NULL ? (int)(command - message) : (int)strlen(message);
}

static void report_error(struct store_report *report, const bson_error_t *error, const char *what)
{
	enum store_class class =
	    is_configuration(error->domain, (int)error->code) ? STORE_CONFIGURATION : STORE_TRANSIENT;
	if (class < report->class)
		return;
	report->class = class;
	snprintf(report->message, sizeof report->message, "%s: %.*s (%u)%s", describe(error->domain, what),
	         without_command(error->message), error->message, (unsigned)error->code,
	         remedy(error->domain, (int)error->code));
}

/* ---- connecting ---- */

static void set_default_timeout(mongoc_uri_t *uri, const char *option, int milliseconds)
{
	if (!mongoc_uri_has_option(uri, option))
		mongoc_uri_set_option_as_int32(uri, option, milliseconds);
}

/* Behind a keepalive of a minute the driver's own time-outs (30 s, 5 min) would be too long; retryable writes would
 * double them, and our retry is the same _ids again. */
static mongoc_uri_t *make_uri(const struct config *config)
{
	bson_error_t error;
	mongoc_uri_t *uri = mongoc_uri_new_with_error(config->mongodb.uri, &error);
	if (uri == NULL) /* config.c has checked it */
		return NULL;
	set_default_timeout(uri, MONGOC_URI_SERVERSELECTIONTIMEOUTMS, SERVER_SELECTION_MS);
	set_default_timeout(uri, MONGOC_URI_CONNECTTIMEOUTMS, CONNECT_MS);
	set_default_timeout(uri, MONGOC_URI_SOCKETTIMEOUTMS, SOCKET_MS);
	mongoc_uri_set_option_as_bool(uri, MONGOC_URI_RETRYWRITES, false);
	mongoc_uri_set_option_as_bool(uri, MONGOC_URI_RETRYREADS, false);
	return uri;
}

static void set_w(mongoc_write_concern_t *concern, const char *w)
{
	char *end;
	long number = strtol(w, &end, 10);
	if (strcmp(w, "majority") == 0)
		mongoc_write_concern_set_w(concern, MONGOC_WRITE_CONCERN_W_MAJORITY);
	else if (*end == 0 && end != w)
		mongoc_write_concern_set_w(concern, (int32_t)number);
	else
		mongoc_write_concern_set_wtag(concern, w);
}

/* A key of ours beats the URI, the URI beats our default. */
static mongoc_write_concern_t *make_write_concern(const struct config_mongodb *config, const mongoc_uri_t *uri)
{
	const mongoc_write_concern_t *given = uri != NULL ? mongoc_uri_get_write_concern(uri) : NULL;
	mongoc_write_concern_t *concern = given != NULL ? mongoc_write_concern_copy(given) : mongoc_write_concern_new();
	if (config->w_set || mongoc_write_concern_get_w(concern) == MONGOC_WRITE_CONCERN_W_DEFAULT)
		set_w(concern, config->w);
	if (config->j_set || !mongoc_write_concern_journal_is_set(concern))
		mongoc_write_concern_set_journal(concern, config->j);
	if (config->write_timeout_set || mongoc_write_concern_get_wtimeout_int64(concern) == 0)
		mongoc_write_concern_set_wtimeout_int64(concern, config->write_timeout_ms);
	return concern;
}

static void driver_log(mongoc_log_level_t level, const char *domain, const char *message, void *context)
{
	if (level <= MONGOC_LOG_LEVEL_WARNING)
		log_debug("driver", "%s: %s", domain, message);
}

struct store *store_create(const struct config *config)
{
	struct store *store = memory_zeroed(1, sizeof *store);
	store->config = config;
	mongoc_log_set_handler(driver_log, NULL); /* first: mongoc_init() may have something to say */
	mongoc_init();
	store->uri = make_uri(config);
	store->write_concern = make_write_concern(&config->mongodb, store->uri);
	pthread_mutex_init(&store->lock, NULL);
	return store;
}

void store_destroy(struct store *store)
{
	if (store == NULL)
		return;
	if (store->pool != NULL)
		mongoc_client_pool_destroy(store->pool);
	mongoc_write_concern_destroy(store->write_concern);
	mongoc_uri_destroy(store->uri);
	pthread_mutex_destroy(&store->lock);
	free(store);
}

static mongoc_client_pool_t *make_pool(struct store *store, bson_error_t *error)
{
	mongoc_client_pool_t *pool = mongoc_client_pool_new_with_error(store->uri, error);
	if (pool != NULL) {
		mongoc_client_pool_set_error_api(pool, ERROR_API);
		mongoc_client_pool_set_appname(pool, "mqtt2mongo");
	}
	return pool;
}

/* A client, or NULL with `report` filled. A mongodb+srv:// name is looked up here, hence the lazy pool. */
static mongoc_client_t *borrow_client(struct store *store, struct store_report *report)
{
	bson_error_t error = {0};
	pthread_mutex_lock(&store->lock);
	if (store->pool == NULL && store->uri != NULL)
		store->pool = make_pool(store, &error);
	mongoc_client_pool_t *pool = store->pool;
	pthread_mutex_unlock(&store->lock);
	mongoc_client_t *client = pool != NULL ? mongoc_client_pool_pop(pool) : NULL;
	if (client != NULL)
		return client;
	report->class = STORE_TRANSIENT;
	report->away = true;
	if (pool != NULL)
		snprintf(error.message, sizeof error.message, "no free connection within its waitQueueTimeoutMS");
	snprintf(report->message, sizeof report->message, "cannot use mongodb.uri: %s", error.message);
	return NULL;
}

/* ---- chunks ---- */

static void chunk_finish(struct chunk *chunk)
{
	buffer_finish(&chunk->bytes);
	free(chunk->starts);
	free(chunk->messages);
}

struct store_scratch *store_scratch_create(void)
{
	return memory_zeroed(1, sizeof(struct store_scratch));
}

void store_scratch_destroy(struct store_scratch *scratch)
{
	if (scratch == NULL)
		return;
	chunk_finish(&scratch->stored);
	chunk_finish(&scratch->dead);
	free(scratch->clashes);
	free(scratch);
}

static void chunk_reserve(struct chunk *chunk)
{
	if (chunk->count + 1 < chunk->capacity)
		return;
	chunk->capacity = chunk->capacity ? chunk->capacity * 2 : 64;
	chunk->starts = memory_resize(chunk->starts, chunk->capacity * sizeof *chunk->starts);
	chunk->messages = memory_resize(chunk->messages, chunk->capacity * sizeof *chunk->messages);
}

/* The bytes appended since the last document are the one of `message`. */
static void chunk_add(struct chunk *chunk, size_t start, size_t message)
{
	chunk_reserve(chunk);
	chunk->starts[chunk->count] = start;
	chunk->messages[chunk->count++] = message;
	chunk->starts[chunk->count] = chunk->bytes.length;
}

static void chunk_clear(struct chunk *chunk)
{
	chunk->count = 0;
	buffer_reset(&chunk->bytes, CHUNK_KEPT);
}

static void look_once(struct store *store);

/* ---- inserting ---- */

static void settle(struct write *write, size_t message, enum batch_outcome outcome, enum document_reason reason)
{
	write->batch->messages[message].outcome = (uint8_t)outcome;
	write->batch->messages[message].reason = (uint8_t)reason;
}

static void flush_chunk(struct write *write, struct chunk *chunk);

/* Put the dead letter of a message behind the others. */
static void bury(struct write *write, size_t message, const struct document_fault *fault)
{
	struct chunk *dead = &write->scratch->dead;
	size_t start = dead->bytes.length;
	if (start > CHUNK_BYTES) {
		flush_chunk(write, dead);
		start = 0;
	}
	write->batch->messages[message].reason = (uint8_t)fault->reason;
	document_dead_letter(write->batch, &write->batch->messages[message], fault,
	                     write->batch->route != NULL ? write->batch->route : write->store->config->consumer.topic,
	                     &dead->bytes);
	chunk_add(dead, start, message);
}

/* MongoDB will never take this document. A dead letter it does not take stays open: somebody must look at that
 * collection. */
static void refuse(struct write *write, const struct chunk *chunk, size_t index, enum document_reason reason,
                   const char *text)
{
	if (chunk == &write->scratch->dead) {
		write->report->class = STORE_CONFIGURATION;
		snprintf(write->report->message, sizeof write->report->message,
		         "MongoDB refuses a dead letter: %s; has the collection consumer.dead_letter a validator or "
		         "unique index?",
		         text);
		return;
	}
	struct document_fault fault = {.reason = reason, .message = text};
	bury(write, chunk->messages[index], &fault);
}

static void settle_inserted(struct write *write, const struct chunk *chunk, size_t index)
{
	size_t message = chunk->messages[index];
	bool dead = chunk == &write->scratch->dead;
	settle(write, message, dead ? BATCH_DEAD_LETTERED : BATCH_STORED, write->batch->messages[message].reason);
}

struct write_error {
	int32_t index, code;
	const char *message;
	bool on_id; /* a duplicate key on _id, not on another unique index */
};

static bool names_id(const bson_iter_t *pattern)
{
	bson_iter_t key;
	return bson_iter_recurse(pattern, &key) && bson_iter_next(&key) && strcmp(bson_iter_key(&key), "_id") == 0 &&
	       !bson_iter_next(&key);
}

static struct write_error read_write_error(const bson_iter_t *entry)
{
	struct write_error error = {.index = -1, .message = ""};
	bson_iter_t field;
	if (!BSON_ITER_HOLDS_DOCUMENT(entry) || !bson_iter_recurse(entry, &field))
		return error;
	bool pattern_seen = false;
	while (bson_iter_next(&field)) {
		const char *key = bson_iter_key(&field);
		if (strcmp(key, "index") == 0) {
			error.index = (int32_t)bson_iter_as_int64(&field);
		} else if (strcmp(key, "code") == 0) {
			error.code = (int32_t)bson_iter_as_int64(&field);
		} else if (strcmp(key, "errmsg") == 0 && BSON_ITER_HOLDS_UTF8(&field)) {
			error.message = bson_iter_utf8(&field, NULL);
		} else if (strcmp(key, "keyPattern") == 0 && BSON_ITER_HOLDS_DOCUMENT(&field)) {
			pattern_seen = true;
			error.on_id = names_id(&field);
		}
	}
	if (!pattern_seen)
		error.on_id = strstr(error.message, "index: _id_ ") != NULL;
	return error;
}

static size_t array_length(const bson_t *reply, const char *name)
{
	bson_iter_t iter, entry;
	size_t length = 0;
	if (bson_iter_init_find(&iter, reply, name) && BSON_ITER_HOLDS_ARRAY(&iter) && bson_iter_recurse(&iter, &entry))
		while (bson_iter_next(&entry))
			length++;
	return length;
}

/* The reply accounts for every document, and its write concern was met. */
static bool is_complete(const bson_t *reply, size_t count)
{
	bson_iter_t iter;
	int64_t inserted = 0;
	if (bson_iter_init_find(&iter, reply, "insertedCount"))
		inserted = bson_iter_as_int64(&iter);
	return (uint64_t)inserted + array_length(reply, "writeErrors") == count &&
	       array_length(reply, "writeConcernErrors") == 0 && !bson_has_field(reply, "writeConcernError");
}

/* Codes that say what is wrong with this document: its values, its form, an index or a validator it does not fit. Those
 * of five digits are assertions of the code that looked at it. */
static bool is_about_document(int code)
{
	static const int codes[] = {2,  9,  14, 15,  16,  17,  22,  28,  52,  53,  54,  55,  56,
	                            57, 61, 66, 111, 116, 121, 153, 171, 201, 241, 357, 378, 0};
	return one_of(code, codes) ||
	       (code >= 10000 && !is_transient(code) && !is_configuration(MONGOC_ERROR_SERVER, code));
}

/* A code nobody has listed may be about the document as well: it gets a few attempts, and is then taken for that. A
 * dead letter keeps every byte, while a document that is tried for ever would stop all others. */
static bool is_given_up(struct batch_message *message, int code)
{
	if (is_transient(code) || is_configuration(MONGOC_ERROR_SERVER, code))
		return false;
	return ++message->refusals >= REFUSALS_MOST;
}

/* ---- an _id that is taken ---- */

static void add_clash(struct write *write, size_t index, const bson_t *document)
{
	struct store_scratch *scratch = write->scratch;
	if (scratch->clash_count == scratch->clash_capacity) {
		scratch->clash_capacity = scratch->clash_capacity ? scratch->clash_capacity * 2 : 64;
		scratch->clashes = memory_resize(scratch->clashes, scratch->clash_capacity * sizeof *scratch->clashes);
	}
	scratch->clashes[scratch->clash_count++] = (struct clash){.index = index, .document = document};
}

/* Another message has the _id: its place is taken for good. */
static void refuse_conflict(struct write *write, const struct chunk *chunk, const struct clash *clash, const char *what)
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
	refuse(write, chunk, clash->index, DOCUMENT_ID_CONFLICT, message);
}

/* The bytes of the first element of a document, which is its _id. */
static const uint8_t *id_bytes(const bson_t *document, size_t *length)
{
	bson_iter_t iter;
	if (!bson_iter_init(&iter, document) || !bson_iter_next(&iter))
		abort(); /* we wrote it */
	*length = iter.next_off - iter.off;
	return iter.raw + iter.off;
}

/* A message that is received twice within a millisecond can be told from its double only by this: of those that are
 * written together one is the stored one. */
static bool is_claimed(const struct write *write, const struct chunk *chunk, const struct clash *clash)
{
	size_t length, other_length;
	const uint8_t *id = id_bytes(clash->document, &length);
	for (size_t i = 0; i < chunk->count; i++) {
		bson_t other;
		if (i == clash->index || write->batch->messages[chunk->messages[i]].outcome != BATCH_STORED ||
		    !bson_init_static(&other, chunk->bytes.data + chunk->starts[i],
		                      chunk->starts[i + 1] - chunk->starts[i]))
			continue;
		const uint8_t *other_id = id_bytes(&other, &other_length);
		if (other_length == length && memcmp(other_id, id, length) == 0)
			return true;
	}
	return false;
}

static void settle_clash(struct write *write, const struct chunk *chunk, const struct clash *clash)
{
	size_t index = chunk->messages[clash->index];
	struct batch_message *message = &write->batch->messages[index];
	switch (clash->answer) {
	case CLASH_SAME_OWN:
		settle(write, index,
		       message->tried && !is_claimed(write, chunk, clash) ? BATCH_STORED : BATCH_DUPLICATE,
		       message->reason);
		break;
	case CLASH_SAME:
		settle(write, index, BATCH_DUPLICATE, message->reason);
		break;
	case CLASH_OTHER:
		refuse_conflict(write, chunk, clash, "another message is stored under this _id");
		break;
	case CLASH_GONE:
		if (++message->refusals >= GONE_MOST) { /* an orphan of a shard, for one */
			refuse_conflict(write, chunk, clash, "this _id is taken by a document that cannot be read");
			break;
		}
		bson_error_t open = {.domain = MONGOC_ERROR_SERVER, .code = 11000};
		snprintf(open.message, sizeof open.message,
		         "its _id is taken, but the document that has it was deleted meanwhile or cannot be read");
		report_error(write->report, &open, "MongoDB did not store a document");
		break;
	}
}

static void settle_clashes(struct write *write, const struct chunk *chunk)
{
	struct store_scratch *scratch = write->scratch;
	size_t count = scratch->clash_count;
	bson_error_t error = {0};
	scratch->clash_count = 0; /* a dead letter may lead to another reply */
	if (count == 0)
		return;
	if (!clash_look_up(write->stored, write->store->write_concern, scratch->clashes, count, &error)) {
		report_error(write->report, &error, "cannot read what is stored under an _id that is taken");
		return;
	}
	for (size_t i = 0; i < count; i++)
		settle_clash(write, chunk, &scratch->clashes[i]);
}

static void settle_error(struct write *write, const struct chunk *chunk, size_t index, const bson_t *document,
                         const struct write_error *error)
{
	struct batch_message *message = &write->batch->messages[chunk->messages[index]];
	if (error->code == 11000 && error->on_id && !document_has_object_id(bson_get_data(document))) {
		add_clash(write, index, document);
	} else if (error->code == 11000 && error->on_id) {
		settle_inserted(write, chunk, index); /* our own earlier attempt: the _id was made by us */
	} else if (is_about_document(error->code) || is_given_up(message, error->code)) {
		refuse(write, chunk, index, error->code == 11000 ? DOCUMENT_UNIQUE_INDEX : DOCUMENT_REFUSED,
		       error->message);
	} else {
		bson_error_t open = {.domain = MONGOC_ERROR_SERVER, .code = (uint32_t)error->code};
		snprintf(open.message, sizeof open.message, "%s", error->message);
		report_error(write->report, &open, "MongoDB did not store a document");
	}
}

static void settle_reply(struct write *write, const struct chunk *chunk, const bson_t **documents, size_t first,
                         size_t count, const bson_t *reply)
{
	bool *failed = memory_zeroed(count, sizeof *failed);
	bson_iter_t iter, entry;
	if (bson_iter_init_find(&iter, reply, "writeErrors") && bson_iter_recurse(&iter, &entry)) {
		while (bson_iter_next(&entry)) {
			struct write_error error = read_write_error(&entry);
			if (error.index < 0 || (size_t)error.index >= count || failed[error.index])
				continue;
			failed[error.index] = true;
			settle_error(write, chunk, first + (size_t)error.index, documents[first + (size_t)error.index],
			             &error);
		}
	}
	for (size_t i = 0; i < count; i++)
		if (!failed[i])
			settle_inserted(write, chunk, first + i);
	free(failed);
	settle_clashes(write, chunk);
}

/* An error for the call as a whole that one document may have caused, by its size or its form: find it by halves. */
static bool may_hide_one_document(const bson_error_t *error)
{
	static const int sizes[] = {10334, 17280, 17419, 17420, 0};
	if (error->domain == MONGOC_ERROR_BSON)
		return true;
	if (error->domain == MONGOC_ERROR_COMMAND && error->code == MONGOC_ERROR_COMMAND_INVALID_ARG)
		return true;
	return error->domain == MONGOC_ERROR_SERVER && one_of((int)error->code, sizes);
}

/* The first write concern error of a reply, if there is one: written, but not where the promise wants it. */
static bool find_write_concern_error(const bson_t *reply, bson_error_t *error)
{
	bson_iter_t iter, entry, field;
	if (!bson_iter_init_find(&iter, reply, "writeConcernErrors") || !bson_iter_recurse(&iter, &entry) ||
	    !bson_iter_next(&entry) || !bson_iter_recurse(&entry, &field))
		return false;
	*error = (bson_error_t){.domain = MONGOC_ERROR_WRITE_CONCERN};
	while (bson_iter_next(&field)) {
		if (strcmp(bson_iter_key(&field), "code") == 0)
			error->code = (uint32_t)bson_iter_as_int64(&field);
		else if (strcmp(bson_iter_key(&field), "errmsg") == 0 && BSON_ITER_HOLDS_UTF8(&field))
			snprintf(error->message, sizeof error->message, "%s", bson_iter_utf8(&field, NULL));
	}
	return true;
}

static void insert_range(struct write *write, struct chunk *chunk, const bson_t **documents, size_t first,
                         size_t count);

/* The call failed as a whole, or its write concern did: nothing of it is believed. */
static void settle_failure(struct write *write, struct chunk *chunk, const bson_t **documents, size_t first,
                           size_t count, const bson_t *reply, bson_error_t *error)
{
	bool about_one = !find_write_concern_error(reply, error) && may_hide_one_document(error);
	write->report->away = write->report->away || !about_one;
	if (error->domain == MONGOC_ERROR_WRITE_CONCERN) {
		report_error(write->report, error,
		             is_unmet((int)error->code) ? "cannot store in MongoDB as mongodb.write_concern.w wants it"
		                                        : "MongoDB did not confirm a write");
	} else if (!about_one) {
		if (error->domain == 0)
			snprintf(error->message, sizeof error->message,
			         "its answer does not account for every document");
		report_error(write->report, error, "cannot store in MongoDB");
	} else if (count == 1) {
		refuse(write, chunk, first, DOCUMENT_REFUSED, error->message);
	} else {
		insert_range(write, chunk, documents, first, count / 2);
		if (write->report->class == STORE_OK)
			insert_range(write, chunk, documents, first + count / 2, count - count / 2);
	}
}

static void insert_range(struct write *write, struct chunk *chunk, const bson_t **documents, size_t first, size_t count)
{
	mongoc_collection_t *collection = chunk == &write->scratch->dead ? write->dead : write->stored;
	bson_t options, reply;
	bson_error_t error = {0};
	bson_init(&options);
	BSON_APPEND_BOOL(&options, "ordered", false);
	BSON_APPEND_BOOL(&options, "validate", false);
	mongoc_collection_insert_many(collection, documents + first, count, &options, &reply, &error);
	bson_destroy(&options);
	if (is_complete(&reply, count))
		settle_reply(write, chunk, documents, first, count, &reply);
	else
		settle_failure(write, chunk, documents, first, count, &reply, &error);
	bson_destroy(&reply);
}

static void insert_chunk(struct write *write, struct chunk *chunk)
{
	/* bson_t asks for more alignment than malloc() gives */
	bson_t *documents = memory_aligned(_Alignof(bson_t), chunk->count * sizeof *documents);
	const bson_t **pointers = memory_zeroed(chunk->count, sizeof(const bson_t *));
	for (size_t i = 0; i < chunk->count; i++) {
		size_t length = chunk->starts[i + 1] - chunk->starts[i];
		if (!bson_init_static(&documents[i], chunk->bytes.data + chunk->starts[i], length))
			abort(); /* we wrote it */
		pointers[i] = &documents[i];
	}
	insert_range(write, chunk, pointers, 0, chunk->count);
	free(pointers);
	free(documents);
}

static void flush_chunk(struct write *write, struct chunk *chunk)
{
	/* After a failure that is not about documents the rest of the batch would only wait for the same time-out. */
	if (chunk->count > 0 && write->report->class == STORE_OK)
		insert_chunk(write, chunk);
	chunk_clear(chunk);
}

static void add_message(struct write *write, size_t index)
{
	struct chunk *chunk = &write->scratch->stored;
	struct batch_message *message = &write->batch->messages[index];
	const struct id_rule *rule = &write->store->config->consumer.id;
	struct document_fault fault;
	/* Before it grows: two large documents in one buffer, and what the driver copies of them, add up for each
	 * worker. */
	if (chunk->count > 0 && message->payload_length >= LARGE_BYTES &&
	    chunk->bytes.length + (size_t)message->payload_length * GROWTH_MOST > CHUNK_BYTES)
		flush_chunk(write, chunk);
	size_t start = chunk->bytes.length;
	if (!document_build(write->batch, message, rule, &chunk->bytes, &fault)) {
		bury(write, index, &fault);
		return;
	}
	message->id_fallback = rule->count > 0 && document_has_object_id(chunk->bytes.data + start);
	if (chunk->bytes.length > CHUNK_BYTES && chunk->count > 0) {
		/* Send what stood before; the new document moves to the front. */
		size_t length = chunk->bytes.length - start;
		struct buffer kept = {0};
		buffer_append(&kept, chunk->bytes.data + start, length);
		chunk->bytes.length = start;
		flush_chunk(write, chunk);
		buffer_finish(&chunk->bytes);
		chunk->bytes = kept;
		start = 0;
	}
	chunk_add(chunk, start, index);
}

static mongoc_collection_t *open_collection(struct write *write, const char *name)
{
	mongoc_collection_t *collection =
	    mongoc_client_get_collection(write->client, write->store->config->mongodb.database, name);
	mongoc_collection_set_write_concern(collection, write->store->write_concern);
	return collection;
}

static void write_batch(struct write *write)
{
	const struct config_consumer *config = &write->store->config->consumer;
	write->stored = open_collection(write, config->collection);
	write->dead = open_collection(write, config->dead_letter);
	for (size_t i = 0; i < write->batch->count; i++)
		if (write->batch->messages[i].outcome == BATCH_OPEN)
			add_message(write, i);
	flush_chunk(write, &write->scratch->stored);
	flush_chunk(write, &write->scratch->dead);
	mongoc_collection_destroy(write->stored);
	mongoc_collection_destroy(write->dead);
}

/* The next attempt may meet what this one has written without our hearing of it. */
static size_t mark_tried(struct batch *batch)
{
	size_t open = 0;
	for (size_t i = 0; i < batch->count; i++) {
		struct batch_message *message = &batch->messages[i];
		if (message->outcome != BATCH_OPEN)
			continue;
		message->tried = true;
		open++;
	}
	return open;
}

void store_write(struct store *store, struct store_scratch *scratch, struct batch *batch, struct store_report *report)
{
	*report = (struct store_report){0};
	struct write write = {.store = store, .scratch = scratch, .batch = batch, .report = report};
	write.client = borrow_client(store, report);
	if (write.client != NULL) {
		write_batch(&write);
		mongoc_client_pool_push(store->pool, write.client);
		look_once(store);
	}
	report->open = mark_tried(batch);
	if (report->open > 0 && report->class == STORE_OK)
		report->class = STORE_TRANSIENT;
}

/* ---- dead letters that are none any more ---- */

/* { _id: { $in: [ … ] } } of the messages that are stored now; how many. */
static size_t select_stored(const struct batch *batch, bson_t *selector)
{
	bson_t id, list;
	char key[16];
	const char *index;
	uint32_t count = 0;
	BSON_APPEND_DOCUMENT_BEGIN(selector, "_id", &id);
	BSON_APPEND_ARRAY_BEGIN(&id, "$in", &list);
	for (size_t i = 0; i < batch->count; i++) {
		const struct batch_message *message = &batch->messages[i];
		if (message->outcome != BATCH_STORED && message->outcome != BATCH_DUPLICATE)
			continue;
		bson_uint32_to_string(count++, &index, key, sizeof key);
		BSON_APPEND_OID(&list, index, &message->id);
	}
	bson_append_array_end(&id, &list);
	bson_append_document_end(selector, &id);
	return count;
}

static void delete_selected(struct store *store, const bson_t *selector, struct store_report *report)
{
	bson_t reply;
	bson_error_t error;
	mongoc_client_t *client = borrow_client(store, report);
	if (client == NULL)
		return;
	mongoc_collection_t *letters =
	    mongoc_client_get_collection(client, store->config->mongodb.database, store->config->consumer.dead_letter);
	mongoc_collection_set_write_concern(letters, store->write_concern);
	if (!mongoc_collection_delete_many(letters, selector, NULL, &reply, &error))
		report_error(report, &error, "cannot delete dead letters");
	bson_destroy(&reply);
	mongoc_collection_destroy(letters);
	mongoc_client_pool_push(store->pool, client);
}

bool store_delete_dead_letters(struct store *store, const struct batch *batch, struct store_report *report)
{
	*report = (struct store_report){0};
	bson_t *selector = bson_new();
	if (select_stored(batch, selector) > 0)
		delete_selected(store, selector, report);
	bson_destroy(selector);
	return report->class == STORE_OK;
}

/* ---- asking ---- */

/* What the server says about a query is about the query or our rights, unless another attempt may do better. */
static void report_query(struct store_report *report, const bson_error_t *error)
{
	if (error->domain != MONGOC_ERROR_SERVER || is_transient((int)error->code)) {
		report_error(report, error, "cannot read from MongoDB");
		return;
	}
	report->class = STORE_CONFIGURATION;
	snprintf(report->message, sizeof report->message, "MongoDB refuses the query: %.*s (%u)%s",
	         without_command(error->message), error->message, (unsigned)error->code,
	         error->code == 13 ? remedy(error->domain, 13) : "");
}

bool store_find(struct store *store, const char *collection, const bson_t *query, const bson_t *options,
                bool (*take)(void *context, const bson_t *document), void *context, struct store_report *report)
{
	const bson_t *document;
	bson_error_t error;
	*report = (struct store_report){0};
	mongoc_client_t *client = borrow_client(store, report);
	if (client == NULL)
		return false;
	mongoc_read_prefs_t *primary = mongoc_read_prefs_new(MONGOC_READ_PRIMARY);
	mongoc_collection_t *source = mongoc_client_get_collection(client, store->config->mongodb.database, collection);
	mongoc_cursor_t *cursor = mongoc_collection_find_with_opts(source, query, options, primary);
	while (mongoc_cursor_next(cursor, &document) && take(context, document))
		;
	if (mongoc_cursor_error(cursor, &error))
		report_query(report, &error);
	mongoc_cursor_destroy(cursor);
	mongoc_collection_destroy(source);
	mongoc_read_prefs_destroy(primary);
	mongoc_client_pool_push(store->pool, client);
	return report->class == STORE_OK;
}

static bool run(struct store *store, const bson_t *command, bson_t *reply, struct store_report *report)
{
	*report = (struct store_report){0};
	mongoc_client_t *client = borrow_client(store, report);
	if (client == NULL) {
		bson_init(reply);
		return false;
	}
	bson_error_t error;
	bool done = mongoc_client_command_simple(client, store->config->mongodb.database, command, NULL, reply, &error);
	mongoc_client_pool_push(store->pool, client);
	if (!done)
		report_error(report, &error, "MongoDB does not answer");
	report->away = !done;
	return done;
}

static bool run_command(struct store *store, const char *name, bson_t *reply, struct store_report *report)
{
	bson_t command;
	bson_init(&command);
	BSON_APPEND_INT32(&command, name, 1);
	bool done = run(store, &command, reply, report);
	bson_destroy(&command);
	return done;
}

void store_ping(struct store *store, struct store_report *report)
{
	bson_t reply;
	if (run_command(store, "ping", &reply, report))
		look_once(store);
	bson_destroy(&reply);
}

static const char *text_field(const bson_t *document, const char *name, const char *otherwise)
{
	bson_iter_t iter;
	if (bson_iter_init_find(&iter, document, name) && BSON_ITER_HOLDS_UTF8(&iter))
		return bson_iter_utf8(&iter, NULL);
	return otherwise;
}

static const char *describe_topology(const bson_t *hello)
{
	if (text_field(hello, "setName", NULL) != NULL)
		return "replica set ";
	if (strcmp(text_field(hello, "msg", ""), "isdbgrid") == 0)
		return "sharded cluster";
	return "standalone (a majority is one server: what its disk loses is lost)";
}

bool store_describe(struct store *store, char *text, size_t size, struct store_report *report)
{
	bson_t build, hello;
	bool known = run_command(store, "buildInfo", &build, report);
	if (known) {
		known = run_command(store, "hello", &hello, report);
		if (!known) { /* before MongoDB 4.4.2 */
			bson_destroy(&hello);
			known = run_command(store, "isMaster", &hello, report);
		}
		snprintf(text, size, "MongoDB %s, %s%s", text_field(&build, "version", "?"), describe_topology(&hello),
		         text_field(&hello, "setName", ""));
		bson_destroy(&hello);
	}
	bson_destroy(&build);
	return known;
}

static bool names(const bson_iter_t *resource, const char *field, const char *name)
{
	bson_iter_t iter;
	return bson_iter_recurse(resource, &iter) && bson_iter_find(&iter, field) && BSON_ITER_HOLDS_UTF8(&iter) &&
	       (bson_iter_utf8(&iter, NULL)[0] == 0 || strcmp(bson_iter_utf8(&iter, NULL), name) == 0);
}

static bool has_any(const bson_iter_t *resource)
{
	bson_iter_t iter;
	return bson_iter_recurse(resource, &iter) && bson_iter_find(&iter, "anyResource") && bson_iter_as_bool(&iter);
}

static bool holds(const bson_iter_t *actions, const char *name)
{
	bson_iter_t action;
	if (bson_iter_recurse(actions, &action))
		while (bson_iter_next(&action))
			if (BSON_ITER_HOLDS_UTF8(&action) && strcmp(bson_iter_utf8(&action, NULL), name) == 0)
				return true;
	return false;
}

/* One entry of authenticatedUserPrivileges: { resource: { db, collection }, actions: [ … ] }; "" stands for any. */
static bool privilege_covers(const bson_iter_t *privilege, const char *action, const char *database,
                             const char *collection)
{
	bson_iter_t resource, actions;
	if (!bson_iter_recurse(privilege, &resource) || !bson_iter_find(&resource, "resource") ||
	    !bson_iter_recurse(privilege, &actions) || !bson_iter_find(&actions, "actions"))
		return false;
	bool here =
	    has_any(&resource) || (names(&resource, "db", database) && names(&resource, "collection", collection));
	return here && holds(&actions, action);
}

/* Do the privileges of our user cover `action` on `collection`? */
static bool may(struct store *store, const char *action, const char *collection)
{
	bson_t command, reply;
	struct store_report report;
	bson_iter_t iter, users, privileges, entry;
	bson_init(&command);
	BSON_APPEND_INT32(&command, "connectionStatus", 1);
	BSON_APPEND_BOOL(&command, "showPrivileges", true);
	bool told = run(store, &command, &reply, &report);
	bson_destroy(&command);
	told = told && bson_iter_init(&iter, &reply) &&
	       bson_iter_find_descendant(&iter, "authInfo.authenticatedUsers", &users) &&
	       bson_iter_recurse(&users, &entry) && bson_iter_next(&entry) && bson_iter_init(&iter, &reply) &&
	       bson_iter_find_descendant(&iter, "authInfo.authenticatedUserPrivileges", &privileges) &&
	       bson_iter_recurse(&privileges, &entry);
	bool covered = !told;
	while (!covered && bson_iter_next(&entry))
		covered = privilege_covers(&entry, action, store->config->mongodb.database, collection);
	bson_destroy(&reply);
	return covered;
}

bool store_may_write(struct store *store)
{
	const struct config_consumer *config = &store->config->consumer;
	return may(store, "insert", config->collection) && may(store, "insert", config->dead_letter) &&
	       (config->id.count == 0 || may(store, "find", config->collection));
}

/* Whether consumer.collection is a time-series collection. False also where that cannot be found out, with `report`
 * filled. */
static bool is_time_series(struct store *store, struct store_report *report)
{
	bson_t reply;
	bson_iter_t iter, type;
	bson_t *command = BCON_NEW("listCollections", BCON_INT32(1), "filter", "{", "name",
	                           BCON_UTF8(store->config->consumer.collection), "}");
	bool found = run(store, command, &reply, report) && bson_iter_init(&iter, &reply) &&
	             bson_iter_find_descendant(&iter, "cursor.firstBatch.0.type", &type) &&
	             BSON_ITER_HOLDS_UTF8(&type) && strcmp(bson_iter_utf8(&type, NULL), "timeseries") == 0;
	bson_destroy(command);
	bson_destroy(&reply);
	return found;
}

const char *store_collection_fault(struct store *store, struct store_report *report)
{
	if (!is_time_series(store, report))
		return NULL;
	return store->config->consumer.id.count > 0
	           ? "is a time-series collection, in which MongoDB does not keep _id unique: consumer.id has no "
	             "effect "
	             "there, and a message that comes twice is stored twice; use an ordinary collection, or leave out "
	             "consumer.id"
	           : "is a time-series collection, in which MongoDB does not keep _id unique: what is tried again "
	             "after "
	             "an error may be stored twice; an ordinary collection would notice";
}

/* When MongoDB answers for the first time: say what is wrong with the collection. */
static void look_once(struct store *store)
{
	struct store_report report;
	pthread_mutex_lock(&store->lock);
	bool looked = store->looked;
	store->looked = true;
	pthread_mutex_unlock(&store->lock);
	if (looked)
		return;
	const struct config *config = store->config;
	const char *fault = store_collection_fault(store, &report);
	if (fault != NULL)
		log_write(config->consumer.id.count > 0 ? LOG_LEVEL_ERROR : LOG_LEVEL_WARN, "consumer", "%s.%s %s",
		          config->mongodb.database, config->consumer.collection, fault);
	pthread_mutex_lock(&store->lock);
	store->looked = report.class != STORE_TRANSIENT; /* else it is gone again, another time */
	pthread_mutex_unlock(&store->lock);
}

void store_write_concern_text(const struct store *store, char *text, size_t size)
{
	const mongoc_write_concern_t *concern = store->write_concern;
	int32_t w = mongoc_write_concern_get_w(concern);
	char number[16];
	snprintf(number, sizeof number, "%d", (int)w);
	const char *name = w == MONGOC_WRITE_CONCERN_W_MAJORITY ? "majority"
	                   : w == MONGOC_WRITE_CONCERN_W_TAG    ? mongoc_write_concern_get_wtag(concern)
	                                                        : number;
	snprintf(text, size, "w:%s, j:%s, timeout %lld ms", name,
	         mongoc_write_concern_get_journal(concern) ? "true" : "false",
	         (long long)mongoc_write_concern_get_wtimeout_int64(concern));
}
