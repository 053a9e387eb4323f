/*
 * A connection for messages that may be lost: subscribed at QoS 0, with a throwaway session and no gate. What arrives
 * is stored as fast as MongoDB takes it; what waits is bounded by consumer.qos0_buffer, and what comes beyond is
 * dropped and counted. Nothing of it goes to the spool, so a flood here harms the messages of lane.h in no other way
 * than by the work it makes.
 *
 * Loop thread.
 */
#ifndef MQTT2MONGO_QOS0_H
#define MQTT2MONGO_QOS0_H

#include "config.h"
#include "delivery.h"
#include "metrics.h"

#include <uv.h>

struct qos0;

struct qos0_options {
	const struct config *config; /* borrowed */
	struct delivery *delivery;   /* borrowed */
	struct metrics_consumer *counters;
	const char *client_id; /* copied */
	const char *filter;    /* borrowed from the configuration */
	/* The broker has taken the subscription. Each time. */
	void (*subscribed)(void *owner);
};

/* Not yet connecting. */
struct qos0 *qos0_create(uv_loop_t *loop, const struct qos0_options *options, void *owner);

void qos0_go(struct qos0 *qos0);
bool qos0_is_up(const struct qos0 *qos0);

/* Disconnect, store what waits, unless MongoDB is away: then it is dropped. From this call on nothing else may be asked
 * of it, but qos0_hurry(). `stopped` is called when everything is closed, and then the memory is gone. */
void qos0_stop(struct qos0 *qos0, void (*stopped)(void *owner));

/* While stopping: drop what is not stored. */
void qos0_hurry(struct qos0 *qos0);

#endif
