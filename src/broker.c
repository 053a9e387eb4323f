/* See broker.h. */
#include "broker.h"

#include "log.h"
#include "memory.h"
#include "mqtt.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DROPPED "$SYS/broker/publish/messages/dropped"

enum {
	DIGITS_MOST = 19,
	SHARES_MENDED = 12, /* mosquitto 2.0.12 */
	REFUSALS_MOST = 3,  /* some brokers refuse a subscription to $SYS by hanging up */
};

/* What the next SUBACK answers. */
enum question { NO_QUESTION, ASKED_DROPPED, ASKED_VERSION };

struct broker {
	void *owner;
	bool shares;
	struct mqtt *mqtt;
	bool closed; /* for good: by itself, or stopped */
	uint64_t dropped;
	bool known;
	size_t held;
	enum question asking;
	int refusals;         /* connections in a row that ended when DROPPED was asked for */
	bool version_refused; /* a connection ended when BROKER_VERSION was asked for */
	struct log_repeat loses_shares;
	void (*stopped)(void *owner);
};

static void mqtt_closed(void *context)
{
	struct broker *broker = context;
	broker->closed = true;
	if (broker->stopped == NULL) /* it has ended by itself */
		return;
	broker->stopped(broker->owner);
	mqtt_free(broker->mqtt);
	free(broker);
}

static void leave(struct broker *broker, const char *why)
{
	log_info("broker", "%s; the messages it drops are not shown", why);
	broker->known = false;
	mqtt_close(broker->mqtt, mqtt_closed);
}

static void on_up(void *owner, const struct mqtt_granted *granted)
{
	struct broker *broker = owner;
	broker->asking = ASKED_DROPPED;
	mqtt_subscribe(broker->mqtt, DROPPED, 0);
}

static void on_down(void *owner)
{
	struct broker *broker = owner;
	broker->known = false;
	broker->held = 0;
	broker->refusals += broker->asking == ASKED_DROPPED;
	broker->version_refused = broker->version_refused || broker->asking == ASKED_VERSION;
	broker->asking = NO_QUESTION;
	if (broker->refusals >= REFUSALS_MOST)
		leave(broker, "the broker hangs up when " DROPPED " is subscribed");
	else
		mqtt_connect(broker->mqtt);
}

static void on_subscribed(void *owner, int reason)
{
	struct broker *broker = owner;
	enum question answered = broker->asking;
	broker->asking = NO_QUESTION;
	if (answered != ASKED_DROPPED)
		return;
	broker->refusals = 0;
	if (reason >= 0x80) {
		leave(broker, "the broker does not let us read " DROPPED);
	} else if (broker->shares && !broker->version_refused) {
		broker->asking = ASKED_VERSION;
		mqtt_subscribe(broker->mqtt, BROKER_VERSION, 0);
	}
}

bool broker_loses_shares(const void *version, size_t length)
{
	char text[64];
	int major, minor, patch;
	snprintf(text, sizeof text, "%.*s", (int)(length < sizeof text ? length : sizeof text - 1),
	         (const char *)version);
	if (sscanf(text, "mosquitto version %4d.%4d.%4d", &major, &minor, &patch) != 3)
		return false;
	return major < 2 || (major == 2 && minor == 0 && patch < SHARES_MENDED);
}

static void note_version(struct broker *broker, const struct mqtt_message *message)
{
	if (broker_loses_shares(message->payload, message->payload_length))
		log_repeat(
		    &broker->loses_shares, LOG_LEVEL_WARN, "broker",
		    "this broker is %.*s: before 2.0.12, unless patched, it loses messages of shared subscriptions "
		    "when a session is resumed; use a newer one (Debian's 2.0.11-1.2+deb12u1 is patched), or "
		    "consumer.connections 1 and no consumer.share",
		    (int)message->payload_length, (const char *)message->payload);
}

/* A number in decimal digits; whatever else is there is not what we asked for. */
static void note_dropped(struct broker *broker, const struct mqtt_message *message)
{
	const char *digits = message->payload;
	uint64_t dropped = 0;
	if (message->payload_length == 0 || message->payload_length > DIGITS_MOST)
		return;
	for (size_t i = 0; i < message->payload_length; i++) {
		if (digits[i] < '0' || digits[i] > '9')
			return;
		dropped = dropped * 10 + (uint64_t)(digits[i] - '0');
	}
	broker->dropped = dropped;
	broker->known = true;
}

static void on_message(void *owner, const struct mqtt_message *message)
{
	struct broker *broker = owner;
	broker->held++;
	if (strcmp(message->topic, DROPPED) == 0)
		note_dropped(broker, message);
	else if (strcmp(message->topic, BROKER_VERSION) == 0)
		note_version(broker, message);
}

static void on_drained(void *owner)
{
	struct broker *broker = owner;
	size_t held = broker->held;
	broker->held = 0;
	mqtt_durable(broker->mqtt, mqtt_generation(broker->mqtt), held); /* none is kept */
}

static const struct mqtt_handler mqtt_handler = {
    .up = on_up,
    .down = on_down,
    .message = on_message,
    .drained = on_drained,
    .subscribed = on_subscribed,
};

struct broker *broker_start(uv_loop_t *loop, const struct config_mqtt *config, const char *client_id, bool shares,
                            void *owner)
{
	struct broker *broker = memory_zeroed(1, sizeof *broker);
	broker->shares = shares;
	broker->owner = owner;
	char *id = memory_format("%s-sys", client_id);
	struct mqtt_options options = {
	    .config = config, .client_id = id, .name = "broker", .clean_start = true, .quiet = true};
	broker->mqtt = mqtt_create(loop, &options, &mqtt_handler, broker);
	free(id);
	mqtt_connect(broker->mqtt);
	return broker;
}

const uint64_t *broker_dropped(const struct broker *broker)
{
	return broker->known ? &broker->dropped : NULL;
}

bool broker_is_up(const struct broker *broker)
{
	return mqtt_is_up(broker->mqtt);
}

void broker_stop(struct broker *broker, void (*stopped)(void *owner))
{
	broker->stopped = stopped;
	if (broker->closed) {
		mqtt_closed(broker);
		return;
	}
	mqtt_close(broker->mqtt, mqtt_closed);
	mqtt_close(broker->mqtt, mqtt_closed); /* it has nothing to wait for */
}
