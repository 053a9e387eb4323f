/* See publisher.h. */
#include "publisher.h"

#include "clock.h"
#include "log.h"
#include "memory.h"
#include "mqtt.h"
#include "template.h"

#include <math.h>
#include <mqtt_protocol.h>
#include <stdio.h>
#include <stdlib.h>

enum {
	UNACKNOWLEDGED_MOST = 1000, /* QoS 1 and 2; the library goes through all of them for each message */
	BURST_MOST = 200,           /* messages in one turn of the loop */
	LATE_MOST_MS = 1000,
	TICK_MOST_MS = 1000,
	BLOCKED_MS = 20,     /* between two looks whether the broker takes messages again */
	TOPIC_BYTES = 65536, /* MQTT 5 §1.5.4 */
	IDS = 65536,         /* MQTT 5 §2.2.1 */
};

struct publisher {
	uv_loop_t *loop;
	const struct config *config;
	struct metrics_publisher *counters;
	struct publisher_handler handler;
	void *owner;
	struct mqtt *mqtt;
	struct template *template;
	struct publisher_run run;
	char *topic; /* TOPIC_BYTES */
	uv_timer_t timer;
	uint64_t started_at; /* hrtime of the schedule's message 0; 0: not begun */
	uint64_t scheduled;  /* messages whose turn has come: generated or skipped, in this run of the schedule */
	uint64_t generated;  /* in this life of the publisher: towards publisher.count */
	uint64_t settled;    /* of those: acknowledged or failed */
	bool go, done, late;
	bool alone_said, refused_said; /* once; the sums count the rest */
	uint64_t *published_at;        /* hrtime by message id; 0: not under way. NULL: nobody wants to know */
	bool stopping, closing;
	void (*stopped)(void *owner);
};

static void close_when_settled(struct publisher *publisher);

static uint64_t unacknowledged(const struct publisher *publisher)
{
	return publisher->generated - publisher->settled;
}

static bool all_generated(const struct publisher *publisher)
{
	int64_t count = publisher->config->publisher.count;
	return count > 0 && publisher->generated >= (uint64_t)count;
}

static void check_done(struct publisher *publisher)
{
	if (publisher->stopping) {
		close_when_settled(publisher);
	} else if (all_generated(publisher) && unacknowledged(publisher) == 0 && !publisher->done) {
		publisher->done = true;
		publisher->handler.done(publisher->owner);
	}
}

/* How many messages should have been published by now. */
static uint64_t due(const struct publisher *publisher)
{
	double seconds = (double)(uv_hrtime() - publisher->started_at) / 1e9;
	return (uint64_t)floor(seconds * publisher->config->publisher.rate) + 1;
}

/* The due messages that cannot go out are kept for up to a second's worth, the rest is skipped. */
static uint64_t skip_late(struct publisher *publisher, uint64_t behind)
{
	uint64_t most = (uint64_t)ceil(publisher->config->publisher.rate * LATE_MOST_MS / 1000.0);
	if (behind <= most)
		return behind;
	if (!publisher->late)
		log_warn("publisher",
		         "more than a second behind its rate; the messages that were due are skipped and counted");
	publisher->late = true;
	publisher->counters->skipped += behind - most;
	publisher->scheduled += behind - most;
	return most;
}

/* Ids come back in any order. */
static void note_published(struct publisher *publisher, int id)
{
	if (publisher->published_at != NULL)
		publisher->published_at[id] = uv_hrtime();
}

static void note_acknowledged(struct publisher *publisher, int id)
{
	if (publisher->published_at == NULL || publisher->published_at[id] == 0)
		return;
	metrics_observe(&publisher->counters->publish_latency, (uv_hrtime() - publisher->published_at[id]) / 1000);
	publisher->published_at[id] = 0;
}

static void publish_one(struct publisher *publisher)
{
	const struct config_publisher *config = &publisher->config->publisher;
	struct template_message message = template_render(publisher->template, publisher->generated, clock_wall_ms());
	publisher->scheduled++;
	publisher->generated++;
	publisher->counters->generated++;
	int id = 0;
	if (template_topic(config->topic, message.device, publisher->topic, TOPIC_BYTES))
		id = mqtt_publish(publisher->mqtt, publisher->topic, message.payload, message.length, config->qos);
	if (id != 0) {
		note_published(publisher, id);
		return;
	}
	publisher->counters->failed++;
	publisher->settled++;
}

static bool may_publish(const struct publisher *publisher)
{
	return mqtt_is_up(publisher->mqtt) && !publisher->stopping && !all_generated(publisher) &&
	       unacknowledged(publisher) < UNACKNOWLEDGED_MOST;
}

static void publish_due(struct publisher *publisher)
{
	uint64_t now_due = due(publisher);
	uint64_t behind = now_due > publisher->scheduled ? now_due - publisher->scheduled : 0;
	behind = skip_late(publisher, behind);
	uint64_t burst = 0;
	while (burst < behind && burst < BURST_MOST && may_publish(publisher)) {
		publish_one(publisher);
		burst++;
	}
	if (burst > 0)
		mqtt_flush(publisher->mqtt);
	if (burst == behind)
		publisher->late = false;
}

static void tick(uv_timer_t *timer);

static void schedule(struct publisher *publisher)
{
	double rate = publisher->config->publisher.rate;
	double at = (double)publisher->scheduled / rate;
	double now = (double)(uv_hrtime() - publisher->started_at) / 1e9;
	double wait = ceil((at - now) * 1000);
	if (wait < BLOCKED_MS && !may_publish(publisher))
		wait = BLOCKED_MS;
	uv_update_time(publisher->loop);
	uv_timer_start(&publisher->timer, tick, wait < 1 ? 1 : wait > TICK_MOST_MS ? TICK_MOST_MS : (uint64_t)wait, 0);
}

static void tick(uv_timer_t *timer)
{
	struct publisher *publisher = container_of(timer, struct publisher, timer);
	publish_due(publisher);
	check_done(publisher);
	if (!publisher->stopping && !all_generated(publisher))
		schedule(publisher);
}

static void begin(struct publisher *publisher)
{
	if (!publisher->go || !mqtt_is_up(publisher->mqtt) || publisher->started_at != 0)
		return;
	publisher->started_at = uv_hrtime();
	uv_timer_start(&publisher->timer, tick, 0, 0);
}

/* ---- what the connection says ---- */

static void on_up(void *owner, const struct mqtt_granted *granted)
{
	struct publisher *publisher = owner;
	if (publisher->config->publisher.qos > granted->maximum_qos)
		log_error("publisher", "the broker takes at most QoS %d; lower publisher.qos", granted->maximum_qos);
	begin(publisher);
}

static void on_down(void *owner)
{
	struct publisher *publisher = owner;
	if (publisher->config->publisher.qos == 0) { /* written or not, nobody will say */
		publisher->counters->failed += unacknowledged(publisher);
		publisher->settled = publisher->generated;
	}
	check_done(publisher);
	mqtt_connect(publisher->mqtt);
}

static void on_published(void *owner, int id, int reason)
{
	struct publisher *publisher = owner;
	if (unacknowledged(publisher) == 0)
		return; /* counted as failed when its connection went */
	publisher->settled++;
	note_acknowledged(publisher, id);
	if (reason >= 0x80) {
		publisher->counters->failed++;
		if (!publisher->refused_said)
			log_error("publisher",
			          "the broker refuses messages to %s (reason 0x%02x); check its access rules",
			          publisher->topic, (unsigned)reason);
		publisher->refused_said = true;
	} else {
		publisher->counters->acked++;
	}
	if (reason == MQTT_RC_NO_MATCHING_SUBSCRIBERS) {
		publisher->counters->no_subscribers++;
		if (!publisher->alone_said)
			log_warn("publisher",
			         "the broker says that nobody is subscribed to %s: it discards the messages",
			         publisher->topic);
		publisher->alone_said = true;
	}
	check_done(publisher);
}

/* ---- public ---- */

static const struct mqtt_handler mqtt_handler = {
    .up = on_up,
    .down = on_down,
    .published = on_published,
};

static uint64_t choose_seed(const struct config_publisher *config)
{
	uint64_t seed = config->seed;
	if (!config->seed_set)
		uv_random(NULL, NULL, &seed, sizeof seed, 0, NULL);
	return seed;
}

struct publisher *publisher_start(uv_loop_t *loop, const struct config *config, const char *client_prefix,
                                  struct metrics_publisher *counters, const struct publisher_handler *handler,
                                  void *owner)
{
	struct publisher *publisher = memory_zeroed(1, sizeof *publisher);
	publisher->loop = loop;
	publisher->config = config;
	publisher->counters = counters;
	publisher->handler = *handler;
	publisher->owner = owner;
	publisher->template = template_create(config->publisher.devices, choose_seed(&config->publisher));
	publisher->run = (struct publisher_run){.began_ms = clock_wall_ms(), .began_hrtime = uv_hrtime()};
	snprintf(publisher->run.name, sizeof publisher->run.name, "%s", template_run(publisher->template));
	publisher->topic = memory_zeroed(1, TOPIC_BYTES);
	if (config->http.enabled)
		publisher->published_at = memory_zeroed(IDS, sizeof *publisher->published_at);
	uv_timer_init(loop, &publisher->timer);
	char *client_id = memory_format("%s-pub", client_prefix);
	struct mqtt_options options = {
	    .config = &config->mqtt, .client_id = client_id, .name = "publisher", .keep_client = true};
	publisher->mqtt = mqtt_create(loop, &options, &mqtt_handler, publisher);
	free(client_id);
	mqtt_connect(publisher->mqtt);
	return publisher;
}

void publisher_go(struct publisher *publisher)
{
	publisher->go = true;
	begin(publisher);
}

static void timer_closed(uv_handle_t *handle)
{
	struct publisher *publisher = container_of(handle, struct publisher, timer);
	void (*stopped)(void *) = publisher->stopped;
	void *owner = publisher->owner;
	mqtt_free(publisher->mqtt);
	template_destroy(publisher->template);
	free(publisher->topic);
	free(publisher->published_at);
	free(publisher);
	stopped(owner);
}

static void mqtt_closed(void *owner)
{
	struct publisher *publisher = owner;
	uv_close((uv_handle_t *)&publisher->timer, timer_closed);
}

static void close_now(struct publisher *publisher)
{
	if (publisher->closing)
		return;
	publisher->closing = true;
	uint64_t left = unacknowledged(publisher);
	if (left > 0)
		log_warn("publisher", "%llu messages were published but not acknowledged when it stopped",
		         (unsigned long long)left);
	mqtt_close(publisher->mqtt, mqtt_closed);
}

static void close_when_settled(struct publisher *publisher)
{
	if (unacknowledged(publisher) == 0)
		close_now(publisher);
}

void publisher_stop(struct publisher *publisher, void (*stopped)(void *owner))
{
	publisher->stopping = true;
	publisher->stopped = stopped;
	uv_timer_stop(&publisher->timer);
	if (publisher->started_at == 0)
		close_now(publisher);
	else
		close_when_settled(publisher);
}

void publisher_hurry(struct publisher *publisher)
{
	if (!publisher->closing)
		close_now(publisher);
	else
		mqtt_close(publisher->mqtt, mqtt_closed);
}

bool publisher_is_up(const struct publisher *publisher)
{
	return mqtt_is_up(publisher->mqtt);
}

struct publisher_run publisher_run(const struct publisher *publisher)
{
	return publisher->run;
}

const char *publisher_status(const struct publisher *publisher)
{
	if (!mqtt_is_up(publisher->mqtt))
		return "connecting";
	if (publisher->done)
		return "done";
	return publisher->started_at == 0 ? "waiting for the consumer's subscription" : "publishing";
}
