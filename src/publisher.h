/*
 * Generated messages at a fixed rate: timer -> template -> publish, on a connection of its own.
 *
 * The schedule is absolute: message number n is due n / rate seconds after the start, so the rate does not drift
 * whatever the timer does. What is late is caught up in bursts of bounded size; what is more than a second late,
 * because the broker was away or did not acknowledge, is skipped and counted. Loop thread.
 */
#ifndef MQTT2MONGO_PUBLISHER_H
#define MQTT2MONGO_PUBLISHER_H

#include "config.h"
#include "metrics.h"

#include <stdbool.h>
#include <uv.h>

struct publisher;

/* One life of a publisher. */
struct publisher_run {
	char name[16];         /* in each of its messages */
	int64_t began_ms;      /* wall clock, before the first message */
	uint64_t began_hrtime; /* the same moment */
};

struct publisher_handler {
	/* publisher.count messages were generated and all of them acknowledged or failed. Once. */
	void (*done)(void *owner);
};

/* Connect, with a client id that begins with `client_prefix`; publishing starts with publisher_go(). `config` and
 * `counters` are borrowed until `stopped`. */
struct publisher *publisher_start(uv_loop_t *loop, const struct config *config, const char *client_prefix,
                                  struct metrics_publisher *counters, const struct publisher_handler *handler,
                                  void *owner);

/* Begin to publish, now or as soon as connected. Calls after the first do nothing. */
void publisher_go(struct publisher *publisher);

/* Publish no more, wait for the acknowledgements of what is under way, disconnect. From this call on nothing else may
 * be asked of it, but publisher_hurry(). `stopped` is called when everything is closed, and then the memory is gone. */
void publisher_stop(struct publisher *publisher, void (*stopped)(void *owner));

/* While stopping: wait no longer. */
void publisher_hurry(struct publisher *publisher);

/* Connected to the broker. */
bool publisher_is_up(const struct publisher *publisher);
struct publisher_run publisher_run(const struct publisher *publisher);

/* For the status line: "publishing", "connecting", … Static. */
const char *publisher_status(const struct publisher *publisher);

#endif
