/*
 * From the broker into MongoDB: the connections (lane.h), what makes their messages durable (delivery.h), and the
 * record of the broker's sessions in the state file, which is written before anything is subscribed. Sessions of the
 * state file that are no longer configured are unsubscribed, emptied through a connection of their own and ended.
 *
 * Loop thread, but for the state file's job in a worker.
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
	/* It cannot go on, and the log says why: the state directory cannot be written, another process has the spool.
	 */
	void (*failed)(void *owner);
};

/* Start consuming. `config`, `state` and `counters` are borrowed until `stopped`. `client_id` is what those of the
 * connections begin with. */
struct consumer *consumer_start(uv_loop_t *loop, const struct config *config, struct state *state,
                                const char *client_id, struct metrics_consumer *counters,
                                const struct consumer_handler *handler, void *owner);

/* Read no more, store (or spool) and acknowledge what is in flight, disconnect. From this call on nothing else may be
 * asked of it, but consumer_hurry() and consumer_is_done(). `stopped` is called when everything is closed, and then the
 * memory is gone. */
void consumer_stop(struct consumer *consumer, void (*stopped)(void *owner));

/* While stopping: do not wait for MongoDB any longer, hand back what is not durable. A job that a worker has begun is
 * still waited for. */
void consumer_hurry(struct consumer *consumer);

/* While stopping: every message is durable and every connection closed. What may still be under way are attempts to
 * store what is in the spool; nothing depends on them. */
bool consumer_is_done(const struct consumer *consumer);

/* For the status line: "consuming", "holding, MongoDB does not answer", … Static. */
const char *consumer_status(const struct consumer *consumer);

#endif
