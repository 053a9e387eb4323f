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
	METRICS_OVERLOAD,   /* QoS 0: more than the connection's buffer holds */
	METRICS_CAUSES
};

enum metrics_spool { METRICS_SPOOL_OFF, METRICS_SPOOL_OK, METRICS_SPOOL_FULL, METRICS_SPOOL_FAILED };

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

	/* how things stand now */
	bool database_up;
	enum metrics_spool spool_state;
	uint64_t spool_messages, spool_bytes, spool_max_bytes;
	int64_t spool_oldest_ms; /* received_at of the oldest message; 0: it is empty */
};

struct metrics_publisher {
	uint64_t generated;
	uint64_t acked;          /* QoS 0: written to the socket */
	uint64_t failed;         /* refused by the broker, or not taken by the library */
	uint64_t skipped;        /* not generated in time: disconnected, or too many unacknowledged */
	uint64_t no_subscribers; /* of those acked: nobody was subscribed */
};

struct metrics_loop {
	uint64_t longest_iteration_us; /* the time the loop was not waiting, at its worst */
	uint64_t iterations;
};

/* Count what a message has become: stored, duplicate or dead letter. */
void metrics_count_outcome(struct metrics_consumer *consumer, const struct batch_message *message);

/* Messages that are in no other term yet. */
uint64_t metrics_in_flight(const struct metrics_consumer *consumer);
uint64_t metrics_total(const uint64_t *counters, int count);
uint64_t metrics_unacknowledged(const struct metrics_publisher *publisher);

/*
 * The sums, allocated: one JSON object on one line, or text for people. Parts that do not run are NULL.
 */
char *metrics_sums(const struct metrics_consumer *consumer, const struct metrics_publisher *publisher,
                   const struct metrics_loop *loop, bool json);

#endif
