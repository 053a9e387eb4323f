/*
 * MongoDB: a pool of clients, and what is asked of it: to store a batch (insert.h), to read, to delete, to say how it
 * is.
 *
 * store_create() and store_destroy() run on the loop thread and never touch the network; the others run in workers and
 * block up to the driver's time-outs.
 */
#ifndef MQTT2MONGO_STORE_H
#define MQTT2MONGO_STORE_H

#include "batch.h"
#include "config.h"
#include "store_report.h"

struct store;

/* Reused memory of one worker's job: documents under construction. One job at a time. */
struct store_scratch;
struct store_scratch *store_scratch_create(void);
void store_scratch_destroy(struct store_scratch *scratch);

/* `config` is borrowed for the life of the store. Never fails: an unreachable database shows in the reports. */
struct store *store_create(const struct config *config);

/* No job may be running. NULL is allowed. */
void store_destroy(struct store *store);

/*
 * Make every open message of `batch` durable: documents into consumer.collection, dead letters into
 * consumer.dead_letter, with the configured write concern. Sets each message's outcome; what stays BATCH_OPEN may or
 * may not be in the database and is safe to try again, since its _id is fixed. Worker thread.
 */
void store_write(struct store *store, struct store_scratch *scratch, struct batch *batch, struct store_report *report);

/* Find out whether the database answers and takes our credentials. Worker thread. */
void store_ping(struct store *store, struct store_report *report);

/*
 * Read: call `take` for each document of `collection` that `query` finds, with the options of the driver's find
 * (projection, sort, limit, batchSize), from the primary. `take` gets `context`; it returns false to end the reading.
 * Returns true when the reading came to its end, else false with `report` filled: STORE_TRANSIENT when another attempt
 * may do better. Worker thread, or the main thread when no loop runs.
 */
bool store_find(struct store *store, const char *collection, const bson_t *query, const bson_t *options,
                bool (*take)(void *context, const bson_t *document), void *context, struct store_report *report);

/*
 * Delete those documents of consumer.dead_letter whose messages in `batch` are BATCH_STORED or BATCH_DUPLICATE, with
 * the configured write concern; what is already gone is no error. Same results and threads as store_find().
 */
bool store_delete_dead_letters(struct store *store, const struct batch *batch, struct store_report *report);

/* One line about the server: version, replica set or standalone. False with `report` filled when it does not answer.
 * Worker thread, or the main thread when no loop runs. */
bool store_describe(struct store *store, char *text, size_t size, struct store_report *report);

/* Do the privileges of our user cover inserts into both collections and, where consumer.id makes the _ids, reading what
 * is stored under them? True also where nobody has to log in, and where the server does not tell. Same threads as
 * store_describe(). */
bool store_may_write(struct store *store);

/* What is wrong with consumer.collection as it stands in MongoDB, to be read behind its name, with the remedy; NULL:
 * nothing, as far as we are told. With consumer.id it is an error, else a warning. Static; `report` as it was found
 * out. Same threads as store_describe(). */
const char *store_collection_fault(struct store *store, struct store_report *report);

/* "w:majority, j:true, 10 s": the promise in force. */
void store_write_concern_text(const struct store *store, char *text, size_t size);

#endif
