/*
 * See consumer.h. The order of starting: the spool is opened and the state file saved, which names what will be
 * subscribed; then the connection is made; when it is subscribed, sessions left behind are taken up one after the
 * other. What is published while both an old and a new session exist comes twice rather than not at all.
 */
#include "consumer.h"

#include "delivery.h"
#include "lane.h"
#include "log.h"
#include "memory.h"
#include "qos0.h"

#include <stdlib.h>
#include <string.h>

/* One of consumer.connections. */
struct connection {
	char *client_id, *name;
	struct lane *lane; /* NULL once it has stopped */
	bool subscribed;   /* at least once */
	bool tidy;         /* its stale filters have been unsubscribed and can be forgotten */
};

struct consumer {
	uv_loop_t *loop;
	const struct config *config;
	struct state *state;
	struct metrics_consumer *counters;
	struct consumer_handler handler;
	void *owner;
	char *filter; /* that all connections subscribe to: consumer.topic, shared where there is a group */

	struct delivery *delivery;
	struct connection *connections;
	int connection_count;  /* 0 with consumer.qos 0 */
	struct qos0 *qos0;     /* NULL unless there is a filter for it, and once it has stopped */
	struct lane *leftover; /* the session left behind that is being emptied, or NULL */
	char *emptied;         /* client id of one that has been, to be forgotten */
	bool retiring;         /* leftover has been told to stop */

	uv_work_t save;
	bool saving;
	bool save_result; /* the job's */
	bool recorded;    /* the state file names the filter: only then may it be subscribed */
	bool opened;      /* the delivery has started */
	bool subscribed;  /* every connection, at least once */
	bool failed;
	bool stopping, closing;
	void (*stopped)(void *owner);
};

static void go_on(struct consumer *consumer);

/* ---- the state file ---- */

/* Worker thread. The loop leaves the state alone until save_done(). */
static void save_work(uv_work_t *job)
{
	struct consumer *consumer = container_of(job, struct consumer, save);
	char error[256];
	consumer->save_result = state_save(consumer->state, error, sizeof error);
	if (!consumer->save_result)
		log_error("state", "%s", error);
}

static void save_done(uv_work_t *job, int status)
{
	struct consumer *consumer = container_of(job, struct consumer, save);
	consumer->saving = false;
	consumer->failed = consumer->failed || (!consumer->save_result && !consumer->recorded);
	consumer->recorded = consumer->recorded || consumer->save_result;
	go_on(consumer);
}

static void save_state(struct consumer *consumer)
{
	consumer->saving = true;
	uv_queue_work(consumer->loop, &consumer->save, save_work, save_done);
}

/* The filters that the session of `client_id` may hold, without `wanted` (or NULL): borrowed, the list allocated. */
static const char **stale_filters(const struct consumer *consumer, const char *client_id, const char *wanted)
{
	size_t count = 0;
	const char *filter;
	while (state_filter(consumer->state, client_id, count) != NULL)
		count++;
	const char **list = memory_zeroed(count + 1, sizeof *list);
	const char **next = list;
	for (size_t i = 0; (filter = state_filter(consumer->state, client_id, i)) != NULL; i++)
		if (wanted == NULL || strcmp(filter, wanted) != 0)
			*next++ = filter;
	return list;
}

static void forget_stale_filters(struct consumer *consumer, struct connection *connection)
{
	const char **stale = stale_filters(consumer, connection->client_id, consumer->filter);
	for (const char **filter = stale; *filter != NULL; filter++) {
		char *name = memory_string(*filter); /* it lies in the state that it is removed from */
		state_remove_filter(consumer->state, connection->client_id, name);
		free(name);
	}
	free(stale);
	connection->tidy = false;
}

/* Forget what the broker has forgotten. */
static void tidy_state(struct consumer *consumer)
{
	bool changed = consumer->emptied != NULL;
	if (consumer->saving)
		return;
	for (int i = 0; i < consumer->connection_count; i++) {
		if (!consumer->connections[i].tidy)
			continue;
		forget_stale_filters(consumer, &consumer->connections[i]);
		changed = true;
	}
	if (consumer->emptied != NULL)
		state_remove_session(consumer->state, consumer->emptied);
	free(consumer->emptied);
	consumer->emptied = NULL;
	if (changed)
		save_state(consumer);
}

/* ---- sessions left behind ---- */

static void leftover_stopped(void *owner, struct lane *lane)
{
	struct consumer *consumer = owner;
	consumer->leftover = NULL;
	consumer->retiring = false;
	go_on(consumer);
}

static void retire_leftover(struct consumer *consumer)
{
	if (consumer->leftover == NULL || consumer->retiring)
		return;
	consumer->retiring = true;
	lane_stop(consumer->leftover, leftover_stopped);
}

static void on_emptied(void *owner, struct lane *lane)
{
	struct consumer *consumer = owner;
	free(consumer->emptied);
	consumer->emptied = memory_string(lane_client_id(lane));
	retire_leftover(consumer);
}

static void ignore_lane(void *owner, struct lane *lane)
{
}

static bool is_configured(const struct consumer *consumer, const char *client_id)
{
	for (int i = 0; i < consumer->connection_count; i++)
		if (strcmp(client_id, consumer->connections[i].client_id) == 0)
			return true;
	return false;
}

/* Take up the next session of the state file that is not ours. */
static void start_leftover(struct consumer *consumer)
{
	static const struct lane_handler handler = {
	    .subscribed = ignore_lane, .unsubscribed = ignore_lane, .emptied = on_emptied};
	const char *client_id = NULL;
	if (!consumer->subscribed || consumer->leftover != NULL || consumer->saving || consumer->emptied != NULL)
		return;
	for (size_t i = 0; (client_id = state_session(consumer->state, i)) != NULL; i++)
		if (!is_configured(consumer, client_id))
			break;
	if (client_id == NULL)
		return;
	log_info("consumer", "%s: this session is no longer configured; taking what the broker has queued for it",
	         client_id);
	const char **stale = stale_filters(consumer, client_id, NULL);
	struct lane_options options = {.config = consumer->config,
	                               .delivery = consumer->delivery,
	                               .counters = consumer->counters,
	                               .client_id = client_id,
	                               .stale = stale,
	                               .name = "session left behind"};
	consumer->leftover = lane_create(consumer->loop, &options, &handler, consumer);
	free(stale);
	lane_go(consumer->leftover);
}

/* ---- what the parts say ---- */

static void on_started(void *owner, const char *error)
{
	struct consumer *consumer = owner;
	consumer->opened = true;
	if (error != NULL) {
		log_error("spool", "%s", error);
		consumer->failed = true;
	}
	go_on(consumer);
}

static void connect_all(struct consumer *consumer)
{
	for (int i = 0; i < consumer->connection_count; i++)
		if (consumer->connections[i].lane != NULL)
			lane_go(consumer->connections[i].lane);
}

static void on_accepts(void *owner)
{
	struct consumer *consumer = owner;
	if (consumer->recorded && consumer->opened && !consumer->stopping)
		connect_all(consumer);
	if (consumer->leftover != NULL && !consumer->retiring)
		lane_go(consumer->leftover);
}

static void all_subscribed(struct consumer *consumer)
{
	consumer->subscribed = true;
	if (consumer->handler.subscribed != NULL)
		consumer->handler.subscribed(consumer->owner);
	go_on(consumer);
}

static struct connection *connection_of(struct consumer *consumer, const struct lane *lane)
{
	struct connection *connection = consumer->connections;
	while (connection->lane != lane)
		connection++;
	return connection;
}

static void on_subscribed(void *owner, struct lane *lane)
{
	struct consumer *consumer = owner;
	connection_of(consumer, lane)->subscribed = true;
	for (int i = 0; i < consumer->connection_count; i++)
		if (!consumer->connections[i].subscribed)
			return;
	all_subscribed(consumer);
}

static void on_unsubscribed(void *owner, struct lane *lane)
{
	struct consumer *consumer = owner;
	connection_of(consumer, lane)->tidy = true;
	go_on(consumer);
}

static void on_qos0_subscribed(void *owner)
{
	struct consumer *consumer = owner;
	if (consumer->connection_count == 0)
		all_subscribed(consumer);
}

/* ---- what comes next ---- */

static void close_when_idle(struct consumer *consumer);

static void go_on(struct consumer *consumer)
{
	if (consumer->stopping) {
		close_when_idle(consumer);
	} else if (consumer->failed) {
		consumer->handler.failed(consumer->owner);
	} else if (consumer->recorded && consumer->opened) {
		connect_all(consumer);
		if (consumer->qos0 != NULL)
			qos0_go(consumer->qos0);
		tidy_state(consumer);
		start_leftover(consumer);
	}
}

/* ---- public ---- */

/* Several connections are a share group (MQTT 5 §4.8.2), or each of them would get every message. */
static char *make_filter(const struct config_consumer *config, const char *client_id)
{
	const char *group = config->share != NULL ? config->share : client_id;
	if (!config_shares(config))
		return memory_string(config->topic);
	return memory_format("$share/%s/%s", group, config->topic);
}

static void start_connection(struct consumer *consumer, int number, const char *client_id)
{
	static const struct lane_handler handler = {
	    .subscribed = on_subscribed, .unsubscribed = on_unsubscribed, .emptied = ignore_lane};
	struct connection *connection = &consumer->connections[number - 1];
	connection->client_id = memory_format("%s-%d", client_id, number);
	connection->name =
	    consumer->connection_count > 1 ? memory_format("consumer-%d", number) : memory_string("consumer");
	const char **stale = stale_filters(consumer, connection->client_id, consumer->filter);
	struct lane_options options = {.config = consumer->config,
	                               .delivery = consumer->delivery,
	                               .counters = consumer->counters,
	                               .client_id = connection->client_id,
	                               .filter = consumer->filter,
	                               .stale = stale,
	                               .name = connection->name};
	connection->lane = lane_create(consumer->loop, &options, &handler, consumer);
	free(stale);
	/* Before SUBSCRIBE: a filter nobody remembers could never be removed. */
	state_add_filter(consumer->state, connection->client_id, consumer->filter);
}

static void start_connections(struct consumer *consumer)
{
	const struct config *config = consumer->config;
	char *client_id = memory_string(state_client_id(consumer->state, config->mqtt.client_id));
	consumer->filter = make_filter(&config->consumer, client_id);
	consumer->connection_count = config->consumer.connections;
	consumer->connections = memory_zeroed((size_t)consumer->connection_count, sizeof *consumer->connections);
	for (int number = 1; number <= consumer->connection_count; number++)
		start_connection(consumer, number, client_id);
	free(client_id);
}

/* With consumer.qos 0 it serves consumer.topic, and the service has subscribed when it has. */
static void start_qos0(struct consumer *consumer)
{
	bool only = consumer->config->consumer.qos == 0;
	char *client_id = memory_format("%s-0", state_client_id(consumer->state, consumer->config->mqtt.client_id));
	struct qos0_options options = {
	    .config = consumer->config,
	    .delivery = consumer->delivery,
	    .counters = consumer->counters,
	    .client_id = client_id,
	    .filter = only ? consumer->config->consumer.topic : consumer->config->consumer.qos0_topic,
	    .subscribed = on_qos0_subscribed,
	};
	consumer->qos0 = qos0_create(consumer->loop, &options, consumer);
	free(client_id);
}

struct consumer *consumer_start(uv_loop_t *loop, const struct config *config, struct state *state,
                                struct metrics_consumer *counters, const struct consumer_handler *handler, void *owner)
{
	static const struct delivery_handler delivery_handler = {.started = on_started, .accepts = on_accepts};
	struct consumer *consumer = memory_zeroed(1, sizeof *consumer);
	consumer->loop = loop;
	consumer->config = config;
	consumer->state = state;
	consumer->counters = counters;
	consumer->handler = *handler;
	consumer->owner = owner;
	consumer->delivery = delivery_start(loop, config, counters, &delivery_handler, consumer);
	if (config->consumer.qos > 0)
		start_connections(consumer);
	if (config->consumer.qos == 0 || config->consumer.qos0_topic != NULL)
		start_qos0(consumer);
	char promise[128];
	delivery_promise(consumer->delivery, promise, sizeof promise);
	log_info("consumer", "a message is acknowledged once MongoDB has it with %s%s", promise,
	         config->spool.max_size > 0 ? ", or the spool" : "");
	save_state(consumer); /* also with MongoDB away: the session has to exist for the broker to keep anything */
	return consumer;
}

/* ---- stopping ---- */

static void delivery_stopped(void *owner)
{
	struct consumer *consumer = owner;
	void (*stopped)(void *) = consumer->stopped;
	void *context = consumer->owner;
	for (int i = 0; i < consumer->connection_count; i++) {
		free(consumer->connections[i].client_id);
		free(consumer->connections[i].name);
	}
	free(consumer->connections);
	free(consumer->filter);
	free(consumer->emptied);
	free(consumer);
	stopped(context);
}

static void close_when_idle(struct consumer *consumer)
{
	tidy_state(consumer); /* what has been ended is not to be looked for at the next start */
	if (!consumer_is_done(consumer) || consumer->closing)
		return;
	consumer->closing = true;
	delivery_stop(consumer->delivery, delivery_stopped);
}

static void lane_stopped(void *owner, struct lane *lane)
{
	struct consumer *consumer = owner;
	connection_of(consumer, lane)->lane = NULL;
	close_when_idle(consumer);
}

static void qos0_stopped(void *owner)
{
	struct consumer *consumer = owner;
	consumer->qos0 = NULL;
	close_when_idle(consumer);
}

void consumer_stop(struct consumer *consumer, void (*stopped)(void *owner))
{
	consumer->stopping = true;
	consumer->stopped = stopped;
	for (int i = 0; i < consumer->connection_count; i++)
		lane_stop(consumer->connections[i].lane, lane_stopped);
	if (consumer->qos0 != NULL)
		qos0_stop(consumer->qos0, qos0_stopped);
	retire_leftover(consumer);
	close_when_idle(consumer);
}

void consumer_hurry(struct consumer *consumer)
{
	for (int i = 0; i < consumer->connection_count; i++)
		if (consumer->connections[i].lane != NULL)
			lane_hurry(consumer->connections[i].lane);
	if (consumer->leftover != NULL)
		lane_hurry(consumer->leftover);
	if (consumer->qos0 != NULL)
		qos0_hurry(consumer->qos0);
}

bool consumer_is_done(const struct consumer *consumer)
{
	bool connected = consumer->leftover != NULL || consumer->qos0 != NULL;
	for (int i = 0; i < consumer->connection_count; i++)
		connected = connected || consumer->connections[i].lane != NULL;
	return consumer->stopping && !connected && !consumer->saving && consumer->opened;
}

const char *consumer_status(const struct consumer *consumer)
{
	if (consumer->stopping)
		return "stopping";
	const char *trouble = delivery_trouble(consumer->delivery);
	if (trouble != NULL)
		return trouble;
	bool up = consumer->connection_count > 0 || qos0_is_up(consumer->qos0);
	for (int i = 0; i < consumer->connection_count; i++)
		up = up && lane_is_up(consumer->connections[i].lane);
	return up ? "consuming" : "connecting";
}
