/* The log: what reaches standard error, byte for byte; through a pipe, and through a pseudo terminal for the status. */
#define _GNU_SOURCE
#include "log.h"
#include "memory.h"

#include <assert.h>
#include <cjson/cJSON.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include <cmocka.h>

static int read_end = -1, true_stderr = -1;
static char captured[1 << 20];

static void redirect(int descriptor)
{
	true_stderr = dup(STDERR_FILENO);
	dup2(descriptor, STDERR_FILENO);
	close(descriptor);
}

static int start_pipe(void **state)
{
	int ends[2];
	assert_int_equal(pipe(ends), 0);
	read_end = ends[0];
	redirect(ends[1]);
	log_configure(LOG_LEVEL_INFO, LOG_FORMAT_TEXT);
	return 0;
}

static int start_terminal(void **state)
{
	read_end = posix_openpt(O_RDWR | O_NOCTTY);
	assert_true(read_end >= 0);
	assert_int_equal(grantpt(read_end) | unlockpt(read_end), 0);
	int terminal = open(ptsname(read_end), O_RDWR | O_NOCTTY);
	assert_true(terminal >= 0);
	struct termios settings;
	tcgetattr(terminal, &settings);
	cfmakeraw(&settings);
	tcsetattr(terminal, TCSANOW, &settings);
	struct winsize window = {.ws_row = 24, .ws_col = 20};
	ioctl(terminal, TIOCSWINSZ, &window);
	redirect(terminal);
	setenv("TERM", "xterm", 1);
	log_configure(LOG_LEVEL_INFO, LOG_FORMAT_TEXT);
	return 0;
}

static int end_pipe(void **state)
{
	log_status(NULL);
	dup2(true_stderr, STDERR_FILENO);
	close(true_stderr);
	close(read_end);
	return 0;
}

/* Everything written so far. */
static const char *capture(void)
{
	size_t length = 0;
	int patience = isatty(read_end) ? 50 : 0; /* a pipe has everything at once */
	struct pollfd ready = {.fd = read_end, .events = POLLIN};
	while (length < sizeof captured - 1 && poll(&ready, 1, patience) == 1) {
		ssize_t more = read(read_end, captured + length, sizeof captured - 1 - length);
		if (more <= 0)
			break;
		length += (size_t)more;
	}
	captured[length] = '\0';
	return captured;
}

/* The one text line captured, without its time. */
static const char *capture_after_time(void)
{
	const char *line = capture();
	assert_true(strlen(line) > 25);
	assert_memory_equal(line + 23, "Z ", 2);
	return line + 25;
}

static void text_line(void **state)
{
	log_info("mqtt", "connected to %s", "broker");
	const char *line = capture();
	unsigned year, month, day, hour, minute, second, ms;
	assert_int_equal(
	    sscanf(line, "%4u-%2u-%2uT%2u:%2u:%2u.%3uZ", &year, &month, &day, &hour, &minute, &second, &ms), 7);
	assert_string_equal(line + 25, "info  mqtt: connected to broker\n");
}

static void levels(void **state)
{
	log_debug("a", "hidden");
	assert_string_equal(capture(), "");
	log_configure(LOG_LEVEL_DEBUG, LOG_FORMAT_TEXT);
	log_debug("a", "shown");
	assert_string_equal(capture_after_time(), "debug a: shown\n");
	log_configure(LOG_LEVEL_ERROR, LOG_FORMAT_TEXT);
	assert_false(log_enabled(LOG_LEVEL_WARN));
	assert_true(log_enabled(LOG_LEVEL_ERROR));
	log_warn("a", "hidden");
	log_error("a", "shown");
	assert_string_equal(capture_after_time(), "error a: shown\n");
}

static void forged_lines_are_escaped(void **state)
{
	log_info("a", "%s",
	         "x\n2026-01-01 error b: \x1b[2J\x7f\xc2\x9b \xff\xc0\x80\xed\xa0\x80 \xf4\x90\x80\x80 é€😀\\\" "
	         "\xe2\x80\xae\xd8\x9c");
	assert_string_equal(capture_after_time(),
	                    "info  a: x\\n2026-01-01 error b: \\x1b[2J\\x7f\\u009b "
	                    "\\xff\\xc0\\x80\\xed\\xa0\\x80 \\xf4\\x90\\x80\\x80 é€😀\\\" \\u202e\\u061c\n");
}

static void errno_survives(void **state)
{
	errno = ENOENT;
	log_info("a", "b");
	assert_int_equal(errno, ENOENT);
}

static void json_line(void **state)
{
	log_configure(LOG_LEVEL_INFO, LOG_FORMAT_JSON);
	log_warn("mqtt", "say \"hi\"\\\n");
	const char *line = capture();
	assert_memory_equal(line, "{\"time\":\"", 9);
	assert_string_equal(line + 9 + 24, "\",\"level\":\"warn\",\"room\":\"mqtt\","
	                                   "\"message\":\"say \\\"hi\\\"\\\\\\n\"}\n");
	log_warn("mqtt", "%s", "\x1b\x7f\xc2\x9b\xe2\x81\xa6\xff");
	assert_non_null(strstr(capture(), "\"message\":\"\\u001b\\u007f\\u009b\\u2066\\\\xff\"}\n"));
}

/* The one captured line is one JSON object with all members. */
static void assert_json_line(void)
{
	const char *line = capture();
	size_t length = strlen(line);
	assert_true(length > 2 && length <= 4096);
	assert_ptr_equal(strchr(line, '\n'), line + length - 1);
	cJSON *object = cJSON_ParseWithOpts(line, NULL, 0);
	assert_non_null(object);
	assert_int_equal(cJSON_GetArraySize(object), 4);
	assert_true(cJSON_IsString(cJSON_GetObjectItem(object, "message")));
	cJSON_Delete(object);
	for (size_t i = 0; i + 1 < length; i++)
		assert_true((unsigned char)line[i] >= 0x20);
}

static void json_survives_hostile_bytes(void **state)
{
	char hostile[9000];
	uint32_t seed = 1;
	log_configure(LOG_LEVEL_INFO, LOG_FORMAT_JSON);
	for (unsigned round = 0; round < 300; round++) {
		size_t length = 1 + round * 29;
		for (size_t i = 0; i < length; i++) {
			seed = seed * 1664525 + 1013904223;
			hostile[i] = (char)(seed >> 24 ? seed >> 24 : 1);
		}
		hostile[length] = '\0';
		log_info("a", "%s", hostile);
		assert_json_line();
		log_info(hostile, "%s", hostile);
		assert_json_line();
	}
}

/* The sanitizers' allocators have a last word of their own. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { SANITIZED = 1 };
#else
enum { SANITIZED = 0 };
#endif

static void run_out_of_memory(void)
{
	memory_resize(NULL, SIZE_MAX / 4);
}

static void fail_an_assertion(void)
{
	assert(errno == -1 && "what failed");
}

/* It ends by SIGABRT, and its last word is a line of the log in the form of all. */
static void assert_last_word(void (*end)(void), const char *words)
{
	log_configure(LOG_LEVEL_INFO, LOG_FORMAT_JSON);
	pid_t child = fork();
	if (child == 0) {
		setrlimit(RLIMIT_CORE, &(struct rlimit){0});
		signal(SIGABRT, SIG_DFL);
		end();
		_exit(0);
	}
	int status;
	assert_int_equal(waitpid(child, &status, 0), child);
	assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
	assert_json_line();
	assert_non_null(strstr(captured, words));
}

static void last_words(void **state)
{
	assert_last_word(fail_an_assertion, "what failed");
	if (!SANITIZED)
		assert_last_word(run_out_of_memory, "out of memory");
}

static void long_lines_are_cut(void **state)
{
	char text[6000];
	for (size_t i = 0; i + 3 <= sizeof text - 1; i += 3)
		memcpy(text + i, "€", 3);
	text[sizeof text - 3] = '\0';
	for (unsigned shift = 0; shift < 3; shift++) {
		log_info("a", "%.*s%s", (int)shift, "xx", text);
		const char *line = capture();
		size_t length = strlen(line);
		assert_in_range(length, 4080, 4096);
		assert_string_equal(line + length - 4, "…\n");
		assert_null(strstr(line, "\\x"));
	}
}

static void repeats_are_left_out(void **state)
{
	struct log_repeat repeat = {0};
	for (int i = 0; i < 5; i++)
		log_repeat(&repeat, LOG_LEVEL_WARN, "a", "down: %s", "x");
	assert_string_equal(capture_after_time(), "warn  a: down: x\n");
	repeat.written_at -= 60000;
	log_repeat(&repeat, LOG_LEVEL_WARN, "a", "down: %s", "x");
	assert_string_equal(capture_after_time(), "warn  a: down: x (4 more like this left out)\n");
	log_repeat(&repeat, LOG_LEVEL_WARN, "a", "down: %s", "x");
	assert_string_equal(capture(), "");
	log_repeat(&repeat, LOG_LEVEL_WARN, "a", "down: %s", "y");
	const char *lines = capture_after_time();
	assert_non_null(strstr(lines, "down: x (1 more like this left out)\n"));
	assert_non_null(strstr(lines, "a: down: y\n"));
	log_repeat_end(&repeat);
	log_repeat(&repeat, LOG_LEVEL_WARN, "a", "down: %s", "y");
	assert_string_equal(capture_after_time(), "warn  a: down: y\n");
}

static void long_repeats_are_compared(void **state)
{
	struct log_repeat repeat = {0};
	char text[600];
	memset(text, 'x', sizeof text);
	text[sizeof text - 1] = '\0';
	log_repeat(&repeat, LOG_LEVEL_INFO, "a", "%s", text);
	assert_true(strlen(capture()) > sizeof text);
	log_repeat(&repeat, LOG_LEVEL_INFO, "a", "%s", text);
	assert_string_equal(capture(), "");
}

static void status_elsewhere_is_a_line(void **state)
{
	log_configure(LOG_LEVEL_ERROR, LOG_FORMAT_TEXT);
	log_status("10/s");
	assert_string_equal(capture_after_time(), "info  status: 10/s\n");
	log_status(NULL);
	assert_string_equal(capture(), "");
}

static void status_on_a_terminal(void **state)
{
	log_status("10/s");
	assert_string_equal(capture(), "\r\x1b[K10/s");
	log_info("a", "b");
	const char *line = capture();
	assert_memory_equal(line, "\r\x1b[K", 4);
	assert_string_equal(line + 4 + 25, "info  a: b\n10/s");
	log_status("2\n\x1b[2Jé3456789012345678901234567890");
	assert_string_equal(capture(), "\r\x1b[K2\\n\\x1b[2Jé34567890");
	log_status(NULL);
	assert_string_equal(capture(), "\r\x1b[K");
	log_info("a", "b");
	assert_string_equal(capture_after_time(), "info  a: b\n");
}

static void *log_many(void *argument)
{
	for (int i = 0; i < 200; i++)
		log_info("thread", "%s", "0123456789012345678901234567890123456789");
	return NULL;
}

static void threads_do_not_mix(void **state)
{
	pthread_t threads[4];
	size_t lines = 0;
	fcntl(STDERR_FILENO, F_SETPIPE_SZ, 1 << 20);
	for (int i = 0; i < 4; i++)
		pthread_create(&threads[i], NULL, log_many, NULL);
	for (int i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
	for (const char *line = capture(); *line != '\0'; line = strchr(line, '\n') + 1, lines++)
		assert_memory_equal(line + 23, "Z info  thread: 0123456789012345678901234567890123456789\n", 57);
	assert_int_equal(lines, 800);
}

/* A reader that has stalled costs lines, not the service. */
static void stalled_reader(void **state)
{
	fcntl(STDERR_FILENO, F_SETFL, O_NONBLOCK);
	fcntl(STDERR_FILENO, F_SETPIPE_SZ, 4096);
	for (int i = 0; i < 42; i++)
		log_info("a", "%s", "0123456789012345678901234567890123456789012345678901234567890123456789");
	assert_true(strlen(capture()) >= 4000);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	    cmocka_unit_test_setup_teardown(text_line, start_pipe, end_pipe),
	    cmocka_unit_test_setup_teardown(levels, start_pipe, end_pipe),
	    cmocka_unit_test_setup_teardown(forged_lines_are_escaped, start_pipe, end_pipe),
	    cmocka_unit_test_setup_teardown(errno_survives, start_pipe, end_pipe),
	    cmocka_unit_test_setup_teardown(json_line, start_pipe, end_pipe),
	    cmocka_unit_test_setup_teardown(json_survives_hostile_bytes, start_pipe, end_pipe),
	    cmocka_unit_test_setup_teardown(last_words, start_pipe, end_pipe),
	    cmocka_unit_test_setup_teardown(long_lines_are_cut, start_pipe, end_pipe),
	    cmocka_unit_test_setup_teardown(repeats_are_left_out, start_pipe, end_pipe),
	    cmocka_unit_test_setup_teardown(long_repeats_are_compared, start_pipe, end_pipe),
	    cmocka_unit_test_setup_teardown(status_elsewhere_is_a_line, start_pipe, end_pipe),
	    cmocka_unit_test_setup_teardown(threads_do_not_mix, start_pipe, end_pipe),
	    cmocka_unit_test_setup_teardown(stalled_reader, start_pipe, end_pipe),
	    cmocka_unit_test_setup_teardown(status_on_a_terminal, start_terminal, end_pipe),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
