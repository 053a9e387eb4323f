/*
 * A received message, as it goes from the connection that brought it (mqtt.h) to the batch that keeps a copy (batch.h).
 */
#ifndef MQTT2MONGO_MESSAGE_H
#define MQTT2MONGO_MESSAGE_H

#include <stdbool.h>
#include <stddef.h>

/* Borrowed: valid only during the call that it is handed over with. */
struct message {
	const char *topic;
	size_t topic_length;
	const void *payload;
	size_t payload_length;
	int qos; /* as delivered: 0 or 1 */
	bool retain;
	bool dup; /* the broker had sent it before (MQTT 5 §3.3.1.1) */
	/* The value of the first user property of that name (MQTT 5 §3.3.2.3.7), allocated, or NULL when there is none.
	 * NULL: the message has none at all. */
	char *(*user_property)(const struct message *message, const char *name);
	const void *properties; /* for user_property() */
};

#endif
