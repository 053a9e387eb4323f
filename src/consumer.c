/*
 * See consumer.h. The order of starting: the spool is opened and the state file saved, which names what will be
 * subscribed; then the connections are made; when one is subscribed, sessions left behind are taken up, all at once.
 * What is published while both an old and a new session exist comes twice rather than not at all.
 */
#include "consumer.h"

#include "delivery.h"
#include "lane.h"
#include "letters.h"
#include "log.h"
#include "memory.h"
#include "qos0.h"

#include <stdlib.h>
#include <string.h>

/* A lane's place. Only a lane that runs is asked anything: told to stop it is out of reach, but for lane_hurry(). */
struct place {
	struct lane *running; /* or NULL */
	struct lane *ending;  /* told to stop, not yet stopped; or NULL */
};

/* One of consumer.connections. */
struct connection {
	char *client_id, *name;
	struct place place;
	bool tidy; /* its stale filters have been unsubscribed and can be forgotten */
};

/* A session that is no longer configured. */
struct leftover {
	char *client_id;
	struct place place;
	bool emptied; /* the state file is to forget it */
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
	int connection_count;     /* 0 with consumer.qos 0 */
	struct qos0 *qos0;        /* NULL unless there is a filter for it, and once it has been told to stop */
	struct qos0 *ending_qos0; /* told to stop, not yet stopped; or NULL */
	struct leftover *leftovers;
	size_t leftover_count;
	bool looked; /* for sessions left behind */

	uv_work_t save;
	bool saving;
	bool save_result; /* the job's */
	bool recorded;    /* the state file names the filter: only then may it be subscribed */
	bool opened;      /* the delivery has started */
	bool subscribed;  /* a connection, at least once */
	bool failed;
	bool stopping, closing;
	void (*stopped)(void *owner);
};

static void go_on(struct consumer *consumer);

/* ---- lanes and their places ---- */

static bool is_at(const struct place *place, const struct lane *lane)
{
	return place->running == lane || place->ending == lane;
}

static bool is_empty(const struct place *place)
{
	return place->running == NULL && place->ending == NULL;
}

static void go_lane(const struct place *place)
{
	if (place->running != NULL)
		lane_go(place->running);
}

static void stop_lane(struct place *place, void (*stopped)(void *owner, struct lane *lane))
{
	if (place->running == NULL)
		return;
	place->ending = place->running;
	place->running = NULL;
	lane_stop(place->ending, stopped);
}

static void hurry_lane(const struct place *place)
{
	if (place->ending != NULL)
		lane_hurry(place->ending);
}

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
	bool changed = false;
	if (consumer->saving)
		return;
	for (int i = 0; i < consumer->connection_count; i++) {
		if (!consumer->connections[i].tidy)
			continue;
		forget_stale_filters(consumer, &consumer->connections[i]);
		changed = true;
	}
	for (size_t i = 0; i < consumer->leftover_count; i++) {
		struct leftover *leftover = &consumer->leftovers[i];
		if (!leftover->emptied)
			continue;
		state_remove_session(consumer->state, leftover->client_id);
		leftover->emptied = false;
		changed = true;
	}
	if (changed)
		save_state(consumer);
}

/* ---- sessions left behind ---- */

static struct leftover *leftover_of(struct consumer *consumer, const struct lane *lane)
{
	struct leftover *leftover = consumer->leftovers;
	while (!is_at(&leftover->place, lane))
		leftover++;
	return leftover;
}

static void leftover_stopped(void *owner, struct lane *lane)
{
	struct consumer *consumer = owner;
	leftover_of(consumer, lane)->place.ending = NULL;
	go_on(consumer);
}

static void on_emptied(void *owner, struct lane *lane)
{
	struct consumer *consumer = owner;
	struct leftover *leftover = leftover_of(consumer, lane);
	leftover->emptied = true;
	stop_lane(&leftover->place, leftover_stopped);
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

static void start_leftover(struct consumer *consumer, const char *client_id)
{
	static const struct lane_handler handler = {
	    .subscribed = ignore_lane, .unsubscribed = ignore_lane, .emptied = on_emptied};
	struct leftover *leftover = &consumer->leftovers[consumer->leftover_count++];
	leftover->client_id = memory_string(client_id);
	leftover->emptied = client_id[0] == 0; /* by whoever wrote the file: no broker has such a session */
	if (leftover->emptied)
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
	leftover->place.running = lane_create(consumer->loop, &options, &handler, consumer);
	free(stale);
	lane_go(leftover->place.running);
}

/* Take up the sessions of the state file that are not ours, all at once: as long as one is subscribed, what it gets
 * comes twice. */
static void start_leftovers(struct consumer *consumer)
{
	const char *client_id;
	size_t count = 0;
	if (!consumer->subscribed || consumer->looked || consumer->saving)
		return;
	consumer->looked = true;
	while (state_session(consumer->state, count) != NULL)
		count++;
	consumer->leftovers = memory_zeroed(count + 1, sizeof *consumer->leftovers);
	for (size_t i = 0; (client_id = state_session(consumer->state, i)) != NULL; i++)
		if (!is_configured(consumer, client_id))
			start_leftover(consumer, client_id);
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
		go_lane(&consumer->connections[i].place);
}

static void on_accepts(void *owner)
{
	struct consumer *consumer = owner;
	if (consumer->recorded && consumer->opened)
		connect_all(consumer);
	for (size_t i = 0; i < consumer->leftover_count; i++)
		go_lane(&consumer->leftovers[i].place);
}

static struct connection *connection_of(struct consumer *consumer, const struct lane *lane)
{
	struct connection *connection = consumer->connections;
	while (!is_at(&connection->place, lane))
		connection++;
	return connection;
}

/* One of the connections is enough: what it gets of the group's messages is all of them, as long as it is alone. */
static void on_subscribed(void *owner, struct lane *lane)
{
	struct consumer *consumer = owner;
	consumer->subscribed = true;
	if (consumer->handler.subscribed != NULL)
		consumer->handler.subscribed(consumer->owner);
	go_on(consumer);
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
		on_subscribed(consumer, NULL);
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
		start_leftovers(consumer);
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
	connection->place.running = lane_create(consumer->loop, &options, &handler, consumer);
	free(stale);
	/* Before SUBSCRIBE: a filter nobody remembers could never be removed. */
	state_add_filter(consumer->state, connection->client_id, consumer->filter);
}

static void start_connections(struct consumer *consumer, const char *client_id)
{
	const struct config *config = consumer->config;
	consumer->filter = make_filter(&config->consumer, client_id);
	consumer->connection_count = config->consumer.connections;
	consumer->connections = memory_zeroed((size_t)consumer->connection_count, sizeof *consumer->connections);
	for (int number = 1; number <= consumer->connection_count; number++)
		start_connection(consumer, number, client_id);
}

/* With consumer.qos 0 it serves consumer.topic, and the service has subscribed when it has. */
static void start_qos0(struct consumer *consumer, const char *prefix)
{
	bool only = consumer->config->consumer.qos == 0;
	char *client_id = memory_format("%s-0", prefix);
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
                                const char *client_id, struct metrics_consumer *counters,
                                const struct consumer_handler *handler, void *owner)
{
	static const struct delivery_handler delivery_handler = {.started = on_started, .accepts = on_accepts};
	struct consumer *consumer = memory_zeroed(1, sizeof *consumer);
	consumer->loop = loop;
	consumer->config = config;
	consumer->state = state;
	consumer->counters = counters;
	consumer->handler = *handler;
	consumer->owner = owner;
	counters->letters = letters_start(loop, config->consumer.dead_letter, LETTERS_EVERY_MS);
	consumer->delivery = delivery_start(loop, config, counters, &delivery_handler, consumer);
	if (config->consumer.qos > 0)
		start_connections(consumer, client_id);
	if (config->consumer.qos == 0 || config->consumer.qos0_topic != NULL)
		start_qos0(consumer, client_id);
	char promise[128];
	delivery_promise(consumer->delivery, promise, sizeof promise);
	log_info("consumer", "a message is acknowledged once MongoDB has it with %s%s", promise,
	         config->spool.max_size > 0 ? ", or the spool" : "");
	save_state(consumer); /* also with MongoDB away: the session has to exist for the broker to keep anything */
	return consumer;
}

/* ---- stopping ---- */

static void letters_stopped(void *owner)
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
	for (size_t i = 0; i < consumer->leftover_count; i++)
		free(consumer->leftovers[i].client_id);
	free(consumer->leftovers);
	free(consumer);
	stopped(context);
}

static void delivery_stopped(void *owner)
{
	struct consumer *consumer = owner;
	struct letters *letters = consumer->counters->letters;
	consumer->counters->letters = NULL;
	letters_stop(letters, letters_stopped, consumer);
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
	connection_of(consumer, lane)->place.ending = NULL;
	close_when_idle(consumer);
}

static void qos0_stopped(void *owner)
{
	struct consumer *consumer = owner;
	consumer->ending_qos0 = NULL;
	close_when_idle(consumer);
}

static void stop_qos0(struct consumer *consumer)
{
	if (consumer->qos0 == NULL)
		return;
	consumer->ending_qos0 = consumer->qos0;
	consumer->qos0 = NULL;
	qos0_stop(consumer->ending_qos0, qos0_stopped);
}

void consumer_stop(struct consumer *consumer, void (*stopped)(void *owner))
{
	consumer->stopping = true;
	consumer->stopped = stopped;
	for (int i = 0; i < consumer->connection_count; i++)
		stop_lane(&consumer->connections[i].place, lane_stopped);
	stop_qos0(consumer);
	for (size_t i = 0; i < consumer->leftover_count; i++)
		stop_lane(&consumer->leftovers[i].place, leftover_stopped);
	close_when_idle(consumer);
}

void consumer_hurry(struct consumer *consumer)
{
	for (int i = 0; i < consumer->connection_count; i++)
		hurry_lane(&consumer->connections[i].place);
	for (size_t i = 0; i < consumer->leftover_count; i++)
		hurry_lane(&consumer->leftovers[i].place);
	if (consumer->ending_qos0 != NULL)
		qos0_hurry(consumer->ending_qos0);
}

bool consumer_is_done(const struct consumer *consumer)
{
	bool connected = consumer->ending_qos0 != NULL;
	for (size_t i = 0; i < consumer->leftover_count; i++)
		connected = connected || !is_empty(&consumer->leftovers[i].place);
	for (int i = 0; i < consumer->connection_count; i++)
		connected = connected || !is_empty(&consumer->connections[i].place);
	return consumer->stopping && !connected && !consumer->saving && consumer->opened;
}

const char *consumer_status(const struct consumer *consumer)
{
	const char *trouble = delivery_trouble(consumer->delivery);
	if (trouble != NULL)
		return trouble;
	bool up = consumer->connection_count > 0 || qos0_is_up(consumer->qos0);
	for (int i = 0; i < consumer->connection_count; i++)
		up = up && lane_is_up(consumer->connections[i].place.running);
	return up ? "consuming" : "connecting";
}
