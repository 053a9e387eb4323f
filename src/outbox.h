/*
 * The spool on the loop: its jobs run in a worker, one at a time, and what it holds drains into MongoDB beside new
 * traffic until it is empty, deleting only what MongoDB has confirmed. The drain's attempts are also how the service
 * finds out that MongoDB is back.
 *
 * Loop thread, but for the jobs in workers.
 */
#ifndef MQTT2MONGO_OUTBOX_H
#define MQTT2MONGO_OUTBOX_H

#include "batch.h"
#include "config.h"
#include "metrics.h"
#include "store.h"

#include <uv.h>

struct outbox;

enum { OUTBOX_BATCHES = 16 }; /* the most that go into one commit */

struct outbox_handler {
	/* The spool has been opened, or is not used. `error`: another process has it, and it cannot go on; else NULL.
	 */
	void (*opened)(void *owner, const char *error);
	/* The first `kept` batches of outbox_commit() are on disk, the others are not. */
	void (*committed)(void *owner, size_t kept);
	/* The drain has tried to store something: what MongoDB said. */
	void (*answered)(void *owner, const struct store_report *report);
	/* It takes messages again. */
	void (*usable)(void *owner);
};

/* Open the spool in a worker; `opened` follows, also where there is none. `config`, `store` and `counters` are borrowed
 * until `stopped`. */
struct outbox *outbox_start(uv_loop_t *loop, const struct config *config, struct store *store,
                            struct metrics_consumer *counters, const struct outbox_handler *handler, void *owner);

/* It takes messages, as far as is known. False also while it is being opened. */
bool outbox_is_usable(const struct outbox *outbox);

/* No commit is under way or waiting: outbox_commit() may be called. */
bool outbox_is_free(const struct outbox *outbox);

/* Commit every message of the batches that is not settled; at most OUTBOX_BATCHES. The batches are borrowed until
 * `committed` is called, and nobody settles a message of them meanwhile. */
void outbox_commit(struct outbox *outbox, const struct batch *const *batches, size_t count);

/* MongoDB is there: drain now, if there is something. Otherwise the drain tries by itself, 0.1 to 5 s apart. */
void outbox_drain(struct outbox *outbox);

/* It holds something and goes on with it at least every 5 s, so that the drain will find out about MongoDB. False also
 * between two passes over messages that MongoDB does not take. */
bool outbox_is_draining(const struct outbox *outbox);

/* Start no further attempt, wait for the jobs under way, close the spool. No commit may be under way. `stopped` is
 * called when everything is closed, and then the memory is gone. */
void outbox_stop(struct outbox *outbox, void (*stopped)(void *owner));

#endif
