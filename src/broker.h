/*
 * What the broker says of itself: how many messages it has dropped, which no counter of ours can know, and its version,
 * for some lose messages of shared subscriptions. Read from $SYS/broker/… as mosquitto publishes it, over a connection
 * of its own that stores nothing, keeps no session and is of no importance: a broker that does not let us read $SYS is
 * left alone. Loop thread.
 */
#ifndef MQTT2MONGO_BROKER_H
#define MQTT2MONGO_BROKER_H

#include "config.h"

#include <stdbool.h>
#include <stdint.h>
#include <uv.h>

#define BROKER_VERSION "$SYS/broker/version"

struct broker;

/* Connect as `client_id`, which is copied with -sys behind it. `config` is borrowed until `stopped`. `shares`: the
 * service uses shared subscriptions, and the log is to say when this broker loses messages of theirs. */
struct broker *broker_start(uv_loop_t *loop, const struct config_mqtt *config, const char *client_id, bool shares,
                            void *owner);

/* A payload of BROKER_VERSION (not NUL-terminated) names a mosquitto whose shared subscriptions lose messages
 * unless it was patched: before 2.0.12. Pure. */
bool broker_loses_shares(const void *version, size_t length);

/* Messages dropped since the broker started, for all its clients. NULL when it has not said so on this connection. */
const uint64_t *broker_dropped(const struct broker *broker);

/* Connected to the broker. */
bool broker_is_up(const struct broker *broker);

/* Disconnect at once. From this call on nothing else may be asked of it. `stopped` is called when everything is closed,
 * and then the memory is gone. */
void broker_stop(struct broker *broker, void (*stopped)(void *owner));

#endif
