/*
 * When does a batch that is filling leave? Each write costs the service about as much CPU time as 60 messages, and
 * MongoDB a flush of its journal; so while messages keep coming a connection's next write waits until `interval` has
 * passed since its last one began. The first message after a pause finds that it has, and is stored at once. A batch
 * leaves earlier when waiting would save little, or when nothing can come:
 *
 *   - it is PACE_LARGE, and the socket empty (in a drain, reading on makes it larger still);
 *   - the broker's window is used up: it sends nothing more before we acknowledge;
 *   - nothing has come for a while, long compared to the gaps between its messages: a burst is over, or they were a
 *     part of the window of a broker far away.
 *
 * How large that window is no broker says (our receive maximum only limits it; mosquitto has 20 under MQTT 3.1.1,
 * RabbitMQ 10, EMQX 32). So it is learnt: the most messages that were ever unacknowledged on the connection, if after
 * them nothing came for a while. That may have been the rate, not the window: then it does no harm while the rate
 * stays, and when it rises, more than so many are read at once, or a wait of now and then shows it. A window may also
 * shrink (mosquitto's max_inflight_bytes): then a few waits in a row end with fewer messages and silence. Messages of
 * QoS 0 are in no window, and tell nothing of silence.
 *
 * Pure: times are milliseconds of any clock that does not go backwards. Loop thread.
 */
#ifndef MQTT2MONGO_PACE_H
#define MQTT2MONGO_PACE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
	PACE_LARGE = 256, /* messages: docs/performance.md shows the curve, which is flat from there on */
};

/* How long a write waits. */
struct pace_wait {
	uint64_t interval; /* ms since the start of the last one; 0: not at all */
	bool patient;      /* also when nothing has come for a while */
};

/* Of one connection. Starts zeroed. */
struct pace {
	bool began;       /* there was a write, */
	uint64_t last_at; /* and so the last one began */

	size_t unacknowledged;      /* messages of QoS 1 */
	uint64_t first_of, last_of; /* when the first and the last of them came */
	size_t reached;             /* the most there ever were */
	bool is_window;             /* after those nothing came */
	uint64_t trial_at;          /* from when on that is doubted once more */
	unsigned shorts;            /* waits in a row that ended in silence with fewer, */
	size_t lately;              /* and the most there were in one of those */
};

/* Another connection: its window may be another. */
void pace_connected(struct pace *pace);

/* A message came. */
void pace_message(struct pace *pace, int qos, uint64_t now);

/* All that came before is acknowledged. */
void pace_acknowledged(struct pace *pace);

/* The time at which a batch that is filling leaves, unless a message comes before. */
uint64_t pace_due(const struct pace *pace, struct pace_wait wait, uint64_t now);

/* The socket is empty: does the batch of `count` messages leave now? */
bool pace_is_ready(struct pace *pace, size_t count, struct pace_wait wait, uint64_t now);

/* A message or more comes each millisecond, and no window is known that would be used up soon: nothing is lost when the
 * socket is read once in a while only. */
bool pace_is_fast(const struct pace *pace);

/* A batch is about to leave because its time has come, pace_due(): what that says of the window. */
void pace_waited(struct pace *pace, struct pace_wait wait, uint64_t now);

/* A batch leaves. */
void pace_write(struct pace *pace, uint64_t now);

#endif
