/*
 * What became of every message, counted once. Each part owns its counters and changes them on the loop thread; the
 * service prints them.
 *
 *   received + recovered_from_spool = stored + duplicates + dead_lettered + spooled + dropped + returned + in_flight
 */
#ifndef MQTT2MONGO_METRICS_H
#define MQTT2MONGO_METRICS_H

#include "document.h"
#include "store_report.h"

#include <stdint.h>

struct cJSON;
struct letters;

/* How long something took: how often up to 0.5 ms, 1 ms, 2 ms … 65.536 s, and longer. */
enum { METRICS_BUCKETS = 18, METRICS_FIRST_US = 500 };

struct metrics_histogram {
	uint64_t counts[METRICS_BUCKETS + 1]; /* each bucket for itself; the last: above every limit */
	uint64_t sum_us;
};

/* Why a message was handed back to the broker unacknowledged, or dropped because its sender sent it at QoS 0. */
enum metrics_cause {
	METRICS_HOLD_LIMIT, /* MongoDB was away longer than the connection could be held */
	METRICS_SHUTDOWN,   /* the service stopped before it was stored */
	METRICS_OVERLOAD,   /* QoS 0: more than the connection's buffer holds */
	METRICS_REFUSED,    /* QoS 0: MongoDB answers, and does not take it, nor its dead letter */
	METRICS_CAUSES
};

enum metrics_spool { METRICS_SPOOL_OFF, METRICS_SPOOL_OK, METRICS_SPOOL_FULL, METRICS_SPOOL_FAILED };

struct metrics_consumer {
	uint64_t received;
	uint64_t recovered_from_spool;
	uint64_t stored;
	uint64_t duplicates;
	uint64_t dead_lettered[DOCUMENT_REASONS]; /* per reason */
	struct letters *letters;                  /* hears of each of them, or NULL; borrowed */
	uint64_t spooled;
	uint64_t dropped[METRICS_CAUSES]; /* QoS 0 only */
	uint64_t returned[METRICS_CAUSES];
	uint64_t truncated;     /* dead letters not kept whole */
	uint64_t redelivered;   /* of those received, with the DUP flag */
	uint64_t id_fallbacks;  /* of those stored, under an ObjectId because they have no _id that consumer.id wants */
	uint64_t received_qos0; /* of those received */
	uint64_t batches, largest_batch; /* see metrics_count_batch() */
	struct metrics_histogram
	    store_latency; /* of a batch, from the receipt of its first message until all of it is durable */

	/* the state of things, which goes up and down */
	int connections, connections_up;         /* to the broker: wanted; of those, connected and subscribed */
	bool database_up;                        /* it answered the last time */
	bool database_refuses[STORE_NAMESPACES]; /* these collections take nothing, for a reason of their own */
	enum metrics_spool spool_state;
	uint64_t spool_messages, spool_bytes, spool_max_bytes;
	int64_t spool_oldest_ms; /* when the oldest message in it was received, ms since 1970; 0: it is empty */
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
	uint64_t acked;                           /* QoS 0: written to the socket */
	uint64_t failed;                          /* refused by the broker, or not taken by the library */
	uint64_t skipped;                         /* not generated in time: disconnected, or too many unacknowledged */
	uint64_t no_subscribers;                  /* of those acked: nobody was subscribed */
	struct metrics_check check;               /* of the last run that had a publisher.count */
	struct metrics_histogram publish_latency; /* from handing a message to the library until it is acknowledged */
};

/* The time the loop was not waiting. The longest since the start, and the longest lately: a minute in slices. */
enum { METRICS_SLICES = 6, METRICS_SLICE_MS = 10000 };

struct cJSON;

struct metrics_loop {
	uint64_t longest_iteration_us;
	uint64_t iterations;
	uint64_t slices_us[METRICS_SLICES]; /* the longest of each slice */
	uint64_t slice;                     /* the newest one's number since the clock began */
};

struct metrics_connection {
	const char *name;
	bool up;
};

/* All there is to know at one moment. Borrowed; what does not run, or is not known, is NULL or 0. */
struct metrics_view {
	const char *version;
	int64_t now_ms, started_ms; /* wall clock, ms since 1970 */
	const struct metrics_consumer *consumer;
	const struct metrics_publisher *publisher;
	const struct metrics_loop *loop;
	uint64_t loop_recent_us;
	const struct metrics_connection *connections;
	int connection_count;
	const uint64_t *broker_dropped; /* what the broker says it has dropped */
	uint64_t resident_bytes, cpu_us;
};

/* Count what a message of `batch` has become: stored, duplicate or dead letter. */
void metrics_count_outcome(struct metrics_consumer *consumer, const struct batch *batch,
                           const struct batch_message *message);

/* A batch of so many messages was handed to MongoDB, by a worker or by the drain: one attempt, with whatever result. */
void metrics_count_batch(struct metrics_consumer *consumer, size_t messages);

/* Messages that are in no other term yet. */
uint64_t metrics_in_flight(const struct metrics_consumer *consumer);
uint64_t metrics_total(const uint64_t *counters, int count);
uint64_t metrics_unacknowledged(const struct metrics_publisher *publisher);

void metrics_observe(struct metrics_histogram *histogram, uint64_t microseconds);
uint64_t metrics_observations(const struct metrics_histogram *histogram);

/* One turn of the loop that worked for `busy_us`; `now_ms` is a monotonic clock. */
void metrics_loop_turn(struct metrics_loop *loop, uint64_t busy_us, uint64_t now_ms);

/* The longest turn of the last 50 to 60 seconds, in microseconds. */
uint64_t metrics_loop_recent(const struct metrics_loop *loop, uint64_t now_ms);

/* Everything in the Prometheus text format, version 0.0.4. Allocated. */
char *metrics_prometheus(const struct metrics_view *view);

/* "off", "ok", "full", "failed" */
const char *metrics_spool_name(enum metrics_spool state);

/* "hold_limit", … */
const char *metrics_cause_name(enum metrics_cause cause);

/* The object that metrics_sums() prints, its "sums" shell included; freed by cJSON_Delete(). */
struct cJSON *metrics_sums_tree(const struct metrics_consumer *consumer, const struct metrics_publisher *publisher,
                                const struct metrics_loop *loop);
/* `parts`, an object of objects, as text for people: for each its name, then a line for each value. Allocated. */
char *metrics_text(const struct cJSON *parts);

/*
 * The sums, allocated: one JSON object on one line, or text for people. Parts that do not run are NULL.
 */
char *metrics_sums(const struct metrics_consumer *consumer, const struct metrics_publisher *publisher,
                   const struct metrics_loop *loop, bool json);

#endif
