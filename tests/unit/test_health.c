/* health.c: ready or not, for each state of the parts, the database and the spool; and the status as JSON. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "health.h"

#include <cjson/cJSON.h>
#include <stdlib.h>
#include <string.h>

static struct metrics_consumer consumer;
static struct metrics_publisher publisher;
static struct metrics_loop loop;
static struct metrics_connection connections[2];

/* Both parts at work. */
static struct health at_work(void)
{
	consumer = (struct metrics_consumer){.connections = 2, .connections_up = 2, .database_up = true};
	publisher = (struct metrics_publisher){0};
	connections[0] = (struct metrics_connection){"consumer", true};
	connections[1] = (struct metrics_connection){"publisher", true};
	return (struct health){.view = {.version = "9.8.7",
	                                .now_ms = 1700000010500,
	                                .started_ms = 1700000000000,
	                                .consumer = &consumer,
	                                .publisher = &publisher,
	                                .loop = &loop,
	                                .connections = connections,
	                                .connection_count = 2},
	                       .consumer_status = "consuming",
	                       .publisher_status = "publishing"};
}

static void assert_readiness(const struct health *health, bool expected, const char *text)
{
	bool ready = !expected;
	char *said = health_readiness(health, &ready), *line;
	assert_int_equal(ready, expected);
	assert_int_equal(asprintf(&line, "{\"ready\":%s,\"reasons\":[%s]}\n", expected ? "true" : "false", text) > 0,
	                 1);
	assert_string_equal(said, line);
	free(line);
	free(said);
}

static void ready_when_all_is_well(void **state)
{
	struct health health = at_work();
	assert_readiness(&health, true, "");
	health.publisher_status = NULL;
	connections[1].up = false;
	assert_readiness(&health, true, ""); /* the consumer alone */
	health = at_work();
	health.consumer_status = NULL;
	consumer.connections_up = 0;
	consumer.database_up = false;
	assert_readiness(&health, true, ""); /* the publisher alone */
}

static void database_and_spool(void **state)
{
	static const struct {
		bool database_up;
		enum metrics_spool spool;
		bool ready;
		const char *reasons;
	} cases[] = {
	    {true, METRICS_SPOOL_OFF, true, ""},
	    {true, METRICS_SPOOL_OK, true, ""},
	    {true, METRICS_SPOOL_FULL, true, "\"the spool is full\""},
	    {true, METRICS_SPOOL_FAILED, true, "\"the spool cannot be written\""},
	    {false, METRICS_SPOOL_OFF, false, "\"MongoDB does not answer\""},
	    {false, METRICS_SPOOL_OK, true, "\"MongoDB does not answer, spooling\""},
	    {false, METRICS_SPOOL_FULL, false, "\"MongoDB does not answer and the spool is full\""},
	    {false, METRICS_SPOOL_FAILED, false, "\"MongoDB does not answer and the spool cannot be written\""},
	};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		struct health health = at_work();
		consumer.database_up = cases[i].database_up;
		consumer.spool_state = cases[i].spool;
		assert_readiness(&health, cases[i].ready, cases[i].reasons);
	}
}

static void connections_that_are_down(void **state)
{
	struct health health = at_work();
	consumer.connections_up = 1;
	assert_readiness(&health, false, "\"the consumer is not connected to the broker and subscribed\"");
	consumer.connections = consumer.connections_up = 0;
	assert_readiness(&health, false, "\"the consumer is not connected to the broker and subscribed\"");
	connections[1].up = false;
	consumer.database_up = false;
	assert_readiness(&health, false,
	                 "\"the consumer is not connected to the broker and subscribed\",\"MongoDB does not answer\","
	                 "\"the publisher is not connected to the broker\"");
}

static void what_stops_is_not_ready(void **state)
{
	struct health health = at_work();
	health.stopping = true;
	assert_readiness(&health, false, "\"the service is stopping\"");
	health = at_work();
	health.consumer_stopping = true;
	assert_readiness(&health, false, "\"the consumer is stopping\"");
	health = at_work();
	health.publisher_stopping = true;
	assert_readiness(&health, false, "\"the publisher is stopping\"");
	health = at_work();
	health.consumer_status = health.publisher_status = NULL;
	assert_readiness(&health, false, "\"neither consumer nor publisher runs\"");
}

static void status_has_everything(void **state)
{
	struct health health = at_work();
	uint64_t dropped = 5;
	health.view.broker_dropped = &dropped;
	health.view.loop_recent_us = 1500;
	consumer.received = consumer.stored = 7;
	consumer.spool_state = METRICS_SPOOL_OK;
	consumer.spool_messages = 3;
	consumer.spool_oldest_ms = health.view.now_ms - 2500;
	metrics_observe(&consumer.store_latency, 2000);
	metrics_observe(&publisher.publish_latency, 1000);
	char *text = health_status(&health);
	static const char *const parts[] = {
	    "{\"version\":\"9.8.7\",\"uptime_seconds\":10.5,\"ready\":true,\"reasons\":[],",
	    ",\"consumer\":\"consuming\",\"publisher\":\"publishing\",",
	    ",\"connections\":{\"consumer\":\"up\",\"publisher\":\"up\"},",
	    "\"broker_dropped_messages\":5,",
	    "\"database\":{\"up\":true,\"mean_store_latency_ms\":2},",
	    "\"spool\":{\"state\":\"ok\",\"messages\":3,\"bytes\":0,\"max_bytes\":0,\"oldest_age_seconds\":2.5},",
	    "\"mean_publish_latency_ms\":1,",
	    "\"sums\":{\"publisher\":{\"generated\":0,",
	    "\"received\":7,",
	    "\"lag_ms\":1.5}}}\n",
	};
	for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
		if (strstr(text, parts[i]) == NULL)
			fail_msg("no %s in %s", parts[i], text);
	free(text);
}

/* Nothing has run yet. */
static void status_of_nothing(void **state)
{
	struct health health = {.view = {.version = "1", .loop = &loop}};
	char *text = health_status(&health);
	cJSON *object = cJSON_ParseWithOpts(text, NULL, true);
	assert_non_null(object);
	assert_null(cJSON_GetObjectItemCaseSensitive(object, "database"));
	assert_null(cJSON_GetObjectItemCaseSensitive(object, "broker_dropped_messages"));
	cJSON_Delete(object);
	free(text);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	    cmocka_unit_test(ready_when_all_is_well),    cmocka_unit_test(database_and_spool),
	    cmocka_unit_test(connections_that_are_down), cmocka_unit_test(what_stops_is_not_ready),
	    cmocka_unit_test(status_has_everything),     cmocka_unit_test(status_of_nothing),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
