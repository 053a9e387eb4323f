/* See lane.h. */
#include "lane.h"

#include "clock.h"
#include "log.h"
#include "memory.h"
#include "mqtt.h"

#include <stdlib.h>
#include <string.h>

#define NO_SHARES                                                                                                      \
	"the broker takes no shared subscriptions: set consumer.connections 1 and no consumer.share, or use another "  \
	"broker"

enum {
	SHARES_REFUSED = 0x9e, /* MQTT 5 §3.9.3 */
	TIMERS = 3,
	HOLD_MARGIN_MS = 2000,
	PATIENCE_SHARE = 4, /* of the hold limit: so long a parcel may wait for a worker, */
	FILLING_SHARE = 4,  /* and so long a batch may fill */
	KEEPALIVE_DEFAULT_MS = 60000,
	QUIET_MS = 1000,  /* a session left behind is empty when it is silent this long, */
	QUIET_ROUNDS = 3, /* this often in a row, with an answer of the broker in between */
};

struct lane {
	uv_loop_t *loop;
	const struct config *config;
	struct delivery *delivery;
	struct metrics_consumer *counters;
	struct lane_handler handler;
	void *owner;
	char *client_id;
	char *filter; /* NULL: a session left behind */
	char **stale; /* filters to unsubscribe; ends with NULL */

	struct mqtt *mqtt;
	struct delivery_sender sender;
	struct delivery_parcel *filling; /* or NULL; while there is one, `due` runs */
	struct pace pace;
	size_t pending; /* messages of the round that are not durable */
	size_t pending_bytes;
	size_t returned;     /* of the round: given up */
	bool parted;         /* a batch of the round has left: the rest of it waits no more, or it might never end */
	uint64_t generation; /* of the connection the round came by */
	uint64_t hold_ms;
	uv_timer_t hold;
	uv_timer_t due; /* of the batch that is filling */

	bool started;          /* lane_go() was called */
	bool up;               /* connected and subscribed, and counted so */
	unsigned unsubscribes; /* of this connection, not yet answered */
	bool tidy;             /* the handler has heard that nothing stale is left */
	unsigned quiet;        /* in a row, of a session left behind */
	bool emptied;
	uv_timer_t silence;

	struct log_repeat refusal;
	bool stopping, closing;
	void (*stopped)(void *owner, struct lane *lane);
	int handles;
};

static void close_when_idle(struct lane *lane);

/* ---- the round ---- */

/* The broker hangs up after 1.5 keepalives of silence, of which one may have passed when the gate closes (MQTT 5
 * §3.1.2.10). A keepalive of 0 means none: then what our own default gives. */
static uint64_t hold_limit(int keepalive_s)
{
	int64_t keepalive = keepalive_s > 0 ? (int64_t)keepalive_s * 1000 : KEEPALIVE_DEFAULT_MS;
	int64_t hold = keepalive / 2 - HOLD_MARGIN_MS;
	return (uint64_t)(hold > keepalive / 4 ? hold : keepalive / 4);
}

/* Connect, or stop, now that no round is under way. */
static void go_on(struct lane *lane)
{
	if (lane->stopping)
		close_when_idle(lane);
	else if (lane->started && delivery_accepts(lane->delivery) && !mqtt_is_up(lane->mqtt))
		mqtt_connect(lane->mqtt);
}

static bool round_is_on_line(const struct lane *lane)
{
	return mqtt_is_up(lane->mqtt) && mqtt_generation(lane->mqtt) == lane->generation;
}

static void round_over(struct lane *lane)
{
	uv_timer_stop(&lane->hold);
	pace_acknowledged(&lane->pace);
	lane->pending_bytes = 0;
	if (lane->returned == 0) {
		delivery_round_stored(lane->delivery, lane->hold_ms);
		return;
	}
	log_warn("consumer", "%zu messages handed back to the broker unacknowledged; it delivers them again",
	         lane->returned);
	lane->returned = 0;
	if (round_is_on_line(lane)) /* its PUBACKs can never be sent */
		mqtt_give_up(lane->mqtt, "given up unacknowledged, for the messages cannot be stored");
}

static void on_settled(struct delivery_sender *sender, size_t durable, size_t open, size_t bytes)
{
	struct lane *lane = container_of(sender, struct lane, sender);
	lane->pending -= durable + open;
	lane->returned += open;
	if (lane->pending == 0)
		round_over(lane);
	if (open == 0)
		mqtt_durable(lane->mqtt, lane->generation, durable); /* may read the next round */
	if (lane->pending == 0)
		go_on(lane);
}

/* What has been read so far leaves. */
static void close_batch(struct lane *lane)
{
	struct delivery_parcel *parcel = lane->filling;
	uv_timer_stop(&lane->due);
	lane->filling = NULL;
	if (parcel == NULL)
		return;
	lane->parted = true;
	pace_write(&lane->pace, uv_now(lane->loop));
	delivery_submit(parcel);
}

/* Far below the hold limit, which runs meanwhile. */
static struct pace_wait wait_of(const struct lane *lane)
{
	struct pace_wait wait = delivery_wait(lane->delivery, &lane->sender);
	if (wait.interval > lane->hold_ms / FILLING_SHARE)
		wait.interval = lane->hold_ms / FILLING_SHARE;
	return wait;
}

static void batch_due(uv_timer_t *timer)
{
	struct lane *lane = container_of(timer, struct lane, due);
	pace_waited(&lane->pace, wait_of(lane), uv_now(lane->loop));
	close_batch(lane);
}

static void arm_due(struct lane *lane)
{
	uint64_t now = uv_now(lane->loop);
	uv_timer_start(&lane->due, batch_due, pace_due(&lane->pace, wait_of(lane), now) - now, 0);
}

/* The timer runs from the first message on: whatever becomes of the reader, no batch stays behind. */
static void open_batch(struct lane *lane)
{
	lane->filling = delivery_take(lane->delivery, &lane->sender);
	lane->filling->batch.route = lane->filter != NULL ? lane->config->consumer.topic : NULL;
	arm_due(lane);
}

/* The broker drops a client that is silent for 1.5 keepalives, and PINGREQ waits behind the gate as well. */
static void hold_expired(uv_timer_t *timer)
{
	struct lane *lane = container_of(timer, struct lane, hold);
	if (round_is_on_line(lane))
		mqtt_give_up(lane->mqtt,
		             "given up unacknowledged: the messages could not be stored within the hold limit");
	delivery_give_up(lane->delivery, &lane->sender, METRICS_HOLD_LIMIT);
}

/* ---- what the connection says ---- */

static void silent(uv_timer_t *timer);

static void unsubscribe_stale(struct lane *lane)
{
	lane->unsubscribes = 0;
	for (char **filter = lane->stale; *filter != NULL; filter++)
		lane->unsubscribes += mqtt_unsubscribe(lane->mqtt, *filter);
}

static void end_emptied(struct lane *lane, const char *why)
{
	if (lane->emptied)
		return;
	lane->emptied = true;
	log_info("consumer", "%s: session left behind %s", lane->client_id, why);
	lane->handler.emptied(lane->owner, lane);
}

static bool is_shared(const struct lane *lane)
{
	return lane->filter != NULL && strncmp(lane->filter, "$share/", strlen("$share/")) == 0;
}

static void refuse(struct lane *lane, const char *why)
{
	log_repeat(&lane->refusal, LOG_LEVEL_ERROR, "consumer", "%s", why);
	mqtt_give_up(lane->mqtt, "subscription refused");
}

static void on_up(void *owner, const struct mqtt_granted *granted)
{
	struct lane *lane = owner;
	lane->hold_ms = hold_limit(granted->keepalive_s);
	lane->sender.patience_ms = lane->hold_ms / PATIENCE_SHARE;
	pace_connected(&lane->pace);
	lane->quiet = 0;
	if (lane->filter == NULL && !granted->session_present) {
		end_emptied(lane, "is not known to the broker");
		return;
	}
	if (granted->session_expiry_s == 0)
		log_warn("consumer", "the broker keeps no session for us: what is published while we are away is lost");
	if (is_shared(lane) && !granted->shares) {
		refuse(lane, NO_SHARES);
		return;
	}
	/* Always, also into a session that is there: the broker may have lost its subscriptions. */
	int qos = lane->config->consumer.qos;
	if (lane->filter != NULL)
		mqtt_subscribe(lane->mqtt, lane->filter, qos > 1 ? 1 : qos);
	else
		unsubscribe_stale(lane);
	for (char **filter = lane->stale; *filter != NULL; filter++)
		log_info("consumer", "%s: unsubscribing from %s, which is no longer configured", lane->client_id,
		         *filter);
	if (lane->filter == NULL)
		uv_timer_start(&lane->silence, silent, QUIET_MS, 0);
}

static void note_down(struct lane *lane)
{
	lane->counters->connections_up -= lane->up;
	lane->up = false;
}

static void on_down(void *owner)
{
	struct lane *lane = owner;
	note_down(lane);
	uv_timer_stop(&lane->silence);
	close_batch(lane); /* read just before the connection went */
	if (lane->pending == 0)
		go_on(lane); /* else when the round is durable */
}

static void begin_round(struct lane *lane)
{
	lane->generation = mqtt_generation(lane->mqtt);
	lane->returned = 0;
	lane->parted = false;
	uv_timer_start(&lane->hold, hold_expired, lane->hold_ms, 0);
}

static void on_message(void *owner, const struct message *message)
{
	struct lane *lane = owner;
	const struct config_consumer *config = &lane->config->consumer;
	if (lane->pending == 0)
		begin_round(lane);
	if (lane->generation != mqtt_generation(lane->mqtt))
		abort(); /* a round belongs to one connection, or the gate of the other would stay closed for ever */
	if (lane->filling == NULL)
		open_batch(lane);
	struct batch *batch = &lane->filling->batch;
	batch_add(batch, message, &config->id, (size_t)config->max_payload, clock_wall_ms());
	pace_message(&lane->pace, message->qos, uv_now(lane->loop));
	lane->quiet = 0;
	lane->pending++;
	lane->pending_bytes +=
	    message->topic_length + message->payload_length + batch->messages[batch->count - 1].properties_length;
	lane->counters->received++;
	lane->counters->redelivered += message->dup;
	lane->counters->received_qos0 += message->qos == 0;
	if (delivery_is_full(lane->filling))
		close_batch(lane);
}

static bool has_room(void *owner)
{
	const struct lane *lane = owner;
	const struct config_consumer *config = &lane->config->consumer;
	return !lane->stopping && lane->pending < (size_t)config->batch_count &&
	       lane->pending_bytes < (size_t)config->batch_bytes;
}

static enum mqtt_reading reading(void *owner)
{
	const struct lane *lane = owner;
	if (lane->filling == NULL)
		return MQTT_READ_NOTHING;
	return pace_is_fast(&lane->pace) ? MQTT_READ_SELDOM : MQTT_READ_ON;
}

static void on_drained(void *owner)
{
	struct lane *lane = owner;
	if (lane->filling == NULL)
		return;
	if (!has_room(lane) || lane->parted ||
	    pace_is_ready(&lane->pace, lane->filling->batch.count, wait_of(lane), uv_now(lane->loop)))
		close_batch(lane);
	else
		arm_due(lane);
}

static void on_subscribed(void *owner, int reason)
{
	struct lane *lane = owner;
	if (lane->filter == NULL)
		return; /* not asked for */
	if (reason >= 0x80) {
		char *why = reason == SHARES_REFUSED
		                ? memory_string(NO_SHARES)
		                : memory_format("the broker refuses the subscription to %s (reason 0x%02x); check its "
		                                "access rules",
		                                lane->filter, (unsigned)reason);
		refuse(lane, why);
		free(why);
		return;
	}
	if (reason < lane->config->consumer.qos && reason < 1)
		log_warn("consumer", "the broker grants %s only at QoS %d: messages may be lost on the way",
		         lane->filter, reason);
	log_info("consumer", "subscribed to %s at QoS %d%s%s", lane->filter, reason, is_shared(lane) ? " as " : "",
	         is_shared(lane) ? lane->client_id : "");
	lane->counters->connections_up += !lane->up;
	lane->up = true;
	unsubscribe_stale(lane); /* now, for without the new filter the old one is better than none */
	lane->handler.subscribed(lane->owner, lane);
}

static void on_unsubscribed(void *owner)
{
	struct lane *lane = owner;
	if (lane->unsubscribes == 0 || --lane->unsubscribes > 0)
		return;
	if (lane->filter == NULL) {
		uv_timer_start(&lane->silence, silent, QUIET_MS, 0);
	} else if (!lane->tidy) {
		lane->tidy = true;
		lane->handler.unsubscribed(lane->owner, lane);
	}
}

/* A session left behind: nothing has come for a while since the broker last answered us. It sends what it has queued
 * as we acknowledge, and answers in order: an answer with nothing before it means that there was nothing. */
static void silent(uv_timer_t *timer)
{
	struct lane *lane = container_of(timer, struct lane, silence);
	if (!mqtt_is_up(lane->mqtt) || lane->unsubscribes > 0)
		return; /* on_unsubscribed() goes on */
	if (lane->pending > 0)
		lane->quiet = 0;
	else
		lane->quiet++;
	if (lane->quiet > QUIET_ROUNDS) {
		end_emptied(lane, "is empty and ended");
		return;
	}
	unsubscribe_stale(lane);
	mqtt_flush(lane->mqtt);
	if (lane->unsubscribes == 0)
		uv_timer_start(&lane->silence, silent, QUIET_MS, 0);
}

static const struct mqtt_handler mqtt_handler = {
    .up = on_up,
    .down = on_down,
    .message = on_message,
    .room = has_room,
    .drained = on_drained,
    .reading = reading,
    .subscribed = on_subscribed,
    .unsubscribed = on_unsubscribed,
};

/* ---- public ---- */

static char **copy_list(const char *const *list)
{
	size_t count = 0;
	while (list != NULL && list[count] != NULL)
		count++;
	char **copy = memory_zeroed(count + 1, sizeof *copy);
	for (size_t i = 0; i < count; i++)
		copy[i] = memory_string(list[i]);
	return copy;
}

struct lane *lane_create(uv_loop_t *loop, const struct lane_options *options, const struct lane_handler *handler,
                         void *owner)
{
	struct lane *lane = memory_zeroed(1, sizeof *lane);
	lane->loop = loop;
	lane->config = options->config;
	lane->delivery = options->delivery;
	lane->counters = options->counters;
	lane->handler = *handler;
	lane->owner = owner;
	lane->client_id = memory_string(options->client_id);
	lane->filter = options->filter != NULL ? memory_string(options->filter) : NULL;
	lane->stale = copy_list(options->stale);
	lane->hold_ms = hold_limit(0);
	lane->counters->connections += options->filter != NULL;
	lane->sender = (struct delivery_sender){.settled = on_settled, .spools = true};
	uv_timer_t *timers[TIMERS] = {&lane->hold, &lane->due, &lane->silence};
	for (int i = 0; i < TIMERS; i++)
		uv_timer_init(loop, timers[i]);
	lane->handles = TIMERS;
	struct mqtt_options mqtt = {
	    .config = &options->config->mqtt, .client_id = options->client_id, .name = options->name};
	lane->mqtt = mqtt_create(loop, &mqtt, &mqtt_handler, lane);
	return lane;
}

void lane_go(struct lane *lane)
{
	lane->started = true;
	if (lane->pending == 0)
		go_on(lane);
}

bool lane_is_up(const struct lane *lane)
{
	return mqtt_is_up(lane->mqtt);
}

/* ---- stopping ---- */

static void handle_closed(uv_handle_t *handle)
{
	struct lane *lane = handle->data;
	if (--lane->handles > 0)
		return;
	lane->counters->connections -= lane->filter != NULL;
	lane->stopped(lane->owner, lane);
	mqtt_free(lane->mqtt);
	for (char **filter = lane->stale; *filter != NULL; filter++)
		free(*filter);
	free(lane->stale);
	free(lane->filter);
	free(lane->client_id);
	free(lane);
}

static void mqtt_closed(void *owner)
{
	struct lane *lane = owner;
	uv_timer_t *timers[TIMERS] = {&lane->hold, &lane->due, &lane->silence};
	note_down(lane);
	for (int i = 0; i < TIMERS; i++) {
		timers[i]->data = lane;
		uv_close((uv_handle_t *)timers[i], handle_closed);
	}
}

/* While stopping: go on as soon as no round is under way. */
static void close_when_idle(struct lane *lane)
{
	if (lane->pending > 0 || lane->closing)
		return;
	lane->closing = true;
	if (lane->emptied)
		mqtt_close_session(lane->mqtt, mqtt_closed);
	else
		mqtt_close(lane->mqtt, mqtt_closed);
}

void lane_stop(struct lane *lane, void (*stopped)(void *owner, struct lane *lane))
{
	lane->stopping = true;
	lane->stopped = stopped;
	uv_timer_stop(&lane->silence);
	close_batch(lane);
	close_when_idle(lane);
}

void lane_hurry(struct lane *lane)
{
	if (lane->closing)
		mqtt_close(lane->mqtt, mqtt_closed);
	if (lane->pending > 0)
		delivery_give_up(lane->delivery, &lane->sender, METRICS_SHUTDOWN);
}
