/*
 * The log: see log.h.
 *
 * A line is built whole on the stack of the thread that logs and leaves in one write(2), so lines of several threads
 * never mix and nothing is allocated. Level and format are set before the first thread starts and only read from
 * then on.
 *
 * The status line is what log lines and log_status() share: its text lies behind a mutex. As long as no status has
 * been drawn on a terminal, no line takes the mutex. Afterwards each line erases the status, writes itself and draws
 * the status again behind it, all in its one write; the mutex is held until then, or an old status could be drawn
 * over a newer one.
 */
#define _GNU_SOURCE
#include "log.h"

#include "clock.h"
#include "escape.h"
#include "utf8.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

enum {
	LINE_SIZE = 4096,  /* a line with its line feed */
	ROOM_SIZE = 64,    /* a longer name of a room is cut */
	STATUS_SIZE = 512, /* the status as it is drawn */
	TAIL_SIZE = 8,     /* kept free for what ends a line: "…" and "}\n" */
	REPEAT_MS = 60000, /* the same complaint again after this */
	STALLED_MS = 100,  /* the longest wait for a full non-blocking descriptor; then the line is lost */
	COLUMNS_UNKNOWN = 80,
};

static const char *const LEVEL_NAMES[] = {"debug", "info", "warn", "error"};
static const char ELLIPSIS[] = "\xe2\x80\xa6";
static const char ERASE[] = "\r\x1b[K";

static enum log_level least_level = LOG_LEVEL_INFO;
static enum log_format line_format = LOG_FORMAT_TEXT;

static atomic_bool status_drawn_ever;
static pthread_mutex_t status_mutex = PTHREAD_MUTEX_INITIALIZER;
static char status_text[STATUS_SIZE]; /* behind status_mutex; "" when none is drawn */

/* Text that grows in a fixed array and is cut, never overrun. */
struct line {
	char *bytes;
	size_t length, size;
};

void log_configure(enum log_level level, enum log_format format)
{
	least_level = level;
	line_format = format;
}

bool log_enabled(enum log_level level)
{
	return level >= least_level;
}

static bool put(struct line *line, const char *text, size_t length)
{
	if (line->length + length > line->size)
		return false;
	memcpy(line->bytes + line->length, text, length);
	line->length += length;
	return true;
}

/* Write everything to standard error. A reader that has gone or stalled costs the line, never the service. */
static void write_out(const char *bytes, size_t length)
{
	while (length != 0) {
		ssize_t written = write(STDERR_FILENO, bytes, length);
		if (written >= 0) {
			bytes += written;
			length -= (size_t)written;
		} else if (errno == EAGAIN) {
			struct pollfd full = {.fd = STDERR_FILENO, .events = POLLOUT};
			if (poll(&full, 1, STALLED_MS) <= 0)
				return;
		} else if (errno != EINTR) {
			return;
		}
	}
}

/* Append one character of `text`, escaped where needed. Returns the bytes of `text` used, 0 when the line is full. */
static size_t put_character(struct line *line, const char *text, bool json)
{
	char escaped[ESCAPE_SIZE];
	size_t used = escape_character(text, json ? ESCAPE_STRING : ESCAPE_TEXT, escaped);
	bool plain = escaped[0] == '\0';
	return put(line, plain ? text : escaped, plain ? used : strlen(escaped)) ? used : 0;
}

/* Append `text` escaped; mark with "…" what did not fit or what `cut` says was missing before. */
static void put_escaped(struct line *line, const char *text, bool json, bool cut)
{
	const char *next = text;
	line->size -= TAIL_SIZE;
	while (*next != 0 && !(cut && strnlen(next, 4) < 4 && utf8_character((const uint8_t *)next) == 0)) {
		size_t used = put_character(line, next, json);
		if (used == 0)
			break;
		next += used;
	}
	line->size += TAIL_SIZE;
	if (cut || *next != 0)
		put(line, ELLIPSIS, sizeof ELLIPSIS - 1);
}

static void put_time(struct line *line)
{
	char text[40];
	clock_format(clock_wall_ms(), text, sizeof text);
	put(line, text, strlen(text));
}

static void put_literal(struct line *line, const char *text)
{
	put(line, text, strlen(text));
}

/* Fill `line` with the whole line. The room is ours, short and clean; it is escaped all the same. */
static void build_line(struct line *line, bool json, enum log_level level, const char *room, const char *message,
                       bool cut)
{
	put_literal(line, json ? "{\"time\":\"" : "");
	put_time(line);
	put_literal(line, json ? "\",\"level\":\"" : " ");
	put_literal(line, LEVEL_NAMES[level]);
	if (!json && strlen(LEVEL_NAMES[level]) < 5)
		put_literal(line, " ");
	put_literal(line, json ? "\",\"room\":\"" : " ");
	line->size = line->length + ROOM_SIZE;
	put_escaped(line, room, json, false);
	line->size = LINE_SIZE;
	put_literal(line, json ? "\",\"message\":\"" : ": ");
	put_escaped(line, message, json, cut);
	put_literal(line, json ? "\"}\n" : "\n");
}

/* Send a line, around the status if one has ever been drawn. */
static void send_line(const struct line *line)
{
	if (!atomic_load(&status_drawn_ever)) {
		write_out(line->bytes, line->length);
		return;
	}
	char bytes[LINE_SIZE + STATUS_SIZE + sizeof ERASE];
	struct line whole = {.bytes = bytes, .size = sizeof bytes};
	pthread_mutex_lock(&status_mutex);
	if (status_text[0] != '\0')
		put_literal(&whole, ERASE);
	put(&whole, line->bytes, line->length);
	put_literal(&whole, status_text);
	write_out(whole.bytes, whole.length);
	pthread_mutex_unlock(&status_mutex);
}

static void emit(enum log_level level, const char *room, const char *message, bool cut)
{
	int saved = errno;
	char bytes[LINE_SIZE];
	struct line line = {.bytes = bytes, .size = sizeof bytes};
	build_line(&line, line_format == LOG_FORMAT_JSON, level, room, message, cut);
	send_line(&line);
	errno = saved;
}

void log_print(FILE *out, enum log_format format, enum log_level level, const char *room, const char *message)
{
	char bytes[LINE_SIZE];
	struct line line = {.bytes = bytes, .size = sizeof bytes};
	build_line(&line, format == LOG_FORMAT_JSON, level, room, message, false);
	fwrite(bytes, 1, line.length, out);
}

void log_write(enum log_level level, const char *room, const char *format, ...)
{
	if (!log_enabled(level))
		return;
	char message[LINE_SIZE];
	va_list arguments;
	va_start(arguments, format);
	int length = vsnprintf(message, sizeof message, format, arguments);
	va_end(arguments);
	if (length < 0)
		snprintf(message, sizeof message, "(a message that could not be formatted: %s)", format);
	emit(level, room, message, length >= LINE_SIZE);
}

static uint64_t monotonic_ms(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

void log_repeat(struct log_repeat *repeat, enum log_level level, const char *room, const char *format, ...)
{
	char text[LINE_SIZE];
	va_list arguments;
	va_start(arguments, format);
	vsnprintf(text, sizeof text, format, arguments);
	va_end(arguments);
	uint64_t now = monotonic_ms();
	bool same = strncmp(text, repeat->last, sizeof repeat->last - 1) == 0;
	if (same && now - repeat->written_at < REPEAT_MS) {
		repeat->left_out++;
		return;
	}
	if (repeat->left_out != 0)
		log_write(level, room, "%s (%llu more like this left out)", repeat->last,
		          (unsigned long long)repeat->left_out);
	if (!same || repeat->left_out == 0)
		log_write(level, room, "%s", text);
	snprintf(repeat->last, sizeof repeat->last, "%.*s", (int)sizeof repeat->last - 1, text);
	repeat->written_at = now;
	repeat->left_out = 0;
}

void log_repeat_end(struct log_repeat *repeat)
{
	*repeat = (struct log_repeat){0};
}

static bool status_in_place(void)
{
	const char *terminal = getenv("TERM");
	return isatty(STDERR_FILENO) && (terminal == NULL || strcmp(terminal, "dumb") != 0);
}

/* Cut `text` to one column less than the terminal has: a wrapped status could not be erased. */
static void cut_to_terminal(char *text)
{
	struct winsize window;
	size_t columns = COLUMNS_UNKNOWN;
	if (ioctl(STDERR_FILENO, TIOCGWINSZ, &window) == 0 && window.ws_col != 0)
		columns = window.ws_col;
	for (; *text != '\0'; text++) {
		bool starts_character = ((unsigned char)*text & 0xc0) != 0x80;
		if (starts_character && --columns == 0) {
			*text = '\0';
			return;
		}
	}
}

static void draw_status(const char *text)
{
	char bytes[STATUS_SIZE + sizeof ERASE], escaped[STATUS_SIZE];
	struct line status = {.bytes = escaped, .size = sizeof escaped - 1};
	put_escaped(&status, text, false, false);
	escaped[status.length] = '\0';
	cut_to_terminal(escaped);
	pthread_mutex_lock(&status_mutex);
	memcpy(status_text, escaped, strlen(escaped) + 1);
	int length = snprintf(bytes, sizeof bytes, "%s%s", ERASE, status_text);
	write_out(bytes, (size_t)length);
	atomic_store(&status_drawn_ever, true);
	pthread_mutex_unlock(&status_mutex);
}

static void remove_status(void)
{
	pthread_mutex_lock(&status_mutex);
	if (status_text[0] != '\0')
		write_out(ERASE, sizeof ERASE - 1);
	status_text[0] = '\0';
	pthread_mutex_unlock(&status_mutex);
}

void log_status(const char *text)
{
	int saved = errno;
	if (text == NULL)
		remove_status();
	else if (status_in_place())
		draw_status(text);
	else
		emit(LOG_LEVEL_INFO, "status", text, false);
	errno = saved;
}

/* What assert() calls in this process, whichever library has it: libmosquitto's end it at some packets of a broker.
 * glibc's own would write a line in a form of its own. */
_Noreturn void log_assertion(const char *condition, const char *file, unsigned line,
                             const char *function) __asm__("__assert_fail");

_Noreturn void log_assertion(const char *condition, const char *file, unsigned line, const char *function)
{
	log_error("service", "assertion failed: %s, in %s at %s:%u; nothing unacknowledged is lost, please report this",
	          condition, function != NULL ? function : "a function", file, line);
	abort();
}
