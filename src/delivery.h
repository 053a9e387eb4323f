/*
 * From received to durable: batches go to MongoDB by a few workers, or to the spool while MongoDB does not take them,
 * or wait where there is no room in the spool either. The connections (lane.h) fill batches and hear when everything in
 * them is durable; they share one of these.
 *
 * Loop thread, but for the jobs in workers, which see only the batch they were given.
 */
#ifndef MQTT2MONGO_DELIVERY_H
#define MQTT2MONGO_DELIVERY_H

#include "batch.h"
#include "config.h"
#include "metrics.h"
#include "pace.h"

#include <uv.h>

struct delivery;

/* Who fills batches and waits for them. Embedded; filled by the owner, and unchanged while one of its parcels is under
 * way. */
struct delivery_sender {
	/* Everything in a parcel has its outcome: `durable` messages, and `open` ones that were given up. Each parcel
	 * once; it is no longer the sender's. May submit others, and must not give up its own. */
	void (*settled)(struct delivery_sender *sender, size_t durable, size_t open, size_t bytes);
	bool spools;          /* what MongoDB does not take may go to the spool, */
	uint64_t patience_ms; /* and what has waited so long for a worker */
};

/* A batch on its way. The sender fills `batch` between delivery_take() and delivery_submit(), and only then. */
struct delivery_parcel {
	struct batch batch;
	struct delivery *delivery;
	struct delivery_sender *sender; /* NULL: free */
	unsigned phase;                 /* delivery.c's */
	bool storing, spooling;         /* jobs that hold the batch */
	bool overdue;                   /* the attempt under way takes too long */
	bool reported, given_up;
	enum metrics_cause cause; /* of giving up */
	uint64_t taken_at;        /* uv_hrtime() when its first message came */
	uint64_t submitted_at;    /* uv_hrtime() */
	uint64_t ready_at;        /* the same moment, loop time */
	uint64_t started_at;      /* loop time of the attempt under way */
	unsigned attempts;        /* that left something open */
	uint64_t retry_at;        /* loop time of the next one, while it waits */
};

struct delivery_handler {
	/* It has started, the spool is open: connections may be made. `error`: it cannot go on, for another process has
	 * the spool; else NULL. */
	void (*started)(void *owner, const char *error);
	/* Messages are taken again, after delivery_accepts() said no. */
	void (*accepts)(void *owner);
};

/* `config` and `counters` are borrowed until `stopped`. */
struct delivery *delivery_start(uv_loop_t *loop, const struct config *config, struct metrics_consumer *counters,
                                const struct delivery_handler *handler, void *owner);

/* An empty parcel for `sender` to fill. Never NULL. */
struct delivery_parcel *delivery_take(struct delivery *delivery, struct delivery_sender *sender);

/* All of a connection's round is durable. `hold_ms`: its hold limit. */
void delivery_round_stored(struct delivery *delivery, uint64_t hold_ms);

/* What the parcel's messages take in memory. */
size_t delivery_bytes(const struct delivery_parcel *parcel);

/* It is to leave: a round goes in four parcels or so, by count and bytes, so that workers store the first ones while
 * the last ones are still being read. */
bool delivery_is_full(const struct delivery_parcel *parcel);

/* On its way; `settled` follows, never from within this call. */
void delivery_submit(struct delivery_parcel *parcel);

/* No further attempt for what this sender has under way: `settled` follows for each of its parcels, those in a worker's
 * hands when it is done with them; perhaps from within this call. */
void delivery_give_up(struct delivery *delivery, struct delivery_sender *sender, enum metrics_cause cause);

/* MongoDB or the spool takes messages, as far as is known. */
bool delivery_accepts(const struct delivery *delivery);

/* How long the sender's writes are to wait: spool.linger while they go to the spool, where it is more. */
struct pace_wait delivery_wait(const struct delivery *delivery, const struct delivery_sender *sender);

/* "w:majority, j:true, …": the promise in force. */
void delivery_promise(const struct delivery *delivery, char *text, size_t size);

/* For the status line: "MongoDB does not answer", "spooling", … or NULL when all is well. Static. */
const char *delivery_trouble(const struct delivery *delivery);

/* No parcel may be under way. `stopped` is called when everything is closed, and then the memory is gone. */
void delivery_stop(struct delivery *delivery, void (*stopped)(void *owner));

#endif
