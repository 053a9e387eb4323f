/*
 * Turns publisher and consumer on and off in one process, on one loop, through service.h as main.c uses it, and checks
 * the counters after each turn. The command line is the program's own; test_toggle.py runs it against real servers.
 *
 * One timer walks through the steps below. A step acts once, then its condition is looked at until it holds
 * (TIMEOUT_MS, else exit 1), then the next one begins. After a part has been stopped its counters are watched for
 * QUIET_MS: they must not move. Exit 0 when all has held and service_destroy() found no handle left open.
 */
#include "config.h"
#include "log.h"
#include "service.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern char **environ;

enum {
	TICK_MS = 10,
	QUIET_MS = 300,
	TIMEOUT_MS = 20000,
	MESSAGES = 20, /* a part that runs moves by this many */
	ROUNDS = 3,
};

struct toggle {
	struct service *service;
	uv_timer_t timer;
	int step, round;
	uint64_t step_since;
	bool begun;         /* the step has acted */
	int stops_expected; /* `stopped` calls that are due */
	int stops_seen;
	enum config_role stopped_role;
	/* the counters as the step found them */
	struct metrics_consumer consumer;
	struct metrics_publisher publisher;
	bool failed;
};

struct step {
	const char *name;
	void (*act)(struct toggle *toggle);
	bool (*holds)(struct toggle *toggle);
};

static void fail_toggle(struct toggle *toggle, const char *what)
{
	log_error("toggle", "round %d: %s", toggle->round, what);
	toggle->failed = true;
	uv_close((uv_handle_t *)&toggle->timer, NULL);
	service_stop(toggle->service);
}

/* ---- looking ---- */

static const struct metrics_consumer *consumer_now(const struct toggle *toggle)
{
	return service_consumer_counters(toggle->service);
}

static const struct metrics_publisher *publisher_now(const struct toggle *toggle)
{
	return service_publisher_counters(toggle->service);
}

static bool consumer_moved(const struct toggle *toggle, uint64_t by)
{
	return consumer_now(toggle)->stored >= toggle->consumer.stored + by;
}

static bool publisher_moved(const struct toggle *toggle, uint64_t by)
{
	return publisher_now(toggle)->acked >= toggle->publisher.acked + by;
}

static bool consumer_untouched(const struct toggle *toggle)
{
	struct metrics_loop none = {0};
	char *now = metrics_sums(consumer_now(toggle), NULL, &none, true);
	char *then = metrics_sums(&toggle->consumer, NULL, &none, true);
	bool untouched = strcmp(now, then) == 0;
	free(now);
	free(then);
	return untouched;
}

static bool publisher_untouched(const struct toggle *toggle)
{
	return memcmp(publisher_now(toggle), &toggle->publisher, sizeof toggle->publisher) == 0;
}

static bool all_stored(const struct toggle *toggle)
{
	return consumer_now(toggle)->stored >= publisher_now(toggle)->acked &&
	       metrics_in_flight(consumer_now(toggle)) == 0;
}

static bool runs(const struct toggle *toggle, enum config_role role)
{
	return service_roles(toggle->service) == role;
}

static bool stops_done(const struct toggle *toggle)
{
	return toggle->stops_seen == toggle->stops_expected;
}

static bool quiet_long_enough(const struct toggle *toggle)
{
	return uv_now(service_loop(toggle->service)) - toggle->step_since >= QUIET_MS;
}

/* ---- acting ---- */

static void start(struct toggle *toggle, enum config_role role)
{
	char error[512];
	if (!service_start_role(toggle->service, role, error, sizeof error))
		fail_toggle(toggle, error);
}

static void on_stopped(void *context)
{
	struct toggle *toggle = context;
	toggle->stops_seen++;
	if (service_roles(toggle->service) & toggle->stopped_role)
		fail_toggle(toggle, "reported as stopped, but it runs");
}

static void stop(struct toggle *toggle, enum config_role role)
{
	toggle->stops_expected++;
	toggle->stopped_role = role;
	service_stop_role(toggle->service, role, on_stopped, toggle);
}

static void nothing(struct toggle *toggle)
{
}

static void start_both(struct toggle *toggle)
{
	start(toggle, CONFIG_ROLE_BOTH);
}

static void start_consumer(struct toggle *toggle)
{
	start(toggle, CONFIG_ROLE_CONSUMER);
}

static void start_publisher(struct toggle *toggle)
{
	start(toggle, CONFIG_ROLE_PUBLISHER);
}

static void stop_both(struct toggle *toggle)
{
	stop(toggle, CONFIG_ROLE_BOTH);
}

static void stop_consumer(struct toggle *toggle)
{
	stop(toggle, CONFIG_ROLE_CONSUMER);
}

static void stop_publisher(struct toggle *toggle)
{
	stop(toggle, CONFIG_ROLE_PUBLISHER);
}

/* On and off again before anything has connected. */
static void start_and_stop_both(struct toggle *toggle)
{
	start(toggle, CONFIG_ROLE_BOTH);
	stop(toggle, CONFIG_ROLE_BOTH);
}

/* What already runs goes on, and nothing is counted twice. */
static void start_both_again(struct toggle *toggle)
{
	start(toggle, CONFIG_ROLE_BOTH);
	start(toggle, CONFIG_ROLE_BOTH);
}

/* ---- what must hold, before the next step ---- */

static bool both_move(struct toggle *toggle)
{
	return runs(toggle, CONFIG_ROLE_BOTH) && consumer_moved(toggle, MESSAGES) && publisher_moved(toggle, MESSAGES);
}

static bool consumer_is_off(struct toggle *toggle)
{
	return stops_done(toggle) && runs(toggle, CONFIG_ROLE_PUBLISHER);
}

static bool publisher_is_off(struct toggle *toggle)
{
	return stops_done(toggle) && runs(toggle, CONFIG_ROLE_CONSUMER);
}

static bool both_are_off(struct toggle *toggle)
{
	return stops_done(toggle) && runs(toggle, CONFIG_ROLE_NONE);
}

static bool only_publisher_moves(struct toggle *toggle)
{
	if (!consumer_untouched(toggle))
		fail_toggle(toggle, "the consumer is stopped, but its counters move");
	return publisher_moved(toggle, MESSAGES) && quiet_long_enough(toggle);
}

static bool only_consumer_may_move(struct toggle *toggle)
{
	if (!publisher_untouched(toggle))
		fail_toggle(toggle, "the publisher is stopped, but its counters move");
	return all_stored(toggle) && quiet_long_enough(toggle);
}

static bool nothing_moves(struct toggle *toggle)
{
	if (!consumer_untouched(toggle) || !publisher_untouched(toggle))
		fail_toggle(toggle, "both are stopped, but counters move");
	return quiet_long_enough(toggle);
}

/* What was published while the consumer was off, and what is published now. */
static bool consumer_has_caught_up(struct toggle *toggle)
{
	return runs(toggle, CONFIG_ROLE_BOTH) && consumer_now(toggle)->stored >= toggle->publisher.acked &&
	       publisher_moved(toggle, MESSAGES) && consumer_moved(toggle, MESSAGES);
}

static const struct step steps[] = {
    {"both on", start_both, both_move},
    {"consumer off", stop_consumer, consumer_is_off},
    {"consumer off: only the publisher moves", nothing, only_publisher_moves},
    {"consumer on: the backlog arrives", start_consumer, consumer_has_caught_up},
    {"publisher off", stop_publisher, publisher_is_off},
    {"publisher off: the rest is stored, then silence", nothing, only_consumer_may_move},
    {"publisher on", start_publisher, both_move},
    {"both off", stop_both, both_are_off},
    {"both off: nothing moves", nothing, nothing_moves},
    {"publisher on, alone", start_publisher, only_publisher_moves},
    {"publisher off, nothing runs", stop_publisher, both_are_off},
    {"consumer on, alone: the backlog arrives", start_consumer, only_consumer_may_move},
    {"consumer off, nothing runs", stop_consumer, both_are_off},
    {"on and off at once", start_and_stop_both, both_are_off},
    {"off what is off", stop_both, both_are_off},
    {"both on, twice", start_both_again, both_move},
};
enum { STEPS = sizeof steps / sizeof *steps };

/* ---- walking ---- */

static void begin_step(struct toggle *toggle)
{
	log_info("toggle", "round %d: %s", toggle->round, steps[toggle->step].name);
	toggle->begun = true;
	toggle->step_since = uv_now(service_loop(toggle->service));
	toggle->consumer = *consumer_now(toggle);
	toggle->publisher = *publisher_now(toggle);
	steps[toggle->step].act(toggle);
}

static void next_step(struct toggle *toggle)
{
	toggle->begun = false;
	if (++toggle->step < STEPS)
		return;
	toggle->step = 0;
	if (++toggle->round < ROUNDS)
		return;
	log_info("toggle", "done");
	uv_close((uv_handle_t *)&toggle->timer, NULL);
	service_stop(toggle->service);
}

static void tick(uv_timer_t *timer)
{
	struct toggle *toggle = timer->data;
	if (!toggle->begun) {
		begin_step(toggle);
		return;
	}
	bool holds = steps[toggle->step].holds(toggle);
	if (toggle->failed)
		return;
	if (holds) {
		next_step(toggle);
	} else if (uv_now(service_loop(toggle->service)) - toggle->step_since > TIMEOUT_MS) {
		log_error("toggle", "%d of %d stops reported, roles %d, %llu stored, %llu acked", toggle->stops_seen,
		          toggle->stops_expected, (int)service_roles(toggle->service),
		          (unsigned long long)consumer_now(toggle)->stored,
		          (unsigned long long)publisher_now(toggle)->acked);
		fail_toggle(toggle, steps[toggle->step].name);
	}
}

static int run(const struct config *config)
{
	char error[512];
	struct toggle toggle = {.service = service_create(config, error, sizeof error)};
	if (toggle.service == NULL) {
		log_error("toggle", "%s", error);
		return 1;
	}
	uv_timer_init(service_loop(toggle.service), &toggle.timer);
	toggle.timer.data = &toggle;
	uv_timer_start(&toggle.timer, tick, 0, TICK_MS);
	int exit_code = service_run(toggle.service);
	service_destroy(toggle.service);
	return toggle.failed ? 1 : exit_code;
}

int main(int argc, char **argv)
{
	struct config config;
	int exit_code = 2;
	if (config_load(&config, argc, argv, environ, stdout, stderr) == CONFIG_RUN) {
		log_configure(config.log_level, config.log_format);
		exit_code = run(&config);
	}
	config_finish(&config);
	return exit_code;
}
