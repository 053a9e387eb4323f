/*
 * See consumer.h.
 *
 * A round is what is read before the gate closes: until the socket is empty or the round is full. It is cut into a few
 * batches, so that workers store the first ones while the last ones are still being read:
 *
 *   FREE --message--> FILLING --full, or the socket is empty--> READY --worker--> STORING --all durable--> FREE
 *                                                                 ^                  |
 *                                                           retry timer         some open
 *                                                                 |                  v
 *                                                                 +------------- WAITING --hold limit--> handed back
 *
 * While a message of the round is not durable nothing is read, so a round belongs to one connection. When that is lost,
 * the round is stored all the same, for a broker without persistence may have lost it; only then a new connection is
 * made.
 */
#include "consumer.h"

#include "batch.h"
#include "clock.h"
#include "log.h"
#include "memory.h"
#include "mqtt.h"
#include "store.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
	RETRY_FIRST_MS = 100,
	RETRY_MOST_MS = 2000,
	PROBE_MOST_MS = 5000,
	HANDBACK_MOST_MS = 300000, /* each round handed back may leave its documents behind, to be stored again */
	HOLD_MARGIN_MS = 2000,
	KEEPALIVE_DEFAULT_MS = 60000,
};

enum { BATCHES_PER_ROUND = 4 };

enum phase { FREE, FILLING, READY, STORING, WAITING };

struct slot {
	struct batch batch;
	enum phase phase;
	uint64_t submitted_at; /* hrtime */
};

/* A job in the thread pool, and what it works with. */
struct worker {
	struct consumer *consumer;
	uv_work_t job;
	struct slot *slot; /* NULL: idle */
	struct store_scratch *scratch;
	struct store_report report;
};

struct consumer {
	uv_loop_t *loop;
	const struct config *config;
	struct state *state;
	struct metrics_consumer *counters;
	struct consumer_handler handler;
	void *owner;
	char *client_id;

	struct store *store;
	struct mqtt *mqtt;
	struct worker *workers;
	int worker_count;

	/* the round; a batch is full by count or by bytes, whichever comes first, hence up to twice as many */
	struct slot slots[2 * BATCHES_PER_ROUND + 1];
	struct slot *filling; /* or NULL */
	size_t pending;       /* messages of the round that are not durable */
	size_t pending_bytes;
	uint64_t generation; /* of the connection the round came by */
	unsigned attempts;   /* in a row that left something open */
	bool expired;        /* past the hold limit: no further attempt */
	enum metrics_cause cause;
	uv_timer_t hold;
	uv_timer_t retry; /* of the round, or of the probe */
	uint64_t hold_ms;

	uv_work_t probe;
	struct store_report probe_report;
	bool probe_runs;     /* in a worker */
	unsigned handbacks;  /* in a row, without a round stored in between */
	bool wait_for_store; /* messages were handed back: no new connection before MongoDB answers */

	uv_work_t save;
	bool saving, save_failed;
	bool recorded; /* the state file names the filter: only then may it be subscribed */
	uv_work_t disconnect;

	struct log_repeat complaint, refusal;
	bool trouble; /* said, and not yet taken back */
	bool stopping, closing;
	void (*stopped)(void *owner);
	int handles;
};

static void advance(struct consumer *consumer);
static void start_probe(struct consumer *consumer);
static void retry_due(uv_timer_t *timer);
static void close_when_idle(struct consumer *consumer);

/* ---- counting ---- */

static void count_open(struct consumer *consumer, const struct batch_message *message)
{
	if (message->qos == 0) /* the broker keeps no copy */
		consumer->counters->dropped[consumer->cause]++;
	else
		consumer->counters->returned[consumer->cause]++;
}

static void count_batch(struct consumer *consumer, const struct batch *batch)
{
	struct metrics_consumer *counters = consumer->counters;
	for (size_t i = 0; i < batch->count; i++) {
		const struct batch_message *message = &batch->messages[i];
		switch ((enum batch_outcome)message->outcome) {
		case BATCH_STORED:
			counters->stored++;
			break;
		case BATCH_DUPLICATE:
			counters->duplicates++;
			break;
		case BATCH_DEAD_LETTERED:
			counters->dead_lettered[message->reason]++;
			counters->truncated += batch_is_cut(message);
			break;
		case BATCH_OPEN:
			count_open(consumer, message);
			break;
		}
	}
}

static void say_trouble(struct consumer *consumer, const struct store_report *report)
{
	enum log_level level = report->class == STORE_CONFIGURATION ? LOG_LEVEL_ERROR : LOG_LEVEL_WARN;
	consumer->trouble = true;
	consumer->counters->database_up = false;
	log_repeat(&consumer->complaint, level, "consumer", "%s", report->message);
}

static void say_recovered(struct consumer *consumer)
{
	if (consumer->trouble)
		log_info("consumer", "MongoDB answers again");
	consumer->trouble = false;
	consumer->counters->database_up = true;
	log_repeat_end(&consumer->complaint);
}

/* ---- the round ---- */

static struct slot *slot_in_phase(struct consumer *consumer, enum phase phase)
{
	for (size_t i = 0; i < sizeof consumer->slots / sizeof *consumer->slots; i++)
		if (consumer->slots[i].phase == phase)
			return &consumer->slots[i];
	return NULL;
}

/* The messages of a slot have their outcomes, or are given up. Returns how many there were. */
static size_t empty_slot(struct consumer *consumer, struct slot *slot)
{
	size_t count = slot->batch.count;
	count_batch(consumer, &slot->batch);
	consumer->pending -= count;
	batch_reset(&slot->batch);
	slot->phase = FREE;
	return count;
}

static void round_over(struct consumer *consumer)
{
	uv_timer_stop(&consumer->hold);
	uv_timer_stop(&consumer->retry);
	consumer->pending_bytes = 0;
	consumer->attempts = 0;
	consumer->expired = false;
}

static uint64_t retry_delay(unsigned attempts, uint64_t most)
{
	uint64_t delay = RETRY_FIRST_MS;
	for (unsigned i = 1; i < attempts && delay < most; i++)
		delay *= 2;
	return delay < most ? delay : most;
}

/* Read, or connect, or stop, now that no round is under way. */
static void go_on(struct consumer *consumer)
{
	if (consumer->stopping)
		close_when_idle(consumer);
	else if (consumer->wait_for_store && consumer->handbacks > 1)
		uv_timer_start(&consumer->retry, retry_due, retry_delay(consumer->handbacks + 3, HANDBACK_MOST_MS), 0);
	else if (consumer->wait_for_store)
		start_probe(consumer);
	else if (consumer->recorded && !mqtt_is_up(consumer->mqtt))
		mqtt_connect(consumer->mqtt);
}

/* Give up what is still open, and with it the connection: its PUBACKs can never be sent. No worker may be busy. */
static void hand_back(struct consumer *consumer)
{
	uint64_t before = metrics_total(consumer->counters->returned, METRICS_CAUSES);
	for (size_t i = 0; i < sizeof consumer->slots / sizeof *consumer->slots; i++)
		if (consumer->slots[i].phase != FREE)
			empty_slot(consumer, &consumer->slots[i]);
	consumer->filling = NULL;
	consumer->wait_for_store = true;
	consumer->handbacks++;
	round_over(consumer);
	log_write(consumer->handbacks > 1 ? LOG_LEVEL_ERROR : LOG_LEVEL_WARN, "consumer",
	          "%llu messages handed back to the broker unacknowledged; it delivers them again",
	          (unsigned long long)(metrics_total(consumer->counters->returned, METRICS_CAUSES) - before));
	if (mqtt_is_up(consumer->mqtt) && mqtt_generation(consumer->mqtt) == consumer->generation)
		mqtt_give_up(consumer->mqtt, "given up unacknowledged, for MongoDB does not take the messages");
	go_on(consumer);
}

/* ---- storing ---- */

static void retry_due(uv_timer_t *timer)
{
	struct consumer *consumer = container_of(timer, struct consumer, retry);
	struct slot *slot;
	if (consumer->pending == 0) {
		start_probe(consumer);
		return;
	}
	while ((slot = slot_in_phase(consumer, WAITING)) != NULL)
		slot->phase = READY;
	advance(consumer);
}

/* Worker thread. Touches only the batch, the scratch memory and the report. */
static void store_work(uv_work_t *job)
{
	struct worker *worker = container_of(job, struct worker, job);
	store_write(worker->consumer->store, worker->scratch, &worker->slot->batch, &worker->report);
}

static void store_done(uv_work_t *job, int status)
{
	struct worker *worker = container_of(job, struct worker, job);
	struct consumer *consumer = worker->consumer;
	struct slot *slot = worker->slot;
	worker->slot = NULL;
	consumer->counters->batches++;
	if (worker->report.open == 0) {
		metrics_observe(&consumer->counters->store_latency, (uv_hrtime() - slot->submitted_at) / 1000);
		size_t count = empty_slot(consumer, slot);
		if (consumer->pending == 0) { /* a part of the round proves little */
			consumer->handbacks = 0;
			say_recovered(consumer);
			round_over(consumer);
		}
		mqtt_durable(consumer->mqtt, consumer->generation, count); /* may read the next round */
	} else {
		slot->phase = WAITING;
		say_trouble(consumer, &worker->report);
		if (!uv_is_active((uv_handle_t *)&consumer->retry))
			uv_timer_start(&consumer->retry, retry_due, retry_delay(++consumer->attempts, RETRY_MOST_MS),
			               0);
	}
	advance(consumer);
}

static void start_worker(struct worker *worker, struct slot *slot)
{
	struct consumer *consumer = worker->consumer;
	slot->phase = STORING;
	worker->slot = slot;
	if (slot->batch.count > consumer->counters->largest_batch)
		consumer->counters->largest_batch = slot->batch.count;
	uv_queue_work(consumer->loop, &worker->job, store_work, store_done);
}

/* While one batch waits for its next attempt the others need not run into the same wall. */
static void start_ready(struct consumer *consumer)
{
	struct slot *slot;
	for (int i = 0; i < consumer->worker_count && slot_in_phase(consumer, WAITING) == NULL; i++)
		if (consumer->workers[i].slot == NULL && (slot = slot_in_phase(consumer, READY)) != NULL)
			start_worker(&consumer->workers[i], slot);
}

/* Whatever has happened to the round: what follows from it. */
static void advance(struct consumer *consumer)
{
	if (consumer->pending == 0)
		go_on(consumer);
	else if (!consumer->expired)
		start_ready(consumer);
	else if (slot_in_phase(consumer, STORING) == NULL)
		hand_back(consumer);
}

/* The broker drops a client that is silent for 1.5 keepalives, and PINGREQ waits behind the gate as well. */
static void hold_expired(uv_timer_t *timer)
{
	struct consumer *consumer = container_of(timer, struct consumer, hold);
	consumer->expired = true;
	consumer->cause = METRICS_HOLD_LIMIT;
	if (mqtt_is_up(consumer->mqtt) && mqtt_generation(consumer->mqtt) == consumer->generation)
		mqtt_give_up(consumer->mqtt,
		             "given up unacknowledged: MongoDB has not taken the messages within the hold limit");
	advance(consumer);
}

/* ---- asking whether MongoDB is there ---- */

/* Worker thread. */
static void probe_work(uv_work_t *job)
{
	struct consumer *consumer = container_of(job, struct consumer, probe);
	store_ping(consumer->store, &consumer->probe_report);
}

static void probe_done(uv_work_t *job, int status)
{
	struct consumer *consumer = container_of(job, struct consumer, probe);
	consumer->probe_runs = false;
	if (consumer->stopping) {
		close_when_idle(consumer);
	} else if (consumer->probe_report.class != STORE_OK) {
		say_trouble(consumer, &consumer->probe_report);
		if (consumer->pending == 0) /* a round finds out by itself */
			uv_timer_start(&consumer->retry, retry_due, retry_delay(++consumer->attempts, PROBE_MOST_MS),
			               0);
	} else {
		consumer->wait_for_store = false;
		if (consumer->pending > 0)
			return;               /* the round goes on by itself, and connects when it is over */
		if (consumer->handbacks <= 1) /* else a ping proves little: it is writing that fails */
			say_recovered(consumer);
		consumer->attempts = 0;
		go_on(consumer);
	}
}

static void start_probe(struct consumer *consumer)
{
	if (consumer->probe_runs)
		return;
	consumer->probe_runs = true;
	uv_queue_work(consumer->loop, &consumer->probe, probe_work, probe_done);
}

/* ---- what the connection says ---- */

/* The broker hangs up after 1.5 keepalives of silence, of which one may have passed when the gate closes (MQTT 5
 * §3.1.2.10). A keepalive of 0 means none: then what our own default gives. */
static uint64_t hold_limit(int keepalive_s)
{
	int64_t keepalive = keepalive_s > 0 ? (int64_t)keepalive_s * 1000 : KEEPALIVE_DEFAULT_MS;
	int64_t hold = keepalive / 2 - HOLD_MARGIN_MS;
	return (uint64_t)(hold > keepalive / 4 ? hold : keepalive / 4);
}

static void on_up(void *owner, const struct mqtt_granted *granted)
{
	struct consumer *consumer = owner;
	consumer->hold_ms = hold_limit(granted->keepalive_s);
	if (granted->session_expiry_s == 0)
		log_warn("consumer", "the broker keeps no session for us: what is published while we are away is lost");
	/* Always, also into a session that is there: the broker may have lost its subscriptions. */
	const char *configured = consumer->config->consumer.topic;
	int qos = consumer->config->consumer.qos;
	mqtt_subscribe(consumer->mqtt, configured, qos > 1 ? 1 : qos);
	for (size_t i = 0; state_filter(consumer->state, consumer->client_id, i) != NULL; i++) {
		const char *filter = state_filter(consumer->state, consumer->client_id, i);
		if (strcmp(filter, configured) == 0)
			continue;
		log_info("consumer", "unsubscribing from %s, which is no longer configured", filter);
		mqtt_unsubscribe(consumer->mqtt, filter);
	}
}

/* What has been read so far is to be stored. */
static void close_batch(struct consumer *consumer)
{
	if (consumer->filling == NULL)
		return;
	consumer->filling->phase = READY;
	consumer->filling->submitted_at = uv_hrtime();
	consumer->filling = NULL;
	start_ready(consumer);
}

static void on_down(void *owner)
{
	struct consumer *consumer = owner;
	consumer->counters->connections_up = 0;
	close_batch(consumer); /* read just before the connection went */
	if (consumer->pending == 0 && !consumer->wait_for_store)
		go_on(consumer); /* else when the round is stored, or when MongoDB answers */
}

static void begin_round(struct consumer *consumer)
{
	consumer->generation = mqtt_generation(consumer->mqtt);
	uv_timer_stop(&consumer->retry); /* a probe's: the round finds out by itself */
	uv_timer_start(&consumer->hold, hold_expired, consumer->hold_ms, 0);
}

static void on_message(void *owner, const struct mqtt_message *message)
{
	struct consumer *consumer = owner;
	const struct config_consumer *config = &consumer->config->consumer;
	if (consumer->pending == 0)
		begin_round(consumer);
	if (consumer->generation != mqtt_generation(consumer->mqtt))
		abort(); /* a round belongs to one connection, or the gate of the other would stay closed for ever */
	if (consumer->filling == NULL) {
		consumer->filling = slot_in_phase(consumer, FREE);
		consumer->filling->phase = FILLING;
	}
	struct batch *batch = &consumer->filling->batch;
	batch_add(batch, message, (size_t)config->max_payload, clock_wall_ms());
	consumer->pending++;
	consumer->pending_bytes += message->topic_length + message->payload_length;
	consumer->counters->received++;
	consumer->counters->redelivered += message->dup;
	consumer->counters->received_qos0 += message->qos == 0;
	bool full = batch->count * BATCHES_PER_ROUND >= (size_t)config->batch_count ||
	            batch->arena.length * BATCHES_PER_ROUND >= (size_t)config->batch_bytes;
	/* The library may hand over more than there is room for, up to a TLS record: the last slot takes it all. */
	if (full && slot_in_phase(consumer, FREE) != NULL)
		close_batch(consumer);
}

static bool has_room(void *owner)
{
	const struct consumer *consumer = owner;
	const struct config_consumer *config = &consumer->config->consumer;
	return !consumer->stopping && consumer->pending < (size_t)config->batch_count &&
	       consumer->pending_bytes < (size_t)config->batch_bytes;
}

static void on_drained(void *owner)
{
	close_batch(owner);
}

static void on_subscribed(void *owner, int reason)
{
	struct consumer *consumer = owner;
	const char *filter = consumer->config->consumer.topic;
	if (reason >= 0x80) {
		log_repeat(&consumer->refusal, LOG_LEVEL_ERROR, "consumer",
		           "the broker refuses the subscription to %s (reason 0x%02x); check its access rules", filter,
		           (unsigned)reason);
		mqtt_give_up(consumer->mqtt, "subscription refused");
		return;
	}
	if (reason < consumer->config->consumer.qos && reason < 1)
		log_warn("consumer", "the broker grants %s only at QoS %d: messages may be lost on the way", filter,
		         reason);
	log_info("consumer", "subscribed to %s at QoS %d", filter, reason);
	consumer->counters->connections_up = 1;
	if (consumer->handler.subscribed != NULL)
		consumer->handler.subscribed(consumer->owner);
}

/* Worker thread. The loop leaves the state alone until save_done(). */
static void save_work(uv_work_t *job)
{
	struct consumer *consumer = container_of(job, struct consumer, save);
	char error[256];
	consumer->save_failed = !state_save(consumer->state, error, sizeof error);
	if (consumer->save_failed)
		log_error("state", "%s", error);
}

static void save_done(uv_work_t *job, int status)
{
	struct consumer *consumer = container_of(job, struct consumer, save);
	consumer->saving = false;
	if (!consumer->save_failed)
		consumer->recorded = true;
	if (consumer->stopping)
		close_when_idle(consumer);
	else if (!consumer->recorded)
		consumer->handler.failed(consumer->owner);
	else if (consumer->pending == 0)
		go_on(consumer); /* connects, the first time */
}

static void save_state(struct consumer *consumer)
{
	consumer->saving = true;
	uv_queue_work(consumer->loop, &consumer->save, save_work, save_done);
}

/* A filter the session may hold that is no longer configured, or NULL. */
static const char *stale_filter(const struct consumer *consumer)
{
	const char *filter;
	for (size_t i = 0; (filter = state_filter(consumer->state, consumer->client_id, i)) != NULL; i++)
		if (strcmp(filter, consumer->config->consumer.topic) != 0)
			return filter;
	return NULL;
}

/* UNSUBACKs come in the order in which we asked, which is the order of the state file. */
static void on_unsubscribed(void *owner)
{
	struct consumer *consumer = owner;
	const char *filter = consumer->saving ? NULL : stale_filter(consumer);
	if (filter == NULL)
		return;
	state_remove_filter(consumer->state, consumer->client_id, filter);
	if (stale_filter(consumer) == NULL)
		save_state(consumer);
}

/* ---- public ---- */

static const struct mqtt_handler mqtt_handler = {
    .up = on_up,
    .down = on_down,
    .message = on_message,
    .room = has_room,
    .drained = on_drained,
    .subscribed = on_subscribed,
    .unsubscribed = on_unsubscribed,
};

static void create_workers(struct consumer *consumer)
{
	consumer->worker_count = consumer->config->consumer.workers;
	consumer->workers = memory_zeroed((size_t)consumer->worker_count, sizeof *consumer->workers);
	for (int i = 0; i < consumer->worker_count; i++) {
		consumer->workers[i].consumer = consumer;
		consumer->workers[i].scratch = store_scratch_create();
	}
}

static void free_consumer(struct consumer *consumer)
{
	for (int i = 0; i < consumer->worker_count; i++)
		store_scratch_destroy(consumer->workers[i].scratch);
	for (size_t i = 0; i < sizeof consumer->slots / sizeof *consumer->slots; i++)
		batch_finish(&consumer->slots[i].batch);
	free(consumer->workers);
	free(consumer->client_id);
	free(consumer);
}

struct consumer *consumer_start(uv_loop_t *loop, const struct config *config, struct state *state,
                                struct metrics_consumer *counters, const struct consumer_handler *handler, void *owner)
{
	struct consumer *consumer = memory_zeroed(1, sizeof *consumer);
	consumer->loop = loop;
	consumer->config = config;
	consumer->state = state;
	consumer->counters = counters;
	consumer->handler = *handler;
	consumer->owner = owner;
	consumer->client_id = memory_format("%s-1", state_client_id(state, config->mqtt.client_id));
	consumer->hold_ms = hold_limit(0);
	consumer->store = store_create(config);
	create_workers(consumer);
	uv_timer_init(loop, &consumer->hold);
	uv_timer_init(loop, &consumer->retry);
	consumer->handles = 2;
	counters->connections = 1;
	struct mqtt_options options = {.config = &config->mqtt, .client_id = consumer->client_id, .name = "consumer"};
	consumer->mqtt = mqtt_create(loop, &options, &mqtt_handler, consumer);
	char promise[128];
	store_write_concern_text(consumer->store, promise, sizeof promise);
	log_info("consumer", "a message is acknowledged once MongoDB has it with %s", promise);
	/* Before SUBSCRIBE: a filter nobody remembers could never be removed. Then go_on() connects, also with MongoDB
	 * away, for the session has to exist for the broker to keep anything. */
	state_add_filter(state, consumer->client_id, config->consumer.topic);
	save_state(consumer);
	start_probe(consumer);
	return consumer;
}

static void handle_closed(uv_handle_t *handle)
{
	struct consumer *consumer = handle->data;
	if (--consumer->handles > 0)
		return;
	void (*stopped)(void *) = consumer->stopped;
	void *owner = consumer->owner;
	free_consumer(consumer);
	stopped(owner);
}

/* Worker thread: the driver waits for its monitoring threads. */
static void disconnect_work(uv_work_t *job)
{
	store_destroy(container_of(job, struct consumer, disconnect)->store);
}

static void disconnect_done(uv_work_t *job, int status)
{
	struct consumer *consumer = container_of(job, struct consumer, disconnect);
	consumer->hold.data = consumer->retry.data = consumer;
	uv_close((uv_handle_t *)&consumer->hold, handle_closed);
	uv_close((uv_handle_t *)&consumer->retry, handle_closed);
}

static void mqtt_closed(void *owner)
{
	struct consumer *consumer = owner;
	consumer->mqtt = NULL;
	consumer->counters->connections = consumer->counters->connections_up = 0;
	uv_queue_work(consumer->loop, &consumer->disconnect, disconnect_work, disconnect_done);
}

/* While stopping: go on as soon as no batch and no job is under way. */
static void close_when_idle(struct consumer *consumer)
{
	if (consumer->pending > 0 || consumer->probe_runs || consumer->saving || consumer->closing)
		return;
	consumer->closing = true;
	uv_timer_stop(&consumer->retry);
	mqtt_close(consumer->mqtt, mqtt_closed);
}

void consumer_stop(struct consumer *consumer, void (*stopped)(void *owner))
{
	consumer->stopping = true;
	consumer->stopped = stopped;
	close_when_idle(consumer);
}

void consumer_hurry(struct consumer *consumer)
{
	if (consumer->closing && consumer->mqtt != NULL)
		mqtt_close(consumer->mqtt, mqtt_closed);
	if (consumer->pending == 0)
		return;
	consumer->expired = true;
	consumer->cause = METRICS_SHUTDOWN;
	advance(consumer);
}

const char *consumer_status(const struct consumer *consumer)
{
	if (consumer->mqtt == NULL)
		return "stopping";
	if (consumer->trouble)
		return consumer->pending > 0 ? "holding, MongoDB does not answer" : "waiting for MongoDB";
	return mqtt_is_up(consumer->mqtt) ? "consuming" : "connecting";
}
