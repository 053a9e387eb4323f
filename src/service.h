/*
 * The whole service: builds the parts, starts and stops them by role, also at run time, listens to signals, and knows
 * the one order of shutting down: the publisher first, then the consumer with what is in flight, then the rest.
 *
 * One thread: the one that calls service_run().
 */
#ifndef MQTT2MONGO_SERVICE_H
#define MQTT2MONGO_SERVICE_H

#include "config.h"
#include "metrics.h"

#include <uv.h>

struct service;

/* `config` is borrowed until service_destroy(). No part runs yet, but http.listen answers as soon as
 * the loop runs. NULL with `error` filled when the state directory cannot be used or http.listen is taken. Call before
 * anything else has used libuv's thread pool: its size is set here. */
struct service *service_create(const struct config *config, char *error, size_t error_size);

/* Only after service_run() has returned, or was never called. NULL is allowed. */
void service_destroy(struct service *service);

/* Start the parts of a role that do not run. False with `error` filled when one cannot: another process has its lock,
 * the state directory cannot be written. */
bool service_start_role(struct service *service, enum config_role role, char *error, size_t error_size);

/* Stop the parts of a role, orderly, the publisher before the consumer; `stopped` (or NULL) is called when none of them
 * runs any more, at once if none did. One such call at a time: a second one takes the place of the first one's
 * `stopped`. */
void service_stop_role(struct service *service, enum config_role role, void (*stopped)(void *context), void *context);

/* The parts that run, starting or stopping included. */
enum config_role service_roles(const struct service *service);

/* Run until a signal, service_stop(), or the publisher's count is reached; prints the sums to standard output. Returns
 * the exit code: 0, or 1 when something was not done. */
int service_run(struct service *service);

/* Stop everything; service_run() returns when that is done. */
void service_stop(struct service *service);

uv_loop_t *service_loop(struct service *service);
const struct metrics_consumer *service_consumer_counters(const struct service *service);
const struct metrics_publisher *service_publisher_counters(const struct service *service);

#endif
