/*
 * What is not ours, shown: topics, payloads, client ids, the names and error texts of servers. A terminal obeys control
 * characters, and characters of direction turn the text around them; bytes that are no UTF-8 break a line of JSON.
 *
 * Log and status line escape what they are given (log.h). Everything else that this program prints goes through the two
 * printers below, a test sees to it, and so nobody who prints has to think of it.
 */
#ifndef MQTT2MONGO_ESCAPE_H
#define MQTT2MONGO_ESCAPE_H

#include <stddef.h>
#include <stdio.h>

enum { ESCAPE_SIZE = 8 }; /* the longest escape with its NUL */

enum escape_form {
	ESCAPE_TEXT,   /* for people: \n, \x1b, \u202e, and \xff for a byte that is no UTF-8 */
	ESCAPE_STRING, /* the inside of a JSON string: quotes and backslashes too */
	ESCAPE_LINES,  /* JSON, or lines of ours, as a whole: line feeds, quotes and backslashes stay */
};

/*
 * Take one character of `text`, which ends in a NUL, or one byte that is no UTF-8. Returns how many bytes that is; in
 * `escaped` is what to show instead, "" when it can be shown as it is. Pure.
 */
size_t escape_character(const char *text, enum escape_form form, char escaped[ESCAPE_SIZE]);

/* Print one line, escaped as ESCAPE_TEXT; the line feed at its end is added. */
void escape_print(FILE *out, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Print JSON or whole lines, escaped as ESCAPE_LINES: JSON stays JSON and means the same. */
void escape_print_lines(FILE *out, const char *text);

#endif
