/* See escape.h. */
#define _GNU_SOURCE
#include "escape.h"

#include "utf8.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>

/* What needs an escape lies below U+FFFF: in at most three bytes. */
static unsigned code_point(const uint8_t *at, size_t length)
{
	return length == 1   ? at[0]
	       : length == 2 ? (at[0] & 0x1fU) << 6 | (at[1] & 0x3fU)
	                     : (at[0] & 0x0fU) << 12 | (at[1] & 0x3fU) << 6 | (at[2] & 0x3fU);
}

/* \n, \r, \t: the same in JSON and for people. */
static char short_escape(uint8_t byte)
{
	return byte == '\n' ? 'n' : byte == '\r' ? 'r' : byte == '\t' ? 't' : '\0';
}

size_t escape_character(const char *text, enum escape_form form, char escaped[ESCAPE_SIZE])
{
	const uint8_t *at = (const uint8_t *)text;
	size_t length = utf8_character(at);
	escaped[0] = '\0';
	if (length == 0)
		snprintf(escaped, ESCAPE_SIZE, "%sx%02x", form == ESCAPE_TEXT ? "\\" : "\\\\", at[0]);
	else if (form == ESCAPE_STRING && (at[0] == '"' || at[0] == '\\'))
		snprintf(escaped, ESCAPE_SIZE, "\\%c", at[0]);
	else if (!utf8_misleads(at) || (form == ESCAPE_LINES && at[0] == '\n'))
		return length;
	else if (short_escape(at[0]) != '\0')
		snprintf(escaped, ESCAPE_SIZE, "\\%c", short_escape(at[0]));
	else if (form == ESCAPE_TEXT && length == 1)
		snprintf(escaped, ESCAPE_SIZE, "\\x%02x", at[0]);
	else
		snprintf(escaped, ESCAPE_SIZE, "\\u%04x", code_point(at, length) & 0xffffU);
	return length > 0 ? length : 1;
}

static void print(FILE *out, const char *text, enum escape_form form)
{
	char escaped[ESCAPE_SIZE];
	const char *start = text; /* of what is not printed yet */
	while (*text != '\0') {
		size_t used = escape_character(text, form, escaped);
		if (escaped[0] != '\0') {
			fwrite(start, 1, (size_t)(text - start), out);
			fputs(escaped, out);
			start = text + used;
		}
		text += used;
	}
	fwrite(start, 1, (size_t)(text - start), out);
}

void escape_print(FILE *out, const char *format, ...)
{
	char *text = NULL;
	va_list arguments;
	va_start(arguments, format);
	if (vasprintf(&text, format, arguments) < 0)
		text = NULL;
	va_end(arguments);
	print(out, text != NULL ? text : "(out of memory)", ESCAPE_TEXT);
	fputc('\n', out);
	free(text);
}

void escape_print_lines(FILE *out, const char *text)
{
	print(out, text, ESCAPE_LINES);
}
