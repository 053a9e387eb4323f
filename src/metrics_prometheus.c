/*
 * metrics_prometheus(): the counters in the Prometheus text format (version 0.0.4), for a scrape of /metrics.
 *
 * Each family is its HELP and TYPE line and then its samples. Counters end in _total and times are seconds, as the
 * format's conventions want it. Counts never pass through a double: they are exact.
 */
#include "metrics.h"

#include <inttypes.h>
#include <stdio.h>

#define PREFIX "mqtt2mongo_"

static void family(FILE *out, const char *name, const char *type, const char *help)
{
	fprintf(out, "# HELP " PREFIX "%s %s\n# TYPE " PREFIX "%s %s\n", name, help, name, type);
}

static void counter(FILE *out, const char *name, uint64_t value, const char *help)
{
	family(out, name, "counter", help);
	fprintf(out, PREFIX "%s %" PRIu64 "\n", name, value);
}

static void gauge(FILE *out, const char *name, uint64_t value, const char *help)
{
	family(out, name, "gauge", help);
	fprintf(out, PREFIX "%s %" PRIu64 "\n", name, value);
}

static void print_seconds(FILE *out, uint64_t microseconds)
{
	fprintf(out, "%" PRIu64 ".%06" PRIu64, microseconds / 1000000, microseconds % 1000000);
}

static void seconds(FILE *out, const char *name, const char *type, uint64_t microseconds, const char *help)
{
	family(out, name, type, help);
	fprintf(out, PREFIX "%s ", name);
	print_seconds(out, microseconds);
	fputc('\n', out);
}

/* One sample with one label. Backslash, quote and line feed are what the format wants escaped. */
static void labelled(FILE *out, const char *name, const char *label, const char *text, uint64_t value)
{
	fprintf(out, PREFIX "%s{%s=\"", name, label);
	for (; *text != 0; text++) {
		if (*text == '\\' || *text == '"' || *text == '\n')
			fputc('\\', out);
		fputc(*text == '\n' ? 'n' : *text, out);
	}
	fprintf(out, "\"} %" PRIu64 "\n", value);
}

static void histogram(FILE *out, const char *name, const struct metrics_histogram *values, const char *help)
{
	uint64_t below = 0, limit_us = METRICS_FIRST_US;
	family(out, name, "histogram", help);
	for (int i = 0; i < METRICS_BUCKETS; i++, limit_us *= 2) {
		below += values->counts[i];
		fprintf(out, PREFIX "%s_bucket{le=\"%g\"} %" PRIu64 "\n", name, (double)limit_us / 1e6, below);
	}
	below += values->counts[METRICS_BUCKETS];
	fprintf(out, PREFIX "%s_bucket{le=\"+Inf\"} %" PRIu64 "\n" PREFIX "%s_sum ", name, below, name);
	print_seconds(out, values->sum_us);
	fprintf(out, "\n" PREFIX "%s_count %" PRIu64 "\n", name, below);
}

static void causes(FILE *out, const char *name, const uint64_t *counters, const char *help)
{
	family(out, name, "counter", help);
	for (int i = 0; i < METRICS_CAUSES; i++)
		labelled(out, name, "cause", metrics_cause_name((enum metrics_cause)i), counters[i]);
}

static void dead_letters(FILE *out, const struct metrics_consumer *consumer)
{
	family(out, "dead_lettered_total", "counter", "Messages stored in the collection of dead letters, by reason.");
	for (int i = 1; i < DOCUMENT_REASONS; i++) /* 0: nothing is wrong */
		labelled(out, "dead_lettered_total", "reason", document_reason_name((enum document_reason)i),
		         consumer->dead_lettered[i]);
}

static void spool(FILE *out, const struct metrics_consumer *consumer, int64_t now_ms)
{
	int64_t oldest_ms = consumer->spool_oldest_ms;
	family(out, "spool_state", "gauge", "1 for the state the spool is in, 0 for the others.");
	for (int i = METRICS_SPOOL_OFF; i <= METRICS_SPOOL_FAILED; i++)
		labelled(out, "spool_state", "state", metrics_spool_name((enum metrics_spool)i),
		         consumer->spool_state == (enum metrics_spool)i);
	gauge(out, "spool_messages", consumer->spool_messages, "Messages in the spool.");
	gauge(out, "spool_bytes", consumer->spool_bytes, "What the spool takes on disk.");
	gauge(out, "spool_max_bytes", consumer->spool_max_bytes, "What the spool may take on disk.");
	seconds(out, "spool_oldest_age_seconds", "gauge",
	        oldest_ms > 0 && now_ms > oldest_ms ? (uint64_t)(now_ms - oldest_ms) * 1000 : 0,
	        "How long ago the oldest message in the spool was received; 0 when it is empty.");
}

/* The terms of the sum first, in its order. */
static void consumer_metrics(FILE *out, const struct metrics_consumer *consumer, int64_t now_ms)
{
	counter(out, "received_total", consumer->received,
	        "Messages handed over by the broker, redeliveries included.");
	counter(out, "recovered_from_spool_total", consumer->recovered_from_spool, "Messages taken out of the spool.");
	counter(out, "stored_total", consumer->stored, "Messages durable in MongoDB.");
	counter(out, "duplicates_total", consumer->duplicates, "Messages that were stored before, by their _id.");
	dead_letters(out, consumer);
	counter(out, "spooled_total", consumer->spooled, "Messages durable in the spool.");
	causes(out, "dropped_total", consumer->dropped,
	       "Messages that came at QoS 0 and could not be stored, by cause.");
	causes(out, "returned_total", consumer->returned,
	       "Messages handed back to the broker unacknowledged, by cause; they come again.");
	gauge(out, "in_flight", metrics_in_flight(consumer), "Messages that are in no other term of the sum yet.");

	counter(out, "received_qos0_total", consumer->received_qos0, "Of the messages received, those at QoS 0.");
	counter(out, "redelivered_total", consumer->redelivered, "Of the messages received, those with the DUP flag.");
	counter(out, "truncated_total", consumer->truncated, "Of the dead letters, those that are not kept whole.");
	counter(out, "batches_total", consumer->batches,
	        "Writes to MongoDB, the drain's and those that failed included.");
	gauge(out, "largest_batch", consumer->largest_batch, "The most messages in one write since the start.");
	histogram(out, "store_latency_seconds", &consumer->store_latency,
	          "Time of a batch from the receipt of its first message until all of it is durable.");
	gauge(out, "database_up", consumer->database_up, "1 when MongoDB answered the last time it was used.");
	gauge(out, "consumer_connections", (uint64_t)consumer->connections, "Connections the consumer wants.");
	gauge(out, "consumer_connections_up", (uint64_t)consumer->connections_up,
	      "Of those, how many are connected and subscribed.");
	spool(out, consumer, now_ms);
}

static void publisher_metrics(FILE *out, const struct metrics_publisher *publisher)
{
	counter(out, "publisher_generated_total", publisher->generated, "Messages made up and handed to the library.");
	counter(out, "publisher_acked_total", publisher->acked,
	        "Messages acknowledged by the broker; at QoS 0: written.");
	counter(out, "publisher_failed_total", publisher->failed, "Messages refused by the broker or the library.");
	gauge(out, "publisher_unacknowledged", metrics_unacknowledged(publisher),
	      "Messages on their way to the broker.");
	counter(out, "publisher_skipped_total", publisher->skipped, "Messages not generated in time.");
	counter(out, "publisher_no_subscribers_total", publisher->no_subscribers,
	        "Of those acknowledged, messages that nobody was subscribed to.");
	histogram(out, "publish_latency_seconds", &publisher->publish_latency,
	          "Time of a message from being published until it is acknowledged.");
}

static void connections(FILE *out, const struct metrics_view *view)
{
	family(out, "connection_up", "gauge", "1 when this part is connected to the broker.");
	for (int i = 0; i < view->connection_count; i++)
		labelled(out, "connection_up", "connection", view->connections[i].name, view->connections[i].up);
}

static void process(FILE *out, const struct metrics_view *view)
{
	family(out, "build_info", "gauge", "1, with the version as a label.");
	labelled(out, "build_info", "version", view->version, 1);
	seconds(out, "start_time_seconds", "gauge", (uint64_t)view->started_ms * 1000,
	        "When the service started, since 1970.");
	seconds(out, "cpu_seconds_total", "counter", view->cpu_us, "Processor time used, user and system.");
	gauge(out, "resident_memory_bytes", view->resident_bytes, "Resident memory.");
	seconds(out, "loop_lag_seconds", "gauge", view->loop_recent_us,
	        "The longest time in the last minute that the loop was busy without a pause.");
	seconds(out, "loop_lag_max_seconds", "gauge", view->loop->longest_iteration_us, "The same since the start.");
	counter(out, "loop_iterations_total", view->loop->iterations, "Turns of the loop.");
}

char *metrics_prometheus(const struct metrics_view *view)
{
	char *text = NULL;
	size_t size = 0;
	FILE *out = open_memstream(&text, &size);
	process(out, view);
	connections(out, view);
	if (view->broker_dropped != NULL)
		gauge(out, "broker_dropped_messages", *view->broker_dropped,
		      "Messages the broker says it has dropped since it started, for all its clients.");
	if (view->consumer != NULL)
		consumer_metrics(out, view->consumer, view->now_ms);
	if (view->publisher != NULL)
		publisher_metrics(out, view->publisher);
	fclose(out);
	return text;
}
