/* See qos0.h. */
#include "qos0.h"

#include "clock.h"
#include "log.h"
#include "memory.h"
#include "mqtt.h"

#include <stdlib.h>
#include <string.h>

enum {
	PARCELS_MOST = 2,  /* under way; meanwhile the next one grows */
	BATCHES_LEAST = 4, /* that consumer.qos0_buffer has room for */
};

struct qos0 {
	const struct config *config;
	struct delivery *delivery;
	struct metrics_consumer *counters;
	const char *filter;
	void (*subscribed)(void *owner);
	void *owner;
	struct mqtt *mqtt;
	struct delivery_sender sender;
	struct delivery_parcel *filling; /* or NULL; while there is one, `due` runs, or PARCELS_MOST are under way */
	uv_timer_t due;                  /* of the batch that is filling */
	struct pace pace;
	size_t parcels; /* under way */
	size_t bytes;   /* in them */
	size_t held;    /* messages that mqtt.c takes for held */
	struct log_repeat overload, refusal;
	bool up;     /* connected and subscribed, and counted so */
	bool closed; /* the connection; which it is only while stopping */
	void (*stopped)(void *owner);
};

static void close_when_idle(struct qos0 *qos0);

static uint64_t now(const struct qos0 *qos0)
{
	return uv_now(qos0->due.loop);
}

static void submit(struct qos0 *qos0)
{
	struct delivery_parcel *parcel = qos0->filling;
	uv_timer_stop(&qos0->due);
	if (parcel == NULL)
		return;
	qos0->filling = NULL;
	qos0->parcels++;
	qos0->bytes += delivery_bytes(parcel);
	pace_write(&qos0->pace, now(qos0));
	delivery_submit(parcel);
}

/* Waiting it must not fill the buffer, or messages are dropped that MongoDB would take. */
static bool is_ready(struct qos0 *qos0)
{
	struct pace_wait wait = delivery_wait(qos0->delivery, &qos0->sender);
	return delivery_bytes(qos0->filling) * BATCHES_LEAST >= (size_t)qos0->config->consumer.qos0_buffer ||
	       pace_is_ready(&qos0->pace, qos0->filling->batch.count, wait, now(qos0));
}

static void submit_if_ready(struct qos0 *qos0)
{
	if (qos0->filling != NULL && qos0->parcels < PARCELS_MOST && is_ready(qos0))
		submit(qos0);
}

/* A parcel that comes back sees to it as well. */
static void batch_due(uv_timer_t *timer)
{
	submit_if_ready(container_of(timer, struct qos0, due));
}

static void open_batch(struct qos0 *qos0)
{
	uint64_t due = pace_due(&qos0->pace, delivery_wait(qos0->delivery, &qos0->sender), now(qos0));
	qos0->filling = delivery_take(qos0->delivery, &qos0->sender);
	qos0->filling->batch.route = qos0->filter;
	uv_timer_start(&qos0->due, batch_due, due - now(qos0), 0);
}

static void on_settled(struct delivery_sender *sender, size_t durable, size_t open, size_t bytes)
{
	struct qos0 *qos0 = container_of(sender, struct qos0, sender);
	qos0->parcels--;
	qos0->bytes -= bytes;
	submit_if_ready(qos0);
	close_when_idle(qos0);
}

/* ---- what the connection says ---- */

static void on_up(void *owner, const struct mqtt_granted *granted)
{
	struct qos0 *qos0 = owner;
	mqtt_subscribe(qos0->mqtt, qos0->filter, 0);
}

static void note_down(struct qos0 *qos0)
{
	qos0->counters->connections_up -= qos0->up;
	qos0->up = false;
}

static void on_down(void *owner)
{
	struct qos0 *qos0 = owner;
	note_down(qos0);
	qos0->held = 0;
	mqtt_connect(qos0->mqtt);
}

static void on_subscribed(void *owner, int reason)
{
	struct qos0 *qos0 = owner;
	if (reason >= 0x80) {
		log_repeat(&qos0->refusal, LOG_LEVEL_ERROR, "consumer",
		           "the broker refuses the subscription to %s (reason 0x%02x); check its access rules",
		           qos0->filter, (unsigned)reason);
		mqtt_give_up(qos0->mqtt, "subscription refused");
		return;
	}
	log_info("consumer", "subscribed to %s at QoS 0, whose messages may be lost", qos0->filter);
	qos0->counters->connections_up += !qos0->up;
	qos0->up = true;
	qos0->subscribed(qos0->owner);
}

static bool is_overloaded(const struct qos0 *qos0, const struct message *message)
{
	size_t filling = qos0->filling != NULL ? delivery_bytes(qos0->filling) : 0;
	return qos0->bytes + filling + message->topic_length + message->payload_length >
	       (size_t)qos0->config->consumer.qos0_buffer;
}

static void on_message(void *owner, const struct message *message)
{
	struct qos0 *qos0 = owner;
	qos0->held++;
	qos0->counters->received++;
	qos0->counters->received_qos0++;
	if (is_overloaded(qos0, message)) {
		qos0->counters->dropped[METRICS_OVERLOAD]++;
		log_repeat(&qos0->overload, LOG_LEVEL_WARN, "consumer",
		           "more QoS 0 messages on %s than MongoDB takes; what does not fit into consumer.qos0_buffer "
		           "is dropped",
		           qos0->filter);
		return;
	}
	if (qos0->filling == NULL)
		open_batch(qos0);
	const struct config_consumer *config = &qos0->config->consumer;
	batch_add(&qos0->filling->batch, message, &config->id, (size_t)config->max_payload, clock_wall_ms());
	if (delivery_is_full(qos0->filling))
		submit(qos0);
}

/* Nothing waits for an acknowledgement: read on at once. */
static void on_drained(void *owner)
{
	struct qos0 *qos0 = owner;
	size_t held = qos0->held;
	qos0->held = 0;
	mqtt_durable(qos0->mqtt, mqtt_generation(qos0->mqtt), held);
	submit_if_ready(qos0);
}

static const struct mqtt_handler mqtt_handler = {
    .up = on_up,
    .down = on_down,
    .message = on_message,
    .drained = on_drained,
    .subscribed = on_subscribed,
};

/* ---- public ---- */

struct qos0 *qos0_create(uv_loop_t *loop, const struct qos0_options *options, void *owner)
{
	struct qos0 *qos0 = memory_zeroed(1, sizeof *qos0);
	qos0->config = options->config;
	qos0->delivery = options->delivery;
	qos0->counters = options->counters;
	qos0->filter = options->filter;
	qos0->subscribed = options->subscribed;
	qos0->owner = owner;
	qos0->counters->connections++;
	qos0->sender = (struct delivery_sender){.settled = on_settled};
	uv_timer_init(loop, &qos0->due);
	struct mqtt_options mqtt = {.config = &options->config->mqtt,
	                            .client_id = options->client_id,
	                            .name = "consumer of QoS 0",
	                            .clean_start = true};
	qos0->mqtt = mqtt_create(loop, &mqtt, &mqtt_handler, qos0);
	return qos0;
}

void qos0_go(struct qos0 *qos0)
{
	mqtt_connect(qos0->mqtt);
}

bool qos0_is_up(const struct qos0 *qos0)
{
	return mqtt_is_up(qos0->mqtt);
}

/* ---- stopping ---- */

static void timer_closed(uv_handle_t *handle)
{
	struct qos0 *qos0 = container_of((uv_timer_t *)handle, struct qos0, due);
	qos0->counters->connections--;
	mqtt_free(qos0->mqtt);
	void (*stopped)(void *) = qos0->stopped;
	void *owner = qos0->owner;
	free(qos0);
	stopped(owner);
}

static void close_when_idle(struct qos0 *qos0)
{
	if (qos0->closed && qos0->parcels == 0)
		uv_close((uv_handle_t *)&qos0->due, timer_closed);
}

static void mqtt_closed(void *owner)
{
	struct qos0 *qos0 = owner;
	qos0->closed = true;
	note_down(qos0);
	submit(qos0);
	if (qos0->parcels > 0 && delivery_trouble(qos0->delivery) != NULL)
		qos0_hurry(qos0);
	else
		close_when_idle(qos0);
}

void qos0_stop(struct qos0 *qos0, void (*stopped)(void *owner))
{
	qos0->stopped = stopped;
	mqtt_close(qos0->mqtt, mqtt_closed);
}

void qos0_hurry(struct qos0 *qos0)
{
	if (!qos0->closed)
		mqtt_close(qos0->mqtt, mqtt_closed);
	else
		delivery_give_up(qos0->delivery, &qos0->sender, METRICS_SHUTDOWN);
}
