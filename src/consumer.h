/*
 * From the broker into MongoDB: one connection, one round of messages at a time.
 *
 * A round is what arrived while the one before it was being stored, up to consumer.batch.count and .bytes; there is
 * no linger timer. Workers store it in a few batches; when every message of it is durable, its PUBACKs leave and
 * reading goes on. What cannot be stored within the hold limit is handed back: the connection is given up without a
 * word, and the broker delivers again when it is taken up, which happens when MongoDB answers.
 *
 * Loop thread, but for the jobs in workers, which see only the batch they were given.
 */
#ifndef MQTT2MONGO_CONSUMER_H
#define MQTT2MONGO_CONSUMER_H

#include "config.h"
#include "metrics.h"
#include "state.h"

#include <uv.h>

struct consumer;

struct consumer_handler {
	/* The broker has taken the subscription: from now on nothing that is published escapes. Each time. */
	void (*subscribed)(void *owner);
	/* It cannot go on, and the log says why: the state directory cannot be written. */
	void (*failed)(void *owner);
};

/* Start consuming. `config`, `state` and `counters` are borrowed until `stopped`. */
struct consumer *consumer_start(uv_loop_t *loop, const struct config *config, struct state *state,
                                struct metrics_consumer *counters, const struct consumer_handler *handler, void *owner);

/* Read no more, store and acknowledge what is in flight, disconnect. `stopped` is called when everything is closed, and
 * then the memory is gone. */
void consumer_stop(struct consumer *consumer, void (*stopped)(void *owner));

/* While stopping: do not wait for MongoDB any longer, hand back what is not stored. A job that a worker has begun is
 * still waited for. */
void consumer_hurry(struct consumer *consumer);

/* For the status line: "consuming", "holding, MongoDB does not answer", … Static. */
const char *consumer_status(const struct consumer *consumer);

#endif
