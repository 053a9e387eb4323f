/*
 * --replay-dead-letters: stored dead letters go once more the way of a message. What passes now, because a validator
 * was changed, an index dropped, consumer.max_payload raised, is inserted into consumer.collection under the same _id
 * and with the same topic, payload and received_at; only when MongoDB has confirmed that with the configured write
 * concern is the dead letter deleted. What fails again stays as it is.
 *
 * Interrupted anywhere, it leaves a message in the one collection, in the other or in both, never in none, and a repeat
 * makes both one again. A service may run beside it. No broker is needed.
 */
#ifndef MQTT2MONGO_REPLAY_H
#define MQTT2MONGO_REPLAY_H

#include "config.h"

/*
 * Replay the dead letters that were there when it began and that config->replay_filter finds, and print what was done
 * to standard output. SIGINT and SIGTERM end it after the batch under way; a second one at once. Returns the exit code:
 * 0 when it came to its end, whatever fails again; 1 when it was interrupted, MongoDB did not answer for half a minute,
 * or refuses. Main thread, no loop.
 */
int replay_dead_letters(const struct config *config);

#endif
