/*
 * What an insert's reply says of each document: one verdict each, read as a whole before anything is done about any of
 * them. Pure; any thread.
 *
 * The replies are those of mongoc_collection_insert_many() for one unordered command: { insertedCount, writeErrors: [ {
 * index, code, errmsg, keyPattern } … ], writeConcernErrors }. They are a server's words, and there are many servers
 * that speak MongoDB's protocol, so nothing about them is taken for granted.
 */
#ifndef MQTT2MONGO_VERDICT_H
#define MQTT2MONGO_VERDICT_H

#include <bson/bson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum verdict_kind {
	VERDICT_OPEN,         /* nothing is known */
	VERDICT_INSERTED,     /* written, and the write concern met */
	VERDICT_ID_TAKEN,     /* a document with this _id is there */
	VERDICT_TAKEN,        /* a unique index has its value, and no keyPattern says which: perhaps the one on _id */
	VERDICT_UNIQUE_INDEX, /* a unique index other than the one on _id has its value */
	VERDICT_REFUSED,      /* MongoDB will never take this document */
	VERDICT_LATER,        /* not this time: transient, or somebody must act */
	VERDICT_STRANGE,      /* a code on no list, which may be any of the two above */
};

struct verdict {
	enum verdict_kind kind;
	int32_t code;        /* the server's; 0 when inserted */
	const char *message; /* the server's, borrowed from the reply; never NULL */
};

/*
 * Fill `verdicts`, one for each of the `count` documents of the insert. `failed` is the error of the call, or NULL if
 * it did not fail. Returns true when the reply accounts for every document: each index it lists is one of theirs, the
 * number of those it does not list is its insertedCount, no write concern error is among it, and the call failed, if it
 * did, with one of the errors that it lists. Otherwise nothing of it is believed, all are VERDICT_OPEN, and false is
 * returned. Of several errors for one document the first counts.
 */
bool verdict_read(const bson_t *reply, size_t count, const bson_error_t *failed, struct verdict *verdicts);

/* The first write concern error of a reply, as { MONGOC_ERROR_WRITE_CONCERN, code, message }. False when it has none.
 */
bool verdict_write_concern_error(const bson_t *reply, bson_error_t *error);

#endif
