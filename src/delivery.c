/*
 * See delivery.h. What becomes of a parcel:
 *
 *   FILLING --submitted--> READY --worker--> STORING --all durable--> settled
 *                            |                  |
 *                            |      overdue, or not wholly stored
 *                       MongoDB away            v
 *                            +--------------> QUEUED --outbox: committed--> settled
 *                                               |
 *                              no spool, or it takes nothing
 *                                               v
 *                                            WAITING --retry timer--> READY …      or given up by its sender
 *
 * An overdue parcel is spooled while its attempt goes on: the batch is then held by two jobs, which only read what the
 * loop does not change meanwhile, and it is free when both have ended. The first of them to make a message durable
 * decides what it is counted as; if that was the spool, the drain meets what the attempt has stored by its _id.
 */
#include "delivery.h"

#include "backoff.h"
#include "log.h"
#include "memory.h"
#include "outbox.h"
#include "store.h"

#include <stdlib.h>
#include <string.h>

enum {
	PARCELS_PER_ROUND = 4,
	RETRY_FIRST_MS = 100,
	RETRY_MOST_MS = 2000,
	PROBE_MOST_MS = 5000,
	TRIAL_HOLDS = 2,   /* hold limits without a hand-back that end the waiting longer and longer */
	FLICKER_MS = 1000, /* a collection that refused for less, as at a rate limit, is not said to take again */
	DROP_ATTEMPTS = 4, /* for what neither spool nor broker keeps, before it is dropped */
	HANDBACK_MOST_MS = 300000, /* each round handed back may leave its documents behind, to be stored again */
};

enum phase { FREE, FILLING, READY, STORING, QUEUED, SPOOLING, WAITING };

/* A job in the thread pool, and what it works with. */
struct worker {
	struct delivery *delivery;
	uv_work_t job;
	struct delivery_parcel *parcel; /* NULL: idle */
	struct store_scratch *scratch;
	struct store_report report;
};

struct delivery {
	uv_loop_t *loop;
	const struct config *config;
	struct metrics_consumer *counters;
	struct delivery_handler handler;
	void *owner;

	struct store *store;
	struct outbox *outbox;
	struct worker *workers;
	int worker_count;
	bson_context_t *ids; /* of the loop thread */
	struct delivery_parcel **parcels;
	size_t parcel_count;
	size_t under_way;                                 /* submitted, not settled */
	struct delivery_parcel *spooling[OUTBOX_BATCHES]; /* in the hands of the outbox, in this order */
	size_t spooling_count;

	bool away;        /* MongoDB: an attempt is overdue, or it does not answer */
	bool trouble;     /* said, and not yet taken back */
	uv_timer_t retry; /* of the parcels that wait */
	uv_timer_t overdue;

	uv_work_t probe;
	struct store_report probe_report;
	bool probe_runs;
	uv_timer_t look;    /* for MongoDB: the next probe */
	unsigned looks;     /* in a row that found nothing */
	bool refusing;      /* messages were handed back: no more before MongoDB answers */
	unsigned handbacks; /* in a row, without enough time between them */
	uint64_t trial_at;  /* loop time of the first batch since the last of them; 0: none yet */

	struct log_repeat complaint, fallback;
	struct log_repeat refusals[STORE_NAMESPACES];
	uint64_t refused_at[STORE_NAMESPACES]; /* loop time of the first refusal since it took something */
	uv_work_t disconnect;
	bool stopping, closing;
	void (*stopped)(void *owner);
	int handles;
};

static void advance(struct delivery *delivery);

/* ---- is MongoDB there? ---- */

static void say_trouble(struct delivery *delivery, const struct store_report *report)
{
	enum log_level level = report->class == STORE_CONFIGURATION ? LOG_LEVEL_ERROR : LOG_LEVEL_WARN;
	struct log_repeat *repeat = &delivery->complaint;
	for (int i = 0; i < STORE_NAMESPACES && !report->away; i++)
		if (report->refused[i])
			repeat = &delivery->refusals[i];
	delivery->trouble = delivery->trouble || report->away;
	log_repeat(repeat, level, "consumer", "%s", report->message);
}

/* A collection that takes nothing concerns its own messages: they wait, the others do not. */
static void hear_of_collections(struct delivery *delivery, const struct store_report *report)
{
	const struct config_consumer *config = &delivery->config->consumer;
	for (int i = 0; i < STORE_NAMESPACES; i++) {
		bool *refused = &delivery->counters->database_refuses[i];
		if (report->refused[i]) {
			if (!*refused)
				delivery->refused_at[i] = uv_now(delivery->loop);
			*refused = true;
		} else if (report->taken[i] && *refused) {
			*refused = false;
			if (uv_now(delivery->loop) - delivery->refused_at[i] < FLICKER_MS)
				continue;
			log_info("consumer", "MongoDB takes documents again in the collection %s",
			         i == STORE_MESSAGES ? config->collection : config->dead_letter);
			log_repeat_end(&delivery->refusals[i]);
		}
	}
}

/* Messages may come again. */
static void take_again(struct delivery *delivery)
{
	bool was_refusing = delivery->refusing;
	delivery->refusing = false;
	if (was_refusing && !delivery->stopping)
		delivery->handler.accepts(delivery->owner);
}

static void set_present(struct delivery *delivery)
{
	bool was_away = delivery->away;
	if (delivery->trouble)
		log_info("consumer", "MongoDB answers again");
	if (delivery->trouble || was_away)
		log_repeat_end(&delivery->complaint);
	delivery->trouble = false;
	delivery->away = false;
	delivery->looks = 0;
	delivery->counters->database_up = true;
	if (was_away && !delivery->stopping)
		outbox_drain(delivery->outbox);
}

static void set_away(struct delivery *delivery)
{
	delivery->away = true;
	delivery->counters->database_up = false;
}

/* What an attempt to store something says about MongoDB. */
static void hear(struct delivery *delivery, const struct store_report *report)
{
	if (report->open > 0)
		say_trouble(delivery, report);
	hear_of_collections(delivery, report);
	if (report->away)
		set_away(delivery);
	else
		set_present(delivery);
}

static bool idle(const struct delivery *delivery)
{
	for (int i = 0; i < delivery->worker_count; i++)
		if (delivery->workers[i].parcel != NULL)
			return false;
	return true;
}

static struct delivery_parcel *first_in(const struct delivery *delivery, enum phase phase);

/* Worker thread. */
static void probe_work(uv_work_t *job)
{
	struct delivery *delivery = container_of(job, struct delivery, probe);
	store_ping(delivery->store, &delivery->probe_report);
}

static void probe_done(uv_work_t *job, int status)
{
	struct delivery *delivery = container_of(job, struct delivery, probe);
	delivery->probe_runs = false;
	if (delivery->probe_report.class != STORE_OK) {
		say_trouble(delivery, &delivery->probe_report);
		set_away(delivery);
	} else {
		/* A ping proves little after handing back again and again, or where the drain is about to write: then
		 * the next attempt to write decides. */
		if ((delivery->handbacks <= 1 || !delivery->refusing) && !outbox_is_draining(delivery->outbox))
			set_present(delivery);
		take_again(delivery);
	}
	advance(delivery);
}

static void start_probe(struct delivery *delivery)
{
	delivery->probe_runs = true;
	uv_queue_work(delivery->loop, &delivery->probe, probe_work, probe_done);
}

static void look_due(uv_timer_t *timer)
{
	struct delivery *delivery = container_of(timer, struct delivery, look);
	if (delivery->refusing && outbox_is_usable(delivery->outbox))
		take_again(delivery);
	else if (!delivery->probe_runs)
		start_probe(delivery);
	advance(delivery);
}

/* See to it that somebody finds out when MongoDB is back: nothing is on its way that would. */
static void arm_look(struct delivery *delivery)
{
	bool away = delivery->away && idle(delivery) && !outbox_is_draining(delivery->outbox) &&
	            first_in(delivery, WAITING) == NULL;
	if ((!delivery->refusing && !away) || delivery->stopping || delivery->probe_runs ||
	    uv_is_active((uv_handle_t *)&delivery->look))
		return;
	uint64_t delay = !delivery->refusing || delivery->handbacks <= 1
	                     ? backoff_ms(++delivery->looks, RETRY_FIRST_MS, PROBE_MOST_MS)
	                     : backoff_ms(delivery->handbacks + 3, RETRY_FIRST_MS, HANDBACK_MOST_MS);
	uv_timer_start(&delivery->look, look_due, delay, 0);
}

/* Something was stored: proof enough to take messages again, unless they have been handed back again and again. */
static void take_again_at_once(struct delivery *delivery)
{
	if (!delivery->refusing || delivery->handbacks > 1)
		return;
	uv_timer_stop(&delivery->look);
	take_again(delivery);
}

static void retry_due(uv_timer_t *timer)
{
	struct delivery *delivery = container_of(timer, struct delivery, retry);
	for (size_t i = 0; i < delivery->parcel_count; i++) {
		struct delivery_parcel *parcel = delivery->parcels[i];
		if (parcel->phase == WAITING && parcel->retry_at <= uv_now(delivery->loop))
			parcel->phase = READY;
	}
	advance(delivery);
}

/* Have `due` called at that moment of loop time, or at once when it is over; UINT64_MAX: not at all. */
static void arm_at(uv_timer_t *timer, uv_timer_cb due, uint64_t at)
{
	uint64_t now = uv_now(timer->loop);
	if (at == UINT64_MAX)
		uv_timer_stop(timer);
	else
		uv_timer_start(timer, due, at > now ? at - now : 0, 0);
}

static void arm_retry(struct delivery *delivery)
{
	uint64_t first = UINT64_MAX;
	for (size_t i = 0; i < delivery->parcel_count; i++) {
		const struct delivery_parcel *parcel = delivery->parcels[i];
		if (parcel->phase == WAITING && parcel->retry_at < first)
			first = parcel->retry_at;
	}
	arm_at(&delivery->retry, retry_due, first);
}

/* ---- parcels ---- */

/* The first submitted of a phase; what its broker keeps a copy of goes before what nobody does. */
static struct delivery_parcel *first_in(const struct delivery *delivery, enum phase phase)
{
	struct delivery_parcel *first = NULL;
	for (size_t i = 0; i < delivery->parcel_count; i++) {
		struct delivery_parcel *parcel = delivery->parcels[i];
		if (parcel->phase != phase)
			continue;
		bool better =
		    first == NULL || parcel->sender->spools > first->sender->spools ||
		    (parcel->sender->spools == first->sender->spools && parcel->submitted_at < first->submitted_at);
		if (better)
			first = parcel;
	}
	return first;
}

static void release(struct delivery_parcel *parcel)
{
	if (parcel->storing || parcel->spooling)
		return;
	batch_reset(&parcel->batch);
	parcel->phase = FREE;
}

static void count_open(struct metrics_consumer *counters, const struct delivery_parcel *parcel)
{
	for (size_t i = 0; i < parcel->batch.count; i++) {
		const struct batch_message *message = &parcel->batch.messages[i];
		if (message->settled)
			continue;
		if (message->qos == 0) /* the broker keeps no copy */
			counters->dropped[parcel->cause]++;
		else
			counters->returned[parcel->cause]++;
	}
}

static void say_fallback(struct delivery *delivery)
{
	log_repeat(&delivery->fallback, LOG_LEVEL_WARN, "consumer",
	           "a message without a usable id (consumer.id) is stored under an ObjectId: delivered twice, it is "
	           "stored twice");
}

/* Count what has its outcome. Returns how many messages have none. No job may hold the batch. */
static size_t count_settled(struct delivery_parcel *parcel)
{
	struct metrics_consumer *counters = parcel->delivery->counters;
	size_t open = 0;
	for (size_t i = 0; i < parcel->batch.count; i++) {
		struct batch_message *message = &parcel->batch.messages[i];
		if (message->settled)
			continue;
		message->settled = message->outcome != BATCH_OPEN;
		open += !message->settled;
		if (!message->settled)
			continue;
		metrics_count_outcome(counters, &parcel->batch, message);
		if (message->id_fallback && message->outcome == BATCH_STORED)
			say_fallback(parcel->delivery);
	}
	return open;
}

static void report(struct delivery_parcel *parcel, size_t open)
{
	struct delivery *delivery = parcel->delivery;
	struct delivery_sender *sender = parcel->sender;
	size_t durable = parcel->batch.count - open, bytes = delivery_bytes(parcel);
	if (open > 0)
		count_open(delivery->counters, parcel);
	else
		metrics_observe(&delivery->counters->store_latency, (uv_hrtime() - parcel->taken_at) / 1000);
	parcel->reported = true;
	parcel->sender = NULL;
	delivery->under_way--;
	release(parcel);
	sender->settled(sender, durable, open, bytes);
}

static bool may_spool(const struct delivery_parcel *parcel)
{
	return parcel->sender->spools && outbox_is_usable(parcel->delivery->outbox);
}

/* Each at its own pace: what one waits for need not concern another. */
static void wait_for_retry(struct delivery_parcel *parcel)
{
	parcel->phase = WAITING;
	parcel->retry_at =
	    uv_now(parcel->delivery->loop) + backoff_ms(++parcel->attempts, RETRY_FIRST_MS, RETRY_MOST_MS);
}

/* No job holds it any more. */
static void conclude(struct delivery_parcel *parcel)
{
	size_t open = count_settled(parcel);
	bool refused = open > 0 && !parcel->delivery->away && parcel->attempts >= DROP_ATTEMPTS;
	if (refused && !parcel->sender->spools && !parcel->given_up) { /* others would wait behind it for ever */
		parcel->given_up = true;
		parcel->cause = METRICS_REFUSED;
	}
	if (open == 0 || parcel->given_up)
		report(parcel, open);
	else if (may_spool(parcel))
		parcel->phase = QUEUED;
	else
		wait_for_retry(parcel);
}

/* ---- storing ---- */

/* Worker thread. Touches only the batch, the scratch memory and the report. */
static void store_work(uv_work_t *job)
{
	struct worker *worker = container_of(job, struct worker, job);
	store_write(worker->delivery->store, worker->scratch, &worker->parcel->batch, &worker->report);
}

static void store_done(uv_work_t *job, int status)
{
	struct worker *worker = container_of(job, struct worker, job);
	struct delivery *delivery = worker->delivery;
	struct delivery_parcel *parcel = worker->parcel;
	bool stored = worker->report.open == 0;
	worker->parcel = NULL;
	parcel->storing = false;
	metrics_count_batch(delivery->counters, parcel->batch.count);
	hear(delivery, &worker->report);
	if (parcel->reported)
		release(parcel);
	else if (!parcel->spooling)
		conclude(parcel);
	if (stored) /* it takes what other connections bring */
		take_again_at_once(delivery);
	advance(delivery);
}

static void start_worker(struct worker *worker, struct delivery_parcel *parcel)
{
	struct delivery *delivery = worker->delivery;
	parcel->phase = STORING;
	parcel->storing = true;
	parcel->overdue = false;
	parcel->started_at = uv_now(delivery->loop);
	worker->parcel = parcel;
	uv_queue_work(delivery->loop, &worker->job, store_work, store_done);
}

/* A worker for the parcel, or NULL. One of several is kept for messages whose broker waits for us. */
static struct worker *idle_worker(struct delivery *delivery, const struct delivery_parcel *parcel)
{
	struct worker *first = NULL;
	int count = 0;
	for (int i = 0; i < delivery->worker_count; i++) {
		if (delivery->workers[i].parcel != NULL)
			continue;
		first = &delivery->workers[i];
		count++;
	}
	return parcel->sender->spools || count > 1 || delivery->worker_count == 1 ? first : NULL;
}

/* While MongoDB is away, and one parcel waits for its next attempt, the others need not run into the same wall. */
static void start_ready(struct delivery *delivery)
{
	struct delivery_parcel *parcel;
	struct worker *worker;
	while ((parcel = first_in(delivery, READY)) != NULL) {
		if (delivery->away && may_spool(parcel)) {
			parcel->phase = QUEUED;
			continue;
		}
		struct delivery_parcel *waiting = first_in(delivery, WAITING);
		bool hopeless = delivery->away && outbox_is_usable(delivery->outbox);
		bool behind = delivery->away && waiting != NULL && waiting->sender->spools >= parcel->sender->spools;
		if (hopeless || behind || (worker = idle_worker(delivery, parcel)) == NULL)
			return;
		start_worker(worker, parcel);
	}
}

/* ---- spooling ---- */

static void spool_queued(struct delivery *delivery)
{
	const struct batch *batches[OUTBOX_BATCHES];
	struct delivery_parcel *parcel;
	size_t count = 0;
	if (!outbox_is_free(delivery->outbox))
		return;
	if (!outbox_is_usable(delivery->outbox)) {
		while ((parcel = first_in(delivery, QUEUED)) != NULL)
			if (parcel->storing)
				parcel->phase = STORING;
			else
				wait_for_retry(parcel);
		return;
	}
	while (count < OUTBOX_BATCHES && (parcel = first_in(delivery, QUEUED)) != NULL) {
		parcel->phase = SPOOLING;
		parcel->spooling = true;
		delivery->spooling[count] = parcel;
		batches[count++] = &parcel->batch;
	}
	delivery->spooling_count = count;
	if (count > 0)
		outbox_commit(delivery->outbox, batches, count);
}

/* The rest of the parcel is on disk. */
static void count_spooled(struct delivery_parcel *parcel)
{
	for (size_t i = 0; i < parcel->batch.count; i++) {
		struct batch_message *message = &parcel->batch.messages[i];
		parcel->delivery->counters->spooled += !message->settled;
		message->settled = true;
	}
}

static void on_committed(void *owner, size_t kept)
{
	struct delivery *delivery = owner;
	struct delivery_parcel *parcels[OUTBOX_BATCHES];
	size_t count = delivery->spooling_count;
	/* All of them before the first is reported: its sender may have others committed at once. */
	memcpy(parcels, delivery->spooling, sizeof parcels);
	for (size_t i = 0; i < count; i++)
		parcels[i]->spooling = false;
	for (size_t i = 0; i < count; i++) {
		struct delivery_parcel *parcel = parcels[i];
		if (i < kept) {
			count_spooled(parcel);
			report(parcel, 0);
		} else if (parcel->storing) {
			parcel->phase = STORING;
		} else {
			conclude(parcel);
		}
	}
	advance(delivery);
}

static uint64_t overdue_at(const struct delivery_parcel *parcel)
{
	return parcel->phase == READY ? parcel->ready_at + parcel->sender->patience_ms
	                              : parcel->started_at + (uint64_t)parcel->delivery->config->spool.after_ms;
}

/* In MongoDB's hands, or in the queue for a worker, where its connection's hold limit runs as well. */
static bool may_be_overdue(const struct delivery_parcel *parcel)
{
	bool candidate = parcel->phase == STORING ? !parcel->overdue : parcel->phase == READY && parcel->sender->spools;
	return candidate && outbox_is_usable(parcel->delivery->outbox);
}

/* An attempt takes longer than a broker should wait for its acknowledgement. */
static void overdue_due(uv_timer_t *timer)
{
	struct delivery *delivery = container_of(timer, struct delivery, overdue);
	for (size_t i = 0; i < delivery->parcel_count; i++) {
		struct delivery_parcel *parcel = delivery->parcels[i];
		if (!may_be_overdue(parcel) || overdue_at(parcel) > uv_now(delivery->loop))
			continue;
		if (parcel->phase == STORING) {
			parcel->overdue = true;
			set_away(delivery);
		}
		if (may_spool(parcel))
			parcel->phase = QUEUED;
	}
	advance(delivery);
}

static void arm_overdue(struct delivery *delivery)
{
	uint64_t first = UINT64_MAX;
	for (size_t i = 0; i < delivery->parcel_count; i++) {
		struct delivery_parcel *parcel = delivery->parcels[i];
		if (may_be_overdue(parcel) && overdue_at(parcel) < first)
			first = overdue_at(parcel);
	}
	arm_at(&delivery->overdue, overdue_due, first);
}

/* ---- what comes next ---- */

static void close_when_idle(struct delivery *delivery);

/* Whatever has happened: what follows from it. */
static void advance(struct delivery *delivery)
{
	start_ready(delivery);
	spool_queued(delivery);
	arm_overdue(delivery);
	arm_retry(delivery);
	arm_look(delivery);
	close_when_idle(delivery);
}

/* ---- what the spool says ---- */

static void on_opened(void *owner, const char *error)
{
	struct delivery *delivery = owner;
	delivery->handler.started(delivery->owner, error);
	advance(delivery);
}

static void on_answered(void *owner, const struct store_report *report)
{
	struct delivery *delivery = owner;
	hear(delivery, report);
	if (report->open == 0)
		take_again_at_once(delivery);
	advance(delivery);
}

static void on_usable(void *owner)
{
	struct delivery *delivery = owner;
	for (size_t i = 0; i < delivery->parcel_count; i++) {
		struct delivery_parcel *parcel = delivery->parcels[i];
		if (parcel->phase == WAITING)
			parcel->phase = READY;
		parcel->overdue = false; /* an attempt that still is one is offered to the spool again */
	}
	take_again(delivery);
	advance(delivery);
}

static const struct outbox_handler outbox_handler = {
    .opened = on_opened,
    .committed = on_committed,
    .answered = on_answered,
    .usable = on_usable,
};

/* ---- public ---- */

struct delivery *delivery_start(uv_loop_t *loop, const struct config *config, struct metrics_consumer *counters,
                                const struct delivery_handler *handler, void *owner)
{
	struct delivery *delivery = memory_zeroed(1, sizeof *delivery);
	delivery->loop = loop;
	delivery->config = config;
	delivery->counters = counters;
	delivery->handler = *handler;
	delivery->owner = owner;
	delivery->ids = bson_context_new(BSON_CONTEXT_NONE);
	delivery->store = store_create(config);
	delivery->worker_count = config->consumer.workers;
	delivery->workers = memory_zeroed((size_t)delivery->worker_count, sizeof *delivery->workers);
	for (int i = 0; i < delivery->worker_count; i++) {
		delivery->workers[i].delivery = delivery;
		delivery->workers[i].scratch = store_scratch_create();
	}
	uv_timer_init(loop, &delivery->retry);
	uv_timer_init(loop, &delivery->overdue);
	uv_timer_init(loop, &delivery->look);
	delivery->handles = 3;
	delivery->outbox = outbox_start(loop, config, delivery->store, counters, &outbox_handler, delivery);
	start_probe(delivery);
	return delivery;
}

struct delivery_parcel *delivery_take(struct delivery *delivery, struct delivery_sender *sender)
{
	struct delivery_parcel *parcel = NULL;
	for (size_t i = 0; i < delivery->parcel_count && parcel == NULL; i++)
		if (delivery->parcels[i]->phase == FREE)
			parcel = delivery->parcels[i];
	if (parcel == NULL) {
		parcel = memory_zeroed(1, sizeof *parcel);
		parcel->delivery = delivery;
		parcel->batch.ids = delivery->ids;
		delivery->parcels =
		    memory_resize(delivery->parcels, (delivery->parcel_count + 1) * sizeof(struct delivery_parcel *));
		delivery->parcels[delivery->parcel_count++] = parcel;
	}
	parcel->phase = FILLING;
	parcel->taken_at = uv_hrtime();
	parcel->sender = sender;
	parcel->reported = parcel->given_up = false;
	parcel->attempts = 0;
	return parcel;
}

size_t delivery_bytes(const struct delivery_parcel *parcel)
{
	return parcel->batch.arena.length + parcel->batch.count * sizeof *parcel->batch.messages;
}

bool delivery_is_full(const struct delivery_parcel *parcel)
{
	const struct config_consumer *config = &parcel->delivery->config->consumer;
	return parcel->batch.count * PARCELS_PER_ROUND >= (size_t)config->batch_count ||
	       parcel->batch.arena.length * PARCELS_PER_ROUND >= (size_t)config->batch_bytes;
}

void delivery_submit(struct delivery_parcel *parcel)
{
	struct delivery *delivery = parcel->delivery;
	parcel->phase = READY;
	parcel->submitted_at = uv_hrtime();
	parcel->ready_at = uv_now(delivery->loop);
	if (delivery->trial_at == 0 && !delivery->refusing)
		delivery->trial_at = parcel->ready_at;
	delivery->under_way++;
	advance(delivery);
}

/* A part of what was handed back proves little, and so does another connection's round: what could not be stored would
 * have been handed back again by now, had it come. */
void delivery_round_stored(struct delivery *delivery, uint64_t hold_ms)
{
	if (delivery->trial_at != 0 && uv_now(delivery->loop) - delivery->trial_at >= TRIAL_HOLDS * hold_ms)
		delivery->handbacks = 0;
}

void delivery_give_up(struct delivery *delivery, struct delivery_sender *sender, enum metrics_cause cause)
{
	bool was_refusing = delivery->refusing;
	for (size_t i = 0; i < delivery->parcel_count; i++) {
		struct delivery_parcel *parcel = delivery->parcels[i];
		if (parcel->sender != sender || parcel->phase == FREE || parcel->phase == FILLING)
			continue;
		parcel->given_up = true;
		parcel->cause = cause;
		delivery->refusing = delivery->refusing || cause == METRICS_HOLD_LIMIT;
		if (!parcel->storing && !parcel->spooling)
			conclude(parcel);
	}
	if (cause == METRICS_HOLD_LIMIT && !was_refusing) { /* once for all connections of an outage */
		delivery->handbacks++;
		delivery->trial_at = 0;
	}
	advance(delivery);
}

bool delivery_accepts(const struct delivery *delivery)
{
	return !delivery->refusing;
}

struct pace_wait delivery_wait(const struct delivery *delivery, const struct delivery_sender *sender)
{
	uint64_t interval = (uint64_t)delivery->config->consumer.batch_interval_ms;
	uint64_t linger = (uint64_t)delivery->config->spool.linger_ms;
	bool spools = delivery->away && sender->spools && outbox_is_usable(delivery->outbox);
	if (spools && linger > interval) /* to spare flash memory, which a burst wears as well */
		return (struct pace_wait){.interval = linger, .patient = true};
	return (struct pace_wait){.interval = interval};
}

void delivery_promise(const struct delivery *delivery, char *text, size_t size)
{
	store_write_concern_text(delivery->store, text, size);
}

const char *delivery_trouble(const struct delivery *delivery)
{
	const bool *refuses = delivery->counters->database_refuses;
	if (delivery->outbox == NULL)
		return NULL;
	if (!delivery->away && !delivery->refusing)
		return refuses[STORE_MESSAGES]       ? "MongoDB refuses documents"
		       : refuses[STORE_DEAD_LETTERS] ? "MongoDB refuses dead letters"
		                                     : NULL;
	if (outbox_is_usable(delivery->outbox))
		return "spooling, MongoDB does not answer";
	if (delivery->counters->spool_state == METRICS_SPOOL_FULL)
		return "holding, the spool is full";
	return delivery->under_way > 0 ? "holding, MongoDB does not answer" : "waiting for MongoDB";
}

/* ---- stopping ---- */

static void handle_closed(uv_handle_t *handle)
{
	struct delivery *delivery = handle->data;
	if (--delivery->handles > 0)
		return;
	void (*stopped)(void *) = delivery->stopped;
	void *owner = delivery->owner;
	for (int i = 0; i < delivery->worker_count; i++)
		store_scratch_destroy(delivery->workers[i].scratch);
	for (size_t i = 0; i < delivery->parcel_count; i++) {
		batch_finish(&delivery->parcels[i]->batch);
		free(delivery->parcels[i]);
	}
	free(delivery->parcels);
	bson_context_destroy(delivery->ids);
	free(delivery->workers);
	free(delivery);
	stopped(owner);
}

/* Worker thread: the driver waits for its monitoring threads. */
static void disconnect_work(uv_work_t *job)
{
	store_destroy(container_of(job, struct delivery, disconnect)->store);
}

static void disconnect_done(uv_work_t *job, int status)
{
	struct delivery *delivery = container_of(job, struct delivery, disconnect);
	delivery->retry.data = delivery->overdue.data = delivery->look.data = delivery;
	uv_close((uv_handle_t *)&delivery->retry, handle_closed);
	uv_close((uv_handle_t *)&delivery->overdue, handle_closed);
	uv_close((uv_handle_t *)&delivery->look, handle_closed);
}

static void outbox_stopped(void *owner)
{
	struct delivery *delivery = owner;
	delivery->outbox = NULL;
	uv_queue_work(delivery->loop, &delivery->disconnect, disconnect_work, disconnect_done);
}

/* Attempts whose messages are in the spool by now may still be under way. */
static void close_when_idle(struct delivery *delivery)
{
	if (!delivery->stopping || delivery->closing || delivery->probe_runs || !idle(delivery))
		return;
	delivery->closing = true;
	uv_timer_stop(&delivery->retry);
	uv_timer_stop(&delivery->overdue);
	uv_timer_stop(&delivery->look);
	outbox_stop(delivery->outbox, outbox_stopped);
}

void delivery_stop(struct delivery *delivery, void (*stopped)(void *owner))
{
	delivery->stopping = true;
	delivery->stopped = stopped;
	close_when_idle(delivery);
}
