/* When a batch leaves (pace.h): by itself, and between a broker with a window and a database that takes its time. */
#include "pace.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

enum {
	INTERVAL = 20,       /* ms */
	TICKS = 10,          /* of the model, in a millisecond */
	STORING = 3 * TICKS, /* a write */
	FAR = 4096,          /* ticks; an acknowledgement is on its way for less */
};

/* Messages due at a rate, a broker that sends while its window has room, and a service as lane.c is one: it reads while
 * a batch fills, and acknowledges when all of it is stored. */
struct model {
	struct pace pace;
	uint64_t interval;
	size_t window;         /* of the broker */
	double rate;           /* messages a tick */
	unsigned distance;     /* ticks until an acknowledgement has its effect, */
	unsigned spread;       /* and up to so many more */
	size_t returning[FAR]; /* acknowledged messages, by the tick modulo FAR in which the broker learns of it */
	uint64_t tick;
	double published;
	size_t taken;     /* by the broker, to be sent */
	size_t in_flight; /* sent, not acknowledged */
	size_t socket;    /* sent, not read */
	size_t filling;   /* read, not in a write */
	uint64_t due;
	uint64_t stored_at; /* tick at which the write under way ends; 0: none is */
	size_t stored, writes;
	uint64_t longest; /* ticks that a batch was filling */
	uint64_t began_at;
};

static const struct pace_wait WAIT = {.interval = INTERVAL};

static uint64_t now(const struct model *model)
{
	return model->tick / TICKS;
}

static struct pace_wait wait_of(const struct model *model)
{
	return (struct pace_wait){.interval = model->interval};
}

static void begin_write(struct model *model)
{
	uint64_t filled = model->tick - model->began_at;
	pace_write(&model->pace, now(model));
	model->longest = filled > model->longest ? filled : model->longest;
	model->stored += model->filling;
	model->filling = 0;
	model->writes++;
	model->stored_at = model->tick + STORING;
}

static void send_messages(struct model *model)
{
	model->published += model->rate;
	while (model->in_flight < model->window && (double)(model->taken + 1) <= model->published) {
		model->taken++;
		model->in_flight++;
		model->socket++;
	}
}

static void acknowledge(struct model *model)
{
	for (size_t i = 0; i < model->pace.unacknowledged; i++) {
		unsigned late = model->spread == 0 ? 0 : (unsigned)(i * 7) % model->spread;
		model->returning[(model->tick + model->distance + late) % FAR]++;
	}
	pace_acknowledged(&model->pace);
}

static void hear_acknowledgements(struct model *model)
{
	size_t *returned = &model->returning[model->tick % FAR];
	model->in_flight -= *returned;
	*returned = 0;
}

static void read_socket(struct model *model)
{
	if (model->socket == 0)
		return;
	if (model->filling == 0)
		model->began_at = model->tick;
	for (; model->socket > 0; model->socket--, model->filling++)
		pace_message(&model->pace, 1, now(model));
	model->due = pace_due(&model->pace, wait_of(model), now(model));
	if (pace_is_ready(&model->pace, model->filling, wait_of(model), now(model)))
		begin_write(model);
}

static void step(struct model *model)
{
	if (model->stored_at != 0 && model->tick >= model->stored_at) {
		model->stored_at = 0;
		acknowledge(model);
	}
	hear_acknowledgements(model);
	send_messages(model);
	if (model->stored_at == 0)
		read_socket(model);
	if (model->filling > 0 && model->stored_at == 0 && now(model) >= model->due) {
		pace_waited(&model->pace, wait_of(model), now(model));
		begin_write(model);
	}
	model->tick++;
}

/* So many seconds at so many messages a second; what was counted before is forgotten. */
static void run(struct model *model, double rate, unsigned seconds)
{
	model->rate = rate / (1000 * TICKS);
	model->stored = model->writes = 0;
	model->longest = 0;
	model->published = (double)model->taken; /* nothing has piled up */
	for (uint64_t end = model->tick + (uint64_t)seconds * 1000 * TICKS; model->tick < end;)
		step(model);
}

static struct model model_of(uint64_t interval, size_t window)
{
	struct model model = {.interval = interval, .window = window};
	pace_connected(&model.pace);
	return model;
}

/* That of a connection whose last write began then. */
static struct pace written_at(uint64_t time)
{
	struct pace pace = {0};
	pace_connected(&pace);
	pace_write(&pace, time);
	return pace;
}

static void come(struct pace *pace, unsigned count, int qos, uint64_t time)
{
	for (unsigned i = 0; i < count; i++)
		pace_message(pace, qos, time);
}

static void test_a_message_after_a_pause_leaves_at_once(void **state)
{
	struct model model = model_of(INTERVAL, 1000);
	run(&model, 10, 2);
	assert_in_range(model.writes, 19, 20);
	assert_int_equal(model.longest, 0);
}

static void test_messages_that_keep_coming_share_writes(void **state)
{
	static const double rates[] = {200, 2000, 10000};
	for (size_t i = 0; i < sizeof rates / sizeof *rates; i++) {
		struct model paced = model_of(INTERVAL, 100000), at_once = model_of(0, 100000);
		run(&paced, rates[i], 2);
		run(&at_once, rates[i], 2);
		assert_in_range(paced.writes, 80, 2 * 1000 / INTERVAL + 1);
		assert_in_range(at_once.writes, 390, 1000);
		assert_in_range(paced.longest, 1, INTERVAL * TICKS);
		assert_in_range(paced.stored, (size_t)(2 * rates[i] * 0.98), (size_t)(2 * rates[i]));
	}
}

static void test_a_large_batch_leaves_when_the_socket_is_empty(void **state)
{
	struct pace pace = written_at(100);
	assert_false(pace_is_ready(&pace, PACE_LARGE - 1, WAIT, 101));
	assert_true(pace_is_ready(&pace, PACE_LARGE, WAIT, 101));
	assert_true(pace_is_ready(&pace, 1, WAIT, 120));
	assert_int_equal(pace_due(&pace, WAIT, 101), 120);
	assert_int_equal(pace_due(&pace, WAIT, 130), 130);
	assert_int_equal(pace_due(&pace, (struct pace_wait){0}, 101), 101);
	assert_true(pace_is_ready(&pace, 1, (struct pace_wait){0}, 100));
}

/* As fast as the broker sends, with windows that no CONNACK tells. */
static void test_a_window_that_is_used_up_is_not_waited_for(void **state)
{
	static const size_t windows[] = {1, 2, 10, 20, 32};
	for (size_t i = 0; i < sizeof windows / sizeof *windows; i++) {
		struct model paced = model_of(INTERVAL, windows[i]);
		struct model at_once = model_of(0, windows[i]);
		run(&paced, 1e6, 10);
		run(&at_once, 1e6, 10);
		assert_in_range(paced.stored, at_once.stored * 95 / 100, at_once.stored);
		assert_in_range(paced.writes, at_once.writes * 95 / 100, at_once.writes);
	}
}

/* The same where the rate uses it up only now and then: nothing waits much longer than it would at once. */
static void test_a_rate_that_is_near_to_what_the_window_allows(void **state)
{
	for (unsigned rate = 200; rate < 3100; rate += 100) {
		struct model model = model_of(INTERVAL, 10);
		run(&model, rate, 5);
		assert_in_range(model.stored, rate * 475 / 100 - 10, rate * 5 + 10);
	}
}

/* A broker far away: what it sends after an acknowledgement comes in pieces, which use up the window together but none
 * of them alone. */
static void test_a_window_and_a_long_way(void **state)
{
	static const size_t windows[] = {1, 10, 20, 32};
	static const unsigned distances[] = {1, 5, 10, 20, 30, 50, 100, 200}; /* ms */
	for (size_t i = 0; i < sizeof windows / sizeof *windows; i++)
		for (size_t k = 0; k < sizeof distances / sizeof *distances; k++)
			for (unsigned spread = 0; spread <= 2 * TICKS; spread += TICKS) {
				struct model paced = model_of(INTERVAL, windows[i]);
				paced.distance = distances[k] * TICKS;
				paced.spread = spread;
				struct model at_once = paced;
				at_once.interval = 0;
				run(&paced, 1e6, 10);
				run(&at_once, 1e6, 10);
				assert_true(paced.stored * 100 >= at_once.stored * 85);
			}
}

static void test_a_burst_that_is_over_is_not_waited_for(void **state)
{
	struct pace pace = written_at(100);
	come(&pace, 50, 1, 103);
	assert_false(pace_is_ready(&pace, 50, WAIT, 103));
	assert_in_range(pace_due(&pace, WAIT, 103), 104, 108);
	pace_message(&pace, 1, 104);
	assert_in_range(pace_due(&pace, WAIT, 104), 105, 109);
	pace_acknowledged(&pace);
	come(&pace, 3, 1, 105); /* too few to tell */
	assert_int_equal(pace_due(&pace, WAIT, 105), 120);
}

/* A quiet connection looks like a small window. When more comes that is seen to be wrong. */
static void test_a_rate_that_rises_is_not_taken_for_a_window(void **state)
{
	static const double before[] = {10, 100, 200, 500}, after[] = {1000, 2000, 10000};
	for (size_t i = 0; i < sizeof before / sizeof *before; i++)
		for (size_t k = 0; k < sizeof after / sizeof *after; k++) {
			struct model model = model_of(INTERVAL, 100000);
			run(&model, before[i], 10);
			run(&model, after[k], 2);
			assert_in_range(model.writes, 80, 2 * 1000 / INTERVAL + 10);
		}
}

/* Bursts end, and that looks like a window as well; another one may be larger. */
static void test_a_window_that_was_learnt_is_doubted_now_and_then(void **state)
{
	struct pace pace = {0};
	uint64_t time = 1000;
	unsigned waits = 0;
	pace_connected(&pace);
	for (unsigned round = 0; round < 10000; round++, time += 5) {
		come(&pace, 10, 1, time);
		if (!pace_is_ready(&pace, 10, WAIT, time)) {
			time = pace_due(&pace, WAIT, time);
			pace_waited(&pace, WAIT, time);
			waits++;
		}
		pace_write(&pace, time);
		pace_acknowledged(&pace);
	}
	assert_in_range(waits, 40, 60); /* of 50 seconds */
	come(&pace, 11, 1, time);
	assert_false(pace_is_ready(&pace, 11, WAIT, time));
}

static void test_when_the_socket_is_read_seldom(void **state)
{
	struct pace pace = written_at(100);
	for (unsigned i = 0; i < 4; i++) {
		assert_false(pace_is_fast(&pace)); /* too few to tell */
		pace_message(&pace, 1, 101);
	}
	assert_true(pace_is_fast(&pace));
	pace_message(&pace, 1, 105); /* five in 4 ms */
	assert_true(pace_is_fast(&pace));
	pace_message(&pace, 1, 107);
	assert_false(pace_is_fast(&pace));
	pace_waited(&pace, WAIT, 200); /* six may be the window */
	come(&pace, 6, 1, 107);
	assert_true(pace_is_fast(&pace)); /* they are not */
	pace_waited(&pace, WAIT, 200);
	assert_false(pace_is_fast(&pace)); /* but twelve may be: each is to be seen at once */
}

static void test_another_connection_has_another_window(void **state)
{
	struct pace pace = written_at(100);
	come(&pace, 10, 1, 101);
	pace_waited(&pace, WAIT, 120);
	assert_true(pace_is_ready(&pace, 10, WAIT, 119));
	pace_connected(&pace);
	come(&pace, 10, 1, 101);
	assert_false(pace_is_ready(&pace, 10, WAIT, 101));
	assert_true(pace_is_ready(&pace, 10, WAIT, 120)); /* but the pace is kept */
}

/* A round of `count` messages that come at once; true when it has to wait, which it does. */
static bool waits(struct pace *pace, unsigned count, struct pace_wait wait, uint64_t *time)
{
	come(pace, count, 1, *time);
	bool waited = !pace_is_ready(pace, count, wait, *time);
	if (waited) {
		*time = pace_due(pace, wait, *time);
		pace_waited(pace, wait, *time);
	}
	pace_write(pace, *time);
	pace_acknowledged(pace);
	*time += 3;
	return waited;
}

static void test_a_window_may_shrink(void **state)
{
	for (unsigned window = 1; window < 20; window++) {
		uint64_t time = 1000;
		unsigned long_waits = 0;
		struct pace pace = written_at(time);
		assert_true(waits(&pace, 100, WAIT, &time));
		for (unsigned round = 0; round < 100; round++)
			long_waits += waits(&pace, window, WAIT, &time);
		assert_in_range(long_waits, 1, 9);
		assert_int_equal(pace.reached, window);
		waits(&pace, window + 1, WAIT, &time); /* and it may grow */
		assert_int_equal(pace.reached, window + 1);
	}
}

/* At rates below the window the silence is the rate's, and what was learnt stays the largest of what was seen lately.
 */
static void test_few_short_waits_are_no_smaller_window(void **state)
{
	uint64_t time = 1000;
	struct pace pace = written_at(time);
	for (unsigned round = 0; round < 100; round++) {
		waits(&pace, 20, WAIT, &time);
		for (unsigned i = 0; i < 5; i++)
			waits(&pace, 2, WAIT, &time);
		assert_int_equal(pace.reached, 20);
	}
}

static void test_what_is_waited_for_to_the_end(void **state)
{
	static const struct pace_wait patient = {.interval = 1000, .patient = true}, other = {.interval = 1000};
	struct pace pace = written_at(100);
	come(&pace, 50, 1, 103);
	assert_int_equal(pace_due(&pace, patient, 103), 1100);
	assert_in_range(pace_due(&pace, other, 103), 104, 108);
}

static void test_how_long_silence_has_to_be(void **state)
{
	struct pace pace = written_at(100);
	for (uint64_t time = 100; time <= 140; time += 10) /* a gap of 10 ms, or of 8 by their number */
		pace_message(&pace, 1, time);
	uint64_t due = pace_due(&pace, (struct pace_wait){.interval = 1000}, 140);
	assert_in_range(due, 140 + 4 * 8, 140 + 4 * 10 + 3);
}

/* The doubts take a fiftieth of the time at most, also of long intervals. */
static void test_doubts_are_rare(void **state)
{
	static const struct pace_wait wait = {.interval = 1000};
	uint64_t time = 1000, waited = 0;
	struct pace pace = written_at(time);
	while (time < 1000000) {
		uint64_t before = time;
		if (waits(&pace, 2, wait, &time))
			waited += time - before - 3;
	}
	assert_in_range(waited, 1, 1000000 / 40);
}

static void test_messages_of_qos_0_are_in_no_window(void **state)
{
	struct pace pace = written_at(100);
	come(&pace, 100, 0, 101);
	assert_false(pace_is_ready(&pace, 100, WAIT, 101));
	pace_waited(&pace, WAIT, 120);
	assert_false(pace.is_window);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	    cmocka_unit_test(test_a_message_after_a_pause_leaves_at_once),
	    cmocka_unit_test(test_messages_that_keep_coming_share_writes),
	    cmocka_unit_test(test_a_large_batch_leaves_when_the_socket_is_empty),
	    cmocka_unit_test(test_a_window_that_is_used_up_is_not_waited_for),
	    cmocka_unit_test(test_a_rate_that_is_near_to_what_the_window_allows),
	    cmocka_unit_test(test_a_window_and_a_long_way),
	    cmocka_unit_test(test_a_burst_that_is_over_is_not_waited_for),
	    cmocka_unit_test(test_a_rate_that_rises_is_not_taken_for_a_window),
	    cmocka_unit_test(test_a_window_that_was_learnt_is_doubted_now_and_then),
	    cmocka_unit_test(test_when_the_socket_is_read_seldom),
	    cmocka_unit_test(test_a_window_may_shrink),
	    cmocka_unit_test(test_few_short_waits_are_no_smaller_window),
	    cmocka_unit_test(test_what_is_waited_for_to_the_end),
	    cmocka_unit_test(test_how_long_silence_has_to_be),
	    cmocka_unit_test(test_doubts_are_rare),
	    cmocka_unit_test(test_another_connection_has_another_window),
	    cmocka_unit_test(test_messages_of_qos_0_are_in_no_window),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
