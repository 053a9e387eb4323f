/* See metrics.h. */
#include "metrics.h"

#include "letters.h"
#include "memory.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const cause_names[METRICS_CAUSES] = {"hold_limit", "shutdown", "overload", "refused"};

uint64_t metrics_total(const uint64_t *counters, int count)
{
	uint64_t total = 0;
	for (int i = 0; i < count; i++)
		total += counters[i];
	return total;
}

static uint64_t settled(const struct metrics_consumer *consumer)
{
	return consumer->stored + consumer->duplicates + metrics_total(consumer->dead_lettered, DOCUMENT_REASONS) +
	       consumer->spooled + metrics_total(consumer->dropped, METRICS_CAUSES) +
	       metrics_total(consumer->returned, METRICS_CAUSES);
}

void metrics_count_outcome(struct metrics_consumer *consumer, const struct batch *batch,
                           const struct batch_message *message)
{
	switch ((enum batch_outcome)message->outcome) {
	case BATCH_STORED:
		consumer->stored++;
		consumer->id_fallbacks += message->id_fallback;
		break;
	case BATCH_DUPLICATE:
		consumer->duplicates++;
		break;
	case BATCH_DEAD_LETTERED:
		consumer->dead_lettered[message->reason]++;
		consumer->truncated += batch_is_cut(message);
		if (consumer->letters != NULL)
			letters_note(consumer->letters, batch, message);
		break;
	case BATCH_OPEN:
		break;
	}
}

void metrics_count_batch(struct metrics_consumer *consumer, size_t messages)
{
	consumer->batches++;
	if (messages > consumer->largest_batch)
		consumer->largest_batch = messages;
}

uint64_t metrics_in_flight(const struct metrics_consumer *consumer)
{
	return consumer->received + consumer->recovered_from_spool - settled(consumer);
}

uint64_t metrics_unacknowledged(const struct metrics_publisher *publisher)
{
	return publisher->generated - publisher->acked - publisher->failed;
}

void metrics_observe(struct metrics_histogram *histogram, uint64_t microseconds)
{
	int bucket = 0;
	for (uint64_t limit = METRICS_FIRST_US; microseconds > limit && bucket < METRICS_BUCKETS; limit *= 2)
		bucket++;
	histogram->counts[bucket]++;
	histogram->sum_us += microseconds;
}

uint64_t metrics_observations(const struct metrics_histogram *histogram)
{
	return metrics_total(histogram->counts, METRICS_BUCKETS + 1);
}

/* Forget the slices that are older than a minute by now. */
static void turn_slices(struct metrics_loop *loop, uint64_t slice)
{
	if (slice >= loop->slice + METRICS_SLICES)
		loop->slice = slice - METRICS_SLICES;
	while (loop->slice < slice)
		loop->slices_us[++loop->slice % METRICS_SLICES] = 0;
}

void metrics_loop_turn(struct metrics_loop *loop, uint64_t busy_us, uint64_t now_ms)
{
	turn_slices(loop, now_ms / METRICS_SLICE_MS);
	uint64_t *newest = &loop->slices_us[loop->slice % METRICS_SLICES];
	if (busy_us > *newest)
		*newest = busy_us;
	if (busy_us > loop->longest_iteration_us)
		loop->longest_iteration_us = busy_us;
	loop->iterations++;
}

uint64_t metrics_loop_recent(const struct metrics_loop *loop, uint64_t now_ms)
{
	struct metrics_loop now = *loop;
	uint64_t longest = 0;
	turn_slices(&now, now_ms / METRICS_SLICE_MS);
	for (int i = 0; i < METRICS_SLICES; i++)
		if (now.slices_us[i] > longest)
			longest = now.slices_us[i];
	return longest;
}

static void add(cJSON *object, const char *name, uint64_t value)
{
	cJSON_AddNumberToObject(object, name, (double)value);
}

/* { "reason": count } of the counters that are not 0. */
static void add_causes(cJSON *object, const char *name, const uint64_t *counters, int count,
                       const char *(*name_of)(int))
{
	cJSON *causes = cJSON_AddObjectToObject(object, name);
	for (int i = 0; i < count; i++)
		if (counters[i] != 0)
			add(causes, name_of(i), counters[i]);
}

static const char *reason_name(int reason)
{
	return document_reason_name((enum document_reason)reason);
}

static const char *cause_name(int cause)
{
	return cause_names[cause];
}

const char *metrics_cause_name(enum metrics_cause cause)
{
	return cause_names[cause];
}

const char *metrics_spool_name(enum metrics_spool state)
{
	static const char *const names[] = {"off", "ok", "full", "failed"};
	return names[state];
}

static void add_consumer(cJSON *sums, const struct metrics_consumer *consumer)
{
	cJSON *object = cJSON_AddObjectToObject(sums, "consumer");
	add(object, "received", consumer->received);
	add(object, "recovered_from_spool", consumer->recovered_from_spool);
	add(object, "stored", consumer->stored);
	add(object, "duplicates", consumer->duplicates);
	add(object, "dead_lettered", metrics_total(consumer->dead_lettered, DOCUMENT_REASONS));
	add(object, "spooled", consumer->spooled);
	add(object, "dropped", metrics_total(consumer->dropped, METRICS_CAUSES));
	add(object, "returned", metrics_total(consumer->returned, METRICS_CAUSES));
	add(object, "in_flight", metrics_in_flight(consumer));
	add_causes(object, "dead_lettered_by_reason", consumer->dead_lettered, DOCUMENT_REASONS, reason_name);
	add_causes(object, "dropped_by_cause", consumer->dropped, METRICS_CAUSES, cause_name);
	add_causes(object, "returned_by_cause", consumer->returned, METRICS_CAUSES, cause_name);
	add(object, "truncated", consumer->truncated);
	add(object, "redelivered", consumer->redelivered);
	add(object, "id_fallbacks", consumer->id_fallbacks);
	add(object, "received_qos0", consumer->received_qos0);
	add(object, "batches", consumer->batches);
	add(object, "largest_batch", consumer->largest_batch);
}

static void add_publisher(cJSON *sums, const struct metrics_publisher *publisher)
{
	cJSON *object = cJSON_AddObjectToObject(sums, "publisher");
	add(object, "generated", publisher->generated);
	add(object, "acked", publisher->acked);
	add(object, "failed", publisher->failed);
	add(object, "unacknowledged", metrics_unacknowledged(publisher));
	add(object, "skipped", publisher->skipped);
	add(object, "no_subscribers", publisher->no_subscribers);
}

static void add_check(cJSON *sums, const struct metrics_check *check)
{
	cJSON *object = cJSON_AddObjectToObject(sums, "check");
	add(object, "generated", check->generated);
	add(object, "acked", check->acked);
	add(object, "distinct", check->distinct);
	add(object, "duplicates", check->duplicates);
	add(object, "missing", check->missing);
}

cJSON *metrics_sums_tree(const struct metrics_consumer *consumer, const struct metrics_publisher *publisher,
                         const struct metrics_loop *loop)
{
	cJSON *root = cJSON_CreateObject();
	cJSON *sums = cJSON_AddObjectToObject(root, "sums");
	if (publisher != NULL)
		add_publisher(sums, publisher);
	if (consumer != NULL)
		add_consumer(sums, consumer);
	if (publisher != NULL && publisher->check.made > 0)
		add_check(sums, &publisher->check);
	cJSON *object = cJSON_AddObjectToObject(sums, "loop");
	cJSON_AddNumberToObject(object, "longest_iteration_ms", (double)loop->longest_iteration_us / 1000.0);
	add(object, "iterations", loop->iterations);
	return root;
}

/* One part as lines of "name value", nested objects on one line. */
static void print_part(FILE *out, const cJSON *part)
{
	fprintf(out, "%s\n", part->string);
	const cJSON *item;
	cJSON_ArrayForEach (item, part) {
		if (cJSON_IsNumber(item)) {
			fprintf(out, "  %-22s %.*f\n", item->string,
			        item->valuedouble == (double)(int64_t)item->valuedouble ? 0 : 1, item->valuedouble);
			continue;
		}
		const cJSON *cause;
		cJSON_ArrayForEach (cause, item) {
			fprintf(out, "  %-22s %s %.0f\n", item->string, cause->string, cause->valuedouble);
		}
	}
}

char *metrics_text(const cJSON *parts)
{
	char *text = NULL;
	size_t size = 0;
	FILE *out = open_memstream(&text, &size);
	const cJSON *part;
	cJSON_ArrayForEach (part, parts) {
		print_part(out, part);
	}
	fclose(out);
	return text;
}

char *metrics_sums(const struct metrics_consumer *consumer, const struct metrics_publisher *publisher,
                   const struct metrics_loop *loop, bool json)
{
	cJSON *root = metrics_sums_tree(consumer, publisher, loop);
	char *text;
	if (json) {
		char *printed = cJSON_PrintUnformatted(root);
		text = memory_format("%s\n", printed);
		cJSON_free(printed);
	} else {
		text = metrics_text(cJSON_GetObjectItemCaseSensitive(root, "sums"));
	}
	cJSON_Delete(root);
	return text;
}
