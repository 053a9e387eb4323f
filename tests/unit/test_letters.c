/* What the log says of dead letters: when, how many, and what of the newest. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "letters.h"

#include "document.h"
#include "log.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { EVERY_MS = 50, ENDLESS_MS = 3600000 };

static uv_loop_t loop;
static struct letters *letters;
static FILE *captured;
static int true_stderr;
static bool is_stopped;

static int set_up(void **state)
{
	captured = tmpfile();
	true_stderr = dup(STDERR_FILENO);
	dup2(fileno(captured), STDERR_FILENO);
	log_configure(LOG_LEVEL_INFO, LOG_FORMAT_TEXT);
	assert_int_equal(uv_loop_init(&loop), 0);
	return 0;
}

static void on_stopped(void *owner)
{
	is_stopped = true;
}

static void stop_letters(void)
{
	is_stopped = false;
	letters_stop(letters, on_stopped, NULL);
	uv_run(&loop, UV_RUN_DEFAULT);
	assert_true(is_stopped);
}

static int tear_down(void **state)
{
	assert_int_equal(uv_loop_close(&loop), 0);
	dup2(true_stderr, STDERR_FILENO);
	close(true_stderr);
	fclose(captured);
	return 0;
}

/* What was logged since the last call, without the times. Static. */
static const char *said(void)
{
	static char whole[32768], text[32768];
	ssize_t length = pread(fileno(captured), whole, sizeof whole - 1, 0);
	assert_true(length >= 0 && ftruncate(fileno(captured), 0) == 0 && lseek(fileno(captured), 0, SEEK_SET) == 0);
	whole[length] = text[0] = 0;
	size_t used = 0;
	for (char *rest = whole, *line; (line = strtok_r(rest, "\n", &rest)) != NULL;)
		used += (size_t)snprintf(text + used, sizeof text - used, "%s\n", strchr(line, ' ') + 1);
	return text;
}

static void note_bytes(int reason, const char *topic, const void *payload, size_t length)
{
	static const struct id_rule rule;
	struct batch batch = {0};
	struct message message = {
	    .topic = topic, .topic_length = strlen(topic), .payload = payload, .payload_length = length, .qos = 1};
	batch_add(&batch, &message, &rule, 1000, 0);
	batch.messages[0].reason = (uint8_t)reason;
	letters_note(letters, &batch, &batch.messages[0]);
	batch_finish(&batch);
}

static void note(int reason, const char *topic, const char *payload)
{
	note_bytes(reason, topic, payload, strlen(payload));
}

static void turn(void)
{
	uv_run(&loop, UV_RUN_NOWAIT);
	uv_run(&loop, UV_RUN_NOWAIT);
}

/* Until the timer has fired as often as it wants to. */
static void wait_until_quiet(void)
{
	uv_run(&loop, UV_RUN_DEFAULT);
}

static void the_first_is_said_at_once_with_its_batch(void **state)
{
	letters = letters_start(&loop, "bad", ENDLESS_MS);
	turn();
	assert_string_equal(said(), "");
	note(JSON_SYNTAX, "sensors/a", "{\"n\":}");
	assert_string_equal(said(), ""); /* not from within the call */
	turn();
	assert_string_equal(said(),
	                    "warn  consumer: 1 new dead letter in bad; the newest: invalid_json: its sender has "
	                    "to send JSON; its topic: sensors/a; its 6 bytes: {\"n\":}\n");
	for (int i = 0; i < 100000; i++)
		note(i % 1000 == 0 ? DOCUMENT_UNIQUE_INDEX : JSON_EMPTY, "sensors/many", "");
	turn();
	assert_string_equal(said(), ""); /* the minute is not over */
	note(DOCUMENT_PAYLOAD_SIZE, "sensors/last", "x");
	stop_letters();
	assert_string_equal(said(), "warn  consumer: 100001 new dead letters in bad (empty_payload 99900, "
	                            "payload_too_large 1, unique_index 100); the newest: payload_too_large: raise "
	                            "consumer.max_payload; its topic: sensors/last; its 1 bytes: x\n");
}

static void a_line_for_each_minute_with_new_ones(void **state)
{
	letters = letters_start(&loop, "bad", EVERY_MS);
	for (int i = 1; i <= 3; i++) {
		note(JSON_SYNTAX, "first", "x");
		turn();
		assert_non_null(strstr(said(), "1 new dead letter in bad; the newest: invalid_json: "));
		note(JSON_EMPTY, "second", "");
		note(JSON_EMPTY, "second", "");
		uint64_t before = uv_now(&loop);
		wait_until_quiet();
		assert_true(uv_now(&loop) - before >= EVERY_MS);
		const char *text = said();
		assert_non_null(
		    strstr(text, "2 new dead letters in bad; the newest: empty_payload: an empty payload "));
		assert_ptr_equal(strchr(text, '\n'), text + strlen(text) - 1);
	}
	stop_letters();
	assert_string_equal(said(), "");
}

static void bytes_of_others_cannot_forge_a_line(void **state)
{
	letters = letters_start(&loop, "bad", ENDLESS_MS);
	note_bytes(JSON_SYNTAX, "a\x1b[2Jb\n", "\0\x1b\n\xff\xc2\x9b\"ü", 9);
	turn();
	const char *text = said();
	assert_non_null(strstr(text, "; its topic: a\\x1b[2Jb\\n; its 9 bytes: \\x00\\x1b\\n\\xff"));
	assert_null(strpbrk(text, "\x1b\xff"));
	assert_null(strstr(text, "\xc2\x9b"));
	assert_non_null(strstr(text, "\"ü\n"));
	assert_ptr_equal(strchr(text, '\n'), text + strlen(text) - 1);
	stop_letters();
}

/* Never in the middle of a character. */
static void long_ones_are_cut(void **state)
{
	char payload[2000], topic[1000];
	letters = letters_start(&loop, "bad", EVERY_MS);
	for (int shift = 0; shift < 4; shift++) {
		memset(payload, 'x', sizeof payload);
		memset(topic, 't', sizeof topic);
		topic[999] = 0;
		for (size_t at = 60 + (size_t)shift; at < 200; at++)
			payload[at] = "\xf0\x9f\x98\x80"[(at - 60 - (size_t)shift) % 4];
		note_bytes(DOCUMENT_PAYLOAD_SIZE, topic, payload, sizeof payload);
		wait_until_quiet();
		const char *text = said();
		assert_non_null(strstr(text, "tttt…; its 2000 bytes: xxxx"));
		assert_null(strstr(text, "\\x"));
		assert_true(strlen(text) < 600 && strcmp(text + strlen(text) - 4, "…\n") == 0);
	}
	stop_letters();
}

static void every_reason_has_a_remedy(void **state)
{
	letters = letters_start(&loop, "bad", EVERY_MS);
	for (int reason = JSON_EMPTY; reason < DOCUMENT_REASONS; reason++) {
		char start[100];
		note(reason, "a", "b");
		wait_until_quiet();
		snprintf(start, sizeof start, "the newest: %s: ", document_reason_name((enum document_reason)reason));
		const char *text = said(), *at = strstr(text, start);
		assert_non_null(at);
		assert_null(strstr(text, "see reason.message"));
		assert_true(strstr(text, "; its topic: a; its 1 bytes: b\n") - at > 35);
	}
	stop_letters();
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	    cmocka_unit_test_setup_teardown(the_first_is_said_at_once_with_its_batch, set_up, tear_down),
	    cmocka_unit_test_setup_teardown(a_line_for_each_minute_with_new_ones, set_up, tear_down),
	    cmocka_unit_test_setup_teardown(bytes_of_others_cannot_forge_a_line, set_up, tear_down),
	    cmocka_unit_test_setup_teardown(long_ones_are_cut, set_up, tear_down),
	    cmocka_unit_test_setup_teardown(every_reason_has_a_remedy, set_up, tear_down),
	};
	return cmocka_run_group_tests_name("letters", tests, NULL, NULL);
}
