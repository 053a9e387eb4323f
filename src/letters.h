/*
 * What the log says of dead letters: a warning as soon as there is one after a quiet time, then one a minute as long as
 * more come, with how many since the last line and what can be done about the newest. Loop thread.
 */
#ifndef MQTT2MONGO_LETTERS_H
#define MQTT2MONGO_LETTERS_H

#include "batch.h"

#include <uv.h>

enum { LETTERS_EVERY_MS = 60000 };

struct letters;

/* `collection` is where they are, borrowed; `every_ms` lies between two lines. */
struct letters *letters_start(uv_loop_t *loop, const char *collection, uint64_t every_ms);

/* `message` of `batch` is a dead letter. Cheap, and nothing is logged from within the call. */
void letters_note(struct letters *letters, const struct batch *batch, const struct batch_message *message);

/* Say what is left to be said. `stopped` is called when everything is closed, and then the memory is gone. */
void letters_stop(struct letters *letters, void (*stopped)(void *owner), void *owner);

#endif
