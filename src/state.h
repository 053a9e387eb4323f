/*
 * The state directory: what must outlive the process. A lock for each role, and state.json with the client id, made
 * once, and the topic filters the broker's session may hold, written before they are subscribed.
 *
 * MQTT has no way to ask a broker for a session's subscriptions, so this file is how a filter that is no longer
 * configured gets unsubscribed. Writes replace the file whole (temporary file, fsync, rename, fsync of the directory).
 * Two processes, a publisher and a consumer, may share a directory: each replaces only what is its own.
 *
 * Loop thread, but for state_save(), which waits for the disk: it runs at start-up or in a worker, and no other call on
 * the same state meanwhile.
 */
#ifndef MQTT2MONGO_STATE_H
#define MQTT2MONGO_STATE_H

#include <stdbool.h>
#include <stddef.h>

struct state;

/* Open (and make) the directory and read state.json; a damaged one is set aside and said. NULL with `error` filled when
 * the directory cannot be used. */
struct state *state_open(const char *directory, char *error, size_t error_size);

/* Release the locks and free. NULL is allowed. */
void state_close(struct state *state);

/* Take the lock of a role ("consumer", "publisher") for this process. False with `error` filled when another one holds
 * it. */
bool state_lock(struct state *state, const char *role, char *error, size_t error_size);
void state_unlock(struct state *state, const char *role);

/* The client id that all connections of this directory start with: `configured`, else the one made once. */
const char *state_client_id(struct state *state, const char *configured);

/* The filters that the session of `client_id` may hold, by index from 0; NULL behind the last. */
const char *state_filter(const struct state *state, const char *client_id, size_t index);

/* Remember, or forget, that the session of `client_id` holds `filter`. In memory until state_save(). */
void state_add_filter(struct state *state, const char *client_id, const char *filter);
void state_remove_filter(struct state *state, const char *client_id, const char *filter);

/* The client ids of all sessions that are remembered, by index from 0; NULL behind the last. */
const char *state_session(const struct state *state, size_t index);

/* Forget the session of `client_id`: it has been ended at the broker. In memory until state_save(). */
void state_remove_session(struct state *state, const char *client_id);

/* Make changes durable, beside those another process has saved meanwhile: a client id that is already in the file takes
 * the place of one just made, so ask for it again. Nothing to do: true at once. False with `error` filled. */
bool state_save(struct state *state, char *error, size_t error_size);

#endif
