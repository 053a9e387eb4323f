/* See service.h. */
#define _GNU_SOURCE
#include "service.h"

#include "broker.h"
#include "build.h"
#include "clock.h"
#include "consumer.h"
#include "count_check.h"
#include "escape.h"
#include "health.h"
#include "http.h"
#include "log.h"
#include "memory.h"
#include "publisher.h"
#include "state.h"

#include <errno.h>
#include <mosquitto.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
	STATUS_MS = 1000,
	UNSTOPPABLE_MS = 1500, /* a worker that hangs in the resolver or the driver gets this long on top */
	EXTRA_THREADS = 6, /* for the spool, its drain, name resolution, two connects and files, beside the workers */
	SIGNALS = 4,
	LOOP_DESCRIPTORS = 8,
	PATIENCE_MS = 250,
};

#define MIB 1048576.0

struct service {
	uv_loop_t loop;
	const struct config *config;
	struct state *state; /* the consumer's, while it runs: a worker may be saving it */
	char *client_id;

	/* Parts that run. Only these are asked anything: told to stop, a part moves to `ending` and is out of reach. */
	struct consumer *consumer;
	struct publisher *publisher;
	struct broker *broker; /* NULL unless watches_broker() */
	struct {
		struct consumer *consumer;
		struct publisher *publisher;
		struct broker *broker;
	} ending;                             /* told to stop, not yet stopped; or NULL */
	struct http *http;                    /* NULL unless http.listen is set; stops last */
	unsigned to_stop;                     /* parts that are to stop, or stopping */
	void (*parts_stopped)(void *context); /* when none of those runs any more, or NULL */
	void *parts_context;
	bool subscribed; /* the consumer has been, since it was started */
	struct metrics_consumer consumer_counters;
	struct metrics_publisher publisher_counters;
	struct metrics_publisher publisher_before; /* its counters when it was started */
	struct count_check *check;                 /* or NULL */
	bool consumer_ran, publisher_ran;

	uv_signal_t signals[SIGNALS];
	uv_timer_t shutdown, patience, status, published; /* the last one: away from the publisher's own calls */
	uv_prepare_t prepare;
	struct metrics_loop lag;
	uint64_t last_hrtime, last_idle;
	int64_t started_ms;                   /* wall clock */
	uint64_t status_stored, status_acked; /* at the last status line */
	bool stopping, hurried, finishing, finished;
	unsigned done_for_ms; /* while stopping: nothing was left to be done */
	int exit_code;
};

static void finish_when_stopped(struct service *service);

/* ---- the longest iteration ---- */

/* Just before the loop waits: everything since the last time, less the waiting, was work. */
static void measure_iteration(uv_prepare_t *prepare)
{
	struct service *service = container_of(prepare, struct service, prepare);
	uint64_t now = uv_hrtime(), idle = uv_metrics_idle_time(&service->loop), busy_us = 0;
	if (service->last_hrtime != 0)
		busy_us = (now - service->last_hrtime - (idle - service->last_idle)) / 1000;
	metrics_loop_turn(&service->lag, busy_us, now / 1000000);
	service->last_hrtime = now;
	service->last_idle = idle;
}

/* ---- the parts, and those that are ending ---- */

static bool has_consumer(const struct service *service)
{
	return service->consumer != NULL || service->ending.consumer != NULL;
}

static bool has_publisher(const struct service *service)
{
	return service->publisher != NULL || service->ending.publisher != NULL;
}

/* NULL: there is none. */
static const char *consumer_state(const struct service *service)
{
	if (service->consumer != NULL)
		return consumer_status(service->consumer);
	return service->ending.consumer != NULL ? "stopping" : NULL;
}

/* NULL: there is none. */
static const char *publisher_state(const struct service *service)
{
	if (service->publisher != NULL)
		return publisher_status(service->publisher);
	return service->ending.publisher != NULL ? "stopping" : NULL;
}

/* ---- the sums and the status line ---- */

static void print_sums(struct service *service)
{
	char *sums = metrics_sums(service->consumer_ran ? &service->consumer_counters : NULL,
	                          service->publisher_ran ? &service->publisher_counters : NULL, &service->lag,
	                          service->config->log_format == LOG_FORMAT_JSON);
	escape_print_lines(stdout, sums);
	fflush(stdout);
	free(sums);
}

static void show_status(uv_timer_t *timer)
{
	struct service *service = container_of(timer, struct service, status);
	char text[320];
	size_t length = 0;
	text[0] = 0;
	if (has_publisher(service)) {
		const struct metrics_publisher *counters = &service->publisher_counters;
		length += (size_t)snprintf(
		    text, sizeof text, "publisher: %s, %llu/s, %llu acked, %llu on the way", publisher_state(service),
		    (unsigned long long)(counters->acked - service->status_acked), (unsigned long long)counters->acked,
		    (unsigned long long)metrics_unacknowledged(counters));
		service->status_acked = counters->acked;
	}
	if (has_consumer(service)) {
		const struct metrics_consumer *counters = &service->consumer_counters;
		snprintf(text + length, sizeof text - length,
		         "%sconsumer: %s, %llu/s, %llu stored, %llu dead letters, %llu in flight",
		         length > 0 ? " | " : "", consumer_state(service),
		         (unsigned long long)(counters->stored - service->status_stored),
		         (unsigned long long)counters->stored,
		         (unsigned long long)metrics_total(counters->dead_lettered, DOCUMENT_REASONS),
		         (unsigned long long)metrics_in_flight(counters));
		service->status_stored = counters->stored;
		length = strlen(text);
		if (counters->spool_messages > 0)
			snprintf(text + length, sizeof text - length, ", %llu in the spool (%.1f MiB)",
			         (unsigned long long)counters->spool_messages, (double)counters->spool_bytes / MIB);
	}
	log_status(text);
}

/* ---- what http.listen tells ---- */

static const char *const http_paths[] = {"/metrics", "/healthz", "/readyz", "/status.json", NULL};
/* Prometheus and the probes of orchestrators ask by whatever name the service has there. */
static const char *const http_open_paths[] = {"/metrics", "/healthz", "/readyz", NULL};

static uint64_t cpu_us(void)
{
	uv_rusage_t used;
	if (uv_getrusage(&used) != 0)
		return 0;
	return (uint64_t)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) * 1000000 +
	       (uint64_t)(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
}

/* The connections that ought to be there. `connections` has room for three. */
static int list_connections(const struct service *service, struct metrics_connection *connections)
{
	const struct metrics_consumer *counters = &service->consumer_counters;
	int count = 0;
	if (service->consumer != NULL)
		connections[count++] = (struct metrics_connection){
		    "consumer", counters->connections > 0 && counters->connections_up == counters->connections};
	if (service->publisher != NULL)
		connections[count++] = (struct metrics_connection){"publisher", publisher_is_up(service->publisher)};
	if (service->broker != NULL)
		connections[count++] = (struct metrics_connection){"sys", broker_is_up(service->broker)};
	return count;
}

static void answer_http(void *owner, const char *path, struct http_answer *answer)
{
	const struct service *service = owner;
	struct metrics_connection connections[3];
	size_t resident = 0;
	uv_resident_set_memory(&resident);
	struct health health = {
	    .view = {.version = MQTT2MONGO_VERSION,
	             .now_ms = clock_wall_ms(),
	             .started_ms = service->started_ms,
	             .consumer = service->consumer_ran ? &service->consumer_counters : NULL,
	             .publisher = service->publisher_ran ? &service->publisher_counters : NULL,
	             .loop = &service->lag,
	             .loop_recent_us = metrics_loop_recent(&service->lag, uv_hrtime() / 1000000),
	             .connections = connections,
	             .connection_count = list_connections(service, connections),
	             .broker_dropped = service->broker != NULL ? broker_dropped(service->broker) : NULL,
	             .resident_bytes = resident,
	             .cpu_us = cpu_us()},
	    .consumer_status = consumer_state(service),
	    .publisher_status = publisher_state(service),
	    .stopping = service->stopping,
	    .consumer_stopping = service->ending.consumer != NULL,
	    .publisher_stopping = service->ending.publisher != NULL,
	};
	bool ready = true;
	answer->content_type = "application/json";
	if (strcmp(path, "/metrics") == 0) {
		answer->content_type = "text/plain; version=0.0.4; charset=utf-8";
		answer->text = metrics_prometheus(&health.view);
	} else if (strcmp(path, "/readyz") == 0) {
		answer->text = health_readiness(&health, &ready);
	} else if (strcmp(path, "/status.json") == 0) {
		answer->text = health_status(&health);
	} else {
		answer->text = memory_string("{\"status\":\"ok\"}\n"); /* the loop turns, or nobody would say so */
	}
	answer->status = ready ? 200 : 503;
}

static bool start_http(struct service *service, char *error, size_t error_size)
{
	const struct config *config = service->config;
	struct http_handler handler = {.paths = http_paths,
	                               .open = http_open_paths,
	                               .hosts = (const char *const *)config->http.hosts.items,
	                               .host_count = config->http.hosts.count,
	                               .answer = answer_http};
	if (!config->http.enabled)
		return true;
	service->http =
	    http_start(&service->loop, config->http.address, config->http.port, &handler, service, error, error_size);
	return service->http != NULL;
}

static bool shares(const struct config *config)
{
	return (config->role & CONFIG_ROLE_CONSUMER) && config_shares(&config->consumer);
}

/* Does the broker keep a session of ours, and queue messages in it? */
static bool keeps_session(const struct config *config)
{
	return (config->role & CONFIG_ROLE_CONSUMER) && config->consumer.qos > 0;
}

/* Under MQTT 3.1.1 only where it is shown: there a connection for $SYS cannot be told from the consumer's without harm
 * by a broker that gives both the same client id, see broker.c. */
static bool watches_broker(const struct config *config)
{
	bool harmless = config->mqtt.protocol == 5 && keeps_session(config);
	return config->mqtt.watch_broker && (config->http.enabled || shares(config) || harmless);
}

static void start_broker(struct service *service)
{
	const struct config *config = service->config;
	struct broker_options options = {.config = &config->mqtt,
	                                 .client_id = service->client_id,
	                                 .queues = keeps_session(config),
	                                 .shares = shares(config)};
	if (!watches_broker(config))
		return;
	service->broker = broker_start(&service->loop, &options, service);
	/* Else when the consumer has subscribed: a broker that does not let that in need not be asked twice. */
	if (!(config->role & CONFIG_ROLE_CONSUMER))
		broker_go(service->broker);
}

static bool wants_status(const struct service *service)
{
	enum config_status wanted = service->config->log_status;
	return wanted == CONFIG_STATUS_ON || (wanted == CONFIG_STATUS_AUTO && isatty(STDERR_FILENO));
}

/* ---- the parts ---- */

static void consumer_stopped(void *owner);
static void publisher_stopped(void *owner);

static void stop_consumer(struct service *service)
{
	if (service->consumer == NULL)
		return;
	service->ending.consumer = service->consumer;
	service->consumer = NULL;
	consumer_stop(service->ending.consumer, consumer_stopped);
}

static void stop_publisher(struct service *service)
{
	if (service->publisher == NULL)
		return;
	service->ending.publisher = service->publisher;
	service->publisher = NULL;
	publisher_stop(service->ending.publisher, publisher_stopped);
}

/* The publisher goes first: the consumer may have to store its last messages. */
static void stop_next(struct service *service)
{
	if ((service->to_stop & CONFIG_ROLE_PUBLISHER) && has_publisher(service)) {
		stop_publisher(service);
	} else if ((service->to_stop & CONFIG_ROLE_CONSUMER) && has_consumer(service)) {
		stop_consumer(service);
	} else {
		void (*stopped)(void *) = service->parts_stopped;
		service->to_stop = CONFIG_ROLE_NONE;
		service->parts_stopped = NULL;
		if (stopped != NULL)
			stopped(service->parts_context);
		finish_when_stopped(service);
	}
}

static void consumer_stopped(void *owner)
{
	struct service *service = owner;
	service->ending.consumer = NULL;
	service->to_stop &= ~CONFIG_ROLE_CONSUMER;
	service->subscribed = false;
	state_unlock(service->state, "consumer");
	log_info("service", "consumer stopped");
	stop_next(service);
}

static void publisher_stopped(void *owner)
{
	struct service *service = owner;
	service->ending.publisher = NULL;
	service->to_stop &= ~CONFIG_ROLE_PUBLISHER;
	state_unlock(service->state, "publisher");
	log_info("service", "publisher stopped");
	stop_next(service);
}

static void consumer_failed(void *owner)
{
	struct service *service = owner;
	service->exit_code = 1;
	service_stop(service);
}

static void consumer_subscribed(void *owner)
{
	struct service *service = owner;
	service->subscribed = true;
	if (service->publisher != NULL)
		publisher_go(service->publisher);
	if (service->broker != NULL)
		broker_go(service->broker);
}

/* The count check has come to its end, and with it the run. */
static void check_ended(void *owner, bool complete)
{
	struct service *service = owner;
	service->check = NULL;
	if (!complete && !service->stopping)
		service->exit_code = 1;
	service_stop(service);
	finish_when_stopped(service);
}

static void start_check(struct service *service)
{
	const struct metrics_publisher *now = &service->publisher_counters, *before = &service->publisher_before;
	struct count_check_inputs inputs = {
	    .config = service->config,
	    .consumer = &service->consumer_counters,
	    .publisher = {.generated = now->generated - before->generated,
	                  .acked = now->acked - before->acked,
	                  .failed = now->failed - before->failed,
	                  .no_subscribers = now->no_subscribers - before->no_subscribers},
	    .run = publisher_run(service->publisher),
	    .result = &service->publisher_counters.check,
	};
	service->check = count_check_start(&service->loop, &inputs, check_ended, service);
}

static void all_published(uv_timer_t *timer)
{
	struct service *service = container_of(timer, struct service, published);
	if (service->consumer == NULL || service->publisher == NULL) /* or it is ending */
		service_stop(service);
	else if (service->check == NULL)
		start_check(service);
}

/* The publisher's count is reached. */
static void publisher_done(void *owner)
{
	struct service *service = owner;
	const struct metrics_publisher *counters = &service->publisher_counters;
	log_info("publisher", "%llu messages acknowledged, %llu failed: done", (unsigned long long)counters->acked,
	         (unsigned long long)counters->failed);
	if (counters->failed > 0)
		service->exit_code = 1;
	uv_timer_start(&service->published, all_published, 0, 0);
}

static bool start_consumer(struct service *service, char *error, size_t error_size)
{
	static const struct consumer_handler handler = {.subscribed = consumer_subscribed, .failed = consumer_failed};
	if (service->consumer != NULL)
		return true;
	if (!state_lock(service->state, "consumer", error, error_size))
		return false;
	service->consumer = consumer_start(&service->loop, service->config, service->state, service->client_id,
	                                   &service->consumer_counters, &handler, service);
	service->consumer_ran = true;
	return true;
}

static bool start_publisher(struct service *service, char *error, size_t error_size)
{
	static const struct publisher_handler handler = {.done = publisher_done};
	if (service->publisher != NULL)
		return true;
	if (!state_lock(service->state, "publisher", error, error_size))
		return false;
	service->publisher_before = service->publisher_counters;
	service->publisher = publisher_start(&service->loop, service->config, service->client_id,
	                                     &service->publisher_counters, &handler, service);
	service->publisher_ran = true;
	/* The broker discards what nobody is subscribed to. */
	if (service->consumer == NULL || service->subscribed)
		publisher_go(service->publisher);
	return true;
}

bool service_start_role(struct service *service, enum config_role role, char *error, size_t error_size)
{
	bool ending = service->stopping || ((role & CONFIG_ROLE_CONSUMER) && service->ending.consumer != NULL) ||
	              ((role & CONFIG_ROLE_PUBLISHER) && service->ending.publisher != NULL);
	if (ending) {
		snprintf(error, error_size, "the part is still stopping; start it when it has stopped");
		return false;
	}
	if ((role & CONFIG_ROLE_CONSUMER) && !start_consumer(service, error, error_size))
		return false;
	return !(role & CONFIG_ROLE_PUBLISHER) || start_publisher(service, error, error_size);
}

void service_stop_role(struct service *service, enum config_role role, void (*stopped)(void *context), void *context)
{
	service->to_stop |= role;
	service->parts_stopped = stopped;
	service->parts_context = context;
	stop_next(service);
}

enum config_role service_roles(const struct service *service)
{
	return (enum config_role)((has_publisher(service) ? CONFIG_ROLE_PUBLISHER : 0) |
	                          (has_consumer(service) ? CONFIG_ROLE_CONSUMER : 0));
}

/* ---- stopping ---- */

static void close_handle(uv_handle_t *handle, void *context)
{
	if (!uv_is_closing(handle))
		uv_close(handle, NULL);
}

static void broker_stopped(void *owner)
{
	struct service *service = owner;
	service->ending.broker = NULL;
	finish_when_stopped(service);
}

static void stop_broker(struct service *service)
{
	if (service->broker == NULL)
		return;
	service->ending.broker = service->broker;
	service->broker = NULL;
	broker_stop(service->ending.broker, broker_stopped);
}

static void http_stopped(void *owner)
{
	struct service *service = owner;
	service->http = NULL;
	service->finished = true;
	uv_walk(&service->loop, close_handle, NULL); /* only the service's own are left */
}

/* Whoever watches may do so to the end: http goes last. */
static void finish_when_stopped(struct service *service)
{
	if (!service->stopping || service->finishing || has_publisher(service) || has_consumer(service) ||
	    service->ending.broker != NULL || service->check != NULL)
		return;
	service->finishing = true;
	if (service->http != NULL)
		http_stop(service->http, http_stopped);
	else
		http_stopped(service);
}

/* Without waiting for workers that hang. */
static void leave(struct service *service)
{
	log_status(NULL);
	print_sums(service);
	_exit(service->exit_code);
}

static void shutdown_timed_out(uv_timer_t *timer)
{
	struct service *service = container_of(timer, struct service, shutdown);
	if (service->hurried) {
		log_warn("service",
		         "name resolution, MongoDB or the broker still keeps it; exiting without waiting. What "
		         "is in flight was not acknowledged and comes again");
		leave(service);
	}
	log_warn("service", "shutdown_timeout has passed; handing back what is not stored");
	service->hurried = true;
	uv_timer_start(&service->shutdown, shutdown_timed_out, UNSTOPPABLE_MS, 0);
	if (service->ending.publisher != NULL)
		publisher_hurry(service->ending.publisher);
	bool stopping = service->ending.consumer != NULL;
	stop_consumer(service);
	if (service->ending.consumer != NULL && (stopping || metrics_in_flight(&service->consumer_counters) > 0))
		consumer_hurry(service->ending.consumer);
}

/* Attempts to reach MongoDB may hang for as long as the driver's time-outs: they are worth waiting for only while a
 * message depends on them. */
static void look_for_the_end(uv_timer_t *timer)
{
	struct service *service = container_of(timer, struct service, patience);
	bool done =
	    !has_publisher(service) && service->ending.consumer != NULL && consumer_is_done(service->ending.consumer);
	service->done_for_ms = done ? service->done_for_ms + PATIENCE_MS : 0;
	if (service->done_for_ms < UNSTOPPABLE_MS)
		return;
	log_info("service", "every message is durable; not waiting for MongoDB to answer an attempt under way");
	leave(service);
}

void service_stop(struct service *service)
{
	if (service->stopping)
		return;
	service->stopping = true;
	uv_timer_start(&service->patience, look_for_the_end, PATIENCE_MS, PATIENCE_MS);
	uv_timer_stop(&service->published);
	if (service->check != NULL)
		count_check_stop(service->check);
	uv_timer_start(&service->shutdown, shutdown_timed_out, (uint64_t)service->config->shutdown_timeout_ms, 0);
	stop_broker(service);
	service->to_stop = CONFIG_ROLE_BOTH;
	stop_next(service);
}

static void on_signal(uv_signal_t *handle, int number)
{
	struct service *service = handle->data;
	service->last_hrtime = 0; /* libuv forgets the idle time before a signal: this iteration cannot be measured */
	switch (number) {
	case SIGUSR1:
		print_sums(service);
		break;
	case SIGHUP:
		log_info("service", "SIGHUP ignored: the configuration is read at start-up only");
		break;
	default:
		if (service->stopping) {
			log_warn(
			    "service",
			    "second signal: exiting at once; what is in flight was not acknowledged and comes again");
			_exit(1);
		}
		log_info("service", "%s: stopping", number == SIGINT ? "SIGINT" : "SIGTERM");
		service_stop(service);
	}
}

/* ---- building ---- */

static void watch_signals(struct service *service)
{
	static const int numbers[SIGNALS] = {SIGTERM, SIGINT, SIGUSR1, SIGHUP};
	for (int i = 0; i < SIGNALS; i++) {
		uv_signal_init(&service->loop, &service->signals[i]);
		service->signals[i].data = service;
		uv_signal_start(&service->signals[i], on_signal, numbers[i]);
	}
}

static void size_thread_pool(const struct config *config)
{
	char threads[16];
	int connects = config->consumer.connections - 1 + watches_broker(config);
	snprintf(threads, sizeof threads, "%d", config->consumer.workers + EXTRA_THREADS + connects);
	setenv("UV_THREADPOOL_SIZE", threads, 1);
}

/* libuv aborts when it finds no descriptor for the pipe of its signals. */
static bool has_descriptors(void)
{
	int descriptors[LOOP_DESCRIPTORS];
	int count = 0;
	while (count < LOOP_DESCRIPTORS && (descriptors[count] = dup(STDERR_FILENO)) >= 0)
		count++;
	int reason = errno;
	for (int i = 0; i < count; i++)
		close(descriptors[i]);
	errno = reason;
	return count == LOOP_DESCRIPTORS || reason == EBADF; /* without standard error nothing can be told */
}

struct service *service_create(const struct config *config, char *error, size_t error_size)
{
	struct state *state = state_open(config->state_dir, error, error_size);
	if (state == NULL)
		return NULL;
	/* Made now, if it has to be, and saved: it must stay the same. */
	state_client_id(state, config->mqtt.client_id);
	if (!state_save(state, error, error_size)) {
		state_close(state);
		return NULL;
	}
	struct service *service = memory_zeroed(1, sizeof *service);
	service->config = config;
	service->state = state;
	service->client_id = memory_string(state_client_id(state, config->mqtt.client_id));
	service->started_ms = clock_wall_ms();
	size_thread_pool(config);
	signal(SIGPIPE, SIG_IGN); /* the libraries write to sockets that may be gone */
	int result = has_descriptors() ? uv_loop_init(&service->loop) : uv_translate_sys_error(errno);
	if (result != 0) {
		snprintf(error, error_size,
		         "cannot start the event loop: %s; has the process enough file descriptors (ulimit -n)?",
		         uv_strerror(result));
		state_close(state);
		free(service->client_id);
		free(service);
		return NULL;
	}
	mosquitto_lib_init();
	uv_loop_configure(&service->loop, UV_METRICS_IDLE_TIME);
	uv_timer_init(&service->loop, &service->shutdown);
	uv_timer_init(&service->loop, &service->patience);
	uv_timer_init(&service->loop, &service->status);
	uv_timer_init(&service->loop, &service->published);
	uv_prepare_init(&service->loop, &service->prepare);
	uv_prepare_start(&service->prepare, measure_iteration);
	watch_signals(service);
	if (start_http(service, error, error_size)) {
		start_broker(service);
		return service;
	}
	service_destroy(service);
	return NULL;
}

void service_destroy(struct service *service)
{
	if (service == NULL)
		return;
	if (!service->finished) { /* never run: no part, at most http and broker */
		service_stop(service);
		uv_run(&service->loop, UV_RUN_DEFAULT);
	}
	if (uv_loop_close(&service->loop) != 0) {
		log_error("service", "a handle was left open at exit; please report this");
		abort();
	}
	state_close(service->state);
	free(service->client_id);
	mosquitto_lib_cleanup();
	free(service);
}

int service_run(struct service *service)
{
	if (wants_status(service))
		uv_timer_start(&service->status, show_status, STATUS_MS, STATUS_MS);
	uv_run(&service->loop, UV_RUN_DEFAULT);
	log_status(NULL);
	print_sums(service);
	return service->exit_code;
}

uv_loop_t *service_loop(struct service *service)
{
	return &service->loop;
}

const struct metrics_consumer *service_consumer_counters(const struct service *service)
{
	return &service->consumer_counters;
}

const struct metrics_publisher *service_publisher_counters(const struct service *service)
{
	return &service->publisher_counters;
}
