/*
 * One libmosquitto connection on the loop: resolve, connect, TLS, poll, keepalive, reconnect with backoff, and the ack
 * gate. Knows neither publisher nor consumer; they are its owners and hear from it through struct mqtt_handler.
 *
 * The ack gate: the library queues the PUBACK of a QoS 1 message before it hands the message over, and a flush sends
 * the whole queue. So what this file counts as held (handed to handler->message, not yet reported by mqtt_durable())
 * keeps the connection from writing anything, and from reading on; when nothing is held any more the queue is sent and
 * reading goes on.
 *
 * Everything here runs on the loop thread, but for one connect job in a worker, during which the library's client is
 * left alone. Handlers are called on the loop thread, mostly from inside the library: they may call any function of
 * this header; what would free the library's client waits until the library has returned.
 */
#ifndef MQTT2MONGO_MQTT_H
#define MQTT2MONGO_MQTT_H

#include "config.h"
#include "message.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <uv.h>

struct mqtt;

/* What message->user_property is for a message that libmosquitto brought: `properties` are the library's. */
char *mqtt_user_property(const struct message *message, const char *name);

/* What CONNACK granted. */
struct mqtt_granted {
	bool session_present;
	int keepalive_s;          /* in force: the broker's, where it sent one (MQTT 5 §3.2.2.3.14) */
	int64_t session_expiry_s; /* in force; -1 under MQTT 3.1.1, where the broker decides */
	int receive_maximum;      /* what the broker takes from us unacknowledged */
	int maximum_qos;
	bool shares; /* it takes shared subscriptions, or does not say otherwise (MQTT 5 §3.2.2.3.13) */
};

/* How the owner wants a connection read while messages of it are held. */
enum mqtt_reading {
	MQTT_READ_NOTHING, /* until all are durable */
	MQTT_READ_ON,      /* there is room for more, which share their fate; nothing is written */
	MQTT_READ_SELDOM,  /* the same, a few milliseconds' worth at a time: so many come that each wake-up counts */
};

/* Members may be NULL where the owner does not care. */
struct mqtt_handler {
	/* CONNACK accepted: subscribe or publish now. */
	void (*up)(void *owner, const struct mqtt_granted *granted);
	/* The connection, or an attempt at one, has ended; nothing of its generation can be acknowledged any more.
	 * Nothing reconnects by itself: call mqtt_connect(). */
	void (*down)(void *owner);
	/* A message; it is held until mqtt_durable(). */
	void (*message)(void *owner, const struct message *message);
	/* False: read no further. Asked before each read. */
	bool (*room)(void *owner);
	/* After a burst in which messages came: the socket is empty or there is no more room. */
	void (*drained)(void *owner);
	/* NULL: MQTT_READ_NOTHING. */
	enum mqtt_reading (*reading)(void *owner);
	/* SUBACK: the granted QoS, or a reason code ≥ 0x80. */
	void (*subscribed)(void *owner, int reason);
	void (*unsubscribed)(void *owner);
	/* The published message of that id is done: PUBACK or PUBCOMP (its reason code), or written (QoS 0, reason 0).
	 */
	void (*published)(void *owner, int id, int reason);
};

struct mqtt_options {
	const struct config_mqtt *config; /* borrowed for the life of the connection */
	const char *client_id;            /* copied */
	const char *name;                 /* for the log: "consumer", "publisher"; borrowed as well */
	bool clean_start;                 /* a throwaway session, gone with the connection */
	uint32_t brief_s; /* MQTT 5, without clean_start: not 0 is its session expiry instead of mqtt.session_expiry */
	bool keep_client; /* keep unacknowledged published messages across reconnects */
	bool quiet;       /* of no importance: what happens to it is logged at level debug */
};

/* A connection, not yet connecting. The handler is copied; the owner is handed back to it. */
struct mqtt *mqtt_create(uv_loop_t *loop, const struct mqtt_options *options, const struct mqtt_handler *handler,
                         void *owner);

/* Connect: at once the first time, after the backoff (mqtt.reconnect.min … max, with jitter) after failures. Does
 * nothing while connected or already trying. */
void mqtt_connect(struct mqtt *mqtt);

/* While up: send SUBSCRIBE for one filter, with retain handling 1 under MQTT 5 (§3.8.3.1: retained messages only for a
 * new subscription). qos 0 or 1. */
void mqtt_subscribe(struct mqtt *mqtt, const char *filter, int qos);

/* While up: send UNSUBSCRIBE. False: nothing was sent, or the library does not take the filter, which nobody can have
 * subscribed to. */
bool mqtt_unsubscribe(struct mqtt *mqtt, const char *filter);

/* Queue a PUBLISH; call mqtt_flush() after the last of a burst. Returns the message's id, 1 to 65535, by which
 * handler->published names it, or 0 when it could not be taken: not connected, or refused by the library (invalid
 * topic, above the broker's maximum). Ids come again once all others have been used. QoS 0 to 2. */
int mqtt_publish(struct mqtt *mqtt, const char *topic, const void *payload, size_t length, int qos);

/* Send what is queued, if the gate allows. */
void mqtt_flush(struct mqtt *mqtt);

/* Numbers the connections: 1 for the first, more with each. */
uint64_t mqtt_generation(const struct mqtt *mqtt);

/* `count` messages of that generation are durable. When none is held any more the gate opens: their PUBACKs leave and
 * reading goes on. A generation that has ended is ignored. */
void mqtt_durable(struct mqtt *mqtt, uint64_t generation, size_t count);

/* Give the connection up without sending anything: what is held goes unacknowledged and comes again. handler->down
 * follows. */
void mqtt_give_up(struct mqtt *mqtt, const char *why);

bool mqtt_is_up(const struct mqtt *mqtt);

/* In handler->down: it was the broker that said no, by CONNACK or DISCONNECT. */
bool mqtt_was_refused(const struct mqtt *mqtt);

/* The host and port of the configuration, for messages. */
const char *mqtt_address(const struct mqtt *mqtt);

/* As mqtt_close(), and the broker is told to forget the session (MQTT 5 §3.14.2.2.2: session expiry 0; under MQTT 3.1.1
 * it is left behind, empty). Only while connected and with nothing held. */
void mqtt_close_session(struct mqtt *mqtt, void (*closed)(void *owner));

/* End it: DISCONNECT when nothing is held, else without a word. No handler is called any more; `closed` is, once every
 * handle is closed. A running connect job is waited for. Called again: wait for the broker no longer. A connection that
 * is closing or closed may still be asked anything: it is not up, takes nothing and does nothing. */
void mqtt_close(struct mqtt *mqtt, void (*closed)(void *owner));

/* Give the memory back: from `closed` on, which may do it itself. */
void mqtt_free(struct mqtt *mqtt);

#endif
