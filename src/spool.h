/*
 * The spool: messages on this machine's disk that MongoDB has not taken yet, in an SQLite file (WAL, synchronous=FULL).
 * What spool_commit() has committed survives kill -9 and a power cut, so it may be acknowledged to the broker.
 *
 * One handle, used by one job at a time: any thread, never two at once. A lock on a separate file (spool.path with
 * ".lock" behind it) keeps a second service out, while the operator's --spool-status and --spool-export may look.
 *
 * After an I/O error the handle takes nothing more until spool_test() has reopened the file and committed to it.
 *
 * Files that somebody deletes, moves or replaces meanwhile are made anew, with every message that is in them, before
 * anything more is committed or a commit is believed; that is logged as an error. Until it succeeds, and is tried again
 * by each commit and test, messages can still be read and removed.
 */
#ifndef MQTT2MONGO_SPOOL_H
#define MQTT2MONGO_SPOOL_H

#include "batch.h"
#include "config.h"

struct spool;

enum spool_result {
	SPOOL_OK,
	SPOOL_FULL,   /* spool.max_size, or the disk's end (ENOSPC, quota): nothing of the call is kept */
	SPOOL_FAILED, /* an I/O error, read-only, no permission: nothing of the call may be believed */
};

struct spool_status {
	uint64_t messages; /* kept now */
	uint64_t bytes;    /* on disk: the file, its WAL and index */
	int64_t oldest_ms; /* received_at of the oldest message, 0 when empty */
	uint64_t max_size; /* in force */
	bool readable;     /* it can be read and removed from, whatever it takes */
};

/*
 * Open the spool, or make it. A damaged file is set aside as "….corrupt-TIME", what can be read of it is taken over,
 * counted and logged. Never NULL but when another process holds the lock, or when we are root and others may change the
 * directory: then `error` says which and what to do. A file that cannot be used gives a handle whose calls return
 * SPOOL_FAILED until spool_test() succeeds; the log says why.
 */
struct spool *spool_open(const struct config_spool *config, char *error, size_t error_size);

/* NULL is allowed. */
void spool_close(struct spool *spool);

/*
 * Commit every message of the batches that is not `settled`, in one transaction, with an fsync. Reads the batches only.
 * `error` is filled unless SPOOL_OK.
 */
enum spool_result spool_commit(struct spool *spool, const struct batch *const *batches, size_t count, char *error,
                               size_t error_size);

/*
 * Append the oldest messages with a row above `after` (0: from the start) to the empty `batch`, with their rows,
 * `tried` set, and the batch's route kept: up to `most_count` messages and about `most_bytes` bytes (at least one
 * message), of one route. None: SPOOL_OK with an empty batch.
 */
enum spool_result spool_read(struct spool *spool, int64_t after, struct batch *batch, size_t most_count,
                             size_t most_bytes, char *error, size_t error_size);

/* Delete the messages of `batch` (which came from spool_read()) that are no longer BATCH_OPEN. */
enum spool_result spool_remove(struct spool *spool, const struct batch *batch, char *error, size_t error_size);

/* After SPOOL_FULL or SPOOL_FAILED: reopen the file if need be and commit something to it. SPOOL_OK: it takes messages
 * again. */
enum spool_result spool_test(struct spool *spool, char *error, size_t error_size);

/* Cheap: known without a query. */
void spool_status(const struct spool *spool, struct spool_status *status);

/* For the operator, beside a running service or without one, with a handle of its own that only reads. Print messages,
 * bytes, oldest; or every message as one line of extended JSON. Return the exit code. */
int spool_print_status(const struct config_spool *config, bool json);
int spool_export(const struct config_spool *config);

#endif
