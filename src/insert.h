/*
 * The messages of a batch into their collections: documents first, then the dead letters that came up. Used by store.c,
 * in workers.
 */
#ifndef MQTT2MONGO_INSERT_H
#define MQTT2MONGO_INSERT_H

#include "batch.h"
#include "buffer.h"
#include "config.h"
#include "store_report.h"

#include <mongoc/mongoc.h>
#include <stddef.h>

/* Documents waiting for one insert, back to back, and the message each came from. */
struct insert_chunk {
	struct buffer bytes;
	size_t *starts;   /* of the documents; starts[count] is the end */
	size_t *messages; /* index in the batch */
	size_t count, capacity;
};

/* Memory that is used again and again. Zeroed before its first use; one insert_batch() at a time. */
struct insert_scratch {
	struct insert_chunk chunk;
	struct insert_grave *graves; /* messages that become dead letters */
	size_t grave_count, grave_capacity;
	struct buffer texts;   /* why they do */
	struct clash *clashes; /* of one reply */
	size_t clash_count, clash_capacity;
	size_t most[STORE_NAMESPACES]; /* documents in one insert; 0: no limit but the chunk's */
};

void insert_scratch_finish(struct insert_scratch *scratch);

/* What is written with. All borrowed. */
struct insert_target {
	mongoc_client_t *client;
	const mongoc_write_concern_t *write_concern;
	const struct config *config;
	int64_t timeout_ms; /* of a call, after which the driver gives the connection up; 0: none */
	/* For each collection, when it last answered for what it was given: monotonic, shared by all who write. */
	_Atomic(int64_t) *taken_at_ms;
};

/*
 * Make every open message of `batch` durable. Sets their outcomes and what `report`, zeroed before, says of errors and
 * collections; its `open` is left to the caller. Blocks up to the driver's time-outs.
 */
void insert_batch(const struct insert_target *target, struct insert_scratch *scratch, struct batch *batch,
                  struct store_report *report);

#endif
