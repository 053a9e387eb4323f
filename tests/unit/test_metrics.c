/* metrics.c: the sums add up, as JSON for programs and as text for people. */
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
	consumer.truncated = consumer.redelivered = consumer.batches = consumer.largest_batch = 9;
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
	char wanted[128];
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

int main(void)
{
	const struct CMUnitTest tests[] = {
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
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
