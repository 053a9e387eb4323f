/*
 * The count check: of the messages that this process has published, is each one in MongoDB? Made when the publisher has
 * reached publisher.count and the consumer runs beside it.
 *
 * The messages carry the name of the run and their number. A worker reads back the numbers of this run, of documents
 * and of dead letters, and counts them. While something is missing and may still come, because the consumer is storing
 * or the spool drains, it is counted again; the last count is the result. Loop thread, but for the counting.
 */
#ifndef MQTT2MONGO_COUNT_CHECK_H
#define MQTT2MONGO_COUNT_CHECK_H

#include "config.h"
#include "metrics.h"
#include "publisher.h"

#include <stdbool.h>
#include <uv.h>

struct count_check;

struct count_check_inputs {
	const struct config *config;
	const struct metrics_consumer *consumer; /* as they move */
	struct metrics_publisher publisher;      /* of this run alone, which is done */
	struct publisher_run run;
	struct metrics_check *result; /* filled with each count */
};

/* `ended` is called once, when the memory is gone: with true when every message is there, with false when one is
 * missing or nothing can be said, which the log tells, and after count_check_stop(). Pointers are borrowed until then.
 */
struct count_check *count_check_start(uv_loop_t *loop, const struct count_check_inputs *inputs,
                                      void (*ended)(void *owner, bool complete), void *owner);

/* Make an end, without a result if there is none yet. `ended` comes later, at the latest when MongoDB has answered. */
void count_check_stop(struct count_check *check);

#endif
