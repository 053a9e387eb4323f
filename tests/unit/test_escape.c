/* What is not ours, shown: every character there is, and every byte that is none. */
#define _GNU_SOURCE
#include "escape.h"

#include <cjson/cJSON.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static char *printed; /* by the printer last called */

static void print(bool lines, const char *text)
{
	size_t length;
	free(printed);
	FILE *out = open_memstream(&printed, &length);
	if (lines)
		escape_print_lines(out, text);
	else
		escape_print(out, "%s", text);
	fclose(out);
}

static int forget(void **state)
{
	free(printed);
	printed = NULL;
	return 0;
}

/* The UTF-8 of a character, with its NUL. */
static void put_character(uint32_t code, char text[5])
{
	static const uint8_t leads[] = {0, 0, 0xC0, 0xE0, 0xF0};
	int length = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
	text[length] = '\0';
	for (int i = length - 1; i > 0; i--, code >>= 6)
		text[i] = (char)(0x80 | (code & 0x3f));
	text[0] = (char)(leads[length] | code);
}

/* A list of its own: what a terminal obeys, and what turns or breaks the text around it. */
static bool must_not_be_shown(uint32_t code)
{
	static const struct {
		uint32_t first, last;
	} RANGES[] = {{0x01, 0x1f}, {0x7f, 0x9f}, {0x61c, 0x61c}, {0x200e, 0x200f}, {0x2028, 0x202e}, {0x2066, 0x206f}};
	for (size_t i = 0; i < sizeof RANGES / sizeof RANGES[0]; i++)
		if (code >= RANGES[i].first && code <= RANGES[i].last)
			return true;
	return false;
}

/* A line for people: only what may be shown is in it as it is. */
static void every_character_in_a_line(void **state)
{
	char text[5], expected[20];
	for (uint32_t code = 1; code < 0x110000; code += code == 0xd7ff ? 0x801 : 1) {
		put_character(code, text);
		print(false, text);
		const char *form = code == '\n' ? "\\n" : code == '\r' ? "\\r" : code == '\t' ? "\\t" : NULL;
		if (!must_not_be_shown(code))
			form = text;
		if (form != NULL)
			snprintf(expected, sizeof expected, "%s\n", form);
		else
			snprintf(expected, sizeof expected, code < 0x80 ? "\\x%02x\n" : "\\u%04x\n", (unsigned)code);
		assert_string_equal(printed, expected);
	}
}

/* Inside a JSON string, and in JSON as a whole, where only a quote, a backslash and a control of ASCII are escaped yet:
 * it is JSON, shows nothing else, and means the same. */
static void every_character_in_json(void **state)
{
	char text[5], escaped[ESCAPE_SIZE], json[32];
	for (uint32_t code = 1; code < 0x110000; code += code == 0xd7ff ? 0x801 : 1) {
		put_character(code, text);
		assert_int_equal(escape_character(text, ESCAPE_STRING, escaped), strlen(text));
		assert_true(!must_not_be_shown(code) || escaped[0] == '\\');
		snprintf(json, sizeof json, "\"%s\"", escaped[0] != '\0' ? escaped : text);
		cJSON *value = cJSON_ParseWithOpts(json, NULL, true);
		assert_true(cJSON_IsString(value));
		assert_string_equal(value->valuestring, text);
		cJSON_Delete(value);

		bool raw = code >= 0x20 && code != '"' && code != '\\';
		snprintf(json, sizeof json, "{\"k\":\n\"%s\"}\n", raw ? text : "\\n");
		print(true, json);
		assert_true(!must_not_be_shown(code) || strstr(printed, text) == NULL || code == '\n');
		value = cJSON_Parse(printed);
		assert_string_equal(cJSON_GetObjectItem(value, "k")->valuestring, raw ? text : "\n");
		cJSON_Delete(value);
	}
}

static void bytes_that_are_no_character(void **state)
{
	static const char *const BAD[][2] = {{"\x80", "\\x80\n"},
	                                     {"a\xff"
	                                      "b",
	                                      "a\\xffb\n"},
	                                     {"\xc0\x80", "\\xc0\\x80\n"},
	                                     {"\xe2\x80", "\\xe2\\x80\n"},
	                                     {"\xed\xa0\x80", "\\xed\\xa0\\x80\n"},
	                                     {"\xf4\x90\x80\x80", "\\xf4\\x90\\x80\\x80\n"}};
	for (size_t i = 0; i < sizeof BAD / sizeof BAD[0]; i++) {
		print(false, BAD[i][0]);
		assert_string_equal(printed, BAD[i][1]);
	}
	print(true, "{\"a\":\"\xff\"}");
	assert_string_equal(printed, "{\"a\":\"\\\\xff\"}");
}

static void runs_stay_whole(void **state)
{
	print(false, "");
	assert_string_equal(printed, "\n");
	print(false, "rs0\x1b]0;owned\x07 \xe2\x80\xae"
	             "gpj.exe, caf\xc3\xa9 \\ \"x\"\n");
	assert_string_equal(printed, "rs0\\x1b]0;owned\\x07 \\u202egpj.exe, caf\xc3\xa9 \\ \"x\"\\n\n");
	print(true, "sums\n  stored 1\n");
	assert_string_equal(printed, "sums\n  stored 1\n");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	    cmocka_unit_test_teardown(every_character_in_a_line, forget),
	    cmocka_unit_test_teardown(every_character_in_json, forget),
	    cmocka_unit_test_teardown(bytes_that_are_no_character, forget),
	    cmocka_unit_test_teardown(runs_stay_whole, forget),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
