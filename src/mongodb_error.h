/*
 * What an error of MongoDB or of the driver is about, and what helps. The only place that knows the codes. Pure; any
 * thread.
 *
 * Sources: MongoDB's error_codes.yml; the domains of mongo-c-driver's mongoc-error.h, error API 2.
 */
#ifndef MQTT2MONGO_MONGODB_ERROR_H
#define MQTT2MONGO_MONGODB_ERROR_H

#include <bson/bson.h>
#include <stdbool.h>

/* Of an error for a call as a whole: what it is about, and so who is to try what again. */
enum mongodb_scope {
	MONGODB_DATABASE,   /* no server, no login, no write concern: nothing else would fare better now */
	MONGODB_CONNECTION, /* it was lost before the answer came */
	MONGODB_NAMESPACE,  /* this collection takes nothing; others may */
	MONGODB_DOCUMENT,   /* size or form of one of the documents */
	MONGODB_UNKNOWN,    /* on no list */
};

enum mongodb_scope mongodb_error_scope(const bson_error_t *error);

/* Another attempt may not meet it: the network, elections, time-outs, conflicts, full disks, rate limits. A code of the
 * server, for a call or for one document. */
bool mongodb_is_transient(int code);

/* Somebody must act: credentials, rights, names, a write concern that cannot be met. For a call as a whole. */
bool mongodb_is_configuration(uint32_t domain, int code);

/* A code that `writeErrors` lists for a document says what is wrong with that document: its values, its form, an index
 * or a validator it does not fit. */
bool mongodb_is_about_document(int code);

/* A code that `writeErrors` lists: some unique index has the value already. */
bool mongodb_is_duplicate_key(int code);

/* Of write concern errors: too few members confirm in time, or there never can be enough. The others are elections and
 * shutdowns, which only interrupted the waiting. */
bool mongodb_is_unmet(int code);

/* "; check …", or "" where nothing is known that helps. Static. */
const char *mongodb_remedy(uint32_t domain, int code);

/* The same cause is to give the same text whichever call met it, so that the log can leave repetitions out: the text
 * for this domain, or `otherwise`. */
const char *mongodb_error_title(uint32_t domain, const char *otherwise);

/* How many bytes of a server's message are worth keeping: "not authorized on plant to execute command { insert: …,
 * $clusterTime: … }" would differ each time. */
int mongodb_message_length(const char *message);

#endif
