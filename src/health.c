/* See health.h. */
#include "health.h"

#include "memory.h"

#include <cjson/cJSON.h>
#include <stdlib.h>
#include <string.h>

static void say(cJSON *reasons, const char *reason)
{
	cJSON_AddItemToArray(reasons, cJSON_CreateString(reason));
}

/* Can a message be made durable? */
static bool can_store(const struct metrics_consumer *consumer, cJSON *reasons)
{
	static const char *const away[] = {
	    [METRICS_SPOOL_OFF] = "MongoDB does not answer",
	    [METRICS_SPOOL_OK] = "MongoDB does not answer, spooling",
	    [METRICS_SPOOL_FULL] = "MongoDB does not answer and the spool is full",
	    [METRICS_SPOOL_FAILED] = "MongoDB does not answer and the spool cannot be written",
	};
	if (!consumer->database_up)
		say(reasons, away[consumer->spool_state]);
	else if (consumer->spool_state == METRICS_SPOOL_FULL)
		say(reasons, "the spool is full");
	else if (consumer->spool_state == METRICS_SPOOL_FAILED)
		say(reasons, "the spool cannot be written");
	if (consumer->database_refuses[STORE_MESSAGES])
		say(reasons, "MongoDB refuses documents in the collection consumer.collection, see the log");
	if (consumer->database_refuses[STORE_DEAD_LETTERS])
		say(reasons, "MongoDB refuses documents in the collection consumer.dead_letter, see the log");
	bool takes = consumer->database_up && !consumer->database_refuses[STORE_MESSAGES];
	return takes || consumer->spool_state == METRICS_SPOOL_OK;
}

static bool consumer_ready(const struct health *health, cJSON *reasons)
{
	const struct metrics_consumer *consumer = health->view.consumer;
	bool subscribed = consumer->connections > 0 && consumer->connections_up == consumer->connections;
	if (health->consumer_stopping)
		say(reasons, "the consumer is stopping");
	else if (!subscribed)
		say(reasons, "the consumer is not connected to the broker and subscribed");
	bool stores = can_store(consumer, reasons);
	return subscribed && stores && !health->consumer_stopping;
}

static bool publisher_ready(const struct health *health, cJSON *reasons)
{
	bool connected = false;
	for (int i = 0; i < health->view.connection_count; i++)
		if (strcmp(health->view.connections[i].name, "publisher") == 0)
			connected = health->view.connections[i].up;
	if (health->publisher_stopping)
		say(reasons, "the publisher is stopping");
	else if (!connected)
		say(reasons, "the publisher is not connected to the broker");
	return connected && !health->publisher_stopping;
}

static bool add_readiness(const struct health *health, cJSON *object)
{
	bool consumes = health->consumer_status != NULL, publishes = health->publisher_status != NULL;
	bool ready = !health->stopping && (consumes || publishes);
	cJSON *reasons = cJSON_CreateArray();
	if (health->stopping)
		say(reasons, "the service is stopping");
	else if (!consumes && !publishes)
		say(reasons, "neither consumer nor publisher runs");
	if (consumes && !consumer_ready(health, reasons))
		ready = false;
	if (publishes && !publisher_ready(health, reasons))
		ready = false;
	cJSON_AddBoolToObject(object, "ready", ready);
	cJSON_AddItemToObject(object, "reasons", reasons);
	return ready;
}

/* One line, allocated; the object is gone. */
static char *print(cJSON *object)
{
	char *printed = cJSON_PrintUnformatted(object);
	char *line = memory_format("%s\n", printed);
	cJSON_free(printed);
	cJSON_Delete(object);
	return line;
}

char *health_readiness(const struct health *health, bool *ready)
{
	cJSON *object = cJSON_CreateObject();
	*ready = add_readiness(health, object);
	return print(object);
}

static void add_connections(cJSON *object, const struct metrics_view *view)
{
	cJSON *connections = cJSON_AddObjectToObject(object, "connections");
	for (int i = 0; i < view->connection_count; i++)
		cJSON_AddStringToObject(connections, view->connections[i].name,
		                        view->connections[i].up ? "up" : "down");
}

static void add_latency(cJSON *object, const char *name, const struct metrics_histogram *histogram)
{
	uint64_t count = metrics_observations(histogram);
	if (count > 0)
		cJSON_AddNumberToObject(object, name, (double)histogram->sum_us / (double)count / 1000);
}

static void add_consumer(cJSON *object, const struct metrics_view *view)
{
	const struct metrics_consumer *consumer = view->consumer;
	cJSON *database = cJSON_AddObjectToObject(object, "database");
	cJSON_AddBoolToObject(database, "up", consumer->database_up);
	add_latency(database, "mean_store_latency_ms", &consumer->store_latency);
	cJSON *spool = cJSON_AddObjectToObject(object, "spool");
	cJSON_AddStringToObject(spool, "state", metrics_spool_name(consumer->spool_state));
	cJSON_AddNumberToObject(spool, "messages", (double)consumer->spool_messages);
	cJSON_AddNumberToObject(spool, "bytes", (double)consumer->spool_bytes);
	cJSON_AddNumberToObject(spool, "max_bytes", (double)consumer->spool_max_bytes);
	if (consumer->spool_oldest_ms > 0)
		cJSON_AddNumberToObject(spool, "oldest_age_seconds",
		                        (double)(view->now_ms - consumer->spool_oldest_ms) / 1000);
}

static void add_sums(cJSON *object, const struct metrics_view *view)
{
	cJSON *tree = metrics_sums_tree(view->consumer, view->publisher, view->loop);
	cJSON *sums = cJSON_DetachItemFromObjectCaseSensitive(tree, "sums");
	cJSON_AddNumberToObject(cJSON_GetObjectItemCaseSensitive(sums, "loop"), "lag_ms",
	                        (double)view->loop_recent_us / 1000);
	cJSON_AddItemToObject(object, "sums", sums);
	cJSON_Delete(tree);
}

char *health_status(const struct health *health)
{
	const struct metrics_view *view = &health->view;
	cJSON *object = cJSON_CreateObject();
	cJSON_AddStringToObject(object, "version", view->version);
	cJSON_AddNumberToObject(object, "uptime_seconds", (double)(view->now_ms - view->started_ms) / 1000);
	add_readiness(health, object);
	if (health->consumer_status != NULL)
		cJSON_AddStringToObject(object, "consumer", health->consumer_status);
	if (health->publisher_status != NULL)
		cJSON_AddStringToObject(object, "publisher", health->publisher_status);
	add_connections(object, view);
	if (view->broker_dropped != NULL)
		cJSON_AddNumberToObject(object, "broker_dropped_messages", (double)*view->broker_dropped);
	if (view->consumer != NULL)
		add_consumer(object, view);
	if (view->publisher != NULL)
		add_latency(object, "mean_publish_latency_ms", &view->publisher->publish_latency);
	add_sums(object, view);
	return print(object);
}
