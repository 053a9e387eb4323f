/*
 * Levelled log to standard error, one write(2) per line, and the live status line that shares the terminal
 * with it. Text (`2026-11-22T20:18:24.123Z info  mqtt: connected …`) or JSON, one object a line.
 *
 * Any thread may log. Never log a secret: URIs go through config_redact_uri().
 */
#ifndef MQTT2MONGO_LOG_H
#define MQTT2MONGO_LOG_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

enum log_level { LOG_LEVEL_DEBUG, LOG_LEVEL_INFO, LOG_LEVEL_WARN, LOG_LEVEL_ERROR };
enum log_format { LOG_FORMAT_TEXT, LOG_FORMAT_JSON };

/* Set once at start-up, before any thread is started; until then text at level info. */
void log_configure(enum log_level level, enum log_format format);

/* True when lines of this level are written: spares the cost of building an argument. */
bool log_enabled(enum log_level level);

/*
 * Write one line. `room` names the part of the service ("mqtt", "store", …), the message is lower case
 * without a full stop. It is escaped (escape.h), so that bytes from the network cannot forge a line or reach a
 * terminal. Lines above 4 KiB are cut.
 */
void log_write(enum log_level level, const char *room, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* Print the line that log_write() would write if the log had this form, whatever its level: for who speaks before
 * log_configure(). */
void log_print(FILE *out, enum log_format format, enum log_level level, const char *room, const char *message);

#define log_debug(room, ...) log_write(LOG_LEVEL_DEBUG, room, __VA_ARGS__)
#define log_info(room, ...)  log_write(LOG_LEVEL_INFO, room, __VA_ARGS__)
#define log_warn(room, ...)  log_write(LOG_LEVEL_WARN, room, __VA_ARGS__)
#define log_error(room, ...) log_write(LOG_LEVEL_ERROR, room, __VA_ARGS__)

/*
 * A complaint that may come a thousand times. The line is written when its text differs from the last one or
 * when a minute has passed, then with the number of those left out. Zero-initialise one per cause; it belongs
 * to one thread. log_repeat_end() forgets the last text: the next complaint is news again.
 */
struct log_repeat {
	char last[256];
	uint64_t written_at; /* monotonic milliseconds */
	uint64_t left_out;
};
void log_repeat(struct log_repeat *repeat, enum log_level level, const char *room, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
void log_repeat_end(struct log_repeat *repeat);

/*
 * Replace the live status line with `text` (NULL: remove it). On a terminal it is redrawn in place below the log
 * lines; elsewhere each call writes one plain line. Loop thread.
 */
void log_status(const char *text);

#endif
