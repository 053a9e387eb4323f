/*
 * The key of an _id: bytes that are the same for two _ids exactly when MongoDB takes them for the same, as far as they
 * are made of what a message has: strings, numbers, booleans, ObjectIds, and documents and arrays of them. 5, 5.0 and
 * Decimal128("5.00") have one key; so has -0.0 with 0, and NaN with NaN. What else an _id may be (a date, say) is the
 * same by its type and bytes. A collation is not known here: with one, "a" and "A" have two keys and may still be the
 * same.
 *
 * Source: MongoDB's manual, "Comparison/Sort Order": numbers are compared by value across their types. Pure; any
 * thread.
 */
#ifndef MQTT2MONGO_ID_KEY_H
#define MQTT2MONGO_ID_KEY_H

#include "buffer.h"

#include <bson/bson.h>
#include <stdbool.h>

/* Append the key of the document's _id to `out`; of one without _id nothing is appended. */
void id_key_append(const bson_t *document, struct buffer *out);

/* Keys of many documents, to be asked which are among them. Zeroed: empty. One owner. */
struct id_key_set {
	struct buffer bytes;
	struct id_key_entry *entries; /* owned; sorted by id_key_set_sort() */
	size_t count, capacity;
};

struct id_key_entry {
	const uint8_t *key; /* in `bytes`; set by id_key_set_sort() */
	size_t start, length;
	size_t owner; /* the caller's number of the document */
};

void id_key_set_finish(struct id_key_set *set);

/* Forget the keys, keep the memory. */
void id_key_set_clear(struct id_key_set *set);

void id_key_set_add(struct id_key_set *set, const bson_t *document, size_t owner);

/* To be called when all are added, before anything is looked up. Entries with the same key come in the order they were
 * added. */
void id_key_set_sort(struct id_key_set *set);

/* The entries with the key of the document's _id: the first of them in `entries`, and how many. */
size_t id_key_set_find(const struct id_key_set *set, const bson_t *document, const struct id_key_entry **first);

/* The entries that share the key of the one at `index`, which is the first with it: how many. */
size_t id_key_set_run(const struct id_key_set *set, size_t index);

#endif
