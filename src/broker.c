/* See broker.h. */
#include "broker.h"

#include "log.h"
#include "memory.h"
#include "mqtt.h"

#include <stdlib.h>
#include <string.h>

#define TOPIC "$SYS/broker/publish/messages/dropped"

enum {
	DIGITS_MOST = 19,
	REFUSALS_MOST = 3, /* some brokers refuse a subscription to $SYS by hanging up */
};

struct broker {
	void *owner;
	struct mqtt *mqtt; /* NULL: closed for good */
	uint64_t dropped;
	bool known;
	size_t held;
	bool asking;  /* connected, no SUBACK yet */
	int refusals; /* connections in a row that ended so */
	void (*stopped)(void *owner);
};

static void mqtt_closed(void *context)
{
	struct broker *broker = context;
	broker->mqtt = NULL;
	if (broker->stopped == NULL) /* it has ended by itself */
		return;
	broker->stopped(broker->owner);
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
	broker->asking = true;
	mqtt_subscribe(broker->mqtt, TOPIC, 0);
}

static void on_down(void *owner)
{
	struct broker *broker = owner;
	broker->known = false;
	broker->held = 0;
	broker->refusals += broker->asking;
	broker->asking = false;
	if (broker->refusals >= REFUSALS_MOST)
		leave(broker, "the broker hangs up when " TOPIC " is subscribed");
	else
		mqtt_connect(broker->mqtt);
}

static void on_subscribed(void *owner, int reason)
{
	struct broker *broker = owner;
	broker->asking = false;
	broker->refusals = 0;
	if (reason >= 0x80)
		leave(broker, "the broker does not let us read " TOPIC);
}

/* A number in decimal digits; whatever else is there is not what we asked for. */
static void on_message(void *owner, const struct mqtt_message *message)
{
	struct broker *broker = owner;
	const char *digits = message->payload;
	uint64_t dropped = 0;
	broker->held++;
	if (strcmp(message->topic, TOPIC) != 0 || message->payload_length == 0 || message->payload_length > DIGITS_MOST)
		return;
	for (size_t i = 0; i < message->payload_length; i++) {
		if (digits[i] < '0' || digits[i] > '9')
			return;
		dropped = dropped * 10 + (uint64_t)(digits[i] - '0');
	}
	broker->dropped = dropped;
	broker->known = true;
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

struct broker *broker_start(uv_loop_t *loop, const struct config_mqtt *config, const char *client_id, void *owner)
{
	struct broker *broker = memory_zeroed(1, sizeof *broker);
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
	return broker->mqtt != NULL && mqtt_is_up(broker->mqtt);
}

void broker_stop(struct broker *broker, void (*stopped)(void *owner))
{
	broker->stopped = stopped;
	if (broker->mqtt == NULL) {
		mqtt_closed(broker);
		return;
	}
	mqtt_close(broker->mqtt, mqtt_closed);
	mqtt_close(broker->mqtt, mqtt_closed); /* it has nothing to wait for */
}
