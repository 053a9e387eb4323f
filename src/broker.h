/*
 * What the broker says of itself: how many messages it has dropped, which no counter of ours can know and which is
 * logged where a session of ours may have lost them, and its version, for some lose messages of shared subscriptions.
 * Read from $SYS/broker/… as mosquitto publishes it, over a connection of its own that stores nothing, keeps no session
 * and is of no importance: a broker that does not let us read $SYS is left alone. Loop thread.
 */
#ifndef MQTT2MONGO_BROKER_H
#define MQTT2MONGO_BROKER_H

#include "config.h"

#include <stdbool.h>
#include <stdint.h>
#include <uv.h>

#define BROKER_VERSION  "$SYS/broker/version"
#define BROKER_RETAINED "$SYS/broker/retained messages/count"

/* Defaults of mosquitto.conf: what it queues for a client, and what it sends an MQTT 3.1.1 client unacknowledged. */
enum { BROKER_QUEUED = 1000, BROKER_INFLIGHT = 20 };

struct broker;

struct broker_options {
	const struct config_mqtt *config; /* borrowed until `stopped` */
	const char *client_id;            /* copied, with -sys and a random number behind it */
	bool queues; /* the broker queues messages for the service: the log is to say when it drops some */
	bool shares; /* the service uses shared subscriptions: the log is to say when this broker loses messages of
	                theirs */
};

/* Not yet connecting. */
struct broker *broker_start(uv_loop_t *loop, const struct broker_options *options, void *owner);

/* Connect. Calls after the first do nothing. */
void broker_go(struct broker *broker);

/* A payload (not NUL-terminated) that is a number in decimal digits, as those of $SYS are. False: it is none. Pure. */
bool broker_number(const void *payload, size_t length, uint64_t *number);

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
