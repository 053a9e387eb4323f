/* tally.c: what was seen, what is missing, what came twice; and the mode without memory for each number. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tally.h"

enum { COUNT = 1000 };

static void nothing_seen(void **state)
{
	struct tally tally;
	uint64_t missing[4] = {9, 9, 9, 9};
	tally_init(&tally, COUNT);
	assert_int_equal(tally_missing(&tally, missing, 4), 4);
	for (size_t i = 0; i < 4; i++)
		assert_int_equal(missing[i], i);
	assert_int_equal(tally.distinct + tally.marks, 0);
	tally_finish(&tally);
}

/* Backwards, and every third one twice; 0, 7, 8, 64 and the last one never. */
static void some_seen(void **state)
{
	static const uint64_t left_out[] = {0, 7, 8, 64, COUNT - 1};
	struct tally tally;
	tally_init(&tally, COUNT);
	uint64_t twice = 0;
	for (int64_t number = COUNT - 1; number >= 0; number--) {
		bool out = false;
		for (size_t i = 0; i < 5; i++)
			out |= left_out[i] == (uint64_t)number;
		if (out)
			continue;
		tally_mark(&tally, number);
		if (number % 3 == 0) {
			tally_mark(&tally, number);
			twice++;
		}
	}
	assert_int_equal(tally.distinct, COUNT - 5);
	assert_int_equal(tally.marks, COUNT - 5 + twice);
	uint64_t missing[10];
	assert_int_equal(tally_missing(&tally, missing, 10), 5);
	assert_memory_equal(missing, left_out, sizeof left_out);
	assert_int_equal(tally_missing(&tally, missing, 2), 2);
	for (size_t i = 0; i < 5; i++)
		tally_mark(&tally, (int64_t)left_out[i]);
	assert_int_equal(tally.distinct, COUNT);
	assert_int_equal(tally_missing(&tally, missing, 10), 0);
	tally_finish(&tally);
}

static void numbers_outside(void **state)
{
	struct tally tally;
	tally_init(&tally, COUNT);
	tally_mark(&tally, -1);
	tally_mark(&tally, COUNT);
	tally_mark(&tally, INT64_MIN);
	tally_mark(&tally, INT64_MAX);
	assert_int_equal(tally.distinct + tally.marks, 0);
	tally_finish(&tally);
}

static void small_counts(void **state)
{
	for (uint64_t count = 0; count < 20; count++) {
		struct tally tally;
		uint64_t missing[20];
		tally_init(&tally, count);
		assert_int_equal(tally_missing(&tally, missing, 20), count);
		for (uint64_t number = 0; number < count; number++)
			tally_mark(&tally, (int64_t)number);
		assert_int_equal(tally_missing(&tally, missing, 20), 0);
		tally_finish(&tally);
	}
}

static void the_most_that_is_told_apart(void **state)
{
	struct tally tally;
	uint64_t missing;
	tally_init(&tally, TALLY_MOST);
	assert_non_null(tally.seen);
	for (int64_t number = 0; number < TALLY_MOST; number++)
		if (number != TALLY_MOST - 1)
			tally_mark(&tally, number);
	assert_int_equal(tally_missing(&tally, &missing, 1), 1);
	assert_int_equal(missing, TALLY_MOST - 1);
	tally_finish(&tally);
}

static void above_it_only_counts(void **state)
{
	struct tally tally;
	uint64_t missing;
	tally_init(&tally, (uint64_t)TALLY_MOST + 1);
	assert_null(tally.seen);
	for (int i = 0; i < 5; i++)
		tally_mark(&tally, 7);
	tally_mark(&tally, -1);
	assert_int_equal(tally.marks, 5);
	assert_int_equal(tally.distinct, 5);
	assert_int_equal(tally_missing(&tally, &missing, 1), 0);
	tally_finish(&tally);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	    cmocka_unit_test(nothing_seen),
	    cmocka_unit_test(some_seen),
	    cmocka_unit_test(numbers_outside),
	    cmocka_unit_test(small_counts),
	    cmocka_unit_test(the_most_that_is_told_apart),
	    cmocka_unit_test(above_it_only_counts),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
