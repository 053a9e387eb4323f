/*
 * Messages whose _id, made from the message itself, is in the collection already: is it the same message, delivered
 * twice, or another one? Used by insert.c, in workers.
 */
#ifndef MQTT2MONGO_CLASH_H
#define MQTT2MONGO_CLASH_H

#include <mongoc/mongoc.h>
#include <stddef.h>

enum clash_answer {
	CLASH_GONE, /* no document has the _id: it was deleted meanwhile, or most of a replica set does not have it */
	CLASH_SAME, /* the same topic and payload */
	CLASH_SAME_OWN, /* and the same received_at: the very document */
	CLASH_OTHER,    /* another topic or payload */
};

/* A document of ours that was refused. */
struct clash {
	size_t index;           /* the caller's */
	const bson_t *document; /* borrowed */
	enum clash_answer answer;
};

/*
 * Look up what is stored under the _ids of these documents and fill in the answers. What is found is as durable as a
 * write with `concern` would be. False, with `error`, when MongoDB did not answer; then
 * no answer may be believed. Blocks up to the driver's time-outs.
 */
bool clash_look_up(mongoc_collection_t *collection, const mongoc_write_concern_t *concern, struct clash *clashes,
                   size_t count, bson_error_t *error);

#endif
