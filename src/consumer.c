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

struct consumer {
	uv_loop_t *loop;
	const struct config *config;
	struct state *state;
	struct metrics_consumer *counters;
	struct consumer_handler handler;
	void *owner;
	char *client_id;

	struct delivery *delivery;
	struct lane *lane;     /* NULL with consumer.qos 0, and once it has stopped */
	struct qos0 *qos0;     /* NULL unless there is a filter for it, and once it has stopped */
	struct lane *leftover; /* the session left behind that is being emptied, or NULL */
	char *emptied;         /* client id of one that has been, to be forgotten */
	bool retiring;         /* leftover has been told to stop */

	uv_work_t save;
	bool saving;
	bool save_result; /* the job's */
	bool recorded;    /* the state file names the filter: only then may it be subscribed */
	bool opened;      /* the delivery has started */
	bool subscribed;  /* the lane, at least once */
	bool tidy_lane;   /* the lane's stale filters have been unsubscribed and can be forgotten */
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

/* Forget what the broker has forgotten. */
static void tidy_state(struct consumer *consumer)
{
	if (consumer->saving || (!consumer->tidy_lane && consumer->emptied == NULL))
		return;
	if (consumer->tidy_lane) {
		const char **stale = stale_filters(consumer, consumer->client_id, consumer->config->consumer.topic);
		for (const char **filter = stale; *filter != NULL; filter++) {
			char *name = memory_string(*filter); /* it lies in the state that it is removed from */
			state_remove_filter(consumer->state, consumer->client_id, name);
			free(name);
		}
		free(stale);
	}
	if (consumer->emptied != NULL)
		state_remove_session(consumer->state, consumer->emptied);
	free(consumer->emptied);
	consumer->emptied = NULL;
	consumer->tidy_lane = false;
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

static void ignore(void *owner)
{
}

/* Take up the next session of the state file that is not ours. */
static void start_leftover(struct consumer *consumer)
{
	static const struct lane_handler handler = {
	    .subscribed = ignore, .unsubscribed = ignore_lane, .emptied = on_emptied};
	const char *client_id = NULL;
	if (!consumer->subscribed || consumer->leftover != NULL || consumer->saving || consumer->emptied != NULL)
		return;
	for (size_t i = 0; (client_id = state_session(consumer->state, i)) != NULL; i++)
		if (consumer->lane == NULL || strcmp(client_id, consumer->client_id) != 0)
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

static void on_accepts(void *owner)
{
	struct consumer *consumer = owner;
	if (consumer->lane != NULL && consumer->recorded && consumer->opened && !consumer->stopping)
		lane_go(consumer->lane);
	if (consumer->leftover != NULL && !consumer->retiring)
		lane_go(consumer->leftover);
}

static void on_subscribed(void *owner)
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
	consumer->tidy_lane = true;
	go_on(consumer);
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
		if (consumer->lane != NULL)
			lane_go(consumer->lane);
		if (consumer->qos0 != NULL)
			qos0_go(consumer->qos0);
		tidy_state(consumer);
		start_leftover(consumer);
	}
}

/* ---- public ---- */

static void start_lane(struct consumer *consumer)
{
	static const struct lane_handler handler = {
	    .subscribed = on_subscribed, .unsubscribed = on_unsubscribed, .emptied = ignore_lane};
	const char *topic = consumer->config->consumer.topic;
	const char **stale = stale_filters(consumer, consumer->client_id, topic);
	struct lane_options options = {.config = consumer->config,
	                               .delivery = consumer->delivery,
	                               .counters = consumer->counters,
	                               .client_id = consumer->client_id,
	                               .filter = topic,
	                               .stale = stale,
	                               .name = "consumer"};
	consumer->lane = lane_create(consumer->loop, &options, &handler, consumer);
	free(stale);
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
	    .subscribed = only ? on_subscribed : ignore,
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
	consumer->client_id = memory_format("%s-1", state_client_id(state, config->mqtt.client_id));
	consumer->delivery = delivery_start(loop, config, counters, &delivery_handler, consumer);
	if (config->consumer.qos > 0)
		start_lane(consumer);
	if (config->consumer.qos == 0 || config->consumer.qos0_topic != NULL)
		start_qos0(consumer);
	char promise[128];
	delivery_promise(consumer->delivery, promise, sizeof promise);
	log_info("consumer", "a message is acknowledged once MongoDB has it with %s%s", promise,
	         config->spool.max_size > 0 ? ", or the spool" : "");
	/* Before SUBSCRIBE: a filter nobody remembers could never be removed. Also with MongoDB away, for the session
	 * has to exist for the broker to keep anything. */
	if (config->consumer.qos > 0)
		state_add_filter(state, consumer->client_id, config->consumer.topic);
	save_state(consumer);
	return consumer;
}

/* ---- stopping ---- */

static void delivery_stopped(void *owner)
{
	struct consumer *consumer = owner;
	void (*stopped)(void *) = consumer->stopped;
	void *context = consumer->owner;
	free(consumer->client_id);
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
	consumer->lane = NULL;
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
	if (consumer->lane != NULL)
		lane_stop(consumer->lane, lane_stopped);
	if (consumer->qos0 != NULL)
		qos0_stop(consumer->qos0, qos0_stopped);
	retire_leftover(consumer);
	close_when_idle(consumer);
}

void consumer_hurry(struct consumer *consumer)
{
	if (consumer->lane != NULL)
		lane_hurry(consumer->lane);
	if (consumer->leftover != NULL)
		lane_hurry(consumer->leftover);
	if (consumer->qos0 != NULL)
		qos0_hurry(consumer->qos0);
}

bool consumer_is_done(const struct consumer *consumer)
{
	bool connected = consumer->lane != NULL || consumer->leftover != NULL || consumer->qos0 != NULL;
	return consumer->stopping && !connected && !consumer->saving && consumer->opened;
}

const char *consumer_status(const struct consumer *consumer)
{
	if (consumer->stopping)
		return "stopping";
	const char *trouble = delivery_trouble(consumer->delivery);
	if (trouble != NULL)
		return trouble;
	bool up = consumer->lane != NULL ? lane_is_up(consumer->lane) : qos0_is_up(consumer->qos0);
	return up ? "consuming" : "connecting";
}
