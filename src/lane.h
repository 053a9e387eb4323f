/*
 * One connection that receives messages and acknowledges them when they are durable: a durable session, read round by
 * round through the ack gate (mqtt.h).
 *
 * A round is what is read before the gate closes: until the last of its batches leaves (pace.h) or the round is full.
 * It leaves in a few parcels (delivery.h), so that workers store the first ones while the last ones are still being
 * read. While a message of it is not durable nothing more is read, so a round belongs to one connection; past the hold
 * limit the connection is given up without a word and the broker delivers again.
 *
 * Loop thread.
 */
#ifndef MQTT2MONGO_LANE_H
#define MQTT2MONGO_LANE_H

#include "config.h"
#include "delivery.h"
#include "metrics.h"

#include <uv.h>

struct lane;

struct lane_options {
	const struct config *config; /* borrowed */
	struct delivery *delivery;   /* borrowed */
	struct metrics_consumer *counters;
	const char *client_id; /* copied */
	const char *filter;    /* to subscribe, copied; NULL: a session left behind, which is to be emptied and ended */
	const char *const *stale; /* filters to unsubscribe, copied; ends with NULL */
	const char *name;         /* for the log; borrowed for the life of the lane */
};

struct lane_handler {
	/* The broker has taken the subscription: from now on nothing that is published escapes. Each time. */
	void (*subscribed)(void *owner, struct lane *lane);
	/* The broker has taken back every stale filter. Once. */
	void (*unsubscribed)(void *owner, struct lane *lane);
	/* The session left behind is empty, or unknown to the broker: lane_stop() ends it there. Once. */
	void (*emptied)(void *owner, struct lane *lane);
};

/* A lane, not yet connecting. The handler is copied. */
struct lane *lane_create(uv_loop_t *loop, const struct lane_options *options, const struct lane_handler *handler,
                         void *owner);

/* Connect, or go on after delivery_accepts() said no. */
void lane_go(struct lane *lane);

bool lane_is_up(const struct lane *lane);

/* Read no more, wait until everything is durable, disconnect. From this call on nothing else may be asked of it, but
 * lane_hurry(). `stopped` is called when everything is closed, and then the memory is gone. */
void lane_stop(struct lane *lane, void (*stopped)(void *owner, struct lane *lane));

/* While stopping: wait no longer, hand back what is not durable. */
void lane_hurry(struct lane *lane);

#endif
