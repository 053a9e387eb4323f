/*
 * What became of every message, counted once. Each part owns its counters and changes them on the loop thread; the
 * service prints them.
 *
 *   received + recovered_from_spool = stored + duplicates + dead_lettered + spooled + dropped + returned + in_flight
 */
#ifndef MQTT2MONGO_METRICS_H
#define MQTT2MONGO_METRICS_H

#include "document.h"

#include <stdint.h>

/* Why a message was handed back to the broker unacknowledged, or dropped because its sender sent it at QoS 0. */
enum metrics_cause {
	METRICS_HOLD_LIMIT, /* MongoDB was away longer than the connection could be held */
	METRICS_SHUTDOWN,   /* the service stopped before it was stored */
	METRICS_CAUSES
};

struct metrics_consumer {
	uint64_t received;
	uint64_t recovered_from_spool;
	uint64_t stored;
	uint64_t duplicates;
	uint64_t dead_lettered[DOCUMENT_REASONS]; /* per reason */
	uint64_t spooled;
	uint64_t dropped[METRICS_CAUSES]; /* QoS 0 only */
	uint64_t returned[METRICS_CAUSES];
	uint64_t truncated;   /* dead letters not kept whole */
	uint64_t redelivered; /* of those received, with the DUP flag */
	uint64_t batches;     /* written */
	uint64_t largest_batch;
};

/* The count check: what of a run of the publisher is in MongoDB; see count_check.h. */
struct metrics_check {
	uint64_t made; /* how often it was counted; 0: not at all, and the rest means nothing */
	uint64_t generated, acked;
	uint64_t distinct;   /* of those generated, stored or dead letters */
	uint64_t duplicates; /* documents and dead letters beyond one for each */
	uint64_t missing;    /* neither refused by the broker nor there */
};

struct metrics_publisher {
	uint64_t generated;
	uint64_t acked;             /* QoS 0: written to the socket */
	uint64_t failed;            /* refused by the broker, or not taken by the library */
	uint64_t skipped;           /* not generated in time: disconnected, or too many unacknowledged */
	uint64_t no_subscribers;    /* of those acked: nobody was subscribed */
	struct metrics_check check; /* of the last run that had a publisher.count */
};

struct cJSON;

struct metrics_loop {
	uint64_t longest_iteration_us; /* the time the loop was not waiting, at its worst */
	uint64_t iterations;
};

/* Messages that are in no other term yet. */
uint64_t metrics_in_flight(const struct metrics_consumer *consumer);
uint64_t metrics_total(const uint64_t *counters, int count);
uint64_t metrics_unacknowledged(const struct metrics_publisher *publisher);

/* `parts`, an object of objects, as text for people: for each its name, then a line for each value. Allocated. */
char *metrics_text(const struct cJSON *parts);

/*
 * The sums, allocated: one JSON object on one line, or text for people. Parts that do not run are NULL.
 */
char *metrics_sums(const struct metrics_consumer *consumer, const struct metrics_publisher *publisher,
                   const struct metrics_loop *loop, bool json);

#endif
