/* See store.h. What is written, and what MongoDB's replies mean, is in insert.c. */
#include "store.h"

#include "insert.h"
#include "log.h"
#include "memory.h"
#include "mongodb_error.h"

#include <mongoc/mongoc.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
	SERVER_SELECTION_MS = 3000, /* at most two of them in a row, when it stops without MongoDB */
	CONNECT_MS = 5000,
	SOCKET_MS = 20000,
	ERROR_API = 2,
};

struct store {
	const struct config *config;
	mongoc_write_concern_t *write_concern;
	mongoc_uri_t *uri;
	pthread_mutex_t lock;                           /* guards the making of the pool, and looked */
	mongoc_client_pool_t *pool;                     /* NULL until its name has been resolved (mongodb+srv) */
	bool looked;                                    /* at consumer.collection, or somebody is about to */
	_Atomic(int64_t) taken_at_ms[STORE_NAMESPACES]; /* see insert.h */
};

struct store_scratch {
	struct insert_scratch insert;
};

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

static void look_once(struct store *store);

/* ---- writing ---- */

struct store_scratch *store_scratch_create(void)
{
	return memory_zeroed(1, sizeof(struct store_scratch));
}

void store_scratch_destroy(struct store_scratch *scratch)
{
	if (scratch == NULL)
		return;
	insert_scratch_finish(&scratch->insert);
	free(scratch);
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
	struct insert_target target = {
	    .write_concern = store->write_concern,
	    .config = store->config,
	    .timeout_ms = mongoc_uri_get_option_as_int32(store->uri, MONGOC_URI_SOCKETTIMEOUTMS, SOCKET_MS),
	    .taken_at_ms = store->taken_at_ms};
	target.client = borrow_client(store, report);
	if (target.client != NULL) {
		insert_batch(&target, &scratch->insert, batch, report);
		mongoc_client_pool_push(store->pool, target.client);
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
		store_report_error(report, &error, "cannot delete dead letters", NULL);
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
	if (error->domain != MONGOC_ERROR_SERVER || mongodb_is_transient((int)error->code)) {
		store_report_error(report, error, "cannot read from MongoDB", NULL);
		return;
	}
	report->class = STORE_CONFIGURATION;
	snprintf(report->message, sizeof report->message, "MongoDB refuses the query: %.*s (%u)%s",
	         mongodb_message_length(error->message), error->message, (unsigned)error->code,
	         error->code == 13 ? mongodb_remedy(error->domain, 13) : "");
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
		store_report_error(report, &error, "MongoDB does not answer", NULL);
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
