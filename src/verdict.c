/* See verdict.h. */
#include "verdict.h"

#include "mongodb_error.h"

#include <mongoc/mongoc.h>
#include <stdio.h>
#include <string.h>

/* ---- one of the writeErrors ---- */

enum index_named { INDEX_UNNAMED, INDEX_ID, INDEX_OTHER };

struct write_error {
	int64_t index; /* -1: none, or none that is a number */
	int32_t code;
	const char *message;
	enum index_named named; /* of a duplicate key */
};

/* A count, an index or a code: some servers send them as doubles. -1 for what can be none. */
static int64_t number(const bson_iter_t *value)
{
	int64_t whole = -1;
	if (BSON_ITER_HOLDS_INT(value))
		whole = bson_iter_as_int64(value);
	else if (BSON_ITER_HOLDS_DOUBLE(value) && bson_iter_double(value) >= 0 && bson_iter_double(value) <= INT32_MAX)
		whole = (int64_t)bson_iter_double(value);
	return whole >= 0 && whole <= INT32_MAX ? whole : -1;
}

static enum index_named named_by_pattern(const bson_iter_t *pattern)
{
	bson_iter_t key;
	if (!bson_iter_recurse(pattern, &key) || !bson_iter_next(&key))
		return INDEX_UNNAMED;
	bool id = strcmp(bson_iter_key(&key), "_id") == 0 && !bson_iter_next(&key);
	return id ? INDEX_ID : INDEX_OTHER;
}

static void read_field(struct write_error *error, const bson_iter_t *field)
{
	const char *key = bson_iter_key(field);
	if (strcmp(key, "index") == 0)
		error->index = number(field);
	else if (strcmp(key, "code") == 0)
		error->code = (int32_t)number(field);
	else if (strcmp(key, "errmsg") == 0 && BSON_ITER_HOLDS_UTF8(field))
		error->message = bson_iter_utf8(field, NULL);
	else if (strcmp(key, "keyPattern") == 0 && BSON_ITER_HOLDS_DOCUMENT(field))
		error->named = named_by_pattern(field);
}

static struct write_error read_write_error(const bson_iter_t *entry)
{
	struct write_error error = {.index = -1, .message = ""};
	bson_iter_t field;
	if (!BSON_ITER_HOLDS_DOCUMENT(entry) || !bson_iter_recurse(entry, &field))
		return error;
	while (bson_iter_next(&field))
		read_field(&error, &field);
	return error;
}

static enum verdict_kind kind_of(const struct write_error *error)
{
	static const enum verdict_kind taken[] = {
	    [INDEX_UNNAMED] = VERDICT_TAKEN, [INDEX_ID] = VERDICT_ID_TAKEN, [INDEX_OTHER] = VERDICT_UNIQUE_INDEX};
	if (mongodb_is_duplicate_key(error->code))
		return taken[error->named];
	if (mongodb_is_about_document(error->code))
		return VERDICT_REFUSED;
	if (mongodb_is_transient(error->code) || mongodb_is_configuration(MONGOC_ERROR_SERVER, error->code))
		return VERDICT_LATER;
	return VERDICT_STRANGE;
}

/* ---- the reply ---- */

static void leave_open(struct verdict *verdicts, size_t count)
{
	for (size_t i = 0; i < count; i++)
		verdicts[i] = (struct verdict){.kind = VERDICT_OPEN, .message = ""};
}

/* The documents that have an error, each counted once, or -1 when the list is none or names one that is not there. */
static int64_t read_errors(const bson_t *reply, size_t count, struct verdict *verdicts)
{
	bson_iter_t iter, entry;
	int64_t listed = 0;
	if (!bson_iter_init_find(&iter, reply, "writeErrors"))
		return 0;
	if (!BSON_ITER_HOLDS_ARRAY(&iter) || !bson_iter_recurse(&iter, &entry))
		return -1;
	while (bson_iter_next(&entry)) {
		struct write_error error = read_write_error(&entry);
		if (error.index < 0 || (uint64_t)error.index >= count)
			return -1;
		struct verdict *verdict = &verdicts[error.index];
		if (verdict->kind != VERDICT_OPEN)
			continue;
		*verdict = (struct verdict){.kind = kind_of(&error), .code = error.code, .message = error.message};
		listed++;
	}
	return listed;
}

static bool has_elements(const bson_t *reply, const char *name)
{
	bson_iter_t iter, entry;
	return bson_iter_init_find(&iter, reply, name) &&
	       (!BSON_ITER_HOLDS_ARRAY(&iter) || !bson_iter_recurse(&iter, &entry) || bson_iter_next(&entry));
}

static int64_t inserted_count(const bson_t *reply)
{
	bson_iter_t iter;
	return bson_iter_init_find(&iter, reply, "insertedCount") ? number(&iter) : -1;
}

/* A call that failed did so because of one of the errors that its reply lists. Anything else speaks against what the
 * reply counts. */
static bool explains(const struct verdict *verdicts, size_t count, const bson_error_t *error)
{
	for (size_t i = 0; i < count; i++)
		if (verdicts[i].kind != VERDICT_OPEN && (uint32_t)verdicts[i].code == error->code)
			return error->domain == MONGOC_ERROR_SERVER;
	return false;
}

bool verdict_read(const bson_t *reply, size_t count, const bson_error_t *failed, struct verdict *verdicts)
{
	leave_open(verdicts, count);
	int64_t inserted = inserted_count(reply), listed = read_errors(reply, count, verdicts);
	if (inserted < 0 || listed < 0 || (uint64_t)inserted + (uint64_t)listed != count ||
	    (failed != NULL && !explains(verdicts, count, failed)) || has_elements(reply, "writeConcernErrors") ||
	    bson_has_field(reply, "writeConcernError")) {
		leave_open(verdicts, count);
		return false;
	}
	for (size_t i = 0; i < count; i++)
		if (verdicts[i].kind == VERDICT_OPEN)
			verdicts[i].kind = VERDICT_INSERTED;
	return true;
}

bool verdict_write_concern_error(const bson_t *reply, bson_error_t *error)
{
	bson_iter_t iter, entry, field;
	if (!bson_iter_init_find(&iter, reply, "writeConcernErrors") || !BSON_ITER_HOLDS_ARRAY(&iter) ||
	    !bson_iter_recurse(&iter, &entry) || !bson_iter_next(&entry) || !BSON_ITER_HOLDS_DOCUMENT(&entry) ||
	    !bson_iter_recurse(&entry, &field))
		return false;
	*error = (bson_error_t){.domain = MONGOC_ERROR_WRITE_CONCERN};
	while (bson_iter_next(&field)) {
		if (strcmp(bson_iter_key(&field), "code") == 0 && number(&field) > 0)
			error->code = (uint32_t)number(&field);
		else if (strcmp(bson_iter_key(&field), "errmsg") == 0 && BSON_ITER_HOLDS_UTF8(&field))
			snprintf(error->message, sizeof error->message, "%s", bson_iter_utf8(&field, NULL));
	}
	return true;
}
