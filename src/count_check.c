/*
 * See count_check.h.
 *
 * When to count: as soon as the consumer seems to have everything, that is, it has received as many as the broker has
 * acknowledged to the publisher, and none is in flight or in the spool. What it has received may be others' messages,
 * or the same ones twice, so this is only a guess, and a count that finds something missing is followed by another one
 * when more was stored meanwhile. The end is when nothing was stored for QUIET_MS, or none of this run for
 * RUN_QUIET_MS.
 *
 * What it costs: an ObjectId begins with the time it was made, so the index on _id, which every collection has, leads
 * to the documents since the run began; only those are looked at, whosever they are. With ids from the messages there
 * is no such index, and the whole collection is read.
 */
#include "count_check.h"

#include "clock.h"
#include "log.h"
#include "memory.h"
#include "store.h"
#include "tally.h"
#include "template.h"

#include <cjson/cJSON.h>
#include <stdlib.h>

enum {
	TICK_MS = 100,
	AGAIN_MS = 1000,       /* between two counts */
	AGAIN_BUSY_MS = 5000,  /* the same while more is known to come */
	QUIET_MS = 10000,      /* nothing was stored for so long: nothing comes any more */
	RUN_QUIET_MS = 600000, /* none of this run, while others' messages are being stored */
	CLOCK_SLACK_MS = 100,
	NAMED_MOST = 10, /* missing messages that are named */
};

/* One count; a worker's, while its job runs. */
struct scan {
	struct tally tally;
	uint64_t dead_letters;
	struct store_report report;
	uint64_t missing[NAMED_MOST];
	size_t named;
};

struct count_check {
	struct count_check_inputs inputs;
	void (*ended)(void *owner, bool complete);
	void *owner;
	uv_loop_t *loop;
	uv_timer_t timer;
	uv_work_t job;
	bool running, last, stopping, closed, complete;
	struct scan scan;
	int64_t since; /* wall clock: the run began not before */
	uint64_t durable, progress_at;
	uint64_t distinct, run_progress_at;
	bool scanned;
	uint64_t scanned_at, scanned_durable; /* of the last count */
};

/* ---- reading the numbers back ---- */

/* A worker: a document { payload: { sequence } }. */
static bool take_document(void *context, const bson_t *document)
{
	struct count_check *check = context;
	bson_iter_t iter, sequence;
	if (bson_iter_init(&iter, document) && bson_iter_find_descendant(&iter, "payload.sequence", &sequence) &&
	    (BSON_ITER_HOLDS_INT32(&sequence) || BSON_ITER_HOLDS_INT64(&sequence)))
		tally_mark(&check->scan.tally, bson_iter_as_int64(&sequence));
	return true;
}

/* A worker: a dead letter { payload: Binary }, which should be the publisher's JSON. */
static bool take_dead_letter(void *context, const bson_t *letter)
{
	struct count_check *check = context;
	bson_iter_t iter;
	uint32_t length;
	const uint8_t *bytes;
	if (!bson_iter_init_find(&iter, letter, "payload") || !BSON_ITER_HOLDS_BINARY(&iter))
		return true;
	bson_iter_binary(&iter, NULL, &length, &bytes);
	cJSON *payload = cJSON_ParseWithLength((const char *)bytes, length);
	const char *run = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(payload, "run"));
	const cJSON *sequence = cJSON_GetObjectItemCaseSensitive(payload, "sequence");
	if (run != NULL && strcmp(run, check->inputs.run.name) == 0 && cJSON_IsNumber(sequence)) {
		check->scan.dead_letters++;
		tally_mark(&check->scan.tally, (int64_t)sequence->valuedouble);
	}
	cJSON_Delete(payload);
	return true;
}

/* { _id: since, received_at: since, `field`: `value` } */
/* Documents whose _id is an ObjectId of ours are found by it, without looking at those before the run. With ids from
 * the messages the whole collection is read. */
static bson_t *make_query(const struct count_check *check, bool object_ids, const char *field, int type,
                          const char *value)
{
	bson_oid_t first;
	uint8_t bytes[12] = {0};
	uint32_t seconds = check->since > 0 ? (uint32_t)(check->since / 1000) : 0;
	for (int i = 0; i < 4; i++)
		bytes[i] = (uint8_t)(seconds >> (24 - 8 * i));
	bson_oid_init_from_data(&first, bytes);
	bson_t *query = BCON_NEW("received_at", "{", "$gte", BCON_DATE_TIME(check->since), "}");
	if (object_ids)
		BCON_APPEND(query, "_id", "{", "$gte", BCON_OID(&first), "}");
	if (type == BSON_TYPE_REGEX)
		BSON_APPEND_REGEX(query, field, value, "");
	else
		BSON_APPEND_UTF8(query, field, value);
	return query;
}

static bool scan_collection(struct count_check *check, struct store *store, const char *collection, bson_t *query,
                            const char *field, bool (*take)(void *, const bson_t *))
{
	bson_t *options = BCON_NEW("projection", "{", "_id", BCON_INT32(0), field, BCON_INT32(1), "}");
	bool done = store_find(store, collection, query, options, take, check, &check->scan.report);
	bson_destroy(options);
	bson_destroy(query);
	return done;
}

/* A worker. The dead letters are found by their preview, in which the template's JSON names the run. */
static void scan_work(uv_work_t *job)
{
	struct count_check *check = container_of(job, struct count_check, job);
	const struct config_consumer *consumer = &check->inputs.config->consumer;
	char mention[64];
	snprintf(mention, sizeof mention, "\"run\":\"%s\"", check->inputs.run.name);
	struct store *store = store_create(check->inputs.config);
	if (scan_collection(
		check, store, consumer->collection,
		make_query(check, consumer->id.count == 0, "payload.run", BSON_TYPE_UTF8, check->inputs.run.name),
		"payload.sequence", take_document))
		scan_collection(check, store, consumer->dead_letter,
		                make_query(check, true, "preview", BSON_TYPE_REGEX, mention), "payload",
		                take_dead_letter);
	store_destroy(store);
	check->scan.named = tally_missing(&check->scan.tally, check->scan.missing, NAMED_MOST);
}

/* ---- what the count says ---- */

static uint64_t in_spool(const struct metrics_consumer *consumer)
{
	return consumer->spooled > consumer->recovered_from_spool ? consumer->spooled - consumer->recovered_from_spool
	                                                          : 0;
}

static uint64_t expected(const struct count_check *check)
{
	return check->inputs.publisher.generated - check->inputs.publisher.failed;
}

static void keep_result(struct count_check *check)
{
	const struct tally *tally = &check->scan.tally;
	*check->inputs.result = (struct metrics_check){
	    .made = check->inputs.result->made + 1,
	    .generated = check->inputs.publisher.generated,
	    .acked = check->inputs.publisher.acked,
	    .distinct = tally->distinct,
	    .duplicates = tally->marks - tally->distinct,
	    .missing = expected(check) > tally->distinct ? expected(check) - tally->distinct : 0,
	};
}

static void say_complete(const struct count_check *check)
{
	const struct metrics_check *result = check->inputs.result;
	log_info("check", "all %llu messages of this run are in MongoDB, %llu of them as dead letters%s",
	         (unsigned long long)expected(check), (unsigned long long)check->scan.dead_letters,
	         check->scan.tally.seen == NULL ? "; so many that they were only counted, not compared" : "");
	if (result->duplicates > 0)
		log_info("check", "%llu were stored more than once", (unsigned long long)result->duplicates);
}

/* " N reason;" for a number that is not 0. */
static void print_reason(FILE *out, uint64_t count, const char *reason)
{
	if (count > 0)
		fprintf(out, "; %llu %s", (unsigned long long)count, reason);
}

static void print_missing(FILE *out, const struct count_check *check)
{
	const struct scan *scan = &check->scan;
	for (size_t i = 0; i < scan->named; i++)
		fprintf(out, "%s%llu", i == 0 ? ", sequence " : ", ", (unsigned long long)scan->missing[i]);
	if (scan->named == NAMED_MOST)
		fputs(", …", out);
}

static void say_missing(const struct count_check *check)
{
	const struct metrics_consumer *consumer = check->inputs.consumer;
	const struct metrics_publisher *publisher = &check->inputs.publisher;
	const struct config *config = check->inputs.config;
	char *text = NULL;
	size_t size = 0;
	FILE *out = open_memstream(&text, &size);
	print_missing(out, check);
	print_reason(out, publisher->failed, "more were refused by the broker");
	print_reason(out, publisher->no_subscribers, "were published while nobody was subscribed");
	print_reason(out, in_spool(consumer), "are still in the spool");
	print_reason(out, metrics_in_flight(consumer), "are received and not stored yet");
	print_reason(out, metrics_total(consumer->dropped, METRICS_CAUSES), "of QoS 0 were dropped");
	if (publisher->acked > consumer->received)
		print_reason(out, publisher->acked - consumer->received, "were never received");
	if (config->publisher.qos == 0 || config->consumer.qos == 0)
		fputs("; at QoS 0 messages may be lost on their way", out);
	fclose(out);
	log_error("check", "%llu of %llu messages of this run are not in MongoDB%s",
	          (unsigned long long)check->inputs.result->missing, (unsigned long long)expected(check), text);
	free(text);
}

/* ---- when to count ---- */

static void timer_closed(uv_handle_t *handle)
{
	struct count_check *check = container_of(handle, struct count_check, timer);
	void (*ended)(void *, bool) = check->ended;
	void *owner = check->owner;
	bool complete = check->complete;
	free(check);
	ended(owner, complete);
}

static void end(struct count_check *check, bool complete)
{
	if (check->closed)
		return;
	check->closed = true;
	check->complete = complete;
	uv_close((uv_handle_t *)&check->timer, timer_closed);
}

static void scan_done(uv_work_t *job, int status)
{
	struct count_check *check = container_of(job, struct count_check, job);
	uint64_t now = uv_now(check->loop);
	bool known = check->scan.report.class == STORE_OK;
	check->running = false;
	check->scanned = true;
	check->scanned_at = now;
	if (known) {
		keep_result(check);
		if (check->scan.tally.distinct > check->distinct)
			check->run_progress_at = now;
		check->distinct = check->scan.tally.distinct;
	}
	bool complete = known && check->inputs.result->missing == 0;
	if (complete)
		say_complete(check);
	else if (check->last && known)
		say_missing(check);
	else if (check->last)
		log_error("check", "cannot count the messages of this run: %s", check->scan.report.message);
	tally_finish(&check->scan.tally);
	if (complete || check->last || check->stopping)
		end(check, complete);
}

static void start_scan(struct count_check *check)
{
	check->running = true;
	check->scanned_durable = check->durable;
	check->scan = (struct scan){0};
	tally_init(&check->scan.tally, check->inputs.publisher.generated);
	uv_queue_work(check->loop, &check->job, scan_work, scan_done);
}

static uint64_t count_durable(const struct metrics_consumer *consumer)
{
	return consumer->stored + consumer->duplicates + consumer->spooled +
	       metrics_total(consumer->dead_lettered, DOCUMENT_REASONS);
}

/* It seems to have all. */
static bool is_settled(const struct count_check *check)
{
	const struct metrics_consumer *consumer = check->inputs.consumer;
	const struct metrics_publisher *publisher = &check->inputs.publisher;
	return consumer->received >= publisher->acked - publisher->no_subscribers && metrics_in_flight(consumer) == 0 &&
	       in_spool(consumer) == 0;
}

static void tick(uv_timer_t *timer)
{
	struct count_check *check = container_of(timer, struct count_check, timer);
	uint64_t now = uv_now(check->loop), durable = count_durable(check->inputs.consumer);
	if (durable != check->durable)
		check->progress_at = now;
	check->durable = durable;
	if (check->running)
		return;
	check->last = now - check->progress_at > QUIET_MS || now - check->run_progress_at > RUN_QUIET_MS;
	bool settled = is_settled(check);
	bool news = !check->scanned || durable != check->scanned_durable;
	bool first = !check->scanned && settled;
	if (check->last || first || (news && now - check->scanned_at > (settled ? AGAIN_MS : AGAIN_BUSY_MS)))
		start_scan(check);
}

static void cannot_match(uv_timer_t *timer)
{
	struct count_check *check = container_of(timer, struct count_check, timer);
	const struct config *config = check->inputs.config;
	log_error("check", "cannot count the messages of this run: consumer.topic %s does not match publisher.topic %s",
	          config->consumer.topic, config->publisher.topic);
	end(check, false);
}

/* The clock may have been set since: the earlier one of its two opinions on when the run began. */
static int64_t run_began(const struct publisher_run *run)
{
	int64_t by_now = clock_wall_ms() - (int64_t)((uv_hrtime() - run->began_hrtime) / 1000000);
	return (by_now < run->began_ms ? by_now : run->began_ms) - CLOCK_SLACK_MS;
}

struct count_check *count_check_start(uv_loop_t *loop, const struct count_check_inputs *inputs,
                                      void (*ended)(void *owner, bool complete), void *owner)
{
	struct count_check *check = memory_zeroed(1, sizeof *check);
	const struct config *config = inputs->config;
	check->inputs = *inputs;
	check->loop = loop;
	check->ended = ended;
	check->owner = owner;
	check->since = run_began(&inputs->run);
	check->progress_at = check->run_progress_at = check->scanned_at = uv_now(loop);
	uv_timer_init(loop, &check->timer);
	bool possible = template_topic_may_match(config->publisher.topic, config->consumer.topic);
	uv_timer_start(&check->timer, possible ? tick : cannot_match, 0, TICK_MS);
	return check;
}

void count_check_stop(struct count_check *check)
{
	check->stopping = true;
	if (!check->running)
		end(check, false);
}
