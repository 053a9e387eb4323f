/* See inspect.h. */
#define _GNU_SOURCE
#include "inspect.h"

#include "batch.h"
#include "broker.h"
#include "clock.h"
#include "document.h"
#include "escape.h"
#include "log.h"
#include "memory.h"
#include "mqtt.h"
#include "store.h"

#include <mosquitto.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What the next SUBACK answers. */
enum question { NOTHING, FILTER, SYS, FILTER_AGAIN };

struct inspection {
	uv_loop_t loop;
	const struct config *config;
	struct mqtt *mqtt;
	bool closing;
	bool dry_run;
	bool interrupted;
	bool loses_shares; /* the broker */
	uint64_t retained; /* messages at the broker; 0: none, or it does not say */
	enum question asking;
	size_t held;
	int exit_code;
	uv_signal_t interrupt, terminate;
	struct batch batch;
	struct buffer document;
	uint64_t documents, dead_letters;
};

static void close_handle(uv_handle_t *handle, void *context)
{
	if (!uv_is_closing(handle))
		uv_close(handle, NULL);
}

static void mqtt_closed(void *owner)
{
	struct inspection *inspection = owner;
	mqtt_free(inspection->mqtt);
	uv_walk(&inspection->loop, close_handle, NULL);
}

static void end(struct inspection *inspection, int exit_code)
{
	if (inspection->closing)
		return;
	inspection->closing = true;
	inspection->exit_code = exit_code;
	mqtt_close(inspection->mqtt, mqtt_closed);
}

static void on_signal(uv_signal_t *handle, int number)
{
	struct inspection *inspection = handle->data;
	inspection->interrupted = true;
	end(inspection, inspection->dry_run ? 0 : 1); /* a check cut short has shown nothing */
}

/* Without $share/: in the group the check would take messages from a service that runs. */
static void subscribe(struct inspection *inspection)
{
	const struct config_consumer *config = &inspection->config->consumer;
	int qos = inspection->dry_run ? 0 : config->qos;
	mqtt_subscribe(inspection->mqtt, config->topic, qos > 1 ? 1 : qos);
}

static void on_up(void *owner, const struct mqtt_granted *granted)
{
	struct inspection *inspection = owner;
	const struct config *config = inspection->config;
	if (!inspection->dry_run)
		escape_print(
		    stdout,
		    "broker    ok: %s, MQTT %s, keepalive %d s, maximum QoS %d, takes %d messages unacknowledged",
		    mqtt_address(inspection->mqtt), config->mqtt.protocol == 5 ? "5" : "3.1.1", granted->keepalive_s,
		    granted->maximum_qos, granted->receive_maximum);
	if (!inspection->dry_run && !(config->role & CONFIG_ROLE_CONSUMER)) {
		end(inspection, 0);
		return;
	}
	if (!inspection->dry_run && config_shares(&config->consumer) && !granted->shares) {
		escape_print(stdout,
		             "broker    failed: it takes no shared subscriptions; set consumer.connections 1 and no "
		             "consumer.share");
		end(inspection, 1);
		return;
	}
	inspection->asking = FILTER;
	subscribe(inspection);
}

static void on_down(void *owner)
{
	struct inspection *inspection = owner;
	end(inspection, inspection->asking <= FILTER); /* the connection has said why */
}

/* What is worth asking $SYS for, or NULL. Retained messages are not for shared subscriptions (MQTT 5 §4.8.2). */
static const char *sys_topic(const struct config *config)
{
	if (!config->mqtt.watch_broker)
		return NULL;
	if (config_shares(&config->consumer))
		return BROKER_VERSION;
	return config->consumer.qos > 0 ? BROKER_RETAINED : NULL;
}

/* What a mosquitto with default settings hands over of the retained messages that a new subscription finds. */
static uint64_t retained_most(const struct config_mqtt *config)
{
	return BROKER_QUEUED + (uint64_t)(config->protocol == 5 ? config->receive_maximum : BROKER_INFLIGHT);
}

static void print_warnings(const struct inspection *inspection)
{
	const struct config_mqtt *config = &inspection->config->mqtt;
	if (inspection->loses_shares)
		escape_print(stdout, "broker    warning: mosquitto before 2.0.12, unless patched, loses messages of "
		                     "shared subscriptions when a session is resumed");
	if (inspection->retained > retained_most(config))
		escape_print(
		    stdout,
		    "broker    warning: it holds %llu retained messages; of those that the first subscription matches "
		    "a "
		    "mosquitto with default settings sends %llu and drops the rest without a word: before the service "
		    "starts for the first time, set max_queued_messages in mosquitto.conf to more than that",
		    (unsigned long long)inspection->retained, (unsigned long long)retained_most(config));
}

/* $SYS comes last, for there are brokers that hang up on those who ask for it. What it has retained comes before its
 * answer to the next SUBSCRIBE. */
static void ask_more(struct inspection *inspection, int reason)
{
	const char *topic = sys_topic(inspection->config);
	inspection->asking++;
	if (inspection->asking == SYS && topic != NULL) {
		mqtt_subscribe(inspection->mqtt, topic, 0);
	} else if (inspection->asking == FILTER_AGAIN && reason < 0x80) {
		subscribe(inspection);
	} else {
		print_warnings(inspection);
		end(inspection, 0);
	}
}

static void on_subscribed(void *owner, int reason)
{
	struct inspection *inspection = owner;
	const char *filter = inspection->config->consumer.topic;
	if (inspection->asking != FILTER) {
		ask_more(inspection, reason);
		return;
	}
	if (reason >= 0x80) {
		escape_print(stdout, "subscribe failed: the broker refuses %s (reason 0x%02x); check its access rules",
		             filter, (unsigned)reason);
		end(inspection, 1);
	} else if (inspection->dry_run) {
		escape_print(
		    stderr,
		    "dry run: printing what would be stored from %s; nothing is stored or acknowledged. Messages "
		    "already "
		    "queued for the service are not shown. Ctrl-C ends it",
		    filter);
	} else {
		escape_print(stdout, "subscribe ok: %s at QoS %d", filter, reason);
		ask_more(inspection, reason);
	}
}

static void on_message(void *owner, const struct message *message)
{
	struct inspection *inspection = owner;
	const struct config_consumer *config = &inspection->config->consumer;
	batch_add(&inspection->batch, message, &config->id, (size_t)config->max_payload, clock_wall_ms());
}

static void print_document(const struct buffer *bytes, const char *collection)
{
	bson_t document;
	if (!bson_init_static(&document, bytes->data, bytes->length))
		abort(); /* we wrote it */
	char *text = bson_as_canonical_extended_json(&document, NULL);
	escape_print_lines(stdout, collection);
	escape_print_lines(stdout, " ");
	escape_print_lines(stdout, text != NULL ? text : "(cannot be printed)");
	escape_print_lines(stdout, "\n");
	bson_free(text);
}

static void print_message(struct inspection *inspection, const struct batch_message *message)
{
	const struct config_consumer *config = &inspection->config->consumer;
	struct document_fault fault;
	buffer_reset(&inspection->document, SIZE_MAX);
	if (document_build(&inspection->batch, message, &config->id, &inspection->document, &fault)) {
		inspection->documents++;
		print_document(&inspection->document, config->collection);
		return;
	}
	inspection->dead_letters++;
	document_dead_letter(&inspection->batch, message, &fault, config->topic, &inspection->document);
	print_document(&inspection->document, config->dead_letter);
}

static void on_drained(void *owner)
{
	struct inspection *inspection = owner;
	size_t count = inspection->batch.count;
	for (size_t i = 0; i < count; i++)
		print_message(inspection, &inspection->batch.messages[i]);
	bool reader_gone = fflush(stdout) != 0 || ferror(stdout);
	batch_reset(&inspection->batch);
	mqtt_durable(inspection->mqtt, mqtt_generation(inspection->mqtt), count);
	if (reader_gone) /* as in: mqtt2mongo --dry-run | head */
		end(inspection, 0);
}

static void note_retained(struct inspection *inspection, const struct message *message)
{
	uint64_t retained;
	if (broker_number(message->payload, message->payload_length, &retained))
		inspection->retained = retained;
}

/* What is published meanwhile is the service's; only what the broker says of itself is for us. */
static void look_at_message(void *owner, const struct message *message)
{
	struct inspection *inspection = owner;
	inspection->held++;
	if (strcmp(message->topic, BROKER_VERSION) == 0)
		inspection->loses_shares = broker_loses_shares(message->payload, message->payload_length);
	else if (strcmp(message->topic, BROKER_RETAINED) == 0)
		note_retained(inspection, message);
}

static void forget_messages(void *owner)
{
	struct inspection *inspection = owner;
	size_t held = inspection->held;
	inspection->held = 0;
	mqtt_durable(inspection->mqtt, mqtt_generation(inspection->mqtt), held);
}

static const struct mqtt_handler check_handler = {
    .up = on_up,
    .down = on_down,
    .subscribed = on_subscribed,
    .message = look_at_message,
    .drained = forget_messages,
};

static const struct mqtt_handler dry_run_handler = {
    .up = on_up,
    .down = on_down,
    .subscribed = on_subscribed,
    .message = on_message,
    .drained = on_drained,
};

static void watch(struct inspection *inspection, uv_signal_t *handle, int number)
{
	uv_signal_init(&inspection->loop, handle);
	handle->data = inspection;
	uv_signal_start(handle, on_signal, number);
}

static int inspect_broker(struct inspection *inspection, const struct mqtt_handler *handler)
{
	uint32_t random = 0;
	uv_random(NULL, NULL, &random, sizeof random, 0, NULL);
	char client_id[48];
	snprintf(client_id, sizeof client_id, "mqtt2mongo-%s-%08x", inspection->dry_run ? "dry" : "check",
	         (unsigned)random);
	struct mqtt_options options = {
	    .config = &inspection->config->mqtt, .client_id = client_id, .name = "broker", .clean_start = true};
	signal(SIGPIPE, SIG_IGN);
	mosquitto_lib_init();
	uv_loop_init(&inspection->loop);
	watch(inspection, &inspection->interrupt, SIGINT);
	watch(inspection, &inspection->terminate, SIGTERM);
	inspection->mqtt = mqtt_create(&inspection->loop, &options, handler, inspection);
	mqtt_connect(inspection->mqtt);
	uv_run(&inspection->loop, UV_RUN_DEFAULT);
	uv_loop_close(&inspection->loop);
	mosquitto_lib_cleanup();
	return inspection->exit_code;
}

/* Nothing is made or opened: a service may have it. */
static void describe_spool(const struct config_spool *config)
{
	if (config->max_size == 0)
		escape_print(
		    stdout,
		    "would     hold what MongoDB does not take, and hand it back to the broker: spool.max_size is 0");
	else
		escape_print(stdout,
		             "would     keep what MongoDB does not take within %lld ms in %s, at most %lld MiB%s",
		             (long long)config->after_ms, config->path, (long long)(config->max_size >> 20),
		             config->max_size_set ? "" : " and a quarter of the free disk space");
}

static int inspect_database(const struct config *config)
{
	struct store *store = store_create(config);
	struct store_report report = {0};
	char text[160], concern[128];
	char *uri = config_redact_uri(config->mongodb.uri);
	bool answers = store_describe(store, text, sizeof text, &report);
	bool may_write = answers && store_may_write(store);
	const char *fault = answers ? store_collection_fault(store, &report) : NULL;
	bool broken = fault != NULL && config->consumer.id.count > 0;
	store_write_concern_text(store, concern, sizeof concern);
	if (answers && !may_write)
		escape_print(
		    stdout,
		    "database  failed: %s, %s, but the user may not insert into %s.%s and %s.%s%s; it needs the "
		    "role readWrite on %s",
		    uri, text, config->mongodb.database, config->consumer.collection, config->mongodb.database,
		    config->consumer.dead_letter,
		    config->consumer.id.count > 0 ? ", or not read the first, which consumer.id asks for" : "",
		    config->mongodb.database);
	else if (broken)
		escape_print(stdout, "database  failed: %s, %s, but %s.%s %s", uri, text, config->mongodb.database,
		             config->consumer.collection, fault);
	else if (answers)
		escape_print(stdout, "database  ok: %s, %s", uri, text);
	else
		escape_print(stdout, "database  failed: %s: %s", uri, report.message);
	if (fault != NULL && !broken)
		escape_print(stdout, "database  warning: %s.%s %s", config->mongodb.database,
		             config->consumer.collection, fault);
	escape_print(stdout,
	             "would     store %s into %s.%s, what is not valid JSON into %s.%s, and acknowledge after %s",
	             config->consumer.topic, config->mongodb.database, config->consumer.collection,
	             config->mongodb.database, config->consumer.dead_letter, concern);
	if (config_shares(&config->consumer))
		escape_print(stdout, "would     be %d connection%s of the share group %s", config->consumer.connections,
		             config->consumer.connections > 1 ? "s" : "",
		             config->consumer.share != NULL ? config->consumer.share : "named as the client id");
	describe_spool(&config->spool);
	free(uri);
	store_destroy(store);
	return may_write && !broken ? 0 : 1;
}

int inspect_check(const struct config *config)
{
	escape_print(stdout, "config    ok%s%s", config->file != NULL ? ": " : "",
	             config->file != NULL ? config->file : "");
	struct inspection inspection = {.config = config};
	int broker = inspect_broker(&inspection, &check_handler);
	if (inspection.interrupted)
		return 1;
	if (broker != 0)
		escape_print(stdout, "broker    failed: see above");
	if (config->role & CONFIG_ROLE_PUBLISHER)
		escape_print(stdout, "would     publish to %s, %g messages a second at QoS %d", config->publisher.topic,
		             config->publisher.rate, config->publisher.qos);
	if (config->http.enabled)
		escape_print(stdout, "would     answer /metrics, /healthz, /readyz and /status.json on %s",
		             config->http.listen);
	int database = config->role & CONFIG_ROLE_CONSUMER ? inspect_database(config) : 0;
	return broker != 0 || database != 0 ? 1 : 0;
}

int inspect_dry_run(const struct config *config)
{
	struct inspection inspection = {.config = config, .dry_run = true};
	int exit_code = inspect_broker(&inspection, &dry_run_handler);
	escape_print(stderr, "dry run: %llu documents, %llu dead letters", (unsigned long long)inspection.documents,
	             (unsigned long long)inspection.dead_letters);
	batch_finish(&inspection.batch);
	buffer_finish(&inspection.document);
	return exit_code;
}
