/*
 * --spool-status and --spool-export: the spool as the operator sees it, beside a running service or without one.
 *
 * Reads with a connection of its own and without the service's lock. Each transaction is short: one that lasted would
 * keep the service from emptying its write-ahead log. Main thread.
 */
#define _GNU_SOURCE
#include "clock.h"
#include "directory.h"
#include "escape.h"
#include "log.h"
#include "memory.h"
#include "spool.h"
#include "spool_row.h"
#include "utf8.h"

#include <bson/bson.h>
#include <cjson/cJSON.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum {
	BUSY_MS = 2000,
	ROWS_AT_ONCE = 1000,
	BYTES_AT_ONCE = 8 * 1024 * 1024,
	BEGINNINGS = 5, /* looks at a file that is being made, */
	BEGINNING_MS = 100,
};

struct view {
	const struct config_spool *config;
	char *path; /* without symbolic links on the way; NULL until open_view() */
	sqlite3 *database;
	bool missing; /* there is no file */
	int64_t messages, damaged, oldest_ms, bytes;
};

static int64_t size_of(const char *path, const char *suffix)
{
	struct stat status;
	char *whole = memory_format("%s%s", path, suffix);
	int64_t size = lstat(whole, &status) == 0 && S_ISREG(status.st_mode) ? (int64_t)status.st_size : 0;
	free(whole);
	return size;
}

static int query_number(sqlite3 *database, const char *sql, int64_t *number)
{
	sqlite3_stmt *statement = NULL;
	int code = sqlite3_prepare_v2(database, sql, -1, &statement, NULL);
	if (code == SQLITE_OK)
		code = sqlite3_step(statement);
	*number = code == SQLITE_ROW ? sqlite3_column_int64(statement, 0) : 0;
	sqlite3_finalize(statement);
	return code == SQLITE_ROW || code == SQLITE_DONE ? SQLITE_OK : code;
}

static int open_name(struct view *view, const char *name, int flags)
{
	int64_t application = 0, format = 0;
	int code = sqlite3_open_v2(name, &view->database, SQLITE_OPEN_READONLY | SQLITE_OPEN_NOFOLLOW | flags, NULL);
	if (code != SQLITE_OK)
		return code;
	sqlite3_busy_timeout(view->database, BUSY_MS);
	/* The log stays for the service, which wants to see it. */
	sqlite3_db_config(view->database, SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1, NULL);
	code = query_number(view->database, "PRAGMA application_id", &application);
	if (code == SQLITE_OK)
		code = query_number(view->database, "PRAGMA user_version", &format);
	if (code != SQLITE_OK)
		return code;
	return application == SPOOL_APPLICATION && format == SPOOL_FORMAT ? SQLITE_OK : SQLITE_NOTADB;
}

/* The path as SQLite's URI with "immutable": needs no file beside it. Allocated. */
static char *immutable_name(const char *path)
{
	struct buffer name = {0};
	buffer_append(&name, "file:", 5);
	for (; *path != 0; path++) {
		char escape[4];
		snprintf(escape, sizeof escape, "%%%02x", (unsigned char)*path);
		buffer_append(&name, escape, 3);
	}
	buffer_append(&name, "?immutable=1", sizeof "?immutable=1");
	return (char *)name.data;
}

/* The path with its directory resolved, for SQLite follows no link here; as it is where that cannot be done. */
static char *resolve(const char *path)
{
	char *directory = directory_of(path), *resolved = realpath(directory, NULL);
	const char *slash = strrchr(path, '/');
	char *whole =
	    resolved != NULL ? memory_format("%s/%s", resolved, slash != NULL ? slash + 1 : path) : memory_string(path);
	free(resolved);
	free(directory);
	return whole;
}

static void close_view(struct view *view)
{
	sqlite3_close_v2(view->database);
	free(view->path);
}

/* False, and it is said, when there is a file that cannot be read. */
static bool open_view(struct view *view)
{
	const char *path = view->path = resolve(view->config->path);
	struct stat status;
	bool exists = lstat(path, &status) == 0;
	int reason = exists ? 0 : errno;
	view->missing = !exists && (reason == ENOENT || reason == ENOTDIR);
	if (view->missing || (exists && S_ISREG(status.st_mode) && status.st_size == 0 && size_of(path, "-wal") == 0)) {
		view->missing = true;
		return true;
	}
	if (!exists || !S_ISREG(status.st_mode)) {
		log_error("spool", "cannot read %s: %s", path, exists ? "it is no regular file" : strerror(reason));
		return false;
	}
	int code = open_name(view, path, 0);
	/* A service may be making it at this moment. */
	for (int i = 0; i < BEGINNINGS && code == SQLITE_NOTADB; i++) {
		sqlite3_close_v2(view->database);
		view->database = NULL;
		sqlite3_sleep(BEGINNING_MS);
		code = open_name(view, path, 0);
	}
	/* Without the right to make the log's index, and without a log. */
	if (((code & 0xff) == SQLITE_CANTOPEN || (code & 0xff) == SQLITE_READONLY) && size_of(path, "-wal") == 0) {
		char *name = immutable_name(path);
		sqlite3_close_v2(view->database);
		view->database = NULL;
		code = open_name(view, name, SQLITE_OPEN_URI);
		free(name);
	}
	if (code == SQLITE_OK)
		return true;
	if (code == SQLITE_NOTADB)
		log_error("spool", "%s is damaged, or no spool of this version", path);
	else
		log_error("spool", "cannot read the spool %s: %s", path, sqlite3_errmsg(view->database));
	return false;
}

/* ---- status ---- */

static bool query_view(struct view *view)
{
	const char *path = view->path;
	view->bytes = size_of(path, "") + size_of(path, "-wal") + size_of(path, "-shm");
	if (view->missing)
		return true;
	int code = query_number(view->database, "SELECT messages FROM tally", &view->messages);
	if (code == SQLITE_OK)
		code = query_number(view->database, "SELECT count(*) FROM damaged", &view->damaged);
	if (code == SQLITE_OK)
		code = query_number(view->database, "SELECT received_at FROM message ORDER BY row LIMIT 1",
		                    &view->oldest_ms);
	if (code != SQLITE_OK)
		log_error("spool", "cannot read the spool %s: %s", path, sqlite3_errmsg(view->database));
	return code == SQLITE_OK;
}

static void print_text(const struct view *view)
{
	char oldest[64], most[32] = "";
	escape_print(stdout, "%s%s", view->missing ? "no spool at " : "spool     ", view->config->path);
	escape_print(stdout, "messages  %" PRId64, view->messages);
	if (view->config->max_size_set)
		snprintf(most, sizeof most, " of %" PRId64, view->config->max_size);
	escape_print(stdout, "bytes     %" PRId64 "%s", view->bytes, most);
	if (view->messages > 0) {
		clock_format(view->oldest_ms, oldest, sizeof oldest);
		escape_print(stdout, "oldest    %s, %" PRId64 " s ago", oldest,
		             (clock_wall_ms() - view->oldest_ms) / 1000);
	}
	if (view->damaged > 0)
		escape_print(stdout, "damaged   %" PRId64 ", kept in the table damaged of that file", view->damaged);
}

static void print_json(const struct view *view)
{
	char oldest[64];
	cJSON *tree = cJSON_CreateObject(), *spool = cJSON_AddObjectToObject(tree, "spool");
	cJSON_AddStringToObject(spool, "path", view->config->path);
	cJSON_AddBoolToObject(spool, "exists", !view->missing);
	cJSON_AddNumberToObject(spool, "messages", (double)view->messages);
	cJSON_AddNumberToObject(spool, "bytes", (double)view->bytes);
	if (view->config->max_size_set)
		cJSON_AddNumberToObject(spool, "max_size", (double)view->config->max_size);
	clock_format(view->oldest_ms, oldest, sizeof oldest);
	if (view->messages > 0)
		cJSON_AddStringToObject(spool, "oldest", oldest);
	cJSON_AddNumberToObject(spool, "damaged", (double)view->damaged);
	char *text = cJSON_PrintUnformatted(tree);
	if (text != NULL) {
		escape_print_lines(stdout, text);
		escape_print_lines(stdout, "\n");
	}
	cJSON_free(text);
	cJSON_Delete(tree);
}

static bool flush_output(void)
{
	if (fflush(stdout) == 0 && !ferror(stdout))
		return true;
	log_error("spool", "cannot write to standard output: %s", strerror(errno));
	return false;
}

int spool_print_status(const struct config_spool *config, bool json)
{
	struct view view = {.config = config};
	bool well = open_view(&view) && query_view(&view);
	if (well) {
		json ? print_json(&view) : print_text(&view);
		well = flush_output();
	}
	close_view(&view);
	return well ? 0 : 1;
}

/* ---- export ---- */

static void append_bytes(bson_t *document, const char *name, const void *bytes, size_t length)
{
	bson_append_binary(document, name, -1, BSON_SUBTYPE_BINARY, bytes, (uint32_t)length);
}

/* The topic's bytes may be cut by their column's end: what reads characters wants a NUL behind them. */
static void append_topic(bson_t *document, const struct batch_record *record)
{
	char *topic = memory_format("%.*s", (int)record->topic_length, record->topic);
	if (strlen(topic) == record->topic_length && utf8_is_text(topic, record->topic_length))
		bson_append_utf8(document, "topic", -1, topic, (int)record->topic_length);
	else
		append_bytes(document, "topic", record->topic, record->topic_length);
	free(topic);
}

static void append_row(struct buffer *out, const struct spool_row *row)
{
	const struct batch_record *record = &row->record;
	bson_t *document = bson_new();
	bson_append_oid(document, "_id", -1, &record->id);
	append_topic(document, record);
	append_bytes(document, "payload", record->payload, record->payload_length);
	bson_append_date_time(document, "received_at", -1, record->received_at);
	bson_append_int32(document, "qos", -1, record->qos);
	bson_append_bool(document, "retain", -1, record->retain);
	bson_append_bool(document, "dup", -1, record->dup);
	if (row->route_length > 0 && utf8_is_text(row->route, row->route_length))
		bson_append_utf8(document, "route", -1, row->route, (int)row->route_length);
	if (record->payload_length < record->full_length)
		bson_append_bool(document, "truncated", -1, true);
	if (record->digest != NULL) {
		bson_append_int64(document, "length", -1, record->full_length);
		append_bytes(document, "sha256", record->digest, BATCH_DIGEST_BYTES);
	}
	size_t length;
	char *text = bson_as_canonical_extended_json(document, &length);
	if (text != NULL) {
		buffer_append(out, text, length);
		buffer_append_byte(out, '\n');
	}
	bson_free(text);
	bson_destroy(document);
}

/* Print the rows behind *after, as many as are read in one go. SQLITE_DONE: there are none left. */
static int print_some(sqlite3_stmt *statement, int64_t *after, struct buffer *out, uint64_t *damaged)
{
	struct spool_row row;
	int code = SQLITE_ROW;
	out->length = 0;
	sqlite3_bind_int64(statement, 1, *after);
	for (int i = 0; i < ROWS_AT_ONCE && out->length < BYTES_AT_ONCE; i++) {
		code = sqlite3_step(statement);
		if (code != SQLITE_ROW)
			break;
		*after = sqlite3_column_int64(statement, 0);
		if (spool_row_take(statement, &row))
			append_row(out, &row);
		else
			++*damaged;
	}
	sqlite3_reset(statement);
	buffer_append_byte(out, 0);
	escape_print_lines(stdout, (const char *)out->data);
	return code;
}

static bool print_messages(struct view *view)
{
	sqlite3_stmt *statement = NULL;
	struct buffer out = {0};
	int64_t after = INT64_MIN;
	uint64_t damaged = 0;
	int code =
	    sqlite3_prepare_v2(view->database, "SELECT " SPOOL_COLUMN_NAMES " FROM message WHERE row > ? ORDER BY row",
	                       -1, &statement, NULL);
	if (code == SQLITE_OK)
		do {
			code = print_some(statement, &after, &out, &damaged);
		} while (code == SQLITE_ROW && !ferror(stdout));
	if (code != SQLITE_DONE && !ferror(stdout))
		log_error("spool", "cannot read the spool %s: %s", view->config->path, sqlite3_errmsg(view->database));
	if (damaged > 0)
		log_error("spool", "%" PRIu64 " messages are not what was written (wrong checksum) and left out",
		          damaged);
	sqlite3_finalize(statement);
	buffer_finish(&out);
	return code == SQLITE_DONE && damaged == 0;
}

int spool_export(const struct config_spool *config)
{
	struct view view = {.config = config};
	bool well = open_view(&view);
	if (well && view.missing)
		log_info("spool", "no spool at %s", config->path);
	else if (well)
		well = print_messages(&view);
	well = flush_output() && well;
	close_view(&view);
	return well ? 0 : 1;
}
