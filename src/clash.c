/*
 * See clash.h.
 *
 * Each _id is asked for once, all of them with one find, and the documents found are matched by the keys of their _ids
 * (id_key.h), which know that MongoDB takes 5, 5.0 and NumberLong(5) for the same. A collection's collation may take
 * more for the same: what has found no match is asked for alone, so that the server says what is equal.
 *
 * Topics and payloads are compared by the bytes of their BSON, which the server keeps as they were written.
 *
 * The refused insert has waited for the write concern, as every insert does, so what is there is durable by it. With
 * w:majority the documents are nevertheless read with majority read concern: what is found then cannot be rolled back.
 */
#include "clash.h"

#include "id_key.h"

#include <string.h>

enum { MAX_TIME_MS = 10000 };

/* The bytes of an element's value. */
struct value {
	const uint8_t *bytes;
	size_t length;
	bson_type_t type;
};

/* The element of that name. A bson_iter_t does not tell where a value ends; the next element, or the closing byte,
 * begins there. */
static struct value value_of(const bson_t *document, const char *name)
{
	bson_iter_t iter;
	if (!bson_iter_init_find(&iter, document, name))
		return (struct value){0};
	size_t start = bson_iter_offset(&iter) + 1 + strlen(name) + 1;
	struct value value = {.bytes = bson_get_data(document) + start, .type = bson_iter_type(&iter)};
	value.length = (bson_iter_next(&iter) ? bson_iter_offset(&iter) : document->len - 1) - start;
	return value;
}

static bool is_equal(const bson_t *left, const bson_t *right, const char *name)
{
	struct value one = value_of(left, name), other = value_of(right, name);
	return one.type == other.type && one.length == other.length &&
	       (one.length == 0 || memcmp(one.bytes, other.bytes, one.length) == 0);
}

static enum clash_answer answer(const bson_t *document, const bson_t *found)
{
	if (!is_equal(document, found, "topic") || !is_equal(document, found, "payload"))
		return CLASH_OTHER;
	return is_equal(document, found, "received_at") ? CLASH_SAME_OWN : CLASH_SAME;
}

/* Several messages with one _id: one of them at most is the very document. */
static void answer_all(struct clash *clashes, const struct id_key_entry *entries, size_t count, const bson_t *found)
{
	bool own = false;
	for (size_t i = 0; i < count; i++) {
		struct clash *clash = &clashes[entries[i].owner];
		clash->answer = answer(clash->document, found);
		if (clash->answer == CLASH_SAME_OWN && own)
			clash->answer = CLASH_SAME;
		own = own || clash->answer == CLASH_SAME_OWN;
	}
}

/* { filter, options } of a find. */
static mongoc_cursor_t *find(mongoc_collection_t *collection, const mongoc_write_concern_t *concern,
                             const bson_t *filter)
{
	bson_t options, child;
	bool majority = mongoc_write_concern_get_w(concern) == MONGOC_WRITE_CONCERN_W_MAJORITY;
	bson_init(&options);
	BSON_APPEND_DOCUMENT_BEGIN(&options, "projection", &child);
	BSON_APPEND_INT32(&child, "topic", 1);
	BSON_APPEND_INT32(&child, "payload", 1);
	BSON_APPEND_INT32(&child, "received_at", 1);
	bson_append_document_end(&options, &child);
	BSON_APPEND_DOCUMENT_BEGIN(&options, "readConcern", &child);
	BSON_APPEND_UTF8(&child, "level", majority ? "majority" : "local");
	bson_append_document_end(&options, &child);
	BSON_APPEND_INT64(&options, "maxTimeMS", MAX_TIME_MS);
	mongoc_read_prefs_t *primary = mongoc_read_prefs_new(MONGOC_READ_PRIMARY);
	mongoc_cursor_t *cursor = mongoc_collection_find_with_opts(collection, filter, &options, primary);
	mongoc_read_prefs_destroy(primary);
	bson_destroy(&options);
	return cursor;
}

/* { _id: { $in: [ … ] } }, each once. */
static void list_ids(bson_t *filter, const struct clash *clashes, const struct id_key_set *ids)
{
	bson_t id, in;
	uint32_t listed = 0;
	BSON_APPEND_DOCUMENT_BEGIN(filter, "_id", &id);
	BSON_APPEND_ARRAY_BEGIN(&id, "$in", &in);
	for (size_t i = 0; i < ids->count; i += id_key_set_run(ids, i)) {
		bson_iter_t iter;
		char space[16];
		const char *key;
		bson_uint32_to_string(listed++, &key, space, sizeof space);
		if (bson_iter_init_find(&iter, clashes[ids->entries[i].owner].document, "_id"))
			bson_append_iter(&in, key, -1, &iter);
	}
	bson_append_array_end(&id, &in);
	bson_append_document_end(filter, &id);
}

static bool ask_for_all(mongoc_collection_t *collection, const mongoc_write_concern_t *concern, struct clash *clashes,
                        const struct id_key_set *ids, bson_error_t *error)
{
	bson_t filter;
	const bson_t *found;
	bson_init(&filter);
	list_ids(&filter, clashes, ids);
	mongoc_cursor_t *cursor = find(collection, concern, &filter);
	while (mongoc_cursor_next(cursor, &found)) {
		const struct id_key_entry *entries;
		size_t count = id_key_set_find(ids, found, &entries);
		answer_all(clashes, entries, count, found);
	}
	bool failed = mongoc_cursor_error(cursor, error);
	mongoc_cursor_destroy(cursor);
	bson_destroy(&filter);
	return !failed;
}

static bool ask_for_one(mongoc_collection_t *collection, const mongoc_write_concern_t *concern, struct clash *clashes,
                        const struct id_key_entry *entries, size_t count, bson_error_t *error)
{
	bson_t filter;
	bson_iter_t iter;
	const bson_t *found;
	bson_init(&filter);
	if (bson_iter_init_find(&iter, clashes[entries->owner].document, "_id"))
		bson_append_iter(&filter, "_id", -1, &iter);
	mongoc_cursor_t *cursor = find(collection, concern, &filter);
	if (mongoc_cursor_next(cursor, &found))
		answer_all(clashes, entries, count, found);
	bool failed = mongoc_cursor_error(cursor, error);
	mongoc_cursor_destroy(cursor);
	bson_destroy(&filter);
	return !failed;
}

bool clash_look_up(mongoc_collection_t *collection, const mongoc_write_concern_t *concern, struct clash *clashes,
                   size_t count, bson_error_t *error)
{
	struct id_key_set ids = {0};
	for (size_t i = 0; i < count; i++) {
		clashes[i].answer = CLASH_GONE;
		id_key_set_add(&ids, clashes[i].document, i);
	}
	id_key_set_sort(&ids);
	bool told = ask_for_all(collection, concern, clashes, &ids, error);
	for (size_t i = 0, run; i < ids.count && told; i += run) {
		run = id_key_set_run(&ids, i);
		if (clashes[ids.entries[i].owner].answer == CLASH_GONE)
			told = ask_for_one(collection, concern, clashes, &ids.entries[i], run, error);
	}
	id_key_set_finish(&ids);
	return told;
}
