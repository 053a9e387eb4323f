/*
 * The message the publisher sends: one JSON object, built with cJSON and printed anew for each message.
 *
 *   {"device":"device-007","run":"1a2b3c4d","sequence":12345,"time":"2026-11-22T20:18:24.123Z","temperature":21.53,
 *    "humidity":48,"battery":3.71,"online":true}
 *
 * Pure but for its own random numbers, which a seed makes repeatable: the same seed, the same devices and readings.
 */
#ifndef MQTT2MONGO_TEMPLATE_H
#define MQTT2MONGO_TEMPLATE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct template;

/* `devices` ≥ 1; the run id in the messages comes from the seed. Never fails. */
struct template *template_create(int64_t devices, uint64_t seed);
void template_destroy(struct template *template);

struct template_message {
	const char *device;  /* "device-007" */
	const char *payload; /* NUL-terminated */
	size_t length;
};

/* The message number `sequence`, at `now` (ms since 1970). What it points to is valid until the next call. */
struct template_message template_render(struct template *template, uint64_t sequence, int64_t now);

/* The name of the run in the messages. */
const char *template_run(const struct template *template);

/* Copy `topic` with every {device} replaced to `out`. Returns false when it does not fit into `size`. */
bool template_topic(const char *topic, const char *device, char *out, size_t size);

/* Might the topic filter match some device's `topic`? False: never. */
bool template_topic_may_match(const char *topic, const char *filter);

#endif
