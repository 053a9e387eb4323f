/*
 * What an attempt to store something says: about the messages that are still open, about the database, and about each
 * collection. Pure; any thread.
 */
#ifndef MQTT2MONGO_STORE_REPORT_H
#define MQTT2MONGO_STORE_REPORT_H

#include <bson/bson.h>
#include <stdbool.h>
#include <stddef.h>

/* What is to be done about messages that are still open. */
enum store_class {
	STORE_OK,            /* none is */
	STORE_TRANSIENT,     /* the database is away, or its answer unknown: the same again */
	STORE_CONFIGURATION, /* credentials, rights, a missing or misconfigured collection: somebody must act; the same
	                        again */
};

/* The collections that are written to. */
enum store_namespace {
	STORE_MESSAGES,     /* consumer.collection */
	STORE_DEAD_LETTERS, /* consumer.dead_letter */
	STORE_NAMESPACES    /* how many there are */
};

struct store_report {
	enum store_class class;
	size_t open; /* messages of the batch that are not durable */
	bool away;   /* MongoDB does not answer, or takes nothing: no other batch would fare better */
	bool refused[STORE_NAMESPACES]; /* this collection takes nothing, for a reason of its own */
	bool taken[STORE_NAMESPACES];   /* it answered for every document that it was given */
	char message[1024]; /* what MongoDB or the driver said, with the remedy where we know one; no secret */
};

/* Note an error, unless a graver one is noted already: `what` failed, in `collection` if it is not NULL. */
void store_report_error(struct store_report *report, const bson_error_t *error, const char *what,
                        const char *collection);

#endif
