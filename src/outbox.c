/*
 * See outbox.h. Two jobs may be under way: one on the spool, and one that stores what the drain has read.
 *
 * The spool's jobs, the first that applies: open; commit, for acknowledgements wait for it; the drain's remove or read;
 * test, when it was full or has failed; close.
 *
 *   the drain:   IDLE --> READING --messages--> LOADED --> STORING --settled--> STORED --> REMOVING --> IDLE
 *                            |                     ^          |
 *                          empty                   +-back-off-+
 *
 * An attempt that fails because MongoDB is away is made again with the same messages. Messages that it does not take
 * for reasons of their own, or of their collection, stay in the spool; the drain goes on behind them at once and comes
 * back when it has reached the end. What counts against a message is remembered from one pass to the next.
 */
#include "outbox.h"

#include "backoff.h"
#include "log.h"
#include "memory.h"
#include "spool.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
	RETRY_FIRST_MS = 100,
	RETRY_MOST_MS = 5000,
	TEST_MOST_MS = 2000,
	REFUSED_MS = 100,      /* before the next messages, when MongoDB has taken none */
	REST_MOST_MS = 60000,  /* between two passes */
	SUSPECTS_MOST = 65536, /* the others are remembered when there is room again */
	SAY_MS = 60000,        /* between two lines about the spool's size */
	ERROR_TEXT = 512,
};

#define MIB 1048576.0

enum spool_job { JOB_NONE, JOB_OPEN, JOB_COMMIT, JOB_REMOVE, JOB_READ, JOB_TEST, JOB_CLOSE };
enum drain_phase { DRAIN_IDLE, DRAIN_READING, DRAIN_LOADED, DRAIN_STORING, DRAIN_STORED, DRAIN_REMOVING };

/* A message that was left behind, and its batch_message.refusals. */
struct suspect {
	int64_t row;
	uint8_t refusals;
};

struct outbox {
	uv_loop_t *loop;
	const struct config *config;
	struct store *store;
	struct metrics_consumer *counters;
	struct outbox_handler handler;
	void *owner;

	struct spool *spool; /* used by the spool's job while one runs; NULL: there is none */
	uv_work_t job;
	enum spool_job running;
	enum spool_result result;
	char error[ERROR_TEXT];
	enum spool_result state; /* of the spool, as the jobs have found it */
	struct spool_status status;
	bool opened;

	const struct batch *batches[OUTBOX_BATCHES]; /* to be committed */
	size_t batch_count;                          /* 0: no commit is wanted */
	size_t kept;                                 /* of them, by the last commit */

	unsigned tests; /* in a row that failed */
	bool test_due;
	uv_timer_t test;

	enum drain_phase drain;
	uv_work_t drain_job;
	struct store_scratch *scratch;
	struct store_report report;
	struct batch batch;       /* what the drain has read */
	int64_t after;            /* the last row it has dealt with in this pass */
	uint64_t pass_at;         /* loop time of its beginning */
	unsigned pauses;          /* in a row */
	bool left_behind;         /* in this pass: messages that MongoDB did not take */
	uv_timer_t pause;         /* active: no attempt before it fires */
	bool rests;               /* between two passes */
	struct suspect *suspects; /* sorted by row; owned */
	size_t suspect_count;

	struct log_repeat complaint, full;
	uint64_t said_at; /* loop time of the last line about its size */
	bool said;        /* since it was empty */
	bool stopping, closing;
	void (*stopped)(void *owner);
	int handles;
};

static void advance(struct outbox *outbox);

/* ---- what is said of it ---- */

static void say_size(struct outbox *outbox)
{
	uint64_t now = uv_now(outbox->loop);
	const struct spool_status *status = &outbox->status;
	if (status->messages == 0) {
		if (outbox->said)
			log_info("spool", "empty: MongoDB has every message of it");
		outbox->said = false;
	} else if (outbox->said_at == 0 || now - outbox->said_at >= SAY_MS) {
		outbox->said = true;
		log_info("spool", "holds %llu messages that MongoDB has not confirmed, %.1f of %.0f MiB",
		         (unsigned long long)status->messages, (double)status->bytes / MIB,
		         (double)status->max_size / MIB);
		outbox->said_at = now;
	}
}

static void note_state(struct outbox *outbox)
{
	struct metrics_consumer *counters = outbox->counters;
	if (outbox->spool == NULL || outbox->running == JOB_CLOSE) /* a handler may have had it closed */
		return;
	spool_status(outbox->spool, &outbox->status);
	counters->spool_messages = outbox->status.messages;
	counters->spool_bytes = outbox->status.bytes;
	counters->spool_max_bytes = outbox->status.max_size;
	counters->spool_oldest_ms = outbox->status.oldest_ms;
	counters->spool_state = outbox->state == SPOOL_OK     ? METRICS_SPOOL_OK
	                        : outbox->state == SPOOL_FULL ? METRICS_SPOOL_FULL
	                                                      : METRICS_SPOOL_FAILED;
}

static void test_now(uv_timer_t *timer)
{
	struct outbox *outbox = container_of(timer, struct outbox, test);
	outbox->test_due = true;
	advance(outbox);
}

/* It takes nothing for now: say why, and when to look again. */
static void note_failure(struct outbox *outbox)
{
	outbox->state = outbox->result;
	bool full = outbox->state == SPOOL_FULL; /* each has its own last text: they may alternate */
	log_repeat(full ? &outbox->full : &outbox->complaint, LOG_LEVEL_ERROR, "spool",
	           "spool %s: %s; while MongoDB is away nothing more is acknowledged", full ? "full" : "failed",
	           outbox->error);
	if (!uv_is_active((uv_handle_t *)&outbox->test))
		uv_timer_start(&outbox->test, test_now, backoff_ms(++outbox->tests, RETRY_FIRST_MS, TEST_MOST_MS), 0);
}

static void note_success(struct outbox *outbox)
{
	bool was_usable = outbox->state == SPOOL_OK;
	outbox->state = SPOOL_OK;
	outbox->tests = 0;
	uv_timer_stop(&outbox->test);
	if (was_usable)
		return;
	log_info("spool", "takes messages again");
	log_repeat_end(&outbox->complaint);
	log_repeat_end(&outbox->full);
	outbox->handler.usable(outbox->owner);
}

/* ---- the spool's jobs ---- */

static bool is_off(const struct outbox *outbox)
{
	return outbox->config->spool.max_size == 0;
}

/* All in one transaction; what is too much for a spool that is nearly full, as far as it goes. */
static void commit(struct outbox *outbox)
{
	outbox->kept = 0;
	outbox->result =
	    spool_commit(outbox->spool, outbox->batches, outbox->batch_count, outbox->error, sizeof outbox->error);
	if (outbox->result == SPOOL_OK)
		outbox->kept = outbox->batch_count;
	if (outbox->result != SPOOL_FULL || outbox->batch_count == 1)
		return;
	do
		outbox->result =
		    spool_commit(outbox->spool, &outbox->batches[outbox->kept], 1, outbox->error, sizeof outbox->error);
	while (outbox->result == SPOOL_OK && ++outbox->kept < outbox->batch_count);
}

/* Worker thread. The loop leaves the spool and the job's batches alone. */
static void job_work(uv_work_t *job)
{
	struct outbox *outbox = container_of(job, struct outbox, job);
	const struct config_consumer *config = &outbox->config->consumer;
	outbox->error[0] = 0;
	switch (outbox->running) {
	case JOB_OPEN:
		if (is_off(outbox))
			break;
		outbox->spool = spool_open(&outbox->config->spool, outbox->error, sizeof outbox->error);
		if (outbox->spool != NULL)
			outbox->result = spool_test(outbox->spool, outbox->error, sizeof outbox->error);
		break;
	case JOB_COMMIT:
		commit(outbox);
		break;
	case JOB_REMOVE:
		outbox->result = spool_remove(outbox->spool, &outbox->batch, outbox->error, sizeof outbox->error);
		break;
	case JOB_READ:
		outbox->result = spool_read(outbox->spool, outbox->after, &outbox->batch, (size_t)config->batch_count,
		                            (size_t)config->batch_bytes / 2, outbox->error, sizeof outbox->error);
		break;
	case JOB_TEST:
		outbox->result = spool_test(outbox->spool, outbox->error, sizeof outbox->error);
		break;
	case JOB_CLOSE:
		spool_close(outbox->spool);
		outbox->spool = NULL;
		break;
	case JOB_NONE:
		break;
	}
}

static void open_done(struct outbox *outbox)
{
	outbox->opened = true;
	if (outbox->spool != NULL && outbox->result != SPOOL_OK)
		note_failure(outbox);
	else if (outbox->spool != NULL)
		outbox->state = SPOOL_OK;
	note_state(outbox);
	outbox->handler.opened(outbox->owner, outbox->spool == NULL && !is_off(outbox) ? outbox->error : NULL);
}

static void commit_done(struct outbox *outbox)
{
	outbox->batch_count = 0;
	if (outbox->result != SPOOL_OK)
		note_failure(outbox);
	outbox->handler.committed(outbox->owner, outbox->kept);
}

/* What MongoDB has confirmed is out of the spool for good, and counted now: a crash before would have it twice. */
static void count_confirmed(struct outbox *outbox)
{
	struct metrics_consumer *counters = outbox->counters;
	for (size_t i = 0; i < outbox->batch.count; i++) {
		const struct batch_message *message = &outbox->batch.messages[i];
		if (message->outcome == BATCH_OPEN)
			continue;
		counters->recovered_from_spool++;
		metrics_count_outcome(counters, &outbox->batch, message);
	}
}

static void pause_over(uv_timer_t *timer)
{
	struct outbox *outbox = container_of(timer, struct outbox, pause);
	outbox->rests = false;
	advance(outbox);
}

static void pause_drain(struct outbox *outbox, uint64_t least_ms)
{
	uint64_t delay = backoff_ms(++outbox->pauses, RETRY_FIRST_MS, RETRY_MOST_MS);
	uv_timer_start(&outbox->pause, pause_over, delay > least_ms ? delay : least_ms, 0);
}

/* ---- what counts against messages that were left behind ---- */

/* The first suspect from `row` on. */
static size_t suspect_from(const struct outbox *outbox, int64_t row)
{
	size_t low = 0, high = outbox->suspect_count;
	while (low < high) {
		size_t middle = low + (high - low) / 2;
		if (outbox->suspects[middle].row < row)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static void recall_suspects(struct outbox *outbox)
{
	for (size_t i = 0; i < outbox->batch.count && outbox->suspect_count > 0; i++) {
		struct batch_message *message = &outbox->batch.messages[i];
		size_t at = suspect_from(outbox, message->row);
		if (at < outbox->suspect_count && outbox->suspects[at].row == message->row)
			message->refusals = outbox->suspects[at].refusals;
	}
}

/* What is known of the rows of this batch, which are in order and without a gap, takes the place of what was known. */
static void note_suspects(struct outbox *outbox)
{
	const struct batch *batch = &outbox->batch;
	size_t from = suspect_from(outbox, batch->messages[0].row);
	size_t to = suspect_from(outbox, batch->messages[batch->count - 1].row + 1), left = outbox->suspect_count - to;
	if (from + batch->count + left == 0)
		return;
	struct suspect *noted = memory_zeroed(from + batch->count + left, sizeof *noted);
	if (from > 0)
		memcpy(noted, outbox->suspects, from * sizeof *noted);
	size_t count = from;
	for (size_t i = 0; i < batch->count && count + left < SUSPECTS_MOST; i++) {
		const struct batch_message *message = &batch->messages[i];
		if (message->outcome == BATCH_OPEN && message->refusals > 0)
			noted[count++] = (struct suspect){.row = message->row, .refusals = message->refusals};
	}
	if (left > 0)
		memcpy(&noted[count], &outbox->suspects[to], left * sizeof *noted);
	free(outbox->suspects);
	outbox->suspects = noted;
	outbox->suspect_count = count + left;
}

/* ---- the drain's jobs on the spool ---- */

static void remove_done(struct outbox *outbox)
{
	if (outbox->result != SPOOL_OK) {
		outbox->drain = DRAIN_STORED; /* MongoDB has them; only the spool does not know yet */
		note_failure(outbox);
		pause_drain(outbox, 0);
		return;
	}
	size_t open = batch_count_outcome(&outbox->batch, BATCH_OPEN);
	bool refused = open == outbox->batch.count;
	if (!refused)
		outbox->pauses = 0;
	if (open > 0 || outbox->suspect_count > 0)
		note_suspects(outbox);
	count_confirmed(outbox);
	outbox->after = outbox->batch.messages[outbox->batch.count - 1].row;
	outbox->left_behind = outbox->left_behind || open > 0;
	batch_reset(&outbox->batch);
	outbox->drain = DRAIN_IDLE;
	if (refused)
		uv_timer_start(&outbox->pause, pause_over, REFUSED_MS, 0);
	if (outbox->state == SPOOL_FULL)
		outbox->test_due = true; /* there may be room now */
}

/* Nothing is behind `after`. If there are messages all the same they were left behind, or cannot be read: again from
 * the beginning, but not more than half of the time. */
static void end_pass(struct outbox *outbox)
{
	uint64_t took_ms = uv_now(outbox->loop) - outbox->pass_at;
	spool_status(outbox->spool, &outbox->status);
	outbox->rests = outbox->result != SPOOL_OK || outbox->left_behind || outbox->status.messages > 0;
	if (outbox->rests)
		pause_drain(outbox, took_ms < REST_MOST_MS ? took_ms : REST_MOST_MS);
	outbox->after = 0;
	outbox->left_behind = false;
}

static void read_done(struct outbox *outbox)
{
	if (outbox->result == SPOOL_OK && outbox->batch.count > 0) {
		outbox->drain = DRAIN_LOADED;
		recall_suspects(outbox);
		return;
	}
	batch_reset(&outbox->batch);
	outbox->drain = DRAIN_IDLE;
	if (outbox->result != SPOOL_OK)
		note_failure(outbox);
	end_pass(outbox);
}

static void test_done(struct outbox *outbox)
{
	outbox->test_due = false;
	if (outbox->result == SPOOL_OK)
		note_success(outbox);
	else
		note_failure(outbox);
}

static void job_done(uv_work_t *job, int status)
{
	struct outbox *outbox = container_of(job, struct outbox, job);
	enum spool_job done = outbox->running;
	outbox->running = JOB_NONE;
	switch (done) {
	case JOB_OPEN:
		open_done(outbox);
		break;
	case JOB_COMMIT:
		commit_done(outbox);
		break;
	case JOB_REMOVE:
		remove_done(outbox);
		break;
	case JOB_READ:
		read_done(outbox);
		break;
	case JOB_TEST:
		test_done(outbox);
		break;
	default:
		break;
	}
	note_state(outbox);
	say_size(outbox);
	advance(outbox);
}

static void start_job(struct outbox *outbox, enum spool_job job)
{
	outbox->running = job;
	uv_queue_work(outbox->loop, &outbox->job, job_work, job_done);
}

/* ---- the drain ---- */

/* Worker thread. Touches only the drain's batch, the scratch memory and the report. */
static void store_work(uv_work_t *job)
{
	struct outbox *outbox = container_of(job, struct outbox, drain_job);
	store_write(outbox->store, outbox->scratch, &outbox->batch, &outbox->report);
}

static void store_done(uv_work_t *job, int status)
{
	struct outbox *outbox = container_of(job, struct outbox, drain_job);
	const struct store_report *report = &outbox->report;
	metrics_count_batch(outbox->counters, outbox->batch.count);
	outbox->drain = DRAIN_STORED;
	if (report->open > 0 && report->away) {
		outbox->pass_at = uv_now(outbox->loop); /* waiting for MongoDB is no work */
		outbox->drain = DRAIN_LOADED;
		pause_drain(outbox, 0);
	}
	outbox->handler.answered(outbox->owner, report);
	advance(outbox);
}

static void start_store(struct outbox *outbox)
{
	outbox->drain = DRAIN_STORING;
	uv_queue_work(outbox->loop, &outbox->drain_job, store_work, store_done);
}

/* Files that were moved, and cannot be made anew, take nothing, but what they hold may still reach MongoDB. */
static bool is_readable(const struct outbox *outbox)
{
	return outbox->state != SPOOL_FAILED || outbox->status.readable;
}

/* The spool's job that the drain needs next. */
static enum spool_job drain_wants(const struct outbox *outbox)
{
	if (!is_readable(outbox) || uv_is_active((const uv_handle_t *)&outbox->pause))
		return JOB_NONE;
	if (outbox->drain == DRAIN_STORED)
		return JOB_REMOVE;
	if (outbox->drain == DRAIN_IDLE && outbox->status.messages > 0 && !outbox->stopping)
		return JOB_READ;
	return JOB_NONE;
}

/* ---- what comes next ---- */

static void close_when_idle(struct outbox *outbox);

static void start_next_job(struct outbox *outbox)
{
	enum spool_job wanted = drain_wants(outbox);
	if (outbox->running != JOB_NONE || !outbox->opened || outbox->spool == NULL)
		return;
	if (outbox->batch_count > 0) {
		start_job(outbox, JOB_COMMIT);
	} else if (wanted != JOB_NONE) {
		outbox->drain = wanted == JOB_READ ? DRAIN_READING : DRAIN_REMOVING;
		if (wanted == JOB_READ && outbox->after == 0)
			outbox->pass_at = uv_now(outbox->loop);
		start_job(outbox, wanted);
	} else if (outbox->test_due && !outbox->stopping) {
		start_job(outbox, JOB_TEST);
	}
}

static void advance(struct outbox *outbox)
{
	if (outbox->drain == DRAIN_LOADED && !outbox->stopping && !uv_is_active((uv_handle_t *)&outbox->pause))
		start_store(outbox);
	start_next_job(outbox);
	close_when_idle(outbox);
}

/* ---- public ---- */

struct outbox *outbox_start(uv_loop_t *loop, const struct config *config, struct store *store,
                            struct metrics_consumer *counters, const struct outbox_handler *handler, void *owner)
{
	struct outbox *outbox = memory_zeroed(1, sizeof *outbox);
	outbox->loop = loop;
	outbox->config = config;
	outbox->store = store;
	outbox->counters = counters;
	outbox->handler = *handler;
	outbox->owner = owner;
	outbox->scratch = store_scratch_create();
	uv_timer_init(loop, &outbox->test);
	uv_timer_init(loop, &outbox->pause);
	outbox->handles = 2;
	start_job(outbox, JOB_OPEN);
	return outbox;
}

bool outbox_is_usable(const struct outbox *outbox)
{
	return outbox->opened && outbox->spool != NULL && outbox->state == SPOOL_OK;
}

bool outbox_is_free(const struct outbox *outbox)
{
	return outbox->batch_count == 0;
}

void outbox_commit(struct outbox *outbox, const struct batch *const *batches, size_t count)
{
	memcpy(outbox->batches, batches, count * sizeof(const struct batch *));
	outbox->batch_count = count;
	start_next_job(outbox);
}

void outbox_drain(struct outbox *outbox)
{
	uv_timer_stop(&outbox->pause);
	outbox->pauses = 0;
	outbox->rests = false;
	advance(outbox);
}

bool outbox_is_draining(const struct outbox *outbox)
{
	return outbox->status.messages > 0 && is_readable(outbox) && !outbox->rests;
}

static void handle_closed(uv_handle_t *handle)
{
	struct outbox *outbox = handle->data;
	if (--outbox->handles > 0)
		return;
	void (*stopped)(void *) = outbox->stopped;
	void *owner = outbox->owner;
	store_scratch_destroy(outbox->scratch);
	batch_finish(&outbox->batch);
	free(outbox->suspects);
	free(outbox);
	stopped(owner);
}

/* What the drain has read and MongoDB has not confirmed stays in the spool. */
static void close_when_idle(struct outbox *outbox)
{
	bool busy = outbox->running != JOB_NONE || outbox->drain == DRAIN_STORING || outbox->batch_count > 0;
	if (!outbox->stopping || outbox->closing || busy)
		return;
	if (outbox->spool != NULL) {
		start_job(outbox, JOB_CLOSE);
		return;
	}
	outbox->closing = true;
	outbox->test.data = outbox->pause.data = outbox;
	uv_close((uv_handle_t *)&outbox->test, handle_closed);
	uv_close((uv_handle_t *)&outbox->pause, handle_closed);
}

void outbox_stop(struct outbox *outbox, void (*stopped)(void *owner))
{
	outbox->stopping = true;
	outbox->stopped = stopped;
	uv_timer_stop(&outbox->test);
	uv_timer_stop(&outbox->pause);
	advance(outbox);
}
