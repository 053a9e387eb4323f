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
	SESSION_S = 60,     /* long enough for its owner to come back, should it be another's */
	REFUSALS_MOST = 3,  /* some brokers refuse a subscription to $SYS by hanging up */
};

/* What the next SUBACK answers. */
enum question { NO_QUESTION, ASKED_DROPPED, ASKED_VERSION };

struct broker {
	void *owner;
	const struct config_mqtt *config;
	bool queues, shares;
	struct mqtt *mqtt;
	bool closed;      /* for good: by itself, or stopped */
	bool alone;       /* its session was seen to be its own */
	uint64_t dropped; /* as last said, on whatever connection */
	bool known;       /* said on this connection */
	bool ever;        /* said on some connection */
	size_t held;
	enum question asking;
	int refusals; /* connections in a row that the broker has refused, or that ended when DROPPED was asked for */
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

/* A broker that makes the client id from the user name or certificate takes us for the connection whose messages are
 * stored. Hence no clean start, which would have emptied its session, and an id that nobody had before: a session that
 * is there is not ours. Nothing of it may be acknowledged, so not even DISCONNECT is sent. */
static void leave_session(struct broker *broker)
{
	log_error("broker",
	          "the broker has a session for a client id that is new: it seems to give all connections of one "
	          "user or certificate the same client id (use_username_as_clientid, use_identity_as_username "
	          "with it, peer_cert_as_clientid); give each its own, or set mqtt.watch_broker false");
	broker->known = false;
	mqtt_close(broker->mqtt, mqtt_closed);
	mqtt_close(broker->mqtt, mqtt_closed);
}

static void on_up(void *owner, const struct mqtt_granted *granted)
{
	struct broker *broker = owner;
	if (granted->session_present && !broker->alone) {
		leave_session(broker);
		return;
	}
	broker->alone = true;
	broker->asking = ASKED_DROPPED;
	mqtt_subscribe(broker->mqtt, DROPPED, 0);
}

static void on_down(void *owner)
{
	struct broker *broker = owner;
	broker->known = false;
	broker->held = 0;
	bool refused = mqtt_was_refused(broker->mqtt);
	broker->refusals += refused || broker->asking == ASKED_DROPPED;
	broker->version_refused = broker->version_refused || broker->asking == ASKED_VERSION;
	broker->asking = NO_QUESTION;
	if (broker->refusals >= REFUSALS_MOST)
		leave(broker, refused ? "the broker refuses a connection of its own for $SYS"
		                      : "the broker hangs up when " DROPPED " is subscribed");
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

static void note_version(struct broker *broker, const struct message *message)
{
	if (broker_loses_shares(message->payload, message->payload_length))
		log_repeat(
		    &broker->loses_shares, LOG_LEVEL_WARN, "broker",
		    "this broker is %.*s: before 2.0.12, unless patched, it loses messages of shared subscriptions "
		    "when a session is resumed; use a newer one (Debian's 2.0.11-1.2+deb12u1 is patched), or "
		    "consumer.connections 1 and no consumer.share",
		    (int)message->payload_length, (const char *)message->payload);
}

bool broker_number(const void *payload, size_t length, uint64_t *number)
{
	const char *digits = payload;
	*number = 0;
	if (length == 0 || length > DIGITS_MOST)
		return false;
	for (size_t i = 0; i < length; i++) {
		if (digits[i] < '0' || digits[i] > '9')
			return false;
		*number = *number * 10 + (uint64_t)(digits[i] - '0');
	}
	return true;
}

/* The first number, retained from before, is where counting begins; one that is lower than before comes from a broker
 * that has been restarted. */
static void say_dropped(const struct broker *broker, uint64_t dropped, bool retained)
{
	uint64_t before = broker->ever ? broker->dropped : retained ? dropped : 0;
	uint64_t rise = dropped >= before ? dropped - before : dropped;
	bool old = !broker->ever && rise == 0; /* worth a line at the start, for some may have been ours */
	if (dropped == 0 || (rise == 0 && !old))
		return;
	log_write(
	    old ? LOG_LEVEL_INFO : LOG_LEVEL_WARN, "broker",
	    "the broker has dropped %llu messages that it could not queue for a client, ours or another%s: to end "
	    "that, raise max_queued_messages (1000 unless set)%s and, where it is set, max_queued_bytes in "
	    "mosquitto.conf",
	    (unsigned long long)(old ? dropped : rise), old ? ", since it started" : "",
	    broker->config->protocol == 5 ? "" : ", max_inflight_messages (20 unless set)");
}

/* Whatever else is there than a number is not what we asked for. */
static void note_dropped(struct broker *broker, const struct message *message)
{
	uint64_t dropped;
	if (!broker_number(message->payload, message->payload_length, &dropped))
		return;
	if (broker->queues)
		say_dropped(broker, dropped, message->retain);
	broker->dropped = dropped;
	broker->known = broker->ever = true;
}

static void on_message(void *owner, const struct message *message)
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

struct broker *broker_start(uv_loop_t *loop, const struct broker_options *options, void *owner)
{
	struct broker *broker = memory_zeroed(1, sizeof *broker);
	broker->config = options->config;
	broker->queues = options->queues;
	broker->shares = options->shares;
	broker->owner = owner;
	uint32_t number = 0;
	uv_random(NULL, NULL, &number, sizeof number, 0, NULL); /* if it fails, the id is merely not new */
	char *id = memory_format("%s-sys-%08x", options->client_id, number);
	struct mqtt_options mqtt = {.config = options->config,
	                            .client_id = id,
	                            .name = "broker",
	                            .clean_start = options->config->protocol != 5,
	                            .brief_s = SESSION_S,
	                            .quiet = true};
	broker->mqtt = mqtt_create(loop, &mqtt, &mqtt_handler, broker);
	free(id);
	return broker;
}

void broker_go(struct broker *broker)
{
	mqtt_connect(broker->mqtt);
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
