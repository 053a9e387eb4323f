/*
 * See clash.h.
 *
 * All _ids are asked for with one find, and the documents found are matched by the bytes of their _id. MongoDB also
 * takes 5, 5.0 and NumberLong(5) for the same _id, and a collection's collation "a" and "A": what has no match by its
 * bytes is asked for alone, so that the server says what is equal.
 *
 * Topics and payloads are compared by the bytes of their BSON, which the server keeps as they were written.
 *
 * The refused insert has waited for the write concern, as every insert does, so what is there is durable by it. With
 * w:majority the documents are nevertheless read with majority read concern: what is found then cannot be rolled back.
 */
#include "clash.h"

#include <stdlib.h>
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

static int compare(struct value left, struct value right)
{
	if (left.type != right.type)
		return left.type < right.type ? -1 : 1;
	if (left.length != right.length)
		return left.length < right.length ? -1 : 1;
	return left.length > 0 ? memcmp(left.bytes, right.bytes, left.length) : 0;
}

static bool is_equal(const bson_t *left, const bson_t *right, const char *name)
{
	return compare(value_of(left, name), value_of(right, name)) == 0;
}

static int compare_ids(const void *left, const void *right)
{
	const struct clash *one = left, *other = right;
	return compare(value_of(one->document, "_id"), value_of(other->document, "_id"));
}

static enum clash_answer answer(const bson_t *document, const bson_t *found)
{
	if (!is_equal(document, found, "topic") || !is_equal(document, found, "payload"))
		return CLASH_OTHER;
	return is_equal(document, found, "received_at") ? CLASH_SAME_OWN : CLASH_SAME;
}

/* The first of the sorted clashes with the _id of `found`, or NULL. */
static struct clash *first_match(struct clash *clashes, size_t count, const bson_t *found)
{
	struct clash key = {.document = found};
	struct clash *match = bsearch(&key, clashes, count, sizeof *clashes, compare_ids);
	while (match != NULL && match > clashes && compare_ids(match - 1, &key) == 0)
		match--;
	return match;
}

/* Several messages with one _id: one of them at most is the very document. */
static void answer_all(struct clash *clash, const struct clash *end, const bson_t *found)
{
	struct clash key = {.document = found};
	bool own = false;
	for (; clash != end && compare_ids(clash, &key) == 0; clash++) {
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

static bool ask_for_all(mongoc_collection_t *collection, const mongoc_write_concern_t *concern, struct clash *clashes,
                        size_t count, bson_error_t *error)
{
	bson_t filter, id, in;
	const bson_t *found;
	bson_init(&filter);
	BSON_APPEND_DOCUMENT_BEGIN(&filter, "_id", &id);
	BSON_APPEND_ARRAY_BEGIN(&id, "$in", &in);
	uint32_t listed = 0;
	for (size_t i = 0; i < count; i++) {
		bson_iter_t iter;
		char space[16];
		const char *key;
		if (i > 0 && compare_ids(&clashes[i - 1], &clashes[i]) == 0)
			continue;
		bson_uint32_to_string(listed++, &key, space, sizeof space);
		if (bson_iter_init_find(&iter, clashes[i].document, "_id"))
			bson_append_iter(&in, key, -1, &iter);
	}
	bson_append_array_end(&id, &in);
	bson_append_document_end(&filter, &id);
	mongoc_cursor_t *cursor = find(collection, concern, &filter);
	while (mongoc_cursor_next(cursor, &found)) {
		struct clash *match = first_match(clashes, count, found);
		if (match != NULL)
			answer_all(match, clashes + count, found);
	}
	bool failed = mongoc_cursor_error(cursor, error);
	mongoc_cursor_destroy(cursor);
	bson_destroy(&filter);
	return !failed;
}

static bool ask_for_one(mongoc_collection_t *collection, const mongoc_write_concern_t *concern, struct clash *clash,
                        bson_error_t *error)
{
	bson_t filter;
	bson_iter_t iter;
	const bson_t *found;
	bson_init(&filter);
	if (bson_iter_init_find(&iter, clash->document, "_id"))
		bson_append_iter(&filter, "_id", -1, &iter);
	mongoc_cursor_t *cursor = find(collection, concern, &filter);
	if (mongoc_cursor_next(cursor, &found))
		clash->answer = answer(clash->document, found);
	bool failed = mongoc_cursor_error(cursor, error);
	mongoc_cursor_destroy(cursor);
	bson_destroy(&filter);
	return !failed;
}

bool clash_look_up(mongoc_collection_t *collection, const mongoc_write_concern_t *concern, struct clash *clashes,
                   size_t count, bson_error_t *error)
{
	for (size_t i = 0; i < count; i++)
		clashes[i].answer = CLASH_GONE;
	qsort(clashes, count, sizeof *clashes, compare_ids);
	if (!ask_for_all(collection, concern, clashes, count, error))
		return false;
	for (size_t i = 0; i < count; i++)
		if (clashes[i].answer == CLASH_GONE && !ask_for_one(collection, concern, &clashes[i], error))
			return false;
	return true;
}
