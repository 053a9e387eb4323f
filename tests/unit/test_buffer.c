/* buffer.c: what is appended stays, offsets survive growth, memory is given back. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "buffer.h"

#include <stdlib.h>

static void appended_bytes_stay(void **state)
{
	struct buffer buffer = {0};
	for (unsigned i = 0; i < 100000; i++)
		buffer_append_byte(&buffer, (uint8_t)(i * 31));
	assert_int_equal(buffer.length, 100000);
	assert_true(buffer.capacity >= buffer.length);
	for (unsigned i = 0; i < 100000; i++)
		assert_int_equal(buffer.data[i], (uint8_t)(i * 31));
	buffer_finish(&buffer);
}

static void pieces_of_any_size(void **state)
{
	struct buffer buffer = {0};
	char piece[5000];
	size_t total = 0;
	for (size_t size = 0; size < sizeof piece; size += 7) {
		memset(piece, (int)(size % 251), size);
		buffer_append(&buffer, piece, size);
		total += size;
	}
	assert_int_equal(buffer.length, total);
	size_t at = 0;
	for (size_t size = 0; size < sizeof piece; at += size, size += 7)
		for (size_t i = 0; i < size; i++)
			assert_int_equal(buffer.data[at + i], size % 251);
	buffer_finish(&buffer);
}

static void nothing_needs_no_memory(void **state)
{
	struct buffer buffer = {0};
	buffer_append(&buffer, NULL, 0);
	buffer_append(&buffer, "", 0);
	assert_null(buffer.data);
	assert_int_equal(buffer.length, 0);
	assert_int_equal(buffer.capacity, 0);
	buffer_reset(&buffer, 0);
	buffer_finish(&buffer);
}

/* The room lies behind what was there, and belongs to the contents at once. */
static void extend_makes_room_at_the_end(void **state)
{
	struct buffer buffer = {0};
	buffer_append(&buffer, "head", 4);
	memset(buffer_extend(&buffer, 1000), 'x', 1000);
	buffer_append(&buffer, "tail", 4);
	assert_int_equal(buffer.length, 1008);
	assert_memory_equal(buffer.data, "headx", 5);
	assert_memory_equal(buffer.data + 1003, "xtail", 5);
	buffer_finish(&buffer);
}

/* So that n appended bytes cost O(n) copies. */
static void growth_doubles(void **state)
{
	struct buffer buffer = {0};
	size_t growths = 0, capacity = 0;
	for (unsigned i = 0; i < 1 << 20; i++) {
		buffer_append_byte(&buffer, 1);
		if (buffer.capacity != capacity) {
			assert_true(buffer.capacity >= 2 * capacity);
			capacity = buffer.capacity;
			growths++;
		}
	}
	assert_true(growths <= 20);
	buffer_finish(&buffer);
}

static void room_that_is_there_is_used(void **state)
{
	struct buffer buffer = {0};
	buffer_append_byte(&buffer, 'a');
	size_t capacity = buffer.capacity;
	const uint8_t *data = buffer.data;
	buffer_extend(&buffer, capacity - 1);
	assert_ptr_equal(buffer.data, data);
	assert_int_equal(buffer.capacity, capacity);
	assert_int_equal(buffer.length, capacity);
	buffer_extend(&buffer, 1);
	assert_true(buffer.capacity > capacity);
	assert_int_equal(buffer.data[0], 'a');
	buffer_finish(&buffer);
}

static void reset_keeps_up_to_a_limit(void **state)
{
	struct buffer buffer = {0};
	buffer_extend(&buffer, 4096);
	const uint8_t *data = buffer.data;
	buffer_reset(&buffer, 4096);
	assert_int_equal(buffer.length, 0);
	assert_int_equal(buffer.capacity, 4096);
	assert_ptr_equal(buffer.data, data);
	buffer_reset(&buffer, 4095);
	assert_int_equal(buffer.capacity, 0);
	assert_null(buffer.data);
	buffer_append(&buffer, "again", 5);
	assert_memory_equal(buffer.data, "again", 5);
	buffer_finish(&buffer);
}

static void finish_leaves_an_empty_buffer(void **state)
{
	struct buffer buffer = {0};
	buffer_append(&buffer, "bytes", 5);
	buffer_finish(&buffer);
	assert_null(buffer.data);
	assert_int_equal(buffer.length, 0);
	assert_int_equal(buffer.capacity, 0);
	buffer_append(&buffer, "again", 5);
	assert_int_equal(buffer.length, 5);
	buffer_finish(&buffer);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	    cmocka_unit_test(appended_bytes_stay),
	    cmocka_unit_test(pieces_of_any_size),
	    cmocka_unit_test(nothing_needs_no_memory),
	    cmocka_unit_test(extend_makes_room_at_the_end),
	    cmocka_unit_test(growth_doubles),
	    cmocka_unit_test(room_that_is_there_is_used),
	    cmocka_unit_test(reset_keeps_up_to_a_limit),
	    cmocka_unit_test(finish_leaves_an_empty_buffer),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
