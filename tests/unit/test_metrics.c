/* metrics*.c: the sums add up, as JSON for programs and as text for people; what Prometheus reads; histograms, lag. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "metrics.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>

/* Every counter another number, so that none can stand for another. */
static struct metrics_consumer some_consumer(void)
{
	struct metrics_consumer consumer = {
	    .received = 1000000,
	    .recovered_from_spool = 1000,
	    .stored = 900000,
	    .duplicates = 11,
	    .spooled = 222,
	    .dropped = {[METRICS_HOLD_LIMIT] = 3333, [METRICS_SHUTDOWN] = 4},
	    .returned = {[METRICS_HOLD_LIMIT] = 50000, [METRICS_SHUTDOWN] = 77},
	    .truncated = 8,
	    .redelivered = 9999,
	    .id_fallbacks = 66,
	    .received_qos0 = 44,
	    .batches = 1234,
	    .largest_batch = 4096,
	};
	consumer.dead_lettered[JSON_SYNTAX] = 500;
	consumer.dead_lettered[DOCUMENT_TOPIC_UTF8] = 60;
	consumer.dead_lettered[DOCUMENT_UNIQUE_INDEX] = 7;
	return consumer;
}

static const struct metrics_publisher some_publisher = {
    .generated = 5000, .acked = 4000, .failed = 300, .skipped = 20, .no_subscribers = 1};
static const struct metrics_loop some_loop = {.longest_iteration_us = 12345, .iterations = 678};

static cJSON *parse_sums(const struct metrics_consumer *consumer, const struct metrics_publisher *publisher,
                         const struct metrics_loop *loop)
{
	char *text = metrics_sums(consumer, publisher, loop, true);
	/* one object on one line */
	assert_ptr_equal(strchr(text, '\n'), text + strlen(text) - 1);
	cJSON *root = cJSON_ParseWithOpts(text, NULL, true);
	if (root == NULL)
		fail_msg("not JSON: %s", text);
	assert_int_equal(cJSON_GetArraySize(root), 1);
	cJSON *sums = cJSON_DetachItemFromObjectCaseSensitive(root, "sums");
	assert_true(cJSON_IsObject(sums));
	cJSON_Delete(root);
	free(text);
	return sums;
}

/* A number by its path: "consumer.dropped_by_cause.shutdown". */
static double number(const cJSON *sums, const char *path)
{
	char name[64];
	for (const char *rest = path; rest != NULL;) {
		size_t length = strcspn(rest, ".");
		snprintf(name, sizeof name, "%.*s", (int)length, rest);
		sums = cJSON_GetObjectItemCaseSensitive(sums, name);
		rest = rest[length] == '.' ? rest + length + 1 : NULL;
	}
	if (!cJSON_IsNumber(sums))
		fail_msg("no number %s", path);
	return sums->valuedouble;
}

static void assert_number(const cJSON *sums, const char *path, double expected)
{
	if (number(sums, path) != expected)
		fail_msg("%s is %f, not %f", path, number(sums, path), expected);
}

static void assert_adds_up(const cJSON *sums)
{
	static const char *const ways[] = {"stored",  "duplicates", "dead_lettered", "spooled",
	                                   "dropped", "returned",   "in_flight"};
	double went = 0;
	for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
		char path[64];
		snprintf(path, sizeof path, "consumer.%s", ways[i]);
		went += number(sums, path);
	}
	assert_true(number(sums, "consumer.received") + number(sums, "consumer.recovered_from_spool") == went);
}

static void totals(void **state)
{
	static const uint64_t counters[] = {1, 20, 300, UINT64_C(1) << 40};
	assert_int_equal(metrics_total(counters, 0), 0);
	assert_int_equal(metrics_total(counters, 1), 1);
	assert_int_equal(metrics_total(counters, 4), (UINT64_C(1) << 40) + 321);
}

static void in_flight_is_what_is_in_no_other_term(void **state)
{
	struct metrics_consumer consumer = {0};
	assert_int_equal(metrics_in_flight(&consumer), 0);
	consumer.received = 100;
	assert_int_equal(metrics_in_flight(&consumer), 100);
	consumer.recovered_from_spool = 10;
	assert_int_equal(metrics_in_flight(&consumer), 110);
	uint64_t *const terms[] = {&consumer.stored,
	                           &consumer.duplicates,
	                           &consumer.spooled,
	                           &consumer.dead_lettered[0],
	                           &consumer.dead_lettered[DOCUMENT_REASONS - 1],
	                           &consumer.dropped[0],
	                           &consumer.dropped[METRICS_CAUSES - 1],
	                           &consumer.returned[0],
	                           &consumer.returned[METRICS_CAUSES - 1]};
	for (uint64_t i = 0; i < sizeof terms / sizeof *terms; i++) {
		*terms[i] = i + 1;
		assert_int_equal(metrics_in_flight(&consumer), 110 - (i + 1) * (i + 2) / 2);
	}
	/* of messages that another term counts */
	consumer.truncated = consumer.redelivered = consumer.received_qos0 = consumer.batches = consumer.largest_batch =
	    consumer.id_fallbacks = 9;
	assert_int_equal(metrics_in_flight(&consumer), 110 - 45);
}

static void unacknowledged(void **state)
{
	assert_int_equal(metrics_unacknowledged(&some_publisher), 700);
	struct metrics_publisher none = {0};
	assert_int_equal(metrics_unacknowledged(&none), 0);
}

static void every_sum_of_the_consumer(void **state)
{
	struct metrics_consumer consumer = some_consumer();
	cJSON *sums = parse_sums(&consumer, NULL, &some_loop);
	assert_adds_up(sums);
	assert_number(sums, "consumer.received", 1000000);
	assert_number(sums, "consumer.recovered_from_spool", 1000);
	assert_number(sums, "consumer.stored", 900000);
	assert_number(sums, "consumer.duplicates", 11);
	assert_number(sums, "consumer.spooled", 222);
	assert_number(sums, "consumer.dead_lettered", 567);
	assert_number(sums, "consumer.dropped", 3337);
	assert_number(sums, "consumer.returned", 50077);
	assert_number(sums, "consumer.in_flight", (double)metrics_in_flight(&consumer));
	assert_number(sums, "consumer.truncated", 8);
	assert_number(sums, "consumer.redelivered", 9999);
	assert_number(sums, "consumer.id_fallbacks", 66);
	assert_number(sums, "consumer.received_qos0", 44);
	assert_number(sums, "consumer.batches", 1234);
	assert_number(sums, "consumer.largest_batch", 4096);
	assert_null(cJSON_GetObjectItemCaseSensitive(sums, "publisher"));
	cJSON_Delete(sums);
}

static void causes_that_occurred_are_told_apart(void **state)
{
	struct metrics_consumer consumer = some_consumer();
	cJSON *sums = parse_sums(&consumer, NULL, &some_loop);
	assert_number(sums, "consumer.dead_lettered_by_reason.invalid_json", 500);
	assert_number(sums, "consumer.dead_lettered_by_reason.topic_not_utf8", 60);
	assert_number(sums, "consumer.dead_lettered_by_reason.unique_index", 7);
	assert_number(sums, "consumer.dropped_by_cause.hold_limit", 3333);
	assert_number(sums, "consumer.dropped_by_cause.shutdown", 4);
	assert_number(sums, "consumer.returned_by_cause.hold_limit", 50000);
	assert_number(sums, "consumer.returned_by_cause.shutdown", 77);
	const cJSON *part = cJSON_GetObjectItemCaseSensitive(sums, "consumer");
	assert_int_equal(cJSON_GetArraySize(cJSON_GetObjectItemCaseSensitive(part, "dead_lettered_by_reason")), 3);
	assert_int_equal(cJSON_GetArraySize(cJSON_GetObjectItemCaseSensitive(part, "dropped_by_cause")), 2);
	assert_int_equal(cJSON_GetArraySize(cJSON_GetObjectItemCaseSensitive(part, "returned_by_cause")), 2);
	cJSON_Delete(sums);
}

/* Each reason shows under its own name. */
static void every_reason(void **state)
{
	for (int reason = 1; reason < DOCUMENT_REASONS; reason++) {
		struct metrics_consumer consumer = {.received = 5};
		consumer.dead_lettered[reason] = 5;
		char path[128];
		snprintf(path, sizeof path, "consumer.dead_lettered_by_reason.%s",
		         document_reason_name((enum document_reason)reason));
		cJSON *sums = parse_sums(&consumer, NULL, &some_loop);
		assert_number(sums, path, 5);
		assert_number(sums, "consumer.in_flight", 0);
		cJSON_Delete(sums);
	}
}

static void every_sum_of_the_publisher(void **state)
{
	cJSON *sums = parse_sums(NULL, &some_publisher, &some_loop);
	assert_number(sums, "publisher.generated", 5000);
	assert_number(sums, "publisher.acked", 4000);
	assert_number(sums, "publisher.failed", 300);
	assert_number(sums, "publisher.unacknowledged", 700);
	assert_number(sums, "publisher.skipped", 20);
	assert_number(sums, "publisher.no_subscribers", 1);
	assert_null(cJSON_GetObjectItemCaseSensitive(sums, "consumer"));
	cJSON_Delete(sums);
}

static void the_count_check(void **state)
{
	struct metrics_publisher publisher = some_publisher;
	cJSON *sums = parse_sums(NULL, &publisher, &some_loop);
	assert_null(cJSON_GetObjectItemCaseSensitive(sums, "check"));
	cJSON_Delete(sums);
	publisher.check = (struct metrics_check){
	    .made = 3, .generated = 100, .acked = 99, .distinct = 90, .duplicates = 7, .missing = 8};
	sums = parse_sums(NULL, &publisher, &some_loop);
	assert_number(sums, "check.generated", 100);
	assert_number(sums, "check.acked", 99);
	assert_number(sums, "check.distinct", 90);
	assert_number(sums, "check.duplicates", 7);
	assert_number(sums, "check.missing", 8);
	assert_number(sums, "publisher.generated", 5000);
	cJSON_Delete(sums);
}

static void the_loop_is_always_told(void **state)
{
	cJSON *sums = parse_sums(NULL, NULL, &some_loop);
	assert_int_equal(cJSON_GetArraySize(sums), 1);
	assert_true(number(sums, "loop.longest_iteration_ms") > 12.344);
	assert_true(number(sums, "loop.longest_iteration_ms") < 12.346);
	assert_number(sums, "loop.iterations", 678);
	cJSON_Delete(sums);
}

/* Months of a busy service: counts are exact, not 1e+15. */
static void large_counts_are_exact(void **state)
{
	struct metrics_consumer consumer = {.received = UINT64_C(123456789012345), .stored = UINT64_C(123456789012344)};
	struct metrics_publisher publisher = {.generated = UINT64_C(1000000000000001)};
	char *text = metrics_sums(&consumer, &publisher, &some_loop, true);
	assert_non_null(strstr(text, "\"received\":123456789012345,"));
	assert_non_null(strstr(text, "\"stored\":123456789012344,"));
	assert_non_null(strstr(text, "\"in_flight\":1,"));
	assert_non_null(strstr(text, "\"generated\":1000000000000001,"));
	free(text);
	text = metrics_sums(&consumer, &publisher, &some_loop, false);
	assert_non_null(strstr(text, " 123456789012345\n"));
	assert_non_null(strstr(text, " 1000000000000001\n"));
	free(text);
}

/* ---- text ---- */

static void assert_line(const char *text, const char *line)
{
	char wanted[160];
	snprintf(wanted, sizeof wanted, "\n%s\n", line);
	if (strstr(text, wanted) == NULL && strncmp(text, wanted + 1, strlen(wanted) - 1) != 0)
		fail_msg("no line '%s' in:\n%s", line, text);
}

static void text_for_people(void **state)
{
	struct metrics_consumer consumer = some_consumer();
	char *text = metrics_sums(&consumer, &some_publisher, &some_loop, false);
	assert_int_equal(text[strlen(text) - 1], '\n');
	assert_null(strchr(text, '{'));
	assert_line(text, "publisher");
	assert_line(text, "  generated              5000");
	assert_line(text, "  unacknowledged         700");
	assert_line(text, "consumer");
	assert_line(text, "  received               1000000");
	assert_line(text, "  recovered_from_spool   1000");
	assert_line(text, "  dead_lettered          567");
	assert_line(text, "  dead_lettered_by_reason invalid_json 500");
	assert_line(text, "  returned_by_cause      hold_limit 50000");
	assert_line(text, "  returned_by_cause      shutdown 77");
	assert_line(text, "loop");
	assert_line(text, "  longest_iteration_ms   12.3");
	assert_line(text, "  iterations             678");
	free(text);
}

static void text_of_the_parts_that_run(void **state)
{
	struct metrics_consumer consumer = {0};
	char *text = metrics_sums(&consumer, NULL, &some_loop, false);
	assert_line(text, "consumer");
	assert_line(text, "  received               0");
	assert_null(strstr(text, "publisher"));
	assert_null(strstr(text, "by_cause"));
	free(text);
	text = metrics_sums(NULL, &some_publisher, &some_loop, false);
	assert_null(strstr(text, "consumer"));
	assert_line(text, "  acked                  4000");
	free(text);
}

/* ---- histograms ---- */

static void a_histogram_counts_each_time_once(void **state)
{
	static const struct {
		uint64_t us;
		int bucket;
	} cases[] = {{0, 0},      {1, 0},     {500, 0},   {501, 1},       {1000, 1},      {1001, 2},
	             {2000, 2},   {64000, 7}, {64001, 8}, {65536000, 17}, {65536001, 18}, {UINT64_C(1) << 50, 18},
	             {300000, 10}};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		struct metrics_histogram histogram = {0};
		metrics_observe(&histogram, cases[i].us);
		for (int bucket = 0; bucket <= METRICS_BUCKETS; bucket++)
			if (histogram.counts[bucket] != (bucket == cases[i].bucket))
				fail_msg("%llu us: %llu in bucket %d", (unsigned long long)cases[i].us,
				         (unsigned long long)histogram.counts[bucket], bucket);
		assert_true(histogram.sum_us == cases[i].us);
		assert_int_equal(metrics_observations(&histogram), 1);
	}
}

static void a_histogram_adds_up(void **state)
{
	struct metrics_histogram histogram = {0};
	for (uint64_t us = 1; us <= 1000; us++)
		metrics_observe(&histogram, us * 100);
	assert_int_equal(metrics_observations(&histogram), 1000);
	assert_int_equal(histogram.sum_us, 100 * 1000 * 1001 / 2);
	assert_int_equal(histogram.counts[0], 5);  /* 0.1 to 0.5 ms */
	assert_int_equal(histogram.counts[1], 5);  /* to 1 ms */
	assert_int_equal(histogram.counts[2], 10); /* to 2 ms */
	assert_int_equal(histogram.counts[METRICS_BUCKETS], 0);
}

/* ---- the loop ---- */

static void the_lag_is_remembered_for_a_minute(void **state)
{
	struct metrics_loop loop = {0};
	const uint64_t start = UINT64_C(123456789) * METRICS_SLICE_MS; /* the clock counts since the machine began */
	assert_int_equal(metrics_loop_recent(&loop, start), 0);
	metrics_loop_turn(&loop, 100, start);
	metrics_loop_turn(&loop, 9000, start + 1);
	metrics_loop_turn(&loop, 50, start + 2);
	assert_int_equal(metrics_loop_recent(&loop, start + 3), 9000);
	metrics_loop_turn(&loop, 700, start + 20000);
	metrics_loop_turn(&loop, 7, start + 40000);
	assert_int_equal(metrics_loop_recent(&loop, start + 59999), 9000);
	assert_int_equal(metrics_loop_recent(&loop, start + 60000), 700);
	metrics_loop_turn(&loop, 8, start + 60000);
	assert_int_equal(metrics_loop_recent(&loop, start + 79999), 700);
	assert_int_equal(metrics_loop_recent(&loop, start + 80000), 8);
	assert_int_equal(metrics_loop_recent(&loop, start + 1000000), 0); /* a loop that only waited */
	assert_int_equal(loop.longest_iteration_us, 9000);
	assert_int_equal(loop.iterations, 6);
}

/* ---- Prometheus ---- */

static char *prometheus(const struct metrics_consumer *consumer, const struct metrics_publisher *publisher)
{
	static const struct metrics_connection connections[] = {{"consumer", true}, {"publisher", false}};
	static const uint64_t dropped = 17;
	struct metrics_view view = {
	    .version = "1.2.3",
	    .now_ms = 1700000100000,
	    .started_ms = 1700000000123,
	    .consumer = consumer,
	    .publisher = publisher,
	    .loop = &some_loop,
	    .loop_recent_us = 250,
	    .connections = connections,
	    .connection_count = 2,
	    .broker_dropped = consumer != NULL ? &dropped : NULL,
	    .resident_bytes = 4096,
	    .cpu_us = 3000001,
	};
	return metrics_prometheus(&view);
}

static void prometheus_has_every_term(void **state)
{
	struct metrics_consumer consumer = some_consumer();
	consumer.connections = 3;
	consumer.connections_up = 2;
	consumer.database_up = true;
	consumer.spool_state = METRICS_SPOOL_FULL;
	consumer.spool_messages = 5;
	consumer.spool_bytes = 6000;
	consumer.spool_max_bytes = 7000;
	consumer.spool_oldest_ms = 1700000100000 - 61500;
	char *text = prometheus(&consumer, &some_publisher);
	static const char *const lines[] = {
	    "build_info{version=\"1.2.3\"} 1",
	    "start_time_seconds 1700000000.123000",
	    "cpu_seconds_total 3.000001",
	    "resident_memory_bytes 4096",
	    "loop_lag_seconds 0.000250",
	    "loop_lag_max_seconds 0.012345",
	    "loop_iterations_total 678",
	    "connection_up{connection=\"consumer\"} 1",
	    "connection_up{connection=\"publisher\"} 0",
	    "broker_dropped_messages 17",
	    "received_total 1000000",
	    "recovered_from_spool_total 1000",
	    "stored_total 900000",
	    "duplicates_total 11",
	    "dead_lettered_total{reason=\"invalid_json\"} 500",
	    "dead_lettered_total{reason=\"unique_index\"} 7",
	    "dead_lettered_total{reason=\"too_deep\"} 0",
	    "spooled_total 222",
	    "dropped_total{cause=\"hold_limit\"} 3333",
	    "dropped_total{cause=\"shutdown\"} 4",
	    "returned_total{cause=\"hold_limit\"} 50000",
	    "returned_total{cause=\"shutdown\"} 77",
	    "in_flight 46786",
	    "received_qos0_total 44",
	    "redelivered_total 9999",
	    "truncated_total 8",
	    "batches_total 1234",
	    "largest_batch 4096",
	    "database_up 1",
	    "consumer_connections 3",
	    "consumer_connections_up 2",
	    "spool_state{state=\"full\"} 1",
	    "spool_state{state=\"ok\"} 0",
	    "spool_messages 5",
	    "spool_bytes 6000",
	    "spool_max_bytes 7000",
	    "spool_oldest_age_seconds 61.500000",
	    "publisher_generated_total 5000",
	    "publisher_acked_total 4000",
	    "publisher_failed_total 300",
	    "publisher_unacknowledged 700",
	    "publisher_skipped_total 20",
	    "publisher_no_subscribers_total 1",
	};
	for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
		char line[128];
		snprintf(line, sizeof line, "mqtt2mongo_%s", lines[i]);
		assert_line(text, line);
	}
	free(text);
}

static void prometheus_of_the_parts_that_run(void **state)
{
	char *text = prometheus(NULL, &some_publisher);
	assert_null(strstr(text, "received_total"));
	assert_null(strstr(text, "spool"));
	assert_null(strstr(text, "broker_dropped")); /* not known */
	assert_line(text, "mqtt2mongo_publisher_acked_total 4000");
	free(text);
	struct metrics_consumer consumer = {0};
	text = prometheus(&consumer, NULL);
	assert_null(strstr(text, "publisher_"));
	assert_line(text, "mqtt2mongo_received_total 0");
	assert_line(text, "mqtt2mongo_spool_oldest_age_seconds 0.000000");
	free(text);
}

static void prometheus_histograms_are_cumulative(void **state)
{
	struct metrics_consumer consumer = {0};
	metrics_observe(&consumer.store_latency, 400);
	metrics_observe(&consumer.store_latency, 1500);
	metrics_observe(&consumer.store_latency, 1600);
	metrics_observe(&consumer.store_latency, 99000000);
	char *text = prometheus(&consumer, NULL);
	assert_line(text, "# TYPE mqtt2mongo_store_latency_seconds histogram");
	assert_line(text, "mqtt2mongo_store_latency_seconds_bucket{le=\"0.0005\"} 1");
	assert_line(text, "mqtt2mongo_store_latency_seconds_bucket{le=\"0.001\"} 1");
	assert_line(text, "mqtt2mongo_store_latency_seconds_bucket{le=\"0.002\"} 3");
	assert_line(text, "mqtt2mongo_store_latency_seconds_bucket{le=\"65.536\"} 3");
	assert_line(text, "mqtt2mongo_store_latency_seconds_bucket{le=\"+Inf\"} 4");
	assert_line(text, "mqtt2mongo_store_latency_seconds_count 4");
	assert_line(text, "mqtt2mongo_store_latency_seconds_sum 99.003500");
	free(text);
}

static void prometheus_escapes_labels(void **state)
{
	struct metrics_view view = {.version = "a\"b\\c\nd\t\xc3\xa4", .loop = &some_loop};
	char *text = metrics_prometheus(&view);
	assert_line(text, "mqtt2mongo_build_info{version=\"a\\\"b\\\\c\\nd\t\xc3\xa4\"} 1");
	free(text);
}

/* Each sample belongs to the family above it, and each family is described once. */
static void prometheus_describes_every_family(void **state)
{
	struct metrics_consumer consumer = some_consumer();
	char *text = prometheus(&consumer, &some_publisher), *rest = NULL, name[96] = "", type[16] = "";
	int families = 0;
	for (char *line = strtok_r(text, "\n", &rest); line != NULL; line = strtok_r(NULL, "\n", &rest)) {
		if (strncmp(line, "# HELP ", 7) == 0) {
			assert_int_equal(sscanf(line, "# HELP %95s", name), 1);
			line = strtok_r(NULL, "\n", &rest);
			char same[96];
			assert_int_equal(sscanf(line, "# TYPE %95s %15s", same, type), 2);
			assert_string_equal(same, name);
			assert_int_equal(strncmp(name, "mqtt2mongo_", 11), 0);
			size_t length = strlen(name);
			assert_int_equal(strcmp(type, "counter") == 0, strcmp(name + length - 6, "_total") == 0);
			families++;
		} else if (strncmp(line, name, strlen(name)) != 0) {
			fail_msg("%s is not of the family %s", line, name);
		}
	}
	assert_true(families > 30);
	free(text);
}

static void batches_and_the_largest(void **state)
{
	struct metrics_consumer consumer = {0};
	metrics_count_batch(&consumer, 5);
	metrics_count_batch(&consumer, 4096);
	metrics_count_batch(&consumer, 1);
	assert_int_equal(consumer.batches, 3);
	assert_int_equal(consumer.largest_batch, 4096);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	    cmocka_unit_test(batches_and_the_largest),
	    cmocka_unit_test(totals),
	    cmocka_unit_test(in_flight_is_what_is_in_no_other_term),
	    cmocka_unit_test(unacknowledged),
	    cmocka_unit_test(every_sum_of_the_consumer),
	    cmocka_unit_test(causes_that_occurred_are_told_apart),
	    cmocka_unit_test(every_reason),
	    cmocka_unit_test(every_sum_of_the_publisher),
	    cmocka_unit_test(the_count_check),
	    cmocka_unit_test(the_loop_is_always_told),
	    cmocka_unit_test(large_counts_are_exact),
	    cmocka_unit_test(text_for_people),
	    cmocka_unit_test(text_of_the_parts_that_run),
	    cmocka_unit_test(a_histogram_counts_each_time_once),
	    cmocka_unit_test(a_histogram_adds_up),
	    cmocka_unit_test(the_lag_is_remembered_for_a_minute),
	    cmocka_unit_test(prometheus_has_every_term),
	    cmocka_unit_test(prometheus_of_the_parts_that_run),
	    cmocka_unit_test(prometheus_histograms_are_cumulative),
	    cmocka_unit_test(prometheus_escapes_labels),
	    cmocka_unit_test(prometheus_describes_every_family),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
